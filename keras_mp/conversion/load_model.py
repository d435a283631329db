"""`load_model`: a model from a `.keras` file with all that was saved, converted to a policy if one is given."""

import collections
import contextlib
import json
import os
import pathlib
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import keras

from keras_mp._compat import keras_files
from keras_mp.conversion.convert import convert
from keras_mp.conversion.layer_record import restored
from keras_mp.errors import ConversionError, KerasMPError

__all__ = ["load_model"]

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"


def load_model(
    path: "str | os.PathLike[str]",
    policy: "str | keras.DTypePolicy | None" = None,
    *,
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> keras.Model:
    """Loads a model from a `.keras` file under any global policy, and converts it if a policy is given.

    Keras loses the optimizer's slots and iterations if the file was saved under another global policy. Here the model
    comes back as it was saved, with the state of its optimizer. With a policy, `keras_mp.convert` converts it. That
    wraps its optimizer in a `LossScaleOptimizer`, or unwraps it, as the policy needs, and keeps its state.

    The file of a converted model records each layer. So layers that the code of a user or of KerasHub makes come back
    converted, too. `keras.saving.load_model` does the same where keras_mp is imported. The whole file is checked before
    anything is made from it.

    Args:
        path: a `.keras` file, or the folder that `keras.saving.save_model(model, path, zipped=False)` writes.
        policy: as for `keras_mp.convert`. None keeps the policies that the layers were saved with.
        custom_objects: dictionary from names to classes and functions that are not registered with Keras.
        compile: whether to compile the model as it was when saved.
        safe_mode: whether to refuse files that hold Python code: `Lambda` layers, and lambdas as losses, metrics or
            schedules.

    Returns:
        The model.

    Raises:
        ConversionError: there is no file, it is damaged or no `.keras` file, or the model cannot be made or
            converted.
        PolicyError: for a policy that does not exist.

    Example:

    >>> import keras, keras_mp, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> _ = model.fit(tf.ones((8, 4)), tf.ones((8, 1)), verbose=0)
    >>> path = tempfile.mkdtemp() + "/model.keras"
    >>> model.save(path)
    >>> mixed = keras_mp.load_model(path, "mixed_bfloat16")
    >>> mixed.layers[0].compute_dtype, int(mixed.optimizer.iterations)
    ('bfloat16', 1)
    """
    if isinstance(path, keras.Model):
        raise ConversionError(
            f"load_model() takes the path of a .keras file. Received the model {path.name!r}: type "
            "keras_mp.convert(model, policy)."
        )
    path = pathlib.Path(path)
    _check(path)
    try:
        with contextlib.nullcontext(path) if path.is_dir() else path.open("rb") as source:
            model = _read(source, custom_objects, compile, safe_mode)
    except KerasMPError:
        raise
    except Exception as error:  # any error of Keras, or of code that the file names
        raise ConversionError(f"{str(path)!r} cannot be loaded. {_what_to_do(error)}") from error
    return model if policy is None else convert(model, policy)


def _read(
    source: Any, custom_objects: "dict[str, Any] | None" = None, compile: bool = True, safe_mode: bool = True
) -> keras.Model:
    """The model from an open file or from a folder."""
    config = _config_in(source)
    record = config.get("keras_mp")
    before = keras.config.dtype_policy()
    # Layers that are made in a layer's own code get the global policy, so it must be the file's policy.
    keras.config.set_dtype_policy(_common_policy(config) or before)
    try:
        with keras_files.trusting(safe_mode), keras.saving.custom_object_scope(custom_objects or {}):
            model = _made_by_keras(source, config, custom_objects, safe_mode)
            if record is not None:
                model = restored(model, record)
            if compile and config.get("compile_config"):
                with _weights_in(source) as weights:
                    _compile(model, config["compile_config"], weights)
    finally:
        keras.config.set_dtype_policy(before)
    return model


keras_files.read_model_files_by("keras_mp", _read)


def _made_by_keras(source: Any, config: dict[str, Any], custom_objects: Any, safe_mode: bool) -> keras.Model:
    """Returns the model with its weights. It is not compiled: Keras would wrap its optimizer by the global policy."""
    if (record := config.get("keras_mp")) is None:
        return keras_files.load_with_keras(source, custom_objects, False, safe_mode)
    failed: Any
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*had a build config, but")  # looked for below
            model = keras_files.load_with_keras(source, custom_objects, False, safe_mode)
        failed = _without_weights(model, source, record)
    except Exception:
        failed = True
    if failed:
        # In half precision its code may need the layers that are put in later. In float32 it ran with Keras's.
        keras.config.set_dtype_policy("float32")
        model = keras_files.load_with_keras(source, custom_objects, False, safe_mode, config=_in_float32(config))
        if failed := _without_weights(model, source, record):
            raise ConversionError(
                f"{model.name!r} could not be built from its file: {failed[0]!r} of class "
                f"{record['layers'][failed[0]]['class']} has no weights there. Define `build_from_config` for it; or "
                "make the model, call it once on data, model.load_weights(path), then keras_mp.convert(model, policy)."
            )
    return model


def _without_weights(model: keras.Model, source: Any, record: dict[str, Any]) -> list[str]:
    """The addresses of layers that have weights in the file and none here, over which Keras reads in silence."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, (str, os.PathLike)):
            file = stack.enter_context(h5py.File(pathlib.Path(source, _WEIGHTS)))
        else:
            archive = stack.enter_context(zipfile.ZipFile(source))
            file = stack.enter_context(h5py.File(stack.enter_context(archive.open(_WEIGHTS))))
        filed: list[str] = []
        file.visit(lambda name: filed.append(f"/{name.removesuffix('/vars/0')}") if name.endswith("/vars/0") else None)
    there = keras_files.layers_by_address(model)
    return [each for each in filed if each in record["layers"] and not (each in there and there[each].built)]


def _in_float32(config: Any) -> Any:
    if isinstance(config, list):
        return [_in_float32(each) for each in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {"name": "float32"}}
    return {name: _in_float32(value) for name, value in config.items() if name != "keras_mp"}


def _compile(model: keras.Model, config: dict[str, Any], weights: str) -> None:
    cls = type(model)
    # A task of KerasHub compiles itself when it is made, by a `compile` of its own. What a file keeps is what that has
    # given to Keras's.
    compiles_itself = model.compiled and cls.compile_from_config is keras.Model.compile_from_config
    if cls.compile is not keras.Model.compile and not compiles_itself:
        model.compile_from_config(config)
    else:
        arguments = keras.saving.deserialize_keras_object(config)
        optimizer = arguments.get("optimizer")
        with h5py.File(weights) as file:
            wrapped = "optimizer/inner_optimizer" in file
        if wrapped and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            # Keras's own `compile` did it, which writes down only what it was given.
            optimizer = keras.optimizers.get(optimizer)
            arguments["optimizer"] = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
        keras.Model.compile(model, **arguments, auto_scale_loss=False)
    if model.built and getattr(model, "optimizer", None) is not None:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(weights)  # with the optimizer's


def _config_in(source: Any) -> dict[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        return json.loads(pathlib.Path(source, _CONFIG).read_bytes())
    with zipfile.ZipFile(source) as archive:
        return json.loads(archive.read(_CONFIG))


@contextlib.contextmanager
def _weights_in(source: Any) -> Iterator[str]:
    if isinstance(source, (str, os.PathLike)):
        yield str(pathlib.Path(source, _WEIGHTS))
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(source) as archive:
        yield archive.extract(_WEIGHTS, folder)


def _common_policy(config: dict[str, Any]) -> keras.DTypePolicy | None:
    """Returns the policy of most layers in a file, without quantization. Mixed policies come first."""
    if (record := config.get("keras_mp")) is None:
        policies = list(_policies(config))
    else:
        policies = [entry["policy"] for entry in record["layers"].values()]
    counts = collections.Counter(name for policy in policies if (name := _float_policy(policy)))
    if record is not None:
        # Layers get their own policies afterwards. Until then their weights must not be rounded.
        widest = max((keras.DTypePolicy(name).variable_dtype for name in counts), key=_bits, default=None)
        counts = collections.Counter({n: c for n, c in counts.items() if keras.DTypePolicy(n).variable_dtype == widest})
    mixed = [name for name in counts if name.startswith("mixed_")]
    most = max(mixed or counts, key=counts.__getitem__, default=None)
    return None if most is None else keras.DTypePolicy(most)


def _bits(dtype: str) -> int:
    return int(dtype.removeprefix("b").removeprefix("float"))


def _policies(config: Any) -> Iterator[dict[str, Any]]:
    if isinstance(config, dict):
        policy = config.get("dtype")
        if isinstance(policy, dict) and "Policy" in str(policy.get("class_name")):
            yield policy
        for value in config.values():
            yield from _policies(value)
    elif isinstance(config, list):
        for value in config:
            yield from _policies(value)


def _float_policy(policy: Any) -> str | None:
    """Returns the name of the policy behind a quantized one, or of a map's default."""
    if isinstance(policy, str):
        return policy.rpartition("_from_")[2]
    config = policy.get("config") or {}
    inner = config.get("source_name") or config.get("default_policy") or config.get("name")
    return None if inner is None else _float_policy(inner)


def _what_to_do(error: Exception) -> str:
    """Returns the message of an error in loading, shortened, and the way to go on."""
    # The text before the last of these is a whole configuration, the text behind it the reason.
    text = re.sub(r"\x1b\[\d*m", "", str(error)).rpartition("Exception encountered: ")[2].strip()
    missing = re.search("Could not locate (?:class|function) '[^']*'", text)
    if missing:
        return f"{missing[0]}. Import the module that registers it, or add load_model(path, custom_objects={{...}})."
    if "safe_mode" in text:
        return "It holds Python code. If you know where it comes from: load_model(path, safe_mode=False)."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    says = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".")
    return f"{type(error).__name__}: {says}. Unless the code that makes it has changed since, {_DAMAGED}"


