"""One worker of `tests/training/test_multiworker.py`: `fit`, `evaluate` and `predict` of `keras_mp.Model`.

TF_CONFIG says which worker it is. The last line of its output is JSON.
"""

import argparse
import json
import os
import pathlib
import signal

import keras_mp  # isort: skip  (first, so that TensorFlow's banner stays out of the output)

import keras
import numpy as np
import tensorflow as tf

ROWS, BATCH = 41, 12  # of the last batch, of 5 rows, one worker has all or most, and the last one none
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
Y = (np.arange(ROWS) % 3).astype("int32")


def make_model(strategy, jit_compile, synchronized=True):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        inputs = keras.Input((4,))
        x = keras.layers.Dense(8, activation="tanh", kernel_regularizer="l2")(inputs)
        x = keras_mp.layers.BatchNormalization(synchronized=synchronized)(x)
        model = keras_mp.Model(inputs, keras.layers.Dense(3)(x))
        model.compile(
            keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=1024.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=jit_compile,
        )
    return model


def dataset(rows=ROWS):
    return tf.data.Dataset.from_tensor_slices((X[:rows], Y[:rows])).batch(BATCH)


def results(strategy):
    """Returns the results that are the same on all workers and on one device."""
    found = {}
    for jit_compile in (False, True):
        model = make_model(strategy, jit_compile)
        history = model.fit(
            dataset(), epochs=2, shuffle=False, verbose=0, validation_data=(X, Y), validation_batch_size=BATCH
        ).history
        bad = X[: 2 * BATCH].copy()
        bad[-1] = np.nan  # a row of the last worker's
        model.fit(bad, Y[: 2 * BATCH], batch_size=BATCH, shuffle=False, verbose=0)
        found[f"jit_compile={jit_compile}"] = {
            "history": history,
            "evaluate": model.evaluate(X, Y, batch_size=BATCH, verbose=0),
            "predict": model.predict(X, batch_size=BATCH, verbose=0).tolist(),
            "weights": [weight.tolist() for weight in model.get_weights()],
            "skipped": int(model.optimizer.skipped_steps),
            "scale": float(model.optimizer.loss_scale),
        }
    subclassed = Unbuilt()
    with strategy.scope():
        subclassed = Unbuilt()
        subclassed.compile("sgd", "mse")
    found["unbuilt"] = subclassed.predict(X, batch_size=BATCH, verbose=0).shape
    with strategy.scope():
        inputs = keras.Input((4,))
        model = keras_mp.Model(inputs, keras.layers.Dense(3, kernel_initializer="ones")(inputs))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
    weighted = {"x": X, "y": Y, "sample_weight": np.linspace(0, 2, ROWS)}  # the workers have not as much weight each
    model.fit(**weighted, batch_size=BATCH, shuffle=False, epochs=2, verbose=0)
    found["weighted"] = model.get_weights()[0].tolist()
    return found


class Unbuilt(keras_mp.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x)


class DieAt(keras.callbacks.Callback):
    """Ends this process as a machine does that loses its power."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.epoch and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(strategy, folder, dying_worker):
    """Trains for four epochs, on from the last backup if there is one; worker `dying_worker` dies in the third."""
    worker = strategy.cluster_resolver.task_id
    own = pathlib.Path(folder) / f"worker{worker}"
    own.mkdir(exist_ok=True)
    model = make_model(strategy, jit_compile=False, synchronized=False)
    # As on separate machines, only the chief can read the backup.
    callbacks = [
        keras.callbacks.BackupAndRestore(str(own / "backup"), delete_checkpoint=False),
        keras.callbacks.ModelCheckpoint(str(own / "model.keras")),
        keras.callbacks.CSVLogger(str(own / "log.csv"), append=True),
    ]
    if worker == dying_worker:
        callbacks.append(DieAt(2))
    model.fit(X, Y, batch_size=BATCH, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
    variables = [*model.variables, *model.optimizer.variables]
    return {
        "state": [variable.numpy().tolist() for variable in variables],
        "files": sorted(path.name for path in own.iterdir()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder")
    parser.add_argument("--dying-worker", type=int)
    options = parser.parse_args()
    strategy = keras_mp.strategy(timeout=120)
    printed = resumable(strategy, options.folder, options.dying_worker) if options.folder else results(strategy)
    print("\n" + json.dumps(printed), flush=True)
