"""The `keras-mp` command: parses, asks the other modules, prints."""

import collections
import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import pathlib
import platform
import re
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn

import keras
import numpy as np
import tensorflow as tf
import typer
from rich.console import Console
from rich.table import Table

from keras_mp import hardware
from keras_mp._compat import keras_layers
from keras_mp.conversion.convert import convert as convert_model
from keras_mp.conversion.load_model import load_model
from keras_mp.distribution.launch import launch as launch_workers
from keras_mp.errors import KerasMPError, KerasMPWarning
from keras_mp.exporting.export import export as export_model
from keras_mp.exporting.manifest import read_record
from keras_mp.exporting.verification import ExportReport, verify_export
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.policies.policy_map import PolicyMap
from keras_mp.tuning.search import tune as tune_model

__all__ = ["app"]

app = typer.Typer(
    help="Mixed-precision training for TensorFlow and Keras 3.",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)

_Modules = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import a module that registers custom layers. Repeatable."),
]
_Trust = Annotated[
    bool, typer.Option("--trust", help="Run the Python code that a file holds, in layers, losses or metrics.")
]


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


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A .keras file.")],
    target: Annotated[pathlib.Path, typer.Argument(help="The .keras file to write.")],
    policy: Annotated[str, typer.Option(help="A dtype policy, or auto: what `keras-mp doctor` recommends.")] = "auto",
    float32: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave layers whose path matches in float32, as '.*/logits'. Repeatable."),
    ] = None,
    modules: _Modules = None,
    trust: _Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET where it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every layer as JSON, for programs.")] = False,
) -> None:
    """Convert a saved model to another dtype policy: the same function, weights and state of the optimizer."""
    if target.suffix != ".keras":
        raise typer.BadParameter(f"TARGET must end in .keras, the format that keeps everything. Received: {target}")
    if target.exists() and not overwrite:
        raise typer.BadParameter(f"{target} exists. Name another file, or add --overwrite.")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"There is no folder {target.parent}. Make it first.")
    with _in_words():
        model = _load(source, modules, trust, compile=True)
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


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A .keras file.")],
    path: Annotated[str, typer.Argument(help="Folder or URL for the versions, such as saved_models/digits.")],
    precision: Annotated[
        str, typer.Option(help="What to multiply in: float32; mixed, as trained; auto, by the hardware here.")
    ] = "auto",
    weights: Annotated[str, typer.Option(help="What to store: float32, half, float16 or bfloat16.")] = "float32",
    format: Annotated[str, typer.Option(help="saved_model, litert or onnx.")] = "saved_model",
    jit_compile: Annotated[bool, typer.Option("--jit-compile", help="Have XLA compile the signatures.")] = False,
    modules: _Modules = None,
    trust: _Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for programs.")] = False,
) -> None:
    """Write a trained model for serving: float32 in and out, versioned, run without Keras before it is published."""
    with _in_words():
        trained = _load(model, modules, trust, compile=False)
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


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="One version of an export, such as saved_models/digits/1.")],
    model: Annotated[
        str | None, typer.Option(help="The .keras file to compare with; else what it answered when it was written.")
    ] = None,
    modules: _Modules = None,
    trust: _Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for programs.")] = False,
) -> None:
    """Check the files of an export, run it without Keras and compare its answers."""
    with _in_words():
        report = verify_export(path, None if model is None else _load(model, modules, trust, compile=False))
    if as_json:
        facts = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        facts |= {"path": str(report.path), "compared_with": model or "the answers at export"}
        facts["outputs"] = {name: dataclasses.asdict(output) for name, output in report.outputs.items()}
        typer.echo(json.dumps({key: value for key, value in facts.items() if key != "answers"}, indent=2))
    else:
        _print_report(report, model)


@app.command()
def tune(
    source: Annotated[
        str,
        typer.Argument(metavar="MODULE:FUNCTION", help="A function that returns (model, batch) or (model, dataset)."),
    ],
    policy: Annotated[
        list[str] | None, typer.Option(help="A dtype policy to try; else float32 and both mixed ones. Repeatable.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds to take.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for programs.")] = False,
) -> None:
    """Time a model's training step by dtype policy and compiler on this machine, recommend and say why.

    The model is compiled; the batch is (x, y) or (x, y, sample_weight) as fit takes it, or a tf.data.Dataset of
    batches, which is then timed as well. Nothing is changed.
    """
    function = _function(source)
    try:
        made = function()
    except Exception as error:
        # The traceback of the user's function, without the frames of this command before it.
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        raise typer.Exit(1) from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], keras.Model):
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise typer.BadParameter(
            f"{source} returned {what}. Expected (model, batch), of a compiled model and (x, y) or a "
            "tf.data.Dataset: return model, (x[:32], y[:32])."
        )
    with _in_words():
        tuning = tune_model(*made, policies=policy or None, budget=budget)
    if as_json:
        facts = dataclasses.asdict(tuning)
        for each in facts["candidates"]:  # JSON has no infinity, which is the error of what is not finite
            each["error"] = each["error"] if each["error"] is None or math.isfinite(each["error"]) else None
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(tuning.table())
    for sentence in (tuning.reason, *tuning.findings):
        console.print(sentence, markup=False)


