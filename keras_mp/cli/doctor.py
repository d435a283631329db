"""`keras-mp doctor`: shows this machine and recommends a policy and a compiler."""

import dataclasses
import importlib.metadata
import json
import platform
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import typer
from rich.console import Console
from rich.table import Table

from keras_mp import hardware
from keras_mp.cli.options import AsJson
from keras_mp.hardware.matmul_timing import ProductTimes

__all__ = ["doctor", "version"]


def doctor(
    as_json: AsJson = False,
) -> None:
    """Show this machine's devices and their speed in half precision. Recommend a dtype policy and a compiler."""
    found = hardware.detect()
    device = found.accelerators[0].kind.upper() if found.accelerators else "CPU"
    times = [hardware.measure(dtype, device) for dtype in ("bfloat16", "float16")]
    if as_json:
        typer.echo(json.dumps(_as_json(found, times), indent=2))
    else:
        _print_tables(found, times)


def _as_json(found: hardware.Hardware, times: list[ProductTimes]) -> dict[str, Any]:
    return {
        "versions": _versions(),
        "devices": [dataclasses.asdict(device) for device in found.devices],
        "recommended_policy": found.recommended_policy,
        "recommended_jit_compile": found.recommended_jit_compile,
        "reason": found.reason,
        "products": [{**dataclasses.asdict(each), "ratio": each.ratio} for each in times],
    }


def _print_tables(found: hardware.Hardware, times: list[ProductTimes]) -> None:
    # The terminal wraps sentences, so a file or a pager gets them whole.
    console = Console(highlight=False, soft_wrap=True)
    console.print("Versions: " + ", ".join(f"{name} {version}" for name, version in _versions().items()))

    devices = Table("device", "name", "half precision")
    for device in found.devices:
        devices.add_row(device.kind.upper(), device.name, _half_precision_support(device))
    console.print(devices)

    first = times[0]
    matmuls = Table(f"matmul, {first.size} x {first.size}, on {first.device}", "ms", "against float32")
    matmuls.add_row("float32", f"{first.float32_ms:.2f}", "")
    for each in times:
        matmuls.add_row(each.dtype, f"{each.dtype_ms:.2f}", f"{each.ratio:.1f}x")
    console.print(matmuls)

    console.print(
        f'Use [bold]keras_mp.set_policy("{found.recommended_policy}")[/bold] and '
        f"[bold]model.compile(..., jit_compile={found.recommended_jit_compile})[/bold]."
    )
    console.print(found.reason, markup=False)


def _half_precision_support(device: hardware.Device) -> str:
    if device.compute_capability is not None:
        return "compute capability " + ".".join(str(part) for part in device.compute_capability)
    if device.kind == "tpu":
        return "bfloat16"
    return ", ".join(device.features) or ("none found" if device.kind == "cpu" else "compute capability unknown")


def _versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "NumPy": np.__version__,
        "keras_mp": version(),
    }


def version() -> str:
    """Returns the version of the installed package."""
    return importlib.metadata.version("keras-mp")
