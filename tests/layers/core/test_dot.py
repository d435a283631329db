"""Dot, Average, PReLU and Masking: the contract, and what stock Keras loses in 16 bits."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract


def dot_case(shapes, **settings):
    return Case(
        functools.partial(layers.Dot, **settings), functools.partial(keras.layers.Dot, **settings), shapes, as_list=True
    )


def prelu_case(shape, **settings):
    return Case(functools.partial(layers.PReLU, **settings), functools.partial(keras.layers.PReLU, **settings), [shape])


CASES = {
    "Dot, vectors": dot_case([(4, 5), (4, 5)], axes=1, normalize=True),
    "Dot, sequences": dot_case([(2, 3, 4), (2, 5, 4)], axes=-1, normalize=True),
    "Dot, two axes": dot_case([(2, 3, 4), (2, 4, 5)], axes=(2, 1)),
    "Dot, vector and matrix": dot_case([(2, 3), (2, 3, 4)], axes=1, normalize=True),
    "Dot, rank 4": dot_case([(2, 3, 2, 4), (2, 5, 2)], axes=(2, 2)),
    "Average": Case(layers.Average, keras.layers.Average, [(2, 3, 4), (2, 3, 4), (2, 1, 4)], as_list=True),
    "PReLU": prelu_case((4, 3, 5)),
    "PReLU, shared": prelu_case((4, 3, 2, 5), shared_axes=[1, 2]),
    "PReLU, shared in the middle": prelu_case((4, 3, 2, 5), shared_axes=[2]),
    "Masking": Case(layers.Masking, keras.layers.Masking, [(4, 3, 5)]),
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def check_cosine(of):
    x = np.random.default_rng(0).normal(size=(4, 64)).astype("float32") * 1000
    x[0] = 0
    y = of.Dot(1, normalize=True, dtype="mixed_float16")([x, x])
    assert_close(y, [[0.0], [1.0], [1.0], [1.0]], 2e-3)


def test_cosines_of_zeros_and_of_large_numbers_are_right_in_float16():
    check_cosine(layers)


@pytest.mark.stock_defect
def test_stock_cosines_of_zeros_and_of_large_numbers_are_right_in_float16():
    check_cosine(keras.layers)


def test_a_vector_of_zeros_has_a_finite_gradient_in_float16():
    x = tf.zeros((2, 8), "float16")
    layer = layers.Dot(1, normalize=True, dtype="mixed_float16")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer([x, tf.ones_like(x)]))
    assert np.isfinite(tape.gradient(y, x)).all()


def check_mean(of):
    layer = of.Average(dtype="mixed_float16")
    np.testing.assert_array_equal(layer([tf.fill((2, 3), tf.constant(3000, "float16"))] * 64), np.full((2, 3), 3000))


def test_a_mean_whose_sum_leaves_float16():
    check_mean(layers)


@pytest.mark.stock_defect
def test_a_stock_mean_whose_sum_leaves_float16():
    check_mean(keras.layers)


def check_slope(of, policy):
    x = np.random.default_rng(0).normal(size=(32, 64, 64, 2)).astype("float32")
    slopes = []
    for layer in (keras.layers.PReLU(shared_axes=[1, 2]), of.PReLU(shared_axes=[1, 2], dtype=policy)):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(tf.cast(layer(x), "float32"))
        slopes.append(tape.gradient(y, layer.trainable_variables[0].value))
    assert_close(slopes[1], slopes[0], 1e-2)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_the_slope_of_prelu_is_summed_in_float32(policy):
    check_slope(layers, policy)


@pytest.mark.stock_defect
def test_the_slope_of_stock_prelu_is_summed_in_float32():
    check_slope(keras.layers, "mixed_float16")


def check_mask(of, policy):
    # 0.1 and its neighbour in float32, which are one number in 16 bits, and no float32.
    x = np.array([[[0.1, 0.1], [0.1, 0.10001], [0.2, 0.1], [0.1, 0.1]]], "float32")
    layer = of.Masking(0.1, dtype=policy)
    y = layer(x)
    np.testing.assert_array_equal(y._keras_mask, [[False, True, True, False]])
    np.testing.assert_array_equal(tf.cast(y, "float32")[0, :, 0] == 0, [True, False, False, True])
    model = keras.Sequential([keras.Input((4, 2)), layer, layers.GlobalAveragePooling1D(dtype=policy)])
    assert_close(model(x), [[0.15, 0.10005]], 5e-3)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_masking_compares_before_it_casts(policy):
    check_mask(layers, policy)


@pytest.mark.stock_defect
def test_stock_masking_compares_before_it_casts():
    check_mask(keras.layers, "mixed_bfloat16")


def test_masking_of_a_16_bit_input_compares_in_its_dtype():
    x = tf.constant([[[0.1], [0.5]]], "bfloat16")
    np.testing.assert_array_equal(layers.Masking(0.1, dtype="mixed_bfloat16")(x)._keras_mask, [[False, True]])
