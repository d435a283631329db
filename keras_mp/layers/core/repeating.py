"""Layers that repeat their input, with gradients summed in float32."""

import keras
import tensorflow as tf

from keras_mp.layers.resizing import repeat

__all__ = ["RepeatVector", "UpSampling1D", "UpSampling3D"]


@keras.saving.register_keras_serializable(package="keras_mp")
class RepeatVector(keras.layers.RepeatVector):
    """Repeats a vector `n` times, with a gradient summed in float32.

    A drop-in for `keras.layers.RepeatVector`, with the same arguments. In float16 TensorFlow's sum of the copies'
    gradients stops growing at 2048 of them.

    Args:
        n: int, number of copies.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Returns:
        Tensor of shape (batch, n, features), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> keras_mp.layers.RepeatVector(2, dtype="mixed_float16")(tf.constant([[1.0, 2.0]])).numpy().tolist()
        [[[1.0, 2.0], [1.0, 2.0]]]
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Repeats; see the class."""
        return repeat(inputs[:, None], (1, self.n, 1))


@keras.saving.register_keras_serializable(package="keras_mp")
class UpSampling1D(keras.layers.UpSampling1D):
    """Repeats each timestep of a sequence, with a gradient summed in float32.

    A drop-in for `keras.layers.UpSampling1D`, with the same arguments; see `RepeatVector`.

    Args:
        size: int, copies of each timestep. Defaults to 2.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.UpSampling1D(2, dtype="mixed_float16")
        >>> layer(tf.constant([[[1.0], [2.0]]])).numpy().ravel().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Repeats; see the class."""
        return repeat(inputs, (1, self.size, 1))


@keras.saving.register_keras_serializable(package="keras_mp")
class UpSampling3D(keras.layers.UpSampling3D):
    """Repeats the voxels of a volume along three axes, with a gradient summed in float32.

    A drop-in for `keras.layers.UpSampling3D`, with the same arguments; see `RepeatVector`.

    Args:
        size: int, or a tuple of three. Defaults to (2, 2, 2).
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Example:
        >>> import keras_mp
        >>> keras_mp.layers.UpSampling3D(2, dtype="mixed_float16")(tf.ones((1, 2, 2, 2, 1))).shape
        TensorShape([1, 4, 4, 4, 1])
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Repeats; see the class."""
        return repeat(inputs, (1, 1, *self.size) if self.data_format == "channels_first" else (1, *self.size, 1))
