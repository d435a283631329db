"""Keras optimizers: the variables and keys that they know."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat.replacing import replaced

__all__ = [
    "adding_variables_in",
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
    """Makes a copy of an optimizer know the copies of variables by their own keys, in the current strategy.

    Args:
        optimizer: the original.
        copy: its copy, which still knows variables by the keys of the originals.
        originals: the variables, including the ones excluded from weight decay.
        copy_of: maps a variable to its copy.
    """
    copy._distribution_strategy = tf.distribute.get_strategy()
    keys = {optimizer._var_key(variable): copy._var_key(copy_of(variable)) for variable in originals}
    # Variables that the model no longer has keep their keys, which no other variable gets.
    copy._trainable_variables_indices = {
        keys.get(key, key): index for key, index in optimizer._trainable_variables_indices.items()
    }
    if hasattr(optimizer, "_exclude_from_weight_decay"):
        copy._exclude_from_weight_decay = {keys[key] for key in optimizer._exclude_from_weight_decay if key in keys}
        copy._exclude_from_weight_decay_cache = {}


@contextlib.contextmanager
def built_already(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Inside, an optimizer's `build` does nothing. Not all of Keras's optimizers check whether they are built."""
    vars(optimizer)["build"] = lambda variables: None
    try:
        yield
    finally:
        del vars(optimizer)["build"]


def trained_by(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Returns the variables on which an optimizer was built."""
    return list(optimizer._trainable_variables)


# Gets the dtype and the name of a new variable, returns its dtype.
_DtypeOf = Callable[[str, str | None], str]

_dtype_of: contextvars.ContextVar[_DtypeOf | None] = contextvars.ContextVar("_dtype_of", default=None)

_add_variable = keras.optimizers.Optimizer.add_variable


def _add_variable_in(
    self: keras.optimizers.Optimizer,
    shape: Any,
    initializer: Any = "zeros",
    dtype: Any = None,
    *args: Any,
    **kwargs: Any,
) -> keras.Variable:
    dtype_of = _dtype_of.get()
    if dtype is not None and dtype_of is not None:
        dtype = dtype_of(keras.backend.standardize_dtype(dtype), kwargs.get("name"))
    return _add_variable(self, shape, initializer, dtype, *args, **kwargs)


@contextlib.contextmanager
def adding_variables_in(dtype_of: _DtypeOf) -> Iterator[None]:
    """Inside, and in this thread, Keras's optimizers make their variables in other dtypes. They have no option for it.

    Args:
        dtype_of: gets the dtype and the name of a new variable, returns its dtype.
    """
    token = _dtype_of.set(dtype_of)
    try:
        with replaced(keras.optimizers.Optimizer, add_variable=_add_variable_in):
            yield
    finally:
        _dtype_of.reset(token)


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
