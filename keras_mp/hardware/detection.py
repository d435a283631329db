"""What each device here is fast at: `detect()` reads it from the system, `measure()` times it.

`recommend()` and the two parsers are pure functions, so that hardware which is not here can be tested.
"""

import dataclasses
import functools
import os
import platform
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence, Set

import tensorflow as tf

from keras_mp._compat import runtime, tf_replicas
from keras_mp.errors import ArgumentError
from keras_mp.hardware.matmul_timing import ProductTimes, time_products

__all__ = [
    "Device",
    "Hardware",
    "cpu_gains",
    "detect",
    "detect_for",
    "fast_dtypes",
    "fusion_is_safe",
    "in_use",
    "measure",
    "parse_cpuinfo",
    "parse_sysctl",
    "recommend",
    "remember",
    "strategy_in_use",
]

# CPU features with a bearing on 16-bit arithmetic, as Linux spells them; the words are for people.
_BFLOAT16_FEATURES = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
_FLOAT16_FEATURES = ("amx_fp16", "avx512_fp16", "asimdhp")

# What promises speed of these: AMX has units of its own. AVX512-BF16 says how numbers are multiplied, not how fast: as
# measured, a product is 1.9 times as fast as in float32 on an AMD EPYC, and 0.6 times on an Intel Xeon without AMX.
_CERTAINLY_FAST = frozenset({"amx_bf16"})

_SIXTEEN_BIT_TENSOR_CORES = (7, 0)
_BFLOAT16_TENSOR_CORES = (8, 0)


