"""Models from files: with the whole state of the optimizer, under any global policy, and under another policy."""

import io
import json
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.errors import ArgumentError, ConversionError

# float16 wants our optimizer, of which we warn; other tests are about that.
pytestmark = pytest.mark.filterwarnings("ignore:.*computes in float16, and:keras_mp.errors.KerasMPWarning")

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 1)).astype("float32")

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-2),
    "stock": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2), initial_scale=8.0),
    "ours": lambda: keras_mp.LossScaleOptimizer(keras.optimizers.Adam(1e-2), initial_scale=8.0),
}


def saved(path, policy, optimizer, **arguments):
    """A model trained under a global policy for three steps, saved."""
    with keras_mp.policy_scope(policy):
        layers = [keras.Input((4,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        model.compile(OPTIMIZERS[optimizer](), keras.losses.MeanSquaredError(), jit_compile=False, **arguments)
    model.fit(X, Y, batch_size=8, epochs=3, verbose=0)
    model.save(path)
    return model


@pytest.mark.parametrize("here", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("policy", "optimizer", "arguments"),
    [
        ("float32", "adam", {}),
        ("mixed_bfloat16", "adam", {}),
        ("mixed_bfloat16", "ours", {}),
        ("mixed_float16", "adam", {}),  # which Keras wraps by itself
        ("mixed_float16", "adam", {"auto_scale_loss": False}),
        ("mixed_float16", "stock", {}),
        ("mixed_float16", "ours", {}),
    ],
)
def test_a_model_comes_back_whole_under_any_global_policy(tmp_path, policy, optimizer, arguments, here):
    model = saved(tmp_path / "model.keras", policy, optimizer, **arguments)
    with keras_mp.policy_scope(here):
        loaded = keras_mp.load_model(tmp_path / "model.keras")
        assert keras.config.dtype_policy().name == here
    assert type(loaded.optimizer) is type(model.optimizer)
    assert [layer.dtype_policy.name for layer in loaded.layers] == [layer.dtype_policy.name for layer in model.layers]
    for each in (model, loaded):
        each.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.stock_defect
@pytest.mark.filterwarnings("ignore:Skipping variable loading:UserWarning")
def test_stock_loading_keeps_the_optimizer_under_another_global_policy(tmp_path):
    model = saved(tmp_path / "model.keras", "mixed_float16", "adam")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert int(loaded.optimizer.iterations) == 3


@pytest.mark.parametrize(
    ("policy", "wrapped"), [("mixed_float16", True), ("mixed_bfloat16", False), ("float32", False)]
)
@pytest.mark.parametrize(
    ("before", "optimizer"), [("float32", "adam"), ("mixed_float16", "adam"), ("mixed_float16", "ours")]
)
def test_it_is_wrapped_as_the_policy_asked_for_needs(tmp_path, before, optimizer, policy, wrapped):
    model = saved(tmp_path / "model.keras", before, optimizer)
    loaded = keras_mp.load_model(tmp_path / "model.keras", policy)
    assert isinstance(loaded.optimizer, keras_mp.LossScaleOptimizer) is wrapped
    assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer) is wrapped
    inner, right = (getattr(each.optimizer, "inner_optimizer", each.optimizer) for each in (loaded, model))
    assert int(inner.iterations) == 3
    for ours, theirs in zip(inner.variables, right.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.layers[0].dtype_policy.name == policy
    assert np.isfinite(loaded.fit(X, Y, verbose=0).history["loss"][0])


def test_per_layer_policies_are_no_reason_to_wrap(tmp_path):
    layers = [keras.Input((4,)), keras.layers.Dense(4, dtype="mixed_float16"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras_mp.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    assert int(loaded.optimizer.iterations) == 1


def test_a_model_of_ours_comes_back(tmp_path):
    model = saved(tmp_path / "model.keras", "float32", "adam")
    mixed = keras_mp.convert(model, keras_mp.PolicyMap("mixed_bfloat16", {"dense_.*": "float32"}))
    mixed.save(tmp_path / "mixed.keras")
    loaded = keras_mp.load_model(tmp_path / "mixed.keras")
    np.testing.assert_array_equal(loaded(X), mixed(X))
    assert [layer.compute_dtype for layer in loaded.layers] == [layer.compute_dtype for layer in mixed.layers]


@pytest.mark.parametrize("load", [keras.models.load_model, keras_mp.load_model])
def test_the_scale_of_a_model_of_ours_goes_on(tmp_path, load):
    inputs = keras.Input((4,))
    model = keras_mp.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(3)(inputs)))
    optimizer = keras_mp.LossScaleOptimizer("adam", initial_scale=512.0, dynamic_growth_steps=2)
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras").optimizer
    assert float(loaded.loss_scale) == float(optimizer.loss_scale) == 2048
    assert len(loaded.variables) == len(optimizer.variables)


def test_an_optimizer_that_is_built_again_keeps_its_state():
    optimizer = keras_mp.LossScaleOptimizer("adam", initial_scale=512.0)
    weight = keras.Variable([1.0])
    optimizer.build([weight])
    optimizer.scale_loss(tf.constant(1.0))
    optimizer.apply([tf.constant([float("nan")])], [weight])
    before = [variable.numpy() for variable in optimizer.variables]
    assert float(optimizer.loss_scale) == 256
    optimizer.build([weight])
    assert [variable.numpy() for variable in optimizer.variables] == before


def test_it_need_not_be_compiled(tmp_path):
    saved(tmp_path / "model.keras", "float32", "adam")
    assert keras_mp.load_model(tmp_path / "model.keras", "mixed_bfloat16", compile=False).compiled is False


@pytest.mark.parametrize("name", ["none.keras", "folder", "text.keras", "model.h5", "own.weights.h5", "train.py"])
def test_what_is_no_keras_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.keras").write_text("no zip")
    for other in ("model.h5", "own.weights.h5", "train.py"):
        (tmp_path / other).write_bytes(b"\x89HDF")
    expected = {
        "none.keras": "There is no file",
        "folder": "is a folder.*tf.saved_model.load",
        "text.keras": "is not a .keras file. It is damaged, incomplete or of another kind: save it again",
        "own.weights.h5": r"is not a .keras file. It holds weights alone: make the model, model.load_weights\(path\)",
        "train.py": r'is not a .keras file. Expected what model.save\("model.keras"\) writes',
        "model.h5": r'is not a .keras file.*model.save\("model.keras"\)',
    }
    with pytest.raises(ConversionError, match=expected[name]):
        keras_mp.load_model(tmp_path / name)


def test_a_model_is_for_convert():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="made")
    with pytest.raises(ConversionError, match=r"Received the model 'made': type keras_mp.convert\(model, policy\)"):
        keras_mp.load_model(model, "auto")


# Keras advises against the format itself, in a log line and no warning.
@pytest.mark.parametrize("save", [keras.Model.save, keras.saving.save_model])
def test_h5_files_which_lose_the_optimizer_are_refused(tmp_path, save):
    model = saved(tmp_path / "model.keras", "mixed_float16", "ours")
    with pytest.raises(ArgumentError, match=r'model.save\("model.keras"\).*weights.h5.*tf.train.Checkpoint'):
        save(model, tmp_path / "model.h5")
    keras.saving.save_model(model, tmp_path / "model.h5", include_optimizer=False)
    loaded = keras.saving.load_model(tmp_path / "model.h5", compile=False)
    np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])


