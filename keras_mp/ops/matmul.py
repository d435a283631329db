"""Products of 16-bit tensors in float32 inside, for a CPU that multiplies no faster in 16 bits.

Not every CPU gains from 16 bits: of those without bfloat16 instructions none does, of those with AVX512-BF16 some take
twice as long as in float32, and few are fast in float16. What is computed of 16-bit tensors in float32 and rounded once
is what a 16-bit product with float32 sums is, so that on such a CPU the one can stand for the other. Tensors and
gradients stay in 16 bits, and take half the memory: float32 copies live for one product.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["are_wide", "product", "wide"]


def product(function: Callable[..., tf.Tensor], *tensors: tf.Tensor) -> tf.Tensor:
    """A product or convolution of a training step: as it is, or `wide` where 16 bits gain nothing.

    Args:
        function: as for `wide`.
        tensors: of one dtype.
    """
    return wide(function, *tensors) if are_wide(tensors[0].dtype) else function(*tensors)


def are_wide(dtype: tf.DType) -> bool:
    """Whether products of tensors of a dtype are to be computed in float32: in 16 bits, on a CPU that is slow in it.

    A bare product in 16 bits that is as fast as one in float32 is not the whole of it: on a CPU with AVX512-FP16 and no
    AMX a convolution takes 1.7 times as long, and a product with a bias, which TensorFlow fuses, hundreds of times.
    Where XLA compiles them, it has a way of its own.

    Args:
        dtype: of the factors.
    """
    return (
        dtype in (tf.bfloat16, tf.float16)
        and execution.on_cpu()
        and not execution.in_xla_context()
        and not hardware.cpu_gains(dtype.name)
    )


def wide(function: Callable[..., tf.Tensor], *tensors: tf.Tensor) -> tf.Tensor:
    """A function of 16-bit tensors, computed in float32 and rounded once; so are its gradients, of any order.

    Args:
        function: of tensors, that computes in their dtype, and none of whose gradients needs what it answers.
        tensors: of one 16-bit dtype. Nothing else is kept for the backward pass.

    Returns:
        What `function` answers, in that dtype.

    Example:
        >>> x = tf.constant([[1.0, 2.0]], tf.bfloat16)
        >>> wide(tf.matmul, x, tf.transpose(x))
        <tf.Tensor: shape=(1, 1), dtype=bfloat16, numpy=array([[5]], dtype=bfloat16)>
    """

    @fusion.custom_gradient
    def run(*tensors: tf.Tensor) -> Any:
        dtype = tensors[0].dtype

        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            there = [tf.cast(fusion.not_before(upstream, tensor), tf.float32) for tensor in tensors]
            with tf.GradientTape() as tape:
                tape.watch(there)
                outputs = function(*there)  # for its gradients: a graph leaves the product itself out
            gradients = tape.gradient(outputs, there, tf.cast(upstream, tf.float32))
            return [tf.cast(each, dtype) for each in gradients]

        return tf.cast(function(*(tf.cast(tensor, tf.float32) for tensor in tensors)), dtype), gradient

    return run(*tensors)
