"""Keras's files: where the weights of a layer stand, what else stands in a file, and what reads it."""

import contextlib
import contextvars
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

# What tells a model that is being written to HDF5 from one that is written to `.keras`.
from keras.src.backend.common.global_state import get_global_attribute as _saving_options_flag

# Where in a file the weights of a layer stand is decided in here, by the names of classes, and no public name tells or
# changes it; nor what else stands in a file, or what reads it.
from keras.src.saving import saving_lib as _saving_lib

# What Keras keeps the arguments of a constructor in, and whether Python code in files is run.
from keras.src.saving import serialization_lib as _serialization_lib

# The base of all whose state stands in files.
from keras.src.saving.keras_saveable import KerasSaveable as _KerasSaveable

# From the name of a class to that in a file.
from keras.src.utils.naming import to_snake_case as _to_snake_case

__all__ = [
    "install",
    "layers_by_address",
    "load_with_keras",
    "read_model_files_by",
    "saving_to_h5",
    "store_like",
    "trusting",
    "write_into_model_files",
]


def saving_to_h5() -> bool:
    """Whether Keras is writing a model to its old HDF5 format now."""
    return bool(_saving_options_flag("use_legacy_config"))


# Keras files the weights of the layers in a list under the names of their classes: "dense", "head", "dense_1". Those of
# a class that stands in for another are filed as the other's are, so that the files of both models fit both.
_stored_like: dict[type, type] = {}


_addresses: contextvars.ContextVar["dict[tuple[int, str], str] | None"] = contextvars.ContextVar(
    "_addresses", default=None
)


def store_like(cls: type[keras.Layer], stock: type[keras.Layer]) -> None:
    """Has the weights of layers of a class stand in files where those of another class would.

    Files that were written before it had are read as well.

    Args:
        cls: the class, not those that inherit from it.
        stock: the other one, which has the same weights.
    """
    _stored_like[cls] = stock


def _names_in_file(kinds: Iterable[type]) -> list[str]:
    """The names that Keras gives to what is in one list, which have a number from the second of a class on."""
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        name = _to_snake_case(kind.__name__)
        counts[name] = counts.get(name, -1) + 1
        names.append(f"{name}_{counts[name]}" if counts[name] else name)
    return names


def _as_written(
    store: Any, path: str, saveables: "list[_KerasSaveable]", known: Any, by_keras: list[str], here: list[str]
) -> list[str]:
    """The addresses at which a file has what is in one list.

    Before version 0.2 each was filed by its own class, which gives more names of that class than a file has now. And
    `convert` put in fewer layers of such classes, always the last ones.
    """

    def are_there(addresses: list[str]) -> bool:
        unread = [each for saveable, each in zip(saveables, addresses, strict=True) if id(saveable) not in known]
        return all(_is_in_file(store, each) for each in unread)

    if are_there(by_keras):
        return by_keras
    if not are_there(here):
        for cls, stock in _stored_like.items():
            names = _names_in_file([cls] * len(saveables))
            count = sum(_is_in_file(store, f"{path}/{name}") for name in names)
            kinds = [_name_of(type(each)) for each in saveables]
            alike = [place for place, kind in enumerate(kinds) if kind.__name__ == stock.__name__]
            for place in alike[len(alike) - count :]:
                kinds[place] = cls
            before = [f"{path}/{name}" for name in _names_in_file(kinds)]
            if count and are_there(before):
                return before
    return here


def _saveables(container: Any) -> "list[_KerasSaveable]":
    return [each for each in _elements(container) if isinstance(each, _KerasSaveable)]


