"""Cross-entropies that take a model's 16-bit output as it is and compute in float32.

Stock Keras casts the predictions to float32 before the loss, and the float32 copy, as large as the logits, is kept for
the backward pass, together with the gradient that TensorFlow's kernel computes ahead. Here the backward pass keeps the
16-bit predictions and the labels, and computes the rest again.
"""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layers
from keras_mp.ops import fusion

__all__ = ["BinaryCrossentropy", "CategoricalCrossentropy", "SparseCategoricalCrossentropy"]


class _Reduction(keras.losses.Loss):
    """Keras's own masks, sample weights, reduction and division among replicas, of losses that are computed already."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        del y_true
        return y_pred


class _WithoutFloat32Copy:
    """What the losses here do otherwise than the Keras classes that they inherit from as well."""

    def __call__(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        # `Loss.__call__` casts labels and predictions to the loss's dtype before `call` sees them, so `call` is too
        # late to keep them as they are, and all that follows it is Keras's business. So `call` is run here, on what
        # was given, and Keras's `__call__` on its answer, which is float32 already.
        mask = keras_layers.mask_of(y_pred)
        with keras.name_scope(self.name):
            y_true, y_pred = _as_given(y_true), _as_given(y_pred)
            losses = self.call(y_true, y_pred)
            of_losses = keras_layers.mask_of(losses)
        if mask is not None and of_losses is not None:
            mask = mask & of_losses
        elif mask is None:
            mask = of_losses
        if mask is not None:
            losses = keras_layers.with_mask(losses, mask)
        reduced = _Reduction(name=self.name, reduction=self.reduction, dtype=self._dtype_for_values)
        return keras.ops.cast(reduced(losses, losses, sample_weight), self.dtype)

    def __repr__(self: Any) -> str:
        return f"<{type(self).__name__}({self.get_config()})>"  # Keras's would print `fn`, which is a method of this

    @property
    def _dtype_for_values(self: Any) -> str:
        return keras.backend.result_type(self.dtype, "float32")


@keras.saving.register_keras_serializable(package="keras_mp")
class SparseCategoricalCrossentropy(_WithoutFloat32Copy, keras.losses.SparseCategoricalCrossentropy):
    """Cross-entropy of integer labels, in float32 from 16-bit predictions of which it keeps no float32 copy.

    A drop-in for `keras.losses.SparseCategoricalCrossentropy`. Integer labels stay integers, whatever `dtype` is.

    Args:
        from_logits: bool, whether the predictions are logits. Defaults to False, probabilities.
        ignore_class: int, a label whose entries do not count; None for none. Defaults to None.
        reduction: "sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none" or None. Defaults to
            "sum_over_batch_size".
        axis: int, the axis of the classes, which must be the last. Defaults to -1.
        name: str, of the loss. Defaults to "sparse_categorical_crossentropy".
        dtype: str or `keras.DTypePolicy`, of the answer, and of the computation where that is wider than float32.
            Defaults to `keras.config.floatx()`.

    Call arguments:
        y_true: labels of shape (batch, ...) or (batch, ..., 1); integers, or whole numbers in a floating-point dtype.
        y_pred: predictions of shape (batch, ..., classes); float16, bfloat16, float32 or float64.
        sample_weight: weights that broadcast to (batch, ...). Defaults to None.

    Returns:
        A scalar, or a tensor of shape (batch, ...) if `reduction` is None, of `dtype`.

    Raises:
        ValueError: if `reduction` is unknown, `axis` is not the last or shapes do not match.
        tf.errors.InvalidArgumentError: if a label is no class, outside XLA; XLA answers NaN for it.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> loss = keras_mp.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> round(float(loss(np.array([0]), tf.constant([[60000.0, 60000.0, 0.0]], "float16"))), 4)
        0.6931

    The gradient to the logits is softmax(logits) - one_hot(label): Goodfellow, Bengio and Courville, "Deep Learning",
    2016, section 6.2.2.3.
    """

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        axis: int = -1,
        name: str = "sparse_categorical_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, ignore_class, reduction, axis, name, dtype)
        self.axis = axis
        self.fn = self._values  # what Keras's `call` runs, once it has made the ranks of labels and predictions match

    def get_config(self) -> dict[str, Any]:
        """The arguments of the loss."""
        return {**super().get_config(), "axis": self.axis}

    def _values(self, y_true: Any, y_pred: Any, from_logits: bool, ignore_class: int | None, axis: int) -> Any:
        rank = len(y_pred.shape)
        if axis not in (-1, rank - 1):
            raise ValueError(f"Only axis=-1 is currently supported. Received: axis={axis}")
        if rank == len(y_true.shape) and y_true.shape[-1] == 1:
            y_true = tf.squeeze(y_true, -1)
        if rank < 1 or len(y_true.shape) != rank - 1:
            raise ValueError(
                "Argument `output` must have rank (ndim) `target.ndim - 1`. Received: "
                f"target.shape={y_true.shape}, output.shape={y_pred.shape}"
            )
        if not y_pred.shape[:-1].is_compatible_with(y_true.shape):
            raise ValueError(
                "Arguments `target` and `output` must have the same shape up until the last dimension: "
                f"target.shape={y_true.shape}, output.shape={y_pred.shape}"
            )
        y_pred, from_logits = _logits(y_pred, from_logits, "Softmax", "sparse_categorical_crossentropy")
        labels = y_true if y_true.dtype in (tf.int32, tf.int64) else tf.cast(y_true, "int64")
        if ignore_class is None:
            return _sparse(self, y_pred, labels, from_logits=from_logits)
        valid = tf.not_equal(labels, tf.cast(ignore_class, labels.dtype))
        labels = tf.where(valid, labels, tf.zeros_like(labels))
        losses = _sparse(self, y_pred, labels, valid, from_logits=from_logits)
        return keras_layers.with_mask(losses, valid)


@keras.saving.register_keras_serializable(package="keras_mp")
class CategoricalCrossentropy(_WithoutFloat32Copy, keras.losses.CategoricalCrossentropy):
    """Cross-entropy of one-hot labels, in float32 from 16-bit predictions of which it keeps no float32 copy.

    A drop-in for `keras.losses.CategoricalCrossentropy`. A 16-bit logit of -inf is a class that cannot be: where its
    label is 0 it adds nothing, and label smoothing counts the classes along `axis`.

    Args:
        from_logits: bool, whether the predictions are logits. Defaults to False, probabilities.
        label_smoothing: float in [0, 1], the share of each label that is spread evenly over all classes. Defaults to 0.
        axis: int, the axis of the classes. Defaults to -1.
        reduction: "sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none" or None. Defaults to
            "sum_over_batch_size".
        name: str, of the loss. Defaults to "categorical_crossentropy".
        dtype: str or `keras.DTypePolicy`, of the answer, and of the computation where that is wider than float32.
            Defaults to `keras.config.floatx()`.

    Call arguments:
        y_true: probabilities of the classes, of the shape of `y_pred`; any number or bool.
        y_pred: predictions of shape (batch, ..., classes); float16, bfloat16, float32 or float64.
        sample_weight: weights that broadcast to (batch, ...). Defaults to None.

    Returns:
        A scalar, or a tensor of shape (batch, ...) if `reduction` is None, of `dtype`.

    Raises:
        ValueError: if `reduction` is unknown, `axis` is no int or shapes do not match.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> loss = keras_mp.losses.CategoricalCrossentropy(from_logits=True)
        >>> round(float(loss(np.eye(3)[:1], tf.constant([[60000.0, 60000.0, 0.0]], "float16"))), 4)
        0.6931

    Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, section 7.
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "categorical_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        self.fn = self._values

    def _values(self, y_true: Any, y_pred: Any, from_logits: bool, label_smoothing: float, axis: int) -> Any:
        if isinstance(axis, bool):
            raise ValueError(f"`axis` must be of type `int`. Received: axis={axis} of type {type(axis)}")
        _require_same_shape(y_true, y_pred)
        if y_pred.shape[axis] == 1:
            warnings.warn(
                "In loss categorical_crossentropy, expected y_pred.shape to be (batch_size, num_classes) with "
                f"num_classes > 1. Received: y_pred.shape={y_pred.shape}. Consider using 'binary_crossentropy' if you "
                "only have 2 classes.",
                SyntaxWarning,
                stacklevel=4,
            )
        y_pred, from_logits = _logits(y_pred, from_logits, "Softmax", "categorical_crossentropy")
        settings = {"from_logits": from_logits, "label_smoothing": float(label_smoothing), "axis": axis}
        return _categorical(self, y_pred, y_true, **settings)


