"""Quantization and LoRA come along with a conversion, both ways."""

import keras
import numpy as np
import pytest

import keras_mp
from tests.helpers.conversions import TOLERANCE, normal
from tests.helpers.state_of import differences

layers = keras.layers
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def attention():
    inputs = keras.Input((5, 4))
    layer = layers.MultiHeadAttention(2, 4)
    return (
        keras.Model(inputs, layers.Dense(2)(layer(inputs, inputs))),
        normal(2, 5, 4),
        lambda m: [
            m.layers[1].query_dense,
            m.layers[1].value_dense,
        ],
    )


def encoder():
    keras_hub = pytest.importorskip("keras_hub")
    inputs = keras.Input((5, 4))
    layer = keras_hub.layers.TransformerEncoder(8, 2)
    model = keras.Model(inputs, layers.Dense(2)(layer(inputs)))
    return (
        model,
        normal(2, 5, 4),
        lambda m: [
            m.layers[1]._feedforward_intermediate_dense,
            m.layers[1]._self_attention_layer.query_dense,
        ],
    )


def simple():
    x = inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(30, 4)(x)
    x = layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d")(x)
    x = layers.TimeDistributed(layers.Dense(4))(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    return model, np.arange(10).reshape(2, 5), lambda m: [*m.layers[1:3], m.layers[3].layer, m.layers[4]]


def images():
    inputs = keras.Input((6, 6, 4))
    model = keras.Model(inputs, layers.Dense(2)(layers.Conv2D(3, 3)(inputs)))
    return model, normal(2, 6, 6, 4), lambda m: m.layers[1:3]


def reversible():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.ReversibleEmbedding(30, 4)
            self.middle = layers.Dense(4)

        def call(self, x):
            return keras.ops.cast(self.table(self.middle(self.table(x)), reverse=True), "float32")

    model, x = Tied(), np.arange(10).reshape(2, 5)
    model(x)
    return model, x, lambda m: [m.table, m.middle]


STRUCTURED = {each.__name__: each for each in (attention, encoder, simple, images, reversible)}


def close(found, expected, tolerance=0.05):  # some roundings to bfloat16
    found, expected = np.asarray(found, "float32"), np.asarray(expected, "float32")
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def enable_lora(chosen):
    for layer in chosen:
        layer.enable_lora(2, lora_alpha=3)
        for weight in layer.trainable_weights:
            weight.assign(weight + 0.1 * normal(*weight.shape))


@pytest.mark.parametrize("name", STRUCTURED)
def test_lora_comes_along_both_ways(name):
    model, x, chosen = STRUCTURED[name]()
    converted = keras_mp.convert(model, "mixed_bfloat16")
    enable_lora(chosen(model))
    for policy in POLICIES:
        with_lora = keras_mp.convert(model, policy)
        assert differences(model, with_lora, converted=policy != "float32") == []
        close(with_lora(x), model(x), 0 if policy == "float32" else 0.05)
        back = keras_mp.convert(with_lora, "float32")
        assert differences(model, back) == []
        np.testing.assert_array_equal(back(x), model(x))
    enable_lora(chosen(converted))
    back = keras_mp.convert(converted, "float32")
    assert differences(converted, back, converted=True) == []
    close(back(x), converted(x))
    assert chosen(back)[0].lora_enabled


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize:UserWarning")
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_quantization_comes_along_both_ways(name, mode):
    model, x, chosen = STRUCTURED[name]()
    if mode not in getattr(chosen(model)[0], "variable_serialization_spec", {"int8"}):
        pytest.skip("Keras does not quantize this layer so")
    converted = keras_mp.convert(model, "mixed_bfloat16")
    model.quantize(mode)
    quantized = [layer.name for layer in model._flatten_layers() if getattr(layer, "_is_quantized", False)]
    assert quantized
    for policy in POLICIES[:2]:
        copy = keras_mp.convert(model, policy)
        assert differences(model, copy, converted=policy != "float32") == []
        close(copy(x), model(x), 0 if policy == "float32" else 0.1)
        back = keras_mp.convert(copy, "float32")
        assert differences(model, back) == []
        np.testing.assert_array_equal(back(x), model(x))
    some = [layer for layer in copy._flatten_layers() if getattr(layer, "_is_quantized", False)]
    assert {layer.dtype_policy.name.partition("_from_")[2] for layer in some} <= {"mixed_bfloat16", "float32"}
    converted.quantize(mode)
    names = [layer.name for layer in converted._flatten_layers() if getattr(layer, "_is_quantized", False)]
    assert names == quantized
    back = keras_mp.convert(converted, "float32")
    assert differences(converted, back, converted=True) == []
    close(back(x), converted(x), 0.1)


def test_gptq_comes_along():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dense(2)])
    config = keras.quantizers.GPTQConfig(dataset=None, tokenizer=None, weight_bits=4, group_size=4)
    for layer in model.layers:
        layer.quantize("gptq", config=config)
        layer.quantized_kernel.assign(np.random.randint(0, 200, layer.quantized_kernel.shape))
        layer.kernel_scale.assign(np.random.uniform(0.1, 0.2, layer.kernel_scale.shape))
        layer.is_gptq_calibrated = True
        del layer._kernel  # as Keras does once it is calibrated
    x = normal(3, 8)
    for policy in POLICIES:
        copy = keras_mp.convert(model, policy)
        assert differences(model, copy, converted=policy != "float32") == []
        close(copy(x), model(x), 0 if policy == "float32" else 0.05)
        np.testing.assert_array_equal(keras_mp.convert(copy, "float32")(x), model(x))


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method:UserWarning")
def test_a_model_quantized_in_float8():
    """Which lists its variables in another order than one that is made again."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dense(2)])
    model.quantize("float8")
    given = normal(4, 6)
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert mixed.layers[0].dtype_policy.name == "float8_from_mixed_bfloat16"
    expected = model(given).numpy()
    np.testing.assert_allclose(
        mixed(given), expected, rtol=0, atol=TOLERANCE["mixed_bfloat16"] * np.abs(expected).max()
    )
    np.testing.assert_array_equal(keras_mp.convert(mixed, "float32")(given), expected)
