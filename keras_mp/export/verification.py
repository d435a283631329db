"""Runs exports as a server does, without Keras, and compares them with the model or with what they answered before."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware
from keras_mp.errors import ExportError
from keras_mp.export.layout import require_saved_model
from keras_mp.export.precision import narrow_dtypes, tolerance_of
from keras_mp.export.record import check_files, read_record
from keras_mp.export.sample import FILE as SAMPLE
from keras_mp.export.sample import load_arrays, made_up, read_sample, save_arrays
from keras_mp.export.signature import Signature, as_array, by_name, signature_of, widened

__all__ = [
    "Answer",
    "ExportReport",
    "OutputReport",
    "compare",
    "differing_share",
    "run_alone",
    "verify_export",
]

_ADVICE = "Export the model again."


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """What one output of an export was found to be.

    Attributes:
        dtype: the name of its dtype, such as "float32".
        shape: its shape for the batch.
        finite: whether every value is finite.
        largest_error: the largest absolute difference from the model's output; of strings 1 where one differs.
        relative_error: that, over the largest absolute value of the model's output; of integers, booleans and strings
            the share of them that differs.
    """

    dtype: str
    shape: tuple[int, ...]
    finite: bool
    largest_error: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `verify_export` found.

    Attributes:
        path: the SavedModel's folder.
        outputs: an `OutputReport` for each output's name.
        answers: the export's outputs for the batch, as NumPy arrays, by name.
        latency_ms: median time of a call of the export in milliseconds, in a process of its own.
        model_latency_ms: that of the Keras model here, in a `tf.function`; None where no model was given.
        record: what the export says of itself in its `keras_mp.json`: precision, sizes, errors, versions, files with
            their SHA-256, fingerprint. None where it has none.
    """

    path: pathlib.Path
    outputs: dict[str, OutputReport]
    answers: dict[str, np.ndarray] = dataclasses.field(repr=False)
    latency_ms: float = float("nan")
    model_latency_ms: float | None = None
    record: dict[str, Any] | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an export answered to one request.

    Attributes:
        outputs: arrays by name.
        ms: median time of a call, or None where it was not timed.
    """

    outputs: dict[str, np.ndarray]
    ms: float | None


def verify_export(
    path: "str | os.PathLike[str]",
    model: keras.Model | None = None,
    batch: Any = None,
    *,
    tolerance: float | None = None,
) -> ExportReport:
    """Runs an export without Keras and compares it with the model.

    The export runs in a fresh process in which neither Keras nor keras_mp can be imported. Before that its files are
    compared with what was written.

    Args:
        path: folder of one version, as `export` returned it.
        model: the model that was exported; None to compare with what the export answered when it was written.
        batch: inputs as the model takes them, an array, or a list or dictionary of arrays; or by the export's names.
            None for made-up rows.
        tolerance: largest error of an output, relative to its largest value; None for what rounding explains in the
            dtypes that model and export compute in.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: nothing to run there; a file that is missing, truncated or changed, naming it; or an output that is
            missing, not float32 where the model's is a float, or further from the model's than the tolerance.

    Example:

    >>> import keras, keras_mp, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="score")])
    >>> path = keras_mp.export(model, tempfile.mkdtemp() + "/scores")
    >>> keras_mp.verify_export(path, model, tf.ones((2, 4))).outputs["score"].shape
    (2, 1)
    """
    path = pathlib.Path(path)
    require_saved_model(path)
    record = read_record(path)
    if record is not None:
        check_files(path, record)
    dtypes = set(record["compute_dtypes"]) | {record["weights"]} if record else set()
    if model is None:
        return _verify_with_sample(path, record, dtypes, batch, tolerance)
    signature = _signature_in(record, model)
    given = made_up(signature.inputs) if batch is None else by_name(batch, signature)
    # First, for Keras says in plain words what is wrong with a batch.
    expected = signature.call(given, lambda inputs: model(inputs, training=False))
    dtypes |= narrow_dtypes(model)
    (answer,) = run_alone(path, [("serving_default", given)], timed=True, remapping=hardware.fusion_is_safe(dtypes))
    arrays = {name: as_array(widened(tensor, name)) for name, tensor in expected.items()}
    _same_names(path, answer.outputs, arrays)
    outputs = {
        name: compare(name, answer.outputs[name], arrays[name], dtypes | {tensor.dtype.name}, tolerance)
        for name, tensor in expected.items()
    }
    assert answer.ms is not None
    return ExportReport(path, outputs, answer.outputs, answer.ms, _model_ms(signature, given), record)


def _verify_with_sample(
    path: pathlib.Path, record: dict[str, Any] | None, dtypes: set[str], batch: Any, tolerance: float | None
) -> ExportReport:
    if batch is not None:
        raise ExportError(
            "A batch alone has nothing to be compared with. Type verify_export(path, model, batch), or "
            "verify_export(path)."
        )
    if record is None or not (path / SAMPLE).is_file():
        raise ExportError(
            f"The export at {str(path)!r} keeps no answers to compare with: keras_mp.export did not write it. Type "
            "keras_mp.verify_export(path, model, batch)."
        )
    inputs, expected = read_sample(path)
    requests = [(name, inputs[name]) for name in expected]
    answers = run_alone(path, requests, timed=True, remapping=hardware.fusion_is_safe(dtypes))
    reports = {}
    for (signature, _), answer in zip(requests, answers, strict=True):
        _same_names(path, answer.outputs, expected[signature])
        for name, array in expected[signature].items():
            label = name if signature == "serving_default" else f"{signature}/{name}"
            wanted = dtypes | {array.dtype.name}
            reports[label] = compare(label, answer.outputs[name], array, wanted, tolerance)
    first = answers[[name for name, _ in requests].index("serving_default")]
    assert first.ms is not None
    return ExportReport(path, reports, first.outputs, first.ms, None, record)


def run_alone(
    path: pathlib.Path,
    requests: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    *,
    timed: bool = False,
    remapping: bool = True,
) -> list[Answer]:
    """Calls signatures of a SavedModel in a fresh process without Keras.

    Args:
        path: the SavedModel's folder.
        requests: for each the name of a signature and its inputs by name.
        timed: whether to time them.
        remapping: whether grappler may fuse products with what follows them.

    Raises:
        ExportError: it does not run, with the end of what the process said.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        job: dict[str, Any] = {
            "folder": str(path.resolve()),
            "remapping": remapping,
            "facts": str(scratch / "facts.json"),
            "requests": [
                {
                    "signature": signature,
                    "inputs": str(scratch / f"inputs-{number}.npz"),
                    "outputs": str(scratch / f"outputs-{number}.npz"),
                    "timed": timed,
                }
                for number, (signature, _) in enumerate(requests)
            ],
        }
        for request, (_, inputs) in zip(job["requests"], requests, strict=True):
            save_arrays(pathlib.Path(request["inputs"]), inputs)
        (scratch / "job.json").write_text(json.dumps(job))
        script = pathlib.Path(__file__).with_name("_run_saved_model.py")
        # -I, or the script's own folder, this package's, would come before all others. What it takes away too, such as
        # PYTHONPATH, may be where TensorFlow is installed.
        folders = os.pathsep.join(folder for folder in sys.path if folder)
        command = [sys.executable, "-I", str(script), str(scratch / "job.json"), folders]
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, check=False
        )
        if run.returncode != 0:
            raise ExportError(f"The export at {str(path)!r} does not run without Keras:\n{run.stderr.strip()[-2000:]}")
        facts = json.loads((scratch / "facts.json").read_text())
        return [
            Answer(load_arrays(pathlib.Path(request["outputs"])), fact["ms"])
            for request, fact in zip(job["requests"], facts, strict=True)
        ]


