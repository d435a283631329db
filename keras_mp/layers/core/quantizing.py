"""Quantization of drop-in layers. Keras quantizes its own classes only."""

from typing import Any

import keras

__all__ = ["Quantizing"]


class Quantizing(keras.layers.Layer):
    """A drop-in layer that `quantize` treats as the Keras layer it is derived from.

    It refuses a user's class derived from the drop-in, as Keras refuses one derived from its own layer.
    """

    def quantize(self, mode: str | None = None, type_check: bool = True, **kwargs: Any) -> None:
        """Quantizes the weights, as in Keras.

        Args:
            mode: "int8", "int4", "float8" or another mode of Keras.
            type_check: whether to refuse a layer of a derived class.
            **kwargs: `config`, as in Keras.
        """
        derived = not type(self).__module__.startswith("keras_mp.")
        super().quantize(mode, type_check=type_check and derived, **kwargs)
