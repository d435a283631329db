"""Prints errors and warnings for a shell instead of tracebacks."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import NoReturn

import typer

from keras_mp.errors import KerasMPError, KerasMPWarning

__all__ = ["printed_errors"]


@contextlib.contextmanager
def printed_errors() -> Iterator[None]:
    """Prints an error without its traceback and exits with code 1.

    Warnings of keras_mp go to stderr. Other warnings are dropped.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", KerasMPWarning)
        try:
            yield
        except (KerasMPError, OSError) as error:
            _fail(_in_terms_of_the_command(str(error)), error)
        finally:
            for each in told:
                typer.echo(f"Warning: {each.message}", err=True)


def _in_terms_of_the_command(message: str) -> str:
    """Replaces arguments of Python in a message by options of the command."""
    missing = re.search("Could not locate (class|function) '[^']*'", message)
    if missing:
        return f"{missing[0]}. Name the module that registers it: --import MODULE."
    if "safe_mode=False" in message:
        return "The file holds Python code. Add --trust if you know where it comes from."
    return message


def _fail(message: str, error: Exception) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1) from error
