"""Cross-entropies of each example, computed in float32 from predictions that stay 16-bit.

Stock Keras casts the predictions to float32 first. The backward pass keeps the float32 copy, as large as the logits. It
also keeps the gradient that TensorFlow's kernel computes ahead. Here it keeps the 16-bit predictions and the labels and
computes the rest again.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["binary", "categorical", "sparse"]


def _per_example(values: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Makes a loss of `values`, which gets tensors by position and settings by name, and casts the first to `dtype`.

    Where the predictions are 16-bit or XLA compiles the loss, the backward pass keeps them and the labels and runs
    `values` again.
    """

    def to_input(index: int) -> Callable[..., tf.Tensor]:
        def gradient(*given: tf.Tensor, **settings: Any) -> tf.Tensor:
            *inputs, upstream = given
            with tf.GradientTape() as tape:
                tape.watch(inputs[index])
                y = values(*inputs, **settings)
            return tape.gradient(y, inputs[index], upstream)

        return gradient

    values_of, to_predictions_of, to_labels_of = map(fusion.fusible, (values, to_input(0), to_input(1)))

    def run(*inputs: tf.Tensor, where: execution.Execution | None = None, **settings: Any) -> tf.Tensor:
        fused = fusion.pays(*inputs, where=where)
        if not fused and not _is_16_bit(inputs[0]):
            return values(*inputs, **settings)

        @fusion.custom_gradient
        def with_gradient(*inputs: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
            def gradient(upstream: tf.Tensor) -> list[tf.Tensor | None]:
                gradients = [to_predictions_of(fused)(*inputs, upstream, **settings)] + [None] * (len(inputs) - 1)
                # A separate function, as large as the labels, that a graph drops where nobody asks for it.
                if inputs[1].dtype.is_floating:
                    gradients[1] = to_labels_of(fused)(*inputs, upstream, **settings)
                return gradients

            return values_of(fused)(*inputs, **settings), gradient

        return with_gradient(*inputs)

    return run


def _is_16_bit(x: tf.Tensor) -> bool:
    return bool(x.dtype.is_floating and x.dtype.size == 2)


def _sparse_values(y_pred: tf.Tensor, labels: tf.Tensor, *valid: tf.Tensor, from_logits: bool, dtype: str) -> tf.Tensor:
    x = tf.cast(y_pred, dtype)
    if valid:
        x = tf.where(valid[0][..., tf.newaxis], x, tf.zeros([], dtype))
    losses = keras.ops.sparse_categorical_crossentropy(labels, x, from_logits=from_logits)
    return tf.where(valid[0], losses, tf.zeros([], dtype)) if valid else losses


def _categorical_values(
    y_pred: tf.Tensor, y_true: tf.Tensor, *, from_logits: bool, label_smoothing: float, axis: int, dtype: str
) -> tf.Tensor:
    x, target = tf.cast(y_pred, dtype), tf.cast(y_true, dtype)
    if from_logits and _is_16_bit(y_pred):
        # A mask of -1e9 is -inf in float16; TensorFlow multiplies it with the label 0.
        x = tf.where(tf.math.is_inf(x) & (x < 0), x.dtype.min, x)
    if label_smoothing:
        classes = tf.cast(tf.shape(target)[axis], dtype)  # Keras takes the last axis, whatever `axis` is
        target = target * (1.0 - label_smoothing) + label_smoothing / classes
    return keras.ops.categorical_crossentropy(target, x, from_logits=from_logits, axis=axis)


def _binary_values(
    y_pred: tf.Tensor, y_true: tf.Tensor, *, from_logits: bool, label_smoothing: float, axis: int, dtype: str
) -> tf.Tensor:
    target = tf.cast(y_true, dtype)
    if label_smoothing:
        target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
    losses = keras.ops.binary_crossentropy(target, tf.cast(y_pred, dtype), from_logits=from_logits)
    return tf.reduce_mean(losses, axis)


# Each takes predictions and labels, and by name `from_logits`, `label_smoothing`, `axis` and the `dtype` to compute in.
categorical = _per_example(_categorical_values)
binary = _per_example(_binary_values)
_sparse_unchecked = _per_example(_sparse_values)


def sparse(
    y_pred: tf.Tensor, labels: tf.Tensor, valid: tf.Tensor | None, *, from_logits: bool, dtype: str
) -> tf.Tensor:
    """Returns the cross-entropy of integer labels.

    Args:
        y_pred: predictions of shape (batch, ..., classes).
        labels: int32 or int64 tensor of shape (batch, ...).
        valid: bools of that shape: False where the loss is 0. None for True everywhere.
        from_logits: whether the predictions are logits.
        dtype: dtype to compute in and of the result.

    Raises:
        tf.errors.InvalidArgumentError: if a label is no class, unless XLA compiles the caller.
    """
    where = execution.current()
    if fusion.pays(y_pred, labels, where=where):
        # TensorFlow's kernel refuses a label that is no class. XLA would return NaN for it.
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
    inputs = (y_pred, labels) if valid is None else (y_pred, labels, valid)
    return _sparse_unchecked(*inputs, where=where, from_logits=from_logits, dtype=dtype)
