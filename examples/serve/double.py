"""A double of TensorFlow Serving, to try clients on. It serves an export by TensorFlow Serving's JSON rules.

python -m examples.serve.double saved_models/digits            # REST on 127.0.0.1:8501, gRPC on 127.0.0.1:8500

It is no server for real use: it has no batching, no warm-up, and no watch for new versions. Like TensorFlow Serving it
has the addresses, the two formats of a request ("instances" and "inputs"), the dtypes of JSON, and base64 for bytes.
Errors are {"error": ...} with a status of 400, 404 or 501. It needs TensorFlow alone.
"""

import base64
import contextlib
import http.server
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import typer

__all__ = ["Double", "RefusedError"]

# What util/json_tensor.cc of TensorFlow Serving converts.
DTYPES = {
    *("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "bool", "string"),
}


class RefusedError(Exception):
    """A request that gets an error.

    Args:
        status: the HTTP status.
        message: the text of the error.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Double:
    """A model server on 127.0.0.1 for one model, its highest version.

    Args:
        folder: the model's folder, such as "saved_models/digits".
        port: of the REST interface; 0 for a free one.
    """

    def __init__(self, folder: pathlib.Path, port: int = 0) -> None:
        self.name = folder.resolve().name
        # As TensorFlow Serving does: any child folder whose name is an integer is a version.
        self.version = max(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
        self.loaded = tf.saved_model.load(str(folder / str(self.version)))
        handler = type("Handler", (_Handler,), {"double": self})
        self.rest = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)

    @property
    def url(self) -> str:
        """The address of the REST interface."""
        return f"http://127.0.0.1:{self.rest.server_port}"

    @contextlib.contextmanager
    def listening(self) -> Iterator["Double"]:
        """Serves REST in other threads while the block runs."""
        thread = threading.Thread(target=self.rest.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.rest.shutdown()
            self.rest.server_close()
            thread.join()

    @contextlib.contextmanager
    def listening_grpc(self, port: int = 0) -> Iterator[str]:
        """Serves gRPC while the block runs. Yields host and port."""
        from concurrent import futures

        import grpc
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

        double = self

        class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
            def Predict(self, request: Any, context: Any) -> Any:  # noqa: N802  (the name in the protocol)
                spec = request.model_spec
                try:
                    given = {key: tf.make_ndarray(tensor) for key, tensor in request.inputs.items()}
                    answers = double.call(spec.name, spec.signature_name or "serving_default", given)
                except RefusedError as refused:
                    code = grpc.StatusCode.NOT_FOUND if refused.status == 404 else grpc.StatusCode.INVALID_ARGUMENT
                    context.abort(code, str(refused))
                response = predict_pb2.PredictResponse()
                response.model_spec.name = double.name
                response.model_spec.version.value = double.version
                for key, tensor in answers.items():
                    response.outputs[key].CopyFrom(tf.make_tensor_proto(tensor))
                return response

        server = grpc.server(futures.ThreadPoolExecutor(4))
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(grace=None).wait()

    def call(self, name: str, signature: str, given: dict[str, Any]) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
            name: the model's, as the request has it.
            signature: its name.
            given: inputs by name.

        Raises:
            RefusedError: there is no such model or signature, or the inputs are not those of the signature.
        """
        if name != self.name:
            raise RefusedError(404, f"Servable not found for request: Latest({name})")
        if signature not in self.loaded.signatures:
            raise RefusedError(400, f"Serving signature name: {signature!r} not found in signature def")
        function = self.loaded.signatures[signature]
        specs = function.structured_input_signature[1]
        if set(given) != set(specs):
            raise RefusedError(400, f"input size does not match signature: {sorted(given)} != {sorted(specs)}")
        try:
            tensors = {key: tf.constant(given[key], spec.dtype) for key, spec in specs.items()}
            for key, tensor in tensors.items():
                # On some CPUs TensorFlow's convolution ends the process over an input of another rank.
                if not specs[key].shape.is_compatible_with(tensor.shape):
                    raise ValueError(f"{key} has the shape {tensor.shape}, expected {specs[key].shape}")
            return {key: answer.numpy() for key, answer in function(**tensors).items()}
        except (tf.errors.InvalidArgumentError, TypeError, ValueError) as error:
            raise RefusedError(400, str(error).splitlines()[0]) from error

    def predict(self, name: str, content: bytes) -> dict[str, Any]:
        """Returns the reply to a request in JSON.

        Args:
            name: the model's.
            content: the request's body.

        Raises:
            RefusedError: it is not one.
        """
        try:
            request = json.loads(content)
        except ValueError as error:
            raise RefusedError(400, f"JSON Parse error: {error}") from error
        rows, columns = "instances" in request, "inputs" in request
        if rows == columns:
            raise RefusedError(400, "Request must have one of 'instances' (row format) and 'inputs' (column format)")
        signature = request.get("signature_name", "serving_default")
        if name == self.name and signature in self.loaded.signatures:
            self._refuse_dtypes(signature)
        specs = self._specs(signature)
        given = _by_rows(request["instances"], specs) if rows else _by_columns(request["inputs"], specs)
        answers = self.call(name, signature, {key: _array(key, value, specs) for key, value in given.items()})
        values = {key: _for_json(key, array) for key, array in answers.items()}
        if columns:
            return {"outputs": next(iter(values.values())) if len(values) == 1 else values}
        counts = {array.shape[:1] for array in answers.values()}
        if len(counts) != 1 or () in counts:
            raise RefusedError(400, "Tensors of different batch sizes cannot be converted to the row format")
        if len(values) == 1:
            return {"predictions": next(iter(values.values()))}
        return {"predictions": [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]}

    def _specs(self, signature: str) -> dict[str, tf.TensorSpec]:
        if signature not in self.loaded.signatures:
            raise RefusedError(400, f"Serving signature name: {signature!r} not found in signature def")
        return dict(self.loaded.signatures[signature].structured_input_signature[1])

    def _refuse_dtypes(self, signature: str) -> None:
        function = self.loaded.signatures[signature]
        for key, spec in function.structured_input_signature[1].items():
            if spec.dtype.name not in DTYPES:
                raise RefusedError(501, f"Conversion of JSON Value of {key} to type: {spec.dtype.name}")


def _by_rows(instances: Any, specs: dict[str, tf.TensorSpec]) -> dict[str, list[Any]]:
    if not isinstance(instances, list) or not instances:
        raise RefusedError(400, "'instances' must be a list with a value in it")
    # An object is a row by names, but {"b64": ...} is a value.
    if not all(isinstance(row, dict) and set(row) != {"b64"} for row in instances):
        if len(specs) != 1:
            raise RefusedError(
                400, f"instances is a plain list, but expecting list of objects as multiple inputs: {len(specs)}"
            )
        return {next(iter(specs)): instances}
    if any(set(row) != set(instances[0]) for row in instances):
        raise RefusedError(400, "Every instance must have the same inputs")
    return {key: [row[key] for row in instances] for key in instances[0]}


def _by_columns(inputs: Any, specs: dict[str, tf.TensorSpec]) -> dict[str, Any]:
    if isinstance(inputs, dict) and set(inputs) != {"b64"}:
        return inputs
    if len(specs) != 1:
        raise RefusedError(
            400, f"inputs is a plain value/list, but expecting an object as multiple inputs: {len(specs)}"
        )
    return {next(iter(specs)): inputs}


def _array(key: str, value: Any, specs: dict[str, tf.TensorSpec]) -> Any:
    if key not in specs:
        raise RefusedError(400, f"JSON object: does not have named input: {key}")
    dtype = specs[key].dtype
    _refuse_values(key, value, dtype)
    try:
        return np.asarray(_decoded(value), object if dtype == tf.string else dtype.as_numpy_dtype)
    except (ValueError, OverflowError) as error:
        raise RefusedError(400, f"{key}: Encountered list at unexpected size: {error}") from error


def _refuse_values(key: str, value: Any, dtype: tf.DType) -> None:
    if isinstance(value, list):
        for each in value:
            _refuse_values(key, each, dtype)
        return
    if dtype == tf.string:
        good = isinstance(value, str) or (isinstance(value, dict) and set(value) == {"b64"})
    elif dtype == tf.bool:
        good = isinstance(value, bool)
    else:
        good = isinstance(value, (int, float) if dtype.is_floating else int) and not isinstance(value, bool)
    if not good:
        raise RefusedError(400, f"JSON Value: {json.dumps(value)} of {key} is not of expected type: {dtype.name}")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, dict):
        return base64.b64decode(value["b64"])
    return value.encode() if isinstance(value, str) else value


