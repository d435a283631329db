"""Planted faults, each of which `locate_nonfinite` has to name."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.diagnostics.location import locate_nonfinite
from keras_mp.errors import ArgumentError

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


class Fault(keras.layers.Layer):
    """Passes its input on, with a fault in one direction."""

    def __init__(self, fault, **kwargs):
        super().__init__(**kwargs)
        self.fault = fault

    def call(self, x):
        if self.fault == "output":
            return tf.where(tf.range(tf.shape(x)[-1]) == 1, tf.cast(np.inf, x.dtype), x)
        if self.fault == "large":
            return x * 60000 * 60000

        @tf.custom_gradient
        def run(x):
            return tf.identity(x), lambda upstream: upstream * (np.nan if self.fault == "gradient" else 1)

        return run(x)


class Block(keras.layers.Layer):
    def __init__(self, fault, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(4, name="first")
        self.inner = Fault(fault, name="inner")

    def call(self, x):
        return self.inner(self.first(x))


class Subclassed(keras.Model):
    def __init__(self, layers):
        super().__init__(name="net")
        self.parts = layers

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def functional(layers):
    inputs = keras.Input((4,))
    x = inputs
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x, name="net")


KINDS = {
    "functional": functional,
    "subclassed": Subclassed,
    "sequential": lambda layers: keras.Sequential([keras.Input((4,)), *layers], name="net"),
}


def model_of(fault, kind="functional", policy="float32", optimizer=None):
    keras.config.set_dtype_policy(policy)
    layers = [keras.layers.Dense(4, name="a"), Block(fault, name="block"), keras.layers.Dense(2, name="last")]
    model = KINDS[kind](layers)
    model.compile(optimizer or keras_mp.LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    return model


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_the_layer_is_named(fault, kind, policy):
    model = model_of(fault, kind, policy)
    location = locate_nonfinite(model, (X, Y))
    assert (location.layer, location.what) == ("net/block/inner", fault)
    assert location.count == (8 if fault == "output" else 32)
    assert "net/block/inner" in str(location)
    assert json.loads(location.to_json())["layer"] == "net/block/inner"


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_nothing_is_found_where_all_is_finite_and_nothing_changes(policy):
    keras.config.set_dtype_policy(policy)
    layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = functional([*layers, keras.layers.Dense(2)])
    model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.SGD(), 1024.0), "mse", metrics=["mae"])
    before = [np.array(v) for v in model.variables]
    assert locate_nonfinite(model, (X, Y)) is None
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_an_input_a_weight_and_a_loss_are_named():
    model = model_of("none")
    x = X.copy()
    x[2, 1] = np.nan
    location = locate_nonfinite(model, (x, Y))
    assert (location.layer, location.what, location.count) == ("net", "input", 1)
    model.compile("sgd", lambda y, p: tf.reduce_mean(p - y) / 0.0)
    assert locate_nonfinite(model, (X, Y)).what == "loss"
    model.get_layer("last").bias.assign([np.inf, 0])
    location = locate_nonfinite(model, (X, Y))
    assert (location.layer, location.what, location.count) == ("net/last", "weight", 1)


def test_float16_that_overflows_says_what_to_do():
    location = locate_nonfinite(model_of("large", policy="mixed_float16"), (X, Y))
    assert (location.layer, location.what) == ("net/block/inner", "output")
    assert "65504" in location.reason
    assert location.before[-2].path == "net/block/first"


def test_a_loss_scale_that_is_too_large_is_to_blame():
    optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=2.0**40, max_scale=2.0**60)
    model = model_of("none", policy="mixed_float16", optimizer=optimizer)
    location = locate_nonfinite(model, (X, Y * 100))
    assert location.what == "gradient"
    assert location.because_of_loss_scale
    assert location.loss_scale == 2.0**40


def test_a_weight_gradient_that_is_not_finite_names_the_layer():
    class Root(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), initializer="zeros", name="scale")

        def call(self, x):
            return x + tf.sqrt(tf.convert_to_tensor(self.scale))

    model = functional([keras.layers.Dense(4, name="a"), Root(name="root"), keras.layers.Dense(2, name="last")])
    model.compile("sgd", "mse")
    location = locate_nonfinite(model, (X, Y))
    assert (location.layer, location.what, location.count) == ("net/root", "gradient", 1)


@pytest.mark.parametrize(
    ("make", "batch", "message"),
    [
        (lambda: functional([keras.layers.Dense(2)]), (X, Y), "not compiled"),
        (lambda: model_of("none"), X, r"Expected a batch `\(x, y\)`"),
        (lambda: model_of("none"), (X, Y[:3]), "as many rows"),
        (lambda: model_of("none"), (X[:, :3], Y), "does not take this batch"),
        (lambda: "model", (X, Y), "Expected a Keras model"),
    ],
)
def test_what_is_wrong_is_said(make, batch, message):
    with pytest.raises(ArgumentError, match=message):
        locate_nonfinite(make(), batch)
