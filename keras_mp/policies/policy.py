"""The global dtype policy: set by name, chosen for the hardware, or refused with a policy to type instead.

A dtype policy names the dtype that layers compute in and the dtype of their variables. Mixed policies compute in half
precision and keep float32 master weights.
"""

import contextlib
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator

import keras

from keras_mp import hardware
from keras_mp._compat import keras_layers, patches, runtime
from keras_mp.errors import KerasMPWarning, PolicyError
from keras_mp.policies import policy_map
from keras_mp.policies.advice import advice, is_half

__all__ = [
    "agree_on_auto",
    "chosen_policy",
    "compute_dtypes",
    "needs_loss_scaling",
    "policy_scope",
    "preprocessing_scope",
    "set_policy",
    "stacklevel",
]

_NAMES = ("auto", "float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64")
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_OTHER_NAMES = {"amp": "auto", "double": "float64", "fp32": "float32", "fp64": "float64", "half": "mixed_float16"}


def set_policy(policy: str | keras.DTypePolicy) -> keras.DTypePolicy:
    """Sets Keras's global dtype policy, which new layers take unless they get a `dtype`.

    As with `keras.config.set_dtype_policy`, the policy holds for the calling thread, and `keras.utils.clear_session()`
    forgets it.

    A float16 policy has a side effect on a machine without GPU or TPU. TensorFlow fuses the matmul and bias of a
    `Dense` layer, and some CPUs run that a thousand times slower in float16 than in float32. So the fusion is switched
    off for the whole process: `remapping`, an option of TensorFlow's graph optimizer grappler. This holds at once, also
    for functions traced before. It stays off under later policies, because a model keeps its policy and may be trained
    later. To switch it on again, call `tf.config.optimizer.set_experimental_options({"remapping": True})`. Layers that
    get float16 from their own `dtype` argument are not seen here: set the option to False for them.

    Args:
        policy: `"auto"`, the recommendation of `keras_mp.detect()` for the strategy in force, or for the strategy that
            `keras_mp.strategy` made last. With several workers it is the chief's, and all of them have to call this.
            Or a name of a floating-point policy, such as `"mixed_bfloat16"` or `"mixed_float16"`. Or a
            `keras.DTypePolicy`, or a `keras_mp.PolicyMap` with policies for single layers.

    Returns:
        The policy now in force.

    Raises:
        PolicyError: for anything else, with the policy that was probably meant. The global policy stays as it was.

    Warns:
        KerasMPWarning: a 16-bit policy gains nothing on this hardware, with the measured times. Or the weights
            would be 16-bit, so that small updates are lost. The policy is set all the same.

    Example:
    >>> import keras_mp
    >>> keras_mp.set_policy("auto").variable_dtype
    'float32'
    >>> keras_mp.set_policy("float32")
    <DTypePolicy "float32">
    """
    keras.config.set_dtype_policy(chosen_policy(policy, "set_policy({})"))
    return keras.config.dtype_policy()


def chosen_policy(policy: "str | keras.DTypePolicy", call: str) -> keras.DTypePolicy:
    """Returns the policy that a user asked for, and warns if it gains nothing on this hardware.

    Args:
        policy: as for `set_policy`, with the same side effect for float16 on a CPU.
        call: the user's call for the warning, with "{}" for the policy.

    Raises:
        PolicyError: as `set_policy` does.
    """
    patches.install_on_first_use()
    automatic = isinstance(policy, str) and policy == "auto"
    wanted = _resolve(_automatic() if automatic else policy)
    dtypes = {dtype for each in policy_map.policies_in(wanted) for dtype in (each.compute_dtype, each.variable_dtype)}
    if not any(map(is_half, dtypes)):  # needs no advice, so no matmul is timed
        return wanted
    here = hardware.in_use()
    if not automatic:
        for message in advice(wanted, here, call=call):
            warnings.warn(message, KerasMPWarning, stacklevel=stacklevel())
    if not hardware.fusion_is_safe({each.compute_dtype for each in policy_map.policies_in(wanted)}, here):
        runtime.set_remapper(False)
    return wanted


_agreements: list[Callable[[str], str]] = []


def agree_on_auto(agree: Callable[[str], str]) -> None:
    """Registers a function that maps the policy recommended here to the policy of `"auto"`.

    Args:
        agree: takes the recommended policy's name and returns the name of the policy to set.
    """
    _agreements.append(agree)


def _automatic() -> str:
    name = hardware.in_use().recommended_policy
    for agree in _agreements:
        name = agree(name)
    return name


