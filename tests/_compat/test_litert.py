"""TensorFlow Lite's files. Each test fails with the private name in its docstring when that moves."""

import numpy as np

from keras_mp._compat import litert


def test_litert_files_are_read_and_written_as_objects():
    """Rests on `tensorflow.lite.python.schema_py_generated` and `tensorflow.lite.tools.flatbuffer_utils`."""
    schema = litert.lite_schema()
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT(), schema.BufferT()]
    model.buffers[1].data = np.arange(4, dtype=np.uint8)
    read = litert.lite_model(litert.lite_bytes(model))
    assert (read.version, bytes(read.buffers[1].data)) == (3, bytes(range(4)))
    assert (schema.TensorType.FLOAT16, schema.BuiltinOperator.DEQUANTIZE) == (1, 6)