@keras.saving.register_keras_serializable(package="keras_mp")
class BinaryCrossentropy(_WithoutFloat32Copy, keras.losses.BinaryCrossentropy):
    """Cross-entropy of labels of 0 or 1, in float32 from 16-bit predictions of which it keeps no float32 copy.

    A drop-in for `keras.losses.BinaryCrossentropy`.

    Args:
        from_logits: bool, whether the predictions are logits. Defaults to False, probabilities.
        label_smoothing: float in [0, 1], the share of each label that is replaced by one half. Defaults to 0.
        axis: int, the axis that the mean is taken over. Defaults to -1.
        reduction: "sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none" or None. Defaults to
            "sum_over_batch_size".
        name: str, of the loss. Defaults to "binary_crossentropy".
        dtype: str or `keras.DTypePolicy`, of the answer, and of the computation where that is wider than float32.
            Defaults to `keras.config.floatx()`.

    Call arguments:
        y_true: labels between 0 and 1, of the shape of `y_pred`; any number or bool.
        y_pred: predictions of shape (batch, ..., n); float16, bfloat16, float32 or float64.
        sample_weight: weights that broadcast to (batch, ...). Defaults to None.

    Returns:
        A scalar, or a tensor of shape (batch, ...) if `reduction` is None, of `dtype`.

    Raises:
        ValueError: if `reduction` is unknown or shapes do not match.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> loss = keras_mp.losses.BinaryCrossentropy()
        >>> round(float(loss(np.array([[1]]), tf.constant([[0.5]], "bfloat16"))), 4)
        0.6931

    Probabilities are kept 1e-7 away from 0 and 1, which float32 can tell from them and 16 bits cannot.
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "binary_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        self.fn = self._values

    def _values(self, y_true: Any, y_pred: Any, from_logits: bool, label_smoothing: float, axis: int) -> Any:
        _require_same_shape(y_true, y_pred)
        y_pred, from_logits = _logits(y_pred, from_logits, "Sigmoid", "binary_crossentropy")
        settings = {"from_logits": from_logits, "label_smoothing": float(label_smoothing), "axis": axis}
        return _binary(self, y_pred, y_true, **settings)


def _as_given(x: Any) -> Any:
    """`x` as a tensor of its own dtype, with what Keras has attached to it."""
    return x if tf.is_tensor(x) else keras.ops.convert_to_tensor(x)


def _is_16_bit(x: Any) -> bool:
    return bool(x.dtype.is_floating and x.dtype.size == 2)


def _require_same_shape(y_true: Any, y_pred: Any) -> None:
    if len(y_true.shape) != len(y_pred.shape):
        raise ValueError(
            "Arguments `target` and `output` must have the same rank (ndim). Received: "
            f"target.shape={y_true.shape}, output.shape={y_pred.shape}"
        )
    if not y_true.shape.is_compatible_with(y_pred.shape):
        raise ValueError(
            "Arguments `target` and `output` must have the same shape. Received: "
            f"target.shape={y_true.shape}, output.shape={y_pred.shape}"
        )


def _logits(y_pred: Any, from_logits: bool, activation: str, loss: str) -> tuple[Any, bool]:
    """The logits behind probabilities, where their activation has attached them, as the Keras losses use them."""
    logits = keras_layers.logits_of(y_pred)
    if logits is None:
        return y_pred, from_logits
    if from_logits:
        warnings.warn(
            f'"`{loss}` received `from_logits=True`, but the `output` argument was produced by a {activation} '
            "activation and thus does not represent logits. Was this intended?",
            stacklevel=5,
        )
    return logits, True


def _per_example(values: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a loss of `values`, which gets tensors by position and settings by name, and casts the first to `dtype`.

    Where the predictions are 16-bit or XLA compiles it, the backward pass keeps them and the labels and runs `values`
    again.
    """

    def to_predictions(*given: Any, **settings: Any) -> Any:
        *inputs, upstream = given
        with tf.GradientTape() as tape:
            tape.watch(inputs[0])
            y = values(*inputs, **settings)
        return tape.gradient(y, inputs[0], upstream)

    def to_labels(*given: Any, **settings: Any) -> Any:
        *inputs, upstream = given
        with tf.GradientTape() as tape:
            tape.watch(inputs[1])
            y = values(*inputs, **settings)
        return tape.gradient(y, inputs[1], upstream)

    values_of, to_predictions_of, to_labels_of = map(fusion.fusible, (values, to_predictions, to_labels))

    def run(loss: Any, *inputs: Any, **settings: Any) -> Any:
        settings["dtype"] = loss._dtype_for_values
        fused = fusion.pays(*inputs)
        if not fused and not _is_16_bit(inputs[0]):
            return values(*inputs, **settings)

        @fusion.custom_gradient
        def with_gradient(*inputs: Any) -> Any:
            def gradient(upstream: Any) -> list[Any]:
                gradients = [to_predictions_of(fused)(*inputs, upstream, **settings)] + [None] * (len(inputs) - 1)
                # A function of its own, as large as the labels, that a graph drops where nobody asks for it.
                if inputs[1].dtype.is_floating:
                    gradients[1] = to_labels_of(fused)(*inputs, upstream, **settings)
                return gradients

            return values_of(fused)(*inputs, **settings), gradient

        return with_gradient(*inputs)

    return run


