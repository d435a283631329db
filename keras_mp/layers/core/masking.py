"""Masks of timesteps, compared before anything is rounded to half precision."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layers

__all__ = ["Masking"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Masking(keras.layers.Masking):
    """Masks timesteps whose features all equal one value, compared in the dtype of the input.

    A drop-in for `keras.layers.Masking`, with the same argument. Keras's layer rounds the input to half precision
    first. There 0.1 is no longer the float 0.1, and numbers near the value become equal to it.

    Args:
        mask_value: float. Defaults to 0.0.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Returns:
        Tensor of shape (batch, steps, features) in the compute dtype, zero in masked timesteps. A mask of shape
        (batch, steps) is attached.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.Masking(0.1, dtype="mixed_bfloat16")
        >>> x = tf.constant([[[0.1], [0.1001], [0.5]]])
        >>> layer.compute_mask(x).numpy().tolist(), layer(x).dtype
        ([[False, True, True]], tf.bfloat16)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # the comparison needs the input as it is

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Sets masked timesteps to zero; see the class."""
        there = self.compute_mask(inputs)
        outputs = tf.where(there[..., None], inputs, tf.zeros([], inputs.dtype))
        return keras_layers.with_mask(tf.cast(outputs, self._output_dtype(inputs)), there)

    def compute_mask(self, inputs: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
        """Returns bools of shape (batch, steps): which timesteps are not masked."""
        del mask
        # Keras would compare 16-bit numbers with the float32 value.
        value = keras.ops.cast(self.mask_value, inputs.dtype)
        return keras.ops.any(keras.ops.not_equal(inputs, value), axis=-1)

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Returns the symbolic output."""
        return keras.KerasTensor(inputs.shape, dtype=self._output_dtype(inputs))

    def _output_dtype(self, inputs: "tf.Tensor | keras.KerasTensor") -> str:
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return str(self.compute_dtype) if keras.backend.is_float_dtype(dtype) else dtype
