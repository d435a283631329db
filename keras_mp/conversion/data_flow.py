"""Which layers of a model handle numbers that 16 bits would ruin, read off a trace of the model in float32.

Ids, times, positions and levels are floats that only mean something exactly. They come from the inputs (or are counted
inside), pass layers that only move, compare or add them up, and end where something is computed of them: in a matmul, a
convolution, an embedding. Behind the last computing layer the numbers are a model's output: boxes, logits, levels.
So the rule is one of data flow. The model is traced once, its layers' calls are laid over the graph of TensorFlow's
operations, and each layer is asked what reaches it and where its output goes.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_hooks, keras_layers, keras_models, tf_graphs

__all__ = ["Call", "Flow", "Traced", "flow_of", "input_specs", "is_foreign", "trace"]

# Positional and named arguments.
Specs = tuple[tuple[Any, ...], dict[str, Any]]

# Operations that make new numbers of many: from here on they are activations.
_COMPUTING = ("MatMul", "Conv", "Einsum", "Call", "While", "If", "Case")  # parts of their names
# Operations that hand numbers on as they are.
_MOVING = (
    "Identity", "Cast", "Reshape", "Transpose", "ExpandDims", "Squeeze", "Slice", "StridedSlice", "Pad", "PadV2",
    "ConcatV2", "Pack", "Unpack", "Split", "SplitV", "Tile", "BroadcastTo", "StopGradient", "EnsureShape", "ReverseV2",
    "MirrorPad",
)  # fmt: skip
# Operations whose result says nothing of their input's values.
_STRUCTURE = ("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike")
_COUNTING = ("Range", "Cumsum", "LinSpace")


@dataclass(eq=False)
class Call:
    """One call of a layer, or of an operation of a Functional model, and its stretch of the graph."""

    operation: keras.Operation
    parent: "Call | None"
    first: int
    arguments: list[tf.Tensor]
    last: int = 0
    outputs: list[tf.Tensor] = field(default_factory=list)
    adds_losses: bool = False

    def is_inside(self, operation: keras.Operation) -> bool:
        """Whether this is a call of that layer, or one made in such a call."""
        return self.operation is operation or (self.parent is not None and self.parent.is_inside(operation))


@dataclass
class Traced:
    """A graph of a model's call, the calls in it in the order of their beginning, and what came out."""

    graph: tf.Graph
    inputs: list[tf.Tensor]
    calls: list[Call]
    outputs: list[tf.Tensor]


@dataclass
class Flow:
    """What the trace says of each layer, by the layer's `id`.

    Attributes:
        exact: layers whose numbers have to stay in float32, with all that is inside them.
        last: layers that compute and behind which nothing else does, before the model's outputs.
        raw_inputs: layers that hand inputs of the model on to others as they are, and must not round them at the door.
        mixed_doors: layers that should do so, and have activations among their inputs as well.
        own_code: layers that hold layers, and whose own code counts.
        mixing: layers whose output meets that of others in the code of a layer that holds both.
        tail: operations of a Functional model behind the last computing layer.
        losses: layers with code of their own that adds losses.
    """

    exact: set[int] = field(default_factory=set)
    last: set[int] = field(default_factory=set)
    raw_inputs: set[int] = field(default_factory=set)
    mixed_doors: set[int] = field(default_factory=set)
    own_code: set[int] = field(default_factory=set)
    mixing: set[int] = field(default_factory=set)
    tail: set[int] = field(default_factory=set)
    losses: set[int] = field(default_factory=set)


def is_foreign(layer: keras.Operation) -> bool:
    """Whether a layer runs code that is neither Keras's nor ours, so that nothing is known of it but by trying."""
    module = type(layer).__module__.split(".")[0]
    return module not in ("keras", "keras_mp") or isinstance(layer, keras.layers.Lambda)


def input_specs(model: keras.Model) -> list[Specs]:
    """Symbolic arguments that a model may be called with, the likeliest first; none where it is not built.

    Keras keeps the shapes that a subclassed model was built with, and not the dtypes.
    """
    if isinstance(model, (keras_models.Functional, keras.Sequential)):
        if not model.built or not getattr(model, "inputs", None):
            return []
        inputs = model.input if isinstance(model, keras_models.Functional) else model.inputs[0]
        # Layers write longer programs for lengths that they do not know, and a short one serves as well.
        return [((keras.tree.map_structure(_short, inputs),), {}), ((inputs,), {})]
    shapes = model.get_build_config() if model.built else None
    if not shapes:
        return []
    found: list[Specs] = []
    for dtype in ("float32", "int32", "string"):
        for free in (True, False):  # some code needs to know the size of the batch

            def symbol(shape: Any, dtype: str = dtype, free: bool = free) -> keras.KerasTensor:
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
    """A symbolic tensor whose unknown lengths, but for the batch's, are 32."""
    shape = tuple(32 if size is None and axis > 0 else size for axis, size in enumerate(symbol.shape))
    return keras.KerasTensor(shape, symbol.dtype, sparse=symbol.sparse)


