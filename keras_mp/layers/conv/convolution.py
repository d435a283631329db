"""Convolutions in 1D, 2D and 3D, with gradients to the kernel that are fast on a CPU.

Keras hands every grouped convolution to XLA, which on a CPU takes far longer than TensorFlow's depthwise convolution.
Where each channel is a group, as in ConvNeXt, these layers run a depthwise convolution.
"""

import functools
import math

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_variables
from keras_mp.layers.conv.convolving import Convolving
from keras_mp.ops import convolution

__all__ = ["Conv1D", "Conv2D", "Conv3D"]


class _Grouped(Convolving):
    """A convolution that is a depthwise one where each channel is a group, also outside training."""

    def is_ours(self, inputs: tf.Tensor, where: execution.Execution) -> bool:
        """Whether to run `convolve`; see `Convolving`."""
        return super().is_ours(inputs, where) or self._is_depthwise(inputs, where)

    def _is_depthwise(self, inputs: tf.Tensor, where: execution.Execution) -> bool:
        return (
            self.groups > 1
            and self.data_format == "channels_last"
            and convolution.is_on_cpu(inputs, self.rank, where)
            and math.prod(self.dilation_rate) == 1
            and inputs.shape[-1] == self.groups
            and len(set(self.strides)) == 1
        )

    def _depthwise(self, inputs: tf.Tensor, kernel: tf.Tensor, padding: str, where: execution.Execution) -> tf.Tensor:
        kernel = tf.reshape(kernel, [*self.kernel_size, self.groups, -1])
        return convolution.depthwise(inputs, kernel, self.strides, padding, self.dilation_rate, where)


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
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new steps, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Conv1D(4, 3, padding="causal", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 2), "float32")).shape
        TensorShape([1, 8, 4])
    """

    def convolve(self, inputs: tf.Tensor, where: execution.Execution) -> tf.Tensor:
        """Returns the convolution; see `Convolving`."""
        padding, kernel = self.padding, tf.convert_to_tensor(self.kernel)
        if padding == "causal":
            steps = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            inputs, padding = tf.pad(inputs, [[0, 0], [steps, 0], [0, 0]]), "valid"
        if self._is_depthwise(inputs, where):
            return self._depthwise(inputs, kernel, padding, where)
        convolve = functools.partial(
            keras.ops.conv,
            strides=self.strides,
            padding=padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )
        return convolution.product(convolve, inputs, kernel, where=where)


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv2D(_Grouped, keras.layers.Conv2D):
    """2D convolution whose gradient to the kernel is a matmul on a CPU, where a matmul is faster.

    A drop-in for `keras.layers.Conv2D`, with the same arguments, weights and numbers. The gradient to the kernel is a
    matmul where the output is at most 14 pixels wide, as in the later stages of image networks. For a kernel of one
    pixel the limit is 28. With as many groups as the input has channels, it is a depthwise convolution on a CPU, as in
    `keras_mp.layers.DepthwiseConv2D`.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 2 ints.
        strides: int or tuple of 2 ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new height, new width, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Conv2D(4, 3, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 2), "float32")).shape
        TensorShape([1, 8, 8, 4])
    """

    def convolve(self, inputs: tf.Tensor, where: execution.Execution) -> tf.Tensor:
        """Returns the convolution by `convolution_op`, which subclasses may replace; see `Convolving`."""
        del where  # Keras's signature has no place for it
        return self.convolution_op(inputs, self.kernel)

    def convolution_op(self, inputs: tf.Tensor, kernel: "keras.Variable | tf.Tensor") -> tf.Tensor:
        """Returns the convolution without bias and activation; see the class."""
        convolve, where = super().convolution_op, execution.current()
        if where.in_xla and where.training and _is_rounded(kernel, inputs):
            return convolution.rounded_in_each_pass(convolve, inputs, keras_variables.uncast(kernel))
        kernel = tf.convert_to_tensor(kernel)
        if self._is_depthwise(inputs, where):
            return self._depthwise(inputs, kernel, self.padding, where)
        if not self.is_ours(inputs, where):
            return convolve(inputs, kernel)
        if self.groups == 1 and convolution.has_own_gradients(inputs, kernel, self.dilation_rate, where):
            convolve = functools.partial(convolution.fast, convolve, self.strides, self.padding)
        return convolution.product(convolve, inputs, kernel, where=where)


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv3D(Convolving, keras.layers.Conv3D):
    """3D convolution whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Conv3D`, with the same arguments and weights.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 3 ints.
        strides: int or tuple of 3 ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new depth, new height, new width, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Conv3D(4, 3, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 4, 4, 4, 2), "float32")).shape
        TensorShape([1, 4, 4, 4, 4])
    """

    def convolve(self, inputs: tf.Tensor, where: execution.Execution) -> tf.Tensor:
        """Returns the convolution by `convolution_op`, which subclasses may replace; see `Convolving`."""
        del where  # Keras's signature has no place for it
        return self.convolution_op(inputs, self.kernel)

    def convolution_op(self, inputs: tf.Tensor, kernel: "keras.Variable | tf.Tensor") -> tf.Tensor:
        """Returns the convolution without bias and activation; see the class."""
        convolve, where = super().convolution_op, execution.current()
        if not self.is_ours(inputs, where):
            return convolve(inputs, kernel)
        return convolution.product(convolve, inputs, kernel, where=where)


def _is_rounded(kernel: "keras.Variable | tf.Tensor", inputs: tf.Tensor) -> bool:
    """Whether a kernel is a float32 variable that the layer reads in the 16-bit dtype of its inputs."""
    # Inside a layer's call, a variable's `dtype` is the one that it is read in.
    return isinstance(kernel, keras.Variable) and kernel.dtype == inputs.dtype != keras_variables.uncast(kernel).dtype
