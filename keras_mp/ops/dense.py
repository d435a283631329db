"""Dense layers as matmuls of two matrices, with gradients to the bias that are summed in float32.

TensorFlow's gradient to a bias adds one bfloat16 row after the other on a CPU. Of 256 rows of ones the sum stays at 256
for ever, and of a batch of 2,048 rows three quarters are lost. A matmul with ones sums in float32, and faster. Matmuls
of a tensor with more axes, as in attention, become matmuls of two matrices. TensorFlow would compute a 16-bit gradient
to the kernel for each row of the batch, and add these up.
"""

import functools
import math
import string
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion, matmul

__all__ = ["add_bias", "affine", "batch_dot", "einsum", "takes"]


def takes(inputs: object, kernel: tf.Tensor, where: execution.Execution) -> bool:
    """Whether to compute a dense layer here: in a training step on a CPU, outside XLA.

    Elsewhere the graph is the one of Keras's layer. So an exported model holds nothing else.

    Args:
        inputs: argument of the layer.
        kernel: its kernel.
        where: where the layer's call is executed.
    """
    return (
        where.training
        and where.on_cpu
        and not where.in_xla
        and isinstance(inputs, tf.Tensor)
        and inputs.dtype == kernel.dtype
        and inputs.shape.rank is not None
        and inputs.shape.rank >= 2
    )


def affine(
    inputs: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, kept: int, where: execution.Execution
) -> tf.Tensor:
    """Returns inputs @ kernel + bias, over all axes of the inputs but the first `kept`.

    Args:
        inputs: tensor of rank 2 or more.
        kernel: tensor whose first axes are those summed over.
        bias: tensor of the shape of the kernel's other axes, or None.
        kept: number of axes.
        where: where the layer's call is executed.
    """
    summed = inputs.shape.rank - kept
    sizes, size = kernel.shape[summed:].as_list(), math.prod(kernel.shape[:summed])
    factors = [tf.reshape(inputs, [-1, size]), tf.reshape(kernel, [size, -1])]
    if bias is not None:
        factors.append(tf.reshape(tf.convert_to_tensor(bias), [-1]))
    outputs = matmul.product(functools.partial(_affine_of_matrices, where), *factors, where=where)
    if kept == 1 and len(sizes) == 1:
        return outputs
    outputs = tf.reshape(outputs, [*keras.ops.shape(inputs)[:kept], *sizes])
    return fusion.shaped(outputs, [*inputs.shape[:kept], *sizes])


def _affine_of_matrices(
    where: execution.Execution, rows: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None = None
) -> tf.Tensor:
    outputs = tf.matmul(rows, kernel)
    if bias is None:
        return outputs
    return add_bias(_apart(outputs) if outputs.dtype.size == 2 else outputs, bias, where)


@fusion.custom_gradient
def _apart(x: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
    """Returns the same tensor, so that grappler does not fuse its op with the next.

    oneDNN's matmul with a bias takes, in bfloat16 on a CPU with AMX, 1.1 to 1.9 times as long as the matmul and the
    bias in turns, the more the larger the kernel. In float32 it takes no longer, and nor does a fused convolution.
    """
    # Takes the buffer of `x` over, without a copy, and has no derivative.
    return x if execution.forward_mode(x) else tf.raw_ops.Snapshot(input=x), lambda upstream: upstream


def add_bias(x: tf.Tensor, bias: tf.Tensor, where: execution.Execution | None = None) -> tf.Tensor:
    """Adds a bias to the last axis, as `tf.nn.bias_add`, with a gradient that is summed in float32.

    Args:
        x: tensor of rank 2 or more.
        bias: vector of the dtype of `x`.
        where: where the layer's call is executed; by default `execution.current()`.
    """
    where = where or execution.current()
    bias = tf.convert_to_tensor(bias)
    if x.dtype not in (tf.bfloat16, tf.float16) or not where.training or not where.on_cpu:
        return tf.nn.bias_add(x, bias)

    @fusion.custom_gradient
    def added(x: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        return tf.nn.bias_add(x, bias), lambda upstream: (upstream, _sum_of_rows(upstream, where))

    return added(x, bias)


def _sum_of_rows(x: tf.Tensor, where: execution.Execution) -> tf.Tensor:
    """Returns the sum over all axes but the last, in float32, rounded once."""
    rows = tf.reshape(x, [-1, x.shape[-1]])
    if where.in_xla:
        return tf.cast(tf.reduce_sum(tf.cast(rows, tf.float32), 0), x.dtype)
    return matmul.product(tf.matmul, tf.ones([1, tf.shape(rows)[0]], x.dtype), rows, where=where)[0]


def einsum(
    equation: str, inputs: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None, where: execution.Execution
) -> tf.Tensor:
    """Returns the einsum of inputs and kernel plus a bias, as a matmul of two matrices where the equation allows.

    An ellipsis never reaches TensorFlow. On a CPU its einsum returns wrong numbers for one in half precision.

    Args:
        equation: of two operands, as for `keras.ops.einsum`.
        inputs: first operand.
        kernel: second operand.
        bias: tensor that broadcasts to the output, or None.
        where: where the layer's call is executed.
    """
    rank = inputs.shape.rank
    if rank is not None:
        equation = _spelled_out(equation, rank)
    ours = takes(inputs, kernel, where)
    kept = _kept_axes(equation) if ours else 0
    if kept:
        whole = bias is not None and tuple(bias.shape) == tuple(kernel.shape[rank - kept :])
        outputs = affine(inputs, kernel, bias if whole else None, kept, where)
        bias = None if whole else bias
    else:
        multiply = functools.partial(keras.ops.einsum, equation)
        outputs = matmul.product(multiply, inputs, kernel, where=where) if ours else multiply(inputs, kernel)
    return outputs if bias is None else keras.ops.add(outputs, bias)


def _spelled_out(equation: str, rank: int) -> str:
    """Returns the equation with letters for an ellipsis, for inputs of a rank.

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
    """Returns how many first axes of the inputs the output has, where the kernel's first axes are the others.

    Returns 0 for other equations.

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


def batch_dot(a: tf.Tensor, b: tf.Tensor, axes: Sequence[int], where: execution.Execution) -> tf.Tensor:
    """Returns the matmul of two batches, sample by sample, summed over one axis of each.

    Args:
        a: tensor of shape (batch, ...).
        b: tensor of shape (batch, ...), of the same dtype.
        axes: the axis of `a` and the axis of `b` to sum over.
        where: where the layer's call is executed.
    """
    return matmul.product(functools.partial(tf.einsum, _batched(a, b, axes)), a, b, where=where)


def _batched(a: tf.Tensor, b: tf.Tensor, axes: Sequence[int]) -> str:
    """Returns the equation of `batch_dot`.

    Example:
        >>> _batched(tf.zeros((2, 3, 4)), tf.zeros((2, 4, 5)), (2, 1))
        'abc,acd->abd'
    """
    letters = iter(string.ascii_lowercase)
    batch, *first = (next(letters) for _ in range(a.shape.rank))
    summed = first.pop(axes[0] - 1)
    rest = [next(letters) for _ in range(b.shape.rank - 2)]
    second = [*rest[: axes[1] - 1], summed, *rest[axes[1] - 1 :]]
    left = [*first[: axes[0] - 1], summed, *first[axes[0] - 1 :]]
    return f"{batch}{''.join(left)},{batch}{''.join(second)}->{batch}{''.join(first + rest)}"
