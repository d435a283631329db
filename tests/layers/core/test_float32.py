"""The wrapper that runs any layer in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import POLICIES, Case, assert_close, contract

CASES = {
    "Float32": Case(
        lambda: layers.Float32(keras.layers.Dense(5, name="wrapped")),
        lambda: keras.layers.Dense(5, dtype="float32"),
        [(4, 5)],
        output_dtype="float32",
        loads_stock_config=False,
    ),
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.LSTM(3),
        lambda: keras.layers.Bidirectional(keras.layers.GRU(2)),
        lambda: keras.layers.MultiHeadAttention(2, 3),
        lambda: keras.Sequential([keras.layers.Dense(2), keras.layers.Bidirectional(keras.layers.LSTM(2))]),
    ],
    ids=["LSTM", "Bidirectional", "MultiHeadAttention", "Sequential"],
)
def test_float32_reaches_the_layers_inside(make, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    layer = layers.Float32(make())
    x = tf.random.normal((2, 4, 5))
    inputs = keras.Input((4, 5))
    several = isinstance(layer.layer, keras.layers.MultiHeadAttention)
    outputs = layer(inputs, value=inputs) if several else layer(inputs)
    assert outputs.dtype == "float32"
    assert layer.weights
    model = keras.Model(inputs, outputs)
    y = model(x)
    assert y.dtype == tf.float32

    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), y)
    twin = make()
    arguments = {"value": x} if several else {}
    twin(x, **arguments)
    twin.set_weights(layer.get_weights())
    assert_close(twin(x, **arguments), y, 1e-5)


def test_float32_passes_training_and_masks():
    dropout = layers.Float32(keras.layers.Dropout(0.5))
    x = np.ones((1, 1000), "float16")
    assert set(np.unique(dropout(x, training=True))) == {0.0, 2.0}
    assert np.unique(dropout(x)).tolist() == [1.0]
    embedding = layers.Float32(keras.layers.Embedding(4, 2, mask_zero=True, dtype="mixed_float16"))
    embedded = embedding(np.array([[3, 0]]))
    assert embedded.dtype == tf.float32
    assert embedded._keras_mask.numpy().tolist() == [[True, False]]
    lstm = layers.Float32(keras.layers.LSTM(2))
    masked = lstm(tf.ones((1, 3, 2)), mask=np.array([[True, False, False]]))
    np.testing.assert_allclose(masked, lstm(tf.ones((1, 1, 2))), rtol=1e-6)


def test_float32_answers_the_mask_of_the_wrapped_layer():
    masked = keras.layers.Masking()(keras.Input((3, 2)))
    assert layers.Float32(keras.layers.ReLU())(masked)._keras_mask is not None
    assert getattr(layers.Float32(keras.layers.LSTM(2))(masked), "_keras_mask", None) is None


def test_float32_leaves_integers_alone():
    assert layers.Float32(keras.layers.Lambda(lambda x: x + 1))(np.array([16777216], "int32")).numpy() == 16777217


def test_float32_refuses_what_it_cannot_run():
    with pytest.raises(keras_mp.errors.ArgumentError, match=r"Received: dtype='mixed_float16'. Leave `dtype` out"):
        layers.Float32(keras.layers.Dense(2), dtype="mixed_float16")
    narrow = keras.layers.Dense(2, dtype="float16")
    narrow.build((None, 3))
    with pytest.raises(
        keras_mp.errors.ArgumentError, match=r"was built with 16-bit ones: .*Wrap it before it is built"
    ):
        layers.Float32(narrow)
    with pytest.raises(ValueError, match="isn't a supported layer type"):
        layers.Float32(lambda x: x)
