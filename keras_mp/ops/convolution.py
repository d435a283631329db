"""Convolutions, channels last, whose gradients avoid the slow 16-bit kernels of a CPU.

Where the image is small, the gradient to the kernel is one of `conv_gradients`. The forward pass and the other
gradients to the input are TensorFlow's. So is everything on a GPU or TPU, in XLA, in float16 and outside training.
Where XLA compiles a training step, `rounded_in_each_pass` keeps no rounded kernel in memory for the backward pass.
"""

import functools
import math
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import conv_gradients, fusion, matmul

__all__ = [
    "depthwise",
    "fast",
    "has_own_gradients",
    "is_on_cpu",
    "product",
    "rounded_in_each_pass",
    "separable",
]

# The dtypes that a CPU has fast kernels for.
_FAST = (tf.float32, tf.bfloat16)
_FLOATS = (*_FAST, tf.float16, tf.float64)

# For wider images oneDNN takes less time than matmuls. Milliseconds of oneDNN and of matmuls by the output's width, on
# two cores with AMX, for a 3 x 3 kernel in bfloat16: 4: 31 and 8, 7: 19 and 6, 8: 21 and 9, 14: 6 and 6, 16: 11 and 11,
# 28: 7 and 12.
_SMALL = 14
# The same where the kernel moves by several pixels: 8: 13 and 8, 16: 10 and 20; in float32 8: 12 and 21.
_SMALL_STRIDED = 8
# The same for a kernel of one pixel, on two cores with AVX512-BF16: 112: 1.7 and 4.0 of 16 channels, 56: 4.2 and 5.0 of
# 64, 28: 3.9 and 3.6 of 512, 14: 2.9 and 2.5 of 1,024.
_SMALL_POINTWISE = 28


def product(
    convolve: Callable[..., tf.Tensor], *tensors: "tf.Tensor | keras.Variable", where: execution.Execution
) -> tf.Tensor:
    """Returns a convolution, computed in float32 in a training step where half precision gains nothing.

    Args:
        convolve: function of inputs and kernels that computes in their dtype.
        tensors: inputs and kernels. With several dtypes, which no policy makes, `convolve` gets them as they are.
        where: where the layer's call is executed.
    """
    tensors = tuple(tf.convert_to_tensor(tensor) for tensor in tensors)
    alike = len({tensor.dtype for tensor in tensors}) == 1
    return matmul.product(convolve, *tensors, where=where) if alike and where.training else convolve(*tensors)


def is_on_cpu(inputs: object, rank: int, where: execution.Execution) -> bool:
    """Whether a convolution runs in TensorFlow's ops on a CPU.

    Args:
        inputs: argument of the layer.
        rank: number of axes of pixels.
        where: where the layer's call is executed.
    """
    return isinstance(inputs, tf.Tensor) and inputs.shape.rank == rank + 2 and where.on_cpu and not where.in_xla


def has_own_gradients(
    inputs: tf.Tensor, kernel: tf.Tensor, dilation: tuple[int, ...], where: execution.Execution
) -> bool:
    """Whether the gradients of a convolution may be other ops than TensorFlow's.

    Args:
        inputs: images.
        kernel: kernel of the convolution.
        dilation: by axis of pixels.
        where: where the layer's call is executed.
    """
    return (
        where.training
        and is_on_cpu(inputs, len(dilation), where)
        and math.prod(dilation) == 1
        and inputs.dtype in _FLOATS
        and inputs.dtype == kernel.dtype
        and None not in inputs.shape[1:].as_list()
    )


