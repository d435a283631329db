"""Random numbers for training, drawn in float32: dropout, and noise that is added or multiplied."""

from collections.abc import Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["alpha_dropped", "dropped", "multiplied", "with_added"]

Seed: TypeAlias = "keras.random.SeedGenerator | int | None"

# Where selu saturates: -scale * alpha, as in Keras.
_SATURATED = -1.6732632423543772848170429916717 * 1.0507009873554804934193349852946


def dropped(
    x: tf.Tensor,
    rate: float,
    seed: Seed,
    noise_shape: Sequence[int | None] | None = None,
    where: execution.Execution | None = None,
) -> tf.Tensor:
    """Returns `keras.random.dropout`, with numbers drawn in float32, and one multiplication and rounding.

    The backward pass keeps one byte an element.

    Args:
        x: floating-point tensor of any shape.
        rate: share of the elements to drop.
        seed: a `keras.random.SeedGenerator`, or an int.
        noise_shape: shape of the numbers drawn, as in Keras.
        where: where the layer's call is executed; by default `execution.current()`.
    """
    if rate >= 1:
        return tf.zeros_like(x)
    kept = _kept(x, rate, seed, noise_shape, _wide(x))
    scaled = _scaled_of(fusion.pays(x, where=where))
    scale = 1 / (1 - rate)

    # The gradient is the same function, and does not need `x`.
    @fusion.custom_gradient
    def run(x: tf.Tensor, kept: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        return scaled(x, kept, scale=scale), lambda upstream: (scaled(upstream, kept, scale=scale), None)

    return run(x, kept)


def alpha_dropped(
    x: tf.Tensor,
    rate: float,
    seed: Seed,
    noise_shape: Sequence[int | None] | None = None,
    where: execution.Execution | None = None,
) -> tf.Tensor:
    """Sets elements to the value where selu saturates, and scales and shifts to keep mean and deviation.

    The backward pass keeps one byte an element.

    Args:
        x: floating-point tensor of any shape.
        rate: share of the elements to set.
        seed: a `keras.random.SeedGenerator`, or an int.
        noise_shape: shape of the numbers drawn, as in Keras.
        where: where the layer's call is executed; by default `execution.current()`.
    """
    scale = ((1 - rate) * (1 + rate * _SATURATED**2)) ** -0.5
    shift = -scale * _SATURATED * rate
    kept = _kept(x, rate, seed, noise_shape, "float32")
    fused = fusion.pays(x, where=where)

    @fusion.custom_gradient
    def run(x: tf.Tensor, kept: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        y = _saturated_of(fused)(x, kept, scale=scale, shift=shift)
        return y, lambda upstream: (_scaled_of(fused)(upstream, kept, scale=scale), None)

    return run(x, kept)


def multiplied(x: tf.Tensor, deviation: float, seed: Seed) -> tf.Tensor:
    """Multiplies by normally distributed numbers of mean 1. The backward pass keeps them in the dtype of `x`.

    Args:
        x: floating-point tensor of any shape.
        deviation: standard deviation of the numbers.
        seed: a `keras.random.SeedGenerator`, or an int.
    """
    noise = keras.random.normal(keras.ops.shape(x), 1.0, deviation, dtype=_wide(x), seed=seed)

    @fusion.custom_gradient
    def run(x: tf.Tensor, noise: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        rounded = tf.cast(noise, x.dtype)
        y = tf.cast(tf.cast(x, noise.dtype) * noise, x.dtype)
        return y, lambda upstream: (upstream * fusion.not_before(upstream, rounded), None)

    return run(x, noise)


def with_added(x: tf.Tensor, deviation: float, seed: Seed) -> tf.Tensor:
    """Adds normally distributed numbers of mean 0, in float32.

    Args:
        x: floating-point tensor of any shape.
        deviation: standard deviation of the numbers.
        seed: a `keras.random.SeedGenerator`, or an int.
    """
    noise = keras.random.normal(keras.ops.shape(x), 0.0, deviation, dtype=_wide(x), seed=seed)
    return tf.cast(tf.cast(x, noise.dtype) + noise, x.dtype)


def _kept(x: tf.Tensor, rate: float, seed: Seed, noise_shape: Sequence[int | None] | None, dtype: str) -> tf.Tensor:
    """Returns which elements stay: bools of the shape of `x`, or of one that broadcasts to it."""
    sizes = keras.ops.shape(x)
    if noise_shape is not None:
        sizes = [size if given is None else given for size, given in zip(sizes, noise_shape, strict=True)]
    return keras.random.uniform(sizes, dtype=dtype, seed=seed) >= rate


def _wide(x: tf.Tensor) -> str:
    return str(keras.backend.result_type(x.dtype, "float32"))


def _scaled(x: tf.Tensor, kept: tf.Tensor, *, scale: float) -> tf.Tensor:
    return tf.where(kept, tf.cast(tf.cast(x, _wide(x)) * scale, x.dtype), tf.zeros([], x.dtype))


def _saturated(x: tf.Tensor, kept: tf.Tensor, *, scale: float, shift: float) -> tf.Tensor:
    wide = tf.cast(x, _wide(x))
    return tf.cast(scale * tf.where(kept, wide, tf.constant(_SATURATED, wide.dtype)) + shift, x.dtype)


_scaled_of, _saturated_of = fusion.fusible(_scaled), fusion.fusible(_saturated)
