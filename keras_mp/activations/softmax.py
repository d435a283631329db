"""Softmax and its logarithm, in float32 inside."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layers
from keras_mp.activations.symbolic import Symbolic
from keras_mp.ops import fusion

__all__ = ["log_softmax", "softmax", "softmax_in_one_pass", "softmax_of_unknown_rank"]


@keras.saving.register_keras_serializable(package="keras_mp")
def softmax(x: Any, axis: int | None = -1) -> Any:
    """Softmax computed in float32.

    A drop-in for `keras.activations.softmax`. The losses of `keras_mp.losses` find the logits behind the
    probabilities, as those of Keras do in float32. A row of -inf gives the uniform distribution, as in
    `keras_mp.layers.Softmax`.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64.
        axis: int, the axis that sums to one; None for all of them together. Defaults to -1.

    Returns:
        Probabilities of the shape and dtype of `x`.

    Raises:
        ValueError: if `axis` is out of bounds.

    Example:
        >>> import keras_mp
        >>> keras_mp.activations.softmax(tf.constant([[60000.0, 60000.0, 0.0]], "float16")).numpy().tolist()
        [[0.5, 0.5, 0.0]]

    The gradient is y * (g - sum(g * y)), as in Goodfellow, Bengio and Courville, "Deep Learning", 2016, section 6.2.
    """
    return _along_axis("softmax", x, axis, softmax_in_one_pass, softmax_of_unknown_rank)


@keras.saving.register_keras_serializable(package="keras_mp")
def log_softmax(x: Any, axis: int | None = -1) -> Any:
    """Logarithm of the softmax, computed in float32.

    A drop-in for `keras.activations.log_softmax`. A row of -inf gives the logarithm of the uniform distribution.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64.
        axis: int, the axis over which the probabilities sum to one; None for all together. Defaults to -1.

    Returns:
        Logarithms of probabilities, of the shape and dtype of `x`.

    Raises:
        ValueError: if `axis` is out of bounds.

    Example:
        >>> import keras_mp
        >>> keras_mp.activations.log_softmax(tf.constant([[300.0, 302.0]], "bfloat16")).numpy().tolist()
        [[-2.125, -0.126953125]]

    The gradient is g - softmax(x) * sum(g).
    """
    return _along_axis("log_softmax", x, axis, _log_softmax_in_one_pass, _log_softmax_of_unknown_rank)


def _along_axis(
    function: str, x: Any, axis: int | None, in_one_pass: Callable[..., Any], in_dtype: Callable[..., Any]
) -> Any:
    """A node of a model for a `keras.Input`, Keras's function for 32 and 64 bits, and for 16 the one given."""
    is_symbolic = isinstance(x, keras.KerasTensor)
    x = x if is_symbolic else keras.ops.convert_to_tensor(x)
    axes = _axes(x, axis)
    if is_symbolic:
        return Symbolic(function, {"axis": axis})(x)
    if x.dtype not in (tf.float16, tf.bfloat16):
        if x.shape.rank is None:  # which Keras does not take
            return in_dtype(x, axes)
        return getattr(keras.activations, function)(x, axis=axis)
    return in_one_pass(x, axes=axes)


def _axes(x: Any, axis: int | None) -> tuple[int, ...] | None:
    """The axes that sum to one together, None for all of an unknown rank, or Keras's error for one out of bounds."""
    rank = x.shape.rank if isinstance(x, tf.Tensor) else len(x.shape)
    if rank is None:
        return None if axis is None else (axis,)
    if axis is None:
        return tuple(range(rank))
    if not -rank <= axis < rank:
        raise ValueError(f"Axis {axis} is out of bounds for input shape {tuple(x.shape)}. Received: axis={axis}")
    return (axis % rank,)


def softmax_of_unknown_rank(x: Any, axes: Sequence[int] | None) -> Any:
    """Softmax in the dtype of the logits, over axes counted from either end.

    Args:
        x: float32 or float64 logits.
        axes: those that sum to one together; None for all.
    """
    # exp(x - logsumexp(x)) would round the logsumexp of large logits to their last digit.
    exp = tf.exp(x - tf.stop_gradient(tf.reduce_max(x, axes, keepdims=True)))
    return exp / tf.reduce_sum(exp, axes, keepdims=True)


def _log_softmax_of_unknown_rank(x: Any, axes: Sequence[int] | None) -> Any:
    x -= tf.stop_gradient(tf.reduce_max(x, axes, keepdims=True))
    return x - tf.math.log(tf.reduce_sum(tf.exp(x), axes, keepdims=True))


def _shifted(x: Any, axes: tuple[int, ...] | None) -> tuple[Any, Any]:
    """Logits in float32 less the largest of their row, and the sum of their exponentials.

    exp(x - logsumexp(x)) would round the logsumexp of large logits to their last digit. Nothing is below float32's
    lowest: a row of -inf would give -inf - -inf.
    """
    x = tf.maximum(tf.cast(x, tf.float32), tf.float32.min)
    x -= tf.stop_gradient(fusion.largest(x, axes))
    return x, fusion.total(tf.exp(x), axes)


def _softmax_in_float32(x: Any, axes: tuple[int, ...] | None) -> Any:
    x, total = _shifted(x, axes)
    return tf.exp(x) * (1.0 / total)


def _softmax_forward(x: Any, *, axes: tuple[int, ...] | None) -> Any:
    return tf.cast(_softmax_in_float32(x, axes), x.dtype)


def _softmax_backward(y: Any, upstream: Any, *, axes: tuple[int, ...] | None) -> Any:
    # y * (g - sum(g * y)), where 16 bits would round the confident y of a row to 1 and lose its gradient, which is that
    # 1 - y times a difference of g. The other y of the row know 1 - y: with their sum in place of 1 nothing is lost.
    wide, g = tf.cast(y, tf.float32), tf.cast(upstream, tf.float32)
    return tf.cast(wide * (g * fusion.total(wide, axes) - fusion.total(g * wide, axes)), y.dtype)


def _log_softmax_forward(x: Any, *, axes: tuple[int, ...] | None) -> Any:
    shifted, total = _shifted(x, axes)
    return tf.cast(shifted - tf.math.log(total), x.dtype)


def _log_softmax_backward(x: Any, upstream: Any, *, axes: tuple[int, ...] | None) -> Any:
    g = tf.cast(upstream, tf.float32)
    return tf.cast(g - _softmax_in_float32(x, axes) * fusion.total(g, axes), x.dtype)


def _softmax_by_kernel(x: Any, *, axes: tuple[int, ...]) -> Any:
    return tf.nn.softmax(x, axes[0])


_softmax_operation = fusion.operation(_softmax_forward, _softmax_backward, keeps_output=True)
_softmax_of_float32 = fusion.operation(_softmax_by_kernel, _softmax_backward, keeps_output=True, compiles_forward=False)
_log_softmax_in_one_pass = fusion.operation(_log_softmax_forward, _log_softmax_backward)


def softmax_in_one_pass(x: Any, axes: tuple[int, ...] | None) -> Any:
    """Softmax over one or several axes, computed in float32, of which only the answer is kept for the backward pass.

    Args:
        x: float16, bfloat16 or float32 logits of any shape.
        axes: the axes that sum to one together, counted from the front; None for all of an unknown rank.

    Returns:
        Probabilities of the shape and dtype of `x`, with the logits attached where Keras's losses look for them.
    """
    by_kernel = x.dtype == tf.float32 and x.shape.rank is not None and axes is not None and len(axes) == 1
    return keras_layers.with_logits((_softmax_of_float32 if by_kernel else _softmax_operation)(x, axes=axes), x)
