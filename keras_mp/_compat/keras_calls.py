"""Calls of layers and of graph operations whose inputs and outputs pass through functions, and what these need."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

# Keras calls layers in a scratch graph to learn shapes, and has no public name that tells so.
from keras.src.backend.common.symbolic_scope import in_symbolic_scope as _in_symbolic_scope

# No public name tells whether the body of a loop is being traced. Its gradient cannot write to variables.
from tensorflow.python.ops.control_flow_util_v2 import in_while_loop_defun as _in_while_loop_defun

# `tf.Variable` asks the creators of a strategy, which make one variable for all replicas; this class asks none.
from tensorflow.python.ops.resource_variable_ops import ResourceVariable as _ResourceVariable

from keras_mp._compat.replacing import replaced

__all__ = ["calls_through", "in_loop", "in_symbolic_call", "plain_variable"]


_call = keras.Operation.__call__

# What the open blocks do with inputs and outputs, the outermost first.
_followers: list[tuple[Callable[..., Any], Callable[..., Any]]] = []


def _call_through(self: keras.Operation, *args: Any, **kwargs: Any) -> Any:
    followers = list(_followers)
    for before, _ in reversed(followers):
        args, kwargs = before(self, (args, kwargs))
    outputs = _call(self, *args, **kwargs)
    for _, after in followers:
        outputs = after(self, outputs)
    return outputs


@contextlib.contextmanager
def calls_through(
    before: Callable[[keras.Operation, Any], Any], after: Callable[[keras.Operation, Any], Any]
) -> Iterator[None]:
    """Inside, in every thread, the inputs and outputs of each call of a layer or operation are replaced.

    Replicas are traced in threads of their own, so the change is one for the process. Code that is traced inside keeps
    the replacements; code that was traced before has none.

    Args:
        before: gets the layer or operation and its arguments `(args, kwargs)`, and returns others.
        after: gets the layer or operation and its outputs, and returns others.
    """
    follower = (before, after)
    with replaced(keras.Operation, __call__=_call_through):
        _followers.append(follower)
        try:
            yield
        finally:
            _followers.remove(follower)


def plain_variable(value: Any) -> tf.Variable:
    """Returns a variable on the current device, also in a strategy's scope, where `tf.Variable` makes one for all.

    Args:
        value: what it begins with.
    """
    with tf.init_scope():
        return _ResourceVariable(tf.convert_to_tensor(value), trainable=False)


def in_symbolic_call() -> bool:
    """Whether Keras calls layers only to learn the shapes and dtypes of their outputs."""
    return bool(_in_symbolic_scope())


def in_loop() -> bool:
    """Whether the body of a `tf.while_loop` is being traced."""
    return not tf.executing_eagerly() and bool(_in_while_loop_defun(tf.compat.v1.get_default_graph()))
