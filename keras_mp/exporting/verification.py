"""Runs exports as a server does, without Keras, and compares them with the model or with what they answered before."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import keras_models
from keras_mp.errors import ExportError, KerasMPWarning
from keras_mp.exporting.blame import answers_at_random, first_nonfinite, outputs_by_layer
from keras_mp.exporting.comparison import ADVICE, OutputReport, compare, limit_of
from keras_mp.exporting.formats.runtimes import SUFFIXES, run_file
from keras_mp.exporting.manifest import check_files, read_record
from keras_mp.exporting.publishing import refuse_full_disk, require_saved_model, writing
from keras_mp.exporting.remote import fetched, is_url
from keras_mp.exporting.sample import FILE as SAMPLE
from keras_mp.exporting.sample import load_arrays, made_up, read_sample, save_arrays
from keras_mp.exporting.signature import Signature, as_array, by_name, signature_of, widened
from keras_mp.exporting.storage import narrow_dtypes
from keras_mp.exporting.traced import trace
from keras_mp.policies.policy import stacklevel

__all__ = [
    "Answer",
    "ExportReport",
    "run_alone",
    "verify_export",
]

_ELSEWHERE = (
    "It is compared with what it answered when it was written, and its files are those: another TensorFlow or device "
    "computes otherwise, or the model answers at random."
)


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `verify_export` found.

    Attributes:
        path: the SavedModel's folder, or the file; a string where it is a URL.
        outputs: an `OutputReport` for each output's name.
        answers: the export's outputs for the batch, as NumPy arrays, by name.
        latency_ms: median time of a call of the export in milliseconds, in a process of its own; NaN for a file.
        model_latency_ms: that of the Keras model here, in a `tf.function`; None where no model was given.
        record: what the export says of itself in its `keras_mp.json`: precision, sizes, errors, versions, files with
            their SHA-256, fingerprint. None where it has none.
    """

    path: "pathlib.Path | str"
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
        path: folder of one version, or file of another format, as `export` returned it; a URL is read from there.
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
    if not is_url(path):
        with fetched(path) as local:
            return _verify(local, model, batch, tolerance)
    with fetched(path) as local:
        try:
            report = _verify(local, model, batch, tolerance)
        except ExportError as error:
            raise type(error)(str(error).replace(str(local), os.fspath(path))) from error
    return dataclasses.replace(report, path=os.fspath(path))


def _verify(path: pathlib.Path, model: keras.Model | None, batch: Any, tolerance: float | None) -> ExportReport:
    if path.suffix in SUFFIXES.values() and path.is_file():
        return _verify_file(path, model, batch, tolerance)
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
    _same_names(path, answer.outputs, expected)
    outputs = _compared(
        answer.outputs, expected, dtypes, tolerance, lambda limit: _cause(path, record, signature, given, limit)
    )
    assert answer.ms is not None
    return ExportReport(path, outputs, answer.outputs, answer.ms, _model_ms(signature, given), record)


def _verify_file(path: pathlib.Path, model: keras.Model | None, batch: Any, tolerance: float | None) -> ExportReport:
    """A file of another format, which keeps neither a record nor a sample."""
    if model is None:
        raise ExportError(
            f"{str(path)!r} keeps no answers to compare with. Type keras_mp.verify_export(path, model, batch)."
        )
    signature = signature_of(model)
    given = made_up(signature.inputs) if batch is None else by_name(batch, signature)
    expected = signature.call(given, lambda inputs: model(inputs, training=False))
    found = run_file(path, given)
    _same_names(path, found, expected)
    # Of its weights the file does not say whether they are of half the size.
    dtypes = narrow_dtypes(model) | {"float32", "float16"}
    outputs = _compared(found, expected, dtypes, tolerance, lambda limit: _cause(path, None, signature, given, limit))
    return ExportReport(path, outputs, found)


def _compared(
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, tf.Tensor],
    dtypes: "set[str] | frozenset[str]",
    tolerance: float | None,
    cause: Callable[[float], str],
) -> dict[str, OutputReport]:
    outputs = {}
    for name, tensor in expected.items():
        array = as_array(widened(tensor, name))
        rounding = limit_of(array, {*dtypes, tensor.dtype.name})
        limit = rounding if tolerance is None or not tensor.dtype.is_floating else tolerance
        outputs[name] = compare(name, found[name], array, limit, cause=functools.partial(cause, limit))
        if tensor.dtype.is_floating and np.isnan(array).any():
            warnings.warn(
                f"Output {name!r} of both the export and the model is NaN in {np.isnan(array).mean():.2g} of its "
                f"values. {cause(limit)}",
                KerasMPWarning,
                stacklevel=stacklevel(),
            )
    return outputs