def fast(
    convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    strides: tuple[int, int],
    padding: str,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
) -> tf.Tensor:
    """Returns a convolution of images with the gradient to the kernel that is the fastest for its sizes.

    Args:
        convolve: the convolution of inputs and kernel.
        strides: strides of the kernel.
        padding: "same" or "valid".
        inputs: images of known sizes.
        kernel: tensor of shape (height, width, channels, filters).
    """
    if inputs.dtype not in _FAST:
        return convolve(inputs, kernel)
    size = tuple(kernel.shape[:2])
    width = _output_size(inputs.shape[2], size[1], strides[1], padding)
    if size == (1, 1) and width <= _SMALL_POINTWISE:
        to_kernel: conv_gradients.KernelGradient = functools.partial(conv_gradients.pointwise, strides=strides)
    elif strides == (1, 1) and width <= _SMALL:
        to_kernel = functools.partial(conv_gradients.by_offsets, size=size, padding=padding)
    elif inputs.dtype == tf.bfloat16 and width <= _SMALL_STRIDED:
        to_kernel = functools.partial(conv_gradients.by_patches, size=size, strides=strides, padding=padding)
    else:
        return convolve(inputs, kernel)

    def to_inputs(kernel: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
        return tf.nn.conv2d_transpose(upstream, kernel, tf.shape(inputs), strides, padding.upper())

    return conv_gradients.convolved(convolve, to_inputs, to_kernel, inputs, kernel)


def _output_size(size: int, kernel: int, stride: int, padding: str) -> int:
    """Returns how many pixels an axis of the output has, without dilation.

    Example:
        >>> _output_size(7, 3, 2, "same"), _output_size(7, 3, 2, "valid")
        (4, 3)
    """
    return -(-(size - (kernel - 1) * (padding == "valid")) // stride)


def depthwise(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    strides: tuple[int, ...],
    padding: str,
    dilation: tuple[int, ...],
    where: execution.Execution,
) -> tf.Tensor:
    """Returns a depthwise convolution in 1D or 2D.

    Args:
        inputs: tensor of shape (batch, pixels of each axis, channels).
        kernel: tensor of shape (pixels of each axis, channels, multiplier).
        strides: by axis of pixels.
        padding: "same" or "valid".
        dilation: by axis of pixels.
        where: where the layer's call is executed.
    """
    if not has_own_gradients(inputs, kernel, dilation, where):
        convolve = functools.partial(
            keras.ops.depthwise_conv,
            strides=strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=dilation,
        )
        return product(convolve, inputs, kernel, where=where)
    if len(strides) == 1:  # a slice would make the axis as well, but its gradient would copy
        images = tf.expand_dims(inputs, 1), tf.expand_dims(kernel, 0)
        return tf.squeeze(_depthwise_of_images(*images, (*strides, *strides), padding, where), 1)
    return _depthwise_of_images(inputs, kernel, (strides[0], strides[1]), padding, where)


def _depthwise_of_images(
    inputs: tf.Tensor, kernel: tf.Tensor, strides: tuple[int, int], padding: str, where: execution.Execution
) -> tf.Tensor:
    """Returns a depthwise convolution of images of known sizes, with gradients that are fast in bfloat16 on a CPU.

    The gradient to a kernel larger than 3 x 3 consists of gradients to kernels of that size, which alone have fast
    code. With strides, the gradient to the input has fast code in float32 alone.
    """
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

    convolved = functools.partial(conv_gradients.convolved, convolve, to_inputs, to_kernel)
    return product(convolved, inputs, kernel, where=where)


def separable(
    inputs: tf.Tensor,
    kernels: tuple[tf.Tensor, tf.Tensor],
    strides: tuple[int, ...],
    padding: str,
    dilation: tuple[int, ...],
    where: execution.Execution,
) -> tf.Tensor:
    """Returns a depthwise convolution followed by one with a kernel of one pixel, in 1D or 2D.

    Args:
        inputs: tensor of shape (batch, pixels of each axis, channels).
        kernels: the depthwise kernel and that of one pixel.
        strides: by axis of pixels.
        padding: "same" or "valid".
        dilation: by axis of pixels.
        where: where the layer's call is executed.
    """
    by_channel, of_pixels = kernels
    between = depthwise(inputs, by_channel, strides, padding, dilation, where)
    pointwise = functools.partial(tf.nn.conv2d, strides=1, padding="VALID")
    if has_own_gradients(inputs, by_channel, dilation, where):
        pointwise = functools.partial(fast, pointwise, (1, 1), "valid")
    if len(strides) == 2:
        return product(pointwise, between, of_pixels, where=where)
    images = tf.expand_dims(between, 1), tf.expand_dims(of_pixels, 0)
    return tf.squeeze(product(pointwise, *images, where=where), 1)


def rounded_in_each_pass(
    convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], inputs: tf.Tensor, kernel: tf.Tensor
) -> tf.Tensor:
    """Returns a convolution by a float32 kernel that each pass rounds, for where XLA compiles both.

    XLA would keep the rounded kernel of every layer from the forward to the backward pass. Rounding it again costs
    little: a kernel is small beside the images.

    Args:
        convolve: the convolution of inputs and a kernel of their dtype.
        inputs: 16-bit images.
        kernel: float32 variable.
    """

    @fusion.custom_gradient
    def run(inputs: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            rounded = tf.cast(fusion.held(True, kernel)[0], inputs.dtype)
            with tf.GradientTape() as tape:
                tape.watch([inputs, rounded])
                outputs = convolve(inputs, rounded)  # for its gradients; XLA leaves it out
            to_inputs, to_kernel = tape.gradient(outputs, [inputs, rounded], upstream)
            return to_inputs, tf.cast(to_kernel, kernel.dtype)

        return convolve(inputs, tf.cast(kernel, inputs.dtype)), gradient

    return run(inputs, kernel)
