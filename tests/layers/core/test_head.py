"""The output layer: the contract, and what a 16-bit dense layer loses of its logits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract, gradients

CASES = {
    "Head": Case(lambda: layers.Head(3), lambda: keras.layers.Dense(3), [(4, 5)], output_dtype="float32"),
    "softmax, rank 3": Case(
        lambda: layers.Head(3, activation="softmax", kernel_regularizer="l2"),
        lambda: keras.layers.Dense(3, activation="softmax", kernel_regularizer="l2"),
        [(4, 2, 5)],
        output_dtype="float32",
    ),
    "no bias": Case(
        lambda: layers.Head(3, use_bias=False),
        lambda: keras.layers.Dense(3, use_bias=False),
        [(4, 2, 2, 5)],
        output_dtype="float32",
    ),
    "lora": Case(
        lambda: layers.Head(3, lora_rank=2, lora_alpha=3),
        lambda: keras.layers.Dense(3, lora_rank=2, lora_alpha=3),
        [(4, 5)],
        output_dtype="float32",
    ),
}


# In float64 LoRA's weights are float32, in the stock layer too, so that case is not one for this policy.
@contract(CASES, lambda name, policy: (name, policy) != ("lora", "float64"))
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sums_of_16_bit_products_are_not_rounded(dtype, jit_compile):
    layer = layers.Head(32, dtype=f"mixed_{dtype}")
    run = tf.function(layer, jit_compile=jit_compile)
    x = tf.constant(np.random.normal(size=(8, 64)), dtype)
    layer.build(x.shape)
    kernel = tf.cast(tf.cast(layer.kernel, dtype), "float64")
    assert_close(run(x), tf.cast(x, "float64") @ kernel, 1e-6)


@pytest.mark.stock_defect
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sums_of_stock_16_bit_products_are_not_rounded(dtype):
    layer = keras.layers.Dense(32, dtype=f"mixed_{dtype}")
    x = tf.constant(np.random.normal(size=(8, 64)), dtype)
    layer.build(x.shape)
    kernel = tf.cast(tf.cast(layer.kernel, dtype), "float64")
    assert_close(tf.cast(layer(x), "float32"), tf.cast(x, "float64") @ kernel, 1e-6)


def large_logits(make):
    layer = make(2, kernel_initializer="ones", dtype="mixed_float16")
    return np.asarray(layer(np.array([[60000.0, 60000.0]], "float16")), "float64")


@pytest.mark.parametrize("jit_compile", [False, True])
def test_logits_above_65504_stay_finite(jit_compile):
    head = layers.Head(2, kernel_initializer="ones", dtype="mixed_float16")
    x = tf.constant([[60000.0, 60000.0]], "float16")
    head.build(x.shape)
    np.testing.assert_array_equal(tf.function(head, jit_compile=jit_compile)(x), [[120_000.0] * 2])


@pytest.mark.stock_defect
def test_stock_logits_above_65504_stay_finite():
    np.testing.assert_array_equal(large_logits(keras.layers.Dense), [[120_000.0] * 2])


def with_bias(make):
    layer = make(1, bias_initializer=keras.initializers.Constant(1.001), dtype="mixed_bfloat16")
    return layer(np.zeros((1, 3), "float32"))


def test_the_bias_is_not_rounded():
    np.testing.assert_array_equal(with_bias(layers.Head), np.array([[1.001]], "float32"))


@pytest.mark.stock_defect
def test_the_stock_bias_is_not_rounded():
    np.testing.assert_array_equal(tf.cast(with_bias(keras.layers.Dense), "float32"), np.array([[1.001]], "float32"))


def test_the_bias_is_not_rounded_inside_a_16_bit_model():
    """Inside another layer, whose autocasting reaches into it."""
    head = layers.Head(1, bias_initializer=keras.initializers.Constant(1.001), dtype="mixed_bfloat16")
    model = keras.Sequential([keras.layers.Dense(3, use_bias=False, dtype="mixed_bfloat16"), head])
    np.testing.assert_array_equal(model(np.zeros((1, 2), "float32")), np.array([[1.001]], "float32"))


def test_the_losses_find_the_logits_behind_a_softmax():
    """The probability of the label is 0 in float32, and its logarithm is not lost."""
    head = layers.Head(2, "softmax", kernel_initializer="identity", dtype="mixed_bfloat16")
    y = head(tf.constant([[300.0, 0.0]], "bfloat16"))
    for losses in (keras.losses, keras_mp.losses):
        np.testing.assert_allclose(losses.SparseCategoricalCrossentropy()(np.array([1]), y), 300.0)


def test_second_derivatives():
    x = tf.constant(np.random.normal(size=(3, 4)), "bfloat16")

    def second(layer, value):
        with tf.GradientTape() as outer:
            outer.watch(value)
            with tf.GradientTape() as inner:
                inner.watch(value)
                loss = tf.reduce_sum(layer(value) ** 3)
            squares = tf.reduce_sum(tf.square(tf.cast(inner.gradient(loss, value), "float32")))
        return outer.gradient(squares, [value, layer.kernel.value])

    head, stock = layers.Head(2, dtype="mixed_bfloat16"), keras.layers.Dense(2, dtype="float32")
    head.build(x.shape)
    stock.build(x.shape)
    head.kernel.assign(tf.cast(tf.cast(head.kernel, "bfloat16"), "float32"))
    stock.set_weights(head.get_weights())
    expected = second(stock, tf.cast(x, "float32"))
    for jit_compile in (False, True):
        run = tf.function(lambda value: second(head, value), jit_compile=jit_compile)
        for actual, reference in zip(run(x), expected, strict=True):
            # Four 16-bit products one after the other, each of which rounds what it gets.
            assert_close(actual, reference, 3e-2)


def test_the_kernel_gradient_of_a_compiled_step_is_summed_in_float32():
    """512 times 1 + 2**-7: bfloat16 has no digits for the sum of them, 516."""
    layer = layers.Head(1, dtype="mixed_bfloat16")
    x = tf.fill((512, 1), tf.constant(1 + 2**-7, "bfloat16"))
    layer.build(x.shape)
    run = tf.function(lambda: gradients(layer, x, tf.ones((512, 1)), {}), jit_compile=True)
    (to_kernel,) = (gradient for name, gradient in run().items() if name.endswith("kernel"))
    np.testing.assert_array_equal(to_kernel, [[516.0]])


def test_the_backward_pass_reads_no_float32_copy_of_the_inputs():
    layer = layers.Head(16, dtype="mixed_bfloat16")
    layer.build((64, 32))
    kept = []

    @tf.function(input_signature=[tf.TensorSpec((64, 32), "bfloat16")])
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        before = set(tf.compat.v1.get_default_graph().get_operations())
        tape.gradient(y, [x, layer.kernel.value])
        after = [op for op in tf.compat.v1.get_default_graph().get_operations() if op not in before]
        kept.extend(tensor for op in after for tensor in op.inputs if tensor.op in before)
        return y

    step.get_concrete_function()
    assert any(tensor.shape == (64, 32) and tensor.dtype == tf.bfloat16 for tensor in kept)
    assert [tensor for tensor in kept if tensor.shape == (64, 32) and tensor.dtype == tf.float32] == []


def test_it_takes_sparse_inputs_and_an_empty_batch():
    head = layers.Head(2, kernel_initializer="ones", dtype="mixed_bfloat16")
    sparse = tf.sparse.from_dense([[1.0, 0.0, 2.0]])
    np.testing.assert_array_equal(head(sparse), [[3.0, 3.0]])
    assert head(sparse).dtype == tf.float32
    assert head(np.zeros((0, 4, 3), "float32")).shape == (0, 4, 2)


def test_bad_arguments_are_worded():
    with pytest.raises(ValueError, match="Received an invalid value for `units`, expected a positive integer"):
        layers.Head(0)
    head = layers.Head(2)
    head.build((None, 3))
    with pytest.raises(ValueError, match="incompatible with the layer: expected axis -1 of input shape"):
        head(np.ones((1, 4), "float32"))
    with pytest.raises(ValueError, match="expected min_ndim=2"):
        head(np.ones((3,), "float32"))


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize:UserWarning")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_a_quantized_head_still_answers_in_float32(mode, policy):
    head = layers.Head(3, activation="softmax", dtype=policy)
    dense = keras.layers.Dense(3, activation="softmax")
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    for layer in (head, dense):
        layer.build((None, 8))
    dense.set_weights(head.get_weights())
    for layer in (head, dense):
        layer.quantize(mode)
    assert head.dtype_policy.name == dense.dtype_policy.name.replace("float32", policy)
    y = head(x)
    assert y.dtype == tf.float32
    symbol = keras.KerasTensor((None, 8))
    assert head(symbol).dtype == "float32"
    # Some roundings to bfloat16 of sums over eight products.
    np.testing.assert_allclose(y, dense(x), atol=0 if policy == "float32" else 2e-2)
    again = layers.Head.from_config(head.get_config())
    again.build((None, 8))
    by_path = {weight.name: weight for weight in head.weights}
    for weight in again.weights:
        weight.assign(by_path[weight.name])
    np.testing.assert_array_equal(again(x), y)