def trace(model: keras.Model, specs: Specs, training: bool, running: list[Any] | None = None) -> Traced:
    """Runs a model's code on placeholders and changes nothing of it: no variable, no loss.

    Args:
        model: a built model.
        specs: the arguments of its call, symbolic, by place and by name.
        training: as in its call.
        running: gets the layers that are being called when an error is raised, from the outermost inwards.

    Raises:
        Exception: whatever the code raises.
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
        warnings.filterwarnings("ignore", module="keras")  # what Keras says of a model, it says when that is called
        args, kwargs = keras.tree.map_structure(tf_graphs.placeholder, specs)
        outputs = keras_models.call(model, *args, training=training, **kwargs)
    return Traced(graph, _tensors((args, kwargs)), calls, _tensors(outputs))


def flow_of(model: keras.Model, specs: list[Specs]) -> "tuple[Flow, Specs] | tuple[None, None]":
    """The flow through a model, and the specification that it could be traced with; (None, None) if with none.

    Args:
        model: a built model that computes in float32, or one that was converted.
        specs: what `input_specs` found.
    """
    modes = (True, False) if any(map(is_foreign, keras_layers.layers_by_path(model).values())) else (False,)
    for spec in specs:
        for training in modes:
            try:
                traced = trace(model, spec, training)
            except Exception:  # what a model raises for inputs that it does not expect
                continue
            return _Reading(model, traced).flow(), spec
    return None, None


def _tensors(structure: Any) -> list[tf.Tensor]:
    flat = keras.tree.flatten(structure)
    return [each for each in flat if isinstance(each, tf.Tensor) and hasattr(each, "graph")]


def _weights(layer: keras.Layer) -> list[keras.Variable]:
    return [weight for weight in layer.weights if keras.backend.is_float_dtype(weight.dtype)]


@functools.cache
def _data_layers() -> tuple[type, ...]:
    return keras_models.preprocessing_classes()


class _Node:
    """An operation outside of all units, or the call of a unit."""

    def __init__(self, place: int, unit: Call | None, operations: list[Any], computing: bool) -> None:
        self.place, self.unit, self.operations = place, unit, operations
        self.inputs: list[tf.Tensor] = []
        self.computing = computing
        self.computed = self.raw = False  # of what it answers
        self.consumers: set[_Node] = set()
        self.is_output = self.live = self.tail = self.leads_to_ids = False

    def moves(self) -> bool:
        return self.unit is None and self.operations[0].type in _MOVING

    def computed_inputs(self, makers: dict[str, "_Node"]) -> list[tf.Tensor]:
        return [each for each in self.inputs if each.name in makers and makers[each.name].computed]

    def raw_inputs(self, makers: dict[str, "_Node"]) -> list[tf.Tensor]:
        return [
            each
            for each in self.inputs
            if each.name in makers and makers[each.name].raw and not makers[each.name].computed
        ]


class _Reading:
    """One reading of a trace: what it takes for a unit, the graph between those, and what follows from it."""

    def __init__(self, model: keras.Model, traced: Traced) -> None:
        self.model, self.traced = model, traced
        self.operations = traced.graph.get_operations()
        self.units = [call for call in traced.calls if self.is_unit(call)]
        self.makers: dict[str, _Node] = {}
        self.nodes = list(self.make_nodes())
        self.connect()

    def is_unit(self, call: Call) -> bool:
        """Whether a call is looked at as a whole: that of a layer without layers inside, or of one of Keras's own."""
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
                node = _Node(place, None, [operation], _computes(operation))
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
        """Whether a unit hands numbers on, or makes none of its own that would be activations."""
        layer = unit.operation
        return isinstance(layer, (keras.layers.Normalization, *_data_layers())) or not _weights(layer)

    def connect(self) -> None:
        """Lets what reaches each node flow forwards, and what becomes of its output backwards."""
        sources = {tensor.name for tensor in self.traced.inputs}
        for node in self.nodes:
            counts = any(operation.type in _COUNTING for operation in node.operations)
            first = node.operations[0]
            structure = node.unit is None and first.type in _STRUCTURE
            node.raw = counts or any(output.name in sources for output in first.outputs)
            if not structure:
                makers = [self.makers[each.name] for each in node.inputs if each.name in self.makers]
                table = self.makers.get(first.inputs[0].name) if "Gather" in first.type else None
                if node.unit is None and table is not None and not (table.raw or table.computed):
                    node.computing = True  # it looks weights up, as an embedding does
                # A truth value is right in any dtype, and so is the mask that is made of it.
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
        """Whether nothing computes behind a node that takes what it is given as it is."""
        return node.tail or self.takes_ids(node)

    def takes_ids(self, node: _Node) -> bool:
        """Whether a node takes the floats that it is given for integers, or looks them up."""
        if node.unit is None:
            return _to_integer(node.operations[0])
        if isinstance(node.unit.operation, (keras.layers.Embedding, *_data_layers())):
            return True
        if not is_foreign(node.unit.operation):
            return False
        names = {each.name for each in node.inputs}
        for operation in node.operations:
            if any(each.name in names for each in operation.inputs):
                if _to_integer(operation):
                    return True
                if operation.type in (*_MOVING, "Round", "Rint", "Floor", "Ceil"):
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
            counts = _counts(node.operations)
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
        if by_itself and (counts or self.takes_ids(node) or (raw and not _goes_into_matmul(node.operations, raw))):
            flow.exact.add(id(layer))
        elif any(each.dtype.is_floating for each in raw) and keras_layers.inner_layers(layer):
            flow.raw_inputs.add(id(layer))
        if node in self.answers[0]:
            # Ids are to be computed exactly, and an answer only summed so.
            (flow.exact if node.leads_to_ids else flow.last).add(id(layer))

    @functools.cached_property
    def answers(self) -> tuple[set[_Node], set[_Node]]:
        """The units that compute what nothing but the answer is made of, and those behind them that meet 16-bit floats.

        In the code of a layer that holds others, TensorFlow adds no float32 number to a 16-bit one. So the layers whose
        outputs meet there are all among the last ones, or none is.
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
        """Of layers that hand a tensor on as it is, which leaves no trace in the graph."""
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
        """Whether an operation in the code of a layer that holds others takes a node's output with activations."""
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
        """Whether an operation stands in the code of a layer that holds others, not in a Functional model's graph."""
        inner = [call for call in self.traced.calls if call.first <= node.place < call.last]
        return bool(inner) and self.is_container(inner[-1])

    def read_container(self, call: Call, flow: Flow) -> None:
        layer = call.operation
        doors = [
            self.makers[each.name] for each in call.arguments if each.dtype.is_floating and each.name in self.makers
        ]
        inside = [node for node in self.nodes if call.first <= node.place < call.last]
        # What stands in its own code and not in that of a layer inside it.
        inner = [each for each in self.traced.calls if each.parent is call]
        own = [node for node in inside if not any(each.first <= node.place < each.last for each in inner)]
        if any(door.raw and not door.computed for door in doors) and any(self.wants_raw(each, flow) for each in inside):
            # Nobody could tell activations that come in as well from them, at the door.
            (flow.mixed_doors if any(door.computed for door in doors) else flow.raw_inputs).add(id(layer))
        operations = [operation for node in own if node.unit is None for operation in node.operations]
        if is_foreign(layer) and _counts(operations):
            flow.own_code.add(id(layer))
        if call.adds_losses:
            flow.losses.add(id(layer))

    def wants_raw(self, node: _Node, flow: Flow) -> bool:
        """Whether a node makes something of numbers from outside that a rounding of them would change."""
        if not any(each.dtype.is_floating for each in node.raw_inputs(self.makers)):
            return False
        if node.unit is not None:
            layer = node.unit.operation
            return id(layer) in flow.exact or isinstance(layer, (keras.layers.Embedding, *_data_layers()))
        operation = node.operations[0]
        return _to_integer(operation) or not (node.moves() or node.computed or operation.type in _STRUCTURE)

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


