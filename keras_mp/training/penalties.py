"""Penalties of 16-bit outputs, computed in float32."""

from collections.abc import Iterable
from typing import Any

import keras

__all__ = ["Float32Regularizer", "is_narrow", "widen_penalties"]

NARROW = ("float16", "bfloat16")


def is_narrow(tensor: Any) -> bool:
    """Whether something is a tensor of 16-bit floats."""
    return hasattr(tensor, "dtype") and keras.backend.standardize_dtype(tensor.dtype) in NARROW


@keras.saving.register_keras_serializable(package="keras_mp")
class Float32Regularizer(keras.regularizers.Regularizer):
    """Computes another regularizer's penalty in float32, for 16-bit outputs, whose penalty Keras cannot add to a loss.

    `convert` puts it around the `activity_regularizer` of a layer, and so does `keras_mp.Model`.

    Args:
        regularizer: a Keras regularizer, or the name of one.

    Example:

    >>> import keras_mp
    >>> float(Float32Regularizer("l2")(tf.fill((300, 300), tf.constant(10, "float16"))))
    90000.0
    """

    def __init__(self, regularizer: Any) -> None:
        self.regularizer = keras.regularizers.get(regularizer)

    def __call__(self, x: Any) -> Any:
        """The penalty, float32."""
        return self.regularizer(keras.ops.cast(x, "float32"))

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal regularizer."""
        return {"regularizer": keras.regularizers.serialize(self.regularizer)}


def widen_penalties(layers: Iterable[keras.Layer]) -> None:
    """Has the layers that compute in 16 bits compute the penalties of their outputs in float32.

    Args:
        layers: any layers. Those without an `activity_regularizer` stay as they are.
    """
    for layer in layers:
        penalty = layer.activity_regularizer
        if penalty is not None and layer.compute_dtype in NARROW and not isinstance(penalty, Float32Regularizer):
            layer.activity_regularizer = Float32Regularizer(penalty)
