"""The dtype policy and the compiler for a set of devices. Pure functions: any hardware can be tested anywhere."""

import dataclasses
from collections.abc import Callable, Sequence

from keras_mp.hardware.devices import BFLOAT16_FEATURES, Device
from keras_mp.hardware.matmul_timing import ProductTimes

__all__ = ["Hardware", "fast_dtypes", "is_certainly_fast", "recommend"]

# Only AMX promises speed, because it has separate units. AVX512-BF16 does not: as measured, a bfloat16 matmul is 1.9
# times as fast as a float32 one on an AMD EPYC, and 0.6 times on an Intel Xeon without AMX.
_CERTAINLY_FAST = frozenset({"amx_bf16"})

_SIXTEEN_BIT_TENSOR_CORES = (7, 0)
_BFLOAT16_TENSOR_CORES = (8, 0)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices here, with the best dtype policy and compiler for them.

    Args:
        devices: the CPU first, then every GPU and TPU that TensorFlow may use.
        recommended_policy: the name of a dtype policy.
        recommended_jit_compile: the value of `jit_compile` for `model.compile`.
        reason: the reason for both, in one or two sentences.
        fast_dtypes: the 16-bit dtypes that these devices are known to multiply faster than float32.
    """

    devices: tuple[Device, ...]
    recommended_policy: str
    recommended_jit_compile: bool
    reason: str
    fast_dtypes: frozenset[str] = frozenset()

    @property
    def accelerators(self) -> tuple[Device, ...]:
        """The GPUs and TPUs."""
        return tuple(device for device in self.devices if device.kind != "cpu")


def fast_dtypes(
    devices: Sequence[Device], *, onednn: bool = True, measure: Callable[[str], ProductTimes] | None = None
) -> frozenset[str]:
    """The 16-bit dtypes that these devices are known to multiply faster than float32.

    Where there are accelerators the CPU does not count, and where there are several the weakest decides.

    Args:
        devices: as in `Hardware.devices`.
        onednn: whether TensorFlow may use oneDNN, which has the CPU's 16-bit matmuls.
        measure: times a matmul in a dtype on the CPU. It is called where the CPU's features leave the speed open.
            None means that every CPU with bfloat16 instructions is fast in it.

    Returns:
        A subset of `{"bfloat16", "float16"}`.

    Example:
    >>> sorted(fast_dtypes([Device("gpu", "NVIDIA V100", compute_capability=(7, 0))]))
    ['float16']
    """
    accelerators = [device for device in devices if device.kind != "cpu"]
    each = [_fast_dtypes(device, onednn, measure) for device in accelerators or devices]
    return frozenset.intersection(*each) if each else frozenset()


def recommend(
    devices: Sequence[Device], *, onednn: bool = True, measure: Callable[[str], ProductTimes] | None = None
) -> Hardware:
    """Chooses the dtype policy and the compiler for a set of devices.

    The two are one choice. A GPU or TPU uses its 16-bit units with XLA and without it. A CPU uses them only without
    XLA, which does not call oneDNN's 16-bit kernels. Where both dtypes are fast, bfloat16 is preferred: it has the
    range of float32 and needs no loss scaling.

    Args:
        devices: the devices to train on. GPUs and TPUs go before the CPU; the weakest of unlike GPUs decides.
        onednn: whether TensorFlow may use oneDNN (`TF_ENABLE_ONEDNN_OPTS` is not 0).
        measure: as for `fast_dtypes`.

    Returns:
        The same devices with a recommendation.

    Example:
    >>> hardware = recommend([Device("gpu", "Tesla V100", compute_capability=(7, 0))])
    >>> hardware.recommended_policy, hardware.recommended_jit_compile
    ('mixed_float16', True)
    """
    fast = fast_dtypes(devices, onednn=onednn, measure=measure)
    policy = "mixed_bfloat16" if "bfloat16" in fast else "mixed_float16" if "float16" in fast else "float32"
    gpus = [device for device in devices if device.kind == "gpu"]
    tpus = [device for device in devices if device.kind == "tpu"]
    if tpus:
        reason = "A TPU multiplies in bfloat16, which needs no loss scaling, and XLA compiles every step on it."
    elif gpus:
        reason = _gpu_reason(gpus)
    else:
        reason = _cpu_reason(devices, onednn, measure if not fast else None)
    return Hardware(tuple(devices), policy, bool(tpus or gpus), reason, fast)


def is_certainly_fast(cpu: Device) -> bool:
    """Whether a CPU's features alone promise that it is faster in bfloat16 than in float32.

    Args:
        cpu: a device of kind `"cpu"`.
    """
    return not _CERTAINLY_FAST.isdisjoint(cpu.features)


def _fast_dtypes(device: Device, onednn: bool, measure: Callable[[str], ProductTimes] | None) -> frozenset[str]:
    if device.kind == "tpu":
        return frozenset({"bfloat16"})
    if device.kind == "gpu":
        capability = device.compute_capability
        if capability is None or capability < _SIXTEEN_BIT_TENSOR_CORES:
            return frozenset()
        return frozenset({"float16"} if capability < _BFLOAT16_TENSOR_CORES else {"bfloat16", "float16"})
    if not onednn or BFLOAT16_FEATURES.keys().isdisjoint(device.features):
        return frozenset()
    if measure is None or is_certainly_fast(device):
        return frozenset({"bfloat16"})
    return frozenset({"bfloat16"} if measure("bfloat16").gains else ())


def _gpu_reason(gpus: list[Device]) -> str:
    compiled = "XLA fuses the casts and small ops between matmuls."
    unknown = [device for device in gpus if device.compute_capability is None]
    if unknown:
        return (
            f"TensorFlow reports no CUDA compute capability for {_names(unknown)}, so which 16-bit dtype it is fast at "
            f"is unknown, and float32 is sure to work. {compiled}"
        )
    weakest = min(gpus, key=lambda device: device.compute_capability or ())
    capability = weakest.compute_capability or ()
    version = ".".join(str(part) for part in capability)
    which = f"{weakest.name} has compute capability {version}"
    if len({device.compute_capability for device in gpus}) > 1:
        which = f"the weakest of {len(gpus)} unlike GPUs decides, and {which}"
    if capability < _SIXTEEN_BIT_TENSOR_CORES:
        gain = "without 16-bit tensor cores, which come with 7.0"
    elif capability < _BFLOAT16_TENSOR_CORES:
        gain = "with tensor cores for float16; those for bfloat16 come with 8.0"
    else:
        gain = "with tensor cores as fast in bfloat16 as in float16, and bfloat16 needs no loss scaling"
    return f"{which[0].upper()}{which[1:]}, {gain}. {compiled}"


def _cpu_reason(devices: Sequence[Device], onednn: bool, slow: Callable[[str], ProductTimes] | None) -> str:
    """Returns the reason for a CPU's dtype. `slow` times the matmul where bfloat16 is no faster, else it is None."""
    names = _names(devices) if devices else "this CPU"
    words = [word for feature, word in BFLOAT16_FEATURES.items() if any(feature in each.features for each in devices)]
    if not words:
        return f"{names} reports no bfloat16 instructions, and on such a CPU a 16-bit dtype only adds casts."
    if not onednn:
        return (
            f"{names} has {' and '.join(words)}, but oneDNN, whose kernels use it, is switched off "
            "(TF_ENABLE_ONEDNN_OPTS=0)."
        )
    if slow is not None:
        return (
            f"{names} has {' and '.join(words)}, but is no faster for it: {slow('bfloat16')}. On such a CPU half "
            "precision saves memory, not time."
        )
    return (
        f"{names} has {' and '.join(words)}, which oneDNN's bfloat16 kernels use; XLA on a CPU does not use those "
        "kernels."
    )


def _names(devices: Sequence[Device]) -> str:
    return " and ".join(dict.fromkeys(device.name for device in devices))
