"""What holds for all layers alike, and models of several of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from tests.contract.layer_contract import assert_close


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float64"])
@pytest.mark.parametrize("layer", [layers.Softmax, layers.LayerNormalization, layers.BatchNormalization])
def test_an_input_of_another_dtype_is_not_rounded_to_it(layer, policy):
    """A bfloat16 input gives the full precision of the compute dtype, and a float64 one is computed in float64."""
    x = tf.constant([[1.0, 2.0], [2.0, 5.0], [3.0, 7.0]], "bfloat16")
    compute_dtype = keras.dtype_policies.get(policy).compute_dtype
    call = {"training": True} if layer is layers.BatchNormalization else {}
    expected = getattr(keras.layers, layer.__name__)(dtype="float64")(tf.cast(x, "float64"), **call)
    for given in (x, tf.cast(x, "float64")):
        actual = layer(dtype=policy)(given, **call)
        assert actual.dtype == compute_dtype
        assert_close(actual, expected, {"float32": 1e-6, "float16": 5e-4, "float64": 1e-12}[compute_dtype])


# The stock model has Keras's own wrapper, of which we warn.
@pytest.mark.filterwarnings("ignore:.*computes in float16, and:keras_mp.errors.KerasMPWarning")
@pytest.mark.parametrize(
    ("policy", "jit_compile"), [("float32", False), ("mixed_bfloat16", False), ("mixed_float16", True)]
)
def test_a_model_of_these_layers_trains_as_the_stock_one(policy, jit_compile):
    def losses(family):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                keras.layers.Conv2D(8, 3),
                family.BatchNormalization(),
                keras.layers.Flatten(),
                family.LayerNormalization(),
                keras.layers.Dense(3),
                family.Softmax(),
            ]
        )
        model.compile("sgd", keras.losses.CategoricalCrossentropy(), jit_compile=jit_compile)
        return model.fit(x, labels, batch_size=16, epochs=2, shuffle=False, verbose=0).history["loss"]

    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(64, 6, 6, 2)), np.eye(3)[rng.integers(0, 3, 64)]
    keras.config.set_dtype_policy(policy)
    tolerance = {"float32": 1e-5, "mixed_float16": 5e-3, "mixed_bfloat16": 4e-2}[policy]
    np.testing.assert_allclose(losses(layers), losses(keras.layers), rtol=tolerance)


def test_exported_without_keras(tmp_path):
    """A SavedModel with the custom gradients and the fused kernel answers as the model does."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.BatchNormalization(),
            layers.LayerNormalization(),
            layers.Softmax(),
            layers.Float32(keras.layers.Dense(2)),
        ]
    )
    x = tf.random.normal((2, 4, 4, 3))
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-6)
