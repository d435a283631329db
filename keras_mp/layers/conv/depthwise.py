"""Depthwise convolutions with gradients that are fast in bfloat16 on a CPU."""

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.conv.convolving import Convolving
from keras_mp.ops import convolution

__all__ = ["DepthwiseConv1D", "DepthwiseConv2D"]


class _Depthwise(Convolving):
    def convolve(self, inputs: tf.Tensor, where: execution.Execution) -> tf.Tensor:
        """Returns the convolution; see `Convolving`."""
        kernel = tf.convert_to_tensor(self.kernel)
        return convolution.depthwise(inputs, kernel, self.strides, self.padding, self.dilation_rate, where)


@keras.saving.register_keras_serializable(package="keras_mp")
class DepthwiseConv1D(_Depthwise, keras.layers.DepthwiseConv1D):
    """1D convolution of each channel by itself, with gradients that are fast for long kernels on a CPU.

    A drop-in for `keras.layers.DepthwiseConv1D`, with the same arguments, weights and numbers. The gradient to a kernel
    of more than 3 timesteps consists of gradients to kernels of 3.

    Args:
        kernel_size: int or tuple of 1 int.
        strides: int or tuple of 1 int. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes. Defaults to 1.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new steps, channels * depth_multiplier), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.DepthwiseConv1D(5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 2), "float32")).shape
        TensorShape([1, 8, 2])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class DepthwiseConv2D(_Depthwise, keras.layers.DepthwiseConv2D):
    """2D convolution of each channel by itself, with gradients that are fast in bfloat16 on a CPU.

    A drop-in for `keras.layers.DepthwiseConv2D`, with the same arguments, weights and numbers. The gradient to a kernel
    larger than 3 x 3 consists of gradients to kernels of 3 x 3. With strides, the gradient to the input is computed in
    float32.

    Args:
        kernel_size: int or tuple of 2 ints.
        strides: int or tuple of 2 equal ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes. Defaults to 1.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new height, new width, channels * depth_multiplier), or with the channels second, in the
        compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.DepthwiseConv2D(5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 2), "float32")).shape
        TensorShape([1, 8, 8, 2])
    """
