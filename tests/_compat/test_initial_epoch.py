import keras
import numpy as np
import pytest

from keras_mp._compat import keras_models


class Epochs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_begin(self, logs=None):
        assert keras_models.initial_epoch(self.model) == 0
        keras_models.set_initial_epoch(self.model, 2)

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(epoch)


def test_fit_begins_with_the_epoch_that_a_callback_sets():
    """Rests on `_initial_epoch` of Keras's trainer."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    epochs = Epochs()
    model.fit(np.ones((2, 2)), np.ones((2, 1)), epochs=4, verbose=0, callbacks=[epochs])
    assert epochs.seen == [2, 3]


def test_backup_and_restore_sets_the_same_attribute(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)

    class Stops(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise InterruptedError

    x, y = np.ones((2, 2)), np.ones((2, 1))
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(InterruptedError):
        model.fit(x, y, epochs=4, verbose=0, callbacks=[backup, Stops()])
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append(keras_models.initial_epoch(self.model))

    model.fit(x, y, epochs=3, verbose=0, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Looks()])
    assert seen[0] > 0
