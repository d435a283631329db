"""Exports for runtimes that read no SavedModel: TensorFlow Lite files and ONNX, each run before it is published."""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp.errors import ExportError
from keras_mp.exporting import publishing
from keras_mp.exporting.comparison import measure
from keras_mp.exporting.formats import runtimes
from keras_mp.exporting.formats.halving import halve_onnx, halved_litert
from keras_mp.exporting.formats.operations import without_erfc
from keras_mp.exporting.judgement import judge
from keras_mp.exporting.signature import Names
from keras_mp.exporting.storage import half_of, narrow_dtypes
from keras_mp.exporting.traced import Graph, trace

__all__ = ["export_converted"]

_NAMES = {"litert": "TensorFlow Lite", "onnx": "onnxruntime"}
_OPSET = 18


def export_converted(
    models: Mapping[str, keras.Model],
    path: pathlib.Path,
    format: str,
    names: tuple[Names, Names],
    precision: str,
    weights: str,
    batch: Any,
    verify: bool,
) -> pathlib.Path:
    """Writes a file in another format, which replaces one that is there when it has been run.

    Args:
        models: the one model, as `serving_default`.
        path: the file.
        format: "litert" or "onnx".
        names: names of inputs and outputs.
        precision: as for `export`; "auto" is "float32".
        weights: as for `export`.
        batch: as for `export`.
        verify: whether to run it and compare it with the model.

    Raises:
        ExportError: the format cannot hold what was asked for, the converter or the runtime fails, or it does not
            answer like the model.
    """
    if len(models) > 1:
        raise ExportError(f"A file of format {format!r} has one signature. Export each model to a file of its own.")
    (model,) = models.values()
    narrow = narrow_dtypes(model) if precision == "mixed" else frozenset()
    if narrow and (format == "litert" or "bfloat16" in narrow):
        raise ExportError(
            f"{_NAMES[format]} has no products in {' and '.join(sorted(narrow))} for what TensorFlow multiplies in it. "
            f"Type export(..., format={format!r}, precision='float32')."
        )
    suffix = runtimes.SUFFIXES[format]
    if path.suffix != suffix:
        path = path.with_name(path.name + suffix)
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder. Name a file, such as {str(path / 'model')!r}.")
    if format == "onnx":
        runtimes.require_onnx("tf2onnx", "onnxruntime")

    def traced(models: Mapping[str, keras.Model], names: tuple[Names, Names] = (None, None)) -> Graph:
        # Weights are made smaller in the file: a converter would make float32 constants of them again.
        return trace(models, "mixed" if narrow else "float32", "float32", names)

    half = half_of(weights, model)
    if half and format == "litert":
        half = "float16"  # the only one that it has
    graph = traced(models, names)
    rows = graph.rows(batch)
    with publishing.unfinished(path.parent) as scratch:
        made = scratch / path.name
        with publishing.writing(path):
            _convert(graph, made, half)
        if verify:
            _verify(graph, made, rows, half, lambda probe, limit: _probed(traced, probe, made, half, rows, limit))
        with publishing.writing(path):
            publishing.replace(made, path)
    return path


def _verify(
    graph: Graph,
    made: pathlib.Path,
    rows: Mapping[str, Mapping[str, np.ndarray]],
    half: str | None,
    probed: Callable[[keras.Model, float], str],
) -> None:
    """Runs a file and compares it with the model; `probed` says where its runtime is the first to differ."""
    _, expected = graph.run(rows)
    found = {"serving_default": runtimes.run_file(made, rows["serving_default"])}
    dtypes = graph.trained_dtypes | ({half} if half else set())

    def cause(signature: str, limit: float) -> str:
        return graph.origin(signature, rows[signature], limit) or probed(graph.models[signature], limit)

    judge(graph, found, expected, dtypes, cause, refuse=True)


def _convert(graph: Graph, made: pathlib.Path, half: str | None) -> None:
    """Writes the file in the format of its suffix."""
    saved_model = made.parent / "saved_model"
    saved_model.mkdir()
    graph.save(saved_model)
    if made.suffix == runtimes.SUFFIXES["litert"]:
        content = _litert(saved_model)
        made.write_bytes(halved_litert(content) if half else content)
    else:
        without_erfc(saved_model)
        _onnx(saved_model, made)
        if half:
            halve_onnx(made, half)


def _probed(
    traced: Callable[[Mapping[str, keras.Model]], Graph],
    model: keras.Model,
    made: pathlib.Path,
    half: str | None,
    rows: Mapping[str, Mapping[str, np.ndarray]],
    limit: float,
) -> str:
    """Says which layer is the first to differ in a runtime, by a file that returns what each layer returns."""
    runtime = _NAMES["onnx" if made.suffix == runtimes.SUFFIXES["onnx"] else "litert"]
    said = f"The graph answers like the model, and {runtime} does not"
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    outputs = [(layer, tensor) for layer in layers for tensor in _outputs_of(layer)]
    probe = keras.Model(model.inputs, [tensor for _, tensor in outputs], name=model.name)
    file = made.parent / "probe" / made.name
    try:
        file.parent.mkdir()
        graph = traced({"serving_default": probe})
        named = dict(zip(graph.signatures["serving_default"].inputs, rows["serving_default"].values(), strict=True))
        given = {info.name: array for info, array in named.items()}
        _convert(graph, file, half)
        found, expected = runtimes.run_file(file, given), graph.expected("serving_default", given)
    except (ExportError, OSError, ValueError, TypeError):
        return f"{said}."  # of some layer the format holds no output
    for (layer, _), name in zip(outputs, graph.own_outputs["serving_default"], strict=True):
        if not measure(found[name], expected[name]).relative_error <= limit:
            return f"{said}: layer {layer.name!r} ({type(layer).__name__}) is the first that differs there."
    return f"{said}, though each layer alone does."


def _outputs_of(layer: keras.Layer) -> list[keras.KerasTensor]:
    try:
        tensors = keras.tree.flatten(layer.output)
    except (AttributeError, ValueError):  # it is called several times
        return []
    return [
        tensor for tensor in tensors if tensor.dtype in ("float16", "bfloat16", "float32", "int32", "int64", "bool")
    ]


def _litert(saved_model: pathlib.Path) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=["serving_default"])
    try:
        return bytes(converter.convert())
    except Exception as error:
        text = str(error).strip()
        publishing.refuse_full_disk(text)
        raise ExportError(
            f"TensorFlow Lite cannot convert the model: {text[:1000]}. What it has no operation for, such as a lookup "
            "of strings, belongs before the model."
        ) from error


def _onnx(saved_model: pathlib.Path, file: pathlib.Path) -> None:
    # It runs in a folder of its own, where a relative path would be another.
    saved_model, file = saved_model.resolve(), file.resolve()
    command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(saved_model), "--output", str(file)]
    command += ["--opset", str(_OPSET), "--signature_def", "serving_default", "--tag", "serve"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    # It also exits with 0 where it has written what nothing can load.
    if run.returncode != 0 or not file.is_file():
        publishing.refuse_full_disk(run.stderr)
        raise ExportError(f"tf2onnx cannot convert the model:\n{run.stderr.strip()[-2000:]}")
