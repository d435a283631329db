"""The program of `tests/optimizers/test_resume.py`, which is killed while it trains and started again.

`python -m tests.programs.resume KILLS FOLDER` trains twice. The first training is undisturbed and leaves its last state
in FOLDER/never.npz. The second one is a row of processes and leaves its state in FOLDER/killed.npz. The first KILLS of
them die of SIGKILL at random moments. Each process is a fork of this one, made before TensorFlow's runtime starts, so
that the slow import happens once.
"""

import os
import pathlib
import random
import signal
import sys
import threading
import time

import keras_mp  # isort: skip  (first, so that TensorFlow's banner stays out of the output)

import keras
import numpy as np

STEPS = 10
BATCH = 4


def epochs_for(kills):
    """A process is killed before its second epoch ends, so this many are never done before the last kill."""
    return kills + 2


def make_model():
    """Returns a model whose optimizer has every kind of state: slots, averages, accumulators, Nadam's momenta.

    There is no dropout in it: Keras 3.15 puts the state of random layers in no weights file.
    """
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32, "tanh"), keras.layers.Dense(1)])
    inner = keras.optimizers.Nadam(
        0.01, gradient_accumulation_steps=3, use_ema=True, ema_overwrite_frequency=5, global_clipnorm=1.0
    )
    model.compile(keras_mp.LossScaleOptimizer(inner, dynamic_growth_steps=7, hysteresis=2), loss="mse")
    return model


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Keras's, which tells when it saves: it writes over the file that it would restore, in two parts."""

    def __init__(self, folder):
        super().__init__(folder, save_freq="epoch", delete_checkpoint=False)
        self.saving = threading.Lock()

    def on_epoch_end(self, epoch, logs=None):
        with self.saving:
            super().on_epoch_end(epoch, logs)


class Killer(keras.callbacks.Callback):
    """Kills this process from another thread, at a random time in the epoch it starts with or the next."""

    def __init__(self, saving):
        super().__init__()
        self.saving, self.batches_left = saving, random.randrange(2 * STEPS - 2)

    def on_train_batch_begin(self, batch, logs=None):
        if self.batches_left == 0:
            threading.Thread(target=self.kill, args=(random.uniform(0, 0.01),), daemon=True).start()
        self.batches_left -= 1

    def on_epoch_end(self, epoch, logs=None):
        # A fast machine may be here before the thread is. The second epoch must not be done.
        if self.batches_left < 0:
            self.kill(0)

    def kill(self, seconds):
        time.sleep(seconds)
        with self.saving:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, epochs, killed, result):
    rows = np.random.default_rng(0)
    x = rows.normal(size=(STEPS * BATCH, 8)).astype("float32")
    y = rows.normal(size=(STEPS * BATCH, 1)).astype("float32")
    x[5 * BATCH] = np.nan  # one batch in each epoch is skipped
    model = make_model()
    backup = BackupAndRestore(folder)
    # Last, as Keras runs callbacks in order and what is killed at the end of an epoch has been saved.
    callbacks = [backup, Killer(backup.saving)] if killed else [backup]
    model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0)
    state = [*model.variables, *model.optimizer.variables]
    np.savez(result, **{str(number): variable.numpy() for number, variable in enumerate(state)})


def in_a_fork(*arguments):
    """Runs `train` in a child process; returns the signal that killed it, or 0."""
    child = os.fork()
    if not child:
        status = 1
        try:
            train(*arguments)
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        sys.exit("training failed")
    return 0


def main(kills, folder):
    folder = pathlib.Path(folder)
    epochs = epochs_for(kills)
    in_a_fork(folder / "backup never", epochs, False, folder / "never.npz")
    for _ in range(kills):
        if in_a_fork(folder / "backup", epochs, True, folder / "killed.npz") != signal.SIGKILL:
            sys.exit("training ended before it was killed")
    in_a_fork(folder / "backup", epochs, False, folder / "killed.npz")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