_remembered: "Callable[[], tf.distribute.Strategy | None]" = lambda: None  # noqa: E731


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, and what decides which dtype it is fast at.

    Args:
        kind: `"cpu"`, `"gpu"` or `"tpu"`.
        name: the model, as the system names it.
        features: the CPU features that bear on 16-bit arithmetic, as Linux spells them (`"amx_bf16"`,
            `"avx512_bf16"`, `"bf16"` on Arm). Empty where they are unknown.
        compute_capability: of an NVIDIA GPU, as (major, minor). None for all else.

    Example:
    >>> Device("gpu", "NVIDIA A100", compute_capability=(8, 0))
    Device(kind='gpu', name='NVIDIA A100', features=(), compute_capability=(8, 0))
    """

    kind: str
    name: str
    features: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices here, and the dtype policy and compiler they are best used with.

    Args:
        devices: the CPU first, then every GPU and TPU that TensorFlow may use.
        recommended_policy: the name of a dtype policy.
        recommended_jit_compile: what to pass as `jit_compile` to `model.compile`.
        reason: why, in one sentence or two.
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


def parse_cpuinfo(text: str) -> Device:
    r"""Reads the CPU's model and 16-bit features from the text of Linux's `/proc/cpuinfo`.

    Args:
        text: what the file holds. On x86 the features stand after `flags`, on Arm after `Features`.

    Returns:
        A device with the features that every core has.

    Example:
    >>> parse_cpuinfo("model name : Xeon\nflags : fpu avx512_bf16 amx_bf16")
    Device(kind='cpu', name='Xeon', features=('amx_bf16', 'avx512_bf16'), compute_capability=None)
    """
    cores = [set(line.split()) for line in re.findall(r"^(?:flags|Features)[ \t]*:(.*)$", text, re.MULTILINE)]
    common = set.intersection(*cores) if cores else set()
    name = re.search(r"^model name[ \t]*:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE)
    features = tuple(feature for feature in (*_BFLOAT16_FEATURES, *_FLOAT16_FEATURES) if feature in common)
    return Device("cpu", name.group(1) if name else _processor(), features)


def parse_sysctl(text: str) -> Device:
    r"""Reads the CPU's model and 16-bit features from what macOS's `sysctl` prints.

    Args:
        text: lines `key: value`; a key the machine does not know is absent.

    Returns:
        A device, with the feature names that Linux has for them.

    Example:
    >>> parse_sysctl("machdep.cpu.brand_string: Apple M2\nhw.optional.arm.FEAT_BF16: 1").features
    ('bf16',)
    """
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    features = ("bf16",) if values.get("hw.optional.arm.FEAT_BF16") == "1" else ()
    return Device("cpu", values.get("machdep.cpu.brand_string") or _processor(), features)


def fast_dtypes(
    devices: Sequence[Device], *, onednn: bool = True, product: Callable[[str], ProductTimes] | None = None
) -> frozenset[str]:
    """The 16-bit dtypes that these devices are known to multiply faster than float32.

    Where there are accelerators the CPU does not count, and where there are several the weakest decides.

    Args:
        devices: as in `Hardware.devices`.
        onednn: whether TensorFlow may use oneDNN, which has the CPU's 16-bit products.
        product: times a product in a dtype on the CPU, and is asked where its features do not tell how fast that is.
            None to take every CPU with bfloat16 instructions to be fast in it.

    Returns:
        A subset of `{"bfloat16", "float16"}`.

    Example:
    >>> sorted(fast_dtypes([Device("gpu", "NVIDIA V100", compute_capability=(7, 0))]))
    ['float16']
    """
    accelerators = [device for device in devices if device.kind != "cpu"]
    each = [_fast_dtypes(device, onednn, product) for device in accelerators or devices]
    return frozenset.intersection(*each) if each else frozenset()


def recommend(
    devices: Sequence[Device], *, onednn: bool = True, product: Callable[[str], ProductTimes] | None = None
) -> Hardware:
    """Chooses the dtype policy and the compiler for a set of devices.

    The two are one choice: on a GPU and a TPU the 16-bit units are reached through XLA as well as without it, on a CPU
    only without it, because XLA does not call oneDNN's 16-bit kernels there. bfloat16 is preferred to float16
    where both are fast: it has the range of float32 and needs no loss scaling.

    Args:
        devices: the devices to train on. GPUs and TPUs go before the CPU; the weakest of unlike GPUs decides.
        onednn: whether TensorFlow may use oneDNN (`TF_ENABLE_ONEDNN_OPTS` is not 0).
        product: as for `fast_dtypes`.

    Returns:
        The same devices with a recommendation.

    Example:
    >>> hardware = recommend([Device("gpu", "Tesla V100", compute_capability=(7, 0))])
    >>> hardware.recommended_policy, hardware.recommended_jit_compile
    ('mixed_float16', True)
    """
    fast = fast_dtypes(devices, onednn=onednn, product=product)
    policy = "mixed_bfloat16" if "bfloat16" in fast else "mixed_float16" if "float16" in fast else "float32"
    gpus = [device for device in devices if device.kind == "gpu"]
    tpus = [device for device in devices if device.kind == "tpu"]
    if tpus:
        reason = "A TPU multiplies in bfloat16, which needs no loss scaling, and XLA compiles every step on it."
    elif gpus:
        reason = _gpu_reason(gpus)
    else:
        reason = _cpu_reason(devices, onednn, product if not fast else None)
    return Hardware(tuple(devices), policy, bool(tpus or gpus), reason, fast)


def detect() -> Hardware:
    """Looks at the devices that TensorFlow may use here, and chooses the dtype policy and the compiler for them.

    Never stale: only what is known of the CPU is remembered, while GPUs and TPUs are listed at every call, so that
    `tf.config.set_visible_devices` and a TPU system initialised later are seen. Where a CPU decides that has bfloat16
    instructions but no AMX, of which some are slower in bfloat16 than in float32, a product is timed, once per process
    and in under half a second (two where it is close), as by `keras_mp.hardware.measure`. It does not start
    TensorFlow's runtime: memory growth, logical devices and multi-worker strategies can still be configured after it.

    Returns:
        A `Hardware`, with `.devices`, `.recommended_policy`, `.recommended_jit_compile` and `.reason`.

    Example:
    >>> import keras_mp
    >>> hardware = keras_mp.detect()
    >>> hardware.devices[0].kind
    'cpu'
    >>> hardware.recommended_policy in ("float32", "mixed_bfloat16", "mixed_float16")
    True
    """
    return _recommended(_devices())


def detect_for(strategy: "tf.distribute.Strategy | None") -> Hardware:
    """What `detect()` finds, of the devices that a strategy trains on.

    Args:
        strategy: None, or one that leaves the choice of the device to TensorFlow, for all devices here.

    Returns:
        A `Hardware`, recommended for these devices. The CPU is among them in any case, as it is in every machine.

    Example:
    >>> import tensorflow as tf
    >>> detect_for(tf.distribute.OneDeviceStrategy("CPU:0")).accelerators
    ()
    """
    devices = _devices()
    if strategy is not None and not tf_replicas.is_default_strategy(strategy):
        specs = [tf.DeviceSpec.from_string(device) for device in strategy.extended.worker_devices]
        kinds = {"cpu", *((spec.device_type or "CPU").lower() for spec in specs)}
        devices = [device for device in devices if device.kind in kinds]
    return _recommended(devices)


def remember(strategy: "tf.distribute.Strategy") -> None:
    """Makes `in_use` answer for a strategy as long as there is one.

    Args:
        strategy: the one that training is going to use.
    """
    global _remembered
    _remembered = weakref.ref(strategy)


def in_use() -> Hardware:
    """What `detect_for` finds for the strategy whose scope this is, or else for the one remembered."""
    return detect_for(strategy_in_use())


def strategy_in_use() -> "tf.distribute.Strategy | None":
    """The strategy whose scope this is, or else the one remembered, or None."""
    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else _remembered()


def fusion_is_safe(dtypes: Set[str], here: Hardware | None = None) -> bool:
    """Whether TensorFlow may fuse products: on some CPUs the fused float16 one is a thousand times slower.

    Args:
        dtypes: those that are multiplied in.
        here: the hardware; None for all devices here.

    Example:
    >>> fusion_is_safe({"float16"}, recommend([Device("cpu", "Xeon")])), fusion_is_safe({"bfloat16"})
    (False, True)
    """
    devices = _devices() if here is None else here.devices
    return "float16" not in dtypes or any(device.kind != "cpu" for device in devices)


def cpu_gains(dtype: str) -> bool:
    """Whether the CPU here multiplies so much faster in a 16-bit dtype that a training step gains from it.

    Args:
        dtype: `"bfloat16"` or `"float16"`. It is measured, but where the CPU's features leave no doubt.
    """
    certain = dtype == "bfloat16" and _onednn_enabled() and not _CERTAINLY_FAST.isdisjoint(_cpu().features)
    return certain or measure(dtype).gains


def measure(dtype: str = "bfloat16", device: str = "CPU") -> ProductTimes:
    """Times a matrix product in float32 and in a 16-bit dtype, in turns, on this machine.

    Takes under half a second on anything but a very slow device, once per process: later calls return the same result.
    A ratio near the one that decides is timed for up to two seconds, and where even that does not settle it the answer
    is that nothing is gained, so that it is the same from run to run.
    The products stand alone, without the bias that some CPUs are a thousand times slower with in float16. What it
    shows is the most that a dtype can gain: in a training step, casts and other ops take their share.

    On the CPU it does not start TensorFlow's eager runtime, so that devices and strategies can be configured after it.
    One thing is settled by it, as by every first op: the number of threads, so call
    `tf.config.threading.set_intra_op_parallelism_threads` before. On a GPU or TPU it starts the runtime.

    Args:
        dtype: `"bfloat16"` or `"float16"`.
        device: `"CPU"`, `"GPU"` (the first one) or `"TPU"`.

    Returns:
        Both medians in milliseconds, and their ratio.

    Raises:
        ArgumentError: for another dtype, or a device that is not here.

    Example:
    >>> times = measure("bfloat16")
    >>> times.float32_ms > 0 and times.dtype_ms > 0
    True
    """
    if dtype not in ("bfloat16", "float16"):
        raise ArgumentError(f'measure(dtype={dtype!r}): expected "bfloat16" or "float16".')
    here = {"CPU"} | {found.kind.upper() for found in _devices()}
    if device not in here:
        raise ArgumentError(
            f"measure(device={device!r}): expected a kind of device that is here: "
            f"{', '.join(repr(kind) for kind in sorted(here))}."
        )
    return _time_once(dtype, device)


_time_once = functools.cache(time_products)


def _devices() -> list[Device]:
    return [_cpu(), *_gpus(), *_tpus()]


def _recommended(devices: Sequence[Device]) -> Hardware:
    return recommend(devices, onednn=_onednn_enabled(), product=measure)


def _fast_dtypes(device: Device, onednn: bool, product: Callable[[str], ProductTimes] | None) -> frozenset[str]:
    if device.kind == "tpu":
        return frozenset({"bfloat16"})
    if device.kind == "gpu":
        capability = device.compute_capability
        if capability is None or capability < _SIXTEEN_BIT_TENSOR_CORES:
            return frozenset()
        return frozenset({"float16"} if capability < _BFLOAT16_TENSOR_CORES else {"bfloat16", "float16"})
    if not onednn or _BFLOAT16_FEATURES.keys().isdisjoint(device.features):
        return frozenset()
    if product is None or not _CERTAINLY_FAST.isdisjoint(device.features):
        return frozenset({"bfloat16"})
    return frozenset({"bfloat16"} if product("bfloat16").gains else ())


def _gpu_reason(gpus: list[Device]) -> str:
    compiled = "XLA fuses the casts and small ops between products."
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
    """What speaks for a CPU's dtype; `slow` times the product that is no faster in bfloat16, if it is not."""
    names = _names(devices) if devices else "this CPU"
    words = [word for feature, word in _BFLOAT16_FEATURES.items() if any(feature in each.features for each in devices)]
    if not words:
        return f"{names} reports no bfloat16 instructions, and on such a CPU a 16-bit dtype only adds casts."
    if not onednn:
        return (
            f"{names} has {' and '.join(words)}, but oneDNN, whose kernels use it, is switched off "
            "(TF_ENABLE_ONEDNN_OPTS=0)."
        )
    if slow is not None:
        return (
            f"{names} has {' and '.join(words)}, but is no faster for it: {slow('bfloat16')}. On such a CPU 16 bits "
            "save memory, not time."
        )
    return (
        f"{names} has {' and '.join(words)}, which oneDNN's bfloat16 kernels use; XLA on a CPU does not use those "
        "kernels."
    )


