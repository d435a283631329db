"""Quantization of layers that stand in for Keras's, which Keras quantizes in its own classes only."""

from typing import Any

import keras

__all__ = ["Quantizing"]


class Quantizing(keras.layers.Layer):
    """Has `quantize` do with a layer of ours what it does with the one of Keras that it is derived from.

    A class of a user's that is derived from it is refused, as Keras refuses one derived from its own.
    """

    def quantize(self, mode: Any = None, type_check: bool = True, **kwargs: Any) -> None:
        """Quantizes the weights, as in Keras.

        Args:
            mode: "int8", "int4", "float8" or another of Keras's.
            type_check: whether to refuse a layer of a derived class.
            **kwargs: `config`, as in Keras.
        """
        derived = not type(self).__module__.startswith("keras_mp.")
        super().quantize(mode, type_check=type_check and derived, **kwargs)
