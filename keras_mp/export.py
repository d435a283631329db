"""SavedModels for serving: float32 in and out, versioned, and verified without Keras."""

import dataclasses
import itertools
import keyword
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp.errors import ExportError

__all__ = ["ExportReport", "OutputReport", "export", "verify_export"]

# Largest difference between model and export, relative to the largest output, that rounding in the compute dtype can
# explain where TensorFlow fuses ops in one of them and not in the other: a few units in the last place.
_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def export(model: keras.Model, path: "str | os.PathLike[str]") -> pathlib.Path:
    """Writes a model as the next version of a SavedModel that serves without Keras and without this package.

    The signature `serving_default` takes and gives float32 whatever the model computes in, for TensorFlow Serving's
    REST interface knows no 16-bit type; integer and string tensors stay what they are. Inputs and outputs have the
    model's names for them and any number of rows; outputs of one layer are told apart as "lstm", "lstm_1", and an input
    "user-id" is "user_id", for a signature allows no more than letters, digits and "_". The folder appears in whole or
    not at all.

    Args:
        model: a built model with symbolic inputs (Functional or Sequential).
        path: folder of the model, such as "saved_models/digits"; its versions are the folders 1, 2, ... in it.

    Returns:
        The folder of the version that was written, such as "saved_models/digits/1".

    Raises:
        ExportError: the model is not built, or the path holds something that is not a version of a SavedModel.

    Example:

    >>> import keras, keras_mp, tempfile
    >>> layers = [keras.Input((4,), name="features"), keras.layers.Dense(1, name="score", dtype="mixed_bfloat16")]
    >>> model = keras.Sequential(layers)
    >>> written = keras_mp.export(model, tempfile.mkdtemp() + "/tiny")
    >>> written.name
    '1'
    >>> keras_mp.verify_export(written, model, tf.ones((2, 4))).outputs["score"].dtype
    'float32'
    """
    inputs = _named_inputs(model)
    folder = pathlib.Path(path)
    _check_folder(folder)

    module = tf.Module()
    # Variables alone: tracking the model itself would tie the file to Keras's classes.
    module.model_variables = [variable.value for variable in model.variables]

    def serve(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: _for_serving(answer) for name, answer in _call(model, tensors).items()}

    specs = {
        name: tf.TensorSpec((None, *tensor.shape[1:]), _serving_dtype(tensor.dtype), name=name)
        for name, tensor in inputs.items()
    }
    signature = tf.function(serve, autograph=False).get_concrete_function(**specs)
    folder.mkdir(parents=True, exist_ok=True)
    # Serving systems take folders with an integer for a name, so a version in the making has another one.
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        tf.saved_model.save(module, str(unfinished), signatures={"serving_default": signature})
        unfinished.chmod(0o755)  # mkdtemp's 0700 would lock a server out that runs as another user
        return _publish(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """What one output of an export was found to be.

    Attributes:
        dtype: the name of its dtype, such as "float32".
        shape: its shape for the batch.
        finite: whether every value is finite.
        largest_error: the largest absolute difference from the model's output.
        relative_error: that, over the largest absolute value of the model's output.
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
    """

    path: pathlib.Path
    outputs: dict[str, OutputReport]
    answers: dict[str, np.ndarray] = dataclasses.field(repr=False)


def verify_export(path: "str | os.PathLike[str]", model: keras.Model, batch: Any) -> ExportReport:
    """Runs an export without Keras and compares it with the model.

    The export runs in a fresh process in which neither Keras nor keras_mp can be imported.

    Args:
        path: folder of one version, as `export` returned it.
        model: the model that was exported.
        batch: inputs as the model takes them, an array, or a list or dictionary of arrays; or by the export's names.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: nothing to run there, or an output that is missing, not float32 where the model's is a float, or
            further from the model's than rounding explains.

    Example:

    >>> import keras, keras_mp, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="score")])
    >>> path = keras_mp.export(model, tempfile.mkdtemp() + "/scores")
    >>> keras_mp.verify_export(path, model, tf.ones((2, 4))).outputs["score"].shape
    (2, 1)
    """
    path = pathlib.Path(path)
    if not (path / "saved_model.pb").is_file():
        versions = _versions(path) if path.is_dir() else []
        hint = (
            f"One of its versions may be meant: {str(path / str(max(versions)))!r}."
            if versions
            else "Export a model there first."
        )
        raise ExportError(f"No SavedModel at {str(path)!r}: it has no file saved_model.pb. {hint}")
    given = _by_name(batch, model)
    expected = _call(model, given)  # first, for Keras says in plain words what is wrong with a batch
    answers = _run_alone(path, given)
    if set(answers) != set(expected):
        raise ExportError(
            f"The export at {str(path)!r} answers with {sorted(answers)}; the model has the outputs "
            f"{sorted(expected)}. Is it the export of this model?"
        )
    outputs = {
        name: _compare(name, answers[name], _as_array(_for_serving(tensor)), tensor.dtype.name)
        for name, tensor in expected.items()
    }
    return ExportReport(path, outputs, answers)


def _compare(name: str, found: np.ndarray, expected: np.ndarray, compute_dtype: str) -> OutputReport:
    strings = found.dtype.kind == expected.dtype.kind == "S"  # their dtype has the length of the longest
    if (found.dtype != expected.dtype and not strings) or found.shape != expected.shape:
        raise ExportError(
            f"Output {name!r} of the export is {found.dtype} of shape {found.shape}; expected {expected.dtype} of "
            f"shape {expected.shape}. Export the model again."
        )
    if not np.issubdtype(found.dtype, np.floating):
        same = bool(np.array_equal(found, expected))
        if not same:
            raise ExportError(f"Output {name!r} of the export differs from the model's. Export the model again.")
        return OutputReport(found.dtype.name, found.shape, True, 0.0, 0.0)
    finite = bool(np.isfinite(found).all())
    # Equal values differ by 0, infinities and NaN included, whatever their subtraction gives.
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = float(np.max(np.where(same, 0.0, np.abs(found.astype("float64") - expected)), initial=0.0))
    largest = float(np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0))
    relative = error / largest if largest else (0.0 if error == 0 else float("inf"))
    if not relative <= _TOLERANCE.get(compute_dtype, 1e-5):
        raise ExportError(
            f"Output {name!r} of the export differs from the model's by {error:g}, which is {relative:.2g} of its "
            f"largest value; rounding explains {_TOLERANCE.get(compute_dtype, 1e-5):g}. Was the model trained on "
            "since? Export it again."
        )
    return OutputReport(found.dtype.name, found.shape, finite, error, relative)


