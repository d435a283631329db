"""Keras models. Each test fails with the private name in its docstring when that moves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp._compat import keras_models


def test_without_remat_leaves_the_scopes_mode_as_it_was():
    """Rests on `keras.Operation._remat_mode`."""
    with keras.RematScope(mode="full"):
        inputs = keras.Input((2,))
        model = keras.Model(inputs, keras.layers.Dense(2, name="d")(inputs) + 1)
    call = tf.function(lambda x: model(x, training=False))
    with keras_models.without_remat(model):
        call(tf.ones((1, 2)))
    assert model.get_layer("d")._remat_mode.mode == "full"
    with pytest.raises(ValueError, match="keywords"):  # the day Keras mends it there is no need of it
        tf.function(lambda x: model(x, training=False))(tf.ones((1, 2)))


def test_the_maker_of_a_symbolic_tensor_is_found():
    """Rests on `KerasTensor._keras_history`."""
    layer = keras.layers.Dense(2)
    assert keras_models.origin(layer(keras.Input((2,)))) is layer
    assert isinstance(keras_models.origin(keras.ops.exp(keras.Input((2,)))), keras.Operation)


def test_compile_arguments_are_the_objects_that_were_given():
    """Rests on `Model._compile_config`."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    optimizer, loss = keras.optimizers.SGD(), lambda y, p: tf.reduce_sum(y - p)
    model.compile(optimizer, loss, steps_per_execution=3)
    arguments = keras_models.compile_arguments(model)
    assert (arguments["optimizer"], arguments["loss"], arguments["steps_per_execution"]) == (optimizer, loss, 3)


def test_a_graph_runs_with_other_operations():
    """Rests on `Functional._run_through_graph` and its arguments `operation_fn` and `call_fn`."""
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((2,), name="b")}
    layer = keras.layers.Dense(3)
    model = keras.Model(inputs, [layer(keras.layers.Add()([inputs["a"], inputs["b"]]))])
    assert isinstance(model, keras_models.Functional)
    wider = keras.layers.Dense(5)
    (output,) = keras_models.run_through_graph(
        model,
        {name: keras.Input((2,)) for name in inputs},
        lambda operation: wider if operation is layer else operation,
        lambda operation, *args, **kwargs: operation(*args, **kwargs),
    )
    assert output.shape == (None, 5)
    assert keras_models.origin(output) is wider


def test_layers_that_prepare_data_are_told_from_others():
    """Rests on the bases of `Rescaling` and `StringLookup`."""
    classes = keras_models.preprocessing_classes()
    names = ("RandomFlip", "Rescaling", "Resizing", "CenterCrop", "MixUp", "RandAugment", "AutoContrast", "Hashing")
    names += ("IntegerLookup", "StringLookup", "TextVectorization", "CategoryEncoding", "Discretization")
    assert not [name for name in names if not issubclass(getattr(keras.layers, name), classes)]
    others = ("Dense", "Conv2D", "Embedding", "Dropout", "BatchNormalization", "Add")
    assert not [name for name in others if issubclass(getattr(keras.layers, name), classes)]


def test_keras_keeps_the_first_batch_of_a_generator():
    """Rests on `data_adapter._first_batches` of Keras's iterator over epochs."""
    seen = []

    class Seeing(keras.Model):
        def _maybe_symbolic_build(self, iterator=None, data_batch=None):
            seen.append(keras_models.first_of_generator(iterator))

        def call(self, x):
            return x

    model = Seeing()
    model.compile(loss="mse")
    x = np.ones((2, 3), "float32")
    model.evaluate((batch for batch in [(x, x)]), steps=1, verbose=0)
    model.evaluate(x, x, verbose=0)
    assert seen[0][0] is x
    assert seen[1] is None


def test_a_symbolic_tensor_tells_its_inputs():
    """Rests on `_keras_history` and `_inbound_nodes`."""
    a, b, _ = keras.Input((2,)), keras.Input((2,)), keras.Input((2,))
    assert {id(each) for each in keras_models.sources(keras.layers.Dense(1)(a + b) + a)} == {id(a), id(b)}