def _function(source: str) -> Callable[[], Any]:
    module_name, colon, name = source.partition(":")
    if not (module_name and colon and name) or module_name.endswith(".py") or "/" in module_name:
        raise typer.BadParameter(
            "Expected MODULE:FUNCTION, such as train:model_and_batch for a file train.py in this folder, without a "
            f"path and without .py. Received: {source}"
        )
    module = _imported(module_name, source)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise typer.BadParameter(f"{module_name} has no function {name!r}. It has: {', '.join(there) or 'none'}.")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise typer.BadParameter(f"{source} is called without arguments: {error}.") from error
    return function


def _imported(name: str, given: str) -> types.ModuleType:
    sys.path.insert(0, os.getcwd())  # which Python itself does, but not for an installed command
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise typer.BadParameter(f"{given} was found, but imports what is not there: {error}.") from error
        raise typer.BadParameter(f"{given}: {error}. Run the command where `import {name}` works.") from error


def _load(path: str, modules: list[str] | None, trust: bool, compile: bool) -> keras.Model:
    for name in modules or []:
        _imported(name, f"--import {name}")
    return load_model(path, safe_mode=not trust, compile=compile)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """What went wrong in words and exit code 1, not a traceback; our warnings go to stderr, others nowhere."""
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
    """The same advice in the options of this command, not in arguments of Python."""
    missing = re.search("Could not locate (class|function) '[^']*'", message)
    if missing:
        return f"{missing[0]}. Name the module that registers it: --import MODULE."
    if "safe_mode=False" in message:
        return "The file holds Python code. Add --trust if you know where it comes from."
    return message


def _fail(message: str, error: Exception) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1) from error


def _layers_before_and_after(model: keras.Model, converted: keras.Model) -> list[dict[str, str]]:
    """What became of each layer that holds no others; what was added, as the cast of an output, was nothing."""
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


def _print_export(path: "pathlib.Path | str", record: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Wrote {path}, and ran it without Keras.", markup=False)
    facts = Table("", "")
    facts.add_row("trained under", ", ".join(record["policies"]))
    facts.add_row("multiplies in", ", ".join(record["compute_dtypes"]))
    facts.add_row("weights", record["weights"])
    if record["kept_in_float32"]:
        facts.add_row("in float32 all the same", ", ".join(record["kept_in_float32"]))
    sizes = record["sizes"]
    facts.add_row("size", f"{sizes['total']:,} bytes, {sizes['variables']:,} of variables, {sizes['graph']:,} of graph")
    facts.add_row("weights in float32", f"{sizes['float32_weights']:,} bytes")
    facts.add_row("fingerprint", record["fingerprint"][:16])
    console.print(facts)
    for name, signature in record["signatures"].items():
        tensors = Table(name, "dtype", "shape", "largest error", "relative")
        for each in signature["inputs"]:
            tensors.add_row(f"{each['name']} (input)", each["dtype"], _shape(each["shape"]), "", "")
        for each in signature["outputs"]:
            error = record["errors"][name][each["name"]]
            errors = f"{error['largest']:.2g}", f"{error['relative']:.2g}"
            tensors.add_row(each["name"], each["dtype"], _shape(each["shape"]), *errors)
        console.print(tensors)


def _print_report(report: ExportReport, model: str | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    outputs = Table("output", "dtype", "shape", "finite", "largest error", "relative")
    for name, each in report.outputs.items():
        errors = f"{each.largest_error:.2g}", f"{each.relative_error:.2g}"
        outputs.add_row(name, each.dtype, _shape(each.shape), "yes" if each.finite else "NO", *errors)
    console.print(outputs)
    console.print(f"Compared with {model or 'what it answered when it was written'}.", markup=False)
    if not math.isnan(report.latency_ms):
        beside = "" if report.model_latency_ms is None else f"; the Keras model {report.model_latency_ms:.2f} ms"
        console.print(f"A call takes {report.latency_ms:.2f} ms without Keras{beside}.", markup=False)
    if report.record is not None:
        files = len(report.record["files"])
        console.print(f"All {files} files are what was written ({report.record['fingerprint'][:16]}).", markup=False)


def _shape(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape) or "scalar"


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