@contextlib.contextmanager
def policy_scope(policy: str | keras.DTypePolicy) -> Iterator[keras.DTypePolicy]:
    """Sets the global dtype policy for the layers made inside a `with` block.

    The layers keep it after the block. The side effect of float16 on a CPU stays as well, see `set_policy`.

    Args:
        policy: as for `set_policy`.

    Yields:
        The policy in force inside the block.

    Raises:
        PolicyError: as `set_policy` does.

    Example:
    >>> import keras, keras_mp
    >>> with keras_mp.policy_scope("float64") as policy:
    ...     layer = keras.layers.Dense(1)
    >>> layer.dtype_policy == policy, keras.config.dtype_policy() == policy
    (True, False)
    """
    before = keras.config.dtype_policy()
    try:
        yield set_policy(policy)
    finally:
        keras.config.set_dtype_policy(before)


def preprocessing_scope() -> "contextlib.AbstractContextManager[keras.DTypePolicy]":
    """Makes the layers created inside a `with` block compute in float32 under any global policy.

    Use it for layers that prepare data in `dataset.map`, before the model. Under a mixed policy `Rescaling` would
    return 16-bit floats, and `MixUp` and `CutMix` fail. `keras_mp.convert` leaves such layers in float32 anyway.

    Returns:
        A context manager.

    Example:

    >>> import keras, keras_mp
    >>> with keras_mp.preprocessing_scope():
    ...     prepare = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.layers.RandomFlip()])
    >>> images = tf.data.Dataset.from_tensor_slices(tf.zeros((8, 32, 32, 3), "uint8")).batch(4).map(prepare)
    >>> images.element_spec.dtype
    tf.float32
    """
    return policy_scope("float32")


def needs_loss_scaling(model: keras.Layer) -> bool:
    """Whether gradients of a model may underflow, so that it needs a `LossScaleOptimizer`.

    Args:
        model: a Keras model or layer. Every layer in it counts, under any policy of the model itself.

    Returns:
        True where any layer computes in float16.

    Raises:
        TypeError: for anything that is not a Keras model or layer.

    Example:

    >>> import keras, keras_mp
    >>> layers = [keras.Input((4,)), keras.layers.Dense(4, dtype="mixed_float16"), keras.layers.Dense(1)]
    >>> keras_mp.needs_loss_scaling(keras.Sequential(layers))
    True
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(f"Expected a Keras model or layer, received {model!r} of type {type(model).__name__}.")
    return "float16" in compute_dtypes(model)


def compute_dtypes(model: keras.Layer) -> frozenset[str]:
    """Returns the dtypes that the layers of a model compute in.

    Args:
        model: a Keras model or layer. Every layer in it counts, under any policy of the model itself.

    Returns:
        Names of dtypes, such as `{"float32", "bfloat16"}`.
    """
    return frozenset(layer.compute_dtype for layer in _computing_layers(model))


def _computing_layers(model: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that compute. A model without own weights only passes tensors on, under any policy."""
    found = []
    for layer in keras_layers.layers_by_path(model).values():
        inner = {id(weight) for each in keras_layers.inner_layers(layer) for weight in each.weights}
        hands_on = isinstance(layer, keras.Model) and all(id(weight) in inner for weight in layer.weights)
        if not hands_on and not isinstance(layer, keras.layers.InputLayer):
            found.append(layer)
    return found


def _resolve(policy: object) -> keras.DTypePolicy:
    """Returns the Keras policy that was asked for, or raises a `PolicyError`."""
    if isinstance(policy, str):
        try:
            found = keras.dtype_policies.get(policy)
        except (TypeError, ValueError) as error:
            raise _unknown(policy) from error
    elif isinstance(policy, keras.DTypePolicy):
        found = policy
    else:
        raise PolicyError(
            f"Expected the name of a dtype policy or a keras.DTypePolicy, received {policy!r} of type "
            f"{type(policy).__name__}. {_allowed()}"
        )
    for each in policy_map.policies_in(found):
        if each.compute_dtype not in _FLOATS or each.variable_dtype not in _FLOATS:
            raise _unknown(each.name)
    return found


def _unknown(name: str) -> PolicyError:
    meant = _meant(name)
    hint = f' Did you mean "{meant}"?' if meant else ""
    return PolicyError(f"Unknown dtype policy {name!r}.{hint} {_allowed()}")


def _allowed() -> str:
    return f'Expected one of {", ".join(_NAMES)}, for example keras_mp.set_policy("auto").'


def _meant(name: str) -> str | None:
    """Returns the policy that a misspelt name stands for. For 16-bit names it is mixed: pure ones hardly train."""
    low = name.lower()
    if "16" in low and "int" not in low:
        return "mixed_bfloat16" if re.search(r"b(f|16|loat|rain)", low) else "mixed_float16"
    close = difflib.get_close_matches(low, [*_NAMES, *_OTHER_NAMES], n=1)
    return _OTHER_NAMES.get(close[0], close[0]) if close else None


def stacklevel() -> int:
    """Returns the `stacklevel` with which a warning of the caller points at the user's line."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and re.match(r"keras(_mp)?\.|contextlib$", frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level
