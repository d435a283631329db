"""Exceptions of Python that are raised inside a graph and reach its caller with their own type."""

import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = [
    "raise_from_graph",
]

# An exception that a Python op raises in a graph reaches the caller of the graph as a `tf.errors.UnknownError` with its
# text; the exception itself is lost, and `except LossScaleStuckError` around `model.fit` would not catch it. TensorFlow
# makes that error by calling the class, from C++, and so the class hands back what `raise_from_graph` has left here.
_raised_in_graph: dict[str, Exception] = {}


_raise_numbers = itertools.count()


def _unknown_error_or_its_cause(cls, node_def=None, op=None, message="", *args):
    for mark, error in _raised_in_graph.items():
        if mark in str(message):
            del _raised_in_graph[mark]
            return error
    return Exception.__new__(cls, node_def, op, message, *args)


def _graph_error_type(error_type: Any) -> Any:
    # Python accepts from a class only an instance of that class, so what it hands back must be an UnknownError too.
    members = {
        "__init__": lambda self, *args: None,  # runs on an instance that is complete
        "__str__": Exception.__str__,
        "__module__": error_type.__module__,
    }
    return type(error_type.__name__, (error_type, tf.errors.UnknownError), members)


def _as_graph_error(error: Exception) -> Exception:
    text = str(error)
    graph_error: Any = Exception.__new__(_graph_error_type(type(error)))
    tf.errors.UnknownError.__init__(graph_error, None, None, text)
    graph_error.args = (text,)
    return graph_error


def raise_from_graph(make_error: Callable[..., Exception], arguments: list[tf.Tensor]) -> tf.Operation:
    """Places an op in the graph that raises a Python exception when it runs, of the very type that was made.

    XLA cannot compile it: ask `in_xla_context` first.

    Args:
        make_error: gets the arguments as NumPy values, returns the exception.
        arguments: what it is told.

    Returns:
        The op; it must be in a branch of `tf.cond` or have dependents, or nothing runs it.
    """

    @tf.autograph.experimental.do_not_convert
    def raises(*values: tf.Tensor) -> None:
        mark = f"keras_mp-raised-{next(_raise_numbers)}-"
        _raised_in_graph[mark] = _as_graph_error(make_error(*(value.numpy() for value in values)))
        raise RuntimeError(mark)

    return tf.py_function(raises, arguments, [])
