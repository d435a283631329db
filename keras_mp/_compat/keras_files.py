"""Keras's model files: the addresses of weights in them, what else they hold, and the functions that read them."""

import contextlib
import contextvars
import functools
import json
import os
import pathlib
import sys
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

# No public name tells a model that is being written to HDF5 from one that is written to `.keras`.
from keras.src.backend.common.global_state import get_global_attribute as _saving_options_flag

# This module decides by class names where weights stand in a file, what else is in it, and how it is read. No public
# name tells or changes that.
from keras.src.saving import saving_lib as _saving_lib

# No public name tells whether Python code in files is run.
from keras.src.saving import serialization_lib as _serialization_lib

# The base class of all objects with a state in files.
from keras.src.saving.keras_saveable import KerasSaveable as _KerasSaveable

# The rule from a class name to a name in a file.
from keras.src.utils import naming as _keras_naming

from keras_mp._compat.replacing import drop_frame, replaced

__all__ = [
    "layers_by_address",
    "load_with_keras",
    "naming",
    "read_model_files_by",
    "reader",
    "saving_to_h5",
    "store_like",
    "trusting",
    "with_more",
    "write_into_model_files",
]


def saving_to_h5() -> bool:
    """Returns whether Keras is writing a model to its old HDF5 format now."""
    return bool(_saving_options_flag("use_legacy_config"))


# Keras files the layers in a list under the names of their classes: "dense", "head", "dense_1". A class that stands in
# for another is filed under the other's name, so the files of both models fit both.
_stored_like: dict[type, type] = {}


def store_like(cls: type[keras.Layer], stock: type[keras.Layer]) -> None:
    """Files the weights of a class under the name of another class.

    Older files, which use the name of the first class, are still read.

    Args:
        cls: the class. Its subclasses keep their own names.
        stock: the other class, which has the same weights.
    """
    _stored_like[cls] = stock


def _name_in_file(class_name: str) -> str:
    """Returns the name in a file for a class name, in place of Keras's `to_snake_case`.

    It returns before Keras saves or loads the object, so it is in no traceback. It takes the object and the file from
    the local variables of its caller, a function of Keras.
    """
    if class_name in {cls.__name__ for cls in _stored_like}:
        keras_names = sys._getframe(1).f_locals
        saveable, saveables = keras_names.get("saveable"), _saveables(keras_names.get("container", ()))
        if type(saveable) in _stored_like and any(each is saveable for each in saveables):
            store = keras_names.get("weights_store")
            if "failed_saveables" in keras_names and store is not None:
                known = keras_names.get("visited_saveables") or ()
                kinds = _kinds_in_file(store, keras_names.get("inner_path", ""), saveables, known)
            else:
                kinds = [_stand_in(type(each)) for each in saveables]
            class_name = next(kind for each, kind in zip(saveables, kinds, strict=True) if each is saveable).__name__
    return _keras_naming.to_snake_case(class_name)


# Keras's module `naming` as `saving_lib` gets to see it.
naming = types.ModuleType(_keras_naming.__name__, _keras_naming.__doc__)
vars(naming).update({**vars(_keras_naming), "to_snake_case": _name_in_file})


def _names_in_file(kinds: Iterable[type]) -> list[str]:
    """Returns the names that Keras gives to the objects in one list, numbered from the second one of a class on."""
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        name = _keras_naming.to_snake_case(kind.__name__)
        counts[name] = counts.get(name, -1) + 1
        names.append(f"{name}_{counts[name]}" if counts[name] else name)
    return names


def _kinds_in_file(store: Any, path: str, saveables: "list[_KerasSaveable]", known: Any) -> list[type]:
    """Returns the classes by whose names a file holds the objects in one list.

    Before version 0.2 each object had the name of its own class. And `convert` then put in fewer layers of such
    classes, always the last ones.
    """

    def are_there(kinds: list[type]) -> bool:
        names = zip(saveables, _names_in_file(kinds), strict=True)
        return all(_is_in_file(store, f"{path}/{name}") for each, name in names if id(each) not in known)

    own = [type(each) for each in saveables]
    now = [_stand_in(kind) for kind in own]
    if are_there(own):
        return own
    if not are_there(now):
        for cls, stock in _stored_like.items():
            names = _names_in_file([cls] * len(saveables))
            count = sum(_is_in_file(store, f"{path}/{name}") for name in names)
            before = list(now)
            alike = [place for place, kind in enumerate(now) if kind.__name__ == stock.__name__]
            for place in alike[len(alike) - count :]:
                before[place] = cls
            if count and are_there(before):
                return before
    return now


def _saveables(container: Any) -> "list[_KerasSaveable]":
    return [each for each in _elements(container) if isinstance(each, _KerasSaveable)]


