"""The monitor in trainings whose numbers are known, and what stays as it is without and with it."""

import csv
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.diagnostics.monitor import PrecisionMonitor
from keras_mp.errors import ArgumentError, KerasMPWarning

X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(24, 2)).astype(np.float32)


def model_of(kind=keras.Model, policy="float32", optimizer=None, **compiled):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((4,))
    h = keras.layers.Dense(6, "relu", name="hidden")(inputs)
    model = kind(inputs, keras.layers.Dense(2, name="last", dtype="float32")(h), name="net")
    optimizer = optimizer or (
        keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.1)) if policy == "mixed_float16" else "sgd"
    )
    model.compile(optimizer, "mse", **{"jit_compile": False, **compiled})
    return model


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", [keras.Model, keras_mp.Model])
def test_every_so_many_steps_are_looked_at_and_the_weights_are_those_without(kind, jit_compile):
    models = [model_of(kind, "mixed_float16", jit_compile=jit_compile) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    monitor = PrecisionMonitor(every=4)
    for model, callbacks in zip(models, ([monitor], []), strict=True):
        model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    assert [each.step for each in monitor.history] == [0, 4, 8]
    for mine, theirs in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5 if jit_compile else 0, atol=1e-7 if jit_compile else 0)
    paths = {(each.path, each.what, each.dtype) for each in monitor.history[0].tensors}
    assert {("net/hidden", "output", "float16"), ("net/hidden", "gradient", "float16")} <= paths


def test_the_loss_scale_comes_to_the_logs(tmp_path):
    model = model_of(policy="mixed_float16")
    path = tmp_path / "log.csv"
    callbacks = [PrecisionMonitor(every=100), keras.callbacks.CSVLogger(str(path))]
    history = model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks)
    assert history.history["loss_scale"][-1] == float(model.optimizer.loss_scale)
    assert history.history["skipped_steps"][-1] == int(model.optimizer.skipped_steps)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [float(row["loss_scale"]) for row in rows] == history.history["loss_scale"]


def test_a_layer_whose_gradient_is_lost_is_named():
    model = model_of(policy="mixed_float16", optimizer=keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.0), 1.0))
    with pytest.warns(KerasMPWarning, match="gradient of net/hidden .*larger loss scale"):
        model.fit(X, Y, sample_weight=np.full(24, 1e-5, np.float32), verbose=0, callbacks=[PrecisionMonitor()])


def test_a_loss_that_departs_from_its_trend_is_told_once():
    model = model_of()
    y = np.repeat(Y, 20, 0)
    y[300:] += 100
    with pytest.warns(KerasMPWarning, match="standard deviations") as caught:
        model.fit(np.repeat(X, 20, 0), y, batch_size=4, shuffle=False, verbose=0, callbacks=[PrecisionMonitor(1000)])
    assert len([each for each in caught if "standard deviations" in str(each.message)]) == 1


def test_tensorboard_has_the_layers(tmp_path):
    model_of().fit(X, Y, verbose=0, callbacks=[PrecisionMonitor(every=1, log_dir=tmp_path)])
    tags = set()
    for file in tmp_path.iterdir():
        for record in tf.compat.v1.io.tf_record_iterator(str(file)):
            tags |= {value.tag for value in tf.compat.v1.Event.FromString(record).summary.value}
    assert {"precision/net/hidden/gradient/rms", "precision/net/last/output/largest"} <= tags


@pytest.mark.parametrize("kind", [keras.Model, keras_mp.Model])
def test_replicas_are_watched(kind, mirrored):
    with mirrored(2).scope():
        model = model_of(kind)
    monitor = PrecisionMonitor(every=2)
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[monitor])
    found = {each.path: each for each in monitor.history[0].tensors if each.what == "output"}
    assert len(monitor.history) == 2
    assert found["net/last"].rms > 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ArgumentError, match="at least 1"):
        PrecisionMonitor(every=0)


def test_a_healthy_training_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", KerasMPWarning)
        model_of(policy="mixed_float16").fit(
            np.tile(X, (20, 1)),
            np.tile(Y, (20, 1)),
            batch_size=8,
            epochs=2,
            verbose=0,
            callbacks=[PrecisionMonitor(10)],
        )
