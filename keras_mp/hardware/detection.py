"""The recommendation for the devices here: `detect()` reads their features, `measure()` times a matmul."""

import functools
import weakref
from collections.abc import Callable, Sequence, Set

import tensorflow as tf

from keras_mp._compat import tf_replicas
from keras_mp.errors import ArgumentError
from keras_mp.hardware.devices import Device, cpu_here, devices_here, onednn_enabled
from keras_mp.hardware.matmul_timing import ProductTimes, time_matmuls
from keras_mp.hardware.recommendation import Hardware, is_certainly_fast, recommend

__all__ = [
    "cpu_gains",
    "detect",
    "detect_for",
    "fusion_is_safe",
    "in_use",
    "measure",
    "remember",
    "strategy_in_use",
]

_remembered: "Callable[[], tf.distribute.Strategy | None]" = lambda: None  # noqa: E731


def detect() -> Hardware:
    """Looks at the devices that TensorFlow may use here, and chooses the dtype policy and the compiler for them.

    GPUs and TPUs are listed at every call, so it sees `tf.config.set_visible_devices` and a TPU initialised later.

    Some CPUs with bfloat16 instructions but no AMX are slower in bfloat16 than in float32. On such a CPU it times a
    matmul, as `keras_mp.hardware.measure` does: once per process, in under half a second (two where it is close).

    It does not start TensorFlow's runtime. Memory growth, logical devices and multi-worker strategies can still be
    configured after it.

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
    return _recommended(devices_here())


def detect_for(strategy: "tf.distribute.Strategy | None") -> Hardware:
    """Returns the recommendation for the devices that a strategy trains on.

    Args:
        strategy: a strategy. None and TensorFlow's default strategy stand for all devices here.

    Returns:
        A `Hardware` of these devices. The CPU is always among them.

    Example:
    >>> import tensorflow as tf
    >>> detect_for(tf.distribute.OneDeviceStrategy("CPU:0")).accelerators
    ()
    """
    devices = devices_here()
    if strategy is not None and not tf_replicas.is_default_strategy(strategy):
        specs = [tf.DeviceSpec.from_string(device) for device in strategy.extended.worker_devices]
        kinds = {"cpu", *((spec.device_type or "CPU").lower() for spec in specs)}
        devices = [device for device in devices if device.kind in kinds]
    return _recommended(devices)


def remember(strategy: "tf.distribute.Strategy") -> None:
    """Makes `in_use` return the recommendation for a strategy while it exists.

    Args:
        strategy: the strategy that training is going to use.
    """
    global _remembered
    _remembered = weakref.ref(strategy)


def in_use() -> Hardware:
    """Returns the recommendation for the strategy in force, or else for the remembered one."""
    return detect_for(strategy_in_use())


def strategy_in_use() -> "tf.distribute.Strategy | None":
    """Returns the strategy in force, or else the remembered one, or None."""
    return tf.distribute.get_strategy() if tf.distribute.has_strategy() else _remembered()


def fusion_is_safe(dtypes: Set[str], here: Hardware | None = None) -> bool:
    """Whether TensorFlow may fuse matmuls: on some CPUs a fused float16 matmul is a thousand times slower.

    Args:
        dtypes: the dtypes of the matmuls.
        here: the hardware; None for all devices here.

    Example:
    >>> fusion_is_safe({"float16"}, recommend([Device("cpu", "Xeon")])), fusion_is_safe({"bfloat16"})
    (False, True)
    """
    devices = devices_here() if here is None else here.devices
    return "float16" not in dtypes or any(device.kind != "cpu" for device in devices)


def cpu_gains(dtype: str) -> bool:
    """Whether the CPU here multiplies so much faster in a 16-bit dtype that a training step gains from it.

    Args:
        dtype: `"bfloat16"` or `"float16"`. It is measured where the CPU's features leave doubt.
    """
    certain = dtype == "bfloat16" and onednn_enabled() and is_certainly_fast(cpu_here())
    return certain or measure(dtype).gains


def measure(dtype: str = "bfloat16", device: str = "CPU") -> ProductTimes:
    """Times a matmul in float32 and in a 16-bit dtype, in turns, on this machine.

    It takes under half a second on most devices, once per process: later calls return the same result. A ratio near
    the threshold is timed for up to two seconds. If that does not settle it, the result is "no gain", so that it is
    the same from run to run.

    The matmuls stand alone, without a bias: some CPUs are a thousand times slower with one in float16. The ratio is
    the most that a dtype can gain, because casts and other ops take their share of a training step.

    On the CPU it does not start TensorFlow's eager runtime, so devices and strategies can be configured after it. It
    does fix the number of threads, so call `tf.config.threading.set_intra_op_parallelism_threads` before. On a GPU or
    TPU it starts the runtime.

    Args:
        dtype: `"bfloat16"` or `"float16"`.
        device: `"CPU"`, `"GPU"` (the first one) or `"TPU"`.

    Returns:
        Both median times in milliseconds, and their ratio.

    Raises:
        ArgumentError: for another dtype, or a device that is not here.

    Example:
    >>> times = measure("bfloat16")
    >>> times.float32_ms > 0 and times.dtype_ms > 0
    True
    """
    if dtype not in ("bfloat16", "float16"):
        raise ArgumentError(f'measure(dtype={dtype!r}): expected "bfloat16" or "float16".')
    here = {"CPU"} | {found.kind.upper() for found in devices_here()}
    if device not in here:
        raise ArgumentError(
            f"measure(device={device!r}): expected a kind of device that is here: "
            f"{', '.join(repr(kind) for kind in sorted(here))}."
        )
    return _time_once(dtype, device)


_time_once = functools.cache(time_matmuls)


def _recommended(devices: Sequence[Device]) -> Hardware:
    return recommend(devices, onednn=onednn_enabled(), measure=measure)
