"""A version is there in whole or not at all, whoever dies, and is what was written."""

import importlib
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_mp
from keras_mp.errors import ExportError, ExportWriteError
from keras_mp.exporting import manifest
from keras_mp.exporting.sample import read_sample

ROOT = pathlib.Path(__file__).parents[2]


def small(name="m"):
    x = keras.Input((5,), name="x")
    return keras.Model(x, layers.Dense(2, name="y")(x), name=name)


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and its export, verified before it was published."""
    model = small()
    rows = np.random.default_rng(0).normal(size=(5, 5)).astype("float32")
    return model, keras_mp.export(model, tmp_path_factory.mktemp("exported") / "m", batch=rows), rows


# A process that dies in the middle, and a disk that is full

PROGRAM = """
import os, resource, signal, sys
import keras
import keras_mp
from keras_mp.errors import ExportWriteError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = keras.Sequential([keras.Input((300,), name="x"), keras.layers.Dense(300, name="y")])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # stands for a disk that is full
for format in ("saved_model", "litert"):
    try:
        keras_mp.export(model, sys.argv[1] + "/in/m", format=format, verify=False)
    except ExportWriteError as error:
        print(error)
print(os.path.exists(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def die_before_the_version_appears(event, arguments):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die_before_the_version_appears)
keras_mp.export(model, sys.argv[1], verify=False)
"""


def test_a_full_disk_and_a_killed_export_leave_no_version(tmp_path):
    folder = tmp_path / "m"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    *told, left = run.stdout.splitlines()
    for text, name in zip(told, ("m", "m.tflite"), strict=True):
        assert text.startswith(f"{str(folder / 'in' / name)!r} could not be written: ")
        assert text.endswith(
            "No version was published, and nothing half-written was left. Free space there, or name a folder that may "
            "be written to."
        )
    assert left == "False"
    (unfinished,) = names_in(folder)
    assert unfinished.startswith(".unfinished-")
    assert keras_mp.export(small(), folder, verify=False) == folder / "1"
    assert names_in(folder) == ["1"]  # what was left is taken away


LITTER = [
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "._1",
    ".1.swp",
    "notes.txt~",
    "#notes.txt#",
    "~$notes.docx",
    "1.bak",
]


def test_litter_of_desktops_and_editors_stops_no_export_and_no_verification(tmp_path):
    folder = tmp_path / "m"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "__MACOSX" / "m").mkdir(parents=True)
    for name in LITTER:
        (folder / name).write_text("")
    assert keras_mp.export(small(), folder, verify=False) == folder / "1"
    path = keras_mp.export(small(), folder, verify=False)
    assert path == folder / "2"
    for name in LITTER:
        (path / name).write_text("")
    (path / "variables" / "._variables.index").write_text("")
    keras_mp.verify_export(path)
    (path / "notes.txt").write_text("")
    assert "not what was written: notes.txt was not written by the export." in said(path)


def test_another_program_that_found_the_disk_full():
    layout = importlib.import_module("keras_mp.exporting.publishing")
    layout.refuse_full_disk("a model of an unknown operation")
    full = "'m.onnx' could not be written: No space left on device. No version"
    with pytest.raises(ExportWriteError, match=full), layout.writing("m.onnx"):
        layout.refuse_full_disk("OSError: [Errno 28] No space left on device: '/tmp/m.onnx'")


def test_an_export_in_the_making_is_not_taken_for_one_that_was_killed(tmp_path):
    layout = importlib.import_module("keras_mp.exporting.publishing")
    with layout.unfinished(tmp_path / "m") as made:
        (made / "saved_model.pb").write_text("")
        keras_mp.export(small(), tmp_path / "m", verify=False)
        assert made.exists()
    assert names_in(tmp_path / "m") == ["1"]


def test_at_every_moment_a_version_is_absent_or_whole(tmp_path):
    """Whatever Python does with files is reported to an audit hook, and a process that was killed there leaves this."""
    folder, seen = tmp_path / "m", []
    watching = threading.local()

    def look(event, arguments):
        if getattr(watching, "on", False) and event in ("open", "os.rename", "os.chmod", "os.mkdir", "shutil.rmtree"):
            watching.on = False
            versions = list(folder.glob("[0-9]*")) if folder.exists() else []
            for path in versions:
                manifest.check_files(path, manifest.read_record(path))
            seen.append(len(versions))
            watching.on = True

    sys.addaudithook(look)
    watching.on = True
    try:
        keras_mp.export(small(), folder, verify=False)
        keras_mp.export(small(), folder, verify=False)
    finally:
        watching.on = False
    assert set(seen) == {0, 1, 2}
    assert seen == sorted(seen)
    assert len(seen) > 20


def test_two_exports_at_once_get_two_versions(tmp_path):
    together = threading.Barrier(2, timeout=60)

    class Meet(layers.Layer):
        met = False

        def call(self, inputs):
            if not self.met:
                self.met = True
                together.wait()
            return inputs

        def compute_output_spec(self, inputs):
            return keras.KerasTensor(inputs.shape, inputs.dtype)

    written = []

    def write():
        x = keras.Input((2,), name="x")
        written.append(keras_mp.export(keras.Model(x, Meet()(x)), tmp_path / "m", verify=False))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in written) == ["1", "2"] == names_in(tmp_path / "m")
    for path in written:
        manifest.check_files(path, manifest.read_record(path))


def test_a_folder_that_cannot_be_written_to():
    """Where even root may not."""
    with pytest.raises(ExportWriteError, match="'/proc/keras_mp/m' could not be written: .* No version was published"):
        keras_mp.export(small(), "/proc/keras_mp/m", verify=False)


def test_a_server_of_another_user_can_read_it_under_any_umask(tmp_path):
    before = os.umask(0o077)
    try:
        path = keras_mp.export(small(), tmp_path / "deep" / "m", verify=False)
    finally:
        os.umask(before)
    for entry in [tmp_path / "deep", tmp_path / "deep" / "m", path, *path.rglob("*")]:
        wanted = 0o755 if entry.is_dir() else 0o644
        assert stat.S_IMODE(entry.stat().st_mode) & wanted == wanted, entry


@pytest.mark.parametrize("name", ["1", "007"])
def test_a_path_whose_last_part_is_a_number(name, tmp_path):
    with pytest.raises(ExportError) as caught:
        keras_mp.export(small(), tmp_path / "m" / name)
    assert str(caught.value) == (
        f"The last part of {str(tmp_path / 'm' / name)!r} is a number, and a server takes it for a version. Name the "
        f"model's folder, such as {str(tmp_path / 'm')!r}; the version is chosen by the export."
    )
    assert names_in(tmp_path) == []


# Verification before publishing


class ProcessNumber(layers.Layer):
    """Another number in each process."""

    def call(self, inputs):
        number = tf.strings.split(tf.io.read_file("/proc/self/stat"))[0]
        return inputs + tf.strings.to_number(number)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the layer reads it")
def test_an_export_that_does_not_answer_alike_is_kept_aside(tmp_path):
    x = keras.Input((3,), name="x")
    model = keras.Model(x, ProcessNumber(name="y")(x), name="numbered")
    assert keras_mp.export(model, tmp_path / "m", verify=False).name == "1"
    with pytest.raises(ExportError) as caught:
        keras_mp.export(model, tmp_path / "m")
    aside = tmp_path / "m" / ".failed-1"
    assert str(caught.value).startswith(
        f"The export of 'numbered' failed its verification, so no version was published; it is kept at {str(aside)!r}. "
        "Output 'y' of the export differs"
    )
    assert str(caught.value).endswith("Where the model answers at random, type verify=False.")
    assert names_in(tmp_path / "m") == [".failed-1", "1"]
    assert (aside / "saved_model.pb").is_file()


def test_what_an_export_says_of_itself(exported):
    model, path, rows = exported
    facts = json.loads((path / "assets.extra" / "keras_mp.json").read_text())
    assert facts["model"] == "m"
    assert facts["policies"] == ["float32"]
    assert (facts["precision"], facts["weights"], facts["jit_compile"]) == ("float32", "float32", False)
    assert facts["signatures"]["serving_default"] == {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [None, 5]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [None, 2]}],
        "own_outputs": ["y"],
    }
    assert facts["errors"]["serving_default"]["y"]["relative"] <= 1e-6
    assert facts["versions"]["keras"] == keras.__version__
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    own = sizes.pop("assets.extra/keras_mp.json")
    assert own > 0
    assert {name: each["bytes"] for name, each in facts["files"].items()} == sizes
    inputs, answers = read_sample(path)
    np.testing.assert_array_equal(inputs["serving_default"]["x"], rows[:2])
    np.testing.assert_allclose(answers["serving_default"]["y"], model(rows[:2]), rtol=1e-5)


def test_warm_up_requests_are_those_of_tensorflow_serving(exported):
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    _, path, rows = exported
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    logs = [
        prediction_log_pb2.PredictionLog.FromString(each.numpy()).predict_log.request
        for each in tf.data.TFRecordDataset(str(file))
    ]
    assert [(log.model_spec.name, log.model_spec.signature_name) for log in logs] == [("m", "serving_default")] * 2
    for log, count in zip(logs, (1, 2), strict=True):
        np.testing.assert_array_equal(tf.make_ndarray(log.inputs["x"]), rows[:count])


def test_warm_up_requests_where_their_package_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow_serving" else find(name))
    with pytest.raises(ExportError, match=r"pip install 'keras-mp\[serving\]', or warmup_requests=False"):
        keras_mp.export(small(), tmp_path / "m", warmup_requests=True)
    path = keras_mp.export(small(), tmp_path / "m", verify=False)
    assert not (path / "assets.extra" / "tf_serving_warmup_requests").exists()


# Files that were truncated or changed. None of these starts a process: the files are looked at first.


def copied(path, tmp_path):
    return shutil.copytree(path, tmp_path / "1")


def said(path):
    with pytest.raises(ExportError) as caught:
        keras_mp.verify_export(path)
    return str(caught.value)


def test_verify_says_which_file_is_not_what_was_written(exported, tmp_path):
    path = copied(exported[1], tmp_path)
    data = path / "variables" / "variables.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-7])
    (path / "saved_model.pb").write_bytes(b"\0" + (path / "saved_model.pb").read_bytes()[1:])
    (path / "variables" / "variables.index").unlink()
    (path / "notes.txt").write_text("")
    assert said(path) == (
        f"The export at {str(path)!r} is not what was written: saved_model.pb was changed; "
        f"variables/variables.data-00000-of-00001 was truncated: {len(content) - 7} of {len(content)} bytes; "
        "variables/variables.index is missing; notes.txt was not written by the export. Copy it again, or export the "
        "model again."
    )


def test_verify_looks_at_the_record_itself(exported, tmp_path):
    path = copied(exported[1], tmp_path)
    file = path / "assets.extra" / "keras_mp.json"
    text = file.read_text()
    file.write_text(text.replace('"weights": "float32"', '"weights": "float16"'))
    assert "assets.extra/keras_mp.json of the export" in said(path)
    assert "was changed: its fingerprint is not that of its content" in said(path)
    file.write_text(text[: len(text) // 2])
    assert "was truncated or changed: " in said(path)
    file.write_text(text.replace('"format": 1', '"format": 2'))
    assert "was written by keras_mp" in said(path)
    file.unlink()
    assert "keeps no answers to compare with: keras_mp.export did not write it" in said(path)


def test_verify_without_the_model_compares_with_what_was_answered(exported):
    model, path, rows = exported
    report = keras_mp.verify_export(path)
    np.testing.assert_allclose(report.answers["y"], model(rows[:2]), rtol=1e-5)
    assert report.model_latency_ms is None
    assert report.record["fingerprint"] == json.loads((path / manifest.FILE).read_text())["fingerprint"]
    with pytest.raises(ExportError, match="A batch alone has nothing to be compared with"):
        keras_mp.verify_export(path, batch=rows)
    other = keras.models.clone_model(model)
    other.set_weights([1.001 * weight for weight in model.get_weights()])
    assert 1e-4 < keras_mp.verify_export(path, other, rows, tolerance=1e-2).outputs["y"].relative_error < 1e-2
