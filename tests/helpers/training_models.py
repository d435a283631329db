"""Data and models of the tests of training, in a module that pytest does not import under a second name."""

import functools

import keras
import numpy as np
import tensorflow as tf

ROWS, BATCH = 27, 8  # the last batch has three rows: two for one replica and one for the other
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
Y = (np.arange(ROWS) % 3).astype("int32")

CROSSENTROPY = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)


def strategy_over(replicas, mirrored):
    return tf.distribute.get_strategy() if replicas == 1 else mirrored(replicas)


def dense(units, **arguments):
    return keras.layers.Dense(units, activation="tanh", **arguments)


def classifier(model_type, batch_normalization=None, **arguments):
    inputs = keras.Input((4,))
    x = dense(8, **arguments)(inputs)
    if batch_normalization is not None:
        x = batch_normalization(x)
    return model_type(inputs, keras.layers.Dense(3)(x))
