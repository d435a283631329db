"""What an export computes in and what it stores, its names and signatures, and what it refuses."""

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_mp
from keras_mp import hardware
from keras_mp.errors import ExportError, KerasMPWarning
from keras_mp.exporting.storage import holds
from tests.helpers import serving_models


def export(model, path, **keywords):
    return keras_mp.export(model, path, **{"verify": False, **keywords})


def record(path):
    return json.loads((path / "assets.extra" / "keras_mp.json").read_text())


def stored(path):
    """The variables in a SavedModel: dtype and shape, but for the count of saves."""
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    dtypes = reader.get_variable_to_dtype_map()
    return sorted(
        (dtypes[name].name, tuple(shape)) for name, shape in reader.get_variable_to_shape_map().items() if shape
    )


def serve(path, **inputs):
    loaded = tf.saved_model.load(str(path))
    return loaded.signatures["serving_default"](**{name: tf.constant(array) for name, array in inputs.items()})


def products_in(path):
    """The dtypes that matrices and filters are multiplied in."""
    graph = tf.saved_model.load(str(path)).signatures["serving_default"].graph.as_graph_def()
    nodes = [node for function in graph.library.function for node in function.node_def]
    products = [node for node in nodes if node.op in ("MatMul", "BatchMatMulV2", "Conv2D", "Einsum")]
    return {tf.as_dtype(node.attr["T"].type).name for node in products}


CPU = [hardware.Device("cpu", "Xeon")]
CPU_BF16 = [hardware.Device("cpu", "Xeon", ("amx_bf16",))]
GPU = [*CPU, hardware.Device("gpu", "T4", compute_capability=(7, 5))]


@pytest.mark.parametrize(
    ("policy", "devices", "products"),
    [
        ("mixed_bfloat16", CPU, "float32"),
        ("mixed_bfloat16", CPU_BF16, "bfloat16"),
        ("mixed_float16", CPU_BF16, "float32"),
        ("mixed_float16", GPU, "float16"),
    ],
)
def test_the_precision_is_that_of_the_hardware(policy, devices, products, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "detect", lambda: hardware.recommend(devices))
    model = serving_models.make(serving_models.digits, policy)
    path = export(model, tmp_path / "m")
    assert products_in(path) == {products}
    facts = record(path)
    assert facts["precision"] == ("float32" if products == "float32" else "mixed")
    assert facts["policies"] == [policy]
    batch = serving_models.batch_for(model, 2)["image"]
    np.testing.assert_allclose(serve(path, image=batch)["probabilities"], model(batch), rtol=0, atol=1e-2)


def test_float16_products_for_a_cpu_come_with_a_warning(tmp_path, monkeypatch):
    model = serving_models.make(serving_models.recommender, "mixed_float16")
    monkeypatch.setattr(hardware, "detect", lambda: hardware.recommend(CPU_BF16))
    with pytest.warns(KerasMPWarning, match="a thousand times slower than float32. Serve it on a GPU, or type prec"):
        path = export(model, tmp_path / "m", precision="mixed")
    assert products_in(path) == {"float16"}
    monkeypatch.setattr(hardware, "detect", lambda: hardware.recommend(GPU))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(model, tmp_path / "m", precision="mixed")


def test_mixed_of_a_model_that_is_not(tmp_path):
    model = serving_models.make(serving_models.recommender, "float32")
    with pytest.warns(KerasMPWarning, match="computes in no 16-bit dtype, so its export does not either"):
        path = export(model, tmp_path / "m", precision="mixed")
    assert record(path)["precision"] == "float32"


def wide(policy):
    x = keras.Input((256,), name="x")
    return keras.Model(x, layers.Dense(256, name="y", dtype=policy)(layers.Dense(256, dtype=policy)(x)))