def _names(devices: Sequence[Device]) -> str:
    return " and ".join(dict.fromkeys(device.name for device in devices))


def _processor() -> str:
    return platform.processor() or platform.machine() or "CPU"


def _onednn_enabled() -> bool:
    return os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1").lower() not in ("0", "false")


@functools.cache
def _cpu() -> Device:
    if sys.platform == "darwin":
        keys = ("machdep.cpu.brand_string", "hw.optional.arm.FEAT_BF16")
        try:
            # A key the machine does not know makes the exit code 1, and the others are printed all the same.
            return parse_sysctl(subprocess.run(["sysctl", *keys], capture_output=True, text=True, check=False).stdout)
        except OSError:
            return parse_sysctl("")
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return parse_cpuinfo(file.read())
    except OSError:
        return parse_cpuinfo("")


def _gpus() -> list[Device]:
    found = []
    for gpu in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        capability = details.get("compute_capability")
        name = details.get("device_name") or gpu.name.rpartition("physical_device:")[2]
        found.append(Device("gpu", name, compute_capability=tuple(capability) if capability else None))
    return found


def _tpus() -> list[Device]:
    # A remote TPU is no physical device, and listing logical ones would start the runtime: it is asked once it runs.
    tpus = tf.config.get_visible_devices("TPU")
    if not tpus and runtime.runtime_started():
        tpus = tf.config.list_logical_devices("TPU")
    return [Device("tpu", ":".join(tpu.name.split(":")[-2:])) for tpu in tpus]
