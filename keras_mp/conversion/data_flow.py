"""The layers of a model whose numbers half precision would ruin, read from a trace of the model in float32.

Ids, times, positions and levels are floats that must be exact. They come from the inputs or are counted inside. They
pass layers that only move, compare or add them, and end in a layer that computes: a matmul, a convolution or an
embedding. Behind the last computing layer the numbers are a model's output: boxes, logits, levels.

So the rule is one of data flow. The model is traced once. The calls of its layers are laid over the graph of
TensorFlow's operations. For each layer, the graph tells which numbers reach it and where its output goes.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_models
from keras_mp.conversion.operations import (
    COUNTING,
    MOVING,
    STRUCTURE,
    computes,
    counts_and_goes_on,
    goes_into_matmul,
    to_integer,
)
from keras_mp.conversion.tracing import Call, Specs, Traced, is_foreign, trace

__all__ = ["Flow", "flow_of"]


@dataclass
class Flow:
    """The result of a reading: sets of layers, by their `id`.

    Attributes:
        exact: layers whose numbers have to stay in float32, with all layers inside them.
        last: layers that compute, while nothing behind them does before the model's outputs.
        raw_inputs: layers that pass inputs of the model on unchanged, and must not cast them when they are called.
        mixed_doors: layers that should do so, but have activations among their inputs as well.
        own_code: layers that hold layers and whose own code counts.
        mixing: layers whose output meets the output of others in the code of a layer that holds both.
        tail: operations of a Functional model behind the last computing layer.
        losses: custom layers that add losses.
    """

    exact: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)
    raw_inputs: set[int] = field(default_factory=set)
    mixed_doors: set[int] = field(default_factory=set)
    own_code: set[int] = field(default_factory=set)
    mixing: set[int] = field(default_factory=set)
    tail: set[int] = field(default_factory=set)
    losses: set[int] = field(default_factory=set)


def flow_of(model: keras.Model, specs: list[Specs]) -> "tuple[Flow, Specs] | tuple[None, None]":
    """Returns the flow through a model and the specification that traced it, or (None, None) if none could.

    Args:
        model: a built model that computes in float32, or a converted one.
        specs: the result of `input_specs`.
    """
    modes = (True, False) if any(map(is_foreign, keras_layers.layers_by_path(model).values())) else (False,)
    for spec in specs:
        for training in modes:
            try:
                traced = trace(model, spec, training)
            except Exception:  # any error of a model for inputs that it does not expect
                continue
            return _Reading(model, traced).flow(), spec
    return None, None


def _weights(layer: keras.Layer) -> list[keras.Variable]:
    return [weight for weight in layer.weights if keras.backend.is_float_dtype(weight.dtype)]


@functools.cache
def _data_layers() -> tuple[type, ...]:
    return keras_models.preprocessing_classes()


class _Node:
    """An operation outside all units, or the call of a unit."""

    def __init__(self, place: int, unit: Call | None, operations: list[tf.Operation], computing: bool) -> None:
        self.place, self.unit, self.operations = place, unit, operations
        self.inputs: list[tf.Tensor] = []
        self.computing = computing
        self.computed = self.raw = False  # of its outputs
        self.consumers: set[_Node] = set()
        self.is_output = self.live = self.tail = self.leads_to_ids = False

    def moves(self) -> bool:
        return self.unit is None and self.operations[0].type in MOVING

    def computed_inputs(self, makers: dict[str, "_Node"]) -> list[tf.Tensor]:
        return [each for each in self.inputs if each.name in makers and makers[each.name].computed]

    def raw_inputs(self, makers: dict[str, "_Node"]) -> list[tf.Tensor]:
        return [
            each
            for each in self.inputs
            if each.name in makers and makers[each.name].raw and not makers[each.name].computed
        ]


class _Reading:
    """One reading of a trace: the units, the graph between them, and the flow through it."""

    def __init__(self, model: keras.Model, traced: Traced) -> None:
        self.model, self.traced = model, traced
        self.operations = traced.graph.get_operations()
        self.units = [call for call in traced.calls if self.is_unit(call)]
        self.makers: dict[str, _Node] = {}
        self.nodes = list(self.make_nodes())
        self.connect()

    def is_unit(self, call: Call) -> bool:
        """Whether a call is read as a whole: its layer holds no layers, or is one of Keras's."""
        operation = call.operation
        if not isinstance(operation, keras.Layer) or operation is self.model:
            return False
        if any(each.operation is not operation and _is_whole(each.operation) for each in _parents(call)):
            return False
        return _is_whole(operation)

    def make_nodes(self) -> Iterator[_Node]:
        starts = {unit.first: unit for unit in reversed(self.units) if unit.last > unit.first}
        place = 0
        while place < len(self.operations):
            unit = starts.get(place)
            if unit is None:
                operation = self.operations[place]
                node = _Node(place, None, [operation], computes(operation))
                node.inputs = list(operation.inputs)
                made: Iterable[tf.Tensor] = operation.outputs
                place += 1
            else:
                inside = self.operations[unit.first : unit.last]
                node = _Node(place, unit, inside, not self.carries(unit))
                own = {tensor.name for operation in inside for tensor in operation.outputs}
                taken = [tensor for operation in inside for tensor in operation.inputs] + unit.arguments
                node.inputs = list({tensor.name: tensor for tensor in taken if tensor.name not in own}.values())
                made = [tensor for operation in inside for tensor in operation.outputs]
                place = unit.last
            for tensor in made:
                self.makers[tensor.name] = node
            yield node

    def carries(self, unit: Call) -> bool:
        """Whether a unit passes numbers on, and makes no activations itself."""
        layer = unit.operation
        return isinstance(layer, (keras.layers.Normalization, *_data_layers())) or not _weights(layer)

    def connect(self) -> None:
        """Marks forwards the numbers that reach each node, and backwards the uses of its output."""
        sources = {tensor.name for tensor in self.traced.inputs}
        for node in self.nodes:
            counts = any(operation.type in COUNTING for operation in node.operations)
            first = node.operations[0]
            structure = node.unit is None and first.type in STRUCTURE
            node.raw = counts or any(output.name in sources for output in first.outputs)
            if not structure:
                makers = [self.makers[each.name] for each in node.inputs if each.name in self.makers]
                table = self.makers.get(first.inputs[0].name) if "Gather" in first.type else None
                if node.unit is None and table is not None and not (table.raw or table.computed):
                    node.computing = True  # it looks up weights, as an embedding does
                # A truth value is right in any dtype, and so is a mask made from it.
                truth = node.unit is None and bool(first.outputs) and first.outputs[0].dtype.is_bool
                node.raw = node.raw or (not truth and any(maker.raw for maker in makers))
                node.computed = node.computing or any(maker.computed for maker in makers)
                for maker in makers:
                    maker.consumers.add(node)
        for output in self.traced.outputs:
            if output.name in self.makers:
                self.makers[output.name].is_output = True
        for node in reversed(self.nodes):
            live = [each for each in node.consumers if each.live]
            node.live = node.is_output or bool(live)
            node.tail = node.live and not node.computing and all(self.ends(each) for each in live)
            node.leads_to_ids = any(
                self.takes_ids(each) or (each.leads_to_ids and not each.computing) for each in node.consumers
            )

    def ends(self, node: _Node) -> bool:
        """Whether a node takes its inputs unchanged and nothing computes behind it."""
        return node.tail or self.takes_ids(node)

    def takes_ids(self, node: _Node) -> bool:
        """Whether a node uses its float inputs as integers, or looks them up."""
        if node.unit is None:
            return to_integer(node.operations[0])
        if isinstance(node.unit.operation, (keras.layers.Embedding, *_data_layers())):
            return True
        if not is_foreign(node.unit.operation):
            return False
        names = {each.name for each in node.inputs}
        for operation in node.operations:
            if any(each.name in names for each in operation.inputs):
                if to_integer(operation):
                    return True
                if operation.type in (*MOVING, "Round", "Rint", "Floor", "Ceil"):
                    names |= {output.name for output in operation.outputs}
        return False

    def flow(self) -> Flow:
        flow = Flow()
        for node in self.nodes:
            unit = node.unit
            if unit is None:
                continue
            layer = unit.operation
            if unit.adds_losses and is_foreign(layer):
                flow.losses.add(id(layer))
            if isinstance(layer, _data_layers()):
                continue
            counts = counts_and_goes_on(node.operations)
            if node.computing:
                self.read_computing(node, flow, counts)
            elif node.tail or (node.raw and not node.computed) or node.leads_to_ids or counts or self.takes_ids(node):
                flow.exact.add(id(layer))
            if node in self.answers[1] or (not node.tail and self.meets_others(node)):
                flow.mixing.add(id(layer))
        self.read_identities(flow)
        for call in self.traced.calls:
            if self.is_container(call):
                self.read_container(call, flow)
            elif not isinstance(call.operation, keras.Layer):
                inside = [self.node_at(place) for place in range(call.first, call.last)]
                if inside and all(node.tail or not node.live for node in inside):
                    flow.tail.add(id(call.operation))
        return flow

    def read_computing(self, node: _Node, flow: Flow, counts: bool) -> None:
        assert node.unit is not None
        layer = node.unit.operation
        raw = [each for each in node.raw_inputs(self.makers) if each.dtype.is_floating or each.dtype.is_integer]
        by_itself = is_foreign(layer) and not keras_layers.inner_layers(layer)
        if by_itself and (counts or self.takes_ids(node) or (raw and not goes_into_matmul(node.operations, raw))):
            flow.exact.add(id(layer))
        elif any(each.dtype.is_floating for each in raw) and keras_layers.inner_layers(layer):
            flow.raw_inputs.add(id(layer))
        if node in self.answers[0]:
            # Ids need exact computing. For a last layer, exact sums suffice.
            (flow.exact if node.leads_to_ids else flow.last).add(id(layer))

    @functools.cached_property
    def answers(self) -> tuple[set[_Node], set[_Node]]:
        """The units that compute the outputs, and the units behind them that meet 16-bit floats.

        TensorFlow adds no float32 tensor to a 16-bit one. So where outputs of layers meet in the code of a layer that
        holds them, all of those layers are among the last ones, or none is.
        """
        candidates = {
            node
            for node in self.nodes
            if node.unit
            and node.computing
            and node.live
            and all(self.ends(each) for each in node.consumers if each.live)
        }
        narrow: set[_Node] = set()
        while True:
            wide: set[_Node] = set()
            mixed: list[_Node] = []
            for node in self.nodes:
                floats = [each for each in node.computed_inputs(self.makers) if each.dtype.is_floating]
                makers = {self.makers[each.name] for each in floats}
                if node in narrow:
                    continue
                if node.unit is not None and (node in candidates or node.tail):
                    wide.add(node)
                elif node.unit is None and node.tail and makers & wide:
                    if makers <= wide or not self.is_in_own_code(node):
                        wide.add(node)
                    else:
                        mixed.append(node)
            if not mixed:
                return candidates - narrow, {node for node in narrow if node.tail and node.unit}
            stack = mixed
            while stack:
                node = stack.pop()
                narrow.add(node)
                stack += [maker for each in node.inputs if (maker := self.makers.get(each.name)) in wide - narrow]

    def read_identities(self, flow: Flow) -> None:
        """Reads layers that return their input tensor itself, which leaves no trace in the graph."""
        for unit in self.units:
            if unit.last > unit.first or _weights(unit.operation) or not unit.arguments:
                continue
            makers = [self.makers[each.name] for each in unit.arguments if each.name in self.makers]
            computed = any(maker.computed for maker in makers)
            consumers = [each for maker in makers for each in maker.consumers if each.live]
            tail = bool(makers) and all(self.ends(each) for each in consumers)
            if (not computed or tail) and not isinstance(unit.operation, _data_layers()):
                flow.exact.add(id(unit.operation))

    def meets_others(self, node: _Node) -> bool:
        """Whether a node's output meets activations in the code of a layer that holds others."""
        found, seen, stack = False, set(), [node]
        while stack and not found:
            for consumer in stack.pop().consumers:
                if consumer.unit is not None or consumer in seen or not self.is_in_own_code(consumer):
                    continue
                seen.add(consumer)
                if consumer.moves():
                    stack.append(consumer)
                elif len(consumer.inputs) > 1 and any(
                    self.makers[each.name] is not node and each.dtype.is_floating
                    for each in consumer.computed_inputs(self.makers)
                ):
                    found = True
        return found

    def is_container(self, call: Call) -> bool:
        layer = call.operation
        return (
            isinstance(layer, keras.Layer)
            and not isinstance(layer, (keras_models.Functional, keras.Sequential))
            and not _is_whole(layer)
        )

    def is_in_own_code(self, node: _Node) -> bool:
        """Whether an operation is in the code of a layer that holds others, not in a Functional model's graph."""
        inner = [call for call in self.traced.calls if call.first <= node.place < call.last]
        return bool(inner) and self.is_container(inner[-1])

    def read_container(self, call: Call, flow: Flow) -> None:
        layer = call.operation
        doors = [
            self.makers[each.name] for each in call.arguments if each.dtype.is_floating and each.name in self.makers
        ]
        inside = [node for node in self.nodes if call.first <= node.place < call.last]
        # The nodes in its own code, without those in the code of layers inside it.
        inner = [each for each in self.traced.calls if each.parent is call]
        own = [node for node in inside if not any(each.first <= node.place < each.last for each in inner)]
        if any(door.raw and not door.computed for door in doors) and any(self.wants_raw(each, flow) for each in inside):
            # The call could not tell them from activations that come in as well.
            (flow.mixed_doors if any(door.computed for door in doors) else flow.raw_inputs).add(id(layer))
        operations = [operation for node in own if node.unit is None for operation in node.operations]
        if is_foreign(layer) and counts_and_goes_on(operations):
            flow.own_code.add(id(layer))
        if call.adds_losses:
            flow.losses.add(id(layer))

    def wants_raw(self, node: _Node, flow: Flow) -> bool:
        """Whether rounding the numbers from outside would change the results of a node."""
        if not any(each.dtype.is_floating for each in node.raw_inputs(self.makers)):
            return False
        if node.unit is not None:
            layer = node.unit.operation
            return id(layer) in flow.exact or isinstance(layer, (keras.layers.Embedding, *_data_layers()))
        operation = node.operations[0]
        return to_integer(operation) or not (node.moves() or node.computed or operation.type in STRUCTURE)

    @functools.cached_property
    def nodes_by_place(self) -> dict[int, _Node]:
        return {node.place + offset: node for node in self.nodes for offset in range(len(node.operations))}

    def node_at(self, place: int) -> _Node:
        return self.nodes_by_place[place]


def _parents(call: Call) -> Iterator[Call]:
    parent = call.parent
    while parent is not None:
        yield parent
        parent = parent.parent


def _is_whole(layer: keras.Operation) -> bool:
    """Whether a layer is read as a whole: it holds no others, or its use of them is known."""
    if not isinstance(layer, keras.Layer) or isinstance(layer, keras.Model):
        return False
    return not keras_layers.inner_layers(layer) or not is_foreign(layer)
