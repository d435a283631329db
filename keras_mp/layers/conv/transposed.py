"""Transposed convolutions, whose gradient to the bias is summed in float32."""

import functools

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.conv.convolving import Convolving
from keras_mp.ops import convolution

__all__ = ["Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"]


class _Transposed(Convolving):
    def convolve(self, inputs: tf.Tensor, where: execution.Execution) -> tf.Tensor:
        """Returns the convolution; see `Convolving`."""
        convolve = functools.partial(
            keras.ops.conv_transpose,
            strides=self.strides,
            padding=self.padding,
            output_padding=self.output_padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )
        return convolution.product(convolve, inputs, self.kernel, where=where)


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv1DTranspose(_Transposed, keras.layers.Conv1DTranspose):
    """Transposed 1D convolution whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Conv1DTranspose`, with the same arguments and weights.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 1 int.
        strides: int or tuple of 1 int. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        output_padding: int or tuple of 1 int, what is added to the output's size, or None. Defaults to None.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new steps, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Conv1DTranspose(4, 3, strides=2, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 2), "float32")).shape
        TensorShape([1, 16, 4])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv2DTranspose(_Transposed, keras.layers.Conv2DTranspose):
    """Transposed 2D convolution whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Conv2DTranspose`, with the same arguments and weights.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 2 ints.
        strides: int or tuple of 2 ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        output_padding: int or tuple of 2 ints, what is added to the output's size, or None. Defaults to None.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new height, new width, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Conv2DTranspose(4, 3, strides=2, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 8, 8, 2), "float32")).shape
        TensorShape([1, 16, 16, 4])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class Conv3DTranspose(_Transposed, keras.layers.Conv3DTranspose):
    """Transposed 3D convolution whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Conv3DTranspose`, with the same arguments and weights.

    Args:
        filters: int, number of channels of the output.
        kernel_size: int or tuple of 3 ints.
        strides: int or tuple of 3 ints. Defaults to 1.
        padding: `"valid"` or `"same"`. Defaults to `"valid"`.
        output_padding: int or tuple of 3 ints, what is added to the output's size, or None. Defaults to None.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, new depth, new height, new width, filters), in the compute dtype.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Conv3DTranspose(4, 3, strides=2, padding="same", dtype="mixed_bfloat16")
        >>> layer(np.ones((1, 4, 4, 4, 2), "float32")).shape
        TensorShape([1, 8, 8, 8, 4])
    """