def compare(
    name: str, found: np.ndarray, expected: np.ndarray, dtypes: "set[str]", tolerance: float | None = None
) -> OutputReport:
    """Compares one output.

    Args:
        name: the output's.
        found: what the export answers.
        expected: what it should.
        dtypes: those that are computed in and the output's own, which say what rounding explains.
        tolerance: largest error relative to the largest value, or None for that.

    Raises:
        ExportError: dtype, shape or values differ.
    """
    strings = found.dtype.kind == expected.dtype.kind == "S"  # their dtype has the length of the longest
    if (found.dtype != expected.dtype and not strings) or found.shape != expected.shape:
        raise ExportError(
            f"Output {name!r} of the export is {found.dtype} of shape {found.shape}; expected {expected.dtype} of "
            f"shape {expected.shape}. {_ADVICE}"
        )
    limit = tolerance_of(dtypes) if tolerance is None else tolerance
    # Equal values differ by 0, infinities and NaN included, whatever their subtraction gives.
    same = found == expected
    if not np.issubdtype(found.dtype, np.floating):
        share = 1 - float(np.mean(same)) if same.size else 0.0
        numbers = np.issubdtype(found.dtype, np.integer)
        error = float(np.max(np.abs(found.astype("float64") - expected), initial=0.0)) if numbers else float(share > 0)
        if share > differing_share(dtypes):
            raise ExportError(f"Output {name!r} of the export differs from the model's. {_ADVICE}")
        return OutputReport("string" if strings else found.dtype.name, found.shape, True, error, share)
    finite = bool(np.isfinite(found).all())
    same |= np.isnan(found) & np.isnan(expected)
    with np.errstate(invalid="ignore"):
        error = float(np.max(np.where(same, 0.0, np.abs(found.astype("float64") - expected)), initial=0.0))
    largest = float(np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0))
    relative = error / largest if largest else (0.0 if error == 0 else float("inf"))
    if not relative <= limit:
        raise ExportError(
            f"Output {name!r} of the export differs from the model's by {error:g}, which is {relative:.2g} of its "
            f"largest value; rounding explains {limit:g}. Was the model trained on since? Export it again."
        )
    return OutputReport(found.dtype.name, found.shape, finite, error, relative)


