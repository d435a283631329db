"""The functions that Keras's loops call for each batch, of one replica or several."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_models
from keras_mp.distribution import workers

__all__ = ["keras_compiling", "make_function_of"]


def make_function_of(model: keras.Model, step: Any, is_ours: bool) -> Any:
    """What Keras's loops call for each batch, or several.

    Args:
        model: the model.
        step: its method for the rows of one replica.
        is_ours: whether that is the method of `keras_mp.Model`, and no other class's.
    """
    strategy = model.distribute_strategy
    several_workers = workers.is_one_of_several(strategy)

    def on_replica(data: Any) -> Any:
        logs = step(data)
        # Keras averages what workers answer over an axis that a scalar does not have.
        return keras.tree.map_structure(lambda value: tf.reshape(value, [1]), logs) if several_workers else logs

    # Around all replicas XLA compiles nothing; a step that is not ours it compiles as a whole where there is one.
    with keras_compiling(model, not is_ours and strategy.num_replicas_in_sync == 1):
        function = keras_models.make_function(model, on_replica)
    # Keras's loop in a graph over `steps_per_execution` batches loses what replicas capture in it.
    in_python = strategy.num_replicas_in_sync > 1 and not isinstance(strategy, tf.distribute.TPUStrategy)
    return functools.partial(_one_by_one, model, function) if in_python else function


def _one_by_one(model: keras.Model, function: Any, iterator: Any) -> Any:
    steps, model.steps_per_execution = model.steps_per_execution, 1
    try:
        logs = function(iterator)
        for _ in range(steps - 1):
            try:
                logs = function(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                break
    finally:
        model.steps_per_execution = steps
    return logs


@contextlib.contextmanager
def keras_compiling(model: keras.Model, wanted: bool) -> Iterator[None]:
    """Has Keras compile functions made in the block as a whole, where it was asked to and that is wanted."""
    asked = model.jit_compile
    model.jit_compile = asked and wanted
    try:
        yield
    finally:
        model.jit_compile = asked
