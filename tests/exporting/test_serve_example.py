"""The client in examples/serve against the double of TensorFlow Serving, and the double against the server's rules."""

import json
import urllib.error
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf
from typer.testing import CliRunner

import keras_mp
from examples.serve import client, load
from examples.serve.client import ServerError, ask_grpc, ask_rest
from examples.serve.double import Double
from tests.helpers import serving_models


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Doubles for three models, by name, each with its model and a batch."""
    doubles = {}
    for maker in (serving_models.digits, serving_models.detector, serving_models.strings):
        model = serving_models.make(maker, "mixed_bfloat16")
        folder = tmp_path_factory.mktemp("served") / model.name
        batch = serving_models.batch_for(model)
        keras_mp.export(model, folder, precision="float32", verify=False)
        doubles[model.name] = (Double(folder), keras_mp.convert(model, "float32"), batch, folder)
    with doubles["digits"][0].listening(), doubles["detector"][0].listening(), doubles["strings"][0].listening():
        yield doubles


def answers_of(model, batch):
    flat = [tf.constant(batch[tensor.name]) for tensor in model.inputs]
    answers = model(keras.tree.pack_sequence_as(model.input, flat))
    return answers if isinstance(answers, dict) else {model.output_names[0]: answers}


@pytest.mark.parametrize("name", ["digits", "detector", "strings"])
def test_the_client_gets_the_models_answers_through_both_interfaces(name, served):
    double, model, batch, _ = served[name]
    expected = answers_of(model, batch)
    by_rest = ask_rest(double.url, name, batch)
    assert set(by_rest) == (set(expected) if len(expected) > 1 else {""})
    pytest.importorskip("tensorflow_serving.apis.predict_pb2")
    with double.listening_grpc() as address:
        by_grpc = ask_grpc(address, name, batch)
        with pytest.raises(ServerError, match="NOT_FOUND: Servable not found for request: Latest"):
            ask_grpc(address, "other", batch)
        with pytest.raises(ServerError, match="INVALID_ARGUMENT: input size does not match signature"):
            ask_grpc(address, name, {})
    assert set(by_grpc) == set(expected)
    for key, answer in expected.items():
        assert by_grpc[key].dtype == (np.int32 if key == "count" else np.float32)
        np.testing.assert_allclose(by_grpc[key], answer, rtol=0, atol=1e-5)
        np.testing.assert_allclose(by_rest.get(key, by_rest.get("")), answer, rtol=0, atol=1e-5)


def ask(url, content=None):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_rows_and_columns(served):
    double, model, batch, _ = served["detector"]
    url = f"{double.url}/v1/models/detector"
    rows = batch["image"].tolist()
    expected = answers_of(model, batch)
    for request in ({"instances": rows}, {"instances": [{"image": row} for row in rows]}):
        status, answer = ask(f"{url}:predict", json.dumps(request).encode())
        assert status == 200
        assert [set(row) for row in answer["predictions"]] == [{"boxes", "scores", "count"}] * 3
        assert [row["count"] for row in answer["predictions"]] == expected["count"].numpy().tolist()
    status, answer = ask(f"{url}/versions/1:predict", json.dumps({"inputs": {"image": rows}}).encode())
    np.testing.assert_allclose(answer["outputs"]["boxes"], expected["boxes"], rtol=0, atol=1e-5)
    status, answer = ask(url)
    assert (status, answer["model_version_status"][0]["state"]) == (200, "AVAILABLE")


@pytest.mark.parametrize(
    ("path", "request_", "status", "message"),
    [
        ("digits:predict", "{", 400, "JSON Parse error"),
        ("digits:predict", {}, 400, "Request must have one of 'instances'"),
        ("digits:predict", {"instances": [], "inputs": []}, 400, "Request must have one of 'instances'"),
        ("digits:predict", {"instances": []}, 400, "must be a list with a value in it"),
        ("digits:predict", {"instances": [[["a"]]]}, 400, 'JSON Value: "a" of image is not of expected type: float32'),
        ("digits:predict", {"instances": [[1.0], [1.0, 2.0]]}, 400, "Encountered list at unexpected size"),
        ("digits:predict", {"instances": [{"picture": 1}]}, 400, "does not have named input: picture"),
        ("digits:predict", {"inputs": [[1.0]]}, 400, "image has the shape (1, 1), expected (None, 8, 8, 1)"),
        ("digits:predict", {"signature_name": "x", "inputs": [1.0]}, 400, "Serving signature name: 'x' not found"),
        ("other:predict", {"instances": [1.0]}, 404, "Servable not found for request: Latest(other)"),
        ("digits/versions/7:predict", {"instances": [1.0]}, 404, "Specific(digits, 7)"),
        ("digits:classify", {"instances": [1.0]}, 404, "Malformed request"),
        ("other", None, 404, "Could not find any versions of model other"),
    ],
)
def test_what_the_server_refuses(path, request_, status, message, served):
    double = served["digits"][0]
    content = request_ if request_ is None or isinstance(request_, str) else json.dumps(request_)
    found, answer = ask(f"{double.url}/v1/models/{path}", content and content.encode())
    assert found == status
    assert set(answer) == {"error"}
    assert message in answer["error"]


@pytest.mark.stock_defect
def test_a_stock_export_of_a_mixed_model_answers_in_json(tmp_path):
    model = serving_models.make(serving_models.recommender, "mixed_bfloat16")
    model.export(tmp_path / "stock" / "1", verbose=False)
    batch = serving_models.batch_for(model)
    with Double(tmp_path / "stock").listening() as double:
        specs = double.loaded.signatures["serving_default"].structured_input_signature[1]
        inputs = dict(zip(specs, ([[1]] for _ in batch), strict=True))
        status, answer = ask(f"{double.url}/v1/models/stock:predict", json.dumps({"inputs": inputs}).encode())
    assert status == 200, answer


def test_the_programs(served, tmp_path):
    """What a user types: the client with an export's own rows, and a load run."""
    import typer

    folder = served["digits"][3]
    double = served["digits"][0]
    app = typer.Typer()
    app.command()(client.main)
    result = CliRunner().invoke(app, [str(folder / "1"), "--rest", double.url])
    assert result.exit_code == 0, result.output
    assert (
        "serving_default probabilities: largest difference from what the export answered when written" in result.output
    )
    assert float(result.output.split()[-1]) < 1e-5
    app = typer.Typer()
    app.command()(load.main)
    result = CliRunner().invoke(app, [str(folder), "--clients", "2", "--requests", "5"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "│ 2       │ 10 " in result.output
