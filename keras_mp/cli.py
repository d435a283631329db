"""The `keras-mp` command: parses, asks the other modules, prints."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from typing import Annotated, Any

import keras
import numpy as np
import tensorflow as tf
import typer
from rich.console import Console
from rich.table import Table

from keras_mp import hardware
from keras_mp.launch import launch as launch_workers

__all__ = ["app"]

app = typer.Typer(
    help="Mixed-precision training for TensorFlow and Keras 3.",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"keras-mp {_version()}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for programs.")] = False,
) -> None:
    """Show this machine's devices, what they are fast at, and the dtype policy and compiler to use on it."""
    found = hardware.detect()
    device = found.accelerators[0].kind.upper() if found.accelerators else "CPU"
    times = [hardware.measure(dtype, device) for dtype in ("bfloat16", "float16")]
    if as_json:
        typer.echo(json.dumps(_as_json(found, times), indent=2))
    else:
        _print_tables(found, times)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def launch(
    script: Annotated[str, typer.Argument(help="A Python script; with --module, the name of a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What the script gets.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many processes to start on this machine.")] = 2,
    module: Annotated[bool, typer.Option("--module", "-m", help="Run a module, as `python -m` does.")] = False,
) -> None:
    """Run a training script as several workers on this machine, which `keras_mp.strategy()` then connects.

    Their output is passed on with their number before it. When one fails the others are ended too.
    """
    if not module and not os.path.isfile(script):
        raise typer.BadParameter(f"There is no file {script!r}. Name a Python script, or a module after --module.")
    command = [sys.executable, *(["-m"] if module else []), script, *(arguments or [])]
    raise typer.Exit(launch_workers(command, workers))


def _as_json(found: hardware.Hardware, times: list[hardware.ProductTimes]) -> dict[str, Any]:
    return {
        "versions": _versions(),
        "devices": [dataclasses.asdict(device) for device in found.devices],
        "recommended_policy": found.recommended_policy,
        "recommended_jit_compile": found.recommended_jit_compile,
        "reason": found.reason,
        "products": [{**dataclasses.asdict(each), "ratio": each.ratio} for each in times],
    }


def _print_tables(found: hardware.Hardware, times: list[hardware.ProductTimes]) -> None:
    # Sentences are left to the terminal to wrap, so that a file or a pager gets them whole.
    console = Console(highlight=False, soft_wrap=True)
    console.print("Versions: " + ", ".join(f"{name} {version}" for name, version in _versions().items()))

    devices = Table("device", "name", "what matters for 16 bits")
    for device in found.devices:
        devices.add_row(device.kind.upper(), device.name, _what_matters(device))
    console.print(devices)

    first = times[0]
    products = Table(f"product, {first.size} x {first.size}, on {first.device}", "ms", "against float32")
    products.add_row("float32", f"{first.float32_ms:.2f}", "")
    for each in times:
        products.add_row(each.dtype, f"{each.dtype_ms:.2f}", f"{each.ratio:.1f}x")
    console.print(products)

    console.print(
        f'Use [bold]keras_mp.set_policy("{found.recommended_policy}")[/bold] and '
        f"[bold]model.compile(..., jit_compile={found.recommended_jit_compile})[/bold]."
    )
    console.print(found.reason, markup=False)


def _what_matters(device: hardware.Device) -> str:
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
        "keras_mp": _version(),
    }


def _version() -> str:
    return importlib.metadata.version("keras-mp")
