"""Keras layers: their paths, what they track, their settings, and what they attach to tensors."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

# The cell of convolutional LSTMs has no public name to inherit from.
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell

# What Keras keeps the arguments of a constructor in, and whether Python code in files is run.
from keras.src.saving import serialization_lib as _serialization_lib

# What keeps track of the variables and layers of a layer, which a copy has to list in the order of the original.
from keras.src.utils.tracking import Tracker as _Tracker

__all__ = [
    "ConvLSTMCell",
    "auto_config",
    "checkpointed",
    "copy_of_table",
    "inner_layers",
    "is_tracker",
    "layers_by_path",
    "lock_alike",
    "logits_of",
    "mask_of",
    "names_of_tensorflow",
    "own_settings",
    "paths_of_layers",
    "set_auto_config",
    "set_dtype_policy",
    "set_tracked",
    "tracked",
    "tracker_like",
    "unlocked",
    "with_logits",
    "with_mask",
    "without_attribute",
]


# Keras has no public name for what its layers, activations and losses attach to tensors: the mask that goes along with
# them, and the logits behind probabilities.
def logits_of(tensor: Any) -> Any:
    """The logits that a softmax or sigmoid has attached to its probabilities, or None."""
    return getattr(tensor, "_keras_logits", None)


def mask_of(tensor: Any) -> Any:
    """The Keras mask that goes along with a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def with_logits(tensor: Any, logits: Any) -> Any:
    """The tensor itself, with logits attached where Keras's losses look for them."""
    tensor._keras_logits = logits
    return tensor


def with_mask(tensor: Any, mask: Any) -> Any:
    """The tensor itself, with a Keras mask attached."""
    tensor._keras_mask = mask
    return tensor