def _run_alone(path: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        given, answered = pathlib.Path(scratch, "inputs.npz"), pathlib.Path(scratch, "outputs.npz")
        # Names are data: as keywords they would collide with those of `savez`.
        np.savez(given, np.array(list(inputs)), *inputs.values())
        script = pathlib.Path(__file__).with_name("_run_saved_model.py")
        # -I, or the script's own folder, this package's, would come before all others. What it takes away too, such as
        # PYTHONPATH, may be where TensorFlow is installed.
        folders = os.pathsep.join(folder for folder in sys.path if folder)
        command = [sys.executable, "-I", str(script), str(path.resolve()), str(given), str(answered), folders]
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, check=False
        )
        if run.returncode != 0:
            raise ExportError(f"The export at {str(path)!r} does not run without Keras:\n{run.stderr.strip()[-2000:]}")
        with np.load(answered) as arrays:
            names, dtypes, *values = (arrays[key] for key in arrays.files)
        # The file format knows no bfloat16 and keeps its bytes.
        return {
            str(name): value.view(tf.as_dtype(str(dtype)).as_numpy_dtype) if value.dtype.kind == "V" else value
            for name, dtype, value in zip(names, dtypes, values, strict=True)
        }


def _input_structure(model: keras.Model) -> Any:
    """The symbolic inputs as the model takes them: a tensor, or lists and dictionaries of them."""
    if not isinstance(model, keras.Model):
        raise ExportError(f"Expected a keras.Model, received {model!r} of type {type(model).__name__}.")
    if not getattr(model, "inputs", None):
        raise ExportError(
            f"Model {model.name!r} has no symbolic inputs, so its signature is not known. Build it as a Functional "
            "model, or put keras.Input(shape) first in the Sequential one."
        )
    # A Sequential model has no `input` before its first call.
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _named_inputs(model: keras.Model) -> dict[str, keras.KerasTensor]:
    structure = _input_structure(model)
    tensors = keras.tree.flatten(structure)
    names = [_parameter_name(name) for name in _names(structure, [tensor.name for tensor in tensors])]
    return dict(zip(_distinct(names), tensors, strict=True))