def _cause(
    path: pathlib.Path,
    record: dict[str, Any] | None,
    signature: Signature,
    given: Mapping[str, np.ndarray],
    limit: float,
) -> str:
    """Why an export does not answer like a model: what is certain first."""
    model = signature.model
    changed = _changed_weights(path, record, model)
    called = outputs_by_layer(signature, model, lambda inputs: model(inputs, training=False), given)
    nonfinite = first_nonfinite(called, given)
    if nonfinite:
        since = " The weights are not those that were exported." if changed else ""
        return f"In model {model.name!r} itself {nonfinite}.{since} Give it a batch that it works with, or mend it."
    if answers_at_random(signature, given, limit):
        return (
            f"Two calls of model {model.name!r} differ: it answers at random, and so nothing can be compared with it."
        )
    if changed:
        some = ", ".join(map(repr, changed[:3])) + (", ..." if len(changed) > 3 else "")
        return f"The model was changed since: {len(changed)} of its weights, such as {some}, are others. {ADVICE}"
    if changed is None or record is None:
        return f"Was the model trained on since? {ADVICE}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = trace({"serving_default": model}, record["precision"], record["weights"])
    rows = dict(zip((info.name for info in graph.signatures["serving_default"].inputs), given.values(), strict=True))
    origin = graph.origin("serving_default", rows, limit)
    narrow = {"float16", "bfloat16"} & {*record["compute_dtypes"]} - narrow_dtypes(model)
    if origin is None and narrow:
        return (
            f"The export computes in {' and '.join(sorted(narrow))}, and this model does not. Compare it with the one "
            "that was exported, or type export(..., precision='float32')."
        )
    if origin is None:
        return f"The weights are those that were exported, and the same graph answers like the model here. {ADVICE}"
    return (
        f"The weights are those that were exported. {origin} The batch is of another kind than the rows that the "
        "export was measured with, or the precision does not suit the model: type export(..., batch=rows) with such "
        "rows, and precision='mixed' or weights='float32'."
    )


def _changed_weights(path: pathlib.Path, record: dict[str, Any] | None, model: keras.Model) -> list[str] | None:
    """Paths of the model's variables whose values an export does not have; None where it does not say."""
    if record is None or "variables" not in record:
        return None
    ours: dict[str, list[keras.Variable]] = {}
    for variable in model.variables:
        ours.setdefault(variable.path, []).append(variable)
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    changed = []
    for number, name in enumerate(record["variables"]):
        if not ours.get(name):
            continue  # of a further signature's model
        value = tf.convert_to_tensor(ours[name].pop(0).value)
        stored = reader.get_tensor(f"model_variables/{number}/.ATTRIBUTES/VARIABLE_VALUE")
        if value.shape != stored.shape:
            changed.append(name)
            continue
        rounded = tf.cast(value, tf.as_dtype(stored.dtype)).numpy()
        if rounded.tobytes() != stored.tobytes():
            changed.append(name)
    return changed


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
            rounding = limit_of(array, dtypes | {array.dtype.name})
            limit = rounding if tolerance is None or not np.issubdtype(array.dtype, np.floating) else tolerance
            reports[label] = compare(label, answer.outputs[name], array, limit, cause=lambda: _ELSEWHERE)
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
    with writing(tempfile.gettempdir()), tempfile.TemporaryDirectory() as name:
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
            refuse_full_disk(run.stderr)
            raise ExportError(f"The export at {str(path)!r} does not run without Keras:\n{run.stderr.strip()[-2000:]}")
        facts = json.loads((scratch / "facts.json").read_text())
        return [
            Answer(load_arrays(pathlib.Path(request["outputs"])), fact["ms"])
            for request, fact in zip(job["requests"], facts, strict=True)
        ]


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
    with keras_models.without_remat(model):
        call(tensors)
    times: list[float] = []
    end = time.perf_counter() + 0.3
    while not times or (time.perf_counter() < end and len(times) < 30):
        start = time.perf_counter()
        for answer in call(tensors).values():
            answer.numpy()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]
