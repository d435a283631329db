"""Largest values of windows: the contract, and replicas that were given no rows of a batch."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import POLICIES, Case, contract


def case(name, shape, *args, **kwargs):
    ours, stock = getattr(layers, name), getattr(keras.layers, name)
    return Case(lambda: ours(*args, **kwargs), lambda: stock(*args, **kwargs), [shape], masked=False)


CASES = {
    "1D same, overlapping": case("MaxPooling1D", (2, 7, 3), 3, strides=2, padding="same"),
    "2D": case("MaxPooling2D", (2, 5, 6, 3), (2, 3)),
    "2D channels_first": case("MaxPooling2D", (2, 3, 5, 7), 3, strides=2, data_format="channels_first"),
    "3D": case("MaxPooling3D", (2, 4, 2, 6, 3), 2),
}


def stock_can(name, policy):
    """TensorFlow has no kernel for 3D windows of float64 on a CPU, nor of float16."""
    return name != "3D" or policy in ("float32", "mixed_bfloat16")


@contract(CASES, stock_can)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def test_3d_windows_in_float16_are_those_in_float32():
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 6, 3)).astype("float16")
    layer = layers.MaxPooling3D((2, 3, 2), dtype="mixed_float16")
    results = []
    for call, given in ((layer, tf.constant(x)), (keras.layers.MaxPooling3D((2, 3, 2)), tf.constant(x, "float32"))):
        with tf.GradientTape() as tape:
            tape.watch(given)
            y = call(given)
        results.append((y, tape.gradient(y, given)))
    for one, other in zip(*results, strict=True):
        assert (one.dtype, other.dtype) == (tf.float16, tf.float32)
        np.testing.assert_array_equal(tf.cast(one, tf.float32), other)
    compiled = tf.function(layer, jit_compile=True)(tf.constant(x))
    np.testing.assert_array_equal(compiled, results[0][0])


@pytest.mark.stock_defect
def test_stock_3d_windows_run_in_float16():
    try:
        keras.layers.MaxPooling3D(2, dtype="mixed_float16")(tf.zeros((1, 4, 4, 4, 2), "float16"))
    except tf.errors.NotFoundError as error:
        raise AssertionError(str(error)) from None


@pytest.mark.parametrize(
    ("name", "policy"), [(name, policy) for name in CASES for policy in POLICIES if stock_can(name, policy)]
)
def test_no_rows_have_no_gradient(name, policy):
    keras.config.set_dtype_policy(policy)
    layer, (shape,) = CASES[name].ours(), CASES[name].shapes
    x = tf.zeros((0, *shape[1:]), layer.compute_dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    assert y.shape == (0, *layer.compute_output_shape(shape)[1:])
    assert tape.gradient(y, x).shape == x.shape


@pytest.mark.stock_defect
def test_stock_no_rows_have_no_gradient():
    program = (
        "import keras, tensorflow as tf\n"
        "layer = keras.layers.MaxPooling2D()\n"
        "@tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 1))])\n"
        "def gradient(x):\n"
        "    with tf.GradientTape() as tape:\n"
        "        tape.watch(x)\n"
        "        y = layer(x)\n"
        "    return tape.gradient(y, x)\n"
        "assert gradient(tf.zeros((0, 4, 4, 1))).shape == (0, 4, 4, 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("policy", [pytest.param("float32", marks=pytest.mark.slow), "mixed_bfloat16"])
def test_a_last_batch_of_one_row_trains_two_replicas_as_one_device(policy, mirrored):
    """The second is given no rows of it, which end Keras's layers with errors or with the process."""
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((9, 12, 12, 4)).astype("float32"), np.arange(9) % 3
    histories, weights = [], []
    for strategy in (tf.distribute.get_strategy(), mirrored(2)):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        with strategy.scope():
            inputs = keras.Input((12, 12, 4))
            h = layers.Conv2D(8, 3, activation="relu")(inputs)
            h = layers.MaxPooling2D()(h)
            h = layers.SeparableConv2D(6, 3, padding="same")(layers.Conv2D(8, 3, groups=8, padding="same")(h))
            h = layers.Conv2DTranspose(6, 2, strides=2)(layers.DepthwiseConv2D(3, strides=2)(h))
            outputs = layers.Dense(3, dtype="float32")(keras.layers.Flatten()(h))
            model = keras_mp.Model(inputs, outputs)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.05)), loss)
        history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        histories.append([*history.history["loss"], model.evaluate(x, y, batch_size=4, verbose=0)])
        assert model.predict(x, batch_size=4, verbose=0).shape == (9, 3)
        weights.append(model.get_weights())
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 2e-2}[policy]  # of bfloat16: products of two rows and of four
    np.testing.assert_allclose(histories[1], histories[0], rtol=tolerance)
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance * np.abs(one).max())
