"""An embedding that makes logits: Keras's numbers, and float32 sums where Keras's are rounded to 16 bits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import assert_close

IDS = np.array([[1, 2, 0], [6, 0, 3]])
SETTINGS = {
    "tied": {},
    "untied": {"tie_weights": False},
    "mask": {"mask_zero": True},
    "soft cap": {"logit_soft_cap": 2.0},
    "float32 in reverse": {"reverse_dtype": "float32"},
}


def pair(policy, **settings):
    ours = layers.ReversibleEmbedding(7, 4, dtype=policy, **settings)
    stock = keras.layers.ReversibleEmbedding(7, 4, dtype="float32", **settings)
    for layer in (ours, stock):
        layer.build()
        layer.set_weights([np.random.default_rng(0).normal(size=w.shape) for w in layer.weights])
    return ours, stock


def step(layer):
    with tf.GradientTape() as tape:
        words = layer(tf.constant(IDS))
        logits = layer(words, reverse=True)
        loss = tf.reduce_sum(tf.sin(logits))
    gradients = tape.gradient(loss, [weight.value for weight in layer.trainable_weights])
    return words, logits, *map(tf.convert_to_tensor, gradients)


RUNS = {"eager": lambda run: run, "graph": tf.function, "XLA": tf.function(jit_compile=True)}


@pytest.mark.parametrize("run_by", RUNS)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_numbers_and_gradients_are_keras(settings, policy, run_by):
    ours, stock = pair(policy, **SETTINGS[settings])
    results = RUNS[run_by](lambda: step(ours))()
    assert results[0].dtype == ours.compute_dtype
    assert results[1].dtype == tf.float32
    tolerance = {"float32": 1e-5, "mixed_float16": 4e-3, "mixed_bfloat16": 3.2e-2}[policy]
    for one, other in zip(results, step(stock), strict=True):
        assert_close(one, other, tolerance)


@pytest.mark.parametrize("settings", SETTINGS)
def test_symbolic_tensors_masks_and_files(settings, tmp_path):
    layer = layers.ReversibleEmbedding(7, 4, dtype="mixed_bfloat16", **SETTINGS[settings])
    inputs = keras.Input((3,), dtype="int32")
    words = layer(inputs)
    model = keras.Model(inputs, [words, layer(words, reverse=True)])
    assert [each.dtype for each in model.outputs] == ["bfloat16", "float32"]
    assert [tuple(each.shape) for each in model.outputs] == [(None, 3, 4), (None, 3, 7)]
    mask = layer(IDS)._keras_mask if settings == "mask" else None
    assert mask is None or (mask.numpy() == (IDS != 0)).all()
    model.save(tmp_path / "model.keras")
    for one, other in zip(keras.models.load_model(tmp_path / "model.keras")(IDS), model(IDS), strict=True):
        np.testing.assert_array_equal(one, other)


def check_ties(of):
    """Two words whose logits, 64.5 and 64.25, are one number in bfloat16."""
    layer = of.ReversibleEmbedding(2, 2, dtype="mixed_bfloat16")
    layer.build()
    layer.set_weights([np.array([[64.0, 0.5], [64.0, 0.25]], "float32")])
    logits = tf.cast(layer(tf.ones((1, 2), "bfloat16"), reverse=True), "float32")
    np.testing.assert_array_equal(logits, [[64.5, 64.25]])


def test_words_do_not_tie():
    check_ties(layers)


@pytest.mark.stock_defect
def test_stock_words_do_not_tie():
    check_ties(keras.layers)


def test_a_quantized_layer_is_keras():
    ours, stock = pair("float32")
    for layer in (ours, stock):
        layer.quantize("int8", type_check=False)
    np.testing.assert_array_equal(ours(IDS), stock(IDS))
    np.testing.assert_array_equal(ours(ours(IDS), reverse=True), stock(stock(IDS), reverse=True))


def test_convert_multiplies_in_16_bits_and_answers_in_float32():
    inputs = keras.Input((3,), dtype="int32")
    layer = keras.layers.ReversibleEmbedding(7, 4, name="words")
    model = keras.Model(inputs, layer(keras.layers.Dense(4)(layer(inputs)), reverse=True))
    converted = keras_mp.convert(model, "mixed_bfloat16")
    words = converted.get_layer("words")
    assert type(words) is layers.ReversibleEmbedding
    assert words.compute_dtype == "bfloat16"
    assert converted(IDS).dtype == tf.float32
    assert_close(converted(IDS), model(IDS), 3e-2)
    assert type(keras_mp.convert(converted, "float32").get_layer("words")) is keras.layers.ReversibleEmbedding
