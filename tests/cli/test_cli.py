import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from typer.testing import CliRunner

import keras_mp
from keras_mp.cli import doctor
from keras_mp.cli.app import app
from keras_mp.hardware import Device, measure, recommend
from keras_mp.hardware.matmul_timing import ProductTimes


def run(*arguments):
    # Wide enough that no table wraps a CPU's name.
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def kind():
    accelerators = keras_mp.detect().accelerators
    return accelerators[0].kind.upper() if accelerators else "CPU"


def test_the_installed_command_is_this_one():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="keras-mp")
    assert command.load() is app


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"keras-mp {importlib.metadata.version('keras-mp')}\n")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_the_commands(arguments):
    result = run(*arguments)
    assert result.exit_code == 0
    assert "doctor" in result.output
    assert "--version" in result.output


def test_an_unknown_command_is_refused_by_name():
    result = run("docter")
    assert result.exit_code == 2
    assert "No such command 'docter'" in result.output


def test_doctor_prints_what_was_found():
    found = keras_mp.detect()
    text = run("doctor").output
    for version in (platform.python_version(), tf.__version__, keras.__version__, np.__version__):
        assert version in text
    for device in found.devices:
        assert device.name in text
        assert all(feature in text for feature in device.features)
    for dtype in ("bfloat16", "float16"):
        assert f"{measure(dtype, kind()).dtype_ms:.2f}" in text
    assert (
        f'Use keras_mp.set_policy("{found.recommended_policy}") and '
        f"model.compile(..., jit_compile={found.recommended_jit_compile})." in text
    )
    assert found.reason in text


def test_doctor_as_json_says_the_same():
    found = keras_mp.detect()
    told = json.loads(run("doctor", "--json").output)
    assert told["versions"]["TensorFlow"] == tf.__version__
    assert [device["name"] for device in told["devices"]] == [device.name for device in found.devices]
    assert told["recommended_policy"] == found.recommended_policy
    assert told["recommended_jit_compile"] is found.recommended_jit_compile
    assert told["reason"] == found.reason
    assert [product["dtype"] for product in told["products"]] == ["bfloat16", "float16"]
    assert told["products"][0]["ratio"] == measure("bfloat16", kind()).ratio


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device("cpu", "Xeon", ("amx_bf16", "avx512_bf16")), "amx_bf16, avx512_bf16"),
        (Device("cpu", "Xeon"), "none found"),
        (Device("gpu", "A100", compute_capability=(8, 0)), "compute capability 8.0"),
        (Device("gpu", "MI300X"), "compute capability unknown"),
        (Device("tpu", "TPU:0"), "bfloat16"),
    ],
)
def test_every_kind_of_device_has_its_row(device, words, capsys):
    doctor._print_tables(recommend([device]), [ProductTimes("CPU", 768, "bfloat16", 3.0, 1.0)])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"│ {device.kind.upper()} ")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [device.kind.upper(), device.name, words]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float32 model in a file, with a layer of the user's, and a module that registers it."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "layers_of_mine.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Doubling(keras.layers.Layer):\n"
        "    def call(self, inputs):\n"
        "        return 2 * inputs\n"
    )
    program = (
        "import keras, numpy as np, layers_of_mine\n"
        "x = keras.Input((4,))\n"
        "y = layers_of_mine.Doubling()(keras.layers.LayerNormalization(name='norm')(x))\n"
        "y = keras.layers.Dense(2, name='logits')(keras.layers.Dense(3, name='hidden')(y))\n"
        "model = keras.Model(x, y, name='net')\n"
        "model.compile('adam', 'mse')\n"
        "model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)\n"
        "model.save('net.keras')\n"
    )
    (folder / "block.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Block(keras.layers.Layer):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.inner = keras.layers.Dense(3)\n"
        "    def call(self, inputs):\n"
        "        return self.inner(inputs)\n"
    )
    program += "import block\nx = keras.Input((3,))\nkeras.Model(x, block.Block()(x)).save('block.keras')\n"
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True)
    return folder


