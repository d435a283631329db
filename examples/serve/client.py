r"""Sends requests to a model server, by REST or by gRPC.

python -m examples.serve.client saved_models/digits/1 --rest http://127.0.0.1:8501
python -m examples.serve.client saved_models/digits/1 --grpc 127.0.0.1:8500

It sends the sample rows in the export, and compares the outputs with the sample outputs there. The server is TensorFlow
Serving. It was not run for this example:

docker run --rm -p 8500:8500 -p 8501:8501 -e MODEL_NAME=digits \
    -v "$PWD/saved_models/digits:/models/digits" tensorflow/serving

or the double of it, `python -m examples.serve.double saved_models/digits`.
"""

import base64
import json
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import typer

__all__ = ["ServerError", "ask_grpc", "ask_rest"]


class ServerError(RuntimeError):
    """The reason why the server returned no outputs."""


def ask_rest(
    url: str, name: str, inputs: Mapping[str, np.ndarray], signature: str = "serving_default", timeout: float = 30
) -> dict[str, np.ndarray]:
    """Predicts through the REST interface, in its column format.

    Args:
        url: the server, such as "http://127.0.0.1:8501".
        name: the model's name there.
        inputs: arrays by the signature's names.
        signature: which one.
        timeout: in seconds.

    Returns:
        Arrays by the names of the outputs. JSON has no dtypes: floats come as float64, integers as int64.

    Raises:
        ServerError: the server refuses, with its reason.
    """
    columns = {key: _for_json(array) for key, array in inputs.items()}
    content = json.dumps({"signature_name": signature, "inputs": columns}).encode()
    request = urllib.request.Request(f"{url}/v1/models/{name}:predict", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            outputs = json.load(response)["outputs"]
    except urllib.error.HTTPError as error:
        raise ServerError(f"{error.code}: {json.loads(error.read())['error']}") from error
    # An only output comes without its name.
    if not isinstance(outputs, dict):
        return {"": np.asarray(outputs)}
    return {key: np.asarray(value) for key, value in outputs.items()}


def ask_grpc(
    address: str, name: str, inputs: Mapping[str, np.ndarray], signature: str = "serving_default", timeout: float = 30
) -> dict[str, np.ndarray]:
    """Predicts through the gRPC interface, which sends tensors as bytes.

    Args:
        address: host and port of the server, such as "127.0.0.1:8500".
        name: the model's name there.
        inputs: arrays by the signature's names.
        signature: which one.
        timeout: in seconds.

    Raises:
        ServerError: the server refuses, with its reason.
    """
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, array in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(array, shape=array.shape))
    with grpc.insecure_channel(address) as channel:
        try:
            answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=timeout)
        except grpc.RpcError as error:
            raise ServerError(f"{error.code().name}: {error.details()}") from error
    return {key: tf.make_ndarray(tensor) for key, tensor in answer.outputs.items()}


def _for_json(array: np.ndarray) -> Any:
    if array.dtype.kind in "SUO":
        texts = [text if isinstance(text, bytes) else str(text).encode() for text in array.ravel().tolist()]
        encoded = np.empty(len(texts), object)
        encoded[:] = [{"b64": base64.b64encode(text).decode()} for text in texts]
        return encoded.reshape(array.shape).tolist()
    return array.tolist()


def main(
    version: Annotated[pathlib.Path, typer.Argument(help="A version, such as saved_models/digits/1.")],
    rest: Annotated[str | None, typer.Option(help="Address of the REST interface.")] = None,
    grpc: Annotated[str | None, typer.Option(help="Host and port of the gRPC interface.")] = None,
) -> None:
    """Send the sample rows of an export to a server, and compare its outputs with the sample outputs."""
    from keras_mp.exporting.sample import read_sample

    inputs, answers = read_sample(version)
    name = version.resolve().parent.name
    if rest is None and grpc is None:
        rest = "http://127.0.0.1:8501"
    for signature, rows in inputs.items():
        found = ask_rest(rest, name, rows, signature) if rest else ask_grpc(str(grpc), name, rows, signature)
        for key, expected in answers[signature].items():
            answer = found.get(key, found.get(""))
            error = np.abs(np.asarray(answer, "float64") - expected).max()
            typer.echo(f"{signature} {key}: largest difference from what the export answered when written {error:.2g}")


if __name__ == "__main__":
    typer.run(main)
