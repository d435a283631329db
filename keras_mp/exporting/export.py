"""`export`: a model as a file or folder that other runtimes read."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware
from keras_mp.errors import ExportError, ExportWriteError
from keras_mp.exporting import manifest, publishing, remote, sample, verification, warmup
from keras_mp.exporting.comparison import compare, limit_of
from keras_mp.exporting.judgement import judge
from keras_mp.exporting.signature import Names
from keras_mp.exporting.traced import Graph, trace

__all__ = ["export"]

FORMATS = ("saved_model", "litert", "onnx")


def export(
    model: keras.Model,
    path: "str | os.PathLike[str]",
    *,
    precision: str = "auto",
    weights: str = "float32",
    input_names: Names = None,
    output_names: Names = None,
    signatures: Mapping[str, keras.Model] | None = None,
    batch: Any = None,
    format: str = "saved_model",
    jit_compile: bool = False,
    warmup_requests: bool | None = None,
    verify: bool = True,
) -> "pathlib.Path | Any":
    """Writes a model as the next version of a SavedModel that serves without Keras and without this package.

    The signature `serving_default` takes and gives float32 whatever the model computes in, for TensorFlow Serving's
    REST interface knows no 16-bit type; integer and string tensors stay what they are. Inputs and outputs have the
    model's names for them and any number of rows; outputs of one layer are told apart as "lstm", "lstm_1", and an input
    "user-id" is "user_id", for a signature allows no more than letters, digits and "_".

    A version is written under another name, run in a fresh process without Keras, and then renamed: it appears in whole
    or not at all. One that does not answer there as it does here is kept as ".failed-1". One that is further from the
    model itself than rounding explains is not written; the error names the layer. Its `assets.extra` holds
    `keras_mp.json` (policies, precision, sizes, errors against the model, versions, SHA-256 of each file), two rows
    with their answers, and requests by which TensorFlow Serving warms up.

    Args:
        model: a built model with symbolic inputs (Functional or Sequential).
        path: folder of the model, such as "saved_models/digits"; its versions are the folders 1, 2, ... in it. For the
            other formats a file, to which ".tflite" or ".onnx" is added, and which is replaced. A URL, such as
            "gs://bucket/digits", where TensorFlow has a file system for it: what was verified here is copied there, its
            `saved_model.pb` last.
        precision: what the export multiplies in. "float32"; "mixed" for the dtypes the model was trained in; or "auto",
            "mixed" where the hardware here is faster in them, else "float32".
        weights: what it stores: "float32" for the weights as they are; "float16" or "bfloat16" for half the size, cast
            at every call; "half" for the one of them that the model was trained in. Vectors stay in float32, and so do
            weights that would overflow or lose their digits, in any row or column.
        input_names: names for the inputs: a list in the model's order, or a dictionary from the names they would have.
        output_names: likewise for the outputs.
        signatures: further signatures by name, each a model with symbolic inputs; of layers that it shares with `model`
            the weights are written once.
        batch: rows to measure errors with, as the model takes them. The first two are kept in the export. None for
            made-up rows, where integers are 0 and 1.
        format: "saved_model"; "litert" for a TensorFlow Lite file, or "onnx" for one that onnxruntime reads.
        jit_compile: whether XLA must compile the signatures. TensorFlow Serving refuses such signatures on a CPU unless
            it is started with --xla_cpu_compilation_enabled=true.
        warmup_requests: whether to write these; None for where tensorflow-serving-api is installed (extra `serving`).
        verify: False to publish without running it, and whatever its error is.

    Returns:
        The folder of the version that was written, such as "saved_models/digits/1"; for other formats the file. For a
        URL the URL of that, a string.

    Raises:
        ExportError: the model is not built, the path holds something that is not a version of a SavedModel, a name or
            a dtype that a server does not take, or an export that does not answer like the model.
        ExportWriteError: the disk is full, or the folder cannot be written to.
        ConversionError: the model cannot be converted to float32.

    Warns:
        KerasMPWarning: for float16 products on a CPU, for answers further from the model's than rounding explains, and
            for a model whose own answers are not finite.

    Example:

    >>> import keras, keras_mp, tempfile
    >>> layers = [keras.Input((4,), name="features"), keras.layers.Dense(1, name="score", dtype="mixed_bfloat16")]
    >>> model = keras.Sequential(layers)
    >>> written = keras_mp.export(model, tempfile.mkdtemp() + "/tiny", weights="half")
    >>> written.name
    '1'
    >>> keras_mp.verify_export(written, model, tf.ones((2, 4))).outputs["score"].dtype
    'float32'
    """
    if format not in FORMATS:
        raise ExportError(f"Unknown format {format!r}. Type one of {', '.join(map(repr, FORMATS))}.")
    models, names = _models(model, signatures), (input_names, output_names)
    with remote.staged(path, file=format != "saved_model") as (place, bring):
        if format != "saved_model":
            from keras_mp.exporting.formats.converted import export_converted

            return bring(export_converted(models, place, format, names, precision, weights, batch, verify))
        warm = warmup.available(warmup_requests)
        publishing.check_folder(place)
        return bring(
            _export(trace(models, precision, weights, names, jit_compile), place, batch, warm=warm, verify=verify)
        )


def _export(graph: Graph, folder: pathlib.Path, batch: Any, *, warm: bool, verify: bool) -> pathlib.Path:
    """Writes a version of a SavedModel into a local folder."""
    name = graph.models["serving_default"].name
    rows = graph.rows(batch)
    expected, own = graph.run(rows)
    errors = judge(
        graph,
        expected,
        own,
        graph.trained_dtypes,
        lambda signature, limit: graph.origin(signature, rows[signature], limit),
        refuse=verify,
    )
    kept = {
        name: sample.first_rows(arrays, graph.signatures[name].inputs, sample.ROWS) for name, arrays in rows.items()
    }
    answers = expected if batch is None else {name: graph.answer(name, arrays) for name, arrays in kept.items()}
    one = {name: sample.first_rows(arrays, graph.signatures[name].inputs, 1) for name, arrays in kept.items()}
    with publishing.unfinished(folder) as made:
        with publishing.writing(folder):
            graph.save(made)
            sample.write_sample(made, kept, answers)
            if warm:
                requests = [(name, arrays) for each in (one, kept) for name, arrays in each.items()]
                warmup.write_requests(made, folder.name, requests)
            manifest.write_record(made, _facts(graph, made, errors))
        if verify:
            try:
                _check(graph, made, kept, answers, one)
            except ExportWriteError:
                raise
            except ExportError as error:
                aside = publishing.put_aside(made, folder)
                raise ExportError(
                    f"The export of {name!r} failed its verification, so no version was published; it is kept at "
                    f"{str(aside)!r}. {error} Where the model answers at random, type verify=False."
                ) from error
        with publishing.writing(folder):
            return publishing.publish(made, folder)


def _models(model: keras.Model, signatures: Mapping[str, keras.Model] | None) -> dict[str, keras.Model]:
    for name, other in (signatures or {}).items():
        if name == "serving_default" or not isinstance(name, str) or not name or name.startswith("__"):
            raise ExportError(
                f"A further signature cannot have the name {name!r}: 'serving_default' is the model's own, and names "
                "that start with '__' are TensorFlow's. Name it for what it does, such as 'embed'."
            )
        if not isinstance(other, keras.Model):
            raise ExportError(
                f"Signature {name!r} is {other!r}; expected a keras.Model. Make one of the model's layers, such as "
                "keras.Model(model.inputs, model.get_layer('embedding').output)."
            )
    return {"serving_default": model, **(signatures or {})}


def _check(graph: Graph, made: pathlib.Path, kept: Any, answers: Any, one: Any) -> None:
    """Runs every signature with the sample and with one row, and wants what it answers in this process."""
    requests = [*kept.items(), *one.items()]
    expected = [*answers.values(), *(graph.answer(name, arrays) for name, arrays in one.items())]
    found = verification.run_alone(made, requests, remapping=hardware.fusion_is_safe(graph.dtypes))
    for answer, wanted in zip(found, expected, strict=True):
        for name, array in wanted.items():
            compare(name, answer.outputs[name], array, limit_of(array, {*graph.dtypes, array.dtype.name}))


def _facts(graph: Graph, made: pathlib.Path, errors: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    model = graph.models["serving_default"]
    sizes = manifest.sizes_of(made)
    sizes["float32_weights"] = 4 * sum(int(np.prod(variable.shape)) for variable in model.weights)
    return {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model.name,
        "policies": graph.policies,
        "precision": graph.precision,
        "compute_dtypes": sorted(graph.products),
        "weights": graph.half or "float32",
        "kept_in_float32": graph.kept,
        "variables": graph.stored,
        "jit_compile": graph.jit_compile,
        "signatures": graph.described(),
        "sizes": sizes,
        "errors": errors,
        "versions": {
            "keras_mp": importlib.metadata.version("keras-mp"),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
