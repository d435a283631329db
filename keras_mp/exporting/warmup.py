"""Requests that TensorFlow Serving answers to itself before it takes others, so that the first of these is not slow."""

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_mp.errors import ExportError

__all__ = ["available", "write_requests"]

FILE = "assets.extra/tf_serving_warmup_requests"


def available(wanted: bool | None) -> bool:
    """Whether requests can be written.

    Args:
        wanted: True to insist, False for none, None for where tensorflow-serving-api is installed.

    Raises:
        ExportError: they were asked for, and tensorflow-serving-api is not installed.
    """
    found = importlib.util.find_spec("tensorflow_serving") is not None
    if wanted and not found:
        raise ExportError(
            "Warm-up requests are made by tensorflow-serving-api, which is not installed. Type "
            "pip install 'keras-mp[serving]', or warmup_requests=False."
        )
    return found and wanted is not False


def write_requests(path: pathlib.Path, name: str, requests: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> None:
    """Writes requests where TensorFlow Serving looks for them.

    Args:
        path: the SavedModel's folder.
        name: the model's name on the server.
        requests: for each the name of a signature and its inputs by name.
    """
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    file = path / FILE
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for signature, inputs in requests:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = name
            request.model_spec.signature_name = signature
            for key, array in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(array, shape=array.shape))
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString())
