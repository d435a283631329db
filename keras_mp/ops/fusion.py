"""Functions of tensors that XLA compiles to one pass over memory where that pays, with gradients that keep little.

A chain of elementwise operations and reductions reads and writes memory once an operation, and in bfloat16 on a CPU
converts to float32 and back in each. Compiled by XLA it does so once. Matrix products and convolutions stay outside:
there the libraries' kernels are faster.
"""

import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any

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

# Whether what is traced now is being compiled on its own, for a CPU.
_on_cpu = contextvars.ContextVar("_on_cpu", default=False)

_LONGEST_SUM = 1024


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`tf.custom_gradient` for tapes, forward accumulators and variables alike.

    TensorFlow's takes no gradient to a variable that it is given in eager code. And of a gradient it makes a forward
    derivative by its transpose, which it finds only where no tape is in it. So where a forward accumulator follows one
    of the tensors, what `function` computes is differentiated op by op.

    Args:
        function: from tensors to tensors, made of ops with gradients, and a function that makes gradients of gradients.

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
    def run(*tensors: Any) -> Any:
        tensors = tuple(tf.convert_to_tensor(tensor) for tensor in tensors)
        return function(*tensors)[0] if execution.forward_mode(*tensors) else with_gradient(*tensors)

    return run


def shaped(x: tf.Tensor, shape: Any) -> tf.Tensor:
    """`tf.ensure_shape`, whose op no forward accumulator can follow in a graph.

    Args:
        x: of that shape.
        shape: with None for what is not known.
    """
    if not execution.forward_mode(x):
        return tf.ensure_shape(x, shape)
    x.set_shape(shape)
    return x


def pays(*tensors: tf.Tensor) -> bool:
    """Whether functions of these tensors should be compiled on their own.

    They are in the graph of a training step, where a gradient tape is watching. They are not in eager code, not inside
    a function that XLA compiles as a whole, where all is fused anyway, and not in a forward pass alone: that is also
    what an exported model holds, and TensorFlow Serving refuses functions that XLA must compile.

    Nor where a forward accumulator follows them, which does not see what is inside of such functions.

    XLA compiles anew for every shape. Where an axis other than the first, that of the batch, has no static size, as
    for texts of many lengths, the time would go into the compiler.

    Args:
        tensors: what the functions get.
    """
    return (
        not tf.executing_eagerly()
        and execution.recording()
        and not execution.in_xla_context()
        and not execution.forward_mode(*tensors)
        and all(tensor.shape.rank is not None and None not in tensor.shape[1:].as_list() for tensor in tensors)
    )


def fusible(function: Callable[..., Any]) -> Callable[[bool], Callable[..., Any]]:
    """Makes a function of tensors compilable.

    Args:
        function: pure; gets tensors by position and hashable settings by name.

    Returns:
        A function from whether XLA is to compile to `function` itself or the compiled one.

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
        # The gradient of `tf.cond` finds what a compiled function gets from a branch only through an identity.
        tensors = tuple(tf.identity(tensor) for tensor in tensors)
        # `tf.function` would make tensors of NumPy's numbers.
        numbers = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
        return compiled(*tensors, **numbers)

    return lambda fused: called if fused else function


def compiles_for_cpu() -> bool:
    """Whether what is traced now is a function that XLA compiles on its own, for a CPU."""
    return _on_cpu.get()


def total(x: tf.Tensor, axes: tuple[int, ...] | None) -> tf.Tensor:
    """The sum over some axes, which stay with size 1.

    XLA adds up on a CPU one element after the other. It has fast products of matrices with vectors, into which it fuses
    what comes before, so there the sum over axes that stand together is a product with ones: a fifth of the time over
    rows, a third of it along them.

    Args:
        x: float32 or float64, of any shape.
        axes: counted from the front, in order.
    """
    if not compiles_for_cpu() or not axes or tuple(axes) != tuple(range(axes[0], axes[-1] + 1)):
        return tf.reduce_sum(x, axes, keepdims=True)
    sizes = keras.ops.shape(x)
    if axes[0] == 0 and len(axes) > 1:
        return tf.reduce_sum(total(x, axes[1:]), 0, keepdims=True)  # shorter products are faster
    before, summed, after = sizes[: axes[0]], math.prod(sizes[axis] for axis in axes), sizes[axes[-1] + 1 :]
    parts = _parts(summed)
    if parts > 1:
        rows = total(tf.reshape(x, [*before, parts, summed // parts, *after]), (axes[0] + 1,))
        sums = tf.reduce_sum(rows, axes[0], keepdims=True)
    elif after:
        rows = tf.reshape(x, [math.prod(before), summed, math.prod(after)])
        # XLA is three times slower where it has to broadcast the ones over the products.
        sums = tf.matmul(tf.ones([math.prod(before), 1, summed], x.dtype), rows)
    else:
        sums = tf.matmul(tf.reshape(x, [math.prod(before), summed]), tf.ones([summed, 1], x.dtype))
    return tf.reshape(sums, [1 if axis in axes else size for axis, size in enumerate(sizes)])


def _parts(size: Any) -> int:
    """How many sums to divide a sum into: adding to one that is large already loses the digits of what is added."""
    if not isinstance(size, int) or size <= _LONGEST_SUM:
        return 1
    part = next(part for part in range(_LONGEST_SUM, 0, -1) if size % part == 0)
    return size // part if part >= _LONGEST_SUM // 16 else 1


def mean(x: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """The mean over some axes, which stay with size 1; see `total`.

    Args:
        x: float32 or float64, of any shape.
        axes: counted from the front, in order.
    """
    if not compiles_for_cpu():
        return tf.reduce_mean(x, axes, keepdims=True)
    sizes = keras.ops.shape(x)
    return total(x, axes) / tf.cast(math.prod(sizes[axis] for axis in axes), x.dtype)


def largest(x: tf.Tensor, axes: tuple[int, ...] | None) -> tf.Tensor:
    """The maximum over some axes, which stay with size 1.

    XLA takes it on a CPU one element after the other as well; the maxima of eight parts of the last axis it takes
    side by side.

    Args:
        x: of any shape.
        axes: counted from the front.
    """
    if compiles_for_cpu() and axes == (x.shape.rank - 1,):
        size = x.shape[-1] or 0
        if size >= 128 and size % 8 == 0:
            x = functools.reduce(tf.maximum, tf.split(x, 8, axis=-1))
    return tf.reduce_max(x, axes, keepdims=True)


def rounded(x: tf.Tensor, dtype: "tf.DType | str") -> tf.Tensor:
    """`tf.cast`, from float32 to bfloat16 in whole numbers where XLA compiles for a CPU.

    It has an instruction for that, but LLVM then finds no loop over the transcendental functions before it that fits
    the vector registers, and gelu and its gradient take longer.

    Args:
        x: of any shape and float dtype.
        dtype: the dtype to round to; to the nearest, and of two to the even one.

    Returns:
        Tensor of the shape of `x`, of that dtype.

    Example:
        >>> import tensorflow as tf
        >>> rounded(tf.constant([1.00390625, 1.01171875]), "bfloat16").numpy().tolist()
        [1.0, 1.015625]
    """
    if not compiles_for_cpu() or x.dtype != tf.float32 or tf.as_dtype(dtype) != tf.bfloat16:
        return tf.cast(x, dtype)
    return _rounded_to_bfloat16(x)


@custom_gradient
def _rounded_to_bfloat16(x: tf.Tensor) -> Any:
    half, one, places = (np.uint32(number) for number in (0x7FFF, 1, 16))
    bits = tf.bitcast(x, tf.uint32)
    last = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, places), one)
    # A NaN of all ones would become -0.
    bits = tf.where(tf.math.is_nan(x), np.uint32(0x7FC00000), bits + half + last)
    y = tf.bitcast(tf.cast(tf.bitwise.right_shift(bits, places), tf.uint16), tf.bfloat16)
    return y, lambda upstream: tf.cast(upstream, tf.float32)


def held(whole: bool, *tensors: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The same tensors as what the backward pass gets of the forward pass.

    XLA, where it compiles both, finds that a rounding to 16 bits undoes a cast to float32, or that both passes compute
    the same, and keeps the float32 tensor from one to the other. A barrier around each tensor, not around all together,
    keeps it from that, and from keeping what no one uses.

    Args:
        whole: whether XLA compiles both passes: `execution.in_xla_context` in the forward pass, as the backward
            pass of a compiled function does not know.
        tensors: what is kept.
    """
    return tuple(execution.optimization_barrier(tensor) for tensor in tensors) if whole else tensors


