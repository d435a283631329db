"""Activations as operations of a functional model."""

from typing import Any

import keras
import tensorflow as tf

__all__ = ["Symbolic"]


@keras.saving.register_keras_serializable(package="keras_mp", name="_Symbolic")
class Symbolic(keras.Operation):
    """An activation as a node of a functional model.

    Args:
        function: name of a function of `keras_mp.activations` that keeps shape and dtype.
        settings: its other arguments, by name.
        name: name of the node.

    Example:
        >>> x = keras.Input((4,))
        >>> Symbolic("gelu", {"approximate": True})(x).shape
        (None, 4)
    """

    def __init__(self, function: str, settings: dict[str, Any], name: str | None = None) -> None:
        super().__init__(name=name)
        self.function, self.settings = function, settings

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Calls the activation."""
        return keras.saving.get_registered_object(f"keras_mp>{self.function}")(x, **self.settings)

    def compute_output_spec(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Returns a symbolic tensor of the shape and dtype of `x`."""
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments."""
        return {"function": self.function, "settings": self.settings, "name": self.name}