def _elements(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _stand_in(cls: type) -> type:
    return _stored_like.get(cls, cls)


def _is_in_file(store: Any, path: str) -> bool:
    if hasattr(store, "has_path"):  # Keras 3.15
        return bool(store.has_path(path))
    if hasattr(store, "sharding_config"):
        return any(f"{key}/".startswith(f"/{path}/") for key in store.sharding_config["weight_map"])
    return path in (store.contents if hasattr(store, "contents") else store.h5_file)


def layers_by_address(model: keras.Layer) -> dict[str, keras.Layer]:
    """Returns a layer and all layers inside it, by the address in a file at which Keras looks for their weights.

    The address stays the same if a model is made again with other layer names. A layer that is used in several places
    has the first address. It comes before the layers inside it.

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
        for child, name in zip(saveables, _names_in_file(_stand_in(type(each)) for each in saveables), strict=True):
            visit(child, f"{address}/{name}")
        for number, child in enumerate(each for each in _elements(value) if isinstance(each, (list, dict, tuple))):
            if id(child) not in inside:
                visit(child, f"{address}/container_{number}")
        inside.pop()

    inside: list[int] = []  # a container may hold itself
    visit(model, "")
    return found


_more: dict[str, Callable[[keras.Model], Any]] = {}


def write_into_model_files(key: str, content_of: Callable[[keras.Model], Any]) -> None:
    """Adds an entry beside the configuration of every model that is saved to a `.keras` file, a folder or a pickle.

    Keras ignores the entry.

    Args:
        key: the name of the entry, beside "config", "class_name" and Keras's other names.
        content_of: gets the model, returns a value that JSON can hold, or None for no entry.
    """
    _more[key] = content_of


def with_more(result: tuple[str, str], model: keras.Model) -> tuple[str, str]:
    """Follows Keras's `_serialize_model_as_json`: adds the entries of `write_into_model_files`."""
    config, metadata = result
    contents = {key: content_of(model) for key, content_of in _more.items()}
    contents = {key: content for key, content in contents.items() if content is not None}
    return json.dumps({**json.loads(config), **contents}) if contents else config, metadata


def load_with_keras(
    source: Any,
    custom_objects: "dict[str, Any] | None",
    compile: bool,
    safe_mode: bool,
    config: "dict[str, Any] | None" = None,
) -> Any:
    """Returns the model in a file as `keras.saving.load_model` loads it, under any file name.

    Args:
        source: a binary file, open for reading, or the path of a folder.
        custom_objects: as for `keras.saving.load_model`.
        compile: likewise.
        safe_mode: likewise.
        config: the configuration to make the model from, or None for the one in the file.
    """
    name = "_load_model_from_dir" if isinstance(source, (str, os.PathLike)) else "_load_model_from_fileobj"
    token = _other_config.set(config)
    try:
        with replaced(_saving_lib, _model_from_config=_model_from_other_config):
            return _keras_readers[name](source, custom_objects, compile, safe_mode)
    finally:
        _other_config.reset(token)


_other_config: contextvars.ContextVar["dict[str, Any] | None"] = contextvars.ContextVar("_other_config", default=None)

_keras_model_from_config = _saving_lib._model_from_config


def _model_from_other_config(config_json: Any, *args: Any, **kwargs: Any) -> Any:
    other = _other_config.get()
    try:
        return _keras_model_from_config(config_json if other is None else json.dumps(other), *args, **kwargs)
    except BaseException as error:
        drop_frame(error)
        raise


_keras_readers: dict[str, Callable[..., Any]] = {
    name: getattr(_saving_lib, name) for name in ("_load_model_from_dir", "_load_model_from_fileobj")
}

_Read = Callable[[Any, "dict[str, Any] | None", bool, bool], Any]
_readers: dict[str, _Read] = {}


def read_model_files_by(key: str, read: _Read) -> None:
    """Makes `keras.saving.load_model` and `pickle` read models with an entry of ours by another function.

    Args:
        key: the name of the entry, as for `write_into_model_files`.
        read: gets the arguments of `load_with_keras`, returns the model.
    """
    _readers[key] = read


def reader(name: str) -> Callable[..., Any]:
    """Returns a function in place of one of Keras's two that read a model.

    Args:
        name: Keras's name for it.
    """
    read_by_keras = _keras_readers[name]

    @functools.wraps(read_by_keras)
    def read(source: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            entries = _config_in(source)
            ours = [read for key, read in _readers.items() if isinstance(entries.get(key), dict)]
            return (ours[0] if ours else read_by_keras)(source, *args, **kwargs)
        except BaseException as error:
            drop_frame(error)
            raise

    return read


_CONFIG, _BYTES_AT_MOST = "config.json", 1 << 32


def _config_in(source: Any) -> dict[str, Any]:
    """Returns the configuration in a file, or an empty one for a bad file. Keras then explains what is wrong."""
    try:
        if isinstance(source, (str, os.PathLike)):
            text = pathlib.Path(source, _CONFIG).read_bytes()
        else:
            place = source.tell()
            try:
                with zipfile.ZipFile(source) as archive:
                    if archive.getinfo(_CONFIG).file_size > _BYTES_AT_MOST:  # Keras refuses such a bomb
                        return {}
                    text = archive.read(_CONFIG)
            finally:
                source.seek(place)
        config = json.loads(text)
    except Exception:
        return {}
    return config if isinstance(config, dict) else {}


@contextlib.contextmanager
def trusting(safe_mode: bool) -> Iterator[None]:
    """Inside, all objects that Keras makes from a configuration may hold Python code, or none may.

    Keras's own argument does not reach the losses, metrics, schedules and optimizers of a file.

    Args:
        safe_mode: as for `keras.saving.load_model`. If the user has allowed Python code for the process, it stays so.
    """
    allowed = _serialization_lib.in_safe_mode() is False
    with _serialization_lib.SafeModeScope(safe_mode and not allowed):
        yield
