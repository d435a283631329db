"""The rectifier whose slope is learnt, with that slope's gradient summed in float32."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_variables
from keras_mp.ops import fusion

__all__ = ["PReLU"]


@keras.saving.register_keras_serializable(package="keras_mp")
class PReLU(keras.layers.PReLU):
    """Rectifier with a learnt slope below zero, whose gradient is summed in float32.

    A drop-in for `keras.layers.PReLU`, with the same arguments and weights. In 16 bits Keras's sums the gradient of the
    slope over batch and shared axes in the compute dtype, where it stops growing or overflows, and keeps several
    tensors of the size of the input for it; this one keeps the input.

    Args:
        alpha_initializer, alpha_regularizer, alpha_constraint, shared_axes: as in Keras.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, ...); float16, bfloat16, float32 or float64.

    Returns:
        Tensor of the shape of `inputs`, in the compute dtype.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.PReLU(keras.initializers.Constant(0.25), dtype="mixed_bfloat16")
        >>> layer(tf.constant([[-2.0, 0.0, 2.0]])).numpy().tolist()
        [[-0.5, 0.0, 2.0]]

    He et al., "Delving Deep into Rectifiers", 2015, https://arxiv.org/abs/1502.01852.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def call(self, inputs: Any) -> Any:
        """Computes max(x, 0) + alpha * min(x, 0); see the class."""
        x = inputs if inputs.dtype.is_floating else tf.cast(inputs, self.compute_dtype)
        alpha = keras_variables.uncast(self.alpha)
        dtype = str(keras.backend.result_type(x.dtype, alpha.dtype, "float32"))
        return _prelu(x, alpha, dtype=dtype, output_dtype=self.compute_dtype)


def _prelu_forward(x: Any, alpha: Any, *, dtype: str, output_dtype: str) -> Any:
    wide = tf.cast(x, dtype)
    return tf.cast(tf.where(wide > 0, wide, tf.cast(alpha, dtype) * wide), output_dtype)


def _prelu_backward(x: Any, alpha: Any, upstream: Any, *, dtype: str, output_dtype: str) -> list[Any]:
    del output_dtype
    wide, g, zero = tf.cast(x, dtype), tf.cast(upstream, dtype), tf.zeros([], dtype)
    # At zero the slope is 0, as it is to Keras.
    to_x = tf.where(wide > 0, g, tf.where(wide < 0, tf.cast(alpha, dtype) * g, zero))
    shared = (0, *(axis + 1 for axis, size in enumerate(alpha.shape) if size == 1))
    to_alpha = fusion.total(tf.where(wide < 0, g * wide, zero), shared)
    return [tf.cast(to_x, x.dtype), tf.cast(tf.reshape(to_alpha, tf.shape(alpha)), alpha.dtype)]


_prelu = fusion.operation(_prelu_forward, _prelu_backward)
