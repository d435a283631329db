"""Layers that draw random numbers in training, in float32: rates, means and deviations are what was asked for."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp.ops import fusion

__all__ = [
    "AlphaDropout",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "dropped",
    "kept",
]


class _Random:
    """What the layers share: nothing happens but in training."""

    def call(self: Any, inputs: Any, training: Any = False) -> Any:
        """Draws in training; see the class."""
        if not training or not (self.stddev if isinstance(self, GaussianNoise) else self.rate):
            return inputs
        return self.drawn(tf.convert_to_tensor(inputs))


@keras.saving.register_keras_serializable(package="keras_mp")
class Dropout(_Random, keras.layers.Dropout):
    """Drops out at the rate that was asked for, and keeps the mean, in 16 bits too.

    A drop-in for `keras.layers.Dropout`, with the same arguments. Keras's draws in the compute dtype: bfloat16 has 128
    numbers below 1, so that a rate of 0.001 drops 0.8%, and the same seed drops others than in float32. Here it drops
    the same under every policy, but float64's. One byte an element is kept for the backward pass.

    Args:
        rate: float, share of the inputs to drop.
        noise_shape: shape of what is drawn, with 1 or None for an axis along which all have the same fate, as in Keras.
        seed: int, or None.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape, of floats.
        training: bool, whether to drop out. Defaults to False.

    Returns:
        Tensor of the shape of `inputs`, in the compute dtype.

    Raises:
        ValueError: if `rate` is not between 0 and 1, or `noise_shape` no shape.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.Dropout(0.001, seed=1, dtype="mixed_bfloat16")
        >>> y = layer(tf.ones((1000, 1000)), training=True)
        >>> round(float(tf.reduce_mean(tf.cast(y == 0, "float32"))), 4)
        0.001

    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014,
    https://jmlr.org/papers/v15/srivastava14a.html.
    """

    def drawn(self: Any, x: tf.Tensor) -> tf.Tensor:
        """What is left of `x`."""
        return dropped(x, self.rate, self.seed_generator, self.noise_shape)


class _Spatial(_Random):
    """Whole maps are dropped: what is drawn has size 1 along the axes between batch and channels."""

    def drawn(self: Any, x: tf.Tensor) -> tf.Tensor:
        """What is left of `x`."""
        channels = 1 if getattr(self, "data_format", None) == "channels_first" else len(x.shape) - 1
        shape = [None if axis in (0, channels) else 1 for axis in range(len(x.shape))]
        return dropped(x, self.rate, self.seed_generator, shape)

    def get_config(self: Any) -> dict[str, Any]:
        """The arguments; Keras's configuration has the dtype of variables in the place of the policy."""
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        return {**super().get_config(), "dtype": policy}  # type: ignore[misc]


