"""Exports of each kind of model, written once for all the runtimes that read them."""

import dataclasses
import fcntl
import os
import pathlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.errors import KerasMPWarning
from keras_mp.exporting import verification
from keras_mp.exporting.sample import load_arrays, save_arrays
from tests.helpers import forks, serving_models

# Policy of training, precision and weights of the export.
VARIANTS = {
    "float32": ("float32", "float32", "float32"),
    "half": ("float32", "float32", "half"),
    "float16": ("mixed_float16", "mixed", "half"),
    "bfloat16": ("mixed_bfloat16", "mixed", "half"),
}
# What the others show of these as well.
FEWER = {
    "half": [serving_models.digits, serving_models.recommender, serving_models.strings],
    "float16": [serving_models.digits, serving_models.transformer, serving_models.detector],
}


@pytest.fixture(autouse=True)
def _verified_in_forks(monkeypatch):
    """Verifications start TensorFlow once a session; test_cli.py and the examples start it for each."""
    monkeypatch.setattr(verification, "subprocess", forks)


@dataclasses.dataclass(frozen=True)
class Exported:
    """One export with rows for it and what the Keras model answers to them."""

    name: str
    variant: str
    path: pathlib.Path
    inputs: dict
    expected: dict


@pytest.fixture(scope="session")
def exports(tmp_path_factory, mirrored):
    """All of them; of two processes that run tests the first writes them, the second waits."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exports"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir()
            with warnings.catch_warnings():
                # Of 16 bits on a CPU, which are meant here.
                warnings.simplefilter("ignore", KerasMPWarning)
                _write_all(folder, mirrored)
            (folder / "done").touch()
    return [_read(path) for path in sorted(folder.iterdir()) if path.is_dir()]


def _write_all(folder, mirrored):
    for variant, (policy, precision, weights) in VARIANTS.items():
        makers = FEWER.get(variant, serving_models.MAKERS)
        for maker in makers:
            _write(folder, serving_models.make(maker, policy), variant, precision, weights)
    with mirrored(2).scope():
        model = serving_models.make(serving_models.digits, "mixed_bfloat16")
        model.compile(keras_mp.LossScaleOptimizer("sgd"), "sparse_categorical_crossentropy", jit_compile=False)
    rows = serving_models.batch_for(model, 8)["image"]
    model.fit(rows, np.arange(8), batch_size=8, verbose=0)
    model.name = "mirrored"
    _write(folder, model, "bfloat16", "mixed", "half")


def _write(folder, model, variant, precision, weights):
    batch = serving_models.batch_for(model)
    path = keras_mp.export(
        model, folder / f"{model.name}-{variant}" / "m", precision=precision, weights=weights, verify=False
    )
    inputs = keras.tree.pack_sequence_as(model.input, [tf.constant(batch[each.name]) for each in model.inputs])
    # Of shapes as unknown as in the export: attention over an unknown length goes by blocks, which round elsewhere.
    shapes = keras.tree.map_structure(lambda x, known: tf.TensorSpec(known.shape, x.dtype), inputs, model.input)
    answers = tf.function(lambda x: model(x, training=False), input_signature=[shapes])(inputs)
    if not isinstance(answers, dict):
        answers = {model.output_names[0]: answers}
    plain = {key: np.asarray(tf.cast(a, "float32") if a.dtype.is_floating else a) for key, a in answers.items()}
    strings = {name: a.astype("S") if a.dtype.kind == "U" else a for name, a in batch.items()}
    save_arrays(path.parents[1] / "inputs.npz", strings)
    save_arrays(path.parents[1] / "expected.npz", plain)


def _read(path):
    name, variant = path.name.split("-")
    arrays = (load_arrays(path / "inputs.npz"), load_arrays(path / "expected.npz"))
    return Exported(name, variant, path / "m" / "1", *arrays)
