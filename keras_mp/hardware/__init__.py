"""The devices here, and the dtypes that each is fast at."""

from keras_mp.hardware.detection import (
    cpu_gains,
    detect,
    detect_for,
    fusion_is_safe,
    in_use,
    measure,
    remember,
    strategy_in_use,
)
from keras_mp.hardware.devices import Device, parse_cpuinfo, parse_sysctl
from keras_mp.hardware.recommendation import Hardware, fast_dtypes, recommend

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
