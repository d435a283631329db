"""What a tensor in a graph was made of: gradients of a scaled loss, or such as were unscaled before.

`LossScaleOptimizer` marks the scale it hands out and the gradients it unscales, by operations of a certain name. So
the graph itself tells whether `apply` still has to unscale: also behind arithmetic, conditions and other functions.
"""

import itertools
import re
from typing import Any

import tensorflow as tf

from keras_mp._compat import tf_graphs

__all__ = ["Marks", "clipped_by"]

SCALED, UNSCALED = "scaled", "unscaled"

_numbers = itertools.count()
_MARK = re.compile(r"(?:^|/)keras_mp_(scaled|unscaled)_(\d+)_of_loss(?:_\d+)?(?:/|$)")

# What stands between a gradient and the `tf.clip_by_...` that made it.
_ELEMENTWISE = ("Identity", "IdentityN", "Cast", "AddV2", "Add", "AddN", "Sub", "Mul", "RealDiv", "Neg")
_CLIPPING = re.compile(r"clip_by_(?:value|norm|global_norm|average_norm)(?:_\d+)?$")
_LOOK_AT = 30


class Marks:
    """The marks of one optimizer, which tell its scale from others'."""

    def __init__(self) -> None:
        self._number = next(_numbers)

    def put(self, tensor: tf.Tensor, what: str) -> tf.Tensor:
        """The same tensor, marked.

        Args:
            tensor: of any shape and dtype.
            what: `"scaled"` for a scale, `"unscaled"` for an unscaled gradient.
        """
        return tensor if tf.executing_eagerly() else tf.identity(tensor, f"keras_mp_{what}_{self._number}_of_loss")

    def found(self, tensors: "list[tf.Tensor]") -> list[frozenset[str]]:
        """The marks that each tensor was made of, those behind another mark left out.

        Args:
            tensors: of one graph.
        """
        walk = _Walk(self._number)
        return [frozenset(each for each in walk.of(tensor) if isinstance(each, str)) for tensor in tensors]


class _Walk:
    """One walk through a graph, from results to what they were made of; nothing is looked at twice."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._found: dict[tuple[int, str], frozenset[Any]] = {}
        self._kept: list[Any] = []  # whose ids are keys
        self._of_functions: dict[str, list[frozenset[Any]]] = {}

    def of(self, tensor: Any, arguments: "dict[str, int] | None" = None) -> frozenset[Any]:
        """Marks, and with `arguments` the places of those that the tensor was made of."""
        if not _carries_a_scale(tensor):
            return frozenset()
        waiting = [tensor]
        while waiting:
            last = waiting[-1]
            key = self._key(last)
            if key in self._found:
                waiting.pop()
                continue
            known, inputs = self._begin(last, arguments)
            missing = [each for each in inputs if self._key(each) not in self._found]
            if missing:
                waiting += missing
                continue
            self._found[key] = known.union(*(self._found[self._key(each)] for each in inputs))
            waiting.pop()
        return self._found[self._key(tensor)]

    def _key(self, tensor: Any) -> tuple[int, str]:
        return id(tensor.graph), tensor.name

    def _begin(self, tensor: Any, arguments: "dict[str, int] | None") -> tuple[frozenset[Any], list[Any]]:
        """What is known of a tensor, and the tensors that the rest of it was made of."""
        op, graph = tensor.op, tensor.graph
        mark = _MARK.search(op.name)
        if mark is not None and op.type == "Identity" and int(mark[2]) == self._number:
            return frozenset([mark[1]]), []
        if op.type == "Placeholder":
            if arguments is not None:
                place = arguments.get(tensor.name)
                return frozenset() if place is None else frozenset([place]), []
            outer = [external for external, internal in getattr(graph, "captures", ()) if internal is tensor]
            return frozenset(), [each for each in outer if _carries_a_scale(each)]
        inputs, known = list(op.inputs), frozenset[Any]()
        called = tf_graphs.called_functions(op)
        if called:
            given = inputs[1:] if op.type in ("If", "StatelessIf", "Case", "StatelessCase") else inputs
            loops = op.type in ("While", "StatelessWhile")
            places: set[Any] = set(range(len(given))) if loops else set()
            for name, function in called:
                outputs = self._of_function(name, function)
                chosen = outputs if loops else outputs[tensor.value_index : tensor.value_index + 1]
                places.update(*chosen)
            known = frozenset(each for each in places if isinstance(each, str))
            inputs = [given[each] for each in places if isinstance(each, int) and each < len(given)]
        return known, [each for each in inputs if _carries_a_scale(each)]

    def _of_function(self, name: str, graph: Any) -> list[frozenset[Any]]:
        if name not in self._of_functions:
            self._kept.append(graph)
            places = {tensor.name: place for place, tensor in enumerate(graph.inputs)}
            self._of_functions[name] = [self.of(output, places) for output in graph.outputs]
        return self._of_functions[name]


def _carries_a_scale(tensor: Any) -> bool:
    """Whether a tensor of a graph can hold gradients, as floats do and lists of them; masks and shapes do not."""
    return hasattr(tensor, "graph") and (tensor.dtype.is_floating or tensor.dtype == tf.variant)


def clipped_by(gradient: tf.Tensor, marks: Marks) -> str | None:
    """The name of the function of TensorFlow's that limited a gradient which is still scaled, if one is seen.

    Not so where the limit was scaled as well.

    Args:
        gradient: a tensor of a graph.
        marks: of the optimizer whose scale it is.
    """
    waiting, seen = [gradient], 0
    while waiting and seen < _LOOK_AT:
        tensor, seen = waiting.pop(), seen + 1
        op = tensor.op
        scopes = op.name.split("/")
        if any(scope.startswith("gradient") for scope in scopes):
            continue  # the backward pass, of a model that clips something
        place = next((place for place, scope in enumerate(scopes) if _CLIPPING.match(scope)), None)
        if place is not None:
            prefix = "/".join(scopes[: place + 1])
            limits = [each for each in _given_to(tensor, prefix) if each.shape.rank == 0 and "norm" not in each.op.name]
            if any(SCALED in each for each in marks.found(limits)):
                return None
            is_scaled = SCALED in marks.found([tensor])[0]
            return re.sub(r"_\d+$", "", scopes[place]) if is_scaled else None
        if op.type in _ELEMENTWISE:
            waiting += [each for each in op.inputs if _carries_a_scale(each)]
    return None


def _given_to(tensor: tf.Tensor, prefix: str) -> list[tf.Tensor]:
    """The tensors that go into the operations under a name that a tensor was made by."""
    given: list[tf.Tensor] = []
    waiting, seen = [tensor], set[str]()
    while waiting:
        op = waiting.pop().op
        for each in op.inputs:
            if not _carries_a_scale(each) or each.name in seen:
                continue
            seen.add(each.name)
            (waiting if f"{each.op.name}/".startswith(f"{prefix}/") else given).append(each)
    return given