def _call(model: keras.Model, tensors: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Answers for named inputs, by name, in the dtypes that the model computes in."""
    given = [tf.cast(tensors[name], tensor.dtype) for name, tensor in _named_inputs(model).items()]
    answers = model(keras.tree.pack_sequence_as(_input_structure(model), given), training=False)
    flat = keras.tree.flatten(answers)
    layers = [model.layers[-1].name] * len(flat) if isinstance(model, keras.Sequential) else model.output_names
    return dict(zip(_distinct(_names(answers, layers)), flat, strict=True))


def _names(structure: Any, own_names: Sequence[str]) -> Sequence[str]:
    """A name for each tensor in a structure: its own, or where it stands if that has names."""
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    if any(isinstance(step, str) for path in paths for step in path):
        return ["_".join(str(step) for step in path) for path in paths]
    return own_names


def _distinct(names: Sequence[str]) -> list[str]:
    """The same names; one that comes again gets a number."""
    distinct: list[str] = []
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(1))
        distinct.append(next(each for each in itertools.chain([name], others) if each not in distinct))
    return distinct


def _parameter_name(name: str) -> str:
    """TensorFlow makes parameters of a Python function of a signature's inputs, and `self` is one of its own."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)
    name = name if name[:1].isalpha() else f"arg_{name}"
    return f"{name}_" if keyword.iskeyword(name) or name == "self" else name


def _serving_dtype(dtype: str) -> str:
    return (
        "float32"
        if keras.backend.is_float_dtype(dtype) and keras.backend.standardize_dtype(dtype) != "float64"
        else dtype
    )


def _for_serving(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32) if tensor.dtype.is_floating and tensor.dtype.size < 4 else tensor


def _by_name(batch: Any, model: keras.Model) -> dict[str, np.ndarray]:
    structure, inputs = _input_structure(model), _named_inputs(model)
    if isinstance(batch, Mapping) and set(batch) == set(inputs):
        arrays = dict(batch)
    elif keras.tree.is_nested(structure) or isinstance(batch, Mapping):
        flat = keras.tree.flatten(batch)
        names = [_parameter_name(name) for name in _names(batch, list(inputs))]
        if len(flat) != len(inputs) or set(names) != set(inputs):
            received = sorted(names) if isinstance(batch, Mapping) else f"{len(flat)} arrays"
            raise ExportError(
                f"The batch must give the model's inputs {list(inputs)}, as a dictionary or in this order. Received: "
                f"{received}"
            )
        arrays = dict(zip(names, flat, strict=True))
    else:
        # One input: rows, or Keras's list of one array. A list of numbers is rows.
        alone = isinstance(batch, (list, tuple)) and len(batch) == 1 and hasattr(batch[0], "shape")
        arrays = {next(iter(inputs)): batch[0] if alone else batch}
    return {name: _as_array(tf.cast(arrays[name], _serving_dtype(tensor.dtype))) for name, tensor in inputs.items()}


def _as_array(tensor: tf.Tensor) -> np.ndarray:
    # Strings come as objects, which only a pickle could store.
    return tensor.numpy().astype("S") if tensor.dtype == tf.string else tensor.numpy()


def _check_folder(folder: pathlib.Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(
            f"{str(folder)!r} is a file. Name a folder of the model's own, such as 'saved_models/digits'."
        )
    others = sorted(
        entry.name
        for entry in folder.iterdir()
        if not (
            entry.name.startswith(".unfinished-") or (entry.name.isdecimal() and (entry / "saved_model.pb").is_file())
        )
    )
    if others:
        raise ExportError(
            f"{str(folder)!r} holds something that is not a version of a SavedModel: {', '.join(others[:5])}"
            f"{', ...' if len(others) > 5 else ''}. Name a folder of the model's own, such as "
            f"{str(folder / 'digits')!r}."
        )


def _versions(folder: pathlib.Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()]


def _publish(unfinished: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Renames to the next free version; another export that takes it first leaves the one after."""
    version = 1 + max(_versions(folder), default=0)
    while True:
        target = folder / str(version)
        try:
            # Onto a folder with content this fails, so no version is ever written over.
            unfinished.rename(target)
        except OSError:
            if not target.exists():
                raise
            version += 1
        else:
            return target
