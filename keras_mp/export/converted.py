"""Exports for runtimes that read no SavedModel: TensorFlow Lite files and ONNX, each run before it is published."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp.errors import ExportError
from keras_mp.export import layout, verification
from keras_mp.export.graph import trace
from keras_mp.export.operations import without_erfc
from keras_mp.export.precision import narrow_dtypes
from keras_mp.export.signature import Names

__all__ = ["export_converted"]

_SUFFIXES = {"litert": ".tflite", "onnx": ".onnx"}
_OPSET = 18


def export_converted(
    models: Mapping[str, keras.Model],
    path: pathlib.Path,
    format: str,
    names: tuple[Names, Names],
    precision: str,
    weights: str,
    batch: Any,
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

    Raises:
        ExportError: the format cannot hold what was asked for, or the converter or the runtime fails.
    """
    if len(models) > 1:
        raise ExportError(f"A file of format {format!r} has one signature. Export each model to a file of its own.")
    (model,) = models.values()
    narrow = narrow_dtypes(model) if precision == "mixed" else frozenset()
    if narrow and (format == "litert" or "bfloat16" in narrow):
        runtime = "TensorFlow Lite" if format == "litert" else "onnxruntime"
        raise ExportError(
            f"{runtime} has no products in {' and '.join(sorted(narrow))} for what TensorFlow multiplies in it. Type "
            f"export(..., format={format!r}, precision='float32')."
        )
    if path.suffix != _SUFFIXES[format]:
        path = path.with_name(path.name + _SUFFIXES[format])
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder. Name a file, such as {str(path / 'model')!r}.")
    # TensorFlow Lite has half-size weights of its own.
    graph = trace(models, "mixed" if narrow else "float32", "float32" if format == "litert" else weights, names)
    rows = graph.rows(batch)
    expected, _ = graph.measure(rows)
    with layout.unfinished(path.parent) as scratch:
        with layout.writing(path):
            graph.save(scratch / "saved_model")
        made = scratch / path.name
        if format == "litert":
            content = _litert(scratch / "saved_model", weights)
            with layout.writing(path):
                made.write_bytes(content)
            found = _run_litert(made, rows["serving_default"])
        else:
            without_erfc(scratch / "saved_model")
            _onnx(scratch / "saved_model", made)
            found = _run_onnx(made, rows["serving_default"])
        dtypes = graph.dtypes | ({"float16"} if weights != "float32" else set()) | {"float16" if narrow else "float32"}
        for name, array in expected["serving_default"].items():
            verification.compare(name, found[name], array, dtypes)
        with layout.writing(path):
            made.chmod(0o644)
            os.replace(made, path)
    return path


def _litert(saved_model: pathlib.Path, weights: str) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=["serving_default"])
    if weights != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    try:
        return bytes(converter.convert())
    except Exception as error:
        text = str(error).strip()
        raise ExportError(
            f"TensorFlow Lite cannot convert the model: {text[:1000]}. What it has no operation for, such as a lookup "
            "of strings, belongs before the model."
        ) from error


def _run_litert(file: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("ai_edge_litert") is not None:
        from ai_edge_litert.interpreter import Interpreter
    else:
        Interpreter = tf.lite.Interpreter  # noqa: N806
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TensorFlow's own is going to move to ai-edge-litert
        runner = Interpreter(model_path=str(file)).get_signature_runner("serving_default")
    return dict(runner(**inputs))


def _onnx(saved_model: pathlib.Path, file: pathlib.Path) -> None:
    missing = [name for name in ("tf2onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"format='onnx' needs {' and '.join(missing)}. Type pip install 'keras-mp[onnx]'.")
    command = [sys.executable, "-m", "tf2onnx.convert", "--saved-model", str(saved_model), "--output", str(file)]
    command += ["--opset", str(_OPSET), "--signature_def", "serving_default", "--tag", "serve"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    # It also exits with 0 where it has written what nothing can load.
    if run.returncode != 0 or not file.is_file():
        raise ExportError(f"tf2onnx cannot convert the model:\n{run.stderr.strip()[-2000:]}")


def _run_onnx(file: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        given = {name: array.astype(object) if array.dtype.kind == "S" else array for name, array in inputs.items()}
        return dict(zip(names, session.run(names, given), strict=True))
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run what tf2onnx made of the model: {error}. What it has no operation for belongs "
            "before the model."
        ) from error
