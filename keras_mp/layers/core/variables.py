"""Variables as inputs: each layer here reads their values, with gradients, as Keras's layers do."""

import functools
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_variables

__all__ = ["taking_variables"]

_VARIABLES = (tf.Variable, keras.Variable, tf.distribute.DistributedValues)


def taking_variables(cls: type) -> None:
    """Makes calls of a layer, and of its subclasses, read variables among their arguments first.

    Keras passes a TensorFlow variable on. But `x -= 1` fails for a variable, and a tape takes its value for another
    tensor. A Keras variable names its dtype by a string.

    Args:
        cls: class of a layer.
    """
    call = cls.__call__

    @functools.wraps(call)
    def read_and_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(each, _VARIABLES) for each in keras.tree.flatten((args, kwargs))):
            args, kwargs = keras.tree.map_structure(_read, (args, kwargs))
        return call(self, *args, **kwargs)

    cls.__call__ = read_and_call  # type: ignore[method-assign]


def _read(value: Any) -> Any:
    if isinstance(value, keras.Variable):
        return keras_variables.uncast(value)
    return tf.convert_to_tensor(value) if isinstance(value, _VARIABLES) else value
