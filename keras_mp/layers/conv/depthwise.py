"""Depthwise convolutions with gradients that are fast in bfloat16 on a CPU.

The gradient to a kernel larger than 3 x 3 is put together of those to kernels of that size, for which alone there is
fast code. The gradient to the input has fast code, where there are strides, in float32 alone.
"""

import functools
from typing import Any

import keras
import tensorflow as tf

from keras_mp.layers.conv.convolving import Convolving, differs, product
from keras_mp.ops import conv_gradients

__all__ = ["DepthwiseConv1D", "DepthwiseConv2D", "convolution"]


@keras.saving.register_keras_serializable(package="keras_mp")
class DepthwiseConv1D(Convolving, keras.layers.DepthwiseConv1D):
    """1D convolution of each channel by itself, with gradients that are fast for long kernels on a CPU.

    A drop-in for `keras.layers.DepthwiseConv1D`, with the same arguments, weights and numbers. The gradient to a kernel
    of more than 3 steps is put together of those to kernels of 3.

    Args:
        kernel_size: int or tuple of 1 int.
        strides: int or tuple of 1 int. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes. Defaults to 1.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of shape (batch, steps, channels), or with the channels second for
            `data_format="channels_first"`.

    Returns:
        Tensor of shape (batch, new steps, channels * depth_multiplier), or with the channels second, in the compute
        dtype.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.DepthwiseConv1D(5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 2), "float32")).shape
        TensorShape([1, 8, 2])
    """

    def convolve(self, inputs: Any) -> tf.Tensor:
        """The convolution of a training step; see `Convolving`."""
        return convolution(self, inputs, tf.convert_to_tensor(self.kernel), self.padding)


@keras.saving.register_keras_serializable(package="keras_mp")
class DepthwiseConv2D(Convolving, keras.layers.DepthwiseConv2D):
    """2D convolution of each channel by itself, with gradients that are fast in bfloat16 on a CPU.

    A drop-in for `keras.layers.DepthwiseConv2D`, with the same arguments, weights and numbers. The gradient to a kernel
    larger than 3 x 3 is put together of those to kernels of 3 x 3, and that to the input is computed in float32 where
    there are strides.

    Args:
        kernel_size: int or tuple of 2 ints.
        strides: int or tuple of 2 equal ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        depth_multiplier: int, how many channels each channel becomes. Defaults to 1.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of shape (batch, height, width, channels), or with the channels second for
            `data_format="channels_first"`.

    Returns:
        Tensor of shape (batch, new height, new width, channels * depth_multiplier), or with the channels second, in the
        compute dtype.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.DepthwiseConv2D(5, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 2), "float32")).shape
        TensorShape([1, 8, 8, 2])
    """

    def convolve(self, inputs: Any) -> tf.Tensor:
        """The convolution of a training step; see `Convolving`."""
        return convolution(self, inputs, tf.convert_to_tensor(self.kernel), self.padding)


def convolution(layer: Any, inputs: tf.Tensor, kernel: tf.Tensor, padding: str) -> tf.Tensor:
    """A depthwise convolution in 1D or 2D, channels last.

    Args:
        layer: of the strides and the dilation.
        inputs: tensor of shape (batch, pixels of each axis, channels).
        kernel: of shape (pixels of each axis, channels, multiplier).
        padding: "same" or "valid".
    """
    if not differs(layer, inputs, kernel):
        convolve = functools.partial(
            keras.ops.depthwise_conv,
            strides=layer.strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=layer.dilation_rate,
        )
        return product(convolve, inputs, kernel)
    if layer.rank == 1:  # no slice makes the axis: its gradient would be a copy
        strides = (*layer.strides, *layer.strides)
        images = _with_gradients(strides, padding, tf.expand_dims(inputs, 1), tf.expand_dims(kernel, 0))
        return tf.squeeze(images, 1)
    return _with_gradients(layer.strides, padding, inputs, kernel)


def _with_gradients(strides: tuple[int, int], padding: str, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A depthwise convolution of images, of sizes that are known, with gradients that are fast."""
    of_all, has_strides = (1, *strides, 1), max(strides) > 1
    size = tuple(kernel.shape)
    in_tiles = max(size[:2]) > conv_gradients.TILE
    convolve = functools.partial(tf.nn.depthwise_conv2d, strides=of_all, padding=padding.upper())

    def to_inputs(kernel: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        dtype = kernel.dtype
        if has_strides and dtype.size < 4:
            kernel, upstream = tf.cast(kernel, tf.float32), tf.cast(upstream, tf.float32)
        shape = tf.shape(inputs)
        gradient = tf.nn.depthwise_conv2d_backprop_input(shape, kernel, upstream, of_all, padding.upper())
        return tf.cast(gradient, dtype)

    def to_kernel(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        dtype = inputs.dtype
        if in_tiles and (dtype == tf.bfloat16 or (dtype == tf.float32 and not has_strides)):
            return conv_gradients.by_tiles(inputs, upstream, size, strides, padding)
        return tf.nn.depthwise_conv2d_backprop_filter(inputs, size, upstream, of_all, padding.upper())

    return product(functools.partial(conv_gradients.convolved, convolve, to_inputs, to_kernel), inputs, kernel)
