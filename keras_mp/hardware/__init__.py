"""What each device here is fast at: `detect()` reads it from the system, `measure()` times it."""

from keras_mp.hardware.detection import (
    Device,
    Hardware,
    cpu_gains,
    detect,
    detect_for,
    fast_dtypes,
    fusion_is_safe,
    in_use,
    measure,
    parse_cpuinfo,
    parse_sysctl,
    recommend,
    remember,
    strategy_in_use,
)

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
