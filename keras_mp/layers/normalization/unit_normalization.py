"""Division of each example by its own length, in float32, from and to 16-bit tensors."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp.ops import fusion

__all__ = ["UnitNormalization", "unit"]

# The shortest length that is divided by, as in Keras.
_EPSILON = 1e-12


@keras.saving.register_keras_serializable(package="keras_mp")
class UnitNormalization(keras.layers.UnitNormalization):
    """Division by the L2 norm that computes in float32 and keeps only its 16-bit input for the backward pass.

    A drop-in for `keras.layers.UnitNormalization`, with the same argument. The input is not cast to the compute dtype
    first, so float32 inputs above 65504 still count. A vector of zeros stays one. Its gradient is Keras's 1e12 times
    what comes from above in float32 and float64; for 16-bit inputs, where that would be infinite, it is 0.

    Args:
        axis: int, or list or tuple of ints, the axes that have length 1 together. Defaults to -1.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape; float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        TypeError: if `axis` is neither an int nor a list or tuple.
        ValueError: if an axis is out of bounds.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.UnitNormalization(dtype="mixed_float16")
        >>> y = layer(np.array([[30000.0, 40000.0], [0.0, 0.0]], "float16"))
        >>> [[round(float(value), 3) for value in row] for row in y], y.dtype
        ([[0.6, 0.8], [0.0, 0.0]], tf.float16)

    With y = x / |x|, the gradient to x is (g - y * sum(g * y)) / |x|.
    """

    def __init__(self, axis: Any = -1, **kwargs: Any) -> None:
        super().__init__(axis=axis, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def call(self, inputs: Any) -> Any:
        """Normalizes `inputs`; see the class."""
        self.compute_output_shape(inputs.shape)  # Keras's words for an axis that is out of bounds
        axes = self.axis if isinstance(self.axis, (list, tuple)) else [self.axis]
        dtype = keras.backend.result_type(inputs.dtype, self.compute_dtype, "float32")
        return unit(inputs, tuple(axis % len(inputs.shape) for axis in axes), dtype, self.compute_dtype)


def unit(x: Any, axes: tuple[int, ...], dtype: str, output_dtype: str) -> Any:
    """Vectors along some axes, made long 1; those of zeros stay zeros.

    Args:
        x: of any shape and dtype.
        axes: counted from the front.
        dtype: to compute in, at least float32.
        output_dtype: of the answer.
    """
    x = x if x.dtype.is_floating else tf.cast(x, dtype)
    return _unit(x, axes=axes, dtype=dtype, output_dtype=output_dtype)[0]


def _unit_forward(x: Any, *, axes: tuple[int, ...], dtype: str, output_dtype: str) -> tuple[Any, Any]:
    x = tf.cast(x, dtype)
    inverse = tf.math.rsqrt(fusion.total(tf.square(x), axes))
    return tf.cast(x * tf.minimum(inverse, 1 / _EPSILON), output_dtype), inverse


def _unit_backward(x: Any, inverse: Any, upstream: Any, *, axes: tuple[int, ...], dtype: str, output_dtype: str) -> Any:
    del output_dtype
    wide, g = tf.cast(x, dtype), tf.cast(upstream, dtype)
    long = inverse < 1 / _EPSILON  # enough to divide by
    inverse = tf.minimum(inverse, 1 / _EPSILON)
    y = wide * inverse
    zero = tf.zeros([], dtype)
    to_x = inverse * (g - tf.where(long, y * fusion.total(g * y, axes), zero))
    if x.dtype.size == 2:
        to_x = tf.where(long, to_x, zero)
    return tf.cast(to_x, x.dtype)


_unit = fusion.operation(_unit_forward, _unit_backward, keeps_statistics=True)
