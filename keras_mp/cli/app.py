"""The `keras-mp` command. Each of its commands parses, calls and prints."""

from typing import Annotated

import typer

from keras_mp.cli.convert import convert
from keras_mp.cli.doctor import doctor, version
from keras_mp.cli.export import export
from keras_mp.cli.launch import launch
from keras_mp.cli.tune import tune
from keras_mp.cli.verify import verify

__all__ = ["app"]

app = typer.Typer(
    help="Mixed-precision training for TensorFlow and Keras 3.",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"keras-mp {version()}")
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


app.command()(doctor)
app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(launch)
for _command in (convert, export, verify, tune):
    app.command()(_command)
