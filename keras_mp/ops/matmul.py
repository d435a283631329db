"""Matmuls of 16-bit tensors with float32 sums, also on CPUs that do not multiply faster in half precision.

Not every CPU gains from half precision. CPUs without bfloat16 instructions do not. Some with AVX512-BF16 take twice as
long as in float32, and few are fast in float16. A 16-bit matmul with float32 sums equals a float32 matmul that is
rounded once, so either can stand for the other. Tensors and gradients stay 16-bit and take half the memory. Float32
copies live for one matmul.
"""

from collections.abc import Callable

import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["are_wide", "logits", "product", "wide", "with_float32_sums"]


def product(
    function: Callable[..., tf.Tensor], *tensors: tf.Tensor, where: execution.Execution | None = None
) -> tf.Tensor:
    """Returns a matmul or convolution of a training step, computed `wide` where half precision gains nothing.

    Args:
        function: as for `wide`.
        tensors: tensors of one dtype.
        where: where the layer's call is executed; by default `execution.current()`.
    """
    return wide(function, *tensors) if are_wide(tensors[0].dtype, where) else function(*tensors)


def are_wide(dtype: tf.DType, where: execution.Execution | None = None) -> bool:
    """Whether to compute matmuls of a dtype in float32: 16-bit ones on a CPU that is slow in half precision.

    The time of a bare matmul is not enough to know. On a CPU with AVX512-FP16 and without AMX, a float16 convolution
    takes 1.7 times as long as in float32. A matmul with a bias, which TensorFlow fuses, takes hundreds of times as
    long. XLA chooses by itself.

    Args:
        dtype: dtype of the factors.
        where: where the layer's call is executed; by default `execution.current()`.
    """
    if dtype not in (tf.bfloat16, tf.float16):
        return False
    where = where or execution.current()
    return where.on_cpu and not where.in_xla and not hardware.cpu_gains(dtype.name)


def wide(function: Callable[..., tf.Tensor], *tensors: tf.Tensor) -> tf.Tensor:
    """Returns a function of 16-bit tensors, computed in float32 and rounded once. So are its gradients, of any order.

    Args:
        function: computes in the dtype of its tensors. None of its gradients may need its output.
        tensors: tensors of one 16-bit dtype. The backward pass keeps nothing else.

    Returns:
        The output of `function` in that dtype.

    Example:
        >>> x = tf.constant([[1.0, 2.0]], tf.bfloat16)
        >>> wide(tf.matmul, x, tf.transpose(x))
        <tf.Tensor: shape=(1, 1), dtype=bfloat16, numpy=array([[5]], dtype=bfloat16)>
    """

    @fusion.custom_gradient
    def run(*tensors: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        dtype = tensors[0].dtype

        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            kept = [tf.cast(fusion.not_before(upstream, tensor), tf.float32) for tensor in tensors]
            with tf.GradientTape() as tape:
                tape.watch(kept)
                outputs = function(*kept)  # for its gradients: a graph leaves the matmul itself out
            gradients = tape.gradient(outputs, kept, tf.cast(upstream, tf.float32))
            return [tf.cast(each, dtype) for each in gradients]

        return tf.cast(function(*(tf.cast(tensor, tf.float32) for tensor in tensors)), dtype), gradient

    return run(*tensors)


def with_float32_sums(
    a: tf.Tensor,
    b: tf.Tensor,
    transpose_a: bool,
    transpose_b: bool,
    output_dtype: tf.DType,
    where: execution.Execution,
) -> tf.Tensor:
    """Returns the matmul of two matrices of one 16-bit dtype, with sums in float32 and gradients of any order.

    Only XLA has a 16-bit matmul that does not round its sums. Elsewhere a float32 output is that of a float32 matmul,
    which is exact in the products of 16-bit numbers (as NVIDIA's TF32 is) and half as fast.

    Args:
        a: matrix.
        b: matrix of the same dtype.
        transpose_a: whether to transpose `a` first.
        transpose_b: whether to transpose `b` first.
        output_dtype: float32 or the dtype of the matrices.
        where: where the layer's call is executed. In a training step a 16-bit output may be computed `wide`.
    """
    wide = where.training and are_wide(a.dtype, where)  # without gradients there is nothing that would differ

    @fusion.custom_gradient
    def run(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            g = tf.cast(upstream, a.dtype)
            to_a = (b, g, transpose_b, True) if transpose_a else (g, b, False, not transpose_b)
            to_b = (g, a, True, transpose_a) if transpose_b else (a, g, not transpose_a, False)
            return with_float32_sums(*to_a, a.dtype, where), with_float32_sums(*to_b, b.dtype, where)

        if output_dtype == a.dtype and not wide:
            return tf.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b), gradient
        if where.in_xla:
            y = tf.raw_ops.BatchMatMulV3(x=a, y=b, Tout=output_dtype, adj_x=transpose_a, adj_y=transpose_b)
        else:
            wide_a, wide_b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
            y = tf.cast(tf.matmul(wide_a, wide_b, transpose_a=transpose_a, transpose_b=transpose_b), output_dtype)
        return y, gradient

    return run(a, b)


def logits(x: tf.Tensor, kernel: tf.Tensor, where: execution.Execution) -> tf.Tensor:
    """Returns the float32 matmul of 16-bit `x` and a kernel that is rounded to the dtype of `x`.

    Args:
        x: 16-bit tensor of shape (..., features).
        kernel: matrix of shape (features, units), of any floating-point dtype. Its gradient has that dtype.
        where: where the layer's call is executed.
    """

    @fusion.custom_gradient
    def run(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            g = tf.cast(upstream, x.dtype)
            to_x = with_float32_sums(g, tf.cast(kernel, x.dtype), False, True, x.dtype, where)
            # XLA's matmul does not round the sums over the batch; TensorFlow's is the one that `Dense` has.
            to_kernel = with_float32_sums(x, g, True, False, tf.float32 if where.in_xla else x.dtype, where)
            return to_x, tf.cast(to_kernel, kernel.dtype)

        return with_float32_sums(x, tf.cast(kernel, x.dtype), False, False, tf.float32, where), gradient

    if len(x.shape) == 2:
        return run(x, kernel)
    y = run(tf.reshape(x, [-1, kernel.shape[0]]), kernel)
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], [kernel.shape[1]]], 0))
    return fusion.shaped(y, [*x.shape[:-1], kernel.shape[1]])
