"""What every convolution has in common: a training step's bias, and its products on a CPU that is slow in 16 bits."""

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.core.dense import add_bias
from keras_mp.ops import empty_batches, matmul

__all__ = ["Convolving", "differs", "is_on_cpu", "output_size", "product"]

# The dtypes that there are fast kernels for on a CPU.
FAST = (tf.float32, tf.bfloat16)
_FLOATS = (*FAST, tf.float16, tf.float64)


class Convolving(keras.layers.Layer):
    """A convolution of Keras, which comes after this among the bases, with a training step of its own.

    The gradient to the bias is summed in float32. Otherwise the graph is that of Keras's layer: what is exported holds
    nothing that Keras's would not. So it is with channels first, which TensorFlow has for GPUs.
    """

    def call(self, inputs: Any) -> Any:
        """Computes activation(convolution + bias); see the class."""
        if not self.is_ours(inputs):
            return super().call(inputs)
        return self.finish(empty_batches.of_some(self.convolve, inputs, served=not execution.recording()))

    def is_ours(self, inputs: Any) -> bool:
        """Whether to run `convolve`: channels last, in a training step or where a replica evaluates.

        Args:
            inputs: what the layer is given.
        """
        return self.data_format == "channels_last" and (execution.recording() or empty_batches.in_replicas())

    def convolve(self, inputs: Any) -> tf.Tensor:
        """The convolution of a training step or of a replica, channels last, without bias and activation.

        Args:
            inputs: tensor in the compute dtype.
        """
        raise NotImplementedError

    def finish(self, outputs: tf.Tensor) -> tf.Tensor:
        """Adds the bias, and applies the activation.

        Args:
            outputs: of the convolution, channels last.
        """
        if self.bias is not None:
            bias = tf.convert_to_tensor(self.bias)
            # A `convolution_op` of one's own may answer in another dtype, which Keras's promotes.
            alike = outputs.dtype == bias.dtype
            outputs = add_bias(outputs, bias) if alike else keras.ops.add(outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)


def product(function: Callable[..., tf.Tensor], *tensors: Any) -> tf.Tensor:
    """A convolution, in a training step in float32 inside where 16 bits gain nothing.

    Args:
        function: of inputs and kernels, that computes in their dtype.
        tensors: inputs and kernels. Of several dtypes, which no policy makes, they are left to `function`.
    """
    tensors = tuple(tf.convert_to_tensor(tensor) for tensor in tensors)
    alike = len({tensor.dtype for tensor in tensors}) == 1
    return matmul.product(function, *tensors) if alike and execution.recording() else function(*tensors)


def is_on_cpu(layer: Any, inputs: Any) -> bool:
    """Whether a convolution, channels last, runs in ops of its own on a CPU.

    Args:
        layer: the convolution.
        inputs: what it is given.
    """
    return (
        isinstance(inputs, tf.Tensor)
        and inputs.shape.rank == layer.rank + 2
        and layer.data_format == "channels_last"
        and execution.on_cpu()
        and not execution.in_xla_context()
    )


def differs(layer: Any, inputs: Any, kernel: Any) -> bool:
    """Whether the gradients of a convolution may be taken in another way than TensorFlow's.

    Args:
        layer: the convolution.
        inputs: what it is given.
        kernel: what it convolves with.
    """
    return (
        is_on_cpu(layer, inputs)
        and math.prod(layer.dilation_rate) == 1
        and inputs.dtype in _FLOATS
        and inputs.dtype == kernel.dtype
        and None not in inputs.shape[1:].as_list()
        and execution.recording()
    )


def output_size(size: int, kernel: int, stride: int, padding: str) -> int:
    """How many pixels an axis of the output of a convolution without dilation has.

    Args:
        size: pixels of the axis in the input.
        kernel: pixels of the kernel.
        stride: of the kernel.
        padding: "same" or "valid".

    Example:
        >>> output_size(7, 3, 2, "same"), output_size(7, 3, 2, "valid")
        (4, 3)
    """
    return -(-(size - (kernel - 1) * (padding == "valid")) // stride)
