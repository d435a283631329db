"""Keras layers: their paths, what they track, their settings, and what they attach to tensors."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

# The cell of convolutional LSTMs has no public name to inherit from.
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell

# The class in which Keras keeps the arguments of a constructor has no public name.
from keras.src.saving import serialization_lib as _serialization_lib

# The class that tracks a layer's variables and layers has no public name. A copy must list them in the same order.
from keras.src.utils.tracking import Tracker as _Tracker

__all__ = [
    "ConvLSTMCell",
    "auto_config",
    "checkpointed",
    "copy_of_table",
    "inner_layers",
    "is_trackable",
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
    "with_attachments",
    "with_logits",
    "with_mask",
    "without_attribute",
]


# Keras's layers, activations and losses attach masks and logits to tensors, under no public name.
def logits_of(tensor: Any) -> Any:
    """Returns the logits that a softmax or sigmoid has attached to its probabilities, or None."""
    return getattr(tensor, "_keras_logits", None)


def mask_of(tensor: Any) -> Any:
    """Returns the Keras mask of a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def with_logits(tensor: Any, logits: Any) -> Any:
    """Attaches logits where Keras's losses look for them, and returns the tensor."""
    tensor._keras_logits = logits
    return tensor


def with_mask(tensor: Any, mask: Any) -> Any:
    """Attaches a Keras mask, and returns the tensor."""
    tensor._keras_mask = mask
    return tensor


def with_attachments(tensor: Any, mask: Any, logits: Any) -> Any:
    """Attaches a mask and logits, each unless it is None, and returns the tensor."""
    if mask is not None:
        tensor = with_mask(tensor, mask)
    return tensor if logits is None else with_logits(tensor, logits)


# Keras has no public name for the layers inside a layer that is not a model.
def inner_layers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the layers directly inside a layer."""
    return list(layer._layers)


def layers_by_path(layer: keras.Layer) -> dict[str, keras.Layer]:
    """Returns a layer and all layers inside it, by path: the names from the outermost down, joined by "/".

    A layer that is used in several places has the path of the first. If several layers share a path, the first is
    given.

    Args:
        layer: a layer or model.
    """
    found: dict[str, keras.Layer] = {}
    for each, path in paths_of_layers(layer):
        found.setdefault(path, each)
    return found


def paths_of_layers(layer: keras.Layer) -> list[tuple[keras.Layer, str]]:
    """Returns a layer and all layers inside it, each once, with its path. Several layers may share a path.

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


# The rest is for copies of models. Keras copies a model by its configuration alone, and many models have none.
def auto_config(layer: keras.Layer) -> Any:
    """Returns the constructor's arguments of a layer that defines no `get_config`, or None if Keras keeps none."""
    kept = getattr(layer, "_auto_config", None)
    return None if kept is None else dict(kept.config)


def set_auto_config(layer: keras.Layer, arguments: "dict[str, Any] | None") -> None:
    """Sets the result of `auto_config`, on a layer that was not made by its constructor."""
    layer._auto_config = None if arguments is None else _serialization_lib.SerializableDict(**arguments)


def set_dtype_policy(layer: keras.Layer, policy: keras.DTypePolicy) -> None:
    """Sets the policy of a layer whose variables already fit it. The property would quantize the layer."""
    layer._dtype_policy = policy


# Every layer has attributes from `keras.Layer`, which no public name tells from those of its own class. A copy has them
# from its own constructor. It gets the original's values of these; the others belong to one object.
_KEPT = ("_build_shapes_dict", "_call_context_args", "_call_has_context_arg", "_remat_mode")


def own_settings(layer: keras.Layer, names: Iterable[str]) -> dict[str, Any]:
    """Returns the attributes that hold a setting, not a part of the layer.

    Args:
        layer: a layer.
        names: attributes that Keras's constructor has set.
    """
    kinds = (bool, str, int, keras.layers.InputSpec, type(None))
    # The copy has the strategy of the scope in which it is made.
    there = {name: vars(layer)[name] for name in names if name in vars(layer) and name != "_distribute_strategy"}
    return {name: value for name, value in there.items() if name in _KEPT or isinstance(value, kinds)}


# No public name lists the tracked items of a layer, metric or optimizer by store and in the order of `weights`.
def is_tracker(value: Any) -> bool:
    """Returns whether an object is a tracker of Keras."""
    return isinstance(value, _Tracker)


def tracked(owner: Any) -> dict[str, list[Any]]:
    """Returns the tracked items of a layer, metric or optimizer, by store.

    Args:
        owner: one of these. Other objects track nothing.
    """
    tracker = getattr(owner, "_tracker", None)
    return {} if tracker is None else {name: list(items) for name, (_, items) in tracker.config.items()}


def set_tracked(owner: Any, store: str, items: list[Any]) -> None:
    """Sets the tracked items of one store."""
    tracker = owner._tracker
    kept = tracker.config[store][1]
    if [*map(id, kept)] != [*map(id, items)]:
        kept.clear()
        kept.extend(items)
    tracker.stored_ids[store] = set(map(id, items))


def tracker_like(tracker: Any, list_of: Callable[[list[Any]], list[Any]]) -> Any:
    """Returns a copy of a tracker.

    Args:
        tracker: the original.
        list_of: maps a list of the original to the list that replaces it.
    """
    config = {name: (test, list_of(items)) for name, (test, items) in tracker.config.items()}
    copy = _Tracker(config, exclusions=tracker.exclusions)
    copy.stored_ids = {name: set(map(id, items)) for name, (_, items) in config.items()}
    return copy


@contextlib.contextmanager
def unlocked(layer: keras.Layer) -> Iterator[None]:
    """Inside, a built layer accepts more variables and layers."""
    tracker = layer._tracker
    locked, message = tracker.locked, tracker._lock_violation_msg
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock(message)


def lock_alike(layer: keras.Layer, copy: keras.Layer) -> None:
    """Makes a copy accept more variables and layers if the original does."""
    copy._tracker.locked, copy._tracker._lock_violation_msg = layer._tracker.locked, layer._tracker._lock_violation_msg


def names_of_tensorflow() -> frozenset[str]:
    """Returns the attributes that TensorFlow sets on the objects it tracks. Others may begin with `_self_` as well."""
    return _names_of_tensorflow()


@functools.cache
def _names_of_tensorflow() -> frozenset[str]:
    tracking = tf.__internal__.tracking.AutoTrackable()
    tracking.variable = tf.Variable(0)
    return frozenset(vars(tracking)) - {"variable"} | {"_self_setattr_tracking"}


def checkpointed(owner: Any, name: str) -> bool:
    """Returns whether TensorFlow saves an attribute in checkpoints. It does not if `__setattr__` was bypassed."""
    return name in getattr(owner, "_self_unconditional_dependency_names", ())


def without_attribute(layer: keras.Layer, name: str) -> None:
    """Deletes an attribute. Keras's own way collects the garbage of the whole process each time."""
    tf.__internal__.tracking.AutoTrackable.__delattr__(layer, name)


def copy_of_table(table: Any) -> Any:
    """Returns a copy of a mutable lookup table. No public name tells the arguments that it was made with.

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


def is_trackable(value: Any) -> bool:
    """Whether TensorFlow can save an object in checkpoints, which no public name tells."""
    return isinstance(value, tf.__internal__.tracking.Trackable)
