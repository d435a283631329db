"""Softmax that takes 16-bit or float32 logits, computes in float32 and answers in the compute dtype."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp.errors import ArgumentError
from keras_mp.ops import fusion
from keras_mp.ops.softmax import softmax_in_one_pass, softmax_of_unknown_rank

__all__ = ["Softmax"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Softmax(keras.layers.Softmax):
    """Softmax over one or several axes, computed in float32 whatever the dtype of the logits.

    A drop-in for `keras.layers.Softmax`. Logits are not cast down to the compute dtype first, so float32 logits above
    65504 or closer together than 16 bits can tell still count. A row that is masked altogether gives zeros. In 16-bit
    logits -inf means "masked", as an additive mask of -1e9 becomes -inf there; a row of nothing else gives the uniform
    distribution that the same mask gives in float32.

    Args:
        axis: int, or list or tuple of ints, the axes that sum to one together; None for all. Defaults to -1.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: logits of any shape; float16, bfloat16, float32, float64 or integers.
        mask: bool (or a number, where above 0.5 is True), True to keep; broadcastable to `inputs`. Defaults to None.

    Returns:
        Probabilities of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        TypeError: if `axis` holds something other than ints.
        ValueError: if an axis is out of bounds or `mask` does not broadcast to `inputs`.
        keras_mp.errors.ArgumentError: if `axis` is empty or names one axis twice.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> softmax = keras_mp.layers.Softmax(dtype="mixed_bfloat16")
        >>> probabilities = softmax(np.array([[300.0, 301.0]], "float32"))  # bfloat16 holds neither 301 nor 303
        >>> [round(float(p), 2) for p in probabilities[0]]
        [0.27, 0.73]

    The gradient is y * (g - sum(g * y)), as in Goodfellow, Bengio and Courville, "Deep Learning", 2016, section 6.2.
    """

    def __init__(self, axis: int | Sequence[int] | None = -1, **kwargs: Any) -> None:
        axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
        if axis is not None and not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
            raise TypeError(f"Expected an int or a list/tuple of ints for the argument 'axis', but received: {axis!r}")
        if not axes:
            raise ArgumentError(
                f"`axis` must name at least one axis. Received: axis={axis!r}. Type axis=-1 for the last one, or "
                "axis=None for all of them."
            )
        super().__init__(axis=axis, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Computes the probabilities; see the class for the arguments."""
        axes = self._reduced_axes(inputs.shape) if inputs.shape.rank is not None else self._given_axes()
        x = inputs
        if keras.backend.standardize_dtype(x.dtype) != self.compute_dtype or x.dtype.size > 2:
            x = tf.cast(x, keras.backend.result_type(x.dtype, self.compute_dtype, "float32"))
        if mask is not None:
            mask = _as_bool(mask, x)
            x = tf.where(mask, x, _lowest(x.dtype))
        in_one_pass = x.dtype.size == 2 or (x.dtype.size == 4 and fusion.pays(x))
        together = None if axes is None else tuple(axes)
        outputs = softmax_in_one_pass(x, together) if in_one_pass else _softmax(x, axes)
        if mask is not None:
            outputs = tf.where(mask, outputs, tf.zeros([], outputs.dtype))  # a row that is masked altogether
        return outputs if outputs.dtype == self.compute_dtype else tf.cast(outputs, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the probabilities: that of the logits."""
        self._reduced_axes(input_shape)
        return input_shape

    def _given_axes(self) -> list[int] | None:
        """The axes as they were given, for an unknown rank; None for all."""
        axis = self.axis
        return list(axis) if isinstance(axis, (list, tuple)) else None if axis is None else [axis]

    def _reduced_axes(self, shape: Any) -> list[int]:
        """The axes that sum to one together, counted from the front, or Keras's error for one that is not there."""
        rank = len(shape)
        if self.axis is None:
            return list(range(rank))
        axes = self._given_axes() or []
        for axis in axes:
            if axis >= rank or axis < -rank:
                raise ValueError(
                    f"Axis {axis} is out of bounds for input shape {tuple(shape)}. Received: axis={self.axis}"
                )
        counted = [axis % rank for axis in axes]
        if len(set(counted)) < len(counted):
            raise ArgumentError(
                f"`axis` must name each axis once. Received: axis={self.axis}, which for input shape {tuple(shape)} "
                f"are the axes {counted}. Type axis={sorted(set(counted))}."
            )
        return counted


def _as_bool(mask: Any, x: Any) -> Any:
    """`mask` as booleans, or Keras's error where it does not broadcast to `x`."""
    ranks = tf.TensorShape(mask.shape).rank, tf.TensorShape(x.shape).rank
    if None in ranks:
        return mask if mask.dtype == tf.bool else tf.greater(mask, tf.cast(0.5, mask.dtype))
    if len(mask.shape) > len(x.shape):
        raise ValueError(
            "The `mask` must be broadcastable to `inputs` and must not have more dimensions. "
            f"Received: inputs.shape={x.shape}, mask.shape={mask.shape}"
        )
    for mask_size, size in zip(mask.shape[::-1], x.shape[::-1], strict=False):
        if mask_size is not None and size is not None and mask_size not in (1, size):
            raise ValueError(
                "The `mask` must be broadcastable to `inputs`. Each mask dimension must be 1 or match the "
                f"corresponding input dimension. Received: inputs.shape={x.shape}, mask.shape={mask.shape}"
            )
    return mask if mask.dtype == tf.bool else tf.greater(mask, tf.cast(0.5, mask.dtype))


def _lowest(dtype: Any) -> Any:
    """What a masked logit becomes: below every other, and finite by the time a maximum is subtracted from it."""
    return tf.constant(-float("inf") if dtype.size == 2 else dtype.min, dtype)


def _softmax(x: Any, axes: list[int] | None) -> Any:
    if x.shape.rank is not None and axes is not None and len(axes) == 1:
        return keras.ops.softmax(x, axis=axes[0])  # unlike tf.nn.softmax, leaves Keras's losses a way to the logits
    return softmax_of_unknown_rank(x, axes)
