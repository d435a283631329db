"""Dense layers: the contract, and gradients to the bias that stock Keras loses in 16 bits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract
from tests.helpers.derivatives import executed_products


def case(name, shape, *arguments, **settings):
    ours, stock = getattr(layers, name), getattr(keras.layers, name)
    return Case(lambda: ours(*arguments, **settings), lambda: stock(*arguments, **settings), [shape], masked=False)


CASES = {
    "dense": case("Dense", (4, 3), 5, activation="relu"),
    "dense, three axes": case("Dense", (2, 4, 3), 5),
    "dense, four axes": case("Dense", (2, 2, 4, 3), 5, activation="relu"),
    "dense, no bias": case("Dense", (2, 4, 3), 5, use_bias=False),
    "heads": case("EinsumDense", (2, 4, 3), "abc,cde->abde", output_shape=(4, 2, 5), bias_axes="de"),
    "heads, one bias for all": case("EinsumDense", (2, 4, 3), "abc,cde->abde", output_shape=(4, 2, 5), bias_axes="e"),
    "from heads": case("EinsumDense", (2, 4, 3, 2), "abcd,cde->abe", output_shape=(4, 5), bias_axes="e"),
    "other order": case("EinsumDense", (2, 4, 3), "abc,cd->adb", output_shape=(5, 4), bias_axes="d"),
    "ellipsis": case("EinsumDense", (2, 4, 3), "...x,xy->...y", output_shape=5, bias_axes="y"),
    "ellipsis, other order": case("EinsumDense", (2, 4, 3), "...ax,xy->...ya", output_shape=(5, 4)),
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


BIASED = {
    "Dense": (lambda module: module.Dense(3), (2048, 2)),
    "Dense, three axes": (lambda module: module.Dense(3), (16, 128, 2)),
    "EinsumDense": (
        lambda module: module.EinsumDense("abc,cde->abde", output_shape=(None, 3, 2), bias_axes="de"),
        (16, 128, 2),
    ),
    "Conv2D": (lambda module: module.Conv2D(3, 3, padding="same"), (2, 32, 32, 2)),
    "Conv2D, dilation": (lambda module: module.Conv2D(3, 3, dilation_rate=2), (2, 36, 36, 2)),
    "DepthwiseConv2D": (lambda module: module.DepthwiseConv2D(5, padding="same"), (2, 32, 32, 2)),
    "SeparableConv2D": (lambda module: module.SeparableConv2D(3, 3, padding="same"), (2, 32, 32, 2)),
    "Conv2DTranspose": (lambda module: module.Conv2DTranspose(3, 2, strides=2), (2, 16, 16, 2)),
    "Conv1D": (lambda module: module.Conv1D(3, 3, padding="causal"), (4, 512, 2)),
    "DepthwiseConv1D": (lambda module: module.DepthwiseConv1D(5, padding="same"), (4, 512, 2)),
    "SeparableConv1D": (lambda module: module.SeparableConv1D(3, 3, padding="same"), (4, 512, 2)),
    "Conv1DTranspose": (lambda module: module.Conv1DTranspose(3, 2, strides=2), (4, 256, 2)),
    "Conv3D": (lambda module: module.Conv3D(3, 3, padding="same"), (2, 8, 16, 8, 2)),
    "Conv3DTranspose": (lambda module: module.Conv3DTranspose(3, 2, strides=2), (2, 4, 8, 8, 2)),
}


def error_of_bias_gradient(module, name, dtype):
    """Relative to the sum in float64, of gradients between 0 and 1, in the graph of a training step."""
    make, shape = BIASED[name]
    keras.config.set_dtype_policy(f"mixed_{dtype}")
    layer = make(module)
    x = tf.ones(shape, dtype)
    upstream = tf.cast(np.random.default_rng(0).random(layer(x).shape), dtype)

    @tf.function
    def gradient():
        with tf.GradientTape() as tape:
            y = layer(x)
        return tape.gradient(y, layer.bias.value, upstream)

    found = gradient().numpy().reshape(-1)
    expected = tf.cast(upstream, tf.float64).numpy().reshape(-1, found.size).sum(0)
    return np.abs(found / expected - 1).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", BIASED)
def test_the_gradient_to_a_bias_is_right_to_one_rounding(name, dtype):
    assert error_of_bias_gradient(layers, name, dtype) < (0.004 if dtype == "bfloat16" else 0.0005)


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", [name for name in BIASED if name.startswith(("Dense", "Conv2D", "Conv1D", "Conv3D"))])
def test_stock_the_gradient_to_a_bias_is_right_to_one_rounding(name):
    """TensorFlow's kernel adds up in bfloat16 on a CPU: three quarters of 2,048 rows are lost."""
    assert error_of_bias_gradient(keras.layers, name, "bfloat16") < 0.004