@pytest.mark.parametrize(
    ("policy", "weights", "dtype", "error"),
    [
        # What a mixed model multiplies with is the rounded weight, so half of the storage costs nothing.
        ("mixed_bfloat16", "half", "bfloat16", 0.0),
        ("mixed_float16", "half", "float16", 0.0),
        ("mixed_bfloat16", "float16", "float16", 1e-2),
        ("float32", "half", "float16", 1e-3),
        ("float32", "bfloat16", "bfloat16", 1e-2),
    ],
)
@pytest.mark.filterwarnings("ignore:This export multiplies in float16")
@pytest.mark.filterwarnings("ignore:precision='mixed'")
def test_half_size_weights(policy, weights, dtype, error, tmp_path):
    model = wide(policy)
    path = export(model, tmp_path / "m", precision="mixed", weights=weights)
    assert stored(path) == [(dtype, (256, 256))] * 2 + [("float32", (256,))] * 2
    facts = record(path)
    assert facts["weights"] == dtype
    on_disk = sum(file.stat().st_size for file in (path / "variables").iterdir())
    assert facts["sizes"]["variables"] == on_disk < 0.51 * facts["sizes"]["float32_weights"] + 2048
    assert facts["sizes"]["float32_weights"] == 4 * 2 * (256 * 256 + 256)
    batch = np.random.default_rng(0).normal(size=(4, 256)).astype("float32")
    expected = tf.cast(model(batch), "float32").numpy()
    found = serve(path, x=batch)["y"].numpy()
    assert np.abs(found - expected).max() <= error * np.abs(expected).max()
    measured = facts["errors"]["serving_default"]["y"]
    assert measured["relative"] <= error
    assert (measured["largest"] == 0) == (error == 0)


FULL = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")


def changed(change):
    value = FULL.copy()
    change(value)
    return value


@pytest.mark.parametrize(
    ("value", "float16", "bfloat16"),
    [
        (FULL, True, True),
        (np.zeros((3, 3), "float32"), True, True),
        (FULL * 1e-9, False, True),
        (FULL * 1e-6, False, True),  # subnormal
        (FULL * 1e5, False, True),
        (changed(lambda x: x.__setitem__((1, 1), 1e6)), False, True),
        (changed(lambda x: x.__setitem__((1, 1), 3.4e38)), False, False),  # bfloat16 rounds it up to infinity
        (changed(lambda x: x.__setitem__((1, 1), 1e-9)), True, True),  # beside large ones
        (changed(lambda x: x[1].__imul__(1e-9)), False, True),  # of one input
        (changed(lambda x: x[:, 1].__imul__(1e-9)), False, True),  # of one output
        (np.diag(np.full(5, 1e-7, "float32")), False, True),
        (changed(lambda x: x[1].__imul__(1e-44)), True, True),  # which TensorFlow computes with as 0
        (changed(lambda x: x.__setitem__((1, 1), np.nan)), True, True),
    ],
)
def test_what_a_16_bit_dtype_holds(value, float16, bfloat16):
    assert holds(value, "float16") is float16
    assert holds(value, "bfloat16") is bfloat16


def test_what_float16_cannot_hold_stays_in_float32(tmp_path):
    model = wide("float32")
    model.layers[1].kernel.assign(tf.fill((256, 256), 1e5))
    path = export(model, tmp_path / "m", weights="float16")
    assert ("float32", (256, 256)) in stored(path)
    assert ("float16", (256, 256)) in stored(path)
    assert record(path)["kept_in_float32"] == [model.layers[1].kernel.path]
    assert np.isfinite(serve(path, x=np.ones((1, 256), "float32"))["y"].numpy()).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"precision": "bfloat16"}, "Unknown precision 'bfloat16'. Type precision='float32', 'mixed' (as trained) or"),
        ({"weights": "int8"}, "Unknown weights 'int8'. Type weights='float32', or for half the size 'half', 'float16'"),
        ({"input_names": "user"}, "The inputs of model 'recommender' are ['user', 'item']. Received 'user' for their"),
        ({"input_names": ["a"]}, "Received 1 names, ['a']. Give one for each, in this order."),
        ({"input_names": ["a", "a"]}, "Received ['a'] for more than one of them. Give each a name of its own."),
        ({"input_names": {"users": "a"}}, "Received names for ['users']. Give new names by these."),
        ({"input_names": {"user": "user-id"}}, "'user-id' cannot be the name of an input"),
        ({"output_names": ["a", "b"]}, "The outputs of model 'recommender' are ['rating']. Received 2 names"),
        ({"signatures": {"serving_default": None}}, "A further signature cannot have the name 'serving_default'"),
        ({"signatures": {"__init": None}}, "A further signature cannot have the name '__init'"),
        ({"signatures": {"embed": "users"}}, "Signature 'embed' is 'users'; expected a keras.Model. Make one of the"),
        ({"batch": np.ones((2, 1))}, "The batch must give the model's inputs ['user', 'item']"),
    ],
)
def test_arguments_that_do_not_fit(keywords, message, tmp_path):
    model = serving_models.make(serving_models.recommender, "float32")
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path / "m", **keywords)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_names_of_the_users_and_signatures_that_share_weights(tmp_path):
    model = serving_models.make(serving_models.recommender, "mixed_bfloat16")
    embed = keras.Model(model.inputs[0], model.get_layer("users").output, name="embed")
    path = export(
        model,
        tmp_path / "m",
        precision="float32",
        input_names=["who", "what"],
        output_names={"rating": "stars"},
        signatures={"embed": embed},
    )
    assert len(stored(path)) == len([v for v in model.weights if v.shape])
    loaded = tf.saved_model.load(str(path))
    batch = serving_models.batch_for(model)
    user, item = batch["user"], batch["item"]
    assert sorted(loaded.signatures) == ["embed", "serving_default"]
    found = loaded.signatures["embed"](user=tf.constant(user))
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {"users": (tf.float32, (3, 1, 16))}
    np.testing.assert_array_equal(found["users"], model.get_layer("users").embeddings.numpy()[user])
    report = keras_mp.verify_export(path, model, [user, item])
    assert set(report.outputs) == {"stars"}
    assert report.latency_ms > 0
    assert report.model_latency_ms > 0
    np.testing.assert_array_equal(serve(path, who=user, what=item)["stars"], report.answers["stars"])


