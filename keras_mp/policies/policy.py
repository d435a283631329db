"""The dtype policy in force: named, chosen for the hardware, or refused with what to type instead.

A dtype policy says in which dtype layers compute and in which they keep their variables. Mixed policies compute in 16
bits and keep float32 master weights.
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
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.policies import policy_map

__all__ = [
    "advice",
    "agree_on_auto",
    "chosen_policy",
    "compute_dtypes",
    "named_policy",
    "needs_loss_scaling",
    "policies_in",
    "policy_scope",
    "preprocessing_scope",
    "set_policy",
    "stacklevel",
]

_NAMES = ("auto", "float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64")
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_OTHER_NAMES = {"amp": "auto", "double": "float64", "fp32": "float32", "fp64": "float64", "half": "mixed_float16"}

# The smallest change, relative to a weight, that a weight in that dtype can hold.
_STEP = {"float16": "1/2048", "bfloat16": "1/256"}


def set_policy(policy: str | keras.DTypePolicy) -> keras.DTypePolicy:
    """Sets Keras's global dtype policy, which every layer made from now on takes unless it is given a `dtype`.

    Like `keras.config.set_dtype_policy`, on which it stands: the policy holds for the calling thread, and
    `keras.utils.clear_session()` forgets it.

    A policy that computes in float16 on a machine without GPU or TPU has a side effect. Some CPUs run the fused product
    and bias that TensorFlow makes of a `Dense` layer a thousand times slower in float16 than in float32, while the same
    ops run one by one are as fast. So the fusion (`remapping`, an option of TensorFlow's graph optimizer grappler) is
    switched off for the whole process. It takes effect at once, for functions traced before too, and it stays off when
    another policy is set, because a model keeps its policy for life and may be trained later. To have it back, call
    `tf.config.optimizer.set_experimental_options({"remapping": True})` afterwards. Layers that get float16 from their
    own `dtype` argument are not seen here: set the option to False for them.

    Args:
        policy: `"auto"` for what `keras_mp.detect()` recommends, of the devices of the strategy whose scope this is or
            that `keras_mp.strategy` made last, and with several workers, all of which have to ask, what it recommends
            on the chief; `"mixed_bfloat16"`, `"mixed_float16"` or any other name Keras has for
            a floating-point policy; a `keras.DTypePolicy`, or a `keras_mp.PolicyMap` with policies for single layers.

    Returns:
        The policy now in force.

    Raises:
        PolicyError: for anything else, with what was probably meant. The policy in force is left as it was.

    Warns:
        KerasMPWarning: if the hardware has no use for a 16-bit policy, with the times of a product on it, or if the
            weights would be held in 16 bits, where small updates are lost. The policy is set all the same.

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
    """The policy that a user asked for, made ready for: with a warning where it is of no use on this hardware.

    Args:
        policy: as for `set_policy`, which says what is done about float16 on a CPU.
        call: how it was asked for, with "{}" where the policy stands, for the warning.

    Raises:
        PolicyError: as `set_policy` does.
    """
    patches.install_on_first_use()
    automatic = isinstance(policy, str) and policy == "auto"
    wanted = _resolve(_automatic() if automatic else policy)
    dtypes = {dtype for each in policies_in(wanted) for dtype in (each.compute_dtype, each.variable_dtype)}
    if dtypes.isdisjoint(_STEP):  # nothing to be said of it, so no product need be timed
        return wanted
    here = hardware.in_use()
    if not automatic:
        for message in advice(wanted, here, call=call):
            warnings.warn(message, KerasMPWarning, stacklevel=stacklevel())
    if not hardware.fusion_is_safe({each.compute_dtype for each in policies_in(wanted)}, here):
        runtime.set_remapper(False)
    return wanted


_agreements: list[Callable[[str], str]] = []


def agree_on_auto(agree: Callable[[str], str]) -> None:
    """Has `"auto"` mean what a function makes of the policy that is recommended here.

    Args:
        agree: gets its name, returns that of the policy to take.
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

    The layers keep it after the block. So does the setting that float16 on a CPU needs, see `set_policy`.

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
    """Makes the layers that are made inside a `with` block compute in float32, whatever the global policy is.

    For layers that prepare data in `dataset.map`, before the model: under a mixed policy `Rescaling` would hand on 16
    bits, and `MixUp` and `CutMix` fail. In a model that `keras_mp.convert` makes such layers are in float32 anyway.

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
    """Whether gradients of a model may underflow, so that its optimizer should be a `LossScaleOptimizer`.

    Args:
        model: a Keras model or layer. Every layer in it is asked, whatever the model's own policy is.

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
    """The dtypes that the layers of a model compute in.

    Args:
        model: a Keras model or layer. Every layer in it is asked, whatever the model's own policy is.

    Returns:
        Names of dtypes, such as `{"float32", "bfloat16"}`.
    """
    return frozenset(layer.compute_dtype for layer in _computing_layers(model))


def _computing_layers(model: keras.Layer) -> list[keras.Layer]:
    """The layers that compute: a model without weights of its own only hands on, and may have any policy."""
    found = []
    for layer in keras_layers.layers_by_path(model).values():
        inner = {id(weight) for each in keras_layers.inner_layers(layer) for weight in each.weights}
        hands_on = isinstance(layer, keras.Model) and all(id(weight) in inner for weight in layer.weights)
        if not hands_on and not isinstance(layer, keras.layers.InputLayer):
            found.append(layer)
    return found


def _resolve(policy: object) -> keras.DTypePolicy:
    """The Keras policy that was asked for, or a `PolicyError`."""
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
    for each in policies_in(found):
        if each.compute_dtype not in _FLOATS or each.variable_dtype not in _FLOATS:
            raise _unknown(each.name)
    return found


def policies_in(policy: keras.DTypePolicy) -> list[keras.DTypePolicy]:
    """Every policy that a layer can get from this one: itself, or a map's default and entries."""
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return [policy.default_policy, *policy.values()]
    return [policy]


def named_policy(policy: keras.DTypePolicy, path: str) -> tuple[keras.DTypePolicy, bool]:
    """The policy of the layer at a path, and whether a pattern of a map names it.

    Args:
        policy: a policy, or a map of them.
        path: the names from the model down to the layer, joined by "/".
    """
    if isinstance(policy, policy_map.PolicyMap):
        return policy[path], policy.names(path)
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[path], policy[path] != policy.default_policy
    return policy, False


def _unknown(name: str) -> PolicyError:
    meant = _meant(name)
    hint = f' Did you mean "{meant}"?' if meant else ""
    return PolicyError(f"Unknown dtype policy {name!r}.{hint} {_allowed()}")


def _allowed() -> str:
    return f'Expected one of {", ".join(_NAMES)}, for example keras_mp.set_policy("auto").'


def _meant(name: str) -> str | None:
    """The policy that a misspelt name stands for. 16-bit ones are always meant mixed: the pure ones hardly train."""
    low = name.lower()
    if "16" in low and "int" not in low:
        return "mixed_bfloat16" if re.search(r"b(f|16|loat|rain)", low) else "mixed_float16"
    close = difflib.get_close_matches(low, [*_NAMES, *_OTHER_NAMES], n=1)
    return _OTHER_NAMES.get(close[0], close[0]) if close else None


def advice(
    policy: keras.DTypePolicy,
    here: hardware.Hardware,
    measure: Callable[[str], ProductTimes] = hardware.measure,
    call: str = "set_policy({})",
) -> list[str]:
    """What the user should know before training under a policy on some hardware.

    Args:
        policy: a dtype policy, or a map of them.
        here: the hardware.
        measure: takes a 16-bit dtype and returns its product times on a CPU; called only where they decide.
        call: what the user typed, with "{}" for the policy.

    Returns:
        One message for each policy in a map, or for the policy itself, that has a fault.

    Example:
    >>> import keras
    >>> from keras_mp.hardware import Device, recommend
    >>> advice(keras.DTypePolicy("mixed_float16"), recommend([Device("gpu", "V100", compute_capability=(7, 0))]))
    []
    """
    messages = []
    for each in {member.name: member for member in policies_in(policy)}.values():
        typed = f"keras_mp.{call}"
        given = call.format(f'"{each.name}"')
        if each is not policy:
            given = call.format(f'<a {type(policy).__name__} with "{each.name}">')
            typed = "{} in its place in the map"
        useless = _useless(each.compute_dtype, here, measure)
        pure = each.variable_dtype in _STEP
        if useless:
            instead = typed.format(f'"{here.recommended_policy}"') + ", the best for this hardware"
            if pure:
                instead += ", or " + typed.format(f'"mixed_{each.variable_dtype}"') + " to keep the dtype"
        else:
            instead = typed.format(f'"mixed_{each.variable_dtype}"')
        if pure:
            stagnates = (
                f"the weights themselves are held in {each.variable_dtype}, so an update below "
                f"{_STEP[each.variable_dtype]} of a weight is rounded away and training stagnates"
            )
            useless = f"{stagnates}. Besides, {useless}" if useless else stagnates
        if useless:
            messages.append(f"{given}: {useless}. Type {instead}.")
    return messages


def _useless(dtype: str, here: hardware.Hardware, measure: Callable[[str], ProductTimes]) -> str | None:
    """Why computing in a dtype gains nothing on this hardware; None if it gains, or nobody knows."""
    if dtype not in _STEP or dtype in here.fast_dtypes:
        return None
    if here.accelerators:
        known = all(device.kind != "gpu" or device.compute_capability for device in here.accelerators)
        return f"{dtype} gains nothing on this hardware. {here.reason.rstrip('.')}" if known else None
    times = measure(dtype)
    if times.gains:
        return None
    beside = " (in float16 a hundred times, where they convolve)" if dtype == "float16" else ""
    return (
        f"{dtype} gains nothing on this CPU: {times}, and casts come on top. Training works, and is slower for it: "
        f"a little with the layers of keras_mp, which keras_mp.convert puts in, more with Keras's own{beside}"
    )


def stacklevel() -> int:
    """The stack level, for a warning issued by the caller, of the user's own line."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and re.match(r"keras(_mp)?\.|contextlib$", frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level
