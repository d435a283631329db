"""The record of a converted model's layers in its file, and a model restored from it.

Keras makes a model from a file by its configuration. Layers that the code of a user or of KerasHub makes stand in no
configuration. They come out as before `convert`: with Keras's classes and the policy of their owner. So the file
records what each layer is, at the address where the file keeps the layer's weights.
"""

import json
import warnings
from typing import Any

import keras

from keras_mp._compat import keras_files, keras_layers, keras_models
from keras_mp.conversion.casts import casts_losses, output_cast
from keras_mp.conversion.clone import Choice
from keras_mp.conversion.convert import convert, duplicate
from keras_mp.errors import ConversionError, KerasMPWarning
from keras_mp.layers.core.reversible_embedding import twin_for_keras_hub
from keras_mp.policies.policy import stacklevel

__all__ = ["record_of", "restored"]

# The part of a configuration that decides what a layer that holds others computes itself.
_OWN_FUNCTIONS = ("activation", "recurrent_activation", "activity_regularizer")


def record_of(model: keras.Model) -> "dict[str, Any] | None":
    """Returns the record of a model's layers, ready for JSON, or None for a model without layers or policies of ours.

    Args:
        model: a Keras model.
    """
    layers = keras_files.layers_by_address(model)
    if not any(type(layer).__module__.startswith("keras_mp.") or _policy_of(layer) for layer in layers.values()):
        return None
    return {"converted_to": _policy_of(model), "layers": _entries(layers)}


keras_files.write_into_model_files("keras_mp", record_of)


def restored(model: keras.Model, record: dict[str, Any]) -> keras.Model:
    """Returns a model from a file with its layers as the file records them.

    Args:
        model: the model as Keras makes it from the file, with its weights.
        record: the result of `record_of` for the model that was saved.

    Returns:
        The model itself if it agrees with the record, else a copy.

    Raises:
        ConversionError: the file asks for a layer of an unrelated class.

    Warns:
        KerasMPWarning: naming layers that could not be made as they were.
    """
    wanted, policy = record["layers"], record["converted_to"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KerasMPWarning)  # issued before, when the model was converted
        if policy and _shape(_entries(keras_files.layers_by_address(model))) != _shape(wanted):
            # `convert` had not only exchanged layers but also put some into the graph.
            model = convert(model, keras.dtype_policies.deserialize(policy))
        if _differing(model, wanted):
            model = _with_layers(model, wanted)
    for address, layer in keras_files.layers_by_address(model).items():
        if address in wanted and layer.trainable != wanted[address]["trainable"]:
            layer.trainable = wanted[address]["trainable"]
    if policy:
        model._converted_to = policy
    if differing := _differing(model, wanted):
        others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        warnings.warn(
            f"{differing[0]!r}{others} of {model.name!r} is not as it was saved, for the code that makes it is another "
            "now, or it keeps out of its configuration what made it so. Make the model as before, "
            "model.load_weights(path), then keras_mp.convert(model, policy).",
            KerasMPWarning,
            stacklevel=stacklevel(),
        )
    return model


def _policy_of(layer: keras.Layer) -> Any:
    """Returns the serialized policy that a model was converted to, or None if it was not."""
    return getattr(layer, "_converted_to", None)


def _entries(layers: dict[str, keras.Layer]) -> dict[str, dict[str, Any]]:
    return {address: _entry(layer) for address, layer in layers.items()}


def _entry(layer: keras.Layer) -> dict[str, Any]:
    """Returns the record of one layer."""
    policy = layer.dtype_policy
    entry = {
        "class": keras.saving.get_registered_name(type(layer)),
        "policy": policy.name if type(policy) is keras.DTypePolicy else keras.dtype_policies.serialize(policy),
        "trainable": layer.trainable,
        "config": _own_config(layer),
        "output_dtype": output_cast(layer),
        "float32_losses": casts_losses(layer),
    }
    if isinstance(layer, keras_models.Functional):
        operations = [each for each in layer.operations if not isinstance(each, keras.Layer)]
        entry["operations"] = sorted(type(each).__name__ for each in operations)
    return json.loads(json.dumps(entry))