# What a server cannot be given


def identity(x, layer):
    return keras.Model(x, layer(x), name="m")


class Call(layers.Layer):
    def __init__(self, function, **keywords):
        super().__init__(**keywords)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


@pytest.mark.parametrize(
    ("dtype", "function", "message"),
    [
        ("uint16", tf.identity, "Input 'x' is uint16, which TensorFlow Serving cannot convert from JSON or to it."),
        ("float32", lambda x: tf.cast(x, "complex64"), "Output 'out' is complex64, which TensorFlow Serving cannot"),
        ("float32", lambda x: tf.RaggedTensor.from_tensor(x), "Output 'out' is a RaggedTensor, and a server answers"),
        (
            "float32",
            lambda x: tf.compat.v1.placeholder_with_default(x, shape=None),
            "Output 'out' has no fixed rank, so a server cannot say what it answers.",
        ),
        (
            "float32",
            lambda x: tf.ensure_shape(tf.numpy_function(np.sin, [x], tf.float32), x.shape),
            "Signature 'serving_default' calls Python code",
        ),
        (
            "float32",
            tf.function(lambda x: x + 1, jit_compile=True),
            "Signature 'serving_default' calls functions that XLA must compile",
        ),
    ],
)
def test_what_servers_cannot_be_given_or_run(dtype, function, message, tmp_path):
    model = identity(keras.Input((3,), dtype=dtype, name="x"), Call(function, name="out", dtype="float32"))
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path / "m")
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_an_input_of_sparse_values(tmp_path):
    x = keras.Input((3,), sparse=True, name="x")
    with pytest.raises(ExportError, match="Input 'x' of model 'm' has sparse or ragged values"):
        export(identity(x, layers.Dense(1)), tmp_path / "m")


def test_made_up_rows_that_a_model_does_not_take(tmp_path):
    x = keras.Input((None, None, 1), name="x")  # made up as 32 by 32
    model = keras.Model(x, layers.Conv2D(1, 40, name="y")(x), name="m")
    with pytest.raises(ExportError, match=r"does not answer rows of the shapes.*Give rows that it takes: export"):
        export(model, tmp_path / "m")
    rows = np.random.default_rng(0).normal(size=(1, 48, 48, 1)).astype("float32")
    path = export(model, tmp_path / "m", batch=rows)
    np.testing.assert_allclose(serve(path, x=rows)["y"], model(rows), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("package", [keras, keras_mp], ids=["keras", "keras_mp"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_a_convolution_with_a_group_a_channel_is_served(package, rank, policy, tmp_path):
    """Keras has XLA compile it, which TensorFlow Serving refuses."""
    keras.config.set_dtype_policy(policy)
    shape = (*[4] * rank, 5)
    inputs = keras.Input(shape)
    layer = getattr(package.layers, f"Conv{rank}D")(10, 3, groups=5, padding="same", dtype=policy)
    model = keras.Model(inputs, layer(inputs))
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    path = keras_mp.export(model, tmp_path / "served", precision="float32")
    served = next(iter(tf.saved_model.load(str(path)).signatures["serving_default"](tf.constant(x)).values()))
    exact = keras_mp.convert(model, "float32")(x)
    np.testing.assert_allclose(served, exact, rtol=1e-4, atol=1e-5)
