"""The outputs of a model: the layers that make them, and their casts to float32."""

from typing import Any

import keras

from keras_mp._compat import keras_models
from keras_mp.conversion.casts import OutputCast
from keras_mp.training.penalties import is_narrow

__all__ = ["in_float32", "output_layers", "symbolic_outputs"]


def in_float32(outputs: Any) -> Any:
    """Returns the symbolic outputs of a Functional model, all cast to float32 if any is a 16-bit float."""
    if not any(map(is_narrow, keras.tree.flatten(outputs))):
        return outputs
    # All are cast. Otherwise some layers would lie deeper than others, and Keras lists weights by depth.
    casts: dict[int, OutputCast] = {}
    for output in keras.tree.flatten(outputs):
        maker = keras_models.origin(output)
        casts.setdefault(id(maker), OutputCast(name=f"{maker.name}_float32"))
    return keras.tree.map_structure(lambda output: casts[id(keras_models.origin(output))](output), outputs)


def output_layers(model: keras.Layer) -> set[int]:
    """Returns the `id`s of the layers that make the outputs of a model, as far as its graph tells."""
    return {id(layer) for layer in _last_layers(model) if layer is not model}


def _last_layers(layer: keras.Layer) -> list[keras.Layer]:
    if isinstance(layer, keras.Sequential):
        return _last_layers(layer.layers[-1]) if layer.layers else []
    if isinstance(layer, keras_models.Functional):
        made = [keras_models.origin(output) for output in layer.outputs]
        made = [each for each in made if isinstance(each, keras.Layer)]
        # A layer that only casts an output stands for the layer that makes it.
        return [last for each in made for last in _last_layers(each)]
    return [layer]


def symbolic_outputs(model: keras.Model) -> list[keras.KerasTensor]:
    """Returns the symbolic outputs of a model, or an empty list where it has none."""
    try:
        return list(model.outputs)
    except AttributeError:  # a subclassed model, or one that is not built
        return []
