"""Layers that draw random numbers: the contract, Keras's own numbers in float32, and the same of them in 16 bits."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract

LAYERS = {
    "Dropout": ((4, 3, 10), {"rate": 0.3}),
    "Dropout, noise shape": ((4, 3, 10), {"rate": 0.3, "noise_shape": (None, 1, None)}),
    "SpatialDropout1D": ((4, 3, 10), {"rate": 0.3}),
    "SpatialDropout2D": ((4, 2, 3, 10), {"rate": 0.3}),
    "SpatialDropout2D, channels first": ((4, 10, 2, 3), {"rate": 0.3, "data_format": "channels_first"}),
    "SpatialDropout3D": ((4, 2, 3, 2, 10), {"rate": 0.3}),
    "AlphaDropout": ((4, 3, 10), {"rate": 0.3}),
    "AlphaDropout, noise shape": ((4, 3, 10), {"rate": 0.3, "noise_shape": (None, 1, None)}),
    "GaussianDropout": ((4, 3, 10), {"rate": 0.3}),
    "GaussianNoise": ((4, 3, 10), {"stddev": 0.3}),
}
RUNS = {"eager": lambda run: run, "graph": tf.function, "XLA": tf.function(jit_compile=True)}


def make(name, of, **settings):
    return getattr(of, name.partition(",")[0])(**LAYERS[name][1], seed=3, **settings)


CASES = {
    name: Case(
        functools.partial(make, name, layers),
        functools.partial(make, name, keras.layers),
        [shape],
        call={"training": True},
        random=True,
    )
    for name, (shape, _) in LAYERS.items()
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def drawn(layer, x, upstream, run_by, times=2):
    """What the layer answers in the last of several training steps, and the gradient."""

    def step(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, upstream)

    step = RUNS[run_by](step)
    return [step(x, upstream) for _ in range(times)][-1]


def pair_of(name, seed=0):
    rng = np.random.default_rng(seed)
    shape = LAYERS[name][0]
    return [tf.constant(rng.normal(size=shape).astype("float16").astype("float32")) for _ in range(2)]


@pytest.mark.parametrize("name", LAYERS)
def test_in_float32_it_is_keras_to_the_last_bit(name):
    given = pair_of(name)
    ours, stock = (drawn(make(name, of), *given, "eager") for of in (layers, keras.layers))
    for one, other in zip(ours, stock, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("run_by", ["eager", "graph", pytest.param("XLA", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_in_16_bits_it_draws_what_keras_draws_in_float32(name, policy, run_by):
    given = [tf.cast(x, policy.removeprefix("mixed_")) for x in pair_of(name)]
    wide = [tf.cast(x, "float32") for x in given]
    expected = drawn(make(name, keras.layers), *wide, run_by)  # XLA draws other numbers than TensorFlow
    actual = drawn(make(name, layers, dtype=policy), *given, run_by)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == given[0].dtype
        assert_close(one, other, 2e-3 if policy == "mixed_float16" else 1.6e-2)


def share_and_mean(of, rate, dtype):
    y = of.Dropout(rate, seed=3, dtype=f"mixed_{dtype}")(tf.ones((10, 100_000)), training=True)
    y = np.asarray(tf.cast(y, "float32"), "float64")
    return (y == 0).mean(), y.mean()


def check_rate(of, rate, dtype):
    # A million numbers: the deviation of the share is at most 0.0005. A kept one is rounded by up to 2 ** -9.
    share, mean = share_and_mean(of, rate, dtype)
    assert abs(share - rate) < 0.0016
    assert abs(mean - 1) < 0.0016 + 2**-9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.3, 0.999])
def test_rate_and_mean_are_those_asked_for(rate, dtype):
    if rate == 0.999:  # few are kept, each a thousand times as large
        assert abs(share_and_mean(layers, rate, dtype)[0] - rate) < 0.0002
    else:
        check_rate(layers, rate, dtype)


@pytest.mark.stock_defect
def test_stock_dropout_keeps_its_rate_in_bfloat16():
    check_rate(keras.layers, 0.001, "bfloat16")


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_all_or_nothing(rate):
    layer, x = layers.Dropout(rate, dtype="mixed_bfloat16"), tf.ones((3, 4), "bfloat16")
    np.testing.assert_array_equal(layer(x, training=True), x * (1 - rate))
    np.testing.assert_array_equal(layer(x, training=False), x)


def test_the_backward_pass_keeps_a_byte_an_element():
    layer = layers.Dropout(0.5, seed=3, dtype="mixed_bfloat16")

    @tf.function(autograph=False)
    def step(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        graph = tf.compat.v1.get_default_graph()
        before = {tensor.name for operation in graph.get_operations() for tensor in operation.outputs}
        to_x = tape.gradient(y, x, upstream)
        after = [each for each in graph.get_operations() if not {t.name for t in each.outputs} <= before]
        kept.update(t.dtype for each in after for t in each.inputs if t.name in before and t.shape == x.shape)
        return to_x

    kept = set()
    step.get_concrete_function(*[tf.TensorSpec((8, 4), tf.bfloat16)] * 2)
    assert kept == {tf.bool, tf.bfloat16}  # the latter the gradient that comes


def test_a_converted_model_draws_what_it_drew(tmp_path):
    model = keras.Sequential([keras.Input((1000,)), keras.layers.Dropout(0.3, seed=5), keras.layers.Activation("relu")])
    x = tf.ones((4, 1000))
    for policy in ("mixed_float16", "mixed_bfloat16"):
        converted = keras_mp.convert(model, policy)
        expected = keras_mp.convert(model, "float32")(x, training=True)
        np.testing.assert_array_equal(converted(x, training=True) == 0, expected == 0)
        assert type(keras_mp.convert(converted, "float32").layers[0]) is keras.layers.Dropout


def inputs_dropped(of, name, dtype):
    settings = {"kernel_size": 1} if name == "ConvLSTM1D" else {}
    shape = (2, 3, 200) if name == "ConvLSTM1D" else (2, 600)
    layer = getattr(of, name)(
        4, dropout=0.013, seed=3, dtype=f"mixed_{dtype}" if dtype != "float32" else dtype, **settings
    )
    mask = layer.cell.get_dropout_mask(tf.ones(shape, dtype))
    return np.asarray(mask[0] if isinstance(mask, list) else mask) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN", "ConvLSTM1D"])
def test_masks_of_recurrent_layers_are_those_of_float32(name, dtype):
    expected = inputs_dropped(keras.layers, name, "float32")
    assert 0 < expected.sum() < expected.size / 20
    np.testing.assert_array_equal(inputs_dropped(layers, name, dtype), expected)


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", ["LSTM", "ConvLSTM1D"])
def test_stock_masks_of_recurrent_layers_are_those_of_float32(name):
    expected = inputs_dropped(keras.layers, name, "float32")
    np.testing.assert_array_equal(inputs_dropped(keras.layers, name, "bfloat16"), expected)


def test_attention_draws_in_float32():
    results = []
    for dtype in ("float32", "mixed_bfloat16"):
        layer = layers.AdditiveAttention(use_scale=False, dropout=0.3, seed=3, dtype=dtype)
        x = tf.constant(np.random.default_rng(0).normal(size=(2, 8, 4)), tf.float32)
        results.append(layer([x, x], training=True))
    assert_close(results[1], results[0], 2e-2)
