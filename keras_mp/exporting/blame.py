"""Where an export and its model part: the first layer whose outputs differ, or are not finite."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_hooks, keras_layers
from keras_mp.exporting.comparison import measure
from keras_mp.exporting.signature import Signature

__all__ = ["LayerOutput", "answers_at_random", "first_difference", "first_nonfinite", "outputs_by_layer"]


@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """What one call of a layer returned.

    Attributes:
        layer: the layer.
        path: its path below the model; "" for the model itself.
        arrays: the floats that it returned, in float32.
    """

    layer: keras.Layer
    path: str
    arrays: list[np.ndarray]

    @property
    def name(self) -> str:
        """As a message names it."""
        return f"layer {self.path!r} ({type(self.layer).__name__})" if self.path else "the model's outputs"


def outputs_by_layer(
    signature: Signature,
    model: keras.Model,
    forward: Callable[[Any], Any],
    rows: Mapping[str, np.ndarray],
    *,
    in_graph: bool = False,
) -> list[LayerOutput]:
    """The outputs of all layers, the inner before the outer, in the order of their calls.

    Args:
        signature: how the model is called.
        model: the model whose layers are watched.
        forward: calls it.
        rows: the inputs by name.
        in_graph: whether to call it in a graph, as an export is traced; else eagerly.
    """
    calls: list[tuple[keras.Layer, str]] = []

    def outputs() -> list[list[tf.Tensor]]:
        with _watched(model) as found:
            signature.call(rows, forward)
        calls[:] = [(layer, path) for layer, path, _ in found]
        return [tensors for _, _, tensors in found]

    found = tf.function(outputs, autograph=False)() if in_graph else outputs()
    return [LayerOutput(*call, [_floats(tensor) for tensor in each]) for call, each in zip(calls, found, strict=True)]


def first_nonfinite(found: list[LayerOutput], rows: Mapping[str, np.ndarray]) -> str | None:
    """Says which layer is the first that returned NaN or an infinity; None where none did.

    Args:
        found: as `outputs_by_layer` returned it.
        rows: the inputs by name.
    """
    for name, array in rows.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            return f"input {name!r} is given NaN or infinite values"
    for each in found:
        if not all(np.isfinite(array).all() for array in each.arrays):
            what = "NaN" if any(np.isnan(array).any() for array in each.arrays) else "an infinite value"
            bad = [v.name for v in each.layer.weights if not np.isfinite(_floats(v.value)).all()]
            why = f", whose {bad[0]} is not finite" if bad else f", which computes in {each.layer.compute_dtype}"
            return f"{what} first comes out of {each.name}{why}"
    return None


def first_difference(expected: list[LayerOutput], found: list[LayerOutput], limit: float) -> str | None:
    """Says which layer is the first whose outputs differ by more than a limit; None where none does.

    Args:
        expected: of the model.
        found: of what is exported.
        limit: largest error relative to the largest value.
    """
    calls: dict[str, list[LayerOutput]] = {}
    for each in found:
        calls.setdefault(each.path, []).append(each)
    for each in expected:
        if not calls.get(each.path):
            continue
        other = calls[each.path].pop(0)
        if [array.shape for array in each.arrays] != [array.shape for array in other.arrays]:
            continue  # such as one that was called in a loop of the graph
        errors = [measure(*pair).relative_error for pair in zip(other.arrays, each.arrays, strict=True)]
        worst = max(errors, key=lambda error: (np.isnan(error), error), default=0.0)
        if not worst <= limit:
            ours, theirs = other.layer.compute_dtype, each.layer.compute_dtype
            how = f"; it computes in {ours} in the export, in {theirs} in the model" if ours != theirs else ""
            return f"{each.name} is the first that differs, by {worst:.2g} of its largest value{how}"
    return None


def answers_at_random(signature: Signature, rows: Mapping[str, np.ndarray], limit: float) -> bool:
    """Whether two calls of the model itself differ.

    Args:
        signature: how it is called.
        rows: the inputs by name.
        limit: largest error relative to the largest value.
    """

    def forward(inputs: Any) -> Any:
        return signature.model(inputs, training=False)

    once, again = (signature.call(rows, forward) for _ in range(2))
    floats = [name for name, tensor in once.items() if tensor.dtype.is_floating]
    return any(not measure(_floats(again[name]), _floats(once[name])).relative_error <= limit for name in floats)


@contextlib.contextmanager
def _watched(model: keras.Model) -> Iterator[list[tuple[keras.Layer, str, list[tf.Tensor]]]]:
    """Notes the floats that layers of a model return in this thread: see `watched_calls`.

    In a graph those of its own level, for what is inside of a loop has no value outside.
    """
    layers = keras_layers.layers_by_path(model)
    paths = {id(layer): path.partition("/")[2] for path, layer in layers.items()}
    found: list[tuple[keras.Layer, str, list[tf.Tensor]]] = []
    graph = _graph()

    def note(layer: Any, outputs: Any) -> None:
        if id(layer) in paths and _graph() is graph:
            flat = [each for each in keras.tree.flatten(outputs) if isinstance(each, tf.Tensor)]
            found.append((layer, paths[id(layer)], [each for each in flat if each.dtype.is_floating]))

    with keras_hooks.watched_calls(ends=note):
        yield found


def _floats(tensor: Any) -> np.ndarray:
    tensor = tf.convert_to_tensor(tensor)
    if not tensor.dtype.is_floating:
        return np.zeros(())
    return tf.cast(tensor, tf.float64 if tensor.dtype == tf.float64 else tf.float32).numpy()


def _graph() -> Any:
    """The graph that is being traced, or None."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
