"""`keras-mp export`: writes a trained model for serving."""

import json
import pathlib
from typing import Annotated, Any

import tensorflow as tf
import typer
from rich.console import Console
from rich.table import Table

from keras_mp.cli.failures import printed_errors
from keras_mp.cli.options import AsJson, Modules, Trust, load, shape_in_words
from keras_mp.exporting.export import export as export_model
from keras_mp.exporting.manifest import read_record

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Argument(help="A .keras file.")],
    path: Annotated[str, typer.Argument(help="Folder or URL for the versions, such as saved_models/digits.")],
    precision: Annotated[
        str, typer.Option(help="Compute dtype: float32; mixed, as trained; auto, by this machine's hardware.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="Dtype of the stored weights: float32, half, float16 or bfloat16.")
    ] = "float32",
    format: Annotated[str, typer.Option(help="saved_model, litert or onnx.")] = "saved_model",
    jit_compile: Annotated[bool, typer.Option("--jit-compile", help="Compile the signatures by XLA.")] = False,
    modules: Modules = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model for serving, as a new version with float32 inputs and outputs.

    The export runs without Keras once before it is published.
    """
    with printed_errors():
        trained = load(model, modules, trust, compile=False)
        written = export_model(
            trained, path, precision=precision, weights=weights, format=format, jit_compile=jit_compile
        )
        record = read_record(written)
    if record is None:
        facts: dict[str, Any] = {"path": str(written), "bytes": tf.io.gfile.stat(str(written)).length}
        typer.echo(json.dumps(facts, indent=2) if as_json else f"Wrote {written}, {facts['bytes']:,} bytes.")
    elif as_json:
        typer.echo(json.dumps({"path": str(written), **record}, indent=2))
    else:
        _print_export(written, record)


def _print_export(path: "pathlib.Path | str", record: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Wrote {path}, and ran it without Keras.", markup=False)
    facts = Table("", "")
    facts.add_row("trained under", ", ".join(record["policies"]))
    facts.add_row("matmuls in", ", ".join(record["compute_dtypes"]))
    facts.add_row("weights", record["weights"])
    if record["kept_in_float32"]:
        facts.add_row("kept in float32", ", ".join(record["kept_in_float32"]))
    sizes = record["sizes"]
    facts.add_row("size", f"{sizes['total']:,} bytes, {sizes['variables']:,} of variables, {sizes['graph']:,} of graph")
    facts.add_row("weights in float32", f"{sizes['float32_weights']:,} bytes")
    facts.add_row("fingerprint", record["fingerprint"][:16])
    console.print(facts)
    for name, signature in record["signatures"].items():
        tensors = Table(name, "dtype", "shape", "largest error", "relative")
        for each in signature["inputs"]:
            tensors.add_row(f"{each['name']} (input)", each["dtype"], shape_in_words(each["shape"]), "", "")
        for each in signature["outputs"]:
            error = record["errors"][name][each["name"]]
            errors = f"{error['largest']:.2g}", f"{error['relative']:.2g}"
            tensors.add_row(each["name"], each["dtype"], shape_in_words(each["shape"]), *errors)
        console.print(tensors)
