"""Options that several commands share, and how their values become models and functions."""

import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import keras
import typer

from keras_mp.conversion.load_model import load_model

__all__ = ["function_named", "imported", "load", "shape_in_words"]

Modules = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import a module that registers custom layers. Repeatable."),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run Python code that the file holds in layers, losses or metrics.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def load(path: str, modules: list[str] | None, trust: bool, compile: bool) -> keras.Model:
    """Imports the modules that register custom layers, then loads a `.keras` file."""
    for name in modules or []:
        imported(name, f"--import {name}")
    return load_model(path, safe_mode=not trust, compile=compile)


def function_named(source: str) -> Callable[[], Any]:
    """Returns the function that `MODULE:FUNCTION` names."""
    module_name, colon, name = source.partition(":")
    if not (module_name and colon and name) or module_name.endswith(".py") or "/" in module_name:
        raise typer.BadParameter(
            "Expected MODULE:FUNCTION, such as train:model_and_batch for a file train.py in this folder, without a "
            f"path and without .py. Received: {source}"
        )
    module = imported(module_name, source)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise typer.BadParameter(f"{module_name} has no function {name!r}. It has: {', '.join(there) or 'none'}.")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise typer.BadParameter(f"{source} must take no arguments: {error}.") from error
    return function


def imported(name: str, given: str) -> types.ModuleType:
    """Imports a module from this folder or from the path; `given` names it in errors."""
    sys.path.insert(0, os.getcwd())  # as `python` does; an installed command does not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise typer.BadParameter(f"{given} was found, but one of its imports was not: {error}.") from error
        raise typer.BadParameter(f"{given}: {error}. Run the command where `import {name}` works.") from error


def shape_in_words(shape: Sequence[int | None]) -> str:
    """Returns a shape as `any x 300`, with `any` for an unknown size."""
    return " x ".join("any" if size is None else str(size) for size in shape) or "scalar"