@pytest.mark.stock_defect
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stock_an_ellipsis_in_16_bits_is_what_it_is_in_float32(dtype):
    """TensorFlow's einsum answers other numbers for it on a CPU; the contract above sees that ours does not."""
    layer = keras.layers.EinsumDense("...x,xy->...y", output_shape=5, dtype=f"mixed_{dtype}")
    x = tf.cast(np.random.default_rng(0).random((2, 4, 3)), dtype)
    y = layer(x)
    expected = tf.cast(x, tf.float32) @ tf.cast(tf.cast(layer.kernel.value, dtype), tf.float32)
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, atol=0.02)


def test_the_projections_of_attention_are_matrices():
    """One product for the gradient to the kernel, not one for each row of the batch whose sum is in 16 bits."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = layers.MultiHeadAttention(2, 4)
    x = tf.ones((3, 5, 8), "bfloat16")
    layer(x, x)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            y = layer(x, x)
        return tape.gradient(y, [weight.value for weight in layer.trainable_weights])

    operations = step.get_concrete_function().graph.get_operations()
    kernels = [operation for operation in operations if operation.type == "BatchMatMulV2"]
    assert len(kernels) == 6  # scores and outputs, each with two gradients
    sums = [operation for operation in operations if operation.type == "BiasAddGrad"]
    assert not [each for each in sums if each.outputs[0].dtype != tf.float32]


@pytest.mark.parametrize("name", ["Dense", "EinsumDense"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_product_in_16_bits_is_not_fused_with_its_bias(name, dtype, tmp_path, gains_from_16_bits):
    """oneDNN's fused kernel takes nearly twice as long in bfloat16 on a CPU with AMX; in float32 it does not."""
    make, shape = BIASED[name]
    keras.config.set_dtype_policy(dtype)
    layer = make(layers)
    layer.build(shape)

    @tf.function
    def forward(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            return layer(x)

    found = executed_products(forward, tf.ones(shape, dtype), tmp_path)
    assert found
    in_float32 = dtype == "float32" or not gains_from_16_bits
    assert any("Fused" in kind for kind in found) is in_float32


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", ["Dense", "EinsumDense"])
def test_a_vectorized_map_trains(name, jit_compile, gains_from_16_bits):
    make, (_, *sizes) = BIASED[name]
    shape = (4, *sizes)
    keras.config.set_dtype_policy("mixed_bfloat16")
    ours, stock = (make(module) for module in (layers, keras.layers))
    x = tf.cast(keras.random.uniform((2, *shape), seed=1), "bfloat16")
    for layer in (ours, stock):
        layer.build(shape)
    stock.set_weights(ours.get_weights())

    def gradients(layer, x):
        weights = [weight.value for weight in layer.trainable_weights]
        with tf.GradientTape() as tape:
            tape.watch([x, *weights])
            y = tf.vectorized_map(layer, x)
        return tape.gradient(y, [x, *weights])

    found = tf.function(lambda x: gradients(ours, x), jit_compile=jit_compile)(x)
    for mine, theirs in zip(found, gradients(stock, x), strict=True):
        assert_close(tf.cast(mine, "float32"), tf.cast(theirs, "float32"), 2e-2)
