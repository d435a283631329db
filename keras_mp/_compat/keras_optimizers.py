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
    "renumber",
    "trained_by",
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
