"""Softmax and its logarithm."""

from collections.abc import Callable
from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf

from keras_mp.activations.symbolic import Symbolic
from keras_mp.ops import softmax as _ops

__all__ = ["log_softmax", "softmax", "softmax_in_one_pass"]

ArrayLike: TypeAlias = "tf.Tensor | np.ndarray | keras.KerasTensor"


@keras.saving.register_keras_serializable(package="keras_mp")
def softmax(x: ArrayLike, axis: int | None = -1) -> tf.Tensor:
    """Softmax computed in float32.

    A drop-in for `keras.activations.softmax`. The losses of `keras_mp.losses` find the logits behind the
    probabilities, as those of Keras do in float32. A row of -inf gives the uniform distribution, as in
    `keras_mp.layers.Softmax`.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64.
        axis: int, the axis that sums to one; None for all axes together. Defaults to -1.

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
    return _along_axis("softmax", x, axis, _ops.softmax_in_one_pass, _ops.softmax_of_unknown_rank)


@keras.saving.register_keras_serializable(package="keras_mp")
def log_softmax(x: ArrayLike, axis: int | None = -1) -> tf.Tensor:
    """Logarithm of the softmax, computed in float32.

    A drop-in for `keras.activations.log_softmax`. A row of -inf gives the logarithm of the uniform distribution.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64.
        axis: int, the axis over which the probabilities sum to one; None for all axes together. Defaults to -1.

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
    return _along_axis("log_softmax", x, axis, _ops.log_softmax_in_one_pass, _ops.log_softmax_of_unknown_rank)


def softmax_in_one_pass(x: tf.Tensor, axes: tuple[int, ...] | None) -> tf.Tensor:
    """Softmax over one or several axes, computed in float32. The backward pass keeps the output and nothing else.

    Args:
        x: float16, bfloat16 or float32 logits of any shape.
        axes: axes that sum to one together, counted from the front; None for all of an unknown rank.

    Returns:
        Probabilities of the shape and dtype of `x`, with the logits attached for Keras's losses.
    """
    return _ops.softmax_in_one_pass(x, axes)


def _along_axis(
    function: str,
    x: ArrayLike,
    axis: int | None,
    in_one_pass: Callable[..., tf.Tensor],
    in_dtype: Callable[..., tf.Tensor],
) -> tf.Tensor:
    """Returns a node of a model for a `keras.Input`, Keras's function for 32 and 64 bits, `in_one_pass` for 16."""
    if isinstance(x, keras.KerasTensor):
        _axes(x, axis)
        return Symbolic(function, {"axis": axis})(x)
    tensor: tf.Tensor = keras.ops.convert_to_tensor(x)
    axes = _axes(tensor, axis)
    if tensor.dtype in (tf.float16, tf.bfloat16):
        return in_one_pass(tensor, axes=axes)
    if tensor.shape.rank is None:  # Keras does not take it
        return in_dtype(tensor, axes)
    return getattr(keras.activations, function)(tensor, axis=axis)


def _axes(x: "tf.Tensor | keras.KerasTensor", axis: int | None) -> tuple[int, ...] | None:
    """Returns the axes that sum to one together, None for all of an unknown rank.

    Raises Keras's error for an axis out of bounds.
    """
    rank = x.shape.rank if isinstance(x, tf.Tensor) else len(x.shape)
    if rank is None:
        return None if axis is None else (axis,)
    if axis is None:
        return tuple(range(rank))
    if not -rank <= axis < rank:
        raise ValueError(f"Axis {axis} is out of bounds for input shape {tuple(x.shape)}. Received: axis={axis}")
    return (axis % rank,)
