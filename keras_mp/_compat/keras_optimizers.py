"""Keras optimizers: the variables and keys that they know."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

__all__ = [
    "built_already",
    "learning_rate_source",
    "renumber",
    "slot_of",
    "track",
    "trained_by",
    "update_count",
]


def renumber(
    optimizer: keras.optimizers.Optimizer,
    copy: keras.optimizers.Optimizer,
    originals: Iterable[keras.Variable],
    copy_of: Callable[[Any], Any],
) -> None:
    """Has a copy of an optimizer know the copies of variables by their own keys, in the strategy that it is made in.

    Args:
        optimizer: the original.
        copy: its copy, that knows variables by the keys of the originals.
        originals: variables, among them those that the optimizer was told to leave out of weight decay.
        copy_of: from a variable to its copy.
    """
    copy._distribution_strategy = tf.distribute.get_strategy()
    keys = {optimizer._var_key(variable): copy._var_key(copy_of(variable)) for variable in originals}
    # Variables that the model no longer has are known as well, by keys that no other variable gets.
    copy._trainable_variables_indices = {
        keys.get(key, key): index for key, index in optimizer._trainable_variables_indices.items()
    }
    if hasattr(optimizer, "_exclude_from_weight_decay"):
        copy._exclude_from_weight_decay = {keys[key] for key in optimizer._exclude_from_weight_decay if key in keys}
        copy._exclude_from_weight_decay_cache = {}


@contextlib.contextmanager
def built_already(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Inside, `build` of an optimizer does nothing: not all of Keras's ask whether they are built."""
    vars(optimizer)["build"] = lambda variables: None
    try:
        yield
    finally:
        del vars(optimizer)["build"]


def trained_by(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built on."""
    return list(optimizer._trainable_variables)


def learning_rate_source(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the variable or the schedule of the learning rate.

    The public `learning_rate` of a schedule is its value at the current step.
    """
    return optimizer._learning_rate


def slot_of(optimizer: keras.optimizers.Optimizer, name: str, variable: Any) -> keras.Variable:
    """Returns the slot that an optimizer keeps for one variable. Only the momentums of SGD have a public name.

    Args:
        optimizer: a built optimizer.
        name: `"accumulators"` of Adagrad; `"momentums"` or `"velocities"` of Adam.
        variable: a variable that the optimizer was built on, or what Keras's `update_step` gets in its place.
    """
    slots = optimizer.momentums if name == "momentums" and hasattr(optimizer, name) else vars(optimizer)[f"_{name}"]
    return slots[optimizer._get_variable_index(variable)]


def track(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> None:
    """Adds a variable that exists already to those that are saved. The public `add_variable` only creates new ones."""
    optimizer._track_variable(variable)


def update_count(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Returns the count of all training steps.

    The public `iterations` counts the updates only, of several steps each where gradients are accumulated.
    """
    return optimizer._iterations
