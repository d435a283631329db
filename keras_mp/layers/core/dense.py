"""Dense layers whose products are those of two matrices, and whose gradients to the bias are sums in float32.

TensorFlow's gradient to a bias adds up one row after the other in bfloat16 on a CPU: of 256 rows of ones the sum stays
at 256 for ever, and of a batch of 2,048 rows three quarters are lost. A product with ones sums in float32, and faster.
Products of a tensor with more axes, as attention has them, become one of two matrices: TensorFlow's would give the
gradient to the kernel once for each row of the batch, in 16 bits, and add these up.
"""

import functools
import math
import string
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.core.quantizing import Quantizing
from keras_mp.ops import fusion, matmul

__all__ = ["Dense", "EinsumDense", "add_bias"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Dense(Quantizing, keras.layers.Dense):
    """A dense layer whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Dense`, with the same arguments and weights. For a model's output see `Head`.

    Args:
        units: int, the size of the last axis of the output.
        activation: function or name of one, or None. Defaults to None.
        use_bias: bool, whether there is a bias. Defaults to True.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of shape (batch, ..., features).

    Returns:
        Tensor of shape (batch, ..., units) in the compute dtype.

    Raises:
        ValueError: as Keras's layer, if `units` is not a positive int or the last axis is not as built.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.Dense(1, dtype="mixed_bfloat16")
        >>> with tf.GradientTape() as tape:
        ...     y = layer(tf.ones((4096, 8)))
        >>> tape.gradient(y, layer.bias.value).numpy().tolist()
        [4096.0]
    """

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Computes activation(inputs @ kernel + bias); see the class."""
        if not execution.recording():
            return super().call(inputs, training=training)
        kernel = tf.convert_to_tensor(self.kernel)
        if not _takes(inputs, kernel):
            return super().call(inputs, training=training)
        outputs = _affine(inputs, kernel, self.bias, inputs.shape.rank - 1)
        return outputs if self.activation is None else self.activation(outputs)


@keras.saving.register_keras_serializable(package="keras_mp")
class EinsumDense(Quantizing, keras.layers.EinsumDense):
    """A dense layer over several axes that multiplies two matrices, and sums the gradient to the bias in float32.

    A drop-in for `keras.layers.EinsumDense`, with the same arguments and weights. Equations whose kernel has the last
    axes of the inputs first, as "abc,cde->abde" and "...x,xy->...y", become a product of two matrices. An ellipsis
    never reaches TensorFlow, whose einsum answers wrong numbers for one in 16 bits on a CPU.

    Args:
        equation: str, as for `keras.ops.einsum`, of two operands.
        output_shape: int or tuple of ints, without the batch. None stands for a size that the inputs give.
        activation: function or name of one, or None. Defaults to None.
        bias_axes: str, the axes of the output that the bias has. Defaults to None: no bias.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor as the equation says.

    Returns:
        Tensor as the equation says, in the compute dtype.

    Raises:
        ValueError: as Keras's layer, if the equation or the shapes do not fit.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 4), bias_axes="de")
        >>> layer(tf.ones((1, 3, 8))).shape
        TensorShape([1, 3, 2, 4])
    """

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Computes activation(einsum(equation, inputs, kernel) + bias); see the class."""
        kernel, rank = tf.convert_to_tensor(self.kernel), inputs.shape.rank
        equation = self.equation if rank is None else _spelled_out(self.equation, rank)
        takes = _takes(inputs, kernel)
        kept = _kept_axes(equation) if takes else 0
        bias = self.bias
        if kept:
            whole = bias is not None and tuple(bias.shape) == tuple(kernel.shape[rank - kept :])
            outputs = _affine(inputs, kernel, bias if whole else None, kept)
            bias = None if whole else bias
        else:
            einsum = functools.partial(keras.ops.einsum, equation)
            outputs = matmul.product(einsum, inputs, kernel) if takes else einsum(inputs, kernel)
        if bias is not None:
            outputs = keras.ops.add(outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)


def add_bias(x: tf.Tensor, bias: Any) -> tf.Tensor:
    """Adds a bias to the last axis, as `tf.nn.bias_add`, with a gradient that is summed in float32.

    Args:
        x: tensor of rank 2 or more.
        bias: vector, of the dtype of `x`.
    """
    bias = tf.convert_to_tensor(bias)
    if x.dtype not in (tf.bfloat16, tf.float16) or not execution.recording() or not execution.on_cpu():
        return tf.nn.bias_add(x, bias)

    @fusion.custom_gradient
    def added(x: tf.Tensor, bias: tf.Tensor) -> Any:
        return tf.nn.bias_add(x, bias), lambda upstream: (upstream, _sum_of_rows(upstream))

    return added(x, bias)


def _sum_of_rows(x: tf.Tensor) -> tf.Tensor:
    """The sum over all axes but the last, in float32, rounded once."""
    rows = tf.reshape(x, [-1, x.shape[-1]])
    if execution.in_xla_context():
        return tf.cast(tf.reduce_sum(tf.cast(rows, tf.float32), 0), x.dtype)
    return matmul.product(tf.matmul, tf.ones([1, tf.shape(rows)[0]], x.dtype), rows)[0]


def _takes(inputs: Any, kernel: tf.Tensor) -> bool:
    """Whether this is a training step on a CPU, where TensorFlow and not XLA computes the product.

    Otherwise the graph is that of Keras's layer: what is exported holds nothing that Keras's would not.
    """
    return (
        execution.recording()
        and isinstance(inputs, tf.Tensor)
        and inputs.dtype == kernel.dtype
        and inputs.shape.rank is not None
        and inputs.shape.rank >= 2
        and execution.on_cpu()
        and not execution.in_xla_context()
    )


def _affine(inputs: tf.Tensor, kernel: tf.Tensor, bias: Any, kept: int) -> tf.Tensor:
    """The product of inputs and kernel over the inputs' axes after the first `kept`, and the bias."""
    summed = inputs.shape.rank - kept
    sizes, size = kernel.shape[summed:].as_list(), math.prod(kernel.shape[:summed])
    factors = [tf.reshape(inputs, [-1, size]), tf.reshape(kernel, [size, -1])]
    if bias is not None:
        factors.append(tf.reshape(tf.convert_to_tensor(bias), [-1]))
    outputs = matmul.product(_affine_of, *factors)
    if kept == 1 and len(sizes) == 1:
        return outputs
    outputs = tf.reshape(outputs, [*keras.ops.shape(inputs)[:kept], *sizes])
    return fusion.shaped(outputs, [*inputs.shape[:kept], *sizes])


def _affine_of(rows: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
    """The product of two matrices, and a bias for each column."""
    outputs = tf.matmul(rows, kernel)
    if bias is None:
        return outputs
    return add_bias(_apart(outputs) if outputs.dtype.size == 2 else outputs, bias)


@fusion.custom_gradient
def _apart(x: tf.Tensor) -> Any:
    """The same tensor, which grappler does not compute in one kernel with what is made of it next.

    oneDNN's product with a bias takes, in bfloat16 on a CPU with AMX, 1.1 to 1.9 times as long as the product and the
    bias in turns, the more the larger the kernel. In float32 it takes no longer, and nor does a fused convolution.
    """
    # Takes the buffer of `x` over, without a copy, and has no derivative.
    return x if execution.forward_mode(x) else tf.raw_ops.Snapshot(input=x), lambda upstream: upstream


def _spelled_out(equation: str, rank: int) -> str:
    """The equation with letters in the place of an ellipsis, for inputs of a rank.

    Example:
        >>> _spelled_out("...x,xy->...y", 3), _spelled_out("ab,bc->ac", 2)
        ('ABx,xy->ABy', 'ab,bc->ac')
    """
    equation = equation.replace(" ", "")
    if "..." not in equation:
        return equation
    named = len(equation.partition(",")[0].replace("...", ""))
    unused = [letter for letter in string.ascii_uppercase if letter not in equation]
    return equation.replace("...", "".join(unused[: rank - named]))


def _kept_axes(equation: str) -> int:
    """How many first axes of the inputs the output has, where the others are the kernel's first; 0 for other equations.

    Example:
        >>> _kept_axes("abc,cde->abde"), _kept_axes("abcd,cde->abe"), _kept_axes("abc,cd->adb")
        (2, 2, 0)
    """
    operands, _, output = equation.partition("->")
    inputs, _, kernel = operands.partition(",")
    if any(len(set(labels)) != len(labels) for labels in (inputs, kernel, output)):
        return 0
    kept = sum(label in output for label in inputs)
    fits = inputs[kept:] + output[kept:] == kernel and inputs[:kept] == output[:kept]
    return kept if fits and kept < len(inputs) else 0
