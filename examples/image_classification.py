"""Image-classification sets of tensorflow-datasets as input pipelines, for the examples.

`load()` takes any of them by name (`digits`, `mnist`, `cifar10`, ...) and returns float32 images in [0, 1]. A pipeline
never casts to half precision: the policy does, and float32 input is right under every policy.

```
DatasetError
├── DatasetNotFoundError (ValueError)                no dataset has that name
├── NotImageClassificationError (ValueError)         the dataset is not images with one class each
└── DatasetUnavailableError (FileNotFoundError)      the dataset is known, but not here, and cannot be made here
```
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import math
import os
import re
import ssl
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from keras_mp.errors import ArgumentError

# tensorflow-datasets needs importlib_resources to prepare a dataset and does not ask for it on Python 3.9 and later.
_MISSING = [name for name in ("tensorflow_datasets", "importlib_resources") if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ModuleNotFoundError(
        f'The examples need {" and ".join(_MISSING)}, not installed here. Type: pip install "keras-mp[examples]".',
        name=_MISSING[0],
    )

import numpy as np  # noqa: E402  (only after the check above is an absence explained)
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

from examples.datasets.digits import digits_dataset_builder as _digits  # noqa: E402, F401  (registers `digits`)

__all__ = [
    "DatasetError",
    "DatasetNotFoundError",
    "DatasetUnavailableError",
    "ImageSet",
    "NotImageClassificationError",
    "load",
]

_IN_MEMORY_BYTES = 2**30  # a larger split is read from disk in every epoch
_SHUFFLE_BUFFER = 10_000  # examples, for a split that is read from disk
_TIMEOUT = 10.0  # seconds to wait for a server's first reply


class DatasetError(Exception):
    """Base class of the errors about a dataset that `load` cannot return."""


class DatasetNotFoundError(DatasetError, ValueError):
    """No dataset has that name, configuration or version."""


class NotImageClassificationError(DatasetError, ValueError):
    """The dataset exists, but `load` cannot make it into images of one size with one class each."""


class DatasetUnavailableError(DatasetError, FileNotFoundError):
    """The dataset exists, but has not been prepared here and cannot be prepared now."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Input pipelines, and the shapes and names that a model is built with.

    Attributes:
        name: the dataset's name, as it was given.
        train: batches of (images, labels), shuffled anew in each epoch. Images are float32 of shape
            (batch, height, width, channels) in [0, 1], labels int32 of shape (batch,).
        test: the same, in a fixed order and always complete.
        image_shape: (height, width, channels).
        class_names: the name of each class, in the order of the labels.
        num_train: images in `train`, before any remainder is dropped.
        num_test: images in `test`.
    """

    name: str
    train: tf.data.Dataset
    test: tf.data.Dataset
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    num_train: int
    num_test: int

    @property
    def num_classes(self) -> int:
        """The number of classes; labels run from 0 to one less."""
        return len(self.class_names)


def load(
    name: str = "digits",
    batch_size: int = 32,
    *,
    image_size: tuple[int, int] | None = None,
    splits: tuple[str, str] | None = None,
    seed: int = 0,
    drop_remainder: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> ImageSet:
    """Loads an image-classification set of tensorflow-datasets, and prepares it first where that is needed.

    A split that takes less than 1 GiB is held in memory after the first read. A larger one is read from disk in every
    epoch.

    Args:
        name: a name of tensorflow-datasets, such as "mnist" or "cifar10", with a configuration or version if wanted
            ("emnist/letters"). "digits" is the UCI handwritten digits and needs no network.
        batch_size: images in a batch.
        image_size: (height, width) in pixels to which images are resized. Needed where images differ in size.
        splits: for training and testing, in the notation of tensorflow-datasets, for example
            ("train[:90%]", "train[90%:]"). By default "train", and "test" or "validation". Where there is neither, the
            last fifth of "train" is for testing.
        seed: fixes the order of the training images, together with TensorFlow's global seed.
        drop_remainder: whether to leave out a last training batch that is not full, so that every step has one shape.
        data_dir: where prepared datasets are kept. By default the environment variable `TFDS_DATA_DIR`, and where it
            is not set, `~/tensorflow_datasets`.

    Returns:
        An `ImageSet`. Images are divided by the largest value of a pixel. This is `max_value` in the dataset's metadata
        (16 for "digits"), or the largest value of the stored type (255 for uint8).

    Raises:
        DatasetNotFoundError: no dataset has that name.
        NotImageClassificationError: the dataset is not images with one class each, or they differ in size.
        DatasetUnavailableError: the dataset is not prepared here, and cannot be downloaded or written.
        ArgumentError: an argument out of range.

    Example:
        ```python
        digits = load("digits", batch_size=64)
        images, labels = next(iter(digits.train))
        ```
    """
    if batch_size < 1:
        raise ArgumentError(f"`batch_size` must be a whole number of at least 1. Received: batch_size={batch_size!r}.")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ArgumentError(
            f"`image_size` must be (height, width) in pixels, both at least 1. Received: image_size={image_size!r}."
        )
    tfds.disable_progress_bar()
    root = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"))
    builder = _builder(name, root)
    keys = _supervised_keys(name, builder)
    shape = _image_shape(name, builder.info.features[keys[0]], image_size)
    if not _is_prepared(builder.data_path):
        _prepare(name, root, builder)
        builder = _builder(name, root)  # one that has read what was written

    train_split, test_split = splits or _default_splits(name, builder)
    num_train, num_test = (_num_examples(name, builder, split) for split in (train_split, test_split))
    if drop_remainder and batch_size > num_train:
        raise ArgumentError(
            f"`batch_size` must be at most the {num_train} training images of {name!r} when `drop_remainder` is set, "
            f"or no batch is left. Received: batch_size={batch_size}."
        )
    max_value = _max_value(builder, keys[0])

    def normalize(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.cast(images, tf.float32) / max_value, tf.cast(labels, tf.int32)

    def pipeline(split: str, count: int, training: bool) -> tf.data.Dataset:
        dataset = _examples(builder, split, count, shape, image_size, seed if training else None)
        if training:
            dataset = dataset.shuffle(min(count, _SHUFFLE_BUFFER), seed=seed)
        dataset = dataset.batch(batch_size, drop_remainder=training and drop_remainder)
        return dataset.map(normalize, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    return ImageSet(
        name=name,
        train=pipeline(train_split, num_train, training=True),
        test=pipeline(test_split, num_test, training=False),
        image_shape=shape,
        class_names=tuple(builder.info.features[keys[1]].names),
        num_train=num_train,
        num_test=num_test,
    )


def _builder(name: str, root: str) -> Any:
    """Returns the builder of a dataset by name, or raises `DatasetNotFoundError`."""
    try:
        return tfds.builder(name, data_dir=root)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, ImportError) as error:
        # Community sets are left out: listing them takes a network.
        names = tfds.list_builders(with_community_datasets=False)
        base = re.split(r"[/:]", name)[0]
        if base in names:
            raise DatasetNotFoundError(
                f"tensorflow-datasets has {base!r}, but not as {name!r}. Expected `name`, `name/configuration` or "
                f"`name:version`. Type, for example, --dataset {base}."
            ) from error
        close = difflib.get_close_matches(re.sub(r"[^a-z0-9_]", "", base.lower()), names, n=1)
        advice = f"Did you mean {close[0]!r}? Type --dataset {close[0]}, or" if close else "Type"
        raise DatasetNotFoundError(
            f"There is no dataset {name!r} among the {len(names)} of tensorflow-datasets. {advice} --dataset digits "
            "for the set that needs no download. https://www.tensorflow.org/datasets/catalog/overview lists them all."
        ) from None


def _supervised_keys(name: str, builder: Any) -> tuple[str, str]:
    """Returns the names of the image and of the label, or raises `NotImageClassificationError`."""
    features = builder.info.features
    keys = builder.info.supervised_keys
    found = "no pair of input and label"
    if keys and len(keys) == 2 and all(isinstance(key, str) for key in keys):
        image, label = (features[key] for key in keys)
        if (
            isinstance(image, tfds.features.Image)
            and isinstance(label, tfds.features.ClassLabel)
            and np.issubdtype(image.np_dtype, np.integer)
            and label.num_classes
        ):
            return keys
        found = f"{keys[0]!r} of {image!r} with {keys[1]!r} of {label!r}"
    raise NotImageClassificationError(
        f"{name!r} is not an image-classification set: it has {found}. Expected an Image of whole numbers with a "
        "ClassLabel, as in mnist or cifar10. Type --dataset digits for one that needs no download."
    )


def _image_shape(name: str, image: Any, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Returns the shape of every image of the pipeline, after resizing."""
    height, width, channels = image.shape
    if image_size is not None:
        height, width = image_size
    if height is None or width is None or channels is None:
        raise NotImageClassificationError(
            f"The images of {name!r} have the shape {image.shape}, so they differ in size and make no batch. Expected "
            "one size. Give one to load(), for example image_size=(224, 224)."
        )
    return int(height), int(width), int(channels)


