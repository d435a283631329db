"""Cross-entropies that take a model's 16-bit output as it is and compute in float32."""

import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layers
from keras_mp.ops import crossentropy

__all__ = ["BinaryCrossentropy", "CategoricalCrossentropy", "SparseCategoricalCrossentropy"]


class _Reduction(keras.losses.Loss):
    """Keras's masks, sample weights, reduction and division among replicas, for losses that are already computed."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        del y_true
        return y_pred


class _WithoutFloat32Copy(keras.losses.Loss):
    """A loss that sees labels and predictions in their own dtypes. Keras's loss comes after it among the bases."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        # Keras's `__call__` casts labels and predictions to the loss's dtype before `call` sees them. So `call` runs
        # here on the originals, and Keras's `__call__` on the losses, which are float32 already.
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

    def __repr__(self) -> str:
        return f"<{type(self).__name__}({self.get_config()})>"  # Keras's would print `fn`, a method of this object

    @property
    def _dtype_for_values(self) -> str:
        return str(keras.backend.result_type(self.dtype, "float32"))


@keras.saving.register_keras_serializable(package="keras_mp")
class SparseCategoricalCrossentropy(_WithoutFloat32Copy, keras.losses.SparseCategoricalCrossentropy):
    """Cross-entropy of integer labels, in float32 from 16-bit predictions, without a float32 copy of them.

    A drop-in for `keras.losses.SparseCategoricalCrossentropy`. Integer labels stay integers, whatever `dtype` is.

    Args:
        from_logits: bool, whether the predictions are logits. Defaults to False, probabilities.
        ignore_class: int, a label whose entries do not count; None for none. Defaults to None.
        reduction: "sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none" or None. Defaults to
            "sum_over_batch_size".
        axis: int, the axis of the classes, which must be the last one. Defaults to -1.
        name: str, name of the loss. Defaults to "sparse_categorical_crossentropy".
        dtype: str or `keras.DTypePolicy` of the result, and of the computation where it is wider than float32.
            Defaults to `keras.config.floatx()`.

    Call arguments:
        y_true: labels of shape (batch, ...) or (batch, ..., 1); integers, or whole numbers in a floating-point dtype.
        y_pred: predictions of shape (batch, ..., classes); float16, bfloat16, float32 or float64.
        sample_weight: weights that broadcast to (batch, ...). Defaults to None.

    Returns:
        A scalar, or a tensor of shape (batch, ...) if `reduction` is None, of `dtype`.

    Raises:
        ValueError: if `reduction` is unknown, `axis` is not the last or shapes do not match.
        tf.errors.InvalidArgumentError: if a label is no class, outside XLA; XLA returns NaN for it.

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
        dtype: "str | keras.DTypePolicy | None" = None,
    ) -> None:
        super().__init__(from_logits, ignore_class, reduction, axis, name, dtype)
        self.axis = axis
        self.fn = self._values  # Keras's `call` runs it, once the ranks of labels and predictions match

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the loss."""
        return {**super().get_config(), "axis": self.axis}

    def _values(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, from_logits: bool, ignore_class: int | None, axis: int
    ) -> tf.Tensor:
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
        valid = None
        if ignore_class is not None:
            valid = tf.not_equal(labels, tf.cast(ignore_class, labels.dtype))
            labels = tf.where(valid, labels, tf.zeros_like(labels))
        losses = crossentropy.sparse(y_pred, labels, valid, from_logits=from_logits, dtype=self._dtype_for_values)
        return losses if valid is None else keras_layers.with_mask(losses, valid)


@keras.saving.register_keras_serializable(package="keras_mp")
class CategoricalCrossentropy(_WithoutFloat32Copy, keras.losses.CategoricalCrossentropy):
    """Cross-entropy of one-hot labels, in float32 from 16-bit predictions, without a float32 copy of them.

    A drop-in for `keras.losses.CategoricalCrossentropy`. A 16-bit logit of -inf is a class that cannot be: where its
    label is 0 it adds nothing, and label smoothing counts the classes along `axis`.

    Args:
        from_logits: bool, whether the predictions are logits. Defaults to False, probabilities.
        label_smoothing: float in [0, 1], the share of each label that is spread evenly over all classes. Defaults to 0.
        axis: int, the axis of the classes. Defaults to -1.
        reduction: "sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none" or None. Defaults to
            "sum_over_batch_size".
        name: str, name of the loss. Defaults to "categorical_crossentropy".
        dtype: str or `keras.DTypePolicy` of the result, and of the computation where it is wider than float32.
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
        dtype: "str | keras.DTypePolicy | None" = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        self.fn = self._values

    def _values(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, from_logits: bool, label_smoothing: float, axis: int
    ) -> tf.Tensor:
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
        return crossentropy.categorical(y_pred, y_true, dtype=self._dtype_for_values, **settings)


@keras.saving.register_keras_serializable(package="keras_mp")
class BinaryCrossentropy(_WithoutFloat32Copy, keras.losses.BinaryCrossentropy):
    """Cross-entropy of labels of 0 or 1, in float32 from 16-bit predictions, without a float32 copy of them.

    A drop-in for `keras.losses.BinaryCrossentropy`.

    Args:
        from_logits: bool, whether the predictions are logits. Defaults to False, probabilities.
        label_smoothing: float in [0, 1], the share of each label that is replaced by one half. Defaults to 0.
        axis: int, the axis that the mean is taken over. Defaults to -1.
        reduction: "sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none" or None. Defaults to
            "sum_over_batch_size".
        name: str, name of the loss. Defaults to "binary_crossentropy".
        dtype: str or `keras.DTypePolicy` of the result, and of the computation where it is wider than float32.
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
        dtype: "str | keras.DTypePolicy | None" = None,
    ) -> None:
        super().__init__(from_logits, label_smoothing, axis, reduction, name, dtype)
        self.fn = self._values

    def _values(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, from_logits: bool, label_smoothing: float, axis: int
    ) -> tf.Tensor:
        _require_same_shape(y_true, y_pred)
        y_pred, from_logits = _logits(y_pred, from_logits, "Sigmoid", "binary_crossentropy")
        settings = {"from_logits": from_logits, "label_smoothing": float(label_smoothing), "axis": axis}
        return crossentropy.binary(y_pred, y_true, dtype=self._dtype_for_values, **settings)


def _as_given(x: Any) -> tf.Tensor:
    """Returns `x` as a tensor of its own dtype, with the attributes that Keras gave it."""
    return x if tf.is_tensor(x) else keras.ops.convert_to_tensor(x)


def _require_same_shape(y_true: tf.Tensor, y_pred: tf.Tensor) -> None:
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


def _logits(y_pred: tf.Tensor, from_logits: bool, activation: str, loss: str) -> tuple[tf.Tensor, bool]:
    """Returns the logits that an activation attached to its probabilities, as Keras's losses use them."""
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
