"""The attributes that Keras sets on layers and models for itself. A copy of a model must not take all of them over."""

import functools

import keras

from keras_mp._compat.keras_layers import names_of_tensorflow

__all__ = ["is_kept_by_libraries", "names_of_any_class", "names_of_layers", "names_set_by_compile"]

# Keras has no public list of the attributes of a trainer. A model that is not compiled has these as well.
_OF_TRAINERS = ("_compile_loss", "_compile_metrics", "_loss_tracker", "compiled")
_FUNCTIONS_OF_TRAINERS = ("train_function", "test_function", "predict_function")


def names_of_any_class() -> tuple[str, ...]:
    """Returns the attributes of `keras.Layer` that a layer takes over from one of another class."""
    return ("_build_shapes_dict", "_called", "_parent_path", "_path", "_remat_mode", "_trainable", "built", "name")


def names_of_layers() -> frozenset[str]:
    """Returns the attributes that the constructor of `keras.Layer` sets."""
    return _names_of_layers()


@functools.cache
def _names_of_layers() -> frozenset[str]:
    return frozenset(vars(keras.layers.Layer(dtype="float32")))


def names_set_by_compile() -> frozenset[str]:
    """Returns the attributes that `compile` sets on a model."""
    return _names_set_by_compile()


@functools.cache
def _names_set_by_compile() -> frozenset[str]:
    # In float32 under any global policy, so that nobody is warned about this model's optimizer.
    model = keras.Sequential([keras.Input((1,), dtype="float32"), keras.layers.Dense(1, dtype="float32")])
    before = dict(vars(model))
    model.compile("sgd", "mse", metrics=["mse"], jit_compile=False)
    return frozenset(name for name, value in vars(model).items() if name not in before or before[name] is not value)


def is_kept_by_libraries(layer: keras.Layer, name: str) -> bool:
    """Whether Keras or TensorFlow keeps an attribute on a layer for itself, and will set it on a copy.

    The strategy is one of them: a copy belongs to the scope in which it is made.

    Args:
        layer: the layer.
        name: the name of the attribute.
    """
    if name in names_of_tensorflow() or name == "_distribute_strategy":
        return True
    if not isinstance(layer, keras.Model):
        return False
    return name in _FUNCTIONS_OF_TRAINERS or name in _OF_TRAINERS or (layer.compiled and name in names_set_by_compile())
