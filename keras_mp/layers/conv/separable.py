"""Separable convolutions: a depthwise one and one of single pixels, each with the gradients that are fast."""

import functools
from typing import Any

import keras
import tensorflow as tf

from keras_mp.layers.conv import convolution, depthwise
from keras_mp.layers.conv.convolving import Convolving, differs, product

__all__ = ["SeparableConv1D", "SeparableConv2D"]


class _Separable(Convolving):
    def convolve(self, inputs: Any) -> tf.Tensor:
        """The convolution of a training step; see `Convolving`."""
        kernels = [tf.convert_to_tensor(kernel) for kernel in (self.depthwise_kernel, self.pointwise_kernel)]
        between = depthwise.convolution(self, inputs, kernels[0], self.padding)
        pointwise = functools.partial(tf.nn.conv2d, strides=1, padding="VALID")
        if differs(self, inputs, kernels[0]):
            pointwise = functools.partial(convolution.fast, pointwise, (1, 1), "valid")
        if self.rank == 2:
            return product(pointwise, between, kernels[1])
        return tf.squeeze(product(pointwise, tf.expand_dims(between, 1), tf.expand_dims(kernels[1], 0)), 1)


@keras.saving.register_keras_serializable(package="keras_mp")
class SeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    """1D convolution of each channel by itself and then of all, with gradients that are fast on a CPU.

    A drop-in for `keras.layers.SeparableConv1D`, with the same arguments and weights. Its gradients are those of
    `keras_mp.layers.DepthwiseConv1D` and of a product.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 1 int.
        strides: int or tuple of 1 int. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes in between. Defaults to 1.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of shape (batch, steps, channels), or with the channels second for
            `data_format="channels_first"`.

    Returns:
        Tensor of shape (batch, new steps, filters), or with the channels second, in the compute dtype.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.SeparableConv1D(4, 5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 2), "float32")).shape
        TensorShape([1, 8, 4])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class SeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    """2D convolution of each channel by itself and then of all, with gradients that are fast in bfloat16 on a CPU.

    A drop-in for `keras.layers.SeparableConv2D`, with the same arguments and weights. Its gradients are those of
    `keras_mp.layers.DepthwiseConv2D` and of `keras_mp.layers.Conv2D` with a kernel of one pixel.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 2 ints.
        strides: int or tuple of 2 equal ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes in between. Defaults to 1.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of shape (batch, height, width, channels), or with the channels second for
            `data_format="channels_first"`.

    Returns:
        Tensor of shape (batch, new height, new width, filters), or with the channels second, in the compute dtype.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.SeparableConv2D(4, 5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 2), "float32")).shape
        TensorShape([1, 8, 8, 4])
    """