def _sparse_values(y_pred: Any, labels: Any, *valid: Any, from_logits: bool, dtype: str) -> Any:
    x = tf.cast(y_pred, dtype)
    if valid:
        x = tf.where(valid[0][..., tf.newaxis], x, tf.zeros([], dtype))
    losses = keras.ops.sparse_categorical_crossentropy(labels, x, from_logits=from_logits)
    return tf.where(valid[0], losses, tf.zeros([], dtype)) if valid else losses


def _categorical_values(
    y_pred: Any, y_true: Any, *, from_logits: bool, label_smoothing: float, axis: int, dtype: str
) -> Any:
    x, target = tf.cast(y_pred, dtype), tf.cast(y_true, dtype)
    if from_logits and _is_16_bit(y_pred):
        # A mask of -1e9 is -inf in float16; TensorFlow multiplies it with the label 0.
        x = tf.where(tf.math.is_inf(x) & (x < 0), x.dtype.min, x)
    if label_smoothing:
        classes = tf.cast(tf.shape(target)[axis], dtype)  # Keras takes the last axis, whatever `axis` is
        target = target * (1.0 - label_smoothing) + label_smoothing / classes
    return keras.ops.categorical_crossentropy(target, x, from_logits=from_logits, axis=axis)


def _binary_values(
    y_pred: Any, y_true: Any, *, from_logits: bool, label_smoothing: float, axis: int, dtype: str
) -> Any:
    target = tf.cast(y_true, dtype)
    if label_smoothing:
        target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
    losses = keras.ops.binary_crossentropy(target, tf.cast(y_pred, dtype), from_logits=from_logits)
    return tf.reduce_mean(losses, axis)


_categorical = _per_example(_categorical_values)
_binary = _per_example(_binary_values)
_sparse_unchecked = _per_example(_sparse_values)


def _sparse(loss: Any, y_pred: Any, labels: Any, *valid: Any, **settings: Any) -> Any:
    if fusion.pays(y_pred, labels):
        # TensorFlow's kernel refuses a label that is no class; what XLA makes of it would be a silent NaN.
        classes = tf.shape(y_pred, labels.dtype)[-1]
        tf.debugging.Assert(
            tf.reduce_all((labels >= 0) & (labels < classes)),
            [
                "Received a label value which is outside the valid range of [0, classes).",
                "Classes, labels:",
                classes,
                labels,
            ],
        )
    return _sparse_unchecked(loss, y_pred, labels, *valid, **settings)
