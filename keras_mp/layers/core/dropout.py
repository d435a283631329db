"""Layers that draw random numbers in training, in float32: rates, means and deviations are the ones requested."""

import math
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import noise

__all__ = [
    "AlphaDropout",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
]


class _Random(keras.layers.Layer):
    """A layer that does nothing outside training. Keras's layer comes after it among the bases."""

    def call(self, inputs: tf.Tensor, training: bool | None = False) -> tf.Tensor:
        """Draws in training; see the class."""
        if not training or not (self.stddev if isinstance(self, GaussianNoise) else self.rate):
            return inputs
        return self.drawn(tf.convert_to_tensor(inputs))

    def drawn(self, x: tf.Tensor) -> tf.Tensor:
        """Returns the output of a training step.

        Args:
            x: floating-point tensor.
        """
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="keras_mp")
class Dropout(_Random, keras.layers.Dropout):
    """Drops out at the rate requested and keeps the mean, also in half precision.

    A drop-in for `keras.layers.Dropout`, with the same arguments. Keras's layer draws in the compute dtype. bfloat16
    has 128 numbers below 1, so a rate of 0.001 drops 0.8%, and a seed drops other elements than in float32. This layer
    drops the same elements under every policy but float64's. The backward pass keeps one byte an element.

    Args:
        rate: float, share of the inputs to drop.
        noise_shape: shape of the numbers drawn, as in Keras.
        seed: int, or None.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Returns:
        Tensor of the shape of `inputs`, in the compute dtype.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.Dropout(0.001, seed=1, dtype="mixed_bfloat16")
        >>> y = layer(tf.ones((1000, 1000)), training=True)
        >>> round(float(tf.reduce_mean(tf.cast(y == 0, "float32"))), 4)
        0.001

    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014,
    https://jmlr.org/papers/v15/srivastava14a.html.
    """

    def drawn(self, x: tf.Tensor) -> tf.Tensor:
        """Returns `x` with elements dropped."""
        return noise.dropped(x, self.rate, self.seed_generator, self.noise_shape, execution.current())


class _Spatial(_Random):
    """Drops whole channels: one number for all positions between batch and channels."""

    def drawn(self, x: tf.Tensor) -> tf.Tensor:
        """Returns `x` with channels dropped."""
        channels = 1 if getattr(self, "data_format", None) == "channels_first" else len(x.shape) - 1
        shape = [None if axis in (0, channels) else 1 for axis in range(len(x.shape))]
        return noise.dropped(x, self.rate, self.seed_generator, shape, execution.current())

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments. Keras's configuration has the variable dtype in the place of the policy."""
        policy = keras.dtype_policies.serialize(self.dtype_policy)
        return {**super().get_config(), "dtype": policy}


@keras.saving.register_keras_serializable(package="keras_mp")
class SpatialDropout1D(_Spatial, keras.layers.SpatialDropout1D):
    """Drops whole channels of sequences at the rate requested, also in half precision.

    A drop-in for `keras.layers.SpatialDropout1D`, with the same arguments. It draws like `Dropout`.

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
    """Drops whole channels of images at the rate requested, also in half precision.

    A drop-in for `keras.layers.SpatialDropout2D`, with the same arguments. It draws like `Dropout`.

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
    """Drops whole channels of volumes at the rate requested, also in half precision.

    A drop-in for `keras.layers.SpatialDropout3D`, with the same arguments. It draws like `Dropout`.

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
    """Sets inputs to the value where selu saturates and keeps mean and deviation, computed in float32.

    A drop-in for `keras.layers.AlphaDropout`, with the same arguments. Keras's layer rounds to half precision four
    times on the way. The backward pass keeps one byte an element.

    Args:
        rate: float, share of the inputs to set.
        noise_shape, seed: as in Keras.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.AlphaDropout(0.5, seed=1, dtype="mixed_bfloat16")
        >>> layer(tf.zeros((2, 3)), training=True).dtype
        tf.bfloat16

    Klambauer et al., "Self-Normalizing Neural Networks", 2017, https://arxiv.org/abs/1706.02515.
    """

    def drawn(self, x: tf.Tensor) -> tf.Tensor:
        """Returns `x` with elements at saturation."""
        return noise.alpha_dropped(x, self.rate, self.seed_generator, self.noise_shape, execution.current())


@keras.saving.register_keras_serializable(package="keras_mp")
class GaussianDropout(_Random, keras.layers.GaussianDropout):
    """Multiplies by normally distributed numbers of mean 1, drawn in float32.

    A drop-in for `keras.layers.GaussianDropout`, with the same arguments. Keras's layer draws in the compute
    dtype, other numbers for the same seed. The backward pass keeps the numbers in the compute dtype.

    Args:
        rate: float; the numbers have a deviation of sqrt(rate / (1 - rate)).
        seed: int, or None.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.GaussianDropout(0.2, seed=1, dtype="mixed_bfloat16")
        >>> y = tf.cast(layer(tf.ones((1000, 1000)), training=True), "float32")
        >>> round(float(tf.reduce_mean(y)), 2), round(float(tf.math.reduce_std(y)), 2)
        (1.0, 0.5)

    Srivastava et al., 2014, as for `Dropout`, section 10.
    """

    def drawn(self, x: tf.Tensor) -> tf.Tensor:
        """Returns `x` times random numbers."""
        return noise.multiplied(x, math.sqrt(self.rate / (1.0 - self.rate)), self.seed_generator)


@keras.saving.register_keras_serializable(package="keras_mp")
class GaussianNoise(_Random, keras.layers.GaussianNoise):
    """Adds normally distributed numbers of mean 0, drawn and added in float32.

    A drop-in for `keras.layers.GaussianNoise`, with the same arguments. Keras's layer draws in the compute
    dtype, other numbers for the same seed.

    Args:
        stddev: float, the deviation.
        seed: int, or None.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.GaussianNoise(0.1, seed=1, dtype="mixed_bfloat16")
        >>> y = tf.cast(layer(tf.zeros((1000, 1000)), training=True), "float32")
        >>> round(float(tf.math.reduce_std(y)), 3)
        0.1
    """

    def drawn(self, x: tf.Tensor) -> tf.Tensor:
        """Returns `x` plus random numbers."""
        return noise.with_added(x, self.stddev, self.seed_generator)
