"""Exports read by runtimes that know nothing of Keras: TensorFlow's C API, OpenVINO, onnxruntime, LiteRT."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import keras_mp
from keras_mp.errors import ExportError
from keras_mp.export.sample import load_arrays, save_arrays
from tests.export import serving_models

HERE = pathlib.Path(__file__).parent
TENSORFLOW = pathlib.Path(tf.__file__).parent

# Of the largest value: rounding in the dtype that is multiplied in, summed in another order than Keras's.
TOLERANCE = {"float32": 1e-5, "half storage": 1e-3, "float16": 1e-3, "bfloat16": 1e-2}


def assert_answers(exported, found, tolerance=None):
    assert set(found) == set(exported.expected)
    for name, expected in exported.expected.items():
        what = f"{exported.name}, {exported.variant}, {name}"
        assert found[name].dtype == expected.dtype, what
        assert found[name].shape == expected.shape, what
        limit = (tolerance or TOLERANCE)[exported.variant]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=limit * np.abs(expected).max(), err_msg=what)


# TensorFlow's C API


def tensors_of(path):
    """The tensors of `serving_default`: names in the graph by names in the signature."""
    read = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    signature = read.meta_graphs[0].signature_def["serving_default"]
    return [{name: each.name for name, each in part.items()} for part in (signature.inputs, signature.outputs)]


class Program:
    """The C program, and folders for what it is given and writes."""

    def __init__(self, folder):
        self.folder, self.binary = folder, folder / "load_saved_model"
        libraries = ["-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2", "-ldl"]
        command = ["gcc", "-O1", "-Wall", "-I", TENSORFLOW / "include", HERE / "load_saved_model.c", "-o", self.binary]
        command += ["-L", TENSORFLOW, *libraries, f"-Wl,-rpath,{TENSORFLOW}"]
        subprocess.run(command, check=True)

    def run(self, exports, *flags):
        """What each export answers, or the program's message."""
        lines, files = [], []
        for number, exported in enumerate(exports):
            lines.append(str(exported.path))
            inputs, outputs = tensors_of(exported.path)
            lines.append(str(len(inputs)))
            for name, tensor in inputs.items():
                array, file = exported.inputs[name], self.folder / f"{number}-{name}.in"
                strings = array.dtype.kind == "S"
                parts = (
                    [len(each).to_bytes(4, sys.byteorder) + each for each in array.ravel().tolist()] if strings else []
                )
                file.write_bytes(b"".join(parts) if strings else array.tobytes())
                dtype = tf.string if strings else tf.as_dtype(array.dtype)
                numbers = [dtype.as_datatype_enum, array.ndim, *array.shape]
                lines.append(" ".join(map(str, [*tensor.split(":"), *numbers, file])))
            lines.append(str(len(outputs)))
            files.append({name: self.folder / f"{number}-{name}.out" for name in outputs})
            lines += [" ".join([*tensor.split(":"), str(files[-1][name])]) for name, tensor in outputs.items()]
        (self.folder / "manifest").write_text("\n".join(lines))
        run = subprocess.run(
            [self.binary, self.folder / "manifest", *flags], capture_output=True, text=True, timeout=300, check=False
        )
        return run.stderr if run.returncode else [self.read(*pair) for pair in zip(exports, files, strict=True)]

    @staticmethod
    def read(exported, files):
        found = {}
        for name, file in files.items():
            content = file.read_bytes()
            file.unlink()
            dtype = tf.as_dtype(int.from_bytes(content[:4], sys.byteorder)).as_numpy_dtype
            found[name] = np.frombuffer(content[4:], dtype).reshape(exported.expected[name].shape)
        return found


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    return Program(tmp_path_factory.mktemp("c"))


def test_the_c_api_gives_the_models_outputs(program, exports):
    for flags in ([], ["--no-xla"]):
        answers = program.run(exports, *flags)
        assert not isinstance(answers, str), answers
        for exported, found in zip(exports, answers, strict=True):
            assert_answers(exported, found)
