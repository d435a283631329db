"""Layers that fail in half precision are named and left in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.errors import KerasMPWarning
from tests.helpers.conversions import TOLERANCE, Block, normal

layers, ops = keras.layers, keras.ops


class Ones(layers.Layer):
    """Makes a float32 tensor whatever it computes in."""

    def call(self, x):
        return tf.concat([x, tf.ones_like(x, dtype="float32")], -1)


class Hiding(layers.Layer):
    """Hides what is negative with a number that float16 does not hold."""

    def call(self, x):
        return keras.ops.softmax(x + keras.ops.cast(x < 0, x.dtype) * -1e9)


@pytest.mark.parametrize(
    ("layer", "policy", "reason"),
    [(Ones, "mixed_bfloat16", "TypeError"), (Hiding, "mixed_float16", "overflow encountered in cast")],
)
def test_a_layer_that_fails_in_16_bits_is_named_and_left_in_float32(layer, policy, reason):
    made = [layers.Dense(4, name="first"), layer(name="odd"), layers.Dense(4, name="last")]
    model = keras.Sequential([keras.Input((4,)), *made], name="net")
    with pytest.warns(KerasMPWarning, match=f"'net/odd' is left in float32.*{reason}"):
        mixed = keras_mp.convert(model, policy)
    dtype = policy.removeprefix("mixed_")
    assert [each.compute_dtype for each in mixed.layers] == [dtype, "float32", dtype]
    x = normal(3, 4)
    np.testing.assert_allclose(mixed(x), model(x), atol=TOLERANCE[policy] * np.abs(model(x)).max())


def test_a_layer_that_suits_16_bits_is_not_left_out_for_one_that_does_not():
    made = [layers.Dense(4), Ones(), Block(8), layers.Dense(1)]
    with pytest.warns(KerasMPWarning, match="Ones fails in bfloat16"):
        mixed = keras_mp.convert(keras.Sequential([keras.Input((4,)), *made]), "mixed_bfloat16")
    assert mixed.layers[2].dense.compute_dtype == "bfloat16"
