"""Spectral normalization: the contract, and the float32 kernel that stock Keras rounds to 16 bits in every step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from tests.contract.layer_contract import Case, contract


def wrapped(wrapper, make, **arguments):
    return lambda: wrapper(make(), **arguments)


def cases():
    for name, make, shape, training in (
        ("Dense", lambda: keras.layers.Dense(4, name="inner"), (4, 5), True),
        ("Conv2D", lambda: keras.layers.Conv2D(3, 2, name="inner"), (2, 4, 3, 2), True),
        ("Dense, inference", lambda: keras.layers.Dense(4, name="inner"), (4, 3, 5), False),
    ):
        yield (
            name,
            Case(
                wrapped(layers.SpectralNormalization, make, power_iterations=2),
                wrapped(keras.layers.SpectralNormalization, make, power_iterations=2),
                [shape],
                {"training": training},
                # Keras's wrapper does not pass masks on, and warns.
                masked=False,
                # A call in training moves the kernel, so finite differences compare a different function each time.
                differentiable=not training,
            ),
        )


CASES = dict(cases())


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def kernel_after_steps(wrapper, policy):
    """The kernel divided by what it was is one number for all elements, as far as float32 goes."""
    dense = keras.layers.Dense(64, dtype=policy)
    layer = wrapper(dense, power_iterations=5, dtype=policy)
    layer.build((None, 32))
    before = dense.kernel.numpy().astype("float64")
    x = np.ones((2, 32), "float32")
    for _ in range(20):
        layer(x, training=True)
    after = dense.kernel.numpy().astype("float64")
    assert np.linalg.norm(after, 2) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(after, before / np.linalg.norm(before, 2), rtol=1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_the_kernel_is_scaled_in_float32(policy):
    kernel_after_steps(layers.SpectralNormalization, policy)


@pytest.mark.stock_defect
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_stock_the_kernel_is_scaled_in_float32(policy):
    kernel_after_steps(keras.layers.SpectralNormalization, policy)


def small_update(wrapper):
    """An optimizer's step of a thousandth, between two normalizations, is in the kernel afterwards."""
    dense = keras.layers.Dense(1, use_bias=False, dtype="mixed_bfloat16")
    layer = wrapper(dense, power_iterations=5, dtype="mixed_bfloat16")
    layer.build((None, 2))
    dense.kernel.assign([[0.6], [0.8]])
    x = np.ones((1, 2), "float32")
    layer(x, training=True)
    dense.kernel.assign_add([[0.001], [0.0]])
    layer(x, training=True)
    expected = np.array([[0.601], [0.8]]) / np.hypot(0.601, 0.8)
    np.testing.assert_allclose(dense.kernel, expected, rtol=1e-5)


def test_small_updates_are_not_rounded_away():
    small_update(layers.SpectralNormalization)


@pytest.mark.stock_defect
def test_stock_small_updates_are_not_rounded_away():
    small_update(keras.layers.SpectralNormalization)


def kernels_over_the_range(wrapper, scale):
    dense = keras.layers.Dense(64, dtype="mixed_float16", kernel_initializer=keras.initializers.RandomNormal(0, scale))
    layer = wrapper(dense, power_iterations=20, dtype="mixed_float16")
    layer.build((None, 32))
    layer(np.ones((2, 32), "float32"), training=True)
    kernel = dense.kernel.numpy()
    assert np.isfinite(kernel).all()
    # Twenty iterations from a random vector: the value is found before the vector is.
    assert np.linalg.norm(kernel, 2) == pytest.approx(1, rel=2e-2)


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e5, 1e10])
def test_kernels_over_the_range_of_float32(scale):
    kernels_over_the_range(layers.SpectralNormalization, scale)


@pytest.mark.stock_defect
@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_stock_kernels_over_the_range_of_float32(scale):
    kernels_over_the_range(keras.layers.SpectralNormalization, scale)


def of_an_embedding(wrapper):
    embedding = keras.layers.Embedding(7, 3, dtype="mixed_float16")
    layer = wrapper(embedding, power_iterations=50, dtype="mixed_float16")
    y = layer(np.array([[1, 2]]), training=True)
    assert y.dtype == tf.float16
    np.testing.assert_allclose(y[0], embedding.embeddings.numpy()[1:3], atol=1e-3)


def test_of_an_embedding():
    of_an_embedding(layers.SpectralNormalization)


@pytest.mark.stock_defect
def test_stock_of_an_embedding():
    """The vectors become integers, as the indices are."""
    of_an_embedding(keras.layers.SpectralNormalization)


def test_a_kernel_of_zeros_stays_one():
    dense = keras.layers.Dense(3, kernel_initializer="zeros")
    layer = layers.SpectralNormalization(dense)
    layer.build((None, 2))
    before = layer.vector_u.numpy()
    layer(np.ones((1, 2), "float32"), training=True)
    np.testing.assert_array_equal(dense.kernel, np.zeros((2, 3)))
    np.testing.assert_array_equal(layer.vector_u, before)


def test_a_float32_input_reaches_a_float32_layer_as_it_is():
    layer = layers.SpectralNormalization(keras.layers.Dense(1, "tanh", dtype="float32"), dtype="mixed_float16")
    layer.build((None, 1))
    layer.layer.kernel.assign([[1.0]])
    y = layer(np.array([[1e-9], [1e5]], "float32"))
    assert y.dtype == tf.float16
    assert y.numpy().tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("make", [layers.SpectralNormalization, keras.layers.SpectralNormalization])
def test_errors_are_worded_as_keras_words_them(make):
    with pytest.raises(
        ValueError, match="`power_iterations` should be greater than zero. Received: `power_iterations=0`"
    ):
        make(keras.layers.Dense(1), power_iterations=0)
    with pytest.raises(ValueError, match="ReLU object has no attribute 'kernel' nor 'embeddings'"):
        make(keras.layers.ReLU())(keras.Input((2,)))
    with pytest.raises(ValueError, match="isn't a supported layer type"):
        make("Dense")
