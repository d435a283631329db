"""What an activation makes of a `keras.Input`."""

from typing import Any

import keras

__all__ = ["Symbolic"]


@keras.saving.register_keras_serializable(package="keras_mp", name="_Symbolic")
class Symbolic(keras.Operation):
    """An activation as a node of a functional model.

    Args:
        function: the name of a function of `keras_mp.activations`, that answers in the shape and dtype it is given.
        settings: its arguments beside the tensor, by name.
        name: of the node.

    Example:
        >>> x = keras.Input((4,))
        >>> Symbolic("gelu", {"approximate": True})(x).shape
        (None, 4)
    """

    def __init__(self, function: str, settings: dict[str, Any], name: str | None = None) -> None:
        super().__init__(name=name)
        self.function, self.settings = function, settings

    def call(self, x: Any) -> Any:
        """Calls the activation."""
        return keras.saving.get_registered_object(f"keras_mp>{self.function}")(x, **self.settings)

    def compute_output_spec(self, x: Any) -> Any:
        """Shape and dtype are those of `x`."""
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"function": self.function, "settings": self.settings, "name": self.name}