@pytest.mark.stock_defect
def test_stock_h5_files_keep_the_slots_inside_a_wrapper(tmp_path):
    model = saved(tmp_path / "model.keras", "mixed_float16", "stock")
    model.save(tmp_path / "model.h5")
    with keras_mp.policy_scope("mixed_float16"):
        loaded = keras.saving.load_model(tmp_path / "model.h5")
    inner, right = loaded.optimizer.inner_optimizer, model.optimizer.inner_optimizer
    assert len(inner.variables) == len(right.variables)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(inner.variables, right.variables, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A converted, compiled model and the bytes of its file."""
    path = tmp_path_factory.mktemp("whole") / "model.keras"
    layers = [keras.Input((4,)), keras.layers.Dense(2, "relu"), keras.layers.Dense(1)]
    model = keras_mp.convert(keras.Sequential(layers), "mixed_bfloat16")
    model.compile("sgd", "mse", jit_compile=False)
    model.save(path)
    return model, path.read_bytes()


def assert_refused_or_the_same(path, model):
    """Whether a file is refused in words; what is loaded all the same must be what was saved."""
    try:
        loaded = keras_mp.load_model(path)
    except ConversionError:
        return True
    np.testing.assert_array_equal(loaded(X), model(X))
    return False


def test_a_flipped_bit_a_cut_and_a_gap_are_told_in_words(tmp_path, whole):
    model, content = whole
    path = tmp_path / "damaged.keras"
    refused = []
    for place in range(0, len(content), 83):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        for damaged in (flipped, content[:place], content[:place] + content[place + 5 :]):
            path.write_bytes(damaged)
            refused.append(assert_refused_or_the_same(path, model))
    assert sum(refused) > 0.95 * len(refused)  # the rest is a date or the like


def rewritten(path, content, **members):
    """The same archive with other members, all of them whole."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if members.get(name.partition(".")[0], b"") is not None:
                new.writestr(name, members.get(name.partition(".")[0], old.read(name)))


def hdf5_of_something_else():
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["other"] = np.ones(3)
    return content.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        {"config": None},
        {"model": None},
        {"config": b""},
        {"config": b"[1, 2]"},
        {"config": b"{}"},
        {"config": b"[" * 100_000},
        {"config": b"\xff\xfe"},
        {"model": b""},
        {"model": b"text"},
        {"model": hdf5_of_something_else()},
    ],
    ids=str,
)
def test_members_that_are_missing_or_of_another_kind_are_told_in_words(tmp_path, whole, members):
    rewritten(tmp_path / "model.keras", whole[1], **members)
    with pytest.raises(ConversionError, match="model.keras"):
        keras_mp.load_model(tmp_path / "model.keras")


