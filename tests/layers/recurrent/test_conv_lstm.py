"""Convolutional LSTMs: the contract, and states that stock Keras keeps in 16 bits."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract


def case(name, shape, **arguments):
    # As of the other recurrent layers: the rounding of the products adds up over the steps.
    given = {"padding": "same", **arguments}
    return Case(
        functools.partial(getattr(layers, name), 2, 2, **given),
        functools.partial(getattr(keras.layers, name), 2, 2, **given),
        [shape],
        weights=(-0.5, 0.5),
        scale=0.5,
        random=bool(arguments.get("dropout")),
        # `Masking` masks pixels, of which a convolution to another size leaves others: Keras fails.
        masked=given["padding"] == "same" and "strides" not in given,
        tolerance={"bfloat16": 3.2e-2, "float16": 4e-3},
    )


CASES = {
    "1D": case("ConvLSTM1D", (2, 3, 4, 2)),
    "1D, sequences": case("ConvLSTM1D", (2, 3, 5, 2), return_sequences=True, padding="valid", go_backwards=True),
}
SLOW = {
    "1D, no bias, strides": case("ConvLSTM1D", (2, 3, 5, 2), use_bias=False, strides=2),
    "1D, dropout": case("ConvLSTM1D", (2, 3, 4, 2), dropout=0.3, recurrent_dropout=0.3),
    "2D": case("ConvLSTM2D", (2, 2, 3, 4, 2)),
    "3D": case("ConvLSTM3D", (2, 2, 3, 2, 2, 2)),
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


@pytest.mark.slow
@contract(SLOW, lambda name, policy: policy == "mixed_bfloat16")
def test_contract_in_bfloat16(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def check_memory(of, policy):
    """A cell that adds 0.02 a step and never forgets: bfloat16 stands still at 4, float16 rounds each sum."""
    settings = {"kernel_initializer": "zeros", "recurrent_initializer": "zeros", "unit_forget_bias": False}
    results = []
    for each, dtype in ((keras.layers, "float32"), (of, policy)):
        layer = each.ConvLSTM1D(1, 1, return_state=True, dtype=dtype, **settings)
        layer.build((1, 500, 2, 1))
        layer.set_weights([*layer.get_weights()[:-1], np.array([-2, 9, 0.2, 10], "float32")])
        results.append(tf.function(layer)(tf.ones((1, 500, 2, 1)))[2])  # ten times as fast as in eager code
    assert_close(results[1], results[0], 1e-3)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_the_cell_state_adds_up_over_hundreds_of_steps(policy):
    check_memory(layers, policy)


@pytest.mark.stock_defect
def test_the_cell_state_of_stock_adds_up_over_hundreds_of_steps():
    check_memory(keras.layers, "mixed_bfloat16")


def test_states_are_float32_and_go_in_as_they_come_out():
    layer = layers.ConvLSTM1D(2, 1, return_state=True, dtype="mixed_bfloat16")
    x = tf.random.normal((2, 6, 3, 2))
    y, *whole = layer(x)
    _, *half = layer(x[:, :3])
    again, *states = layer(x[:, 3:], initial_state=half)
    assert y.dtype == tf.bfloat16
    assert {state.dtype for state in whole} == {tf.float32}
    np.testing.assert_array_equal(again, y)
    for one, other in zip(states, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_stateful_goes_on():
    layer = layers.ConvLSTM1D(2, 1, stateful=True, dtype="mixed_bfloat16")
    whole = layers.ConvLSTM1D(2, 1, dtype="mixed_bfloat16")
    x = tf.random.normal((2, 4, 3, 2))
    layer(x[:, :2])
    whole.build(x.shape)
    whole.set_weights(layer.get_weights())
    np.testing.assert_array_equal(layer(x[:, 2:]), whole(x))
