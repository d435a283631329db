"""Statistics of the outputs of layers and of their gradients, taken inside a training step while it runs."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import execution, keras_calls, keras_layers
from keras_mp.diagnostics.statistics import LENGTH, Statistics, statistics
from keras_mp.ops import fusion

__all__ = ["Tap", "Taps"]

_COUNTS = LENGTH - 3


@dataclasses.dataclass(frozen=True)
class Tap:
    """One tensor that statistics are kept of.

    Attributes:
        path: of the layer, its names from the model down, joined by "/".
        what: "output", "gradient" (of the loss to the output) or "input gradient" (of the loss to an input).
        number: which of the layer's outputs or inputs, counted from 0.
        dtype: of the tensor.
        shape: of the tensor, with None for axes of unknown size.
    """

    path: str
    what: str
    number: int
    dtype: str
    shape: tuple[int | None, ...] | None


class _Slot:
    """Where one replica adds up the statistics of one tensor."""

    def __init__(self) -> None:
        self.counts = keras_calls.plain_variable(np.zeros(_COUNTS, np.int64))
        self.largest, self.smallest, self.squares = map(keras_calls.plain_variable, (0.0, np.float32(np.inf), 0.0))

    def add(self, x: tf.Tensor, in_xla: bool) -> None:
        counts, values = statistics(x, in_xla)
        self.counts.assign_add(tf.cast(counts, tf.int64))
        self.largest.assign(tf.maximum(self.largest, values[0]))
        self.smallest.assign(tf.minimum(self.smallest, values[1]))
        self.squares.assign_add(values[2])

    def read(self) -> Statistics:
        counts, *values = (each.numpy() for each in (self.counts, self.largest, self.smallest, self.squares))
        return Statistics(counts, *map(float, values))

    def reset(self) -> None:
        self.counts.assign(tf.zeros_like(self.counts))
        self.largest.assign(0.0)
        self.smallest.assign(np.inf)
        self.squares.assign(0.0)


class Taps:
    """Keeps statistics of the outputs of a model's layers, and of the gradients of the loss to them.

    Whatever is traced under `active` adds to the statistics each time that it runs: eagerly, in a graph, compiled by
    XLA, in loops and on replicas. No number of the model changes. A layer that is called several times, and a layer
    that is recomputed in the backward pass, adds as often. Inside the loop of a recurrent layer only outputs are
    counted; the gradient of the whole layer's output is.

    Args:
        model: a built model.
        what: which of "output", "gradient" and "input gradient" to keep statistics of.
        layers: pattern of layer paths, as for `re.search`, or None for all.
        see: a function that gets each `Tap` and the tensor when it is computed, or None. Without XLA only.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="hidden")], name="net")
    >>> taps = Taps(model)
    >>> with taps.active():
    ...     y = model(tf.ones((4, 2)))
    >>> [(tap.path, tap.what, found.size) for tap, found in taps.read().items() if found.size]
    [('net/hidden', 'output', 12), ('net', 'output', 12)]
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        what: Sequence[str] = ("output", "gradient"),
        layers: str | None = None,
        see: Callable[[Tap, np.ndarray], None] | None = None,
    ) -> None:
        paths = _paths(model)
        self._paths = {key: path for key, path in paths.items() if layers is None or re.search(layers, path)}
        self._what, self._see = frozenset(what), see
        self._slots: dict[Tap, dict[int, _Slot]] = {}
        self._kept = model  # so that no `id` of a layer becomes that of another

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, calls of the model's layers are followed, and so is what is traced of them for later."""
        with keras_calls.calls_through(self._before, self._after):
            yield

    def read(self) -> dict[Tap, Statistics]:
        """Returns the statistics so far, in the order in which the layers' calls ended; replicas add up."""
        return {tap: _sum(slot.read() for slot in slots.values()) for tap, slots in self._slots.items()}

    def reset(self) -> None:
        """Forgets the statistics so far."""
        for slots in self._slots.values():
            for slot in slots.values():
                slot.reset()

    def _before(self, operation: keras.Operation, arguments: Any) -> Any:
        if "input gradient" not in self._what:
            return arguments
        return self._follow(operation, arguments, None, "input gradient")

    def _after(self, operation: keras.Operation, outputs: Any) -> Any:
        backward = "gradient" if "gradient" in self._what else None
        return self._follow(operation, outputs, "output" if "output" in self._what else None, backward)

    def _follow(self, operation: keras.Operation, values: Any, forward: str | None, backward: str | None) -> Any:
        path = self._paths.get(id(operation))
        if path is None or keras_calls.in_symbolic_call():
            return values
        number = -1

        def follow(y: Any) -> Any:
            nonlocal number
            number += 1
            if not isinstance(y, tf.Tensor) or not y.dtype.is_floating:
                return y
            return self._follow_tensor(y, path, number, forward, backward)

        return keras.tree.map_structure(follow, values)

    def _follow_tensor(
        self, y: tf.Tensor, path: str, number: int, forward: str | None, backward: str | None
    ) -> tf.Tensor:
        in_xla = execution.in_xla_context()
        shape = None if y.shape.rank is None else tuple(y.shape.as_list())
        if forward:
            self._add(Tap(path, forward, number, y.dtype.name, shape), y, in_xla)
        if not backward or keras_calls.in_loop():
            return y
        tap = Tap(path, backward, number, y.dtype.name, shape)
        self._slot(tap)  # in the order of the forward pass

        @fusion.custom_gradient
        def with_gradient(y: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                self._add(tap, upstream, in_xla)
                return upstream

            return tf.identity(y), gradient

        return keras_layers.with_attachments(with_gradient(y), keras_layers.mask_of(y), keras_layers.logits_of(y))

    def _add(self, tap: Tap, x: tf.Tensor, in_xla: bool) -> None:
        self._slot(tap).add(x, in_xla)
        if self._see is not None:
            see = self._see

            @tf.autograph.experimental.do_not_convert
            def show(x: np.ndarray) -> None:
                see(tap, x)

            tf.numpy_function(show, [tf.cast(x, tf.float32)], [])

    def _slot(self, tap: Tap) -> _Slot:
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            number, device = 0, None
        else:
            number = int(tf.get_static_value(replica.replica_id_in_sync_group))
            device = tf.nest.flatten(replica.devices)[0]
        slots = self._slots.setdefault(tap, {})
        if number not in slots:
            # Each replica has variables of its own on its device: those of a strategy are one for all.
            with tf.init_scope(), tf.device(device):
                slots[number] = _Slot()
        return slots[number]


def _sum(found: Iterable[Statistics]) -> Statistics:
    first, *others = found
    for each in others:
        first = first + each
    return first


def _paths(model: keras.Model) -> dict[int, str]:
    """The path of each layer by its `id`, and of each operation of a graph, by its name below that of its model."""
    paths: dict[int, str] = {}
    for layer, path in keras_layers.paths_of_layers(model):
        paths.setdefault(id(layer), path)
        for operation in getattr(layer, "operations", ()):
            if not isinstance(operation, keras.Layer):
                paths.setdefault(id(operation), f"{path}/{operation.name}")
    return paths
