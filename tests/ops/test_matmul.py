"""Products of 16-bit tensors on CPUs that are fast in 16 bits and on those that are not: the same numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import hardware, layers
from keras_mp.ops import matmul
from tests.helpers.derivatives import early_operations

LAYERS = {
    "Dense": (lambda **settings: layers.Dense(5, **settings), (4, 8)),
    "Dense, three axes": (lambda **settings: layers.Dense(5, use_bias=False, **settings), (2, 4, 8)),
    "EinsumDense": (
        lambda **settings: layers.EinsumDense("abc,cde->abde", (None, 2, 5), bias_axes="de", **settings),
        (2, 4, 8),
    ),
    "EinsumDense, other order": (lambda **settings: layers.EinsumDense("abc,cd->adb", (5, 4), **settings), (2, 4, 8)),
    "Head": (lambda **settings: layers.Head(5, **settings), (4, 8)),
    "Conv2D": (lambda **settings: layers.Conv2D(5, 3, padding="same", **settings), (2, 8, 8, 4)),
    "Conv2D, wide": (lambda **settings: layers.Conv2D(5, 3, **settings), (2, 4, 20, 4)),
    "Conv2D, strides": (lambda **settings: layers.Conv2D(5, 3, strides=2, **settings), (2, 9, 9, 4)),
    "Conv2D, dilation": (lambda **settings: layers.Conv2D(5, 3, dilation_rate=2, **settings), (2, 9, 9, 4)),
    "Conv2D, a group a channel": (lambda **settings: layers.Conv2D(4, 3, groups=4, **settings), (2, 8, 8, 4)),
    "DepthwiseConv2D": (lambda **settings: layers.DepthwiseConv2D(5, padding="same", **settings), (2, 8, 8, 4)),
    "DepthwiseConv2D, dilation": (
        lambda **settings: layers.DepthwiseConv2D(3, dilation_rate=2, **settings),
        (2, 8, 8, 4),
    ),
    "SeparableConv2D, dilation": (
        lambda **settings: layers.SeparableConv2D(5, 3, dilation_rate=2, depthwise_initializer="ones", **settings),
        (2, 8, 8, 4),
    ),
    "Conv2DTranspose": (lambda **settings: layers.Conv2DTranspose(5, 3, strides=2, **settings), (2, 5, 4, 4)),
    "Conv1D": (lambda **settings: layers.Conv1D(5, 3, padding="causal", **settings), (2, 9, 4)),
    "DepthwiseConv1D": (lambda **settings: layers.DepthwiseConv1D(5, padding="same", **settings), (2, 9, 4)),
    "Conv1DTranspose": (lambda **settings: layers.Conv1DTranspose(5, 3, strides=2, **settings), (2, 5, 4)),
    "Conv3D": (lambda **settings: layers.Conv3D(5, 3, padding="same", **settings), (2, 4, 5, 3, 4)),
    "Conv3DTranspose": (lambda **settings: layers.Conv3DTranspose(5, 2, strides=2, **settings), (2, 3, 2, 3, 4)),
    "LSTM": (lambda **settings: layers.LSTM(5, **settings), (2, 3, 8)),
}
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def whole_numbers(shape, seed):
    """From -2 to 2, of which every dtype holds the sums in these tests."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype("float32")


