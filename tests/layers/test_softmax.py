"""Softmax: the contract, masks, and what the stock layer loses in 16 bits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import POLICIES, Case, assert_close, contract, gradients

MASK = np.array([[True, False, True, True, False]])
CASES = {
    "Softmax": Case(layers.Softmax, keras.layers.Softmax, [(4, 5)]),
    "axis 1": Case(
        lambda: layers.Softmax(axis=1),
        lambda: keras.layers.Softmax(axis=1),
        [(4, 3, 5)],
        masked=False,  # a mask of the steps does not broadcast to the logits
    ),
    "two axes, mask": Case(
        lambda: layers.Softmax(axis=[1, -1]),
        lambda: keras.layers.Softmax(axis=[1, -1]),
        [(4, 3, 5)],
        {"mask": MASK},
    ),
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("axis", [-1, 1, [1, -1], None])
def test_an_unknown_rank(axis, policy):
    dtype = policy.removeprefix("mixed_")
    x = tf.constant(np.random.normal(size=(2, 3, 4)), dtype)
    layer = layers.Softmax(axis=axis, dtype=policy)

    @tf.function(input_signature=[tf.TensorSpec(None, dtype)] * 2)
    def step(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, tape.gradient(y, x, upstream)

    upstream = tf.constant(np.random.normal(size=x.shape), dtype)
    expected = gradients(layer, x, upstream, {})
    for actual, name in zip(step(x, upstream), ("y", "x"), strict=True):
        assert_close(actual, expected[name], 1.6e-2 if dtype == "bfloat16" else 2e-3 if dtype == "float16" else 1e-6)


def test_a_mask_and_an_unknown_rank():
    layer = layers.Softmax(dtype="mixed_bfloat16")
    signature = [tf.TensorSpec(None, tf.bfloat16), tf.TensorSpec(None, tf.bool)]
    run = tf.function(lambda x, mask: layer(x, mask=mask), input_signature=signature)
    x = tf.constant(np.random.normal(size=(2, 5)), "bfloat16")
    np.testing.assert_array_equal(run(x, tf.constant(MASK)), layer(x, mask=tf.constant(MASK)))


def test_second_derivatives_of_the_16_bit_softmax():
    x = tf.constant(np.random.normal(size=(3, 4)), "bfloat16")
    weights = tf.constant(np.random.normal(size=(3, 4)), "float32")

    def second(layer, value):
        with tf.GradientTape() as outer:
            outer.watch(value)
            with tf.GradientTape() as inner:
                inner.watch(value)
                loss = tf.reduce_sum(tf.cast(layer(value), "float32") * weights)
            squares = tf.square(tf.cast(inner.gradient(loss, value), "float32"))
        return outer.gradient(squares, value)

    expected = second(keras.layers.Softmax(dtype="float32"), tf.cast(x, "float32"))
    assert_close(second(layers.Softmax(dtype="mixed_bfloat16"), x), expected, 3e-2)


def softmax_of_neighbours(layer):
    return layer(np.array([[300.0, 301.0]], "float32")).numpy().astype("float64")


def test_softmax_tells_300_from_301_in_bfloat16():
    actual = softmax_of_neighbours(layers.Softmax(dtype="mixed_bfloat16"))
    np.testing.assert_allclose(actual, [[0.2689, 0.7311]], rtol=4e-3)


@pytest.mark.stock_defect
def test_stock_softmax_tells_300_from_301_in_bfloat16():
    actual = softmax_of_neighbours(keras.layers.Softmax(dtype="mixed_bfloat16"))
    np.testing.assert_allclose(actual, [[0.2689, 0.7311]], rtol=4e-3)


@pytest.mark.parametrize("axis", [-1, [1, 2], None])
@pytest.mark.parametrize("policy", POLICIES)
def test_softmax_of_masked_rows_is_zero_with_finite_gradients(axis, policy):
    layer = layers.Softmax(axis=axis, dtype=policy)
    mask = np.ones((2, 2, 3), bool)
    mask[1] = False
    mask[0, 0, 0] = False
    for masked in (mask, mask[:1] & False):
        x = tf.cast(np.random.normal(size=(2, 2, 3)) * 1e4, layer.compute_dtype)
        result = gradients(layer, x, tf.ones_like(x), {"mask": masked})
        y, to_x = (np.asarray(result[name], "float64") for name in ("y", "x"))
        hidden = ~np.broadcast_to(masked, y.shape)
        assert (y[hidden] == 0).all()
        assert (to_x[hidden] == 0).all()
        assert np.isfinite(y).all()
        assert np.isfinite(to_x).all()
        total = y.sum(axis=tuple(axis) if isinstance(axis, list) else axis)
        expected = (~hidden).any(axis=tuple(axis) if isinstance(axis, list) else axis)
        np.testing.assert_allclose(total, expected, atol=1e-2)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("axis", [-1, [0, -1]])
def test_softmax_with_an_additive_mask(axis, policy):
    """-1e9 is -inf in float16; a row of nothing else is what it is in float32, uniform."""
    layer = layers.Softmax(axis=axis, dtype=policy)
    for row in ([2.0, 1.0, -1e9], [-1e9, -1e9, -1e9]):
        x = tf.constant([row], layer.compute_dtype)
        result = gradients(layer, x, tf.constant([[1.0, 2.0, 3.0]], x.dtype), {})
        y = np.exp(np.array(row) - max(row))
        y /= y.sum()
        assert_close(result["y"], [y], 5e-3)
        assert_close(result["x"], [y * ([1, 2, 3] - (y * [1, 2, 3]).sum())], 5e-3)


def test_softmax_does_not_hide_nan():
    x = tf.constant([[1.0, np.nan]], "float16")
    result = gradients(layers.Softmax(dtype="mixed_float16"), x, tf.ones_like(x), {})
    assert np.isnan(result["y"]).any()
    assert np.isnan(result["x"]).any()


def confident_gradient(layer):
    """The gradient where the largest probability is 0.999, which bfloat16 rounds to one."""
    x = tf.constant([[7.0, 0.0]], "bfloat16")
    return gradients(layer, x, tf.constant([[1.0, 0.0]], "bfloat16"), {})["x"]


def test_softmax_keeps_the_gradient_of_a_confident_row():
    p = 1 / (1 + np.exp(-7.0))
    assert_close(confident_gradient(layers.Softmax(dtype="mixed_bfloat16")), [[p * (1 - p), -p * (1 - p)]], 4e-3)


@pytest.mark.stock_defect
def test_stock_softmax_keeps_the_gradient_of_a_confident_row():
    p = 1 / (1 + np.exp(-7.0))
    assert_close(confident_gradient(keras.layers.Softmax(dtype="mixed_bfloat16")), [[p * (1 - p), -p * (1 - p)]], 4e-3)


def test_softmax_over_two_axes_of_large_logits():
    """exp(x - logsumexp(x)) is off by 0.4% at 60000, where float32 numbers are 1/256 apart."""
    x = np.array([[[60000.0, 60001.0], [60002.0, 59990.0]]], "float32")
    expected = np.exp(x.astype("float64") - 60002)
    assert_close(layers.Softmax(axis=[1, 2])(x), expected / expected.sum(), 1e-6)


def test_softmax_words_a_bad_mask_as_keras():
    with pytest.raises(ValueError, match="must not have more dimensions"):
        layers.Softmax()(np.ones((2, 3), "float32"), mask=np.ones((1, 2, 3), bool))
    with pytest.raises(ValueError, match="Each mask dimension must be 1 or match the corresponding input dimension"):
        layers.Softmax()(np.ones((2, 3), "float32"), mask=np.ones((2, 2), bool))


def test_softmax_takes_a_mask_of_numbers():
    y = layers.Softmax()(np.zeros((1, 3), "float32"), mask=np.array([[0, 1, 1]]))
    np.testing.assert_allclose(y, [[0, 0.5, 0.5]])


def test_softmax_refuses_bad_axes():
    x = np.ones((2, 3), "float32")
    with pytest.raises(ValueError, match=r"Axis 2 is out of bounds for input shape \(2, 3\)"):
        layers.Softmax(axis=2)(x)
    with pytest.raises(ValueError, match=r"Axis -3 is out of bounds for input shape \(None, 3\)"):
        layers.Softmax(axis=[-1, -3])(keras.Input((3,)))
    with pytest.raises(keras_mp.errors.ArgumentError, match=r"each axis once. .*Type axis=\[1\]"):
        layers.Softmax(axis=[1, -1])(x)
    with pytest.raises(keras_mp.errors.ArgumentError, match=r"at least one axis.*Type axis=-1"):
        layers.Softmax(axis=[])
    with pytest.raises(TypeError, match=r"Expected an int or a list/tuple of ints.*received: 1.5"):
        layers.Softmax(axis=1.5)