def _max_value(builder: Any, key: str) -> float:
    """Returns the largest value of a pixel, from the metadata or from the stored type."""
    stated = (builder.info.metadata or {}).get("max_value")
    return float(stated if stated is not None else np.iinfo(builder.info.features[key].np_dtype).max)


def _default_splits(name: str, builder: Any) -> tuple[str, str]:
    """Returns the default splits for training and testing."""
    names = set(builder.info.splits)
    if "train" not in names:
        raise NotImageClassificationError(
            f"{name!r} has no split 'train', only {sorted(names)}. Say which ones to train and to test on with "
            "load(..., splits=(train, test))."
        )
    for test in ("test", "validation"):
        if test in names:
            return "train", test
    return "train[:80%]", "train[80%:]"


def _num_examples(name: str, builder: Any, split: str) -> int:
    """Returns the number of examples in a split, or raises `ArgumentError`."""
    try:
        count = int(builder.info.splits[split].num_examples)
    except (KeyError, ValueError) as error:
        raise ArgumentError(
            f"`splits` must name two of {sorted(builder.info.splits)} of {name!r}, or slices such as 'train[:90%]'. "
            f"Received: {split!r}."
        ) from error
    if not count:
        raise ArgumentError(f"`splits` must hold examples, and {split!r} of {name!r} is empty.")
    return count


