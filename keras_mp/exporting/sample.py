"""A few rows that an export is tried with: the user's, or made up, kept in it with its answers."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_mp.exporting.signature import TensorInfo

__all__ = ["first_rows", "load_arrays", "made_up", "read_sample", "save_arrays", "write_sample"]

FILE = "assets.extra/keras_mp_sample.npz"

# Long enough for five poolings by two, and short for a text.
_FREE_SIZE = 32
ROWS = 2


def made_up(inputs: Sequence[TensorInfo], rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows for a signature, always the same.

    Floats are multiples of 1/8, for they compress; integers are 0 and 1, for they may be indices of a short table.

    Args:
        inputs: those of the signature.
        rows: how many.

    Example:

    >>> made_up([TensorInfo("token", "int32", (None, 3))])["token"].shape
    (2, 3)
    """
    rng = np.random.default_rng(0)
    made = {}
    for info in inputs:
        sizes = [rows if axis == 0 else _FREE_SIZE if size is None else size for axis, size in enumerate(info.shape)]
        if info.dtype == "string":
            made[info.name] = np.full(sizes, b"sample")
        elif info.dtype.startswith("float"):
            made[info.name] = (np.round(rng.normal(size=sizes) * 8) / 8).astype(info.dtype)
        else:
            values = rng.integers(0, 2, sizes)
            values[..., :1] = 1  # a mask that masks all leaves nothing to compare
            made[info.name] = values.astype(info.dtype)
    return made


def first_rows(arrays: Mapping[str, np.ndarray], infos: Sequence[TensorInfo], rows: int) -> dict[str, np.ndarray]:
    """The first rows of a batch.

    Args:
        arrays: the batch by names.
        infos: the inputs of the signature; what has no axes is left as it is.
        rows: how many.
    """
    return {info.name: arrays[info.name][:rows] if info.shape else arrays[info.name] for info in infos}


def write_sample(
    path: pathlib.Path, inputs: Mapping[str, Mapping[str, np.ndarray]], answers: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Keeps rows with their answers in an export.

    Args:
        path: the SavedModel's folder.
        inputs: for each signature's name the inputs by name.
        answers: likewise.
    """
    flat: dict[str, np.ndarray] = {}
    for kind, tensors in (("inputs", inputs), ("outputs", answers)):
        flat |= {f"{signature}/{kind}/{name}": each[name] for signature, each in tensors.items() for name in each}
    (path / FILE).parent.mkdir(exist_ok=True)
    save_arrays(path / FILE, flat)


def read_sample(path: pathlib.Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """The rows that an export keeps: inputs and answers by signature.

    Args:
        path: the SavedModel's folder.
    """
    inputs: dict[str, dict[str, np.ndarray]] = {}
    answers: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_arrays(path / FILE).items():
        signature, kind, own = name.split("/", 2)
        (inputs if kind == "inputs" else answers).setdefault(signature, {})[own] = array
    return inputs, answers


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name. Names are data: as keywords they would collide with those of `savez`.

    Args:
        path: the file.
        arrays: the arrays; strings as bytes.
    """
    values = [np.asarray(array) for array in arrays.values()]
    np.savez_compressed(path, np.array(list(arrays), "U"), np.array([v.dtype.name for v in values], "U"), *values)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote.

    Args:
        path: the file.
    """
    with np.load(path) as arrays:
        names, dtypes, *values = (arrays[key] for key in arrays.files)
    # The file format knows no bfloat16 and keeps its bytes.
    return {
        str(name): value.view(tf.as_dtype(str(dtype)).as_numpy_dtype) if value.dtype.kind == "V" else value
        for name, dtype, value in zip(names, dtypes, values, strict=True)
    }
