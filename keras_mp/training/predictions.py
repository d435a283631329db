"""Predictions as metrics take them."""

from typing import Any

import tensorflow as tf

from keras_mp._compat import keras_layers

__all__ = ["in_float32"]


def in_float32(prediction: Any) -> Any:
    """A prediction of 16 bits in float32, with its mask."""
    if not isinstance(prediction, tf.Tensor) or prediction.dtype not in (tf.float16, tf.bfloat16):
        return prediction
    wide, mask = tf.cast(prediction, tf.float32), keras_layers.mask_of(prediction)
    return wide if mask is None else keras_layers.with_mask(wide, mask)
