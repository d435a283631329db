"""`keras-mp verify`: checks an export, runs it without Keras and compares its outputs."""

import dataclasses
import json
import math
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from keras_mp.cli.failures import printed_errors
from keras_mp.cli.options import AsJson, Modules, Trust, load, shape_in_words
from keras_mp.exporting.verification import ExportReport, verify_export

__all__ = ["verify"]


def verify(
    path: Annotated[str, typer.Argument(help="One version of an export, such as saved_models/digits/1.")],
    model: Annotated[
        str | None, typer.Option(help="A .keras file to compare with. Default: the outputs recorded at export.")
    ] = None,
    modules: Modules = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Check an export's files, run it without Keras and compare its outputs."""
    with printed_errors():
        report = verify_export(path, None if model is None else load(model, modules, trust, compile=False))
    if as_json:
        facts = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        facts |= {"path": str(report.path), "compared_with": model or "the answers at export"}
        facts["outputs"] = {name: dataclasses.asdict(output) for name, output in report.outputs.items()}
        typer.echo(json.dumps({key: value for key, value in facts.items() if key != "answers"}, indent=2))
    else:
        _print_report(report, model)


def _print_report(report: ExportReport, model: str | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    outputs = Table("output", "dtype", "shape", "finite", "largest error", "relative")
    for name, each in report.outputs.items():
        errors = f"{each.largest_error:.2g}", f"{each.relative_error:.2g}"
        outputs.add_row(name, each.dtype, shape_in_words(each.shape), "yes" if each.finite else "NO", *errors)
    console.print(outputs)
    console.print(f"Compared with {model or 'the outputs recorded at export'}.", markup=False)
    if not math.isnan(report.latency_ms):
        beside = "" if report.model_latency_ms is None else f"; the Keras model {report.model_latency_ms:.2f} ms"
        console.print(f"A call takes {report.latency_ms:.2f} ms without Keras{beside}.", markup=False)
    if report.record is not None:
        files = len(report.record["files"])
        console.print(f"All {files} files are as written ({report.record['fingerprint'][:16]}).", markup=False)
