"""Graphs and functions of TensorFlow, read node by node."""

from typing import Any

import keras
import tensorflow as tf

# An op's definition, which has no public name, tells where each named output begins.
from tensorflow.python.framework import op_def_registry as _op_def_registry

__all__ = [
    "called_functions",
    "output_places",
    "placeholder",
    "scratch_graph",
]


def output_places(node: Any) -> dict[str, int]:
    """Returns the index among a node's outputs at which each named output begins. Some have several tensors.

    Args:
        node: a `NodeDef` of a graph or function.
    """
    definition = _op_def_registry.get(node.op)
    places, place = {}, 0
    for output in [] if definition is None else definition.output_arg:
        places[output.name] = place
        if output.number_attr:
            place += node.attr[output.number_attr].i
        elif output.type_list_attr:
            place += len(node.attr[output.type_list_attr].list.type)
        else:
            place += 1
    return places


def scratch_graph() -> tf.Graph:
    """Returns a graph for code that is only traced, as Keras makes one to infer shapes."""
    return tf.__internal__.FuncGraph("keras_mp_scratch")


def placeholder(symbol: keras.KerasTensor) -> Any:
    """Returns a placeholder for a symbolic tensor in the current graph."""
    make = tf.compat.v1.sparse_placeholder if symbol.sparse else tf.compat.v1.placeholder
    return make(symbol.dtype, symbol.shape)


_CALLING = {
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "While": ("body",),
    "StatelessWhile": ("body",),
}


def called_functions(op: tf.Operation) -> list[tuple[str, Any]]:
    """Returns the names and graphs of the functions that an operation calls. No public name finds a function's graph.

    Args:
        op: an operation of a graph.
    """
    if op.type in ("Case", "StatelessCase"):
        names = [function.name for function in op.get_attr("branches")]
    else:
        names = [op.get_attr(attribute).name for attribute in _CALLING.get(op.type, ())]
    functions = [(name, op.graph._get_function(name)) for name in names]
    return [(name, function.graph) for name, function in functions if getattr(function, "graph", None) is not None]
