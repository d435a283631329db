"""Functions of tensors that XLA compiles to one pass over memory where that pays, with gradients that keep little.

In a chain of elementwise operations and reductions each one reads and writes memory. In bfloat16 on a CPU each one
also converts to float32 and back. Compiled by XLA, the chain does both once. Matmuls and convolutions stay outside: the
libraries' kernels are faster.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import execution

__all__ = [
    "compiles_for_cpu",
    "custom_gradient",
    "fusible",
    "held",
    "largest",
    "mean",
    "not_before",
    "operation",
    "pays",
    "rounded",
    "shaped",
    "total",
]

# Whether XLA compiles the function that is being traced by itself, for a CPU.
_on_cpu = contextvars.ContextVar("_on_cpu", default=False)

_LONGEST_SUM = 1024

# From the gradients to the outputs to those to the inputs.
Gradient: TypeAlias = Callable[..., Any]


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with its own gradient, for gradient tapes, forward accumulators and variables alike.

    `tf.custom_gradient` takes no gradient to a variable that it gets in eager code. For a forward accumulator it
    transposes the gradient, and fails where a tape is in it. Here, TensorFlow differentiates `function` op by op where
    a forward accumulator follows one of the tensors.

    Args:
        function: takes tensors. Returns tensors, made by ops with gradients, and a gradient function.

    Example:
        >>> import tensorflow as tf
        >>> square = custom_gradient(lambda x: (x * x, lambda upstream: 2 * x * upstream))
        >>> x = tf.constant(3.0)
        >>> with tf.autodiff.ForwardAccumulator(x, tf.constant(1.0)) as accumulator:
        ...     y = square(x)
        >>> float(accumulator.jvp(y))
        6.0
    """
    with_gradient = tf.custom_gradient(function)

    @functools.wraps(function)
    def run(*tensors: "tf.Tensor | tf.Variable | np.ndarray | float") -> Any:
        tensors = tuple(tf.convert_to_tensor(tensor) for tensor in tensors)
        return function(*tensors)[0] if execution.forward_mode(*tensors) else with_gradient(*tensors)

    return run


def shaped(x: tf.Tensor, shape: "Sequence[int | None] | tf.TensorShape") -> tf.Tensor:
    """Returns `x` with a static shape, as `tf.ensure_shape`, also where a forward accumulator follows `x` in a graph.

    Args:
        x: tensor of that shape.
        shape: sizes, with None for an unknown one.
    """
    if not execution.forward_mode(x):
        return tf.ensure_shape(x, shape)
    x.set_shape(shape)
    return x


def pays(*tensors: tf.Tensor, where: execution.Execution | None = None) -> bool:
    """Whether XLA should compile functions of these tensors by themselves.

    It should in the graph of a training step, where a gradient tape records, and nowhere else:

    - Inside a function that XLA compiles as a whole, everything is fused already.
    - A forward pass alone may be part of an exported model. TensorFlow Serving refuses functions that XLA must compile.
    - A forward accumulator does not see inside compiled functions.
    - XLA compiles again for every shape. For texts of many lengths, all the time would go into the compiler. So only
      the batch axis may have an unknown size.

    Args:
        tensors: arguments of the functions.
        where: where the layer's call is executed; by default `execution.current()`.
    """
    if tf.executing_eagerly():
        return False
    where = where or execution.current()
    return (
        where.training
        and not where.in_xla
        and not execution.forward_mode(*tensors)
        and all(tensor.shape.rank is not None and None not in tensor.shape[1:].as_list() for tensor in tensors)
    )


def fusible(function: Callable[..., Any]) -> Callable[[bool], Callable[..., Any]]:
    """Makes a function of tensors compilable.

    Args:
        function: pure function of tensors by position and hashable settings by name.

    Returns:
        A function of one bool: for True it returns the compiled function, for False `function` itself.

    Example:
        >>> import tensorflow as tf
        >>> @fusible
        ... def half(x):
        ...     return x / 2
        >>> half(False)(3.0), float(half(True)(tf.constant(3.0)))
        (1.5, 1.5)
    """

    @functools.wraps(function)
    def traced(*tensors: Any, **settings: Any) -> Any:
        token = _on_cpu.set(execution.on_cpu())
        try:
            return function(*tensors, **settings)
        finally:
            _on_cpu.reset(token)

    compiled = tf.function(traced, jit_compile=True, autograph=False)

    def called(*tensors: Any, **settings: Any) -> Any:
        # Without the identity, the gradient of `tf.cond` does not find what a compiled function gets in a branch.
        tensors = tuple(tf.identity(tensor) for tensor in tensors)
        # `tf.function` would make tensors of NumPy's numbers.
        numbers = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
        return compiled(*tensors, **numbers)

    return lambda fused: called if fused else function


