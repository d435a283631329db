"""Exports read by runtimes that know nothing of Keras: TensorFlow's C API, OpenVINO, onnxruntime, LiteRT."""

import json
import pathlib
import shutil
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import keras_mp
from keras_mp.errors import ExportError, KerasMPWarning
from keras_mp.exporting.sample import save_arrays
from tests.exporting.conftest import Exported
from tests.helpers import serving_models

PROGRAMS = pathlib.Path(__file__).parents[1] / "programs"
TENSORFLOW = pathlib.Path(tf.__file__).parent

# Of the largest value: rounding in the dtype that is multiplied in, summed in another order than Keras's.
# Absolute where that is below 1, as for probabilities. In bfloat16 two roundings: matrix units of some CPUs sum in an
# order of their own, and a transformer's logits then differ by four units in the last place of half the largest.
TOLERANCE = {"float32": 1e-5, "half": 1e-3, "float16": 1e-3, "bfloat16": 1.6e-2}


def assert_answers(exported, found, tolerance=None):
    assert set(found) == set(exported.expected)
    for name, expected in exported.expected.items():
        what = f"{exported.name}, {exported.variant}, {name}"
        assert found[name].dtype == expected.dtype, what
        assert found[name].shape == expected.shape, what
        limit = (tolerance or TOLERANCE)[exported.variant]
        np.testing.assert_allclose(
            found[name], expected, rtol=0, atol=limit * max(1, np.abs(expected).max()), err_msg=what
        )


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
        command = [
            "gcc",
            "-O1",
            "-Wall",
            "-I",
            TENSORFLOW / "include",
            PROGRAMS / "load_saved_model.c",
            "-o",
            self.binary,
        ]
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


def test_the_c_api_refuses_xla_where_tensorflow_serving_would(program, tmp_path):
    """And so shows that the flag of the test above works. In plain TensorFlow it runs."""
    model = serving_models.make(serving_models.recommender, "float32")
    path = keras_mp.export(model, tmp_path / "m", jit_compile=True, verify=False)
    inputs = serving_models.batch_for(model)
    expected = {"rating": model([inputs["user"], inputs["item"]]).numpy()}
    exported = Exported("recommender", "float32", path, inputs, expected)
    (found,) = program.run([exported])
    assert_answers(exported, found)
    assert "XLA compilation disabled" in program.run([exported], "--no-xla")
    assert json.loads((path / "assets.extra" / "keras_mp.json").read_text())["jit_compile"] is True


# Runtimes with a program of their own, each started once for all exports


