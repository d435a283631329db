"""Masking that compares what it is given, not what is left of it in 16 bits."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layers

__all__ = ["Masking"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Masking(keras.layers.Masking):
    """Masks the steps of which all features are one value, compared in the dtype in which they come.

    A drop-in for `keras.layers.Masking`, with the same argument. Keras's rounds the input to 16 bits first, where 0.1
    is no longer the float 0.1, and numbers near the value become equal to it.

    Args:
        mask_value: float. Defaults to 0.0.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, steps, features).

    Returns:
        Tensor of that shape in the compute dtype, zero in masked steps, with a mask of shape (batch, steps) attached.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.Masking(0.1, dtype="mixed_bfloat16")
        >>> x = tf.constant([[[0.1], [0.1001], [0.5]]])
        >>> layer.compute_mask(x).numpy().tolist(), layer(x).dtype
        ([[False, True, True]], tf.bfloat16)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # the value is compared with what comes

    def call(self, inputs: Any) -> Any:
        """Sets masked steps to zero; see the class."""
        there = self.compute_mask(inputs)
        outputs = tf.where(there[..., None], inputs, tf.zeros([], inputs.dtype))
        return keras_layers.with_mask(tf.cast(outputs, self._output_dtype(inputs)), there)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Which steps are there."""
        del mask
        value = keras.ops.cast(self.mask_value, inputs.dtype)  # Keras would compare 16 bits with the float32 value
        return keras.ops.any(keras.ops.not_equal(inputs, value), axis=-1)

    def compute_output_spec(self, inputs: Any) -> Any:
        """The output as a symbolic tensor."""
        return keras.KerasTensor(inputs.shape, dtype=self._output_dtype(inputs))

    def _output_dtype(self, inputs: Any) -> str:
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return str(self.compute_dtype) if keras.backend.is_float_dtype(dtype) else dtype