def _for_json(key: str, array: np.ndarray) -> Any:
    name = "string" if array.dtype == object else array.dtype.name
    if name not in DTYPES:
        raise RefusedError(400, f"Tensor {key} of type {name} cannot be converted to JSON")
    if array.dtype != object:
        return array.tolist()
    if key.endswith("_bytes"):
        encode = np.frompyfunc(lambda text: {"b64": base64.b64encode(text).decode()}, 1, 1)
        return encode(array).tolist()
    return np.frompyfunc(lambda text: text.decode(), 1, 1)(array).tolist()


class _Handler(http.server.BaseHTTPRequestHandler):
    double: Double
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, verb = self.path.removeprefix("/v1/models/").partition(":")
        self._answer(lambda: self.double.predict(self._name(path), content) if verb == "predict" else self._malformed())

    def do_GET(self) -> None:
        path, _, rest = self.path.removeprefix("/v1/models/").partition("/metadata")
        self._answer(lambda: self._malformed() if rest else self._status(self._name(path)))

    def _name(self, path: str) -> str:
        if not self.path.startswith("/v1/models/"):
            self._malformed()
        name, _, version = path.partition("/versions/")
        if version and version != str(self.double.version):
            raise RefusedError(404, f"Servable not found for request: Specific({name}, {version})")
        return name

    def _status(self, name: str) -> dict[str, Any]:
        if name != self.double.name:
            raise RefusedError(404, f"Could not find any versions of model {name}")
        status = {"error_code": "OK", "error_message": ""}
        return {"model_version_status": [{"version": str(self.double.version), "state": "AVAILABLE", "status": status}]}

    def _malformed(self) -> Any:
        raise RefusedError(404, f"Malformed request: {self.command} {self.path}")

    def _answer(self, make: Any) -> None:
        try:
            status, answer = 200, make()
        except RefusedError as refused:
            status, answer = refused.status, {"error": str(refused)}
        content = json.dumps(answer, indent=4).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def main(
    folder: Annotated[pathlib.Path, typer.Argument(help="The model's folder, such as saved_models/digits.")],
    rest: Annotated[int, typer.Option(help="Port of the REST interface.")] = 8501,
    grpc: Annotated[int, typer.Option(help="Port of the gRPC interface.")] = 8500,
) -> None:
    """Serve an export on 127.0.0.1 as TensorFlow Serving would, to try clients on."""
    double = Double(folder, rest)
    with double.listening(), double.listening_grpc(grpc) as address:
        typer.echo(
            f"{double.name} version {double.version} at {double.url} and, by gRPC, at {address}. Ctrl-C ends it."
        )
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    typer.run(main)