_DAMAGED = "it is damaged, incomplete or of another kind: save it again by model.save, or copy it anew."


def _check(path: pathlib.Path) -> None:
    """Refuses an incomplete or changed file, before anything is made from it."""
    if not path.exists():
        raise ConversionError(f"There is no file {str(path)!r}. Expected a .keras file, as model.save writes it.")
    if path.is_dir():
        members = {each.name for each in path.iterdir()}
        if _CONFIG not in members:
            raise ConversionError(
                f"{str(path)!r} is a folder. Expected a .keras file; an exported SavedModel holds no layers to train, "
                "and is loaded by tf.saved_model.load."
            )
    elif not os.access(path, os.R_OK):
        raise ConversionError(f"The file {str(path)!r} cannot be read: it is not yours to read. Ask its owner.")
    elif not zipfile.is_zipfile(path):
        raise ConversionError(f"{str(path)!r} is not a .keras file. {_what_it_is(path)}")
    try:
        what = _damage_in(path)
    except Exception as error:  # zipfile, h5py and json raise a dozen kinds
        what = f"{type(error).__name__}: {error}"
    if what:
        raise ConversionError(f"{str(path)!r} is not a .keras file, or not a whole one ({what}). {_what_it_is(path)}")


def _damage_in(path: pathlib.Path) -> str | None:
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            names = {each.name for each in path.iterdir()}
        else:
            archive = stack.enter_context(zipfile.ZipFile(path))
            names = set(archive.namelist())
        for name in (_CONFIG, _WEIGHTS):
            if name not in names:
                return f"it has no {name}"
        if not path.is_dir() and (changed := archive.testzip()):
            return f"the bytes of {changed} are not those that were written"
        weights = path / _WEIGHTS if path.is_dir() else stack.enter_context(archive.open(_WEIGHTS))
        stack.enter_context(h5py.File(weights)).visititems(lambda name, item: None)
        config = json.loads((path / _CONFIG).read_bytes() if path.is_dir() else archive.read(_CONFIG))
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        return f"{_CONFIG} describes no model"
    return None


def _what_it_is(path: pathlib.Path) -> str:
    if path.name.endswith(".weights.h5"):
        return "It holds weights alone: make the model, model.load_weights(path), then keras_mp.convert(model, policy)."
    if path.suffix in (".h5", ".hdf5"):
        return (
            'Load it by keras.saving.load_model, then save it by model.save("model.keras"), or type '
            "keras_mp.convert(model, policy)."
        )
    if path.suffix == ".keras" or path.is_dir():
        return _DAMAGED[0].upper() + _DAMAGED[1:]
    return 'Expected what model.save("model.keras") writes.'
