"""The rectifier whose slope is learnt, with that slope's gradient summed in float32."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_variables
from keras_mp.ops.prelu import prelu

__all__ = ["PReLU"]


@keras.saving.register_keras_serializable(package="keras_mp")
class PReLU(keras.layers.PReLU):
    """Rectifier with a learnt slope below zero, whose gradient is summed in float32.

    A drop-in for `keras.layers.PReLU`, with the same arguments and weights. In half precision Keras's layer sums the
    slope's gradient over batch and shared axes in the compute dtype, where it stops growing or overflows. It also keeps
    several tensors of the input's size for the backward pass. This layer keeps the input.

    Args:
        *args, **kwargs: as in Keras.

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
        self.autocast = False  # a float32 input must not be rounded before the float32 computation

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Computes max(x, 0) + alpha * min(x, 0); see the class."""
        x = inputs if inputs.dtype.is_floating else tf.cast(inputs, self.compute_dtype)
        alpha = keras_variables.uncast(self.alpha)
        return prelu(x, alpha, self.compute_dtype, execution.current())
