"""The UCI handwritten digits that scikit-learn ships, as a tensorflow-datasets builder."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

__all__ = ["Builder"]

_CLASSES = 10
_MAX_VALUE = 16  # a value counts the pixels that are on in a block of 4 by 4


def _in_test(labels: np.ndarray) -> np.ndarray:
    """Marks the test images: of each class, in the given order, the third and every fifth one after it.

    Args:
        labels: the class of each image, of shape (images,).

    Returns:
        A boolean array of the same shape, True for a fifth of each class.
    """
    test = np.zeros(labels.shape, bool)
    for label in range(_CLASSES):
        test[np.flatnonzero(labels == label)[2::5]] = True
    return test


class Builder(tfds.core.GeneratorBasedBuilder):
    """The dataset `digits`: 1,797 handwritten digits of 8 by 8 pixels, made without a download.

    Example:
        ```python
        import tensorflow_datasets as tfds
        from examples.datasets.digits import digits_dataset_builder  # registers the name
        train = tfds.load("digits", split="train", as_supervised=True)
        ```
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": "The 1,797 images of scikit-learn, a fifth of each digit in `test`."
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=_CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            license="CC BY 4.0",
            metadata=tfds.core.MetadataDict(max_value=_MAX_VALUE),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples(test=False), "test": self._generate_examples(test=True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        # Imported late: a set that has been prepared is read without scikit-learn.
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = digits.images.astype(np.uint8)[..., np.newaxis]
        for index in np.flatnonzero(_in_test(digits.target) == test).tolist():
            yield index, {"image": images[index], "label": int(digits.target[index])}