def _elements(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _name_of(cls: type) -> type:
    return _stored_like.get(cls, cls)


def _is_in_file(store: Any, path: str) -> bool:
    if hasattr(store, "has_path"):  # Keras 3.15
        return bool(store.has_path(path))
    if hasattr(store, "sharding_config"):
        return any(f"{key}/".startswith(f"/{path}/") for key in store.sharding_config["weight_map"])
    return path in (store.contents if hasattr(store, "contents") else store.h5_file)


def _filed(keras_function: Callable[..., None]) -> Callable[..., None]:
    """Keras's function that saves or loads one object, at the address that its class is given here."""

    @functools.wraps(keras_function)
    def at_its_address(
        saveable: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any, **kw: Any
    ) -> None:
        inner_path = (_addresses.get() or {}).get((id(saveable), inner_path), inner_path)
        return keras_function(saveable, weights_store, assets_store, inner_path, *args, **kw)

    return at_its_address


def _filed_together(keras_function: Callable[..., None]) -> Callable[..., None]:
    """Keras's function that saves or loads the objects in one list, with the addresses that they are given here."""

    @functools.wraps(keras_function)
    def at_their_addresses(
        container: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any, **kw: Any
    ) -> None:
        addresses = _addresses.get() or {}
        saveables = _saveables(container)
        if any(type(each) in _stored_like for each in saveables):
            kinds = [type(each) for each in saveables]
            by_keras = [f"{inner_path}/{name}" for name in _names_in_file(kinds)]
            here = [f"{inner_path}/{name}" for name in _names_in_file(map(_name_of, kinds))]
            known = kw.get("visited_saveables") or ()
            if (
                "failed_saveables" in kw
                and weights_store is not None
                and any(id(each) not in known for each in saveables)
            ):
                here = _as_written(weights_store, inner_path, saveables, known, by_keras, here)
            moved = zip(saveables, by_keras, here, strict=True)
            addresses = addresses | {(id(each), before): now for each, before, now in moved if now != before}
        token = _addresses.set(addresses)
        try:
            return keras_function(container, weights_store, assets_store, inner_path, *args, **kw)
        finally:
            _addresses.reset(token)

    return at_their_addresses


def layers_by_address(model: keras.Layer) -> dict[str, keras.Layer]:
    """A layer and all layers inside it, by the place in a file where Keras looks for their weights.

    That is the same for a model that is made again, whose layers may have other names. A layer that is used in several
    places stands at the first of them, before what is inside it.

    Args:
        model: a layer or model.
    """
    found: dict[str, keras.Layer] = {}
    seen: set[int] = set()

    def visit(value: Any, address: str) -> None:
        if not isinstance(value, (_KerasSaveable, list, dict, tuple, set)) or id(value) in seen:
            return
        if isinstance(value, _KerasSaveable):
            seen.add(id(value))
            if isinstance(value, keras.Layer):
                found.setdefault(address, value)
            for name, child in list(_saving_lib._walk_saveable(value)):
                visit(child, f"{address}/{name}")
            return
        inside.append(id(value))
        saveables = _saveables(value)
        for child, name in zip(saveables, _names_in_file(_name_of(type(each)) for each in saveables), strict=True):
            visit(child, f"{address}/{name}")
        for number, child in enumerate(each for each in _elements(value) if isinstance(each, (list, dict, tuple))):
            if id(child) not in inside:
                visit(child, f"{address}/container_{number}")
        inside.pop()

    inside: list[int] = []  # of what may hold itself
    visit(model, "")
    return found


def write_into_model_files(key: str, content_of: Callable[[keras.Model], Any]) -> None:
    """Has more written beside the configuration of a model that is saved, to `.keras` files, folders and pickles.

    Keras reads over it.

    Args:
        key: its name among those of a serialized Keras object.
        content_of: gets the model, returns what JSON can hold, or None to write nothing.
    """
    serialize = _saving_lib._serialize_model_as_json

    @functools.wraps(serialize)
    def serialize_with_more(model: keras.Model) -> tuple[str, str]:
        config, metadata = serialize(model)
        content = content_of(model)
        return config if content is None else json.dumps({**json.loads(config), key: content}), metadata

    _saving_lib._serialize_model_as_json = serialize_with_more


def load_with_keras(
    source: Any,
    custom_objects: "dict[str, Any] | None",
    compile: bool,
    safe_mode: bool,
    config: "dict[str, Any] | None" = None,
) -> Any:
    """The model in a file as `keras.saving.load_model` loads it, whatever the file is called.

    Args:
        source: a binary file, open for reading, or the path of a folder.
        custom_objects: as for `keras.saving.load_model`.
        compile: likewise.
        safe_mode: likewise.
        config: what to make the model from, or None for the configuration in the file.
    """
    load = _keras_readers[
        "_load_model_from_dir" if isinstance(source, (str, os.PathLike)) else "_load_model_from_fileobj"
    ]
    make = _saving_lib._model_from_config
    if config is not None:
        _saving_lib._model_from_config = lambda given, *args, **kw: make(json.dumps(config), *args, **kw)
    try:
        return load(source, custom_objects, compile, safe_mode)
    finally:
        _saving_lib._model_from_config = make


_keras_readers: dict[str, Callable[..., Any]] = {
    name: getattr(_saving_lib, name) for name in ("_load_model_from_dir", "_load_model_from_fileobj")
}


def read_model_files_by(read: Callable[[Any, "dict[str, Any] | None", bool, bool], Any]) -> None:
    """Has `keras.saving.load_model` and `pickle` read models by another function than Keras's, which may call that.

    Args:
        read: gets what `load_with_keras` gets, returns the model.
    """
    for name in _keras_readers:
        setattr(_saving_lib, name, functools.wraps(_keras_readers[name])(lambda *args, **kw: read(*args, **kw)))


@contextlib.contextmanager
def trusting(safe_mode: bool) -> Iterator[None]:
    """Inside, whatever Keras makes from a configuration may hold Python code, or must not.

    Keras's own argument does not reach the losses, metrics, schedules and optimizers of a file.

    Args:
        safe_mode: as for `keras.saving.load_model`; None of what the user has set for the whole process is undone.
    """
    allowed = _serialization_lib.in_safe_mode() is False
    with _serialization_lib.SafeModeScope(safe_mode and not allowed):
        yield


def install() -> None:
    """Has Keras's functions file and find weights at the addresses given here."""
    for name in ("_save_state", "_load_state"):
        setattr(_saving_lib, name, _filed(getattr(_saving_lib, name)))
    for name in ("_save_container_state", "_load_container_state"):
        setattr(_saving_lib, name, _filed_together(getattr(_saving_lib, name)))
