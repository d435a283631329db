"""Names of attributes that Keras keeps for itself: each test fails when Keras renames one."""

import keras
import pytest
import tensorflow as tf

from keras_mp._compat import keras_attributes


def trained(compiled=True):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    if compiled:
        model.compile("sgd", "mse", metrics=["mse"], jit_compile=False)
        model.fit(tf.ones((2, 2)), tf.ones((2, 1)), verbose=0)
    return model


@pytest.mark.parametrize("name", keras_attributes.names_of_any_class())
def test_every_layer_has_what_any_class_takes_over(name):
    assert name in vars(trained().layers[0]) or hasattr(keras.Layer, name)


def test_layers_have_what_their_constructor_sets():
    assert {"_tracker", "_dtype_policy", "built"} <= keras_attributes.names_of_layers()


def test_compile_sets_the_optimizer_and_nothing_of_the_layers():
    names = keras_attributes.names_set_by_compile()
    assert {"optimizer", "_compile_config"} <= names
    assert not names & set(vars(keras.layers.Dense(1)))


@pytest.mark.parametrize(
    "name", ["_compile_loss", "_compile_metrics", "_loss_tracker", "compiled", "train_function", "_distribute_strategy"]
)
def test_a_model_has_what_libraries_keep_on_it(name):
    model = trained()
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        there = {*vars(model), *vars(trained(compiled=False))}
    assert name in there
    assert keras_attributes.is_kept_by_libraries(model, name)


def test_what_a_user_sets_is_not_kept_by_libraries():
    model = trained()
    model.threshold = 0.5
    assert not keras_attributes.is_kept_by_libraries(model, "threshold")
