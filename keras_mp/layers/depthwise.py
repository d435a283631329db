"""Depthwise convolutions with gradients that are fast in bfloat16 on a CPU.

The gradient to a kernel larger than 3 x 3 is put together of those to kernels of that size, for which alone there is
fast code. The gradient to the input has fast code, where there are strides, in float32 alone.
"""

import functools
from typing import Any

import keras
import tensorflow as tf

from keras_mp.layers import kernel_gradients
from keras_mp.layers.convolving import FAST, Convolving, differs, output_size, product

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
        return _convolve(self, inputs)


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
        return _convolve(self, inputs)


def convolution(layer: Any, inputs: tf.Tensor, kernel: tf.Tensor, padding: str) -> tf.Tensor:
    """A depthwise convolution in 1D or 2D without dilation, channels last.

    Args:
        layer: of the strides.
        inputs: tensor of shape (batch, pixels of each axis, channels).
        kernel: of shape (pixels of each axis, channels, multiplier).
        padding: "same" or "valid".
    """
    convolve = functools.partial(_with_gradients if differs(layer, inputs, kernel) else _of_images, padding)
    if layer.rank == 1:  # no slice makes the axis: its gradient would be a copy
        images = convolve((*layer.strides, *layer.strides), tf.expand_dims(inputs, 1), tf.expand_dims(kernel, 0))
        return tf.squeeze(images, 1)
    return convolve(layer.strides, inputs, kernel)


def _convolve(layer: Any, inputs: tf.Tensor) -> tf.Tensor:
    """The convolution of a depthwise layer in a training step."""
    kernel = tf.convert_to_tensor(layer.kernel)
    if differs(layer, inputs, kernel):
        return convolution(layer, inputs, kernel, layer.padding)
    of_keras = functools.partial(
        keras.ops.depthwise_conv,
        strides=layer.strides,
        padding=layer.padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )
    return product(of_keras, inputs, kernel)


def _of_images(padding: str, strides: tuple[int, int], inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    outputs = tf.nn.depthwise_conv2d(inputs, kernel, (1, *strides, 1), padding.upper())
    if max(strides) == 1 or None in inputs.shape[1:].as_list():
        return outputs
    sizes = [output_size(inputs.shape[1 + axis], kernel.shape[axis], strides[axis], padding) for axis in (0, 1)]
    return tf.reshape(outputs, [-1, *sizes, outputs.shape[-1]])  # of no rows TensorFlow answers with the input's shape


def _with_gradients(padding: str, strides: tuple[int, int], inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A depthwise convolution of images, of sizes that are known, with gradients that are fast."""
    convolve = functools.partial(_of_images, padding, strides)
    of_all, has_strides = (1, *strides, 1), max(strides) > 1
    size = tuple(kernel.shape)
    in_tiles = max(size[:2]) > kernel_gradients.TILE

    def to_inputs(kernel: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        dtype = kernel.dtype
        if has_strides:
            kernel, upstream = tf.cast(kernel, tf.float32), tf.cast(upstream, tf.float32)
        shape = tf.shape(inputs)
        gradient = tf.nn.depthwise_conv2d_backprop_input(shape, kernel, upstream, of_all, padding.upper())
        return tf.cast(gradient, dtype)

    def to_kernel(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        dtype = inputs.dtype
        if in_tiles and (dtype == tf.bfloat16 or (dtype == tf.float32 and not has_strides)):
            return kernel_gradients.by_tiles(inputs, upstream, size, strides, padding)
        gradient = tf.nn.depthwise_conv2d_backprop_filter(inputs, size, upstream, of_all, padding.upper())
        if dtype in FAST:
            return gradient
        # Of no rows, as a replica's share of a last batch may be, TensorFlow answers with what was in memory.
        return tf.where(tf.size(upstream) > 0, gradient, tf.zeros_like(gradient))

    return product(functools.partial(kernel_gradients.convolved, convolve, to_inputs, to_kernel), inputs, kernel)