def not_before(upstream: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """A tensor of the forward pass, for a backward pass that makes larger ones of it.

    TensorFlow runs an op as soon as what it gets is there: casts and slices of nothing but the forward pass's tensors
    run in the forward pass, and all of them wait in memory for the backward pass. It also takes two equal casts for
    one.

    Args:
        upstream: a gradient that the backward pass gets.
        x: of any shape and dtype.

    Returns:
        `x`, once `upstream` is there.
    """
    with tf.control_dependencies([upstream]):
        return tf.identity(x)


def _as_rounded(whole: bool, gradient: Any) -> Any:
    """A gradient, `held` where it is in 16 bits.

    Summed up in float32 by what comes next, as that of a bias is, it would otherwise stay in float32 for all who take
    it: XLA leaves out a rounding to 16 bits that a cast to float32 follows.
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

    What the backward pass gets from the forward pass is `held`, and so are the 16-bit gradients that it answers.

    Args:
        forward: from tensors by position, and hashable settings by name, to a tensor or several.
        backward: from the same tensors, followed by the gradients to what `forward` answers, and the same settings, to
            a gradient for each tensor (None for integers).
        keeps_output: whether to keep what `forward` answers, one tensor, instead: `backward` gets that and its
            gradient.
        keeps_statistics: whether to keep the inputs and all but the first of what `forward` answers: small tensors that
            spare the backward pass a reduction. `backward` gets the inputs, these, and the gradient to the first.
            Nothing may depend on their own gradients, which are zero.
        compiles_forward: whether XLA may compile `forward`, too; not where TensorFlow's own kernel is faster.

    Returns:
        A function with the arguments of `forward`, compiled by XLA where `pays` says so.

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

    def run(*inputs: tf.Tensor, **settings: Any) -> Any:
        fused, whole = pays(*inputs), execution.in_xla_context()

        @custom_gradient
        def with_gradient(*inputs: tf.Tensor) -> Any:
            outputs = forward_of(fused and compiles_forward)(*inputs, **settings)
            if keeps_output:
                (outputs,) = held(whole and execution.recording(), outputs)
            kept = (outputs,) if keeps_output else (*inputs, *outputs[1:]) if keeps_statistics else inputs

            def gradient(*upstream: tf.Tensor) -> Any:
                slopes = upstream[:1] if keeps_statistics else upstream
                there = held(whole, *kept) if fused or whole else [not_before(slopes[0], each) for each in kept]
                gradients = backward_of(fused)(*there, *slopes, **settings)
                return tf.nest.map_structure(lambda g: _as_rounded(whole, g), gradients)

            return outputs, gradient

        return with_gradient(*inputs)

    return run
