"""The outputs, losses and penalties of a converted model are float32."""

import keras
import numpy as np
import pytest

import keras_mp
from keras_mp.conversion.casts import OutputCast
from keras_mp.errors import KerasMPWarning
from tests.helpers.conversions import MIXED, Block, normal

layers = keras.layers


def test_an_output_that_no_layer_makes_is_told():
    class Raw(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return keras.ops.cast(self.dense(x), self.compute_dtype)

    model = Raw()
    model(normal(2, 3))
    with pytest.warns(KerasMPWarning, match="still a 16-bit float"):
        keras_mp.convert(model, "mixed_bfloat16")


def test_losses_go_by_the_names_of_outputs():
    x = inputs = keras.Input((4,))
    outputs = [Block(4)(x), layers.Dense(1, name="score")(x)]
    model = keras.Model(inputs, outputs)
    model.compile(
        "sgd", {model.output_names[0]: "mse", "score": "mae"}, metrics={"score": keras.metrics.MeanSquaredError()}
    )
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert any(isinstance(layer, OutputCast) for layer in mixed.layers)
    x, y = normal(8, 4), [normal(8, 4), normal(8, 1)]
    ours, theirs = (each.evaluate(x, y, verbose=0, return_dict=True) for each in (mixed, model))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=2e-2), name  # some roundings to bfloat16


def test_several_outputs_of_one_layer_are_cast():
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, layers.LSTM(4, return_sequences=True, return_state=True)(inputs))
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert [output.dtype for output in mixed(normal(2, 5, 3))] == ["float32"] * 3
    assert len(keras_mp.convert(mixed, "float32").layers) == len(model.layers)


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize(
    "layer", [lambda: layers.Dense(4, activity_regularizer="l2"), lambda: layers.ActivityRegularization(0.1, 0.1)]
)
def test_penalties_of_outputs_are_float32_sums(layer, policy):
    x = normal(3, 4)
    model = keras.Sequential([keras.Input((4,)), layer(), layers.Dense(1)])
    mixed = keras_mp.convert(model, policy)
    for each in (model, mixed):
        each(x)
    assert mixed.losses[0].dtype == "float32"
    assert float(mixed.losses[0]) == pytest.approx(float(model.losses[0]), rel=1e-2)
    mixed.compile(keras_mp.LossScaleOptimizer("sgd", initial_scale=256.0), "mse")
    assert np.isfinite(mixed.fit(x, normal(3, 1), verbose=0).history["loss"][0])
    back = keras_mp.convert(mixed, "float32")
    assert type(back.layers[0].activity_regularizer) is type(model.layers[0].activity_regularizer)


@pytest.mark.stock_defect
def test_stock_penalties_of_16_bit_outputs_fail():
    with keras_mp.policy_scope("mixed_bfloat16"):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4, activity_regularizer="l2"), layers.Dense(1)])
    model.compile("sgd", "mse")
    try:
        model.fit(normal(3, 4), normal(3, 1), verbose=0)
    except TypeError as error:
        raise AssertionError(error) from error
