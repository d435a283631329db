"""Conversions in tests: their tolerances, a block of layers, and comparisons of a copy with its model."""

import warnings

import keras
import numpy as np

import keras_mp

layers = keras.layers
MIXED = ("mixed_bfloat16", "mixed_float16")
# Of the largest output: some roundings to the dtype, one after the other.
TOLERANCE = {"mixed_bfloat16": 4e-2, "mixed_float16": 5e-3}


def normal(*shape):
    return np.random.normal(size=shape).astype("float32")


class Block(layers.Layer):
    """Holds layers, one of them in a function."""

    def __init__(self, units):
        super().__init__()
        self.norm = layers.LayerNormalization()
        self.dense = layers.Dense(units, "gelu")
        self.inner = lambda x: self.dense(x)

    def call(self, x):
        return x + self.inner(self.norm(x))


def converted(model, policy):
    """Returns the copy and the warnings about it, those about the hardware aside."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        copy = keras_mp.convert(model, policy)
    said = [str(warning.message) for warning in caught if "gains nothing" not in str(warning.message)]
    return copy, " ".join(said)


def same_function(model, x, policy, tolerance=0.03):
    """Checks a conversion: no warning, the same function up to roundings, and back to the last bit."""
    copy, said = converted(model, policy)
    assert said == ""
    right = np.asarray(model(x))
    np.testing.assert_allclose(copy(x), right, atol=tolerance * np.abs(right).max())
    np.testing.assert_array_equal(keras_mp.convert(copy, "float32")(x), right)
    return copy
