"""Layers that are made again from their configuration, with functions that have no name."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from tests.helpers.conversions import TOLERANCE, normal

layers = keras.layers


@keras.saving.register_keras_serializable(package="tests")
class Doubling(keras.layers.Layer):
    """Of which Keras makes the configuration, from the arguments."""

    def call(self, inputs):
        return 2 * inputs


@pytest.mark.parametrize("arguments", [{}, {"dtype": "float32", "activity_regularizer": None}])
def test_a_layer_without_a_configuration_of_its_own_is_saved_after_it_was_converted(tmp_path, arguments):
    made = [keras.layers.Dense(4), Doubling(**arguments), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *made])
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    mixed.save(tmp_path / "mixed.keras")
    loaded = keras_mp.load_model(tmp_path / "mixed.keras")
    assert loaded.layers[1].compute_dtype == "bfloat16"
    x = normal(3, 4)
    np.testing.assert_array_equal(loaded(x), mixed(x))


def add(x, k=1):
    return x + k


def test_lambda_layers_need_no_trust_in_memory():
    lambdas = [keras.layers.Lambda(lambda x: x * 2), keras.layers.Lambda(add, arguments={"k": 3}, output_shape=(4,))]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), *lambdas, keras.layers.Dense(2)])
    x = normal(3, 4)
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert [layer.compute_dtype for layer in mixed.layers] == ["bfloat16"] * 4
    np.testing.assert_allclose(mixed(x), model(x), atol=2e-2 * np.abs(model(x)).max())  # bfloat16's roundings
    np.testing.assert_array_equal(keras_mp.convert(mixed, "float32")(x), model(x))


def gelu(x):
    """Of the name of one of Keras's."""
    return 100 * x * keras.ops.sigmoid(1.702 * x)


class Halving(keras.Regularizer):
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, x):
        return self.rate * keras.ops.sum(x**2)

    def get_config(self):
        return {"rate": self.rate}


FUNCTIONS = {
    "of a name that is Keras's": gelu,
    "of the user's": lambda x: 3 * x,
    "of TensorFlow": tf.nn.silu,
    "partial": functools.partial(keras.activations.relu, negative_slope=0.25),
    "of Keras, by another way": keras.ops.gelu,
}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_stay_the_ones_they_are(name, policy):
    """Keras writes a function down by its name, and of those of users it knows none."""
    function = FUNCTIONS[name]
    inputs = keras.Input((4,))
    x = layers.Dense(5, activation=function, kernel_regularizer=Halving(0.5))(inputs)
    x = layers.Activation(function)(layers.EinsumDense("ab,bc->ac", (5,), bias_axes="c", activation=function)(x))
    model = keras.Model(inputs, layers.Dense(2, kernel_initializer=lambda shape, dtype=None: tf.ones(shape, dtype))(x))
    converted = keras_mp.convert(model, policy)
    given = normal(8, 4)
    tolerance = {"float32": 0, "mixed_bfloat16": TOLERANCE["mixed_bfloat16"]}[policy]
    expected = model(given).numpy()
    np.testing.assert_allclose(converted(given), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(sum(converted.losses), sum(model.losses), rtol=1e-6)
    again = keras_mp.convert(converted, "float32")
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in model.layers]
    np.testing.assert_array_equal(again(given), expected)