def differing_share(dtypes: "set[str]") -> float:
    """How many integers of an output may differ: of two scores that 16 bits make equal the largest may be either.

    Args:
        dtypes: those that are computed in.
    """
    return 0.5 if dtypes & {"float16", "bfloat16"} else 0.0


def _signature_in(record: dict[str, Any] | None, model: keras.Model) -> Signature:
    """The signature of a model with the names that it was exported with."""
    own = signature_of(model)
    if record is None:
        return own
    written = record["signatures"]["serving_default"]
    inputs, outputs = ([each["name"] for each in written[kind]] for kind in ("inputs", "outputs"))
    if len(inputs) != len(own.inputs) or len(outputs) != len(model.outputs):
        return own  # another model, which the comparison says
    named = signature_of(model, inputs)
    # Names that were given to the outputs are known by what the names would have been.
    renamed = dict(zip(written["own_outputs"], outputs, strict=True))
    return dataclasses.replace(named, outputs={own: name for own, name in renamed.items() if own != name} or None)


def _same_names(path: pathlib.Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if set(found) != set(expected):
        raise ExportError(
            f"The export at {str(path)!r} answers with {sorted(found)}; the model has the outputs "
            f"{sorted(expected)}. Is it the export of this model?"
        )


def _model_ms(signature: Signature, given: Mapping[str, np.ndarray]) -> float:
    model = signature.model
    call = tf.function(
        lambda tensors: signature.call(tensors, lambda inputs: model(inputs, training=False)), autograph=False
    )
    tensors = {name: tf.constant(array) for name, array in given.items()}
    call(tensors)
    times: list[float] = []
    end = time.perf_counter() + 0.3
    while not times or (time.perf_counter() < end and len(times) < 30):
        start = time.perf_counter()
        for answer in call(tensors).values():
            answer.numpy()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]
