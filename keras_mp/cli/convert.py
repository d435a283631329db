"""`keras-mp convert`: puts a saved model under another dtype policy."""

import collections
import json
import os
import pathlib
import tempfile
from typing import Annotated

import keras
import typer
from rich.console import Console
from rich.table import Table

from keras_mp import hardware
from keras_mp._compat import keras_layers
from keras_mp.cli.failures import printed_errors
from keras_mp.cli.options import Modules, Trust, load
from keras_mp.conversion.convert import convert as convert_model
from keras_mp.policies.policy_map import PolicyMap

__all__ = ["convert"]


def convert(
    source: Annotated[str, typer.Argument(help="A .keras file.")],
    target: Annotated[pathlib.Path, typer.Argument(help="The .keras file to write.")],
    policy: Annotated[
        str, typer.Option(help="A dtype policy, or auto for the one that `keras-mp doctor` recommends.")
    ] = "auto",
    float32: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Keep layers in float32 whose path matches, such as '.*/logits'. Repeatable."
        ),
    ] = None,
    modules: Modules = None,
    trust: Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every layer as JSON, for programs.")] = False,
) -> None:
    """Convert a saved model to another dtype policy. Weights and the optimizer's state stay as they are."""
    if target.suffix != ".keras":
        raise typer.BadParameter(f"TARGET must end in .keras, the format that keeps everything. Received: {target}")
    if target.exists() and not overwrite:
        raise typer.BadParameter(f"{target} exists. Name another file, or add --overwrite.")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"There is no folder {target.parent}. Make it first.")
    with printed_errors():
        model = load(source, modules, trust, compile=True)
        if float32:
            chosen = hardware.detect().recommended_policy if policy == "auto" else policy
            converted = convert_model(model, PolicyMap(chosen, dict.fromkeys(float32, "float32")))
        else:
            converted = convert_model(model, policy)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}-") as folder:
            written = pathlib.Path(folder) / target.name
            converted.save(written)
            os.replace(written, target)
    layers = _layers_before_and_after(model, converted)
    if as_json:
        typer.echo(json.dumps({"path": str(target), "layers": layers}, indent=2))
        return
    counts = collections.Counter((each["was"], each["is"], each["compute_dtype"]) for each in layers)
    table = Table("layers", "were", "are", "compute in")
    for (was, now, dtype), count in counts.items():
        table.add_row(str(count), was, now, dtype)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"Wrote {target}.", markup=False)


def _layers_before_and_after(model: keras.Model, converted: keras.Model) -> list[dict[str, str]]:
    """Returns the class of each innermost layer before and after. An added layer, such as a cast, was `-` before."""
    before = keras_layers.layers_by_path(model)
    return [
        {
            "path": path,
            "was": _class_name(before[path]) if path in before else "-",
            "is": _class_name(layer),
            "compute_dtype": layer.compute_dtype,
        }
        for path, layer in keras_layers.layers_by_path(converted).items()
        if not keras_layers.inner_layers(layer) and not isinstance(layer, keras.layers.InputLayer)
    ]


def _package(layer: keras.Layer) -> str:
    return type(layer).__module__.partition(".")[0]


def _class_name(layer: keras.Layer) -> str:
    package = _package(layer)
    return f"{package}.{type(layer).__name__}" if package == "keras_mp" else type(layer).__name__
