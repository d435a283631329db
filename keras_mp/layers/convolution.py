"""Convolutions whose gradients to the kernel do not fall off the cliffs of 16-bit kernels on a CPU.

oneDNN computes the gradient to a kernel by parts of rows, which it fills up to 32 pixels in bfloat16: of an image eight
pixels wide, three quarters of the work are zeros, and float32 is as fast. Where the image is small, a matrix product is
faster; where a depthwise kernel is larger than 3 x 3, several kernels of 3 x 3 are, for which alone there is fast code.
The gradient to the input of a depthwise convolution with strides has fast code in float32 alone. Forward pass and other
gradients to the input are TensorFlow's, and so is all on a GPU or TPU, in XLA, in float16 and in what is no training
step; but where XLA compiles a training step, no rounded kernel waits in memory for the backward pass.

Keras hands every convolution in groups to XLA, which on a CPU takes far longer than TensorFlow's depthwise
convolution. Where each channel is a group of its own, as in ConvNeXt, it is a depthwise convolution here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_mp import backend, fusion, products
from keras_mp.layers.dense import add_bias

__all__ = ["Conv2D", "DepthwiseConv2D"]

# Wider images take oneDNN less time than products. Two cores with AMX, a 3 x 3 kernel in bfloat16, ms of oneDNN and of
# products, by the output's width: 4: 31 and 8, 7: 19 and 6, 8: 21 and 9, 14: 6 and 6, 16: 11 and 11, 28: 7 and 12.
_SMALL = 14
# The same where the kernel moves by several pixels: 8: 13 and 8, 16: 10 and 20; in float32 8: 12 and 21.
_SMALL_STRIDED = 8
# The same for a kernel of one pixel, on two cores with AVX512-BF16: 112: 1.7 and 4.0 of 16 channels, 56: 4.2 and 5.0 of
# 64, 28: 3.9 and 3.6 of 512, 14: 2.9 and 2.5 of 1,024.
_SMALL_POINTWISE = 28
_TILE = 3
_FAST = (tf.float32, tf.bfloat16)
_FLOATS = (*_FAST, tf.float16, tf.float64)

# From inputs and the gradient to the outputs to the gradient to the kernel.
_KernelGradient = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv2D(keras.layers.Conv2D):
    """2D convolution whose gradient to the kernel is, on a CPU, a matrix product where that was seen to be faster.

    A drop-in for `keras.layers.Conv2D`, with the same arguments, weights and numbers. The gradient to the kernel is a
    matrix product where the output is at most 14 pixels wide, or 28 for a kernel of one pixel, as in the later stages
    of networks for images. With as many groups as the input has channels, it is a depthwise convolution on a CPU, as in
    `keras_mp.layers.DepthwiseConv2D`.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 2 ints.
        strides: int or tuple of 2 ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
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
        >>> layer = keras_mp.layers.Conv2D(4, 3, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 2), "float32")).shape
        TensorShape([1, 8, 8, 4])
    """

    def call(self, inputs: Any) -> Any:
        """Convolves; see the class."""
        if self.data_format != "channels_last" or not backend.recording():
            return super().call(inputs)
        return _finished(self, self.convolution_op(inputs, self.kernel))

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """The convolution without bias and activation; see the class."""
        convolve = super().convolution_op
        if backend.in_xla_context() and backend.recording() and _is_rounded(kernel, inputs):
            return _rounded_twice(convolve, inputs, backend.uncast(kernel))
        kernel = tf.convert_to_tensor(kernel)
        if _is_depthwise(self, inputs):
            y = _depthwise(self, inputs, tf.reshape(kernel, [*self.kernel_size, self.groups, -1]))
            shape = self.compute_output_shape(tuple(inputs.shape))
            # Of no rows TensorFlow answers with the shape of the input.
            return y if max(self.strides) == 1 or None in shape[1:] else tf.reshape(y, [-1, *shape[1:]])
        if self.groups != 1 or not _is_on_cpu(self, inputs) or inputs.dtype != kernel.dtype or not backend.recording():
            return convolve(inputs, kernel)
        if _differs(self, inputs, kernel):
            convolve = functools.partial(_convolution, self, convolve)
        return products.product(convolve, inputs, kernel)


@keras.saving.register_keras_serializable(package="keras_mp")
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
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

    def call(self, inputs: Any) -> Any:
        """Convolves; see the class."""
        if not backend.recording():
            return super().call(inputs)
        kernel = tf.convert_to_tensor(self.kernel)
        return (
            _finished(self, _depthwise(self, inputs, kernel))
            if _differs(self, inputs, kernel)
            else super().call(inputs)
        )


def _convolution(
    layer: Any, convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], inputs: tf.Tensor, kernel: tf.Tensor
) -> tf.Tensor:
    """A convolution with the gradient to the kernel that is the fastest for its sizes."""
    size, strides, padding = layer.kernel_size, layer.strides, layer.padding
    width = layer.compute_output_shape(tuple(inputs.shape))[2]
    if inputs.dtype not in _FAST:
        return convolve(inputs, kernel)
    if size == (1, 1) and width <= _SMALL_POINTWISE:
        to_kernel: _KernelGradient = functools.partial(_pointwise, strides=strides)
    elif strides == (1, 1) and width <= _SMALL:
        to_kernel = functools.partial(_by_offsets, size=size, padding=padding)
    elif inputs.dtype == tf.bfloat16 and width <= _SMALL_STRIDED:
        to_kernel = functools.partial(_by_patches, size=size, strides=strides, padding=padding)
    else:
        return convolve(inputs, kernel)

    def to_inputs(kernel: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        return tf.nn.conv2d_transpose(upstream, kernel, tf.shape(inputs), strides, padding.upper())

    return _convolved(convolve, to_inputs, to_kernel, inputs, kernel)


def _finished(layer: Any, outputs: tf.Tensor) -> tf.Tensor:
    """A convolution with the layer's bias and activation; channels last."""
    if layer.bias is not None:
        outputs = add_bias(outputs, layer.bias)
    return outputs if layer.activation is None else layer.activation(outputs)


