"""Exports at URLs: `ram://` is a file system of TensorFlow's own, in this process."""

import os
import pathlib
import uuid

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_mp
from keras_mp.errors import ExportError, ExportWriteError
from keras_mp.exporting import publishing, remote

ROWS = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")


def small():
    x = keras.Input((5,), name="x")
    return keras.Model(x, layers.Dense(2, name="y")(x), name="m")


@pytest.fixture
def url():
    return f"ram://{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """In which nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def write(url, text=""):
    tf.io.gfile.makedirs(url.rsplit("/", 1)[0])
    with tf.io.gfile.GFile(url, "w") as file:
        file.write(text)


def test_versions_are_written_read_and_verified_at_a_url(url):
    model = small()
    assert keras_mp.export(model, f"{url}/digits", verify=False) == f"{url}/digits/1"
    write(f"{url}/digits/.DS_Store")
    tf.io.gfile.makedirs(f"{url}/digits/7")  # another process is writing it
    path = keras_mp.export(model, f"{url}/digits/")
    assert path == f"{url}/digits/8"
    served = tf.saved_model.load(path).signatures["serving_default"](x=tf.constant(ROWS))["y"]
    np.testing.assert_allclose(served, model(ROWS), rtol=1e-5)
    report = keras_mp.verify_export(path, model, ROWS)
    assert report.path == path
    assert report.outputs["y"].largest_error <= 1e-6
    assert keras_mp.verify_export(path).record["model"] == "m"
    with pytest.raises(ExportError, match=f"No SavedModel at '{url}/digits/9'"):
        keras_mp.verify_export(f"{url}/digits/9", model, ROWS)


@pytest.mark.parametrize("format", ["litert", pytest.param("onnx", marks=pytest.mark.slow)])
def test_files_are_written_and_replaced_at_a_url(url, format):
    suffix = {"litert": "tflite", "onnx": "onnx"}[format]
    write(f"{url}/deep/m.{suffix}", "the last one")
    path = keras_mp.export(small(), f"{url}/deep/m", format=format)
    assert path == f"{url}/deep/m.{suffix}"
    assert tf.io.gfile.listdir(f"{url}/deep") == [f"m.{suffix}"]
    assert tf.io.gfile.stat(path).length > 100


def test_the_graph_of_a_version_is_copied_last_and_no_two_take_one_number(url, tmp_path_factory):
    version = tmp_path_factory.mktemp("made") / "1"
    for name in ("saved_model.pb", "variables/variables.index", "assets.extra/z"):
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        (version / name).write_text(name)
    order = []

    class Watched(type(version)):
        def relative_to(self, *arguments):
            order.append(self.name)
            return super().relative_to(*arguments)

    assert remote._copy_version(Watched(version), f"{url}/m") == f"{url}/m/1"
    assert order == ["z", "variables.index", "saved_model.pb"]
    with tf.io.gfile.GFile(f"{url}/m/1/assets.extra/z") as file:
        assert file.read() == "assets.extra/z"
    assert remote._copy_version(version, f"{url}/m") == f"{url}/m/2"


def test_a_version_that_cannot_be_copied_is_taken_away(url, tmp_path_factory):
    version = tmp_path_factory.mktemp("made") / "1"
    version.mkdir()
    (version / "a").write_text("")
    (version / "b").symlink_to("/proc/self/mem")  # which cannot be read from its start
    with pytest.raises(ExportWriteError, match=f"'{url}/m' could not be written: "):
        remote._copy_version(version, f"{url}/m")
    assert tf.io.gfile.listdir(f"{url}/m") == []


def test_what_is_no_folder_of_a_models_own(url):
    write(f"{url}/m/notes.txt")
    with pytest.raises(ExportError, match="holds something that is not a version of a SavedModel: notes.txt. Name a"):
        keras_mp.export(small(), f"{url}/m")
    with pytest.raises(ExportError, match="is a file. Name a folder of the model's own"):
        keras_mp.export(small(), f"{url}/m/notes.txt")
    with pytest.raises(ExportError, match="is a number, and a server takes it for a version"):
        keras_mp.export(small(), f"{url}/m/3")


@pytest.mark.parametrize("format", ["saved_model", "onnx", "litert"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "s3://bucket/digits",
            "has no file system for 's3://bucket/digits' here; it has file://, gs://, ram://. Export",
        ),
        ("hdfs://host/digits", "has no file system for 'hdfs://host/digits' here"),
        ("https://example.org/digits", "has no file system for 'https://example.org/digits' here"),
        (
            "dbfs:/digits",
            "looks like a URL that lost a slash, as pathlib.Path takes it away. Type 'dbfs://digits' as a",
        ),
        (pathlib.Path("gs://bucket/digits"), "Type 'gs://bucket/digits' as a string, or './gs:/bucket/digits' for a"),
        ("ram://", "'ram://' names no folder. Type one, such as 'ram://models/digits'."),
        ("file://host/digits", "names a machine, and files of other machines cannot be written. Type 'file:///host/d"),
    ],
)
def test_urls_that_cannot_be_written_to(path, message, format):
    with pytest.raises(ExportError) as caught:
        keras_mp.export(small(), path, format=format)
    assert message in str(caught.value)


def test_a_url_of_a_local_file_is_its_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    path = keras_mp.export(small(), f"file://{folder}/digits", verify=False)
    assert path == folder / "digits" / "1"
    assert keras_mp.verify_export(f"file://{path}", small(), ROWS, tolerance=100).path == path


def test_a_version_that_fails_is_kept_locally_and_not_at_the_url(url):
    with remote.staged(f"{url}/m", file=False) as (folder, _):
        (folder / ".unfinished-1").mkdir(parents=True)
    assert not folder.exists()
    with remote.staged(f"{url}/m", file=False) as (folder, _), publishing.unfinished(folder) as made:
        aside = publishing.put_aside(made, folder)
    assert aside.is_dir()
    aside.rmdir()
    folder.rmdir()
    os.rmdir(folder.parent)
    assert not tf.io.gfile.exists(f"{url}/m")
