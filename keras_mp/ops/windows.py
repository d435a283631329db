"""What pooling and resizing share: sums over windows in float32, copies to windows, and which kernels are exact."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["pool", "pool_gradient", "repeated", "takes_16_bits", "wide", "window_sums"]


def wide(x: Any, output_dtype: str) -> str:
    """The dtype to compute in: float32, or what `x` and the output have that is wider."""
    dtype: str = keras.backend.result_type(x.dtype, output_dtype, "float32")
    return dtype


def pool(x: Any, size: Sequence[int], strides: Sequence[int], padding: str) -> Any:
    """`tf.nn.avg_pool`, also of float64 over three axes, for which TensorFlow has no kernel on a CPU.

    Args:
        x: tensor, channels last.
        size: of a window along each axis between the first and the last.
        strides: from one window to the next, along the same axes.
        padding: "VALID" or "SAME".
    """
    if len(size) < 3 or x.dtype != tf.float64:
        # TensorFlow's forward derivative of three axes does not know the default layout.
        return tf.nn.avg_pool(x, size, strides, padding, {1: "NWC", 2: "NHWC", 3: "NDHWC"}[len(size)])
    # A mean over a box is the mean of the means of its layers, padded or not.
    batch, depth, height, width, channels = keras.ops.shape(x)
    x = tf.nn.avg_pool2d(tf.reshape(x, [-1, height, width, channels]), size[1:], strides[1:], padding)
    _, height, width, _ = keras.ops.shape(x)
    x = tf.reshape(x, [batch, depth, height * width, channels])
    x = tf.nn.avg_pool2d(x, (size[0], 1), (strides[0], 1), padding)
    return tf.reshape(x, [batch, -1, height, width, channels])


def pool_gradient(g: Any, shape: Any, size: Sequence[int], strides: Sequence[int], padding: str) -> Any:
    """The gradient of `pool`, which needs only the shape of its input.

    Args:
        g: gradient to the answer, channels last.
        shape: of the input.
        size: of a window along each axis between the first and the last.
        strides: from one window to the next, along the same axes.
        padding: "VALID" or "SAME".
    """
    if len(size) == 1:  # TensorFlow, too, pools one axis as two
        shape = [shape[0], 1, shape[1], shape[2]]
        return tf.squeeze(pool_gradient(g[:, None], shape, (1, *size), (1, *strides), padding), 1)
    if len(size) == 3 and g.dtype == tf.float64:
        batch, depth, height, width, channels = shape
        _, *small, _ = keras.ops.shape(g)
        g = tf.reshape(g, [batch, small[0], small[1] * small[2], channels])
        g = pool_gradient(g, [batch, depth, small[1] * small[2], channels], (size[0], 1), (strides[0], 1), padding)
        g = tf.reshape(g, [batch * depth, small[1], small[2], channels])
        g = pool_gradient(g, [batch * depth, height, width, channels], size[1:], strides[1:], padding)
        return tf.reshape(g, [batch, depth, height, width, channels])
    kernel, layout = (tf.raw_ops.AvgPoolGrad, "NHWC") if len(size) == 2 else (tf.raw_ops.AvgPool3DGrad, "NDHWC")
    return kernel(
        orig_input_shape=shape,
        grad=g,
        ksize=[1, *size, 1],
        strides=[1, *strides, 1],
        padding=padding,
        data_format=layout,  # its gradient does not know the default
    )


@functools.cache
def _kernel_adds_in_float32(dtype: Any, axes: int) -> bool:
    """Whether the pooling kernel that this machine has for a 16-bit dtype adds in float32, found out by a trial.

    oneDNN's does for bfloat16, on CPUs that it supports; Eigen's adds in bfloat16, where 256 + 1 is 256, and counts in
    it as well, so that it finds the mean of ones. The kernels of the gradient of windows that overlap add in 16 bits in
    either.
    """
    with tf.init_scope():
        x = tf.fill([1, 512] + [1] * axes, tf.constant(1.3125, dtype))
        try:
            y = tf.nn.avg_pool(x, (512,) + (1,) * (axes - 1), 1, "VALID")
        except tf.errors.OpError:  # no such kernel
            return False
        return bool(tf.reduce_all(y == 1.3125))


def takes_16_bits(x: Any, output_dtype: str, axes: int = 2) -> bool:
    """Whether TensorFlow's pooling kernel can take `x` as it is and still give the right answer.

    Args:
        x: what is to be pooled.
        output_dtype: of the answer.
        axes: to pool over.
    """
    return (
        x.dtype == tf.bfloat16
        and output_dtype == "bfloat16"
        and not execution.in_xla_context()
        and _kernel_adds_in_float32(x.dtype, max(axes, 2))
    )


def repeated(x: Any, counts: Sequence[int]) -> Any:
    """Repeats each element in place.

    Args:
        x: tensor.
        counts: how many times along each of its axes.

    Example:
        >>> import tensorflow as tf
        >>> repeated(tf.constant([[1, 2]]), (2, 3)).numpy().tolist()
        [[1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2]]
    """
    repeats = [axis for axis, count in enumerate(counts) if count > 1]
    if len(repeats) > 2:  # more than TensorFlow's kernel for CPUs broadcasts at once
        last = [count if axis in repeats[-2:] else 1 for axis, count in enumerate(counts)]
        first = [1 if axis in repeats[-2:] else count for axis, count in enumerate(counts)]
        return repeated(repeated(x, last), first)
    shape = keras.ops.shape(x)
    narrow, broad = _divided(shape, counts, 1), _divided(shape, counts)
    copies = tf.broadcast_to(tf.reshape(x, narrow), broad)
    return tf.reshape(copies, [size * count for size, count in zip(shape, counts, strict=True)])


def window_sums(x: Any, counts: Sequence[int], dtype: str, *, fused: bool) -> Any:
    """Adds in float32 what `repeated` has repeated; the gradient of that.

    Args:
        x: tensor, whose sizes are multiples of `counts`.
        counts: elements in a window along each axis.
        dtype: name of the answer's.
        fused: whether XLA is to compile it.

    Example:
        >>> import tensorflow as tf
        >>> window_sums(tf.constant([[1.0, 2.0, 3.0, 4.0]]), (1, 2), "float16", fused=False).numpy().tolist()
        [[3.0, 7.0]]
    """
    number = math.prod(counts)
    # A mean of 2^n elements is their sum but for the exponent.
    if number & (number - 1) == 0 and len(counts) == 4 and counts[0] == counts[3] == 1 and takes_16_bits(x, dtype):
        return tf.nn.avg_pool2d(x, counts[1:3], counts[1:3], "VALID") * tf.cast(number, dtype)
    return _sums_of(fused)(x, counts=tuple(counts), dtype=dtype, wide=wide(x, dtype))


def _divided(shape: Sequence[Any], counts: Sequence[int], inner: int | None = None) -> list[Any]:
    """The shape with an axis for the window, of its size or `inner`, after each that has windows."""
    return [
        size
        for length, count in zip(shape, counts, strict=True)
        for size in ([length] if count == 1 else [length, count if inner is None else inner])
    ]


def _sums(x: Any, *, counts: tuple[int, ...], dtype: str, wide: str) -> Any:
    x = tf.cast(x, wide)
    shape = list(keras.ops.shape(x))
    small = [size // count for size, count in zip(shape, counts, strict=True)]
    # The last axis first: op by op that reads memory in order.
    for axis in reversed(range(len(counts))):
        if counts[axis] > 1:
            shape[axis] = small[axis]
            x = tf.reshape(x, [*shape[: axis + 1], counts[axis], *shape[axis + 1 :]])
            x = tf.reduce_sum(x, axis + 1)
    return tf.cast(x, dtype)


_sums_of = fusion.fusible(_sums)