def _is_on_cpu(layer: Any, inputs: Any) -> bool:
    """Whether a convolution of images, channels last, runs in ops of its own on a CPU."""
    return (
        isinstance(inputs, tf.Tensor)
        and inputs.shape.rank == 4
        and layer.data_format == "channels_last"
        and backend.on_cpu()
        and not backend.in_xla_context()
    )


def _differs(layer: Any, inputs: Any, kernel: Any) -> bool:
    """Whether the gradient to the kernel may be taken in another way than TensorFlow's."""
    return (
        _is_on_cpu(layer, inputs)
        and math.prod(layer.dilation_rate) == 1
        and inputs.dtype in _FLOATS
        and inputs.dtype == kernel.dtype
        and None not in inputs.shape[1:].as_list()
        and backend.recording()
    )


def _is_depthwise(layer: Any, inputs: Any) -> bool:
    """Whether a convolution in groups is one of each channel by itself, which TensorFlow's operation can compute."""
    return (
        layer.groups > 1
        and _is_on_cpu(layer, inputs)
        and math.prod(layer.dilation_rate) == 1
        and inputs.shape[-1] == layer.groups
        and len(set(layer.strides)) == 1
    )


def _depthwise(layer: Any, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The depthwise convolution with a kernel of shape (height, width, channels, multiplier)."""
    if _differs(layer, inputs, kernel):
        return products.product(functools.partial(_depthwise_with_gradients, layer), inputs, kernel)
    return tf.nn.depthwise_conv2d(inputs, kernel, (1, *layer.strides, 1), layer.padding.upper())


def _depthwise_with_gradients(layer: Any, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    strides, padding = (1, *layer.strides, 1), layer.padding.upper()
    has_strides, dtype, size = math.prod(layer.strides) > 1, inputs.dtype, tuple(kernel.shape)

    def convolve(inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        return tf.nn.depthwise_conv2d(inputs, kernel, strides, padding)

    def to_inputs(kernel: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        if has_strides:
            kernel, upstream = tf.cast(kernel, tf.float32), tf.cast(upstream, tf.float32)
        gradient = tf.nn.depthwise_conv2d_backprop_input(tf.shape(inputs), kernel, upstream, strides, padding)
        return tf.cast(gradient, dtype)

    def to_kernel(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        if max(size[:2]) > _TILE and (dtype == tf.bfloat16 or (dtype == tf.float32 and not has_strides)):
            return _by_tiles(inputs, upstream, size, layer.strides, layer.padding)
        gradient = tf.nn.depthwise_conv2d_backprop_filter(inputs, size, upstream, strides, padding)
        if dtype in _FAST:
            return gradient
        # Of no rows, as a replica's share of a last batch may be, TensorFlow answers with what was in memory.
        return tf.where(tf.size(upstream) > 0, gradient, tf.zeros_like(gradient))

    return _convolved(convolve, to_inputs, to_kernel, inputs, kernel)


def _convolved(
    convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    to_inputs: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    to_kernel: _KernelGradient,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
) -> tf.Tensor:
    """A convolution with gradients of its own, which have gradients of TensorFlow's."""

    @tf.custom_gradient
    def run(inputs: tf.Tensor, kernel: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return to_inputs(kernel, upstream), to_kernel(fusion.not_before(upstream, inputs), upstream)

        return convolve(inputs, kernel), gradient

    return run(inputs, kernel)


def _is_rounded(kernel: Any, inputs: Any) -> bool:
    """Whether a kernel is a float32 variable that the layer reads in the 16 bits of its inputs."""
    # Inside a layer's call the variable's own `dtype` is the one that it is read in.
    return isinstance(kernel, keras.Variable) and kernel.dtype == inputs.dtype != backend.uncast(kernel).dtype


def _rounded_twice(
    convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], inputs: tf.Tensor, kernel: tf.Tensor
) -> tf.Tensor:
    """A convolution by a kernel in float32, rounded in each pass: where XLA compiles both.

    It would keep the rounded kernel of every layer from the forward to the backward pass. A kernel is small beside the
    images that it is laid on, so that this costs little.
    """

    @tf.custom_gradient
    def run(inputs: tf.Tensor, kernel: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            rounded = tf.cast(fusion.held(True, kernel)[0], inputs.dtype)
            with tf.GradientTape() as tape:
                tape.watch([inputs, rounded])
                outputs = convolve(inputs, rounded)  # for its gradients; XLA leaves it out
            to_inputs, to_kernel = tape.gradient(outputs, [inputs, rounded], upstream)
            return to_inputs, tf.cast(to_kernel, kernel.dtype)

        return convolve(inputs, tf.cast(kernel, inputs.dtype)), gradient

    return run(inputs, kernel)


def _pointwise(inputs: tf.Tensor, upstream: tf.Tensor, strides: tuple[int, int]) -> tf.Tensor:
    """The gradient to a kernel of one pixel: a product over all pixels that it was laid on."""
    if strides != (1, 1):
        inputs = inputs[:, :: strides[0], :: strides[1], :]
    return _product(inputs, upstream)[None, None]


def _by_offsets(inputs: tf.Tensor, upstream: tf.Tensor, size: tuple[int, int], padding: str) -> tf.Tensor:
    """The gradient to a kernel, of shape `size`, as one product for each of its pixels."""
    inputs = _padded(inputs, upstream, size, (1, 1), padding)
    height, width = upstream.shape[1], upstream.shape[2]
    rows = [
        tf.stack([_product(inputs[:, y : y + height, x : x + width, :], upstream) for x in range(size[1])])
        for y in range(size[0])
    ]
    return tf.stack(rows)


def _by_patches(
    inputs: tf.Tensor, upstream: tf.Tensor, size: tuple[int, int], strides: tuple[int, int], padding: str
) -> tf.Tensor:
    """The gradient to a kernel, of shape `size`, as one product of all patches of the image."""
    patches = tf.image.extract_patches(inputs, [1, *size, 1], [1, *strides, 1], [1, 1, 1, 1], padding.upper())
    return tf.reshape(_product(patches, upstream), [*size, inputs.shape[-1], upstream.shape[-1]])


def _product(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """The sum over batch and pixels of the outer products of the channels."""
    return tf.matmul(
        tf.reshape(inputs, [-1, inputs.shape[-1]]), tf.reshape(upstream, [-1, upstream.shape[-1]]), transpose_a=True
    )


def _by_tiles(
    inputs: tf.Tensor, upstream: tf.Tensor, kernel: tuple[int, ...], strides: tuple[int, int], padding: str
) -> tf.Tensor:
    """The gradient to a depthwise kernel, of shape `kernel`, of 3 x 3 pixels at a time."""
    height, width = (-(-size // _TILE) * _TILE for size in kernel[:2])
    inputs = _padded(inputs, upstream, kernel[:2], strides, padding, (height, width))
    rows, columns = ((upstream.shape[1 + axis] - 1) * strides[axis] + _TILE for axis in (0, 1))
    tile = (_TILE, _TILE, *kernel[2:])

    def gradient(y: int, x: int) -> tf.Tensor:
        return tf.nn.depthwise_conv2d_backprop_filter(
            inputs[:, y : y + rows, x : x + columns, :], tile, upstream, (1, *strides, 1), "VALID"
        )

    tiles = [tf.concat([gradient(y, x) for x in range(0, width, _TILE)], axis=1) for y in range(0, height, _TILE)]
    return tf.concat(tiles, axis=0)[: kernel[0], : kernel[1]]


def _padded(
    inputs: tf.Tensor,
    upstream: tf.Tensor,
    size: tuple[int, ...],
    strides: tuple[int, int],
    padding: str,
    room: tuple[int, ...] = (),
) -> tf.Tensor:
    """The image with the zeros that TensorFlow's padding lays around it, and behind it those that `room` wants.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        size: of the kernel, in pixels.
        strides: of the kernel.
        padding: "same" or "valid".
        room: the size of a larger kernel, of the same first pixel, that has to fit in every place.
    """
    pads = [[0, 0]]
    for axis in (0, 1):
        there, last = inputs.shape[1 + axis], (upstream.shape[1 + axis] - 1) * strides[axis]
        before = max(last + size[axis] - there, 0) // 2 if padding == "same" else 0
        behind = max(last + (room or size)[axis] - before - there, 0)
        pads.append([before, behind])
    return tf.pad(inputs, [*pads, [0, 0]])