@keras.saving.register_keras_serializable(package="keras_mp")
class SpatialDropout1D(_Spatial, keras.layers.SpatialDropout1D):
    """Drops whole channels of sequences at the rate that was asked for, in 16 bits too.

    A drop-in for `keras.layers.SpatialDropout1D`, with the same arguments; it draws as `Dropout`.

    Args:
        rate: float, share of the channels to drop.
        seed, name, dtype: as in Keras.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.SpatialDropout1D(0.5, seed=1, dtype="mixed_bfloat16")
        >>> layer(tf.ones((1, 3, 4)), training=True)[0, :, 0].numpy().tolist()
        [2.0, 2.0, 2.0]
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class SpatialDropout2D(_Spatial, keras.layers.SpatialDropout2D):
    """Drops whole channels of images at the rate that was asked for, in 16 bits too.

    A drop-in for `keras.layers.SpatialDropout2D`, with the same arguments; it draws as `Dropout`.

    Args:
        rate: float, share of the channels to drop.
        data_format, seed, name, dtype: as in Keras.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.SpatialDropout2D(0.5, seed=1, dtype="mixed_float16")
        >>> layer(tf.ones((1, 4, 4, 3)), training=True).shape
        TensorShape([1, 4, 4, 3])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class SpatialDropout3D(_Spatial, keras.layers.SpatialDropout3D):
    """Drops whole channels of volumes at the rate that was asked for, in 16 bits too.

    A drop-in for `keras.layers.SpatialDropout3D`, with the same arguments; it draws as `Dropout`.

    Args:
        rate: float, share of the channels to drop.
        data_format, seed, name, dtype: as in Keras.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.SpatialDropout3D(0.5, seed=1, dtype="mixed_float16")
        >>> layer(tf.ones((1, 2, 4, 4, 3)), training=True).shape
        TensorShape([1, 2, 4, 4, 3])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class AlphaDropout(_Random, keras.layers.AlphaDropout):
    """Sets inputs to the value at which selu saturates and keeps mean and deviation, computed in float32.

    A drop-in for `keras.layers.AlphaDropout`, with the same arguments. Keras's rounds to 16 bits four times on the way.
    One byte an element is kept for the backward pass.

    Args:
        rate: float, share of the inputs to set.
        noise_shape, seed: as in Keras.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.AlphaDropout(0.5, seed=1, dtype="mixed_bfloat16")
        >>> layer(tf.zeros((2, 3)), training=True).dtype
        tf.bfloat16

    Klambauer et al., "Self-Normalizing Neural Networks", 2017, https://arxiv.org/abs/1706.02515.
    """

    def drawn(self: Any, x: tf.Tensor) -> tf.Tensor:
        """`x`, with some of it at saturation."""
        saturated = -1.6732632423543772848170429916717 * 1.0507009873554804934193349852946
        scale = ((1 - self.rate) * (1 + self.rate * saturated**2)) ** -0.5
        shift = -scale * saturated * self.rate
        there = kept(x, self.rate, self.seed_generator, self.noise_shape, "float32")
        fused = fusion.pays(x)

        @fusion.custom_gradient
        def run(x: tf.Tensor, there: tf.Tensor) -> Any:
            y = _saturated_of(fused)(x, there, saturated=saturated, scale=scale, shift=shift)
            return y, lambda upstream: (_scaled_of(fused)(upstream, there, scale=scale), None)

        return run(x, there)


@keras.saving.register_keras_serializable(package="keras_mp")
class GaussianDropout(_Random, keras.layers.GaussianDropout):
    """Multiplies by normally distributed numbers of mean 1, drawn in float32.

    A drop-in for `keras.layers.GaussianDropout`, with the same arguments. Keras's draws in the compute dtype, other
    numbers for the same seed. The backward pass keeps them in the compute dtype.

    Args:
        rate: float; the numbers have a deviation of sqrt(rate / (1 - rate)).
        seed: int, or None.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.GaussianDropout(0.2, seed=1, dtype="mixed_bfloat16")
        >>> y = tf.cast(layer(tf.ones((1000, 1000)), training=True), "float32")
        >>> round(float(tf.reduce_mean(y)), 2), round(float(tf.math.reduce_std(y)), 2)
        (1.0, 0.5)

    Srivastava et al., 2014, as for `Dropout`, section 10.
    """

    def drawn(self: Any, x: tf.Tensor) -> tf.Tensor:
        """`x` times noise."""
        deviation = math.sqrt(self.rate / (1.0 - self.rate))
        noise = _normal(x, 1.0, deviation, self.seed_generator)

        @fusion.custom_gradient
        def run(x: tf.Tensor, noise: tf.Tensor) -> Any:
            rounded = tf.cast(noise, x.dtype)
            y = tf.cast(tf.cast(x, noise.dtype) * noise, x.dtype)
            return y, lambda upstream: (upstream * fusion.not_before(upstream, rounded), None)

        return run(x, noise)


@keras.saving.register_keras_serializable(package="keras_mp")
class GaussianNoise(_Random, keras.layers.GaussianNoise):
    """Adds normally distributed numbers of mean 0, drawn and added in float32.

    A drop-in for `keras.layers.GaussianNoise`, with the same arguments. Keras's draws in the compute dtype, other
    numbers for the same seed.

    Args:
        stddev: float, the deviation.
        seed: int, or None.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.GaussianNoise(0.1, seed=1, dtype="mixed_bfloat16")
        >>> y = tf.cast(layer(tf.zeros((1000, 1000)), training=True), "float32")
        >>> round(float(tf.math.reduce_std(y)), 3)
        0.1
    """

    def drawn(self: Any, x: tf.Tensor) -> tf.Tensor:
        """`x` and noise."""
        noise = _normal(x, 0.0, self.stddev, self.seed_generator)
        return tf.cast(tf.cast(x, noise.dtype) + noise, x.dtype)


def dropped(x: tf.Tensor, rate: float, seed: Any, noise_shape: Sequence[Any] | None = None) -> tf.Tensor:
    """`keras.random.dropout` with numbers drawn in float32, and one multiplication and rounding.

    Args:
        x: of floats, of any shape.
        rate: share that drops out.
        seed: a `keras.random.SeedGenerator`, or an int.
        noise_shape: as in Keras.
    """
    if rate >= 1:
        return tf.zeros_like(x)
    there, fused = kept(x, rate, seed, noise_shape), fusion.pays(x)

    # The gradient is the same function, and needs nothing of `x`.
    @fusion.custom_gradient
    def run(x: tf.Tensor, there: tf.Tensor) -> Any:
        scaled = _scaled_of(fused)
        return scaled(x, there, scale=1 / (1 - rate)), lambda upstream: (
            scaled(upstream, there, scale=1 / (1 - rate)),
            None,
        )

    return run(x, there)


def kept(x: tf.Tensor, rate: float, seed: Any, noise_shape: Sequence[Any] | None, dtype: Any = None) -> tf.Tensor:
    """Which elements stay: bools of the shape of `x`, or of one that broadcasts to it.

    Args:
        x: what they are elements of.
        rate: share that drops out.
        seed: a `keras.random.SeedGenerator`, or an int.
        noise_shape: as in Keras.
        dtype: to draw in; by default float32, and float64 for such `x`.
    """
    sizes = keras.ops.shape(x)
    if noise_shape is not None:
        sizes = [size if given is None else given for size, given in zip(sizes, noise_shape, strict=True)]
    return keras.random.uniform(sizes, dtype=dtype or _wide(x), seed=seed) >= rate


def _wide(x: tf.Tensor) -> str:
    return str(keras.backend.result_type(x.dtype, "float32"))


def _normal(x: tf.Tensor, mean: float, deviation: float, seed: Any) -> tf.Tensor:
    return keras.random.normal(keras.ops.shape(x), mean, deviation, dtype=_wide(x), seed=seed)


def _scaled(x: tf.Tensor, there: tf.Tensor, *, scale: float) -> tf.Tensor:
    return tf.where(there, tf.cast(tf.cast(x, _wide(x)) * scale, x.dtype), tf.zeros([], x.dtype))


def _saturated(x: tf.Tensor, there: tf.Tensor, *, saturated: float, scale: float, shift: float) -> tf.Tensor:
    wide = tf.cast(x, _wide(x))
    return tf.cast(scale * tf.where(there, wide, tf.constant(saturated, wide.dtype)) + shift, x.dtype)


_scaled_of, _saturated_of = fusion.fusible(_scaled), fusion.fusible(_saturated)
