"""Diagnoses of models whose faults are known."""

import json

import keras
import numpy as np
import pytest

from keras_mp.diagnostics.comparison import compare
from keras_mp.diagnostics.diagnosis import diagnose
from keras_mp.errors import ArgumentError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 64, 8)).astype(np.float32)
Y = RNG.normal(size=(16, 1)).astype(np.float32)


@keras.saving.register_keras_serializable(package="test_diagnose")
class StateSpace(keras.layers.Layer):
    """A selective scan by cumulative products, as papers write it."""

    def build(self, shape):
        self.decay = self.add_weight(shape=(shape[-1],), initializer="ones", name="decay")

    def call(self, x):
        decay = keras.ops.exp(-keras.ops.softplus(x) * 0.1 * keras.ops.cast(self.decay, x.dtype))
        total = keras.ops.cumprod(decay, axis=1)
        return keras.ops.cumsum(x / total, axis=1) * total


@keras.saving.register_keras_serializable(package="test_diagnose")
class Large(keras.layers.Layer):
    def call(self, x):
        return keras.ops.sqrt(keras.ops.square(x * 3000) + 1) / 3000


def model_of(*layers, loss="mse"):
    inputs = keras.Input((64, 8))
    x = keras.layers.Dense(8, name="first")(inputs)
    for layer in layers:
        x = layer(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="last")(x), name="net")
    model.compile("adam", loss)
    return model


def test_a_healthy_model_needs_no_map():
    found = diagnose(model_of(keras.layers.Dense(8, "gelu", name="second")), (X, Y))
    assert (found.policy.default_policy.name, found.pinned, found.initial_scale) == ("mixed_bfloat16", {}, 1.0)
    assert found.tried.first_bad is None
    assert "keras_mp.convert(model, 'mixed_bfloat16')" in str(found).replace("\n", " ")


def test_a_selective_scan_comes_out_with_a_pattern_that_works():
    model = model_of(StateSpace(name="scan"))
    found = diagnose(model, (X, Y))
    assert list(found.policy) == ["net/scan"]
    assert found.policy["net/scan"].name == "float32"
    assert compare(model, (X, Y), found.policy).first_bad is None
    assert json.loads(found.to_json())["pinned"].keys() == {"net/scan"}


def test_float16_has_its_scale_and_the_layer_that_overflows_a_pattern():
    x = X.copy()
    x[0, 0] = 100
    found = diagnose(model_of(Large(name="large")), (x, Y), formats=["float16"])
    assert found.policy.default_policy.name == "mixed_float16"
    assert found.initial_scale == 2.0 ** found.best_scales["float16"]
    assert found.tried.first_bad is None


def test_shares_of_underflow_are_those_of_numpy():
    model = model_of(loss=lambda y, p: keras.ops.mean(keras.ops.square(y - p)) * 1e-6)
    found = diagnose(model, (X, Y), formats=["float16", "float8_e4m3fn"])
    by_name = {(each.path, each.what): each for each in found.layers}
    first = by_name["net/first", "output"]
    w, b = (np.float64(each) for each in model.get_layer("first").get_weights())
    outputs = np.abs(X.astype(np.float64) @ w + b)
    assert first.losses["float8_e4m3fn"].underflow == pytest.approx((outputs < 2.0**-10).mean(), abs=1e-4)
    assert first.losses["float16"].subnormal == pytest.approx((outputs < 2.0**-14).mean(), abs=1e-4)
    assert first.largest == pytest.approx(outputs.max(), rel=1e-5)
    assert found.best_scales["float16"] > 15


def test_wrong_input_is_told():
    with pytest.raises(ArgumentError, match="float61"):
        diagnose(model_of(), (X, Y), formats=["float61"])
    with pytest.raises(ArgumentError, match="formats"):
        diagnose(model_of(), (X, Y), formats="float16")
