"""Warnings about a policy that gains nothing on the hardware here, or in which training would lose updates."""

from collections.abc import Callable

import keras

from keras_mp import hardware
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.policies.policy_map import policies_in

__all__ = ["advice", "is_half"]

# The smallest relative change that a weight of the dtype can hold.
_STEP = {"float16": "1/2048", "bfloat16": "1/256"}


def advice(
    policy: keras.DTypePolicy,
    here: hardware.Hardware,
    measure: Callable[[str], ProductTimes] = hardware.measure,
    call: str = "set_policy({})",
) -> list[str]:
    """Returns warnings for a user who is about to train under a policy on some hardware.

    Args:
        policy: a dtype policy, or a map of them.
        here: the hardware.
        measure: takes a 16-bit dtype and returns matmul times on a CPU. It is called only where they decide.
        call: the call that the user typed, with "{}" for the policy.

    Returns:
        One message for each faulty policy: in a map, or the policy itself.

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
        pure = is_half(each.variable_dtype)
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


def is_half(dtype: str) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return dtype in _STEP


def _useless(dtype: str, here: hardware.Hardware, measure: Callable[[str], ProductTimes]) -> str | None:
    """Returns why a dtype gains nothing on this hardware, or None if it does or that is unknown."""
    if not is_half(dtype) or dtype in here.fast_dtypes:
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
