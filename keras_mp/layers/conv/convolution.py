"""Convolutions whose gradients to the kernel do not fall off the cliffs of 16-bit kernels on a CPU.

Where the image is small, the gradient to the kernel is one of `keras_mp.ops.conv_gradients`. Forward pass and
other gradients to the input are TensorFlow's, and so is all on a GPU or TPU, in XLA, in float16 and in what is no
training step; but where XLA compiles a training step, no rounded kernel waits in memory for the backward pass.

Keras hands every convolution in groups to XLA, which on a CPU takes far longer than TensorFlow's depthwise
convolution. Where each channel is a group of its own, as in ConvNeXt, it is a depthwise convolution here.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_variables
from keras_mp.layers.conv import depthwise
from keras_mp.layers.conv.convolving import FAST, Convolving, differs, is_on_cpu, output_size, product
from keras_mp.ops import conv_gradients, fusion

__all__ = ["Conv1D", "Conv2D", "Conv3D", "fast"]

# Wider images take oneDNN less time than products. Two cores with AMX, a 3 x 3 kernel in bfloat16, ms of oneDNN and of
# products, by the output's width: 4: 31 and 8, 7: 19 and 6, 8: 21 and 9, 14: 6 and 6, 16: 11 and 11, 28: 7 and 12.
_SMALL = 14
# The same where the kernel moves by several pixels: 8: 13 and 8, 16: 10 and 20; in float32 8: 12 and 21.
_SMALL_STRIDED = 8
# The same for a kernel of one pixel, on two cores with AVX512-BF16: 112: 1.7 and 4.0 of 16 channels, 56: 4.2 and 5.0 of
# 64, 28: 3.9 and 3.6 of 512, 14: 2.9 and 2.5 of 1,024.
_SMALL_POINTWISE = 28


class _Grouped(Convolving):
    """A convolution that is a depthwise one, also outside training, where each channel is a group of its own."""

    def is_ours(self, inputs: Any) -> bool:
        """Whether to run `convolve`; see `Convolving`."""
        return super().is_ours(inputs) or _is_depthwise(self, inputs)


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv1D(_Grouped, keras.layers.Conv1D):
    """1D convolution whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Conv1D`, with the same arguments and weights. With as many groups as the input has
    channels, it is a depthwise convolution on a CPU, as in `keras_mp.layers.DepthwiseConv1D`.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 1 int.
        strides: int or tuple of 1 int. Defaults to 1.
        padding: `"valid"`, `"same"` or `"causal"`. Defaults to `"valid"`.
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
        >>> layer = keras_mp.layers.Conv1D(4, 3, padding="causal", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 2), "float32")).shape
        TensorShape([1, 8, 4])
    """

    def convolve(self, inputs: Any) -> tf.Tensor:
        """The convolution of a training step, or of a group a channel; see `Convolving`."""
        padding, kernel = self.padding, tf.convert_to_tensor(self.kernel)
        if padding == "causal":
            steps = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            inputs, padding = tf.pad(inputs, [[0, 0], [steps, 0], [0, 0]]), "valid"
        if _is_depthwise(self, inputs):
            return _depthwise(self, inputs, kernel, padding)
        convolve = functools.partial(
            keras.ops.conv,
            strides=self.strides,
            padding=padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )
        return product(convolve, inputs, kernel)


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv2D(_Grouped, keras.layers.Conv2D):
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

    def convolve(self, inputs: Any) -> tf.Tensor:
        """The convolution of a training step; see `Convolving`."""
        return self.convolution_op(inputs, self.kernel)

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """The convolution without bias and activation; see the class."""
        convolve = super().convolution_op
        if execution.in_xla_context() and execution.recording() and _is_rounded(kernel, inputs):
            return _rounded_twice(convolve, inputs, keras_variables.uncast(kernel))
        kernel = tf.convert_to_tensor(kernel)
        if _is_depthwise(self, inputs):
            return _depthwise(self, inputs, kernel, self.padding)
        if not self.is_ours(inputs):
            return convolve(inputs, kernel)
        if self.groups == 1 and differs(self, inputs, kernel):
            convolve = functools.partial(fast, convolve, self.strides, self.padding)
        return product(convolve, inputs, kernel)


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv3D(Convolving, keras.layers.Conv3D):
    """3D convolution whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Conv3D`, with the same arguments and weights.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 3 ints.
        strides: int or tuple of 3 ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of shape (batch, depth, height, width, channels), or with the channels second for
            `data_format="channels_first"`.

    Returns:
        Tensor of shape (batch, new depth, new height, new width, filters), or with the channels second, in the compute
        dtype.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Conv3D(4, 3, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 4, 4, 4, 2), "float32")).shape
        TensorShape([1, 4, 4, 4, 4])
    """

    def convolve(self, inputs: Any) -> tf.Tensor:
        """The convolution of a training step; see `Convolving`."""
        return self.convolution_op(inputs, self.kernel)

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """The convolution without bias and activation; see the class."""
        convolve = super().convolution_op
        return product(convolve, inputs, kernel) if self.is_ours(inputs) else convolve(inputs, kernel)


def fast(
    convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    strides: tuple[int, int],
    padding: str,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
) -> tf.Tensor:
    """A convolution of images with the gradient to the kernel that is the fastest for its sizes.

    Args:
        convolve: the convolution, of inputs and kernel.
        strides: of the kernel.
        padding: "same" or "valid".
        inputs: images, of sizes that are known.
        kernel: of shape (height, width, channels, filters).
    """
    if inputs.dtype not in FAST:
        return convolve(inputs, kernel)
    size = tuple(kernel.shape[:2])
    width = output_size(inputs.shape[2], size[1], strides[1], padding)
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


def _is_depthwise(layer: Any, inputs: Any) -> bool:
    """Whether a convolution in groups is one of each channel by itself, which TensorFlow's operation can compute."""
    return (
        layer.groups > 1
        and is_on_cpu(layer, inputs)
        and math.prod(layer.dilation_rate) == 1
        and inputs.shape[-1] == layer.groups
        and len(set(layer.strides)) == 1
    )


def _depthwise(layer: Any, inputs: tf.Tensor, kernel: tf.Tensor, padding: str) -> tf.Tensor:
    """A convolution with a group a channel as a depthwise one."""
    return depthwise.convolution(layer, inputs, tf.reshape(kernel, [*layer.kernel_size, layer.groups, -1]), padding)


def _is_rounded(kernel: Any, inputs: Any) -> bool:
    """Whether a kernel is a float32 variable that the layer reads in the 16 bits of its inputs."""
    # Inside a layer's call the variable's own `dtype` is the one that it is read in.
    return isinstance(kernel, keras.Variable) and kernel.dtype == inputs.dtype != keras_variables.uncast(kernel).dtype


def _rounded_twice(
    convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], inputs: tf.Tensor, kernel: tf.Tensor
) -> tf.Tensor:
    """A convolution by a kernel in float32, rounded in each pass: where XLA compiles both.

    It would keep the rounded kernel of every layer from the forward to the backward pass. A kernel is small beside the
    images that it is laid on, so that this costs little.
    """

    @fusion.custom_gradient
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