def _own_config(layer: keras.Layer) -> dict[str, Any]:
    """Returns the part of a layer's configuration that `convert` may have changed."""
    # A vocabulary may be long, code cannot be compared, and the layers in a model have their own records.
    if isinstance(layer, (*keras_models.preprocessing_classes(), keras.layers.Lambda, keras.Model)):
        return {}
    try:
        config = keras.saving.serialize_keras_object(layer)["config"]
        json.dumps(config)
    except Exception:  # any error of a user's `get_config`; Keras makes the owner without it
        return {}
    # Initializers are not needed any more, and versions of Keras write them differently.
    given = {name for name in config if not name.endswith("_initializer")} - {"name", "dtype", "trainable"}
    names = given.intersection(_OWN_FUNCTIONS) if keras_layers.inner_layers(layer) else given
    return {name: config[name] for name in sorted(names)}


def _shape(entries: dict[str, dict[str, Any]]) -> Any:
    return {address: entry.get("operations") for address, entry in entries.items()}


def _differing(model: keras.Model, wanted: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the addresses at which a model differs from the record, `trainable` aside."""
    there = _entries(keras_files.layers_by_address(model))
    both = [each for each in wanted if each in there]
    unequal = [each for each in both if _computes(there[each]) != _computes(wanted[each])]
    changed = [each for each in both if _changes(there[each]["config"], wanted[each]["config"])]
    return [*dict.fromkeys([*unequal, *changed]), *(wanted.keys() ^ there.keys())]


def _computes(entry: dict[str, Any]) -> Any:
    return _without_modules(
        [entry.get(key) for key in ("class", "policy", "operations", "output_dtype", "float32_losses")]
    )


def _changes(there: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments to change. A layer that was made without a configuration has none."""
    return {
        name: value
        for name, value in wanted.items()
        if name in there and _without_modules(there[name]) != _without_modules(value)
    }


def _without_modules(config: Any) -> Any:
    """Returns a configuration without the modules of registered classes, which may have moved since it was written."""
    if isinstance(config, dict):
        registered = config.get("registered_name") is not None
        return {key: _without_modules(each) for key, each in config.items() if not (registered and key == "module")}
    return [_without_modules(each) for each in config] if isinstance(config, list) else config


def _with_layers(model: keras.Model, wanted: dict[str, dict[str, Any]]) -> keras.Model:
    """Returns a copy of a model with the recorded layers in place of its layers."""
    addresses = {id(layer): address for address, layer in keras_files.layers_by_address(model).items()}

    def choose(layer: keras.Layer, path: str) -> Choice:
        entry = wanted.get(addresses[id(layer)]) if id(layer) in addresses else None
        if entry is None:
            return Choice(type(layer), layer.dtype_policy)
        arguments = _changes(_entry(layer)["config"], entry["config"])
        cls, policy = _class(entry["class"], type(layer)), keras.dtype_policies.get(entry["policy"])
        return Choice(cls, policy, arguments, entry["output_dtype"], entry["float32_losses"])

    return duplicate(model, choose)


def _class(name: str, there: type[keras.Layer]) -> type[keras.Layer]:
    """Returns the class of a registered name that replaces another class. One must be a base of the other."""
    if name == keras.saving.get_registered_name(there):
        return there
    twin_for_keras_hub()  # registers its class
    cls = keras.saving.get_registered_object(name) or getattr(keras.layers, name, None)
    if not isinstance(cls, type) or not (issubclass(cls, there) or issubclass(there, cls)):
        raise ConversionError(
            f"The file has a layer of class {name!r} where the code that is here makes a {there.__name__}. Import the "
            "module that defines it, or the code that the model was saved with."
        )
    return cls
