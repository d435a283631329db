"""`keras_mp.Model` with replicas under XLA, and what users bring to `fit`: kinds of data, callbacks, odd turns.

One model serves many cases, since what takes the time is to trace and compile it.
"""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.errors import DistributionError
from tests.helpers.training_models import BATCH, CROSSENTROPY, ROWS, X, Y, classifier, strategy_over


@pytest.fixture(scope="module")
def model(mirrored):
    keras.utils.set_random_seed(0)
    with mirrored(2).scope():
        model = classifier(keras_mp.Model)
        model.compile(
            keras_mp.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
            CROSSENTROPY(),
            metrics=["accuracy"],
            jit_compile=True,
        )
    model.fit(X, Y, batch_size=BATCH, verbose=0)
    model.start = [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]
    return model


def fit(model, *args, epochs=2, **kwargs):
    """Weights and history of a fit that begins where all others do."""
    model.stop_training = False
    for variable, value in zip((*model.variables, *model.optimizer.variables), model.start, strict=True):
        variable.assign(value)
    history = model.fit(*args, epochs=epochs, verbose=0, **kwargs).history
    return model.get_weights(), history


def dataset(rows=ROWS):
    return tf.data.Dataset.from_tensor_slices((X[:rows], Y[:rows]))


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return -(-ROWS // BATCH)

    def __getitem__(self, index):
        part = slice(index * BATCH, (index + 1) * BATCH)
        return X[part], Y[part]


def of_generator():
    signature = (tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int32))
    return tf.data.Dataset.from_generator(lambda: iter(list(Sequence())), output_signature=signature)


def for_ever():
    while True:
        yield from Sequence()


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_every_kind_of_data_trains_alike(model):
    expected_weights, expected = fit(model, X, Y, batch_size=BATCH, shuffle=False)
    assert expected["loss"][1] < expected["loss"][0]
    distribute = model.distribute_strategy.experimental_distribute_dataset
    kinds = {
        "dataset": ((dataset().batch(BATCH),), {}),
        "dataset of unknown cardinality": ((of_generator(),), {}),
        "endless dataset": ((dataset().batch(BATCH).repeat(),), {"steps_per_epoch": 4}),
        "generator": ((for_ever(),), {"steps_per_epoch": 4}),
        "PyDataset": ((Sequence(),), {}),
        "distributed dataset": ((distribute(dataset().batch(BATCH)),), {}),
        "tensors": ((tf.constant(X), tf.constant(Y)), {"batch_size": BATCH}),
    }
    for name, (args, kwargs) in kinds.items():
        weights, history = fit(model, *args, **kwargs, shuffle=False)
        for mine, theirs in zip(weights, expected_weights, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-6, err_msg=name)