def test_convert_writes_the_model_under_the_policy(trained, monkeypatch):
    monkeypatch.chdir(trained)
    result = run("convert", "net.keras", "mixed.keras", "--policy", "mixed_float16", "--import", "layers_of_mine")
    assert result.exit_code == 0
    rows = [line.strip("│").split("│") for line in result.output.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["1", "LayerNormalization", "keras_mp.LayerNormalization", "float16"],
        ["1", "Doubling", "Doubling", "float16"],
        ["1", "Dense", "keras_mp.Dense", "float16"],
        ["1", "Dense", "keras_mp.Head", "float16"],
    ]
    assert "Wrote mixed.keras." in result.output
    mixed = keras_mp.load_model("mixed.keras")
    assert isinstance(mixed.optimizer, keras_mp.LossScaleOptimizer)
    assert int(mixed.optimizer.iterations) == 1
    stock = keras.saving.load_model("net.keras")
    for weight, other in zip(mixed.trainable_variables, stock.trainable_variables, strict=True):
        np.testing.assert_array_equal(weight, other)
    made = {"net.keras", "block.keras", "mixed.keras"}
    assert {entry.name for entry in trained.iterdir() if entry.suffix == ".keras"} == made
    assert not [entry for entry in trained.iterdir() if entry.name.startswith(".")]


def test_convert_pins_by_pattern_and_tells_programs_all(trained, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "there.keras").write_bytes(b"")
    pins = ("--float32", "net/hidden", "--float32", "net/lgits")
    command = ("convert", "net.keras", "there.keras", "--policy", "mixed_bfloat16", *pins, "--import", "layers_of_mine")
    refused = run(*command)
    assert refused.exit_code == 2
    assert "there.keras exists" in refused.output
    result = run(*command, "--overwrite", "--json")
    told = json.loads(result.stdout)
    dtypes = {layer["path"]: layer["compute_dtype"] for layer in told["layers"]}
    assert dtypes["net/hidden"] == "float32"
    assert dtypes["net/norm"] == dtypes["net/logits"] == "bfloat16"
    (warned,) = [line for line in result.stderr.splitlines() if "'net/lgits' matches no layer" in line]
    assert warned.startswith("Warning: ")
    assert "Did you mean 'net/logits'" in warned


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("missing.keras", "out.keras"), 1, "There is no file 'missing.keras'"),
        (("net.keras", "out.h5"), 2, "must end in .keras"),
        (("net.keras", "nowhere/out.keras"), 2, "There is no folder nowhere"),
        (("net.keras", "out.keras", "--policy", "mixed_flot16", "--import", "layers_of_mine"), 1, "mixed_float16"),
        (("net.keras", "out.keras", "--import", "layers_of_yours"), 2, "No module named 'layers_of_yours'"),
        (("lambda.keras", "out.keras"), 1, "--trust"),
    ],
)
def test_convert_says_what_is_missing(trained, monkeypatch, arguments, code, words):
    monkeypatch.chdir(trained)
    keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x + 1)]).save("lambda.keras")
    result = run("convert", *arguments)
    assert (result.exit_code, result.exception.__class__) == (code, SystemExit)
    assert words in " ".join(result.output.replace("│", "").split())
    assert not (trained / "out.keras").exists()


