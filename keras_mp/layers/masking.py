"""Masking that compares what it is given, not what is left of it in 16 bits."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp import backend

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
        outputs = super().call(inputs)
        if keras.backend.standardize_dtype(outputs.dtype) == self.compute_dtype or not outputs.dtype.is_floating:
            return outputs
        return backend.with_mask(tf.cast(outputs, self.compute_dtype), backend.mask_of(outputs))

    def compute_output_spec(self, inputs: Any) -> Any:
        """The output as a symbolic tensor."""
        dtype = self.compute_dtype if keras.backend.is_float_dtype(inputs.dtype) else inputs.dtype
        return keras.KerasTensor(inputs.shape, dtype=dtype)
