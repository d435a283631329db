import keras
import numpy as np

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
