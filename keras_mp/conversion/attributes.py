"""The attributes of layers, as a copy of a layer has to see them."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_attributes, keras_layers
from keras_mp.conversion.casts import inserted_attributes
from keras_mp.conversion.copying import items

__all__ = ["equal", "fits", "is_for_libraries", "is_hidden", "set_setting", "tracks"]


def is_for_libraries(layer: keras.Layer, name: str) -> bool:
    """Whether a copy must leave out an attribute, because Keras, TensorFlow or `convert` sets it again.

    Args:
        layer: the layer.
        name: the name of the attribute.
    """
    return (
        keras_attributes.is_kept_by_libraries(layer, name)
        or name in inserted_attributes(layer)
        or (isinstance(layer, keras.Model) and name == "_forward_backward")  # of our `Model`
    )


def is_hidden(layer: keras.Layer, name: str, value: Any) -> bool:
    """Whether Keras did not see how an attribute was set, so that its content is not tracked."""
    if type(value) in (list, dict, set):
        return True  # Keras would have wrapped it
    kinds = (keras.Layer, keras.Variable, keras.Metric, keras.random.SeedGenerator)
    found = [each for each in items(value) if isinstance(each, kinds)]
    if found:
        return not any(tracks(layer, each) for each in found)
    return keras_layers.is_trackable(value) and not keras_layers.checkpointed(layer, name)


def tracks(layer: keras.Layer, value: Any) -> bool:
    """Whether a layer tracks one of the objects in a value."""
    known = {id(each) for store in keras_layers.tracked(layer).values() for each in store}
    return any(id(each) in known for each in items(value))


def set_setting(copy: keras.Layer, name: str, value: Any) -> None:
    """Sets an attribute to a setting. A set or dict is copied."""
    vars(copy)[name] = set(value) if isinstance(value, set) else dict(value) if isinstance(value, dict) else value


def fits(variable: keras.Variable, other: keras.Variable) -> bool:
    """Whether a variable can take the value of another: same shape, and same dtype or both floats."""
    floats = [keras.backend.is_float_dtype(each.dtype) for each in (variable, other)]
    return tuple(variable.shape) == tuple(other.shape) and (all(floats) or variable.dtype == other.dtype)


def equal(value: Any, other: Any) -> bool:
    """Whether two attributes without state are the same."""
    if value is other:
        return True
    if isinstance(value, (np.ndarray, tf.Tensor)) or isinstance(other, (np.ndarray, tf.Tensor)):
        same_kind = type(value) is type(other) and value.dtype == other.dtype and value.shape == other.shape
        return same_kind and bool(np.all(np.asarray(value) == np.asarray(other)))
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return type(value) is type(other) and value == other
    if isinstance(value, (list, tuple, set, dict)):
        try:
            return type(value) is type(other) and bool(value == other)
        except (ValueError, TypeError):  # of arrays
            return False
    return isinstance(value, keras.DTypePolicy)  # each has its own
