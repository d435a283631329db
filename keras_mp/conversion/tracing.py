"""A trace of a model's call: the graph of its operations, and each layer's call in it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_hooks, keras_models, tf_graphs

__all__ = ["Call", "Traced", "input_specs", "is_foreign", "trace"]

# Positional and named arguments.
Specs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Call:
    """One call of a layer or of a Functional model's operation, and its range of operations in the graph."""

    operation: keras.Operation
    parent: "Call | None"
    first: int
    arguments: list[tf.Tensor]
    last: int = 0
    outputs: list[tf.Tensor] = field(default_factory=list)
    adds_losses: bool = False

    def is_inside(self, operation: keras.Operation) -> bool:
        """Whether this is a call of that layer, or is made inside such a call."""
        return self.operation is operation or (self.parent is not None and self.parent.is_inside(operation))


@dataclass
class Traced:
    """The graph of a model's call, the calls in it in the order of their start, and its outputs."""

    graph: tf.Graph
    inputs: list[tf.Tensor]
    calls: list[Call]
    outputs: list[tf.Tensor]


def is_foreign(layer: keras.Operation) -> bool:
    """Whether a layer runs code that is neither Keras's nor ours, so that only a trial tells what it does."""
    module = type(layer).__module__.split(".")[0]
    return module not in ("keras", "keras_mp") or isinstance(layer, keras.layers.Lambda)


def input_specs(model: keras.Model) -> list[Specs]:
    """Returns symbolic arguments for a model's call, the likeliest first. There are none if it is not built.

    Keras keeps the shapes that a subclassed model was built with, but not the dtypes.
    """
    if isinstance(model, (keras_models.Functional, keras.Sequential)):
        if not model.built or not getattr(model, "inputs", None):
            return []
        inputs = model.input if isinstance(model, keras_models.Functional) else model.inputs[0]
        # Layers make larger graphs for unknown lengths, and a short known length serves as well.
        return [((keras.tree.map_structure(_short, inputs),), {}), ((inputs,), {})]
    shapes = model.get_build_config() if model.built else None
    if not shapes:
        return []
    found: list[Specs] = []
    for dtype in ("float32", "int32", "string"):
        for free in (True, False):  # some code needs to know the batch size

            def symbol(shape: Sequence[int | None], dtype: str = dtype, free: bool = free) -> keras.KerasTensor:
                shape = tuple(shape)
                if len(shape) > 0 and not free:
                    shape = (shape[0] or 2, *shape[1:])
                elif len(shape) > 0:
                    shape = (None, *shape[1:])
                return keras.KerasTensor(shape, dtype)

            if "input_shape" in shapes:
                found.append(((keras.tree.map_shape_structure(symbol, shapes["input_shape"]),), {}))
            else:
                named = {key.removesuffix("_shape"): shape for key, shape in shapes["shapes_dict"].items()}
                found.append(((), {k: keras.tree.map_shape_structure(symbol, v) for k, v in named.items()}))
    return found


def _short(symbol: keras.KerasTensor) -> keras.KerasTensor:
    """Returns a symbolic tensor with 32 for each unknown length except the batch size."""
    shape = tuple(32 if size is None and axis > 0 else size for axis, size in enumerate(symbol.shape))
    return keras.KerasTensor(shape, symbol.dtype, sparse=symbol.sparse)


def trace(model: keras.Model, specs: Specs, training: bool, running: list[keras.Operation] | None = None) -> Traced:
    """Runs a model's code on placeholders. It changes no variable and no loss of the model.

    Args:
        model: a built model.
        specs: the symbolic arguments of its call, positional and named.
        training: the argument of its call.
        running: receives the layers that are running when an error is raised, from the outermost inwards.

    Raises:
        Exception: any error of the model's code.
    """
    calls: list[Call] = []
    open_calls: list[Call] = []
    graph = tf_graphs.scratch_graph()

    def begins(operation: keras.Operation, arguments: Any) -> Call | None:
        if tf.compat.v1.get_default_graph() is not graph:
            return None  # inside of a loop
        parent = open_calls[-1] if open_calls else None
        call = Call(operation, parent, len(graph.get_operations()), _tensors(arguments))
        calls.append(call)
        open_calls.append(call)
        return call

    def ends(call: Call | None, outputs: Any) -> None:
        if call is not None:
            open_calls.remove(call)
            call.last, call.outputs = len(graph.get_operations()), _tensors(outputs)

    def fails(call: Call | None) -> None:
        if running is not None and not running:
            running.extend(each.operation for each in open_calls)
        if call is not None:
            open_calls.remove(call)

    def adds_loss(layer: keras.Layer) -> None:
        if open_calls and open_calls[-1].operation is layer:
            open_calls[-1].adds_losses = True

    with (
        warnings.catch_warnings(),
        graph.as_default(),
        keras.StatelessScope(),
        keras_hooks.watched_calls(begins, ends, fails, adds_loss),
    ):
        warnings.filterwarnings("ignore", module="keras")  # Keras issues them again when the model is called
        args, kwargs = keras.tree.map_structure(tf_graphs.placeholder, specs)
        outputs = keras_models.call(model, *args, training=training, **kwargs)
    return Traced(graph, _tensors((args, kwargs)), calls, _tensors(outputs))


def _tensors(structure: Any) -> list[tf.Tensor]:
    flat = keras.tree.flatten(structure)
    return [each for each in flat if isinstance(each, tf.Tensor) and hasattr(each, "graph")]
