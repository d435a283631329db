"""The classes and the reader of TensorFlow Lite's file format."""

from typing import Any

__all__ = [
    "lite_bytes",
    "lite_model",
    "lite_schema",
]


# The classes and the reader of TensorFlow Lite's file format have no public name. They are imported late because few
# users write such files.
def lite_schema() -> Any:
    """Returns the module with the classes of TensorFlow Lite's file format."""
    from tensorflow.lite.python import schema_py_generated

    return schema_py_generated


def lite_model(content: bytes) -> Any:
    """Returns the content of a TensorFlow Lite file as objects that can be changed."""
    from tensorflow.lite.tools import flatbuffer_utils

    return flatbuffer_utils.convert_bytearray_to_object(bytearray(content))


def lite_bytes(model: Any) -> bytes:
    """Returns the content of a file for the result of `lite_model`."""
    from tensorflow.lite.tools import flatbuffer_utils

    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