def _is_whole(layer: Any) -> bool:
    """Whether a layer is taken as one thing: it holds no others, or what it does with them is known."""
    if not isinstance(layer, keras.Layer) or isinstance(layer, keras.Model):
        return False
    return not keras_layers.inner_layers(layer) or not is_foreign(layer)


def _to_integer(operation: Any) -> bool:
    kind, inputs = operation.type, operation.inputs
    if not inputs or not inputs[0].dtype.is_floating:
        return False
    return kind in ("ArgMax", "ArgMin") or (kind == "Cast" and operation.outputs[0].dtype.is_integer)


def _computes(operation: Any) -> bool:
    return any(mark in operation.type for mark in _COMPUTING)


def _counts(operations: list[Any]) -> bool:
    """Whether code counts, and goes on with what it has counted as floats."""
    names: set[str] = set()
    for operation in operations:
        if operation.type in _COUNTING:
            if operation.outputs[0].dtype.is_floating:
                return True
            names |= {output.name for output in operation.outputs}
        elif operation.outputs and any(each.name in names for each in operation.inputs):
            if operation.type in _STRUCTURE or operation.outputs[0].dtype.is_bool:
                continue
            if operation.outputs[0].dtype.is_floating and "Gather" not in operation.type and operation.type != "OneHot":
                return True
            if operation.outputs[0].dtype.is_integer:
                names |= {output.name for output in operation.outputs}
    return False


def _goes_into_matmul(operations: list[Any], inputs: list[tf.Tensor]) -> bool:
    """Whether all that a layer does with these inputs is to move them and to multiply them by its weights."""
    names = {each.name for each in inputs}
    for operation in operations:
        if not any(each.name in names for each in operation.inputs) or operation.type in _STRUCTURE:
            continue
        if operation.type in _MOVING:
            if _to_integer(operation):
                return False
            names |= {output.name for output in operation.outputs}
        elif not _computes(operation) and any(
            each.name in names and each.dtype.is_floating for each in operation.inputs
        ):
            return False
    return True
