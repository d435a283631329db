"""The dataset builder of the digits keeps the contract of tensorflow-datasets, and the data of scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from examples.datasets.digits import digits_dataset_builder

SIZES = {"train": 1438, "test": 359}


class TestDigits(tfds.testing.DatasetBuilderTestCase):
    """The contract of tensorflow-datasets, with the real images. Nothing is downloaded, so no fakes are needed."""

    DATASET_CLASS = digits_dataset_builder.Builder
    SPLITS = SIZES
    EXAMPLE_DIR = Path(digits_dataset_builder.__file__).parent  # any folder: no file is read from it


def _rows(images, labels):
    """Returns a row for each example, with pixels and label, in a fixed order."""
    rows = np.concatenate([images.reshape(len(labels), 64), labels.reshape(-1, 1)], axis=1).astype(np.int64)
    return rows[np.lexsort(rows.T)]


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    tfds.disable_progress_bar()
    builder = digits_dataset_builder.Builder(data_dir=tmp_path_factory.mktemp("data"))
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def splits(builder):
    return {split: tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1)) for split in SIZES}


def test_the_splits_together_are_the_images_of_scikit_learn(splits):
    digits = load_digits()
    images, labels = (np.concatenate([splits[split][key] for split in SIZES]) for key in ("image", "label"))
    assert images.dtype == np.uint8
    assert images.shape == (1797, 8, 8, 1)
    np.testing.assert_array_equal(_rows(images, labels), _rows(digits.images, digits.target))


def _renamed(split):
    return {"images": split["image"], "labels": split["label"]}


def test_no_image_is_in_both_splits(splits):
    train, test = ({row.tobytes() for row in _rows(**_renamed(splits[split]))} for split in SIZES)
    assert len(train) == SIZES["train"]
    assert len(test) == SIZES["test"]
    assert not train & test


def test_each_split_has_a_fifth_of_each_digit(splits):
    total, test = np.bincount(load_digits().target), np.bincount(splits["test"]["label"])
    assert np.abs(test - total / 5).max() <= 0.5
    np.testing.assert_array_equal(np.bincount(splits["train"]["label"]), total - test)


def test_the_test_split_follows_the_documented_rule(splits):
    digits = load_digits()
    chosen = np.concatenate([np.flatnonzero(digits.target == digit)[2::5] for digit in range(10)])
    expected = _rows(digits.images[chosen], digits.target[chosen])
    np.testing.assert_array_equal(_rows(**_renamed(splits["test"])), expected)


def test_preparing_twice_gives_the_same_files(builder, tmp_path):
    again = digits_dataset_builder.Builder(data_dir=tmp_path)
    again.download_and_prepare()
    records = sorted(path.name for path in builder.data_path.glob("*.tfrecord*"))
    assert len(records) == 2
    for name in records:
        assert (again.data_path / name).read_bytes() == (builder.data_path / name).read_bytes()


def test_the_description_says_where_the_images_come_from(builder):
    info = builder.info
    assert info.name == "digits"
    assert info.supervised_keys == ("image", "label")
    assert info.metadata["max_value"] == load_digits().images.max()
    assert "UCI's **test** portion" in info.description
    assert "10.24432/C50P49" in info.citation
    assert info.homepage.startswith("https://archive.ics.uci.edu/dataset/80/")
    assert str(builder.version) in builder.RELEASE_NOTES
    assert builder.get_metadata().tags == ["content.data-type.image", "ml.task.image-classification"]
