"""Keras layers. Each test fails with the private name in its docstring when that moves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_variables


def test_keras_attaches_masks_and_logits_where_they_are_looked_for():
    masked = keras.layers.Masking()(np.array([[[1.0], [0.0]]], "float32"))
    np.testing.assert_array_equal(keras_layers.mask_of(masked), [[True, False]])
    logits = tf.constant([[0.0, 30.0]])
    probabilities = keras.activations.softmax(logits)
    assert keras_layers.logits_of(probabilities) is logits
    assert keras_layers.logits_of(logits) is keras_layers.mask_of(logits) is None
    # Keras reads what is attached here: the mask leaves the second entry out, and log(1e-7) is not all that is seen.
    values = keras_layers.with_mask(tf.constant([[[1.0], [5.0]]]), tf.constant([[True, False]]))
    # Keras 3.12 divides by one and an epsilon.
    assert float(keras.losses.MeanAbsoluteError()(tf.zeros((1, 2, 1)), values)) == pytest.approx(1)
    copied = keras_layers.with_logits(tf.identity(probabilities), logits)
    np.testing.assert_allclose(keras.losses.sparse_categorical_crossentropy(np.array([0]), copied), [30.0], rtol=1e-6)


class Scaled(keras.layers.Layer):
    """Has no `get_config`, so that Keras keeps the arguments."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.inside = [keras.layers.Dense(2, name="dense")]

    def build(self, input_shape):
        self.inside[0].build(input_shape)

    def call(self, inputs):
        return self.factor * inputs


def test_the_arguments_that_keras_keeps_are_read_and_set():
    """Rests on `Layer._auto_config` and `keras.src.saving.serialization_lib.SerializableDict`."""
    layer = Scaled(3, name="scaled")
    assert keras_layers.auto_config(layer) == {"factor": 3}
    keras_layers.set_auto_config(layer, {"factor": 5})
    assert layer.get_config() == {"name": "scaled", "factor": 5} | {
        key: value for key, value in layer.get_config().items() if key not in ("name", "factor")
    }
    assert Scaled.from_config(layer.get_config()).factor == 5
    keras_layers.set_auto_config(layer, None)
    assert keras_layers.auto_config(layer) is None
    with pytest.raises(NotImplementedError):
        layer.get_config()


def test_layers_are_found_by_path():
    """Rests on `Layer._layers`."""
    shared = keras.layers.Dense(2, name="shared")
    model = keras.Sequential([keras.Input((2,), name="x"), shared, Scaled(3, name="scaled"), shared], name="model")
    inside = ("/x", "/shared", "/scaled", "/scaled/dense")
    assert set(keras_layers.layers_by_path(model)) == {f"model{path}" for path in ("", *inside)}
    assert keras_layers.layers_by_path(model)["model/scaled/dense"] is model.layers[1].inside[0]
    assert keras_layers.inner_layers(shared) == []


def test_the_cell_of_convolutional_lstms_is_the_class_that_its_layers_make():
    """Rests on `keras.src.layers.rnn.conv_lstm.ConvLSTMCell`."""
    for name in ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"):
        assert type(getattr(keras.layers, name)(1, 1).cell) is keras_layers.ConvLSTMCell


def test_what_is_tracked_is_listed_and_set():
    """Rests on `_tracker` of layers and optimizers: its `config`, `stored_ids`, `locked` and `_lock_violation_msg`."""
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    assert keras_layers.tracked(layer)["trainable_variables"] == [layer.kernel, layer.bias]
    keras_layers.set_tracked(layer, "trainable_variables", [layer.bias, layer.kernel])
    assert layer.weights == [layer.bias, layer.kernel]
    with keras_layers.unlocked(layer):
        layer.other = keras.layers.Dense(1)
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.another = keras.layers.Dense(1)
    open_layer = keras.layers.Dense(2)
    keras_layers.lock_alike(open_layer, layer)
    layer.another = keras.layers.Dense(1)
    optimizer = keras.optimizers.SGD()
    assert optimizer.iterations in keras_layers.tracked(optimizer)["variables"]
    assert keras_layers.is_tracker(optimizer._tracker)
    assert not keras_layers.is_tracker(layer)
    assert keras_layers.tracker_like(optimizer._tracker, list).is_in_store("variables", optimizer.iterations)


def test_attributes_of_keras_and_tensorflow_are_told_from_others():
    """Rests on `_path`, `_dtype_policy`, `_remat_mode` and `_self_unconditional_dependency_names`."""
    with keras.RematScope("full"):
        layer = keras.layers.Dense(2)
    layer.build((None, 3))
    settings = keras_layers.own_settings(layer, vars(keras.layers.Layer()))
    assert settings["_remat_mode"].mode == "full"
    assert settings["built"] is True
    assert "_layers" not in settings
    keras_layers.set_dtype_policy(layer, keras.DTypePolicy("mixed_bfloat16"))
    assert layer.compute_dtype == "bfloat16"
    keras_variables.set_path(layer.kernel, "a/kernel")
    assert layer.kernel.path == "a/kernel"
    layer._self_attention = 3
    assert "_self_attention" not in keras_layers.names_of_tensorflow()
    assert "_self_setattr_tracking" in keras_layers.names_of_tensorflow()
    assert keras_layers.checkpointed(layer, "_kernel")
    assert not keras_layers.checkpointed(layer, "_self_attention")
    keras_layers.without_attribute(layer, "_self_attention")
    assert not hasattr(layer, "_self_attention")


@pytest.mark.parametrize("dense", [False, True])
def test_tables_are_copied(dense):
    """Rests on `_default_value`, `_empty_key` and `_deleted_key` of lookup tables."""
    if dense:
        table = tf.lookup.experimental.DenseHashTable(tf.int64, tf.float32, -1.0, empty_key=0, deleted_key=-1)
    else:
        table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
    table.insert(tf.constant([5, 6], tf.int64), [1.0, 2.0])
    copy = keras_layers.copy_of_table(table)
    table.insert(tf.constant([5], tf.int64), [9.0])
    assert copy.lookup(tf.constant([5, 6, 7], tf.int64)).numpy().tolist() == [1.0, 2.0, -1.0]


def test_is_trackable_knows_what_checkpoints_hold():
    """Rests on `tf.__internal__.tracking.Trackable`."""
    assert keras_layers.is_trackable(tf.Variable(1.0))
    assert keras_layers.is_trackable(tf.train.Checkpoint())
    assert not keras_layers.is_trackable(object())
