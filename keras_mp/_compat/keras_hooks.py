"""Calls before training, around epochs and around each layer's call, for which Keras has no hook."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_mp._compat.replacing import replaced

__all__ = [
    "after_compile",
    "after_epoch",
    "before_making_a_step",
    "before_training",
    "call_around_epochs",
    "call_before_training",
    "watched_calls",
]


@dataclasses.dataclass(frozen=True)
class _Watch:
    """The callbacks of one `watched_calls` block."""

    begins: Callable[[keras.Operation, Any], Any]
    ends: Callable[[Any, Any], None]
    fails: Callable[[Any], None]
    adds_loss: Callable[[keras.Layer], None]


# A new thread starts without a context, so the calls of other threads are not watched.
_watch: contextvars.ContextVar[_Watch | None] = contextvars.ContextVar("_watch", default=None)

_call, _add_loss = keras.Operation.__call__, keras.Layer.add_loss


def _watched_call(self: keras.Operation, *args: Any, **kwargs: Any) -> Any:
    watch = _watch.get()
    if watch is None:
        return _call(self, *args, **kwargs)
    mark = watch.begins(self, (args, kwargs))
    try:
        outputs = _call(self, *args, **kwargs)
    except BaseException:
        watch.fails(mark)
        raise
    watch.ends(mark, outputs)
    return outputs


def _watched_add_loss(self: keras.Layer, loss: Any) -> None:
    watch = _watch.get()
    if watch is not None:
        watch.adds_loss(self)
    _add_loss(self, loss)


@contextlib.contextmanager
def watched_calls(
    begins: Callable[[keras.Operation, Any], Any] = lambda operation, arguments: operation,
    ends: Callable[[Any, Any], None] = lambda mark, outputs: None,
    fails: Callable[[Any], None] = lambda mark: None,
    adds_loss: Callable[[keras.Layer], None] = lambda layer: None,
) -> Iterator[None]:
    """Watches the calls of layers and of a graph's operations, and the losses that layers add, in this thread.

    Keras has no hook around a call.

    Args:
        begins: gets the layer or operation and its arguments, which Keras has cast. It returns a mark, by default the
            layer or operation.
        ends: gets the mark and the outputs.
        fails: gets the mark after an error.
        adds_loss: gets the layer whose `add_loss` is called.
    """
    token = _watch.set(_Watch(begins, ends, fails, adds_loss))
    try:
        with (
            replaced(keras.Operation, __call__=_watched_call),
            replaced(keras.Layer, add_loss=_watched_add_loss),
        ):
            yield
    finally:
        _watch.reset(token)


_checks: list[Callable[[keras.Model], None]] = []
_begins: list[Callable[[keras.Model], None]] = []
_ends: list[Callable[[keras.Model], None]] = []


def call_before_training(check: Callable[[keras.Model], None]) -> None:
    """Calls a function with every Keras model before it is trained, when all its optimizers are set.

    This starts with the first use of keras_mp. A model is checked at the end of its `compile`. If its class overrides
    `compile`, it may set more optimizers afterwards, so it is checked when its training step is made.

    Args:
        check: gets the model.
    """
    _checks.append(check)


def call_around_epochs(begin: Callable[[keras.Model], None], end: Callable[[keras.Model], None]) -> None:
    """Calls functions with every Keras model whose `fit` begins, and with every one that ends an epoch.

    This starts with the first use of keras_mp. Keras calls only the user's callbacks.

    Args:
        begin: gets the model before the first epoch.
        end: gets the model after each epoch.
    """
    _begins.append(begin)
    _ends.append(end)


def _overrides_compile(model: keras.Model) -> bool:
    return type(model).compile is not keras.Model.compile


def after_compile(result: Any, model: keras.Model, *args: Any, **kwargs: Any) -> Any:
    """Follows `keras.Model.compile`."""
    if not _overrides_compile(model):
        for check in _checks:
            check(model)
    return result


def before_making_a_step(model: keras.Model, *args: Any, **kwargs: Any) -> None:
    """Precedes `keras.Model.make_train_function`."""
    if _overrides_compile(model) and model.train_function is None:
        for check in _checks:
            check(model)


def before_training(callbacks: keras.callbacks.CallbackList, logs: Any = None) -> None:
    """Precedes `CallbackList.on_train_begin`."""
    if callbacks.model is not None:
        for begin in _begins:
            begin(callbacks.model)


def after_epoch(result: Any, callbacks: keras.callbacks.CallbackList, epoch: int, logs: Any = None) -> Any:
    """Follows `CallbackList.on_epoch_end`."""
    if callbacks.model is not None:
        for end in _ends:
            end(callbacks.model)
    return result
