"""Largest values of windows, also of a replica that was given no rows and in 3D in float16."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import empty_batches

__all__ = ["MaxPooling1D", "MaxPooling2D", "MaxPooling3D"]


class _MaxPooling(keras.layers.Layer):
    def call(self, inputs: Any) -> Any:
        """Takes the largest value of each window; see the class."""
        return empty_batches.of_some(self.pool, inputs)

    def pool(self, inputs: Any) -> Any:
        """The largest values of the windows of some rows.

        Args:
            inputs: tensor of shape (batch, ..., channels), or with the channels second.
        """
        return super().call(inputs)


@keras.saving.register_keras_serializable(package="keras_mp")
class MaxPooling1D(_MaxPooling, keras.layers.MaxPooling1D):
    """Largest values of windows in 1D, also of a replica's share of a batch that has no rows.

    A drop-in for `keras.layers.MaxPooling1D`, with the same arguments and numbers. On a CPU the gradient of Keras's
    layer ends the process there.

    Args:
        pool_size: int or tuple of 1 int, steps in a window. Defaults to 2.
        strides: int or tuple of 1 int, steps from one window to the next. Defaults to None, for `pool_size`.
        padding: "valid" or "same". Defaults to "valid".
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, steps, channels), or (batch, channels, steps).

    Returns:
        Tensor in the compute dtype, whose axes between batch and channels are those of the windows.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.MaxPooling1D(2, dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 4), "float32")).shape
        TensorShape([1, 4, 4])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class MaxPooling2D(_MaxPooling, keras.layers.MaxPooling2D):
    """Largest values of windows in 2D, also of a replica's share of a batch that has no rows.

    A drop-in for `keras.layers.MaxPooling2D`, with the same arguments and numbers. On a CPU the gradient of Keras's
    layer ends the process there.

    Args:
        pool_size: int or tuple of 2 ints, pixels in a window. Defaults to 2.
        strides: int or tuple of 2 ints, pixels from one window to the next. Defaults to None, for `pool_size`.
        padding: "valid" or "same". Defaults to "valid".
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, height, width, channels), or (batch, channels, height, width).

    Returns:
        Tensor in the compute dtype, whose axes between batch and channels are those of the windows.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.MaxPooling2D(2, dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 4), "float32")).shape
        TensorShape([1, 4, 4, 4])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class MaxPooling3D(_MaxPooling, keras.layers.MaxPooling3D):
    """Largest values of windows in 3D, also of a replica's share of a batch that has no rows.

    A drop-in for `keras.layers.MaxPooling3D`, with the same arguments and numbers. On a CPU the gradient of Keras's
    layer ends the process there, and in float16 TensorFlow has none of it at all.

    Args:
        pool_size: int or tuple of 3 ints, voxels in a window. Defaults to 2.
        strides: int or tuple of 3 ints, voxels from one window to the next. Defaults to None, for `pool_size`.
        padding: "valid" or "same". Defaults to "valid".
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, depth, height, width, channels), or (batch, channels, depth, height, width).

    Returns:
        Tensor in the compute dtype, whose axes between batch and channels are those of the windows.

    Raises:
        ValueError: as Keras's layer, for arguments out of range and inputs of another rank.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.MaxPooling3D(2, dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 4, 4, 4, 2), "float32")).shape
        TensorShape([1, 2, 2, 2, 2])
    """

    def pool(self, inputs: Any) -> Any:
        """The largest values of the windows of some rows; in float32, which loses nothing, where TensorFlow has to."""
        if (
            keras.backend.standardize_dtype(inputs.dtype) != "float16"
            or not execution.on_cpu()
            or execution.in_xla_context()
        ):
            return super().pool(inputs)
        return tf.cast(super().pool(tf.cast(inputs, tf.float32)), tf.float16)
