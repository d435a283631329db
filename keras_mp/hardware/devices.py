"""The devices here, and the features that decide which dtype each is fast at."""

import dataclasses
import functools
import os
import platform
import re
import subprocess
import sys

import tensorflow as tf

from keras_mp._compat import runtime

__all__ = ["Device", "cpu_here", "devices_here", "onednn_enabled", "parse_cpuinfo", "parse_sysctl"]

# CPU features for 16-bit arithmetic, as Linux spells them, with their names for people.
BFLOAT16_FEATURES = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
_FLOAT16_FEATURES = ("amx_fp16", "avx512_fp16", "asimdhp")


@dataclasses.dataclass(frozen=True)
class Device:
    """One device, with the facts that decide which dtype it is fast at.

    Args:
        kind: `"cpu"`, `"gpu"` or `"tpu"`.
        name: the model, as the system names it.
        features: the CPU's features for 16-bit arithmetic, as Linux spells them (`"amx_bf16"`, `"avx512_bf16"`,
            `"bf16"` on Arm). Empty where they are unknown.
        compute_capability: (major, minor) of an NVIDIA GPU. None for other devices.

    Example:
    >>> Device("gpu", "NVIDIA A100", compute_capability=(8, 0))
    Device(kind='gpu', name='NVIDIA A100', features=(), compute_capability=(8, 0))
    """

    kind: str
    name: str
    features: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None


def parse_cpuinfo(text: str) -> Device:
    r"""Reads the CPU's model and 16-bit features from the text of Linux's `/proc/cpuinfo`.

    Args:
        text: the file's content. On x86 the features stand after `flags`, on Arm after `Features`.

    Returns:
        A device with the features that every core has.

    Example:
    >>> parse_cpuinfo("model name : Xeon\nflags : fpu avx512_bf16 amx_bf16")
    Device(kind='cpu', name='Xeon', features=('amx_bf16', 'avx512_bf16'), compute_capability=None)
    """
    cores = [set(line.split()) for line in re.findall(r"^(?:flags|Features)[ \t]*:(.*)$", text, re.MULTILINE)]
    common = set.intersection(*cores) if cores else set()
    name = re.search(r"^model name[ \t]*:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE)
    features = tuple(feature for feature in (*BFLOAT16_FEATURES, *_FLOAT16_FEATURES) if feature in common)
    return Device("cpu", name.group(1) if name else _processor(), features)


def parse_sysctl(text: str) -> Device:
    r"""Reads the CPU's model and 16-bit features from the output of macOS's `sysctl`.

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


def devices_here() -> list[Device]:
    """Returns the CPU and the GPUs and TPUs that TensorFlow may use now."""
    return [cpu_here(), *_gpus(), *_tpus()]


def onednn_enabled() -> bool:
    """Whether TensorFlow may call oneDNN, as the environment variable `TF_ENABLE_ONEDNN_OPTS` says."""
    return os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1").lower() not in ("0", "false")


def _processor() -> str:
    return platform.processor() or platform.machine() or "CPU"


def cpu_here() -> Device:
    """Returns the CPU. It is read once per process."""
    return _cpu()


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
    # A remote TPU is not a physical device, and listing logical devices would start the runtime.
    tpus = tf.config.get_visible_devices("TPU")
    if not tpus and runtime.runtime_started():
        tpus = tf.config.list_logical_devices("TPU")
    return [Device("tpu", ":".join(tpu.name.split(":")[-2:])) for tpu in tpus]
