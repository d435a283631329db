"""Size, error and latency of exports of one model, beside Keras's own: `python -m benchmarks.export`.

The model is MobileNetV2 for images of 160 x 160 under mixed_bfloat16, with random weights and logits as outputs. Each
export runs in a separate process without Keras, three times in turns with the others, with two made-up rows. The error
is the largest difference from the Keras model, over its largest output. The time is the least of three medians.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pathlib
import tempfile
import warnings

import keras_mp

import keras  # isort: skip
import numpy as np
from rich.console import Console
from rich.table import Table
from tensorflow.core.protobuf import saved_model_pb2

from keras_mp.errors import KerasMPWarning
from keras_mp.exporting.sample import read_sample
from keras_mp.exporting.verification import Answer, run_alone

VARIANTS = [("float32", "float32"), ("float32", "half"), ("mixed", "float32"), ("mixed", "half")]


def main() -> None:
    """Prints a row for each export."""
    warnings.simplefilter("ignore", KerasMPWarning)  # about 16-bit policies on hardware that gains nothing
    keras.utils.set_random_seed(0)
    made = keras.applications.MobileNetV2((160, 160, 3), weights=None, classifier_activation=None)
    model = keras_mp.convert(made, "mixed_bfloat16")
    table = Table("export", "variables, MB", "all, MB", "error", "ms a call, 2 rows")
    exports: dict[str, pathlib.Path] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for precision, weights in VARIANTS:
            path = keras_mp.export(model, folder / "m", precision=precision, weights=weights, verify=False)
            ((image,),) = (rows.values() for rows in read_sample(path)[0].values())
            exports[f"precision={precision!r}, weights={weights!r}"] = path
        model.export(folder / "stock" / "1", verbose=False)
        exports["Keras's own"] = folder / "stock" / "1"
        expected = np.asarray(model(image, training=False), "float32")
        answers: dict[str, list[Answer]] = {name: [] for name in exports}
        for _ in range(3):
            for name, path in exports.items():
                answers[name] += run_alone(path, [("serving_default", {_input_of(path): image})], timed=True)
        for name, path in exports.items():
            table.add_row(name, *_facts(path, answers[name], expected))
    Console(width=120).print(table)


def _input_of(path: pathlib.Path) -> str:
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    (name,) = saved.meta_graphs[0].signature_def["serving_default"].inputs
    return str(name)


def _facts(path: pathlib.Path, answers: list[Answer], expected: np.ndarray) -> list[str]:
    sizes = {file: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    variables = sum(size for file, size in sizes.items() if file.parent.name == "variables")
    (found,) = answers[0].outputs.values()
    error = np.abs(found.astype("float32") - expected).max() / np.abs(expected).max()
    least = min(answer.ms for answer in answers if answer.ms is not None)
    return [f"{variables / 1e6:.2f}", f"{sum(sizes.values()) / 1e6:.2f}", f"{error:.1e}", f"{least:.1f}"]


if __name__ == "__main__":
    main()
