"""`keras-mp launch`: runs a training script as several workers on this machine."""

import os
import sys
from typing import Annotated

import typer

from keras_mp.distribution.launch import launch as launch_workers

__all__ = ["launch"]


def launch(
    script: Annotated[str, typer.Argument(help="A Python script; with --module, the name of a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the script.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes on this machine.")] = 2,
    module: Annotated[bool, typer.Option("--module", "-m", help="Run a module, as `python -m` does.")] = False,
) -> None:
    """Run a training script as several workers on this machine. `keras_mp.strategy()` connects them.

    Each line of output starts with its worker's number. If one worker fails, the others are ended.
    """
    if not module and not os.path.isfile(script):
        raise typer.BadParameter(f"There is no file {script!r}. Name a Python script, or a module after --module.")
    command = [sys.executable, *(["-m"] if module else []), script, *(arguments or [])]
    raise typer.Exit(launch_workers(command, workers))