def step(layer, compiled=True):
    """From inputs and a gradient to the outputs to these, and to the gradients to inputs and weights."""

    def run(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, *tape.gradient(y, [x, *(weight.value for weight in layer.trainable_weights)], upstream)

    return tf.function(run, autograph=False) if compiled else run


@pytest.mark.parametrize("compiled", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "LSTM"])
def test_outputs_and_gradients_are_those_of_float32_rounded(name, dtype, compiled, gains_from_16_bits):
    """Whole numbers come out exactly but for the last rounding, whichever way the product is computed."""
    make, shape = LAYERS[name]
    layer, reference = make(dtype=f"mixed_{dtype}"), make(dtype="float32")
    layer.build(shape)
    reference.build(shape)
    weights = [whole_numbers(weight.shape, seed) for seed, weight in enumerate(layer.weights, 1)]
    layer.set_weights(weights)
    reference.set_weights(weights)
    x = whole_numbers(shape, 0)
    upstream = whole_numbers(reference(x).shape, 9)
    narrow = tf.cast(x, dtype), tf.cast(upstream, "float32" if name == "Head" else dtype)
    answers = step(layer, compiled)(*narrow)
    expected = step(reference, compiled)(tf.constant(x), tf.constant(upstream))
    assert [each.dtype.name for each in answers[:2]] == ["float32" if name == "Head" else dtype, dtype]
    assert {each.dtype.name for each in answers[2:]} == {"float32"}
    for one, other in zip(answers, expected, strict=True):
        np.testing.assert_allclose(tf.cast(one, "float32"), other, rtol=ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_slow_cpu_multiplies_in_float32_in_a_training_step_alone(name, dtype, gains_from_16_bits):
    make, shape = LAYERS[name]
    layer = make(dtype=f"mixed_{dtype}")
    layer.build(shape)
    x = tf.TensorSpec(shape, dtype)
    output = layer.compute_output_spec(keras.KerasTensor(shape, dtype))

    def dtypes(function, *specs):
        graph = function.get_concrete_function(*specs).graph
        kinds = ("MatMul", "Einsum", "Conv2D", "Conv3D", "DepthwiseConv2dNative")
        return {each.outputs[0].dtype.name for each in graph.get_operations() if each.type.startswith(kinds)}

    trained = dtypes(step(layer), x, tf.TensorSpec(output.shape, output.dtype))
    if name != "LSTM":  # whose recurrence stays as it is
        assert (trained == {"float32"}) == (not gains_from_16_bits)
    served = dtypes(tf.function(lambda x: layer(x)), x)
    assert served <= {dtype} or name == "Head"


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", [name for name in LAYERS if "Conv" in name])
def test_float32_copies_do_not_wait_for_the_backward_pass(name, dtype, gains_from_16_bits):
    make, shape = LAYERS[name]
    layer = make(dtype=f"mixed_{dtype}")
    layer.build(shape)
    assert early_operations(layer, shape, dtype) == []


@pytest.mark.parametrize("dtype", ROUNDING)
def test_second_derivatives_of_a_wide_product(dtype):
    """Of sum((a @ b)^3): with whole numbers all of it is exact."""
    a, b = (tf.cast([[1.0, 2.0]], dtype), tf.cast([[2.0], [-1.0]], dtype))
    a += tf.cast([[1.0, 0.0]], dtype)  # a @ b is 2
    with tf.GradientTape() as outer:
        outer.watch([a, b])
        with tf.GradientTape() as inner:
            inner.watch([a, b])
            y = matmul.wide(tf.matmul, a, b) ** 3
        to_a = inner.gradient(y, a)  # 3 (a b)^2 b
    second = outer.gradient(to_a, [a, b])  # of its sum, 12 (b_1 + b_2): 6 (a b) (b_1 + b_2) b, and that of a plus 12
    assert [each.dtype for each in second] == [a.dtype] * 2
    np.testing.assert_array_equal(tf.cast(second[0], tf.float32), [[24.0, -12.0]])
    np.testing.assert_array_equal(tf.cast(second[1], tf.float32), [[36.0], [36.0]])


def test_what_is_no_16_bit_product_of_tensorflow_is_left_alone(gains_from_16_bits):
    assert not matmul.are_wide(tf.float32)
    assert not matmul.are_wide(tf.float64)
    assert matmul.are_wide(tf.bfloat16) == (not gains_from_16_bits)
    seen = []
    tf.function(lambda: seen.append(matmul.are_wide(tf.bfloat16)), jit_compile=True)()
    assert seen == [False]


def test_the_gain_is_the_measured_one_but_where_features_leave_no_doubt():
    cpu = hardware.detect().devices[0]
    assert hardware.cpu_gains("bfloat16") == ("amx_bf16" in cpu.features or hardware.measure("bfloat16").gains)
    assert hardware.cpu_gains("float16") == hardware.measure("float16").gains