def test_each_replica_can_be_given_batches_of_its_own(model):
    def batches(context):
        shard = dataset(24).shard(context.num_input_pipelines, context.input_pipeline_id)
        return shard.batch(context.get_per_replica_batch_size(BATCH)).repeat()

    own = model.distribute_strategy.distribute_datasets_from_function(batches)
    weights, _ = fit(model, own, steps_per_epoch=3, shuffle=False)
    for mine, theirs in zip(weights, fit(model, X[:24], Y[:24], batch_size=BATCH, shuffle=False)[0], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_part_of_the_data_validates(model):
    _, history = fit(model, X, Y, batch_size=BATCH, validation_split=0.3, shuffle=False)
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    loss, accuracy = model.evaluate(X[18:], Y[18:], batch_size=9, verbose=0)
    np.testing.assert_allclose([history["val_loss"][-1], history["val_accuracy"][-1]], [loss, accuracy], rtol=1e-6)


def test_fitting_again_and_again_traces_nothing_anew(model):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    tf.get_logger().addHandler(handler)
    try:
        for _ in range(7):
            fit(model, X, Y, batch_size=BATCH, epochs=1)
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [each for each in said if "retracing" in each]


class StopAfterOneBatch(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = True


def test_callbacks_stop_and_steer(model):
    start = model.start[0]
    weights, history = fit(model, X, Y, batch_size=BATCH, epochs=5, shuffle=False, callbacks=[StopAfterOneBatch()])
    assert len(history["loss"]) == 1
    once = fit(model, X[:BATCH], Y[:BATCH], batch_size=BATCH, epochs=1)[0]
    np.testing.assert_allclose(weights[0], once[0], rtol=1e-6)
    early = keras.callbacks.EarlyStopping("loss", patience=1, min_delta=10, restore_best_weights=True)
    _, history = fit(model, X, Y, batch_size=BATCH, epochs=5, callbacks=[early])
    assert len(history["loss"]) == 2
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0)
    assert (fit(model, X, Y, batch_size=BATCH, callbacks=[schedule])[0][0] == start).all()


def test_weights_that_are_loaded_between_fits_are_trained_on(model, tmp_path):
    path = tmp_path / "model.weights.h5"
    fit(model, X, Y, batch_size=BATCH, epochs=1, shuffle=False)
    model.save_weights(path)
    runs = []
    for _ in range(2):
        model.load_weights(path)
        history = model.fit(X, Y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0).history
        runs.append((history["loss"], [weight.tolist() for weight in model.get_weights()]))
    assert runs[0] == runs[1]


def test_wrong_data_is_told_by_keras(model):
    with pytest.raises(ValueError, match="expected shape=.None, 4., found shape"):
        model.fit(np.ones((8, 5)), np.ones(8), batch_size=8, verbose=0)
    with pytest.raises(ValueError, match="Data cardinality is ambiguous"):
        model.fit(np.ones((8, 4)), np.ones(7), batch_size=8, verbose=0)


# --- models of their own ---------------------------------------------------------------------------------------------


def test_ragged_rows_train_as_in_stock_keras(mirrored):
    rows = tf.ragged.constant([[1, 2], [3], [4, 5, 6], [1], [2, 2], [7], [8], [9, 1]])
    found = []
    for model_type, replicas, jit_compile in ((keras.Model, 1, False), (keras_mp.Model, 2, True)):
        keras.utils.set_random_seed(0)
        with strategy_over(replicas, mirrored).scope():
            inputs = keras.Input((None,), dtype="int32")
            x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(10, 4)(inputs))
            model = model_type(inputs, keras.layers.Dense(3)(x))
            model.compile(keras.optimizers.SGD(0.1), CROSSENTROPY(), jit_compile=jit_compile)
        batches = tf.data.Dataset.from_tensor_slices((rows, Y[:8])).ragged_batch(4)
        found.append((model.fit(batches, shuffle=False, verbose=0).history["loss"], model.get_weights()))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    for mine, theirs in zip(found[1][1], found[0][1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_model_is_compiled_again_outside_its_scope_by_names(mirrored):
    """What is named by a string is made where the model was."""
    with mirrored(2).scope():
        model = classifier(keras_mp.Model)
    for frozen in (False, True):
        model.layers[1].trainable = not frozen
        model.compile("adam", CROSSENTROPY(), metrics=["accuracy"], jit_compile=True)
        before = model.layers[1].get_weights()[0]
        model.fit(X, Y, batch_size=BATCH, verbose=0)
        assert (model.layers[1].get_weights()[0] == before).all() == frozen
    with pytest.raises(DistributionError, match="The optimizer was made outside any strategy's scope"):
        model.compile(keras.optimizers.Adam(), CROSSENTROPY())


@pytest.mark.filterwarnings("ignore:If `run_eagerly` is True")
def test_the_reason_tells_of_eager_steps_and_of_steps_of_ones_own(mirrored):
    model = classifier(keras_mp.Model)
    model.compile("sgd", CROSSENTROPY(), jit_compile=True, run_eagerly=True)
    assert not model.jit_compile
    assert model.jit_compile_reason == "not compiled: run_eagerly=True runs op by op"

    class Own(keras_mp.Model):
        def train_step(self, data):
            return super().train_step(data)

    with mirrored(2).scope():
        model = classifier(Own)
        model.compile("sgd", CROSSENTROPY(), jit_compile=True)
    assert "the forward and backward pass of `super().train_step`" in model.jit_compile_reason


def test_a_stock_model_made_outside_comes_into_the_scope_as_a_copy(mirrored):
    stock = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(3)])
    with mirrored(2).scope():
        with pytest.raises(DistributionError, match=r"keras_mp.Model.from_model\(keras_mp.convert\(model, .float32"):
            keras_mp.Model.from_model(stock)
        model = keras_mp.Model.from_model(keras_mp.convert(stock, "float32"))
    again = keras_mp.Model.from_model(model)  # outside, it is of the scope that the layers were made in
    again.compile("sgd", CROSSENTROPY(), jit_compile=True)
    np.testing.assert_allclose(again.predict(X, verbose=0), stock.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    again.fit(X, Y, batch_size=BATCH, verbose=0)
    assert not np.allclose(again.get_weights()[0], stock.get_weights()[0])


def test_a_conversion_keeps_what_compile_was_asked(mirrored):
    with mirrored(2).scope():
        model = classifier(keras_mp.Model)
        model.compile(keras.optimizers.SGD(0.1), CROSSENTROPY(), jit_compile=True)
    model.predict(X, verbose=0)
    with mirrored(2).scope():
        converted = keras_mp.convert(model, "mixed_bfloat16")
    assert isinstance(converted, keras_mp.Model)
    assert converted.jit_compile
    assert converted.jit_compile_reason == model.jit_compile_reason
    before = converted.get_weights()[0]
    converted.fit(X, Y, batch_size=BATCH, verbose=0)
    assert (converted.get_weights()[0] != before).any()
    assert (model.get_weights()[0] == before).all()