def places(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def test_json_of_other_types_is_told_in_words(tmp_path, whole):
    model, content = whole
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        text = archive.read("config.json")
    path = tmp_path / "model.keras"
    others = [5, "other", [], {}, None, -1.5, True]
    for number, (*inside, last) in enumerate(list(places(json.loads(text)))[1::3]):
        config = owner = json.loads(text)
        for key in inside:
            owner = owner[key]
        owner[last] = others[number % len(others)]
        rewritten(path, content, config=json.dumps(config).encode())
        assert_refused_or_the_same(path, model)


def test_nothing_of_a_damaged_file_is_run(tmp_path, whole, monkeypatch):
    damaged = bytearray(whole[1])
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "model.keras").write_bytes(damaged)
    monkeypatch.setattr(keras.Sequential, "from_config", lambda *args: pytest.fail("the model was made"))
    with pytest.raises(ConversionError, match="the bytes of model.weights.h5 are not those that were written"):
        keras_mp.load_model(tmp_path / "model.keras")


def test_a_folder_of_a_model_loads(tmp_path):
    model = saved(tmp_path / "model.keras", "mixed_float16", "ours")
    keras.saving.save_model(model, tmp_path / "folder", zipped=False)
    loaded = keras_mp.load_model(tmp_path / "folder", "mixed_bfloat16")
    assert type(loaded.optimizer) is keras.optimizers.Adam
    assert int(loaded.optimizer.iterations) == 3
    np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])
    for name in ("config.json", "model.weights.h5"):
        shutil.copytree(tmp_path / "folder", tmp_path / name)
        (tmp_path / name / name).write_bytes((tmp_path / name / name).read_bytes()[:100])
        with pytest.raises(ConversionError, match="not a whole one"):
            keras_mp.load_model(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(ConversionError, match="is a folder|has no model.weights.h5"):
            keras_mp.load_model(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a .quantize. method:UserWarning")
@pytest.mark.parametrize("here", ["float32", "mixed_bfloat16", "mixed_float16", "int8_from_float32"])
@pytest.mark.parametrize(("mode", "policy"), [("int8", "float32"), ("int4", "mixed_bfloat16"), ("float8", "float32")])
def test_a_quantized_model_loads_under_any_global_policy(tmp_path, mode, policy, here):
    x = keras.Input((4,))
    hidden = keras.layers.Dense(8, "relu", dtype=policy)(x)
    model = keras.Model(x, keras.layers.Dense(2, dtype=policy)(keras.layers.LayerNormalization(dtype=policy)(hidden)))
    model.quantize(mode)
    model.save(tmp_path / "model.keras")
    with keras_mp.policy_scope(here):
        loaded = keras_mp.load_model(tmp_path / "model.keras")
        assert keras.config.dtype_policy().name == here
    np.testing.assert_array_equal(loaded(X), model(X))
    assert [each.dtype_policy for each in loaded.layers[1:]] == [each.dtype_policy for each in model.layers[1:]]


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`:UserWarning")
@pytest.mark.parametrize("where", ["loss", "metrics", "weighted_metrics"])
def test_trust_holds_for_all_that_a_model_is_compiled_with(tmp_path, where):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    code = lambda y, p: (y - p) ** 2  # noqa: E731
    model.compile("sgd", **{"loss": "mse", where: code if where == "loss" else [code]})
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ConversionError, match=r"It holds Python code.*load_model\(path, safe_mode=False\)"):
        keras_mp.load_model(tmp_path / "model.keras")
    loaded = keras_mp.load_model(tmp_path / "model.keras", safe_mode=False)
    assert np.isfinite(loaded.fit(X, Y, verbose=0).history["loss"][0])
    assert keras_mp.load_model(tmp_path / "model.keras", compile=False).compiled is False


def test_a_class_that_is_missing_is_named(tmp_path):
    kind = keras.saving.register_keras_serializable("gone")(type("Gone", (keras.layers.Dense,), {}))
    keras.Sequential([keras.Input((4,)), kind(1)]).save(tmp_path / "model.keras")
    del keras.saving.get_custom_objects()["gone>Gone"]
    with pytest.raises(ConversionError, match=r"Could not locate class 'Gone'. Import the module.*custom_objects"):
        keras_mp.load_model(tmp_path / "model.keras")
    keras_mp.load_model(tmp_path / "model.keras", custom_objects={"gone>Gone": kind})
