"""Functions of tensors that XLA compiles to one pass over memory where that pays, with gradients that keep only inputs.

A chain of elementwise operations and reductions reads and writes memory once an operation, and in bfloat16 on a CPU
converts to float32 and back in each. Compiled by XLA it does so once. Matrix products and convolutions stay outside:
there the libraries' kernels are faster.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_mp import backend

__all__ = ["fusible", "operation", "pays"]


def pays(*tensors: tf.Tensor) -> bool:
    """Whether functions of these tensors should be compiled on their own.

    They are in the graph of a training step, where a gradient tape is watching. They are not in eager code, not inside
    a function that XLA compiles as a whole, where all is fused anyway, and not in a forward pass alone: that is also
    what an exported model holds, and TensorFlow Serving refuses functions that XLA must compile.

    XLA compiles anew for every shape. Where an axis other than the first, that of the batch, has no static size, as
    for texts of many lengths, the time would go into the compiler.

    Args:
        tensors: what the functions get.
    """
    return (
        not tf.executing_eagerly()
        and backend.recording()
        and not backend.in_xla_context()
        and all(size is not None for tensor in tensors for size in tensor.shape[1:])
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
    compiled = tf.function(function, jit_compile=True, autograph=False)
    return lambda fused: compiled if fused else function


def operation(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes one operation of a function and its gradient, that keeps nothing but its inputs for the backward pass.

    Args:
        forward: from tensors by position, and hashable settings by name, to a tensor or several.
        backward: from the same tensors, followed by the gradients to what `forward` answers, and the same settings, to
            a gradient for each tensor (None for integers).

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
        fused = pays(*inputs)

        @tf.custom_gradient
        def with_gradient(*inputs: tf.Tensor) -> Any:
            def gradient(*upstream: tf.Tensor) -> Any:
                return backward_of(fused)(*inputs, *upstream, **settings)

            return forward_of(fused)(*inputs, **settings), gradient

        return with_gradient(*inputs)

    return run