def run_program(name, exports, folder):
    """Answers of a program that reads exports in a process of its own."""
    job = []
    for number, exported in enumerate(exports):
        save_arrays(folder / f"{number}-in.npz", exported.inputs)
        files = {"inputs": str(folder / f"{number}-in.npz"), "outputs": str(folder / f"{number}-out.npz")}
        job.append({"path": str(exported.path), "scratch": str(folder / str(number)), **files})
    (folder / "job.json").write_text(json.dumps(job))
    run = subprocess.run(
        [sys.executable, PROGRAMS / name, folder / "job.json"], capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = []
    for each in job:
        with np.load(each["outputs"]) as arrays:
            answers.append({key: arrays[key] for key in arrays.files})
    return answers


def test_openvino_reads_exports_without_tensorflow(exports, tmp_path):
    # Of strings it has none of TensorFlow's operations without a package of its own.
    read = [exported for exported in exports if exported.name != "strings"]
    assert {exported.variant for exported in read} == set(TOLERANCE)
    for exported, found in zip(read, run_program("read_with_openvino.py", read, tmp_path), strict=True):
        assert_answers(exported, found)


def test_onnxruntime_reads_what_tf2onnx_makes_of_float32_products(exports, tmp_path):
    names = ("digits", "recommender")  # of a transformer tf2onnx takes half a minute
    read = [each for each in exports if each.variant in ("float32", "half") and each.name in names]
    assert len(read) == 4
    for exported, found in zip(read, run_program("read_with_onnx.py", read, tmp_path), strict=True):
        assert_answers(exported, found)


def test_an_onnx_file_is_written_when_it_has_been_run(tmp_path):
    x = keras.Input((16,), name="x")
    policy = keras.DTypePolicy("mixed_bfloat16")
    hidden = keras.layers.Dense(32, activation=keras_mp.activations.gelu, dtype=policy)(x)  # tf2onnx has no erfc
    model = keras.Model(x, keras.layers.Dense(4, name="y", dtype=policy)(hidden))
    path = keras_mp.export(model, tmp_path / "m", format="onnx", output_names=["p"])
    assert path == tmp_path / "m.onnx"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]
    import onnxruntime

    inputs = serving_models.batch_for(model)
    (found,) = onnxruntime.InferenceSession(str(path)).run(["p"], inputs)
    twin = keras_mp.convert(model, "float32")
    np.testing.assert_allclose(found, twin(inputs["x"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", ["float32", "half"])
@pytest.mark.parametrize("maker", [serving_models.digits, serving_models.recommender, serving_models.transformer])
def test_litert_runs_the_float32_twin(maker, weights, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model = serving_models.make(maker, "mixed_bfloat16")
    path = keras_mp.export(model, tmp_path / "m", format="litert", weights=weights)
    assert path == tmp_path / "m.tflite"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.tflite"]
    inputs = serving_models.batch_for(model)
    found = Interpreter(model_path=str(path)).get_signature_runner("serving_default")(**inputs)
    flat = [inputs[tensor.name] for tensor in model.inputs]
    expected = keras_mp.convert(model, "float32")(keras.tree.pack_sequence_as(model.input, flat))
    (answer,) = found.values()
    limit = 1e-5 if weights == "float32" else 2e-3
    np.testing.assert_allclose(answer, expected, rtol=0, atol=limit * np.abs(expected).max())


@pytest.mark.parametrize(
    ("format", "halves"),
    [("litert", ["half", "bfloat16"]), pytest.param("onnx", ["half", "bfloat16"], marks=pytest.mark.slow)],
)
def test_with_half_weights_a_file_is_half_the_size(format, halves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a converter may run in another folder
    x = keras.Input((256,), name="x")
    model = keras.Model(x, keras.layers.Dense(256, name="y")(x))
    paths = [keras_mp.export(model, weights, format=format, weights=weights) for weights in ("float32", *halves)]
    assert {str(path.parent) for path in paths} == {"."}
    sizes = [path.stat().st_size for path in paths]
    assert 4 * 256**2 < sizes[0] < 4 * 256**2 + 8192
    for size in sizes[1:]:
        assert 2 * 256**2 < size < 2 * 256**2 + 8192
    for path in paths:
        keras_mp.verify_export(path, model, tolerance=1e-3 if path.stem != "bfloat16" else 8e-3)


def hostile(kernel):
    """Tiny weights for large inputs, and a division that an epsilon of 1e-12 keeps from 0."""
    x = keras.Input((4,), name="x")
    first = keras.layers.Dense(4, activation="tanh", name="first")
    normal = keras.layers.BatchNormalization(epsilon=1e-9, name="normal")
    h = keras.layers.Lambda(lambda v: v / (keras.ops.abs(v) + 1e-12), output_shape=(4,))(normal(first(x)))
    model = keras.Model(x, keras.layers.Dense(2, name="y")(h), name="hostile")
    first.set_weights([kernel, np.zeros(4)])
    normal.set_weights([np.ones(4), np.zeros(4), np.zeros(4), np.full(4, 1e-8)])
    return model


@pytest.mark.parametrize("format", ["saved_model", "litert", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e5], ids=["flushed to zero", "subnormal", "overflow"])
def test_what_16_bits_lose_stays_in_float32_in_every_format(size, format, tmp_path):
    rng = np.random.default_rng(0)
    kernel, rows = size * rng.normal(size=(4, 4)), (rng.normal(size=(8, 4)) / size).astype("float32")
    model = hostile(kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KerasMPWarning)
        path = keras_mp.export(
            model, tmp_path / "m", format=format, weights="float16", batch=rows, verify=format != "saved_model"
        )
    # Of the last layer's weights, which float16 holds.
    assert keras_mp.verify_export(path, model, rows, tolerance=2e-3).outputs["y"].finite
    if format == "saved_model":
        facts = json.loads((path / "assets.extra" / "keras_mp.json").read_text())
        assert facts["kept_in_float32"] == ["first/kernel"]


@pytest.mark.parametrize(
    ("format", "policy", "message"),
    [
        ("onnx", "mixed_bfloat16", "onnxruntime has no products in bfloat16"),
        ("litert", "mixed_bfloat16", "TensorFlow Lite has no products in bfloat16"),
        ("litert", "mixed_float16", "TensorFlow Lite has no products in float16"),
    ],
)
def test_what_a_runtime_cannot_multiply_in_is_refused_with_the_way_out(format, policy, message, tmp_path):
    model = serving_models.make(serving_models.recommender, policy)
    with pytest.raises(ExportError, match=message) as caught:
        keras_mp.export(model, tmp_path / "m", format=format, precision="mixed")
    assert f"export(..., format='{format}', precision='float32')" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_litert_has_no_operation_for(tmp_path):
    model = serving_models.make(serving_models.strings, "float32")
    (tmp_path / "m.tflite").write_text("the last one")
    with pytest.raises(ExportError, match="TensorFlow Lite cannot convert the model: .*StringLower"):
        keras_mp.export(model, tmp_path / "m", format="litert")
    assert (tmp_path / "m.tflite").read_text() == "the last one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.tflite"]


def test_formats_that_there_are(tmp_path):
    model = serving_models.make(serving_models.recommender, "float32")
    with pytest.raises(ExportError, match="Unknown format 'tflite'. Type one of 'saved_model', 'litert', 'onnx'."):
        keras_mp.export(model, tmp_path / "m", format="tflite")
    with pytest.raises(ExportError, match="has one signature"):
        keras_mp.export(model, tmp_path / "m", format="litert", signatures={"again": model})
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder. Name a file, such as"):
        keras_mp.export(model, tmp_path / "m", format="onnx")
