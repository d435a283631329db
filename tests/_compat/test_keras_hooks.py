"""Hooks of training and calls. Each test fails with the private name in its docstring when that moves."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp._compat import keras_hooks, patches


def test_functions_are_called_around_epochs(monkeypatch):
    """Rests on `CallbackList.on_train_begin` and `on_epoch_end`, and on its `model`, which `fit` sets."""
    patches.install_on_first_use()
    for name in ("_begins", "_ends"):
        monkeypatch.setattr(keras_hooks, name, list(getattr(keras_hooks, name)))
    seen = []

    class Noting(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append("callback begins")

        def on_epoch_end(self, epoch, logs=None):
            seen.append("callback ends")

    keras_hooks.call_around_epochs(lambda model: seen.append(model), lambda model: seen.append((model, "ends")))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 1)), epochs=2, verbose=0, callbacks=[Noting()])
    end = ["callback ends", (model, "ends")]
    assert seen == [model, "callback begins", *end, *end]


def test_calls_and_losses_are_watched_and_let_go():
    """Rests on `keras.Operation.__call__` and `keras.Layer.add_loss`, which are replaced, and put back."""

    class Losing(keras.layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_sum(x))
            return x

    class Failing(keras.layers.Layer):
        def call(self, x):
            raise NotImplementedError

    losing, failing, seen = Losing(), Failing(), []

    def begins(operation, arguments):
        seen.append(("begins", operation))
        return operation

    inputs = keras.Input((2,))
    model = keras.Model(inputs, losing(inputs) + 1)
    addition = model.operations[-1]
    before = keras.Operation.__call__, keras.Layer.add_loss
    with keras_hooks.watched_calls(
        begins,
        lambda operation, outputs: seen.append(("ends", operation)),
        lambda operation: seen.append(("fails", operation)),
        lambda layer: seen.append(("loses", layer)),
    ):
        model(tf.ones((1, 2)))
        with pytest.raises(NotImplementedError):
            failing(tf.ones((1, 2)))
        thread = threading.Thread(target=lambda: losing(tf.ones((1, 2))))
        thread.start()
        thread.join()
    assert (keras.Operation.__call__, keras.Layer.add_loss) == before
    assert seen == [
        ("begins", model),
        ("begins", losing),
        ("loses", losing),
        ("ends", losing),
        ("begins", addition),
        ("ends", addition),
        ("ends", model),
        ("begins", failing),
        ("fails", failing),
    ]
