"""`load_model`: a model from a `.keras` file with everything that was saved, under the policy asked for."""

import collections
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import keras

from keras_mp.convert import convert
from keras_mp.errors import ConversionError

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
    """Loads a model from a `.keras` file, whatever the global policy is, and converts it to another policy if asked to.

    Keras loses the optimizer's slots and count of steps where the global policy is not the one under which the file was
    saved. Here the model comes back as it was saved, to the state of its optimizer. With a policy it is then converted
    by `keras_mp.convert`: its optimizer is wrapped in a `LossScaleOptimizer`, or taken out of it, as that policy needs,
    and goes on from the same state.

    Args:
        path: a `.keras` file.
        policy: as for `keras_mp.convert`, or None for the policies that the layers were saved with.
        custom_objects: dictionary from names to classes and functions that are not registered with Keras.
        compile: whether to compile the model as it was compiled when it was saved.
        safe_mode: whether to refuse files that hold Python code, as `Lambda` layers do.

    Returns:
        The model.

    Raises:
        ConversionError: there is no file, or it is not a `.keras` file or damaged, or the model cannot be converted.
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
    _require_keras_file(path)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read(_CONFIG))
        before = keras.config.dtype_policy()
        # What layers make in their own code gets the global policy, so it must be that of the file.
        keras.config.set_dtype_policy(_common_policy(config) or before)
        try:
            # The optimizer is loaded below: Keras would wrap it, or not, by the global policy.
            model = keras.saving.load_model(path, custom_objects=custom_objects, compile=False, safe_mode=safe_mode)
            if compile and config.get("compile_config"):
                weights = archive.extract(_WEIGHTS, folder)
                with keras.saving.custom_object_scope(custom_objects or {}):
                    _compile(model, config["compile_config"], weights)
        finally:
            keras.config.set_dtype_policy(before)
    return model if policy is None else convert(model, policy)


def _compile(model: keras.Model, config: dict[str, Any], weights: str) -> None:
    if type(model).compile is not keras.Model.compile:
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
        model.compile(**arguments, auto_scale_loss=False)
    if model.built and getattr(model, "optimizer", None) is not None:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(weights)  # with the optimizer's


def _common_policy(config: Any) -> keras.DTypePolicy | None:
    """The policy that most layers in a file have, a mixed one before others."""
    policies: collections.Counter[str] = collections.Counter(
        json.dumps(policy, sort_keys=True) for policy in _policies(config)
    )
    mixed = [policy for policy in policies if '"mixed_' in policy]
    most = max(mixed or policies, key=policies.__getitem__, default=None)
    return None if most is None else keras.dtype_policies.get(json.loads(most))


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


def _require_keras_file(path: pathlib.Path) -> None:
    if not path.exists():
        raise ConversionError(f"There is no file {str(path)!r}. Expected a .keras file, as model.save writes it.")
    if path.is_dir():
        raise ConversionError(
            f"{str(path)!r} is a folder. Expected a .keras file; an exported SavedModel holds no layers to train, and "
            "is loaded by tf.saved_model.load."
        )
    if zipfile.is_zipfile(path) and {_CONFIG, _WEIGHTS} <= set(zipfile.ZipFile(path).namelist()):
        return
    if path.name.endswith(".weights.h5"):
        what_to_do = (
            "It holds weights alone: make the model, model.load_weights(path), then keras_mp.convert(model, policy)."
        )
    elif path.suffix in (".h5", ".hdf5"):
        what_to_do = (
            'Load it by keras.saving.load_model, then save it by model.save("model.keras"), or type '
            "keras_mp.convert(model, policy)."
        )
    elif path.suffix == ".keras":
        what_to_do = "It is damaged, incomplete or of another kind: save it again by model.save, or copy it anew."
    else:
        what_to_do = 'Expected what model.save("model.keras") writes.'
    raise ConversionError(f"{str(path)!r} is not a .keras file. {what_to_do}")
