"""A layer made again from the configuration of another."""

import functools
import types
from typing import Any

import keras
import tensorflow as tf

__all__ = ["configuration", "made_alike", "quantized_alike", "unmade", "unquantized"]

# A configuration holds these by their names: functions of Python, `functools` and TensorFlow, and their like.
_WITHOUT_NAMES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    functools.partial,
    tf.types.experimental.PolymorphicFunction,
    keras.Regularizer,
    keras.Initializer,
    keras.constraints.Constraint,
)


def unmade(cls: Any) -> keras.Layer:
    """Returns an instance whose constructor has not run."""
    return cls.__new__(cls)


def made_alike(
    cls: type[keras.Layer], layer: keras.Layer, config: dict[str, Any], policy: keras.DTypePolicy, given: dict[str, Any]
) -> keras.Layer:
    """Returns a layer made from the configuration of another. It is built if the other is, and not quantized.

    Args:
        cls: the class of the new layer.
        layer: the other layer.
        config: the configuration.
        policy: the dtype policy. Its quantization is left out.
        given: layers among the arguments, which the constructor takes as they are.
    """
    policy = unquantized(policy)
    if given:
        config = {**config, **given, **({"dtype": policy} if "dtype" in config else {})}
        made = cls(**config)
    else:
        # Serialized, as in a file. Made from an object, a layer without `get_config` cannot be saved again.
        made = cls.from_config(
            {**config, **({"dtype": keras.dtype_policies.serialize(policy)} if "dtype" in config else {})}
        )
        if made.dtype_policy != policy:
            made.dtype_policy = policy
    if layer.built and not made.built:
        made.build_from_config(layer.get_build_config())
    return made


def quantized_alike(policy: keras.DTypePolicy, wanted: keras.DTypePolicy) -> keras.DTypePolicy:
    """Returns the wanted policy, quantized as a layer's policy is.

    Args:
        policy: the layer's policy, quantized or not.
        wanted: the policy to quantize from.

    Returns:
        `wanted` itself if `policy` is not quantized, and `policy` if Keras does not quantize from `wanted`.

    Example:

    >>> quantized_alike(keras.dtype_policies.get("int8_from_float32"), keras.DTypePolicy("mixed_bfloat16")).name
    'int8_from_mixed_bfloat16'
    """
    if policy.quantization_mode is None or wanted.quantization_mode is not None:
        return wanted
    try:
        return type(policy).from_config({**policy.get_config(), "source_name": wanted.name})
    except ValueError:
        return policy


def unquantized(policy: keras.DTypePolicy) -> keras.DTypePolicy:
    """Returns the policy that a quantized one was made from."""
    if policy.quantization_mode is None:
        return policy
    return keras.DTypePolicy(policy.get_config()["source_name"])


def configuration(layer: keras.Layer) -> dict[str, Any] | None:
    """Returns the arguments that make a layer again, or None where it has no `get_config`.

    Functions and initializers stay objects. Keras would write their names, so that another `gelu` would become Keras's.
    """
    try:
        config = dict(layer.get_config())
    except NotImplementedError:
        return None
    except (TypeError, ValueError):  # it holds an object without a name
        shadow = unmade(type(layer))
        vars(shadow).update(vars(layer))
        for name, value in vars(layer).items():
            if isinstance(value, _WITHOUT_NAMES):
                vars(shadow)[name] = keras.activations.linear
        try:
            config = dict(shadow.get_config())
        except (TypeError, ValueError, AttributeError):
            return None
    if type(layer).get_config is not keras.Layer.get_config:  # a file holds the constructor's arguments
        config |= {key: getattr(layer, key) for key in config if isinstance(getattr(layer, key, None), _WITHOUT_NAMES)}
    return config