def test_convert_says_how_to_load_what_a_layer_of_ones_own_makes(trained, tmp_path):
    for name in ("block.py", "block.keras"):
        shutil.copy(trained / name, tmp_path)
    convert = ["convert", "block.keras", "out.keras", "--policy", "mixed_bfloat16", "--import", "block"]
    told = subprocess.run(
        [sys.executable, "-m", "keras_mp", *convert], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "load_model" not in told  # the file says what they are
    load = (
        "import block, keras, keras_mp\n"
        "for model in (keras_mp.load_model('out.keras'), keras.models.load_model('out.keras')):\n"
        "    inner = next(layer for layer in model.layers if isinstance(layer, block.Block)).inner\n"
        "    print(type(inner).__module__.split('.')[0], inner.compute_dtype)\n"
    )
    loaded = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines() == ["keras_mp bfloat16", "keras_mp bfloat16"]


def test_convert_names_the_class_that_is_not_imported(trained):
    command = [sys.executable, "-c", "from keras_mp.cli.app import app; app()", "convert", "net.keras", "out.keras"]
    ran = subprocess.run(command, cwd=trained, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "Could not locate class 'Doubling'. Name the module that registers it: --import MODULE." in ran.stderr


def test_convert_says_what_is_wrong_with_a_file_without_a_traceback(trained, tmp_path):
    whole = (trained / "net.keras").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "folder.keras").mkdir()
    damaged = {
        "flip": bytes(flipped),
        "cut": whole[:-100],
        "empty": b"",
        "text": b"no model",
        "hdf5": b"\x89HDF\r\n\x1a\n",
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.keras").write_bytes(content)
    for name in [*damaged, "folder", "missing"]:
        result = run("convert", str(tmp_path / f"{name}.keras"), str(tmp_path / "out.keras"))
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out.keras").exists()


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`:UserWarning")
def test_trust_is_for_losses_too(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", lambda y, p: (y - p) ** 2)
    model.save(tmp_path / "lambda.keras")
    command = ["convert", str(tmp_path / "lambda.keras"), str(tmp_path / "out.keras"), "--policy", "mixed_bfloat16"]
    result = run(*command)
    assert result.exit_code == 1
    assert "The file holds Python code. Add --trust if you know where it comes from." in result.stderr
    assert run(*command, "--trust").exit_code == 0


def test_doctor_is_quiet():
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-m", "keras_mp", "doctor", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["recommended_policy"] == keras_mp.detect().recommended_policy


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model trained in bfloat16, as a .keras file, and its export by the command."""
    folder = tmp_path_factory.mktemp("saved")
    policy = keras.DTypePolicy("mixed_bfloat16")
    layers = [keras.Input((300,), name="x"), keras.layers.Dense(200, dtype=policy), keras.layers.Dense(2, name="y")]
    model = keras.Sequential(layers)
    model.save(folder / "m.keras")
    result = run("export", str(folder / "m.keras"), str(folder / "m"), "--precision", "float32", "--weights", "half")
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_export_prints_what_it_wrote(saved):
    folder, text = saved
    assert f"Wrote {folder / 'm' / '1'}, and ran it without Keras." in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["matmuls in", "float32"] in rows
    assert ["weights", "bfloat16"] in rows
    assert ["trained under", "float32, mixed_bfloat16"] in rows
    assert ["x (input)", "float32", "any x 300", "", ""] in rows
    ((*_, largest, relative),) = [row for row in rows if row[:3] == ["y", "float32", "any x 2"]]
    assert 0 < float(relative) < 5e-2
    assert float(largest) > 0


def test_verify_prints_and_says_the_same_as_json(saved):
    path = str(saved[0] / "m" / "1")
    text = run("verify", path).output
    assert "Compared with the outputs recorded at export." in text
    assert "All 6 files are as written (" in text or "All 5 files are as written (" in text
    told = json.loads(run("verify", path, "--model", str(saved[0] / "m.keras"), "--json").output)
    assert told["outputs"]["y"]["dtype"] == "float32"
    assert 0 < told["outputs"]["y"]["relative_error"] < 5e-2
    assert told["record"]["weights"] == "bfloat16"
    assert told["latency_ms"] > 0
    assert told["model_latency_ms"] > 0
    assert told["compared_with"] == str(saved[0] / "m.keras")


def test_export_and_verify_say_what_is_wrong_without_a_traceback(saved):
    folder = saved[0]
    for arguments, words in [
        (["export", "nowhere.keras", str(folder / "n")], "There is no file 'nowhere.keras'. Expected a .keras file"),
        (["export", str(folder / "m.keras"), str(folder / "n"), "--weights", "int8"], "Unknown weights 'int8'."),
        (["verify", str(folder / "m")], "One of its versions may be meant: "),
        (["verify", str(folder)], "it has no file saved_model.pb. Export a model there first."),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert words in result.stderr
        assert result.stdout == ""


def test_export_to_another_format(saved):
    told = json.loads(
        run("export", str(saved[0] / "m.keras"), str(saved[0] / "lite"), "--format", "litert", "--json").output
    )
    assert told["path"] == str(saved[0] / "lite.tflite")
    assert told["bytes"] > 4 * 300 * 200
