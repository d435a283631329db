"""Counts the matmuls of a traced step from its graph.

TensorFlow's profiler (`tf.compat.v1.profiler`) counts 0 for einsums and for matmuls in functions that the graph calls.
This module counts these, and names what it cannot count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keras_mp._compat import tf_graphs

__all__ = ["Matmul", "Work", "count_matmuls"]

# Ops that call a function of the graph, and the attributes that name it. The larger branch is counted.
_CALLS = {"PartitionedCall": ("f",), "StatefulPartitionedCall": ("f",)}
_BRANCHES = {
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "Case": (),
    "StatelessCase": (),
}
_LOOPS = ("While", "StatelessWhile")


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A matmul or a convolution in a step.

    Attributes:
        name: the op's name. In the forward pass it begins with the names of the model and the layer.
        kind: the op's type.
        flops: multiplications and additions, two for each pair of factors.
        factor: the shape of the second factor. In the forward pass it is usually a layer's kernel.
    """

    name: str
    kind: str
    flops: float
    factor: tuple[int, ...] = ()

    @property
    def is_forward(self) -> bool:
        """Whether it belongs to the forward pass."""
        return "gradient" not in self.name and "Backprop" not in self.kind


@dataclasses.dataclass(frozen=True)
class Work:
    """All of a step's matmuls.

    Attributes:
        matmuls: the matmuls with static shapes.
        uncounted: names of the other matmuls.
        loops: names of loops. Their matmuls are counted once.
    """

    matmuls: tuple[Matmul, ...]
    uncounted: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """The sum over the counted matmuls."""
        return math.fsum(matmul.flops for matmul in self.matmuls)

    @property
    def complete(self) -> bool:
        """Whether the sum covers all matmuls."""
        return not self.uncounted and not self.loops


def count_matmuls(graph: Any) -> Work:
    """Counts the matmuls and convolutions of a graph, also in the functions that it calls.

    Args:
        graph: a `tf.Graph` with static shapes.

    Example:
    >>> step = tf.function(lambda x: x @ x).get_concrete_function(tf.TensorSpec((4, 4)))
    >>> count_matmuls(step.graph).flops
    128.0
    """
    definition = graph.as_graph_def(add_shapes=True)
    functions = {function.signature.name: function for function in definition.library.function}
    return _count(_Scope(definition.node, {}), functions)


class _Scope:
    """The nodes of a graph or a function, and the shapes of their inputs."""

    def __init__(self, nodes: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        self.nodes = nodes
        self._by_name = {node.name: node for node in nodes}
        self._shapes: dict[str, Any] = dict(arguments)
        for node in nodes:
            self._shapes[node.name] = [_shape(each) for each in node.attr["_output_shapes"].list.shape]

    @classmethod
    def of(cls, function: Any) -> "_Scope":
        shapes = function.attr["_input_shapes"].list.shape
        names = [argument.name for argument in function.signature.input_arg]
        return cls(function.node_def, {name: [_shape(shape)] for name, shape in zip(names, shapes, strict=False)})

    def inputs(self, node: Any) -> list[tuple[int, ...] | None]:
        return [self._given(each) for each in node.input if not each.startswith("^")]

    def _given(self, reference: str) -> tuple[int, ...] | None:
        # "name" or "name:number" in a graph; "argument" or "name:output:number" in a function.
        name, *rest = reference.split(":")
        place = int(rest[-1]) if rest else 0
        if len(rest) == 2:
            place += tf_graphs.output_places(self._by_name[name]).get(rest[0], 0)
        shapes = self._shapes.get(name, [])
        return shapes[place] if place < len(shapes) else None

    def output(self, node: Any) -> tuple[int, ...] | None:
        shapes = self._shapes[node.name]
        return shapes[0] if shapes else None


def _shape(proto: Any) -> tuple[int, ...] | None:
    sizes = tuple(dimension.size for dimension in proto.dim)
    return None if proto.unknown_rank or any(size < 0 for size in sizes) else sizes


def _count(scope: _Scope, functions: Mapping[str, Any]) -> Work:
    matmuls: list[Matmul] = []
    uncounted: list[str] = []
    loops: list[str] = []
    for node in scope.nodes:
        if node.op in _FLOPS:
            inputs, output = scope.inputs(node), scope.output(node)
            flops = _FLOPS[node.op](node, inputs, output) if output is not None and None not in inputs else None
            if flops is None:
                uncounted.append(node.name)
            else:
                matmuls.append(Matmul(node.name, node.op, flops, inputs[1] or ()))
            continue
        works = [_count(_Scope.of(functions[name]), functions) for name in _called(node) if name in functions]
        if not works:
            continue
        work = max(works, key=lambda each: each.flops) if node.op in _BRANCHES else _sum(works)
        matmuls += work.matmuls
        uncounted += work.uncounted
        loops += work.loops
        if node.op in _LOOPS and (work.matmuls or work.uncounted):
            loops.append(node.name)
    return Work(tuple(matmuls), tuple(uncounted), tuple(loops))


def _sum(works: Sequence[Work]) -> Work:
    return Work(*(sum((getattr(work, field.name) for work in works), ()) for field in dataclasses.fields(Work)))


def _called(node: Any) -> Iterator[str]:
    if node.op in _LOOPS:
        yield node.attr["body"].func.name
    for attribute in _CALLS.get(node.op, ()) + _BRANCHES.get(node.op, ()):
        yield node.attr[attribute].func.name
    if node.op in ("Case", "StatelessCase"):
        yield from (branch.name for branch in node.attr["branches"].list.func)


def _matmul(node: Any, inputs: Any, output: Any) -> float:
    return 2.0 * math.prod(output) * inputs[0][0 if node.attr["transpose_a"].b else 1]


def _batch_matmul(node: Any, inputs: Any, output: Any) -> float:
    return 2.0 * math.prod(output) * inputs[0][-2 if node.attr["adj_x"].b else -1]


def _convolution(node: Any, inputs: Any, output: Any) -> float:
    return 2.0 * math.prod(output) * math.prod(inputs[1][:-1])


def _convolution_to_input(node: Any, inputs: Any, output: Any) -> float:
    return 2.0 * math.prod(inputs[2]) * math.prod(inputs[1][:-1])


def _convolution_to_filter(node: Any, inputs: Any, output: Any) -> float:
    return 2.0 * math.prod(inputs[2]) * math.prod(output[:-1])


def _einsum(node: Any, inputs: Any, output: Any) -> float | None:
    terms = re.split(r",|->", node.attr["equation"].s.decode())
    if any("." in term for term in terms) or len(inputs) < 2:
        return None
    sizes: dict[str, int] = collections.defaultdict(int)
    for term, shape in zip(terms, inputs, strict=False):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(sizes[label], size)
    return 2.0 * math.prod(sizes.values())


_FLOPS = {
    "MatMul": _matmul,
    "BatchMatMul": _batch_matmul,
    "BatchMatMulV2": _batch_matmul,
    "BatchMatMulV3": _batch_matmul,
    "Einsum": _einsum,
    "Conv2D": _convolution,
    "Conv3D": _convolution,
    "Conv2DBackpropInput": _convolution_to_input,
    "Conv3DBackpropInputV2": _convolution_to_input,
    "Conv2DBackpropFilter": _convolution_to_filter,
    "Conv3DBackpropFilterV2": _convolution_to_filter,
}
