"""Runs files of other formats in their own runtimes: TensorFlow Lite and onnxruntime."""

import importlib.util
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_mp.errors import ExportError

__all__ = ["require_onnx", "run_file"]

SUFFIXES = {"litert": ".tflite", "onnx": ".onnx"}


def run_file(file: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name.

    Args:
        file: a file whose suffix is that of its format.
        inputs: arrays by name.

    Raises:
        ExportError: it does not run.
    """
    outputs = _run_onnx(file, inputs) if file.suffix == SUFFIXES["onnx"] else _run_litert(file, inputs)
    return {name: _with_bytes(np.asarray(array)) for name, array in outputs.items()}


def require_onnx(*names: str) -> None:
    """Refuses where a package for ONNX is missing.

    Args:
        names: of the packages.

    Raises:
        ExportError: naming them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"format='onnx' needs {' and '.join(missing)}. Type pip install 'keras-mp[onnx]'.")


def _run_litert(file: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("ai_edge_litert") is not None:
        from ai_edge_litert.interpreter import Interpreter
    else:
        Interpreter = tf.lite.Interpreter  # noqa: N806
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TensorFlow's own is going to move to ai-edge-litert
            runner = Interpreter(model_path=str(file)).get_signature_runner("serving_default")
        return dict(runner(**inputs))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ExportError(
            f"TensorFlow Lite cannot run {file.name!r}: {error}. What it has no operation for belongs before the model."
        ) from error


def _run_onnx(file: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    require_onnx("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        given = {name: array.astype(object) if array.dtype.kind == "S" else array for name, array in inputs.items()}
        return dict(zip(names, session.run(names, given), strict=True))
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run {file.name!r}: {error}. What it has no operation for belongs before the model."
        ) from error


def _with_bytes(array: np.ndarray) -> np.ndarray:
    """Strings as bytes, as the model's are."""
    if array.dtype != object and array.dtype.kind != "U":
        return array
    flat: list[Any] = [each.encode() if isinstance(each, str) else each for each in array.ravel().tolist()]
    return np.array(flat, "S").reshape(array.shape)