def _examples(
    builder: Any,
    split: str,
    count: int,
    shape: tuple[int, int, int],
    image_size: tuple[int, int] | None,
    seed: int | None,
) -> tf.data.Dataset:
    """Returns the (image, label) pairs of a split, from memory where they fit.

    They are held as tensors rather than by `Dataset.cache`, which warns when a reader stops before the end.
    """
    stored = builder.info.features[builder.info.supervised_keys[0]].np_dtype
    value_bytes = 4 if image_size else np.dtype(stored).itemsize
    in_memory = count * math.prod(shape) * value_bytes < _IN_MEMORY_BYTES
    dataset = builder.as_dataset(
        split=split,
        as_supervised=True,
        shuffle_files=seed is not None and not in_memory,
        read_config=tfds.ReadConfig(try_autocache=False, shuffle_seed=seed),
    )
    if image_size:
        dataset = dataset.map(
            lambda image, label: (tf.image.resize(image, image_size, antialias=True), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    if in_memory:
        return tf.data.Dataset.from_tensor_slices(dataset.batch(count).get_single_element())
    return dataset


def _is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether a whole dataset stands there: `dataset_info.json` is the last file to be written."""
    return os.path.exists(os.path.join(path, "dataset_info.json"))


def _prepare(name: str, root: str, builder: Any) -> None:
    """Downloads and writes a dataset, so that others see the whole of it or nothing.

    It is written in a temporary folder, and moved when it is complete. tensorflow-datasets does so too, but names its
    folder by Python's random numbers. Two processes with one seed would write to the same folder.
    """
    _require_network(name, root, builder)
    target = Path(builder.data_path)
    try:
        os.makedirs(root, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=".preparing-", dir=root)
    except OSError as error:
        raise DatasetUnavailableError(
            f"{name!r} has to be prepared first, and nothing can be written to {root} ({error.strerror}). Set the "
            "environment variable TFDS_DATA_DIR to a folder that can be written to."
        ) from error
    with staging as folder:
        staged = _builder(name, folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it downloads and where to
                staged.download_and_prepare(download_dir=os.path.join(root, "downloads"))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DatasetUnavailableError(
                f"{name!r} could not be prepared in {root} ({reason}). {_advice(root)}"
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(staged.data_path, target)
        except OSError:
            if _is_prepared(target):
                return  # another process was first, and wrote the same
            os.rename(target, os.path.join(folder, "half-written"))
            os.rename(staged.data_path, target)


def _require_network(name: str, root: str, builder: Any) -> None:
    """Raises `DatasetUnavailableError` where the server of a dataset cannot be reached.

    tensorflow-datasets would try eleven times, which takes more than three minutes.
    """
    url = next((url for url in builder.url_infos or () if url.startswith("http")), None)
    if url is None:
        return
    host = urllib.parse.urlparse(url).netloc
    try:
        opener = urllib.request.build_opener()  # a new one, which reads the proxy settings as they are now
        with opener.open(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT):
            return
    except urllib.error.HTTPError as error:  # any reply shows that the server is there
        error.close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # tensorflow-datasets has its own certificates
        raise DatasetUnavailableError(
            f"{name!r} is not prepared in {root}, and it cannot be downloaded here: {host} cannot be reached "
            f"({getattr(reason, 'strerror', None) or reason}). {_advice(root)}"
        ) from error


def _advice(root: str) -> str:
    """Says what to type where a dataset is missing."""
    return (
        "Type --dataset digits for the set that needs no download, or prepare this one on a machine with a network, "
        f"copy its folder of prepared data here and set TFDS_DATA_DIR to it (now {root})."
    )
