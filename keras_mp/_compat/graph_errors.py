"""Python exceptions that are raised inside a graph and reach the caller with their own type."""

import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["raise_from_graph", "unknown_error_or_its_cause"]

# An exception that a Python op raises in a graph reaches the caller as a `tf.errors.UnknownError` with its text. The
# exception itself is lost, so `except LossScaleStuckError` around `model.fit` would not catch it. TensorFlow's C++ code
# makes that error by calling the class. So the class returns the exception that `raise_from_graph` has stored here.
_raised_in_graph: dict[str, Exception] = {}


_raise_numbers = itertools.count()


def unknown_error_or_its_cause(
    cls: type, node_def: Any = None, op: Any = None, message: Any = "", *args: Any
) -> Exception:
    """Stands for `tf.errors.UnknownError.__new__`, which Python inherits from `Exception`."""
    for mark, error in _raised_in_graph.items():
        if mark in str(message):
            del _raised_in_graph[mark]
            return error
    return Exception.__new__(cls, node_def, op, message, *args)


def _graph_error_type(error_type: type[Exception]) -> Any:
    # A class may only make instances of itself, so the stored exception must be an UnknownError too.
    members = {
        "__init__": lambda self, *args: None,  # Python calls it on the finished instance
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
    """Places an op in the graph that raises a Python exception of its own type when it runs.

    XLA cannot compile it: ask `execution.current().in_xla` first. `patches.install_on_first_use` must have run.

    Args:
        make_error: gets the arguments as NumPy values, returns the exception.
        arguments: the tensors for `make_error`.

    Returns:
        The op. It must be in a branch of `tf.cond` or have dependents, or it never runs.
    """

    @tf.autograph.experimental.do_not_convert
    def raises(*values: tf.Tensor) -> None:
        mark = f"keras_mp-raised-{next(_raise_numbers)}-"
        _raised_in_graph[mark] = _as_graph_error(make_error(*(value.numpy() for value in values)))
        raise RuntimeError(mark)

    return tf.py_function(raises, arguments, [])
