"""Checks that the installed TensorFlow and Keras are ones that keras_mp works with."""

import os
import sys

from keras_mp.errors import MissingTensorFlowError

__all__ = ["require_tensorflow"]


def require_tensorflow() -> None:
    """Imports TensorFlow, then Keras on it.

    Raises:
        MissingTensorFlowError: if one of them is missing or unfit. The message says what to type.
    """
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "tensorflow":
            raise
        raise MissingTensorFlowError(
            "keras_mp needs TensorFlow 2.20 or 2.21, and no `tensorflow` is installed here. Install it with the extra "
            'for your hardware: pip install "keras-mp[cpu]", pip install "keras-mp[gpu]" (NVIDIA, Linux) or '
            'pip install "keras-mp[tpu]" (Cloud TPU virtual machine).'
        ) from None
    found = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if found < (2, 20):
        raise MissingTensorFlowError(
            f"keras_mp needs TensorFlow 2.20 or 2.21, and {tf.__version__} is installed here. Upgrade it with the "
            'extra for your hardware, for example: pip install --upgrade "keras-mp[cpu]".'
        )
    # If the backend is not installed, Keras's own error would name the backend's package instead.
    asked = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if asked == "tensorflow" or "keras" in sys.modules:
        import keras

        asked = keras.backend.backend()
    if asked != "tensorflow":
        raise MissingTensorFlowError(
            f"keras_mp works with Keras on TensorFlow, and Keras runs on {asked!r} here. Set the "
            'environment variable KERAS_BACKEND="tensorflow" (or "backend": "tensorflow" in ~/.keras/keras.json) '
            "before the first `import keras`."
        )
