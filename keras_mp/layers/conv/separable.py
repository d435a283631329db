"""Separable convolutions: a depthwise one and one of single pixels, each with fast gradients."""

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.conv.convolving import Convolving
from keras_mp.ops import convolution

__all__ = ["SeparableConv1D", "SeparableConv2D"]


class _Separable(Convolving):
    def convolve(self, inputs: tf.Tensor, where: execution.Execution) -> tf.Tensor:
        """Returns the convolution; see `Convolving`."""
        kernels = tf.convert_to_tensor(self.depthwise_kernel), tf.convert_to_tensor(self.pointwise_kernel)
        return convolution.separable(inputs, kernels, self.strides, self.padding, self.dilation_rate, where)


@keras.saving.register_keras_serializable(package="keras_mp")
class SeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    """1D depthwise convolution and then a pointwise one, with gradients that are fast on a CPU.

    A drop-in for `keras.layers.SeparableConv1D`, with the same arguments and weights. Its gradients are those of
    `keras_mp.layers.DepthwiseConv1D` and of a matmul.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 1 int.
        strides: int or tuple of 1 int. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes in between. Defaults to 1.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new steps, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.SeparableConv1D(4, 5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 2), "float32")).shape
        TensorShape([1, 8, 4])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class SeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    """2D depthwise convolution and then a pointwise one, with gradients that are fast in bfloat16 on a CPU.

    A drop-in for `keras.layers.SeparableConv2D`, with the same arguments and weights. Its gradients are those of
    `keras_mp.layers.DepthwiseConv2D` and of `keras_mp.layers.Conv2D` with a kernel of one pixel.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 2 ints.
        strides: int or tuple of 2 equal ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes in between. Defaults to 1.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new height, new width, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.SeparableConv2D(4, 5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 2), "float32")).shape
        TensorShape([1, 8, 8, 4])
    """
