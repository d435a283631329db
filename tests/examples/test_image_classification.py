"""The examples' loader of image-classification sets: its data and its errors."""

import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from examples import image_classification
from examples.image_classification import (
    DatasetError,
    DatasetNotFoundError,
    DatasetUnavailableError,
    NotImageClassificationError,
    load,
)
from keras_mp.errors import ArgumentError
from tests.helpers.banner import without_banner

ROOT = Path(__file__).parents[2]


class _Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Fifty images in one split, with values up to 254: `max_value` must not be taken from them."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (4, 4, 3)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=self.SHAPE),
                    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(50):
            yield index, {"image": np.full((4, 4, 3), 5 * index + 9, np.uint8), "label": index % 2}


class OneSplitImages(_Small):
    pass


class ManySizesImages(_Small):
    SHAPE = (None, None, 3)

    def _generate_examples(self):
        for index in range(10):
            yield index, {"image": np.full((3 + index, 5, 3), 51, np.uint8), "label": index % 2}


class BrokenImages(_Small):
    def _generate_examples(self):
        yield from list(super()._generate_examples())[:3]
        raise OSError("the disk is on fire")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder where the digits are prepared."""
    folder = tmp_path_factory.mktemp("data")
    load("digits", data_dir=folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Sends every request to a port where nobody listens, so that the tests do the same on every machine."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)


def _all(dataset):
    batches = list(dataset.as_numpy_iterator())
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches])


def _rows(images, labels):
    rows = np.concatenate([images.reshape(len(labels), -1), labels.reshape(-1, 1)], axis=1)
    return rows[np.lexsort(rows.T)]


def test_digits_are_the_images_of_scikit_learn_divided_by_sixteen(data_dir):
    loaded = load("digits", batch_size=100, data_dir=data_dir)
    train, test = _all(loaded.train), _all(loaded.test)
    assert (len(train[1]), len(test[1])) == (loaded.num_train, loaded.num_test) == (1438, 359)
    images, labels = (np.concatenate(pair) for pair in zip(train, test, strict=True))
    digits = load_digits()
    np.testing.assert_array_equal(_rows(images, labels), _rows(digits.images.astype(np.float32) / 16, digits.target))


def test_the_set_says_what_a_model_needs_to_know(data_dir):
    loaded = load("digits", data_dir=data_dir)
    assert loaded.name == "digits"
    assert loaded.image_shape == (8, 8, 1)
    assert loaded.num_classes == 10
    assert loaded.class_names == tuple("0123456789")


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16"])
def test_the_pipeline_yields_float32_under_every_policy(policy, data_dir):
    keras.config.set_dtype_policy(policy)
    loaded = load("digits", data_dir=data_dir)
    for dataset in (loaded.train, loaded.test):
        specs = dataset.element_spec
        assert [spec.dtype for spec in specs] == [tf.float32, tf.int32]
        assert specs[0].shape.as_list() == [None, 8, 8, 1]
        images, labels = next(iter(dataset))
        assert (images.dtype, labels.dtype) == (tf.float32, tf.int32)
        assert images.numpy().min() == 0.0
        assert images.numpy().max() == 1.0


def test_a_seed_fixes_the_order_of_every_epoch(data_dir):
    def epochs(seed):
        train = load("digits", seed=seed, data_dir=data_dir).train
        return [_all(train)[0] for _ in range(2)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


def test_the_test_images_keep_their_order(data_dir):
    one, two = load("digits", seed=1, data_dir=data_dir).test, load("digits", seed=2, data_dir=data_dir).test
    np.testing.assert_array_equal(_all(one)[0], _all(one)[0])
    np.testing.assert_array_equal(_all(one)[0], _all(two)[0])


def test_drop_remainder_gives_training_one_shape_and_testing_every_image(data_dir):
    loaded = load("digits", batch_size=100, drop_remainder=True, data_dir=data_dir)
    assert [len(labels) for _, labels in loaded.train] == [100] * 14
    assert [len(labels) for _, labels in loaded.test] == [100, 100, 100, 59]
    assert loaded.train.element_spec[0].shape.as_list() == [100, 8, 8, 1]


def test_a_split_too_large_for_memory_is_read_from_disk(data_dir, monkeypatch):
    held = load("digits", data_dir=data_dir)
    monkeypatch.setattr(image_classification, "_IN_MEMORY_BYTES", 0)
    read = load("digits", data_dir=data_dir)
    np.testing.assert_array_equal(_all(read.test)[0], _all(held.test)[0])
    first = _all(read.train)
    np.testing.assert_array_equal(_rows(*first), _rows(*_all(held.train)))
    np.testing.assert_array_equal(first[0], _all(load("digits", data_dir=data_dir).train)[0])


def test_values_are_divided_by_what_their_type_can_hold_and_the_last_fifth_is_for_testing(tmp_path):
    loaded = load("one_split_images", data_dir=tmp_path)
    train, test = _all(loaded.train)[0], _all(loaded.test)[0]
    assert (len(train), len(test)) == (loaded.num_train, loaded.num_test) == (40, 10)
    assert loaded.class_names == ("cat", "dog")
    values = np.sort(np.concatenate([train, test])[:, 0, 0, 0])
    np.testing.assert_array_equal(values, (np.arange(50) * 5 + 9).astype(np.float32) / np.float32(255))


def test_splits_can_be_chosen(data_dir):
    loaded = load("digits", splits=("train[:100]", "train[100:110]"), data_dir=data_dir)
    assert (len(_all(loaded.train)[0]), len(_all(loaded.test)[0])) == (100, 10)


def test_images_of_many_sizes_are_resized_in_float32(tmp_path):
    loaded = load("many_sizes_images", image_size=(6, 7), data_dir=tmp_path)
    images, _ = _all(loaded.train)
    assert loaded.image_shape == (6, 7, 3)
    assert images.shape == (8, 6, 7, 3)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, 0.2, rtol=1e-6)


def test_data_is_kept_where_tfds_data_dir_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    load("one_split_images")
    assert (tmp_path / "one_split_images" / "1.0.0" / "dataset_info.json").exists()


def test_prepared_data_is_not_prepared_again(tmp_path):
    load("one_split_images", data_dir=tmp_path)
    info = tmp_path / "one_split_images" / "1.0.0" / "dataset_info.json"
    before = info.stat()
    load("one_split_images", data_dir=tmp_path)
    assert (info.stat().st_ino, info.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_half_written_set_is_replaced(tmp_path):
    half = tmp_path / "one_split_images" / "1.0.0"
    half.mkdir(parents=True)
    (half / "one_split_images-train.tfrecord-00000-of-00001").write_bytes(b"half of a rec")
    assert len(_all(load("one_split_images", data_dir=tmp_path).train)[0]) == 40
    assert not list(tmp_path.glob(".preparing-*"))


def test_a_set_that_another_process_finished_first_is_kept(tmp_path):
    late = tfds.builder("one_split_images", data_dir=tmp_path)
    load("one_split_images", data_dir=tmp_path)
    marker = tmp_path / "one_split_images" / "1.0.0" / "from-the-first"
    marker.touch()
    image_classification._prepare("one_split_images", str(tmp_path), late)
    assert marker.exists()
    assert not list(tmp_path.glob(".preparing-*"))


def test_a_failed_preparation_leaves_nothing_behind_and_says_why(tmp_path):
    with pytest.raises(DatasetUnavailableError) as caught:
        load("broken_images", data_dir=tmp_path)
    assert str(caught.value).startswith(
        f"'broken_images' could not be prepared in {tmp_path} (the disk is on fire). Type --dataset digits for the set "
    )
    assert not (tmp_path / "broken_images").exists()
    assert not list(tmp_path.glob(".preparing-*"))


def test_two_processes_can_prepare_at_once_and_say_nothing(tmp_path):
    # Each waits for the other to begin, and they share a seed. tensorflow-datasets names its folder by Python's random
    # numbers, and would let both write to the same one.
    code = (
        "import pathlib, random, sys, time\n"
        "from examples.image_classification import load\n"
        "folder, here, there = map(pathlib.Path, sys.argv[1:])\n"
        "here.touch()\n"
        "while not there.exists(): time.sleep(0.01)\n"
        "random.seed(0)\n"
        "loaded = load('digits', data_dir=folder)\n"
        "next(iter(loaded.train))\n"
        "assert sum(len(labels) for _, labels in loaded.train) == 1438\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "data", tmp_path / here, tmp_path / there],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for here, there in (("one", "two"), ("two", "one"))
    ]
    results = [(*map(without_banner, process.communicate(timeout=120)), process.returncode) for process in processes]
    assert results == [("", "", 0)] * 2
    assert not list((tmp_path / "data").glob(".preparing-*"))


def test_a_name_that_is_almost_right_gets_the_right_one(tmp_path):
    with pytest.raises(DatasetNotFoundError) as caught:
        load("cifar-10", data_dir=tmp_path)
    assert re.fullmatch(
        r"There is no dataset 'cifar-10' among the \d+ of tensorflow-datasets\. Did you mean 'cifar10'\? Type "
        r"--dataset cifar10, or --dataset digits for the set that needs no download\. "
        r"https://www\.tensorflow\.org/datasets/catalog/overview lists them all\.",
        str(caught.value),
    )
    assert isinstance(caught.value, DatasetError | ValueError)


def test_a_name_like_no_other_gets_the_set_that_is_always_there(tmp_path):
    with pytest.raises(
        DatasetNotFoundError, match=r"There is no dataset 'qqqqq' .*tensorflow-datasets\. Type --dataset"
    ):
        load("qqqqq", data_dir=tmp_path)


def test_an_unknown_configuration_is_told_from_an_unknown_name(tmp_path):
    with pytest.raises(DatasetNotFoundError) as caught:
        load("mnist/bold", data_dir=tmp_path)
    assert str(caught.value) == (
        "tensorflow-datasets has 'mnist', but not as 'mnist/bold'. Expected `name`, `name/configuration` or "
        "`name:version`. Type, for example, --dataset mnist."
    )


@pytest.mark.usefixtures("no_network")
def test_a_set_that_cannot_be_downloaded_is_refused_before_tensorflow_datasets_tries_for_minutes(tmp_path):
    with pytest.raises(DatasetUnavailableError) as caught:
        load("mnist", data_dir=tmp_path / "data")
    folder = tmp_path / "data"
    assert str(caught.value) == (
        f"'mnist' is not prepared in {folder}, and it cannot be downloaded here: storage.googleapis.com cannot be "
        "reached (Connection refused). Type --dataset digits for the set that needs no download, or prepare this one "
        "on a machine with a network, copy its folder of prepared data here and set TFDS_DATA_DIR to it (now "
        f"{folder})."
    )
    assert isinstance(caught.value, FileNotFoundError)
    assert not folder.exists()


@pytest.mark.usefixtures("no_network")
def test_digits_need_no_network(tmp_path):
    assert load("digits", data_dir=tmp_path).num_test == 359


def test_a_set_of_texts_is_refused_before_it_is_downloaded(tmp_path):
    with pytest.raises(NotImageClassificationError) as caught:
        load("imdb_reviews", data_dir=tmp_path)
    assert str(caught.value) == (
        "'imdb_reviews' is not an image-classification set: it has 'text' of Text(shape=(), dtype=string) with 'label' "
        "of ClassLabel(shape=(), dtype=int64, num_classes=2). Expected an Image of whole numbers with a ClassLabel, as "
        "in mnist or cifar10. Type --dataset digits for one that needs no download."
    )


def test_images_of_many_sizes_ask_for_one(tmp_path):
    with pytest.raises(NotImageClassificationError) as caught:
        load("many_sizes_images", data_dir=tmp_path)
    assert str(caught.value) == (
        "The images of 'many_sizes_images' have the shape (None, None, 3), so they differ in size and make no batch. "
        "Expected one size. Give one to load(), for example image_size=(224, 224)."
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DatasetUnavailableError) as caught:
        load("digits", data_dir=file)
    assert str(caught.value) == (
        f"'digits' has to be prepared first, and nothing can be written to {file} (File exists). Set the environment "
        "variable TFDS_DATA_DIR to a folder that can be written to."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1. Received: batch_size=0."),
        (
            {"image_size": (8, 0)},
            "`image_size` must be (height, width) in pixels, both at least 1. Received: image_size=(8, 0).",
        ),
        (
            {"batch_size": 2000, "drop_remainder": True},
            "`batch_size` must be at most the 1438 training images of 'digits' when `drop_remainder` is set, or no "
            "batch is left. Received: batch_size=2000.",
        ),
        (
            {"splits": ("train", "tests")},
            "`splits` must name two of ['test', 'train'] of 'digits', or slices such as 'train[:90%]'. Received: "
            "'tests'.",
        ),
        ({"splits": ("train", "test[:0]")}, "`splits` must hold examples, and 'test[:0]' of 'digits' is empty."),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message, data_dir):
    with pytest.raises(ArgumentError) as caught:
        load("digits", data_dir=data_dir, **arguments)
    assert str(caught.value) == message
