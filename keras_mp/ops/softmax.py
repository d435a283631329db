"""Softmax and its logarithm, computed in float32."""

from collections.abc import Sequence

import tensorflow as tf

from keras_mp._compat import execution, keras_layers
from keras_mp.ops import fusion

__all__ = ["log_softmax_in_one_pass", "log_softmax_of_unknown_rank", "softmax_in_one_pass", "softmax_of_unknown_rank"]


def softmax_of_unknown_rank(x: tf.Tensor, axes: Sequence[int] | None) -> tf.Tensor:
    """Returns the softmax in the dtype of the logits, over axes counted from either end.

    Args:
        x: float32 or float64 logits.
        axes: axes that sum to one together; None for all.
    """
    # exp(x - logsumexp(x)) would round the logsumexp of large logits to their last digit.
    exp = tf.exp(x - tf.stop_gradient(tf.reduce_max(x, axes, keepdims=True)))
    return exp / tf.reduce_sum(exp, axes, keepdims=True)


def log_softmax_of_unknown_rank(x: tf.Tensor, axes: Sequence[int] | None) -> tf.Tensor:
    """Returns the logarithm of the softmax; see `softmax_of_unknown_rank`.

    Args:
        x: float32 or float64 logits.
        axes: axes over which the probabilities sum to one together; None for all.
    """
    x -= tf.stop_gradient(tf.reduce_max(x, axes, keepdims=True))
    return x - tf.math.log(tf.reduce_sum(tf.exp(x), axes, keepdims=True))


def _shifted(x: tf.Tensor, axes: tuple[int, ...] | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns float32 logits minus the largest of their row, and the sum of their exponentials.

    exp(x - logsumexp(x)) would round the logsumexp of large logits to their last digit. The logits are at least the
    lowest float32 number, because a row of -inf would give -inf - -inf.
    """
    x = tf.maximum(tf.cast(x, tf.float32), tf.float32.min)
    x -= tf.stop_gradient(fusion.largest(x, axes))
    return x, fusion.total(tf.exp(x), axes)


def _softmax_in_float32(x: tf.Tensor, axes: tuple[int, ...] | None) -> tf.Tensor:
    x, total = _shifted(x, axes)
    return tf.exp(x) * (1.0 / total)


def _softmax_forward(x: tf.Tensor, *, axes: tuple[int, ...] | None) -> tf.Tensor:
    return tf.cast(_softmax_in_float32(x, axes), x.dtype)


def _softmax_backward(y: tf.Tensor, upstream: tf.Tensor, *, axes: tuple[int, ...] | None) -> tf.Tensor:
    # y * (g - sum(g * y)) in theory. Half precision rounds the confident y of a row to 1. Its gradient, 1 - y times a
    # difference of g, would be lost. The other y of the row hold 1 - y, so the sum of the row stands for 1.
    wide, g = tf.cast(y, tf.float32), tf.cast(upstream, tf.float32)
    return tf.cast(wide * (g * fusion.total(wide, axes) - fusion.total(g * wide, axes)), y.dtype)


def _log_softmax_forward(x: tf.Tensor, *, axes: tuple[int, ...] | None) -> tf.Tensor:
    shifted, total = _shifted(x, axes)
    return tf.cast(shifted - tf.math.log(total), x.dtype)


def _log_softmax_backward(x: tf.Tensor, upstream: tf.Tensor, *, axes: tuple[int, ...] | None) -> tf.Tensor:
    g = tf.cast(upstream, tf.float32)
    return tf.cast(g - _softmax_in_float32(x, axes) * fusion.total(g, axes), x.dtype)


def _softmax_by_kernel(x: tf.Tensor, *, axes: tuple[int, ...]) -> tf.Tensor:
    return tf.nn.softmax(x, axes[0])


_softmax_operation = fusion.operation(_softmax_forward, _softmax_backward, keeps_output=True)
_softmax_of_float32 = fusion.operation(_softmax_by_kernel, _softmax_backward, keeps_output=True, compiles_forward=False)
_log_softmax_operation = fusion.operation(_log_softmax_forward, _log_softmax_backward)


def softmax_in_one_pass(
    x: tf.Tensor, axes: tuple[int, ...] | None, where: execution.Execution | None = None
) -> tf.Tensor:
    """Returns the softmax, computed in float32. The backward pass keeps the output and nothing else.

    Args:
        x: float16, bfloat16 or float32 logits of any shape.
        axes: axes that sum to one together, counted from the front; None for all of an unknown rank.
        where: where the layer's call is executed; by default `execution.current()`.

    Returns:
        Probabilities of the shape and dtype of `x`, with the logits attached for Keras's losses.
    """
    by_kernel = x.dtype == tf.float32 and x.shape.rank is not None and axes is not None and len(axes) == 1
    operation = _softmax_of_float32 if by_kernel else _softmax_operation
    return keras_layers.with_logits(operation(x, axes=axes, where=where), x)


def log_softmax_in_one_pass(x: tf.Tensor, axes: tuple[int, ...] | None) -> tf.Tensor:
    """Returns the logarithm of the softmax, computed in float32. The backward pass keeps the logits.

    Args:
        x: float16 or bfloat16 logits of any shape.
        axes: axes over which the probabilities sum to one together, counted from the front; None for all.
    """
    return _log_softmax_operation(x, axes=axes)
