"""Comparisons of float32 with half precision: planted faults stand out, honest rounding does not."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.diagnostics.comparison import compare
from keras_mp.errors import ArgumentError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 16)).astype(np.float32)
Y = RNG.normal(size=(32, 3)).astype(np.float32)


def network(middle=(), inputs=None):
    inputs = keras.Input((16,)) if inputs is None else inputs
    x = keras.layers.Dense(64, "gelu", name="first")(inputs)
    for layer in middle:
        x = layer(x)
    x = keras.layers.Dense(64, "relu", name="after")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(x), name="net")
    model.compile("adam", "mse")
    return model


@keras.saving.register_keras_serializable(package="test_compare")
class Cumulative(keras.layers.Layer):
    """A long product, of which every factor is rounded once more."""

    def call(self, x):
        factors = tf.reshape(1 + 0.01 * x, [-1, 64, 1]) * tf.ones([1, 1, 8], x.dtype)
        total = factors[:, 0]
        for step in range(1, 64):
            total = total * factors[:, step]
        return tf.tile(total, [1, 8])


@keras.saving.register_keras_serializable(package="test_compare")
class Times(keras.layers.Layer):
    """Large numbers with small differences, subtracted from one another later."""

    def call(self, x):
        return x + 3000


HEALTHY = {
    "dense": lambda: [keras.layers.Dense(64, "gelu") for _ in range(6)],
    "normalization": lambda: [keras.layers.BatchNormalization(), keras.layers.LayerNormalization()],
    "dropout": lambda: [keras.layers.Dropout(0.3), keras.layers.GaussianNoise(0.1)],
    "convolution": lambda: [
        keras.layers.Reshape((8, 8, 1)),
        keras.layers.Conv2D(8, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
    ],
    "recurrent": lambda: [
        keras.layers.Reshape((8, 8)),
        keras.layers.LSTM(16),
    ],
}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", HEALTHY)
def test_honest_rounding_does_not_stand_out(kind, policy):
    found = compare(network(HEALTHY[kind]()), (X, Y), policy)
    assert found.first_bad is None, str(found)
    assert found.loss_in_policy == pytest.approx(found.loss, rel=0.05)
    assert {each.what for each in found.layers} == {"output", "gradient", "weight gradient"}
    assert "All" in str(found).splitlines()[0]


@pytest.mark.parametrize("layer", [Cumulative, Times])
def test_a_fault_is_named(layer):
    model = network([layer(name="bad")])
    policy = keras_mp.PolicyMap("mixed_bfloat16", {".*bad": "mixed_bfloat16"})  # convert leaves such layers alone
    found = compare(model, (X, Y), policy)
    assert found.first_bad is not None, str(found)
    assert (found.first_bad.path, found.first_bad.what) == ("net/bad", "output")
    assert json.loads(found.to_json())["first_bad"]["path"] == "net/bad"


def test_the_model_stays_as_it_was_and_a_page_has_all_tensors(tmp_path):
    model = network(HEALTHY["normalization"]())
    before = [np.array(v) for v in model.variables]
    found = compare(model, (X, Y))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)
    found.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(each.path in page for each in found.layers)
    assert max(map(len, str(found).splitlines())) <= 80


def test_two_models_of_the_same_layers():
    model = network()
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.get_layer("after").kernel.assign(other.get_layer("after").kernel * 1.1)
    other.compile("adam", "mse")
    found = compare(model, (X, Y), other)
    assert (found.first_bad.path, found.first_bad.what) == ("net/after", "output")


def test_wrong_input_is_told():
    with pytest.raises(ArgumentError, match="not compiled"):
        compare(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), (X, Y))
    with pytest.raises(keras_mp.errors.PolicyError, match="mixed_float61"):
        compare(network(), (X, Y), "mixed_float61")
