"""The rectifier with a learnt slope, whose gradient is summed in float32."""

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["prelu"]


def prelu(x: tf.Tensor, alpha: tf.Tensor, output_dtype: str, where: execution.Execution | None = None) -> tf.Tensor:
    """Returns max(x, 0) + alpha * min(x, 0). The backward pass keeps the input and nothing else of its size.

    Args:
        x: floating-point tensor of shape (batch, ...).
        alpha: slopes, of the shape of a sample with size 1 for shared axes.
        output_dtype: dtype of the result.
        where: where the layer's call is executed; by default `execution.current()`.
    """
    dtype = str(keras.backend.result_type(x.dtype, alpha.dtype, "float32"))
    return _operation(x, alpha, dtype=dtype, output_dtype=output_dtype, where=where)


def _forward(x: tf.Tensor, alpha: tf.Tensor, *, dtype: str, output_dtype: str) -> tf.Tensor:
    wide = tf.cast(x, dtype)
    return tf.cast(tf.where(wide > 0, wide, tf.cast(alpha, dtype) * wide), output_dtype)


def _backward(x: tf.Tensor, alpha: tf.Tensor, upstream: tf.Tensor, *, dtype: str, output_dtype: str) -> list[tf.Tensor]:
    del output_dtype
    wide, g, zero = tf.cast(x, dtype), tf.cast(upstream, dtype), tf.zeros([], dtype)
    # At zero the slope is 0, as Keras's is.
    to_x = tf.where(wide > 0, g, tf.where(wide < 0, tf.cast(alpha, dtype) * g, zero))
    shared = (0, *(axis + 1 for axis, size in enumerate(alpha.shape) if size == 1))
    to_alpha = fusion.total(tf.where(wide < 0, g * wide, zero), shared)
    return [tf.cast(to_x, x.dtype), tf.cast(tf.reshape(to_alpha, tf.shape(alpha)), alpha.dtype)]


_operation = fusion.operation(_forward, _backward)
