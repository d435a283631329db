"""What a model is made of that is to become a `keras_mp.Model`."""

from typing import Any

import keras

from keras_mp._compat import keras_models
from keras_mp.errors import ArgumentError

__all__ = ["inputs_and_outputs"]


def inputs_and_outputs(model: keras.Model) -> tuple[Any, Any]:
    """The inputs and outputs of a functional or built sequential model; an error for others."""
    if not isinstance(model, keras.Model):
        raise ArgumentError(f"from_model() takes a Keras model. Received: {model!r} (of type {type(model).__name__})")
    if isinstance(model, keras.Sequential):
        if not model.built:
            raise ArgumentError(
                f"from_model(): {model.name!r} is a Sequential that does not know its input yet. Begin it with "
                "keras.Input(shape), or call model.build(input_shape) first."
            )
        return model.inputs[0], model.outputs[0]
    if not isinstance(model, keras_models.Functional):
        raise ArgumentError(
            f"from_model(): {model.name!r} ({type(model).__name__}) is a subclassed model, of which Keras knows no "
            f"inputs and outputs. Make it `class {type(model).__name__}(keras_mp.Model)` instead."
        )
    return model.input, model.output
