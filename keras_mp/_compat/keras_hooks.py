"""Calls before training, around epochs and around each layer's call, for which Keras has no hook."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

__all__ = [
    "call_around_epochs",
    "call_before_training",
    "watched_calls",
]


@contextlib.contextmanager
def watched_calls(
    begins: Callable[[keras.Operation, Any], Any],
    ends: Callable[[Any, Any], None],
    fails: Callable[[Any], None],
    adds_loss: Callable[[keras.Layer], None],
) -> Iterator[None]:
    """Inside, and in this thread, tells of every call of a layer or of a graph's operation, and of losses of layers.

    Keras has no hook around a call; what is replaced here comes back with the end of the block.

    Args:
        begins: gets the layer or operation and its arguments, which Keras has cast. What it returns is a mark.
        ends: gets the mark and the outputs.
        fails: gets the mark where there is an error instead.
        adds_loss: gets the layer whose `add_loss` is called.
    """
    thread = threading.get_ident()
    call, add_loss = keras.Operation.__call__, keras.Layer.add_loss

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(self, *args, **kwargs)
        mark = begins(self, (args, kwargs))
        try:
            outputs = call(self, *args, **kwargs)
        except BaseException:
            fails(mark)
            raise
        ends(mark, outputs)
        return outputs

    def watched_add_loss(self: Any, loss: Any) -> None:
        if threading.get_ident() == thread:
            adds_loss(self)
        add_loss(self, loss)

    keras.Operation.__call__, keras.Layer.add_loss = watched_call, watched_add_loss
    try:
        yield
    finally:
        keras.Operation.__call__, keras.Layer.add_loss = call, add_loss


_before_training: list[Callable[[keras.Model], None]] = []


def call_before_training(check: Callable[[keras.Model], None]) -> None:
    """Has every Keras model looked at before it is trained, with all its optimizers in place.

    Keras has no hook there. A model is looked at when its `compile` is done; one whose class has a `compile` of its
    own, which sets more optimizers after Keras's, when its training step is made.

    Args:
        check: gets the model.
    """
    _before_training.append(check)
    if len(_before_training) > 1:
        return  # the hook is there already
    trainer = next(cls for cls in keras.Model.__mro__ if "compile" in vars(cls))
    maker = next(cls for cls in keras.Model.__mro__ if "make_train_function" in vars(cls))
    compile_model, make_train_function = trainer.compile, maker.make_train_function

    def look_at(model: keras.Model) -> None:
        for each in _before_training:
            each(model)

    @functools.wraps(compile_model)
    def compile_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = compile_model(self, *args, **kwargs)
        if type(self).compile is compile_and_check:
            look_at(self)
        return result

    @functools.wraps(make_train_function)
    def check_and_make(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self).compile is not compile_and_check and self.train_function is None:
            look_at(self)
        return make_train_function(self, *args, **kwargs)

    trainer.compile, maker.make_train_function = compile_and_check, check_and_make


def call_around_epochs(begin: Callable[[keras.Model], None], end: Callable[[keras.Model], None]) -> None:
    """Has functions called with every Keras model whose `fit` begins, and with those that end an epoch.

    Keras calls callbacks of the user's only.

    Args:
        begin: gets the model before the first epoch.
        end: gets the model after each epoch.
    """
    callbacks = keras.callbacks.CallbackList
    on_train_begin, on_epoch_end = callbacks.on_train_begin, callbacks.on_epoch_end

    @functools.wraps(on_train_begin)
    def begin_first(self: Any, logs: Any = None) -> None:
        if self.model is not None:
            begin(self.model)
        on_train_begin(self, logs)

    @functools.wraps(on_epoch_end)
    def end_then(self: Any, epoch: int, logs: Any = None) -> None:
        on_epoch_end(self, epoch, logs)
        if self.model is not None:
            end(self.model)

    callbacks.on_train_begin, callbacks.on_epoch_end = begin_first, end_then