# Keras has no public name for the layers inside a layer that is not a model.
def inner_layers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that a layer holds itself, not those inside them."""
    return list(layer._layers)


def layers_by_path(layer: keras.Layer) -> dict[str, keras.Layer]:
    """A layer and all layers inside it, by the names from the outermost down, joined by "/".

    A layer that is used in several places stands at the first of them. Of several of one path, the first is given.

    Args:
        layer: a layer or model.
    """
    found: dict[str, keras.Layer] = {}
    for each, path in paths_of_layers(layer):
        found.setdefault(path, each)
    return found


def paths_of_layers(layer: keras.Layer) -> list[tuple[keras.Layer, str]]:
    """A layer and all layers inside it, each once, with its path as in `layers_by_path`; some may have the same.

    Args:
        layer: a layer or model.
    """
    found: list[tuple[keras.Layer, str]] = []
    seen: set[int] = set()

    def visit(layer: keras.Layer, path: str) -> None:
        if id(layer) not in seen:
            seen.add(id(layer))
            found.append((layer, path))
            for inner in inner_layers(layer):
                visit(inner, f"{path}/{inner.name}")

    visit(layer, layer.name)
    return found


# What follows is for copies of models. Keras copies a model by its configuration alone, which many have none of.
def auto_config(layer: keras.Layer) -> Any:
    """The arguments that a layer without a `get_config` of its own was made with, or None where Keras keeps none."""
    kept = getattr(layer, "_auto_config", None)
    return None if kept is None else dict(kept.config)


def set_auto_config(layer: keras.Layer, arguments: "dict[str, Any] | None") -> None:
    """Sets what `auto_config` tells, on a layer that was not made by its constructor."""
    layer._auto_config = None if arguments is None else _serialization_lib.SerializableDict(**arguments)


def set_dtype_policy(layer: keras.Layer, policy: keras.DTypePolicy) -> None:
    """Sets the policy of a layer whose variables fit it already. The property would quantize the layer."""
    layer._dtype_policy = policy


# Attributes that every layer has from `keras.Layer`, which no public name tells from those of its class. A copy has
# them from its own constructor. Of these a copy gets the value of the original; the others are tied to one object.
_KEPT = ("_build_shapes_dict", "_call_context_args", "_call_has_context_arg", "_remat_mode")


def own_settings(layer: keras.Layer, names: Iterable[str]) -> dict[str, Any]:
    """Those attributes among some that hold a setting and not a part of the layer.

    Args:
        layer: a layer.
        names: attributes that a constructor of Keras has set.
    """
    kinds = (bool, str, int, keras.layers.InputSpec, type(None))
    # The strategy is that of the scope in which the copy is made.
    there = {name: vars(layer)[name] for name in names if name in vars(layer) and name != "_distribute_strategy"}
    return {name: value for name, value in there.items() if name in _KEPT or isinstance(value, kinds)}


# What a layer, a metric or an optimizer tracks has no public name that tells one store from another and lists the items
# in the order that `weights` has.
def is_tracker(value: Any) -> bool:
    """Whether an object is what Keras tracks the parts of another with."""
    return isinstance(value, _Tracker)


def tracked(owner: Any) -> dict[str, list[Any]]:
    """What a layer, a metric or an optimizer tracks, by kind.

    Args:
        owner: one of these. Another object tracks nothing.
    """
    tracker = getattr(owner, "_tracker", None)
    return {} if tracker is None else {name: list(items) for name, (_, items) in tracker.config.items()}


def set_tracked(owner: Any, store: str, items: list[Any]) -> None:
    """Sets what `tracked` tells of one kind."""
    tracker = owner._tracker
    kept = tracker.config[store][1]
    if [*map(id, kept)] != [*map(id, items)]:
        kept.clear()
        kept.extend(items)
    tracker.stored_ids[store] = set(map(id, items))


def tracker_like(tracker: Any, list_of: Callable[[list[Any]], list[Any]]) -> Any:
    """A tracker like another.

    Args:
        tracker: the other.
        list_of: from a list that it keeps to the one that takes its place.
    """
    config = {name: (test, list_of(items)) for name, (test, items) in tracker.config.items()}
    copy = _Tracker(config, exclusions=tracker.exclusions)
    copy.stored_ids = {name: set(map(id, items)) for name, (_, items) in config.items()}
    return copy


@contextlib.contextmanager
def unlocked(layer: keras.Layer) -> Iterator[None]:
    """Inside, a layer that is built takes further variables and layers."""
    tracker = layer._tracker
    locked, message = tracker.locked, tracker._lock_violation_msg
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock(message)


def lock_alike(layer: keras.Layer, copy: keras.Layer) -> None:
    """Has a copy take further variables and layers if the original does."""
    copy._tracker.locked, copy._tracker._lock_violation_msg = layer._tracker.locked, layer._tracker._lock_violation_msg


def names_of_tensorflow() -> frozenset[str]:
    """The attributes in which TensorFlow keeps what it tracks on an object. Others may begin with `_self_` as well."""
    return _names_of_tensorflow()


@functools.cache
def _names_of_tensorflow() -> frozenset[str]:
    tracking = tf.__internal__.tracking.AutoTrackable()
    tracking.variable = tf.Variable(0)
    return frozenset(vars(tracking)) - {"variable"} | {"_self_setattr_tracking"}


def checkpointed(owner: Any, name: str) -> bool:
    """Whether TensorFlow saves an attribute in checkpoints, which it does not where it was set behind its back."""
    return name in getattr(owner, "_self_unconditional_dependency_names", ())


def without_attribute(layer: keras.Layer, name: str) -> None:
    """Takes an attribute away. Keras's own way collects garbage, of the whole process, each time."""
    tf.__internal__.tracking.AutoTrackable.__delattr__(layer, name)


def copy_of_table(table: Any) -> Any:
    """A copy of a lookup table that changes; nothing public tells what it was made with.

    Args:
        table: a `tf.lookup.experimental.MutableHashTable` or `DenseHashTable`.
    """
    keys, values = table.export()
    arguments = {"default_value": table._default_value}
    if isinstance(table, tf.lookup.experimental.DenseHashTable):
        arguments |= {"empty_key": table._empty_key, "deleted_key": table._deleted_key}
        # It exports its empty places as well.
        free = [tf.cast(key, keys.dtype) for key in (table._empty_key, table._deleted_key)]
        axes = list(range(1, keys.shape.rank))
        taken = tf.reduce_all([tf.reduce_any(tf.not_equal(keys, key), axes) for key in free], 0)
        keys, values = keys[taken], values[taken]
    copy = type(table)(table.key_dtype, table.value_dtype, **arguments)
    copy.insert(keys, values)
    return copy
