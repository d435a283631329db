"""Unscaling of gradients: each function that divides by the loss scale is here."""

from typing import Any, TypeAlias

import tensorflow as tf

__all__ = ["Unscaling", "as_dtype", "multiply", "replaces_variable", "unscale"]

_Gradient: TypeAlias = "tf.Tensor | tf.IndexedSlices"
_LARGE_NORM = 2.0**60


class Unscaling:
    """Divides gradients by the loss scale, and limits the norm of all of them.

    Both become factors, computed once for a step. No gradient is read more than once.

    Args:
        scale: scalar, the loss scale that the gradients were multiplied by.
        norm: scalar, the norm of all scaled gradients; None leaves it unlimited.
        limit: the largest norm of the unscaled gradients, where there is a `norm`.
    """

    def __init__(self, scale: tf.Tensor, norm: tf.Tensor | None = None, limit: float | None = None) -> None:
        self._factor: tf.Tensor = tf.math.reciprocal(scale)
        self._shrinks: tf.Tensor | None = None
        if norm is not None:
            # In two steps: a limit over a norm near float32's end is a subnormal number, which a CPU takes for zero.
            norm = unscale(norm, scale)
            first = tf.minimum(_LARGE_NORM / norm, 1.0)
            self._shrinks = tf.minimum(limit / (norm * first), 1.0 / first)
            self._factor *= tf.cast(first, self._factor.dtype)

    def __call__(self, gradient: Any, variable: Any) -> Any:
        """Returns the gradient of the loss itself, float32 at least.

        Args:
            gradient: of any float dtype and shape; `tf.IndexedSlices` stay sparse.
            variable: the variable it belongs to. One that is replaced by its gradient gets it unchanged.
        """
        if replaces_variable(variable):
            return gradient
        gradient = multiply(gradient, self._factor)
        return gradient if self._shrinks is None else multiply(gradient, self._shrinks)


def unscale(gradient: _Gradient, scale: tf.Tensor) -> _Gradient:
    """Divides a gradient by the loss scale in float32, where the quotient of a float16 one does not underflow.

    It is multiplied by the reciprocal, which is exact for powers of two and cheaper than a division.

    Args:
        gradient: of any float dtype and shape; `tf.IndexedSlices` stay sparse.
        scale: scalar.

    Returns:
        The quotient, float32 (float64 where the gradient is).
    """
    return multiply(gradient, tf.math.reciprocal(scale))


def multiply(gradient: _Gradient, factor: tf.Tensor) -> _Gradient:
    """Multiplies a gradient by a scalar, in float32 at least.

    Args:
        gradient: of any float dtype and shape; `tf.IndexedSlices` stay sparse.
        factor: scalar.
    """
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(multiply(gradient.values, factor), gradient.indices, gradient.dense_shape)
    gradient = tf.convert_to_tensor(gradient)
    if gradient.dtype.size < 4:
        gradient = tf.cast(gradient, tf.float32)
    return gradient * tf.cast(factor, gradient.dtype)


def as_dtype(gradient: _Gradient, dtype: str) -> _Gradient:
    """Casts a gradient to the dtype in which replicas add it up; float32 leaves it as it is.

    Args:
        gradient: of any float dtype and shape; `tf.IndexedSlices` stay sparse.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    if dtype == "float32":
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return tf.cast(gradient, dtype)


def replaces_variable(variable: Any) -> bool:
    """Returns whether the variable takes its gradient's value for its own, as the scale of a float8 tensor does.

    Such a gradient never had the loss in it, so it is not divided by the loss scale.
    """
    return bool(getattr(variable, "overwrite_with_gradient", False))