def compiles_for_cpu() -> bool:
    """Whether XLA compiles the function that is being traced by itself, for a CPU."""
    return _on_cpu.get()


def total(x: tf.Tensor, axes: tuple[int, ...] | None) -> tf.Tensor:
    """Returns the sum over some axes, which stay with size 1.

    On a CPU, XLA adds one element after the other. Its matrix-vector products are fast, and it fuses the operations
    before into them. So the sum over adjacent axes is a matmul with ones there. It takes a fifth of the time over rows
    and a third along them.

    Args:
        x: float32 or float64 tensor of any shape.
        axes: counted from the front, in order.
    """
    if not compiles_for_cpu() or not axes or tuple(axes) != tuple(range(axes[0], axes[-1] + 1)):
        return tf.reduce_sum(x, axes, keepdims=True)
    sizes = keras.ops.shape(x)
    if axes[0] == 0 and len(axes) > 1:
        return tf.reduce_sum(total(x, axes[1:]), 0, keepdims=True)  # shorter matmuls are faster
    before, summed, after = sizes[: axes[0]], math.prod(sizes[axis] for axis in axes), sizes[axes[-1] + 1 :]
    parts = _parts(summed)
    if parts > 1:
        rows = total(tf.reshape(x, [*before, parts, summed // parts, *after]), (axes[0] + 1,))
        sums = tf.reduce_sum(rows, axes[0], keepdims=True)
    elif after:
        rows = tf.reshape(x, [math.prod(before), summed, math.prod(after)])
        # XLA is three times slower where it broadcasts the ones over the batch of matmuls.
        sums = tf.matmul(tf.ones([math.prod(before), 1, summed], x.dtype), rows)
    else:
        sums = tf.matmul(tf.reshape(x, [math.prod(before), summed]), tf.ones([summed, 1], x.dtype))
    return tf.reshape(sums, [1 if axis in axes else size for axis, size in enumerate(sizes)])


def _parts(size: "int | tf.Tensor") -> int:
    """Returns into how many sums to divide a sum. Adding a small number to a large sum loses the number's digits."""
    if not isinstance(size, int) or size <= _LONGEST_SUM:
        return 1
    part = next(part for part in range(_LONGEST_SUM, 0, -1) if size % part == 0)
    return size // part if part >= _LONGEST_SUM // 16 else 1


def mean(x: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """Returns the mean over some axes, which stay with size 1; see `total`.

    Args:
        x: float32 or float64 tensor of any shape.
        axes: counted from the front, in order.
    """
    if not compiles_for_cpu():
        return tf.reduce_mean(x, axes, keepdims=True)
    sizes = keras.ops.shape(x)
    return total(x, axes) / tf.cast(math.prod(sizes[axis] for axis in axes), x.dtype)


def largest(x: tf.Tensor, axes: tuple[int, ...] | None) -> tf.Tensor:
    """Returns the maximum over some axes, which stay with size 1.

    On a CPU, XLA compares one element after the other. Split in eight, the last axis takes an eighth of the steps.

    Args:
        x: tensor of any shape.
        axes: counted from the front.
    """
    if compiles_for_cpu() and axes == (x.shape.rank - 1,):
        size = x.shape[-1] or 0
        if size >= 128 and size % 8 == 0:
            x = functools.reduce(tf.maximum, tf.split(x, 8, axis=-1))
    return tf.reduce_max(x, axes, keepdims=True)


def rounded(x: tf.Tensor, dtype: "tf.DType | str") -> tf.Tensor:
    """Returns `tf.cast(x, dtype)`, by integer operations from float32 to bfloat16 where XLA compiles for a CPU.

    The CPU has an instruction for this cast. But with it LLVM does not vectorize the loop over the transcendental
    functions before, and gelu and its gradient take longer.

    Args:
        x: tensor of any shape and floating-point dtype.
        dtype: the dtype to round to, to the nearest number and of two to the even one.

    Returns:
        Tensor of the shape of `x` and that dtype.

    Example:
        >>> import tensorflow as tf
        >>> rounded(tf.constant([1.00390625, 1.01171875]), "bfloat16").numpy().tolist()
        [1.0, 1.015625]
    """
    if not compiles_for_cpu() or x.dtype != tf.float32 or tf.as_dtype(dtype) != tf.bfloat16:
        return tf.cast(x, dtype)
    return _rounded_to_bfloat16(x)


@custom_gradient
def _rounded_to_bfloat16(x: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
    half, one, places = (np.uint32(number) for number in (0x7FFF, 1, 16))
    bits = tf.bitcast(x, tf.uint32)
    last = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, places), one)
    # A NaN whose bits are all ones would become -0.
    bits = tf.where(tf.math.is_nan(x), np.uint32(0x7FC00000), bits + half + last)
    y = tf.bitcast(tf.cast(tf.bitwise.right_shift(bits, places), tf.uint16), tf.bfloat16)
    return y, lambda upstream: tf.cast(upstream, tf.float32)


def held(whole: bool, *tensors: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns the tensors that the backward pass keeps of the forward pass, as XLA must store them.

    Where XLA compiles both passes, it removes a cast to float32 after a rounding to half precision. It also shares what
    both passes compute. Then it keeps a float32 tensor from one pass to the other. A barrier around each tensor
    prevents that. One barrier around all of them would keep tensors that nobody uses.

    Args:
        whole: whether XLA compiles both passes: `Execution.in_xla` of the forward pass. The backward pass of a compiled
            function cannot tell.
        tensors: tensors of the forward pass.
    """
    return tuple(execution.optimization_barrier(tensor) for tensor in tensors) if whole else tensors


def not_before(upstream: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Returns a tensor of the forward pass to a backward pass that makes larger tensors of it.

    TensorFlow runs an op as soon as its inputs exist. So casts and slices of tensors of the forward pass run in the
    forward pass, and their results wait in memory for the backward pass. It also merges two equal casts.

    Args:
        upstream: a gradient that the backward pass gets.
        x: tensor of any shape and dtype.

    Returns:
        `x`, once `upstream` is computed.
    """
    with tf.control_dependencies([upstream]):
        return tf.identity(x)


def _as_rounded(whole: bool, gradient: tf.Tensor | None) -> tf.Tensor | None:
    """Returns a gradient, `held` where it is 16-bit.

    XLA leaves out a rounding to half precision that a cast to float32 follows, as in the sum of a bias's gradient. The
    gradient would stay in float32 for everyone who takes it.
    """
    return held(whole, gradient)[0] if gradient is not None and gradient.dtype.size == 2 else gradient


def operation(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    keeps_output: bool = False,
    keeps_statistics: bool = False,
    compiles_forward: bool = True,
) -> Callable[..., Any]:
    """Makes one operation of a function and its gradient, that keeps its inputs or its output and nothing else.

    The tensors that it keeps for the backward pass are `held`, and so are 16-bit gradients.

    Args:
        forward: function of tensors by position and hashable settings by name. Returns a tensor or several.
        backward: function of the same tensors, then the gradients to the outputs, and the same settings. Returns a
            gradient for each tensor, None for integers.
        keeps_output: whether to keep the output, one tensor, and not the inputs. `backward` gets the output and its
            gradient.
        keeps_statistics: whether to keep the inputs and all outputs but the first: small tensors that spare the
            backward pass a reduction. `backward` gets the inputs, these, and the gradient to the first output. Their
            own gradients are taken for zero.
        compiles_forward: whether XLA may compile `forward` as well. False where TensorFlow's kernel is faster.

    Returns:
        A function with the arguments of `forward` and an optional `where`, see `pays`. XLA compiles it where that pays.

    Example:
        >>> import tensorflow as tf
        >>> cube = operation(lambda x: x**3, lambda x, upstream: 3 * x**2 * upstream)
        >>> x = tf.constant(2.0)
        >>> with tf.GradientTape() as tape:
        ...     tape.watch(x)
        ...     y = cube(x)
        >>> float(y), float(tape.gradient(y, x))
        (8.0, 12.0)
    """
    forward_of, backward_of = fusible(forward), fusible(backward)

    def run(*inputs: tf.Tensor, where: execution.Execution | None = None, **settings: Any) -> Any:
        where = where or execution.current()
        # The backward pass is traced elsewhere and cannot ask.
        fused, whole = pays(*inputs, where=where), where.in_xla

        @custom_gradient
        def with_gradient(*inputs: tf.Tensor) -> Any:
            outputs = forward_of(fused and compiles_forward)(*inputs, **settings)
            if keeps_output:
                (outputs,) = held(whole and where.training, outputs)
            kept = (outputs,) if keeps_output else (*inputs, *outputs[1:]) if keeps_statistics else inputs

            def gradient(*upstream: tf.Tensor) -> Any:
                slopes = upstream[:1] if keeps_statistics else upstream
                there = held(whole, *kept) if fused or whole else [not_before(slopes[0], each) for each in kept]
                gradients = backward_of(fused)(*there, *slopes, **settings)
                return tf.nest.map_structure(lambda g: _as_rounded(whole, g), gradients)

            return outputs, gradient

        return with_gradient(*inputs)

    return run
