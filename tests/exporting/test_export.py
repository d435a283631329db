import importlib
import os
import pathlib
import stat
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_mp
from keras_mp._compat import runtime
from keras_mp.errors import ExportError, ExportWriteError

POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]
# Units in the last place of the compute dtype, for graphs that TensorFlow may fuse differently.
ROUNDING = {"float32": 1e-5, "mixed_bfloat16": 2e-2, "mixed_float16": 2e-3}


def export(*arguments, **keywords):
    """Most tests here run the export themselves; the others of this folder have those of `export` that verifies."""
    return keras_mp.export(*arguments, **{"verify": False, **keywords})


def functional():
    x = image = keras.Input((4, 4, 1), name="image")
    x = keras_mp.layers.BatchNormalization()(layers.Conv2D(2, 3)(x))
    return keras.Model(image, layers.Dense(3, name="logits")(layers.Dropout(0.5)(layers.Flatten()(x))))


def sequential():
    return keras.Sequential([keras.Input((5,), name="features"), layers.Dense(4, "relu"), layers.Dense(2, name="y")])


def dictionaries():
    years, euros = keras.Input((2,), name="years"), keras.Input((3,), name="euros")
    x = layers.concatenate([years, euros])
    return keras.Model({"years": years, "euros": euros}, {"risk": layers.Dense(1)(x), "class": layers.Dense(4)(x)})


def several():
    left, right = keras.Input((2,), name="left"), keras.Input((3,), name="right")
    x = layers.concatenate([left, right])
    return keras.Model([right, left], [layers.Dense(1, name="one")(x), layers.Dense(2, name="two")(right)])


def whole_numbers():
    token = keras.Input((6,), dtype="int32", name="token")
    x = layers.Embedding(10, 4)(token)
    best = keras.ops.argmax(layers.Dense(3, name="scores")(x), axis=-1)
    return keras.Model(token, [layers.GlobalAveragePooling1D(name="mean")(x), layers.Identity(name="best")(best)])


def nested():
    a, b, c = (keras.Input((2,), name=name) for name in "abc")
    return keras.Model({"pair": [a, b], "c": c}, {"sum": [a + b, b + c]})


# Model, inputs with dtype and shape of a row, outputs likewise.
SIGNATURES = [
    (functional, {"image": ("float32", (4, 4, 1))}, {"logits": ("float32", (3,))}),
    (sequential, {"features": ("float32", (5,))}, {"y": ("float32", (2,))}),
    (
        dictionaries,
        {"years": ("float32", (2,)), "euros": ("float32", (3,))},
        {"risk": ("float32", (1,)), "class": ("float32", (4,))},
    ),
    (
        several,
        {"right": ("float32", (3,)), "left": ("float32", (2,))},
        {"one": ("float32", (1,)), "two": ("float32", (2,))},
    ),
    (whole_numbers, {"token": ("int32", (6,))}, {"mean": ("float32", (4,)), "best": ("int32", (6,))}),
    (
        nested,
        {"pair_0": ("float32", (2,)), "pair_1": ("float32", (2,)), "c": ("float32", (2,))},
        {"sum_0": ("float32", (2,)), "sum_1": ("float32", (2,))},
    ),
]


def build(make, policy="float32"):
    # Set with Keras's own function: a policy without use for this hardware is not what these tests are about.
    keras.config.set_dtype_policy(policy)
    runtime.set_remapper(False)
    return make()


def batch_of(model, rows=7):
    """Random inputs, in the model's own structure."""
    rng = np.random.default_rng(0)

    def array(tensor):
        shape = (rows, *tensor.shape[1:])
        if "int" in tensor.dtype:
            return rng.integers(0, 10, shape, "int32")
        return rng.normal(size=shape).astype("float32")

    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(array, structure)


def load(path):
    return tf.saved_model.load(str(path)).signatures["serving_default"]


def described(specs):
    return {name: (spec.dtype.name, tuple(spec.shape)) for name, spec in specs.items()}


# What is written


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("make", "inputs", "outputs"), SIGNATURES, ids=[case[0].__name__ for case in SIGNATURES])
def test_an_export_takes_and_gives_float32_and_answers_like_the_model(tmp_path, make, inputs, outputs, policy):
    model = build(make, policy)
    assert any(v.dtype == "float32" for v in model.variables) or make is nested
    serve = load(export(model, tmp_path / "m"))

    def rows(facts):
        return {name: (dtype, (None, *shape)) for name, (dtype, shape) in facts.items()}

    assert described(serve.structured_input_signature[1]) == rows(inputs)
    assert described(serve.structured_outputs) == rows(outputs)
    for count in (1, 7):
        batch = batch_of(model, count)
        flat = keras.tree.flatten(batch)
        # Names in the order in which Keras flattens: sorted in dictionaries, as given in lists.
        names = sorted(inputs) if isinstance(batch, dict) else list(inputs)
        answers = serve(**{name: tf.constant(array) for name, array in zip(names, flat, strict=True)})
        expected = keras.tree.flatten(model(batch, training=False))
        order = sorted(outputs) if make in (dictionaries, nested) else list(outputs)
        for name, tensor in zip(order, expected, strict=True):
            answer, tensor = answers[name].numpy(), tf.cast(tensor, outputs[name][0]).numpy()
            assert answer.dtype.name == outputs[name][0]
            assert answer.shape == (count, *outputs[name][1])
            np.testing.assert_allclose(answer, tensor, rtol=0, atol=ROUNDING[policy] * np.abs(tensor).max())


def test_an_export_computes_in_the_policy_and_not_just_float32(tmp_path):
    # 1 + 1/1024 is 1 in bfloat16; the product of the two is exact in float32.
    model = build(sequential, "mixed_bfloat16")
    for weights in model.layers[0].weights + model.layers[1].weights:
        weights.assign(tf.zeros_like(weights))
    model.layers[0].kernel.assign(tf.ones((5, 4)))
    model.layers[1].kernel.assign(tf.ones((4, 2)))
    rows = np.zeros((1, 5), "float32")
    rows[0, 0] = 1 + 2.0**-10
    answer = load(export(model, tmp_path / "m", precision="mixed"))(features=tf.constant(rows))["y"]
    assert answer.dtype == tf.float32
    np.testing.assert_array_equal(answer, [[4.0, 4.0]])


def test_no_output_is_lost_where_two_have_one_name(tmp_path):
    x = keras.Input((3, 4), name="x")
    dense = layers.Dense(2, name="head")
    states = keras.Model(x, layers.LSTM(2, return_state=True, name="lstm")(x))
    shared = keras.Model(x, [dense(x), dense(x + 1), layers.Dense(1, name="head_1")(x)])
    alone = keras.Sequential([keras.Input((3, 4), name="x"), layers.LSTM(2, return_state=True, name="lstm")])
    batch = batch_of(states)
    for number, (model, names) in enumerate(
        [
            (states, ["lstm", "lstm_1", "lstm_2"]),
            (shared, ["head", "head_1", "head_1_1"]),
            (alone, ["lstm", "lstm_1", "lstm_2"]),
        ]
    ):
        answers = load(export(model, tmp_path / f"m{number}"))(x=tf.constant(batch))
        assert sorted(answers) == names
        for name, expected in zip(names, model(batch), strict=True):
            np.testing.assert_allclose(answers[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "served"),
    [
        ("user-id", "user_id"),
        ("a b.c:d", "a_b_c_d"),
        ("1st", "arg_1st"),
        ("_x", "arg__x"),
        ("class", "class_"),
        ("self", "self_"),
    ],
)
def test_input_names_that_a_signature_does_not_allow(tmp_path, given, served):
    x = keras.Input((2,), name=given)
    model = keras.Model(x, layers.Rescaling(2.0)(x))
    serve = load(export(model, tmp_path / "m"))
    assert list(serve.structured_input_signature[1]) == [served]
    np.testing.assert_array_equal(next(iter(serve(**{served: tf.ones((1, 2))}).values())), [[2, 2]])


def test_input_names_that_fall_together_stay_apart(tmp_path):
    x, y = keras.Input((2,), name="a-b"), keras.Input((2,), name="a b")
    model = keras.Model({"a-b": x, "a b": y}, layers.Identity(name="difference")(x - y))
    serve = load(export(model, tmp_path / "m"))
    assert sorted(serve.structured_input_signature[1]) == ["a_b", "a_b_1"]
    answer = serve(a_b=tf.zeros((1, 2)), a_b_1=tf.ones((1, 2)))["difference"]
    np.testing.assert_array_equal(answer, [[1, 1]])  # Keras sorts: "a b" comes first


def test_float64_stays_and_float16_inputs_become_float32(tmp_path):
    half, double = keras.Input((2,), dtype="float16", name="half"), keras.Input((2,), dtype="float64", name="double")
    total = layers.Add(dtype="float64", name="total")([half, double])
    serve = load(export(keras.Model([half, double], total), tmp_path / "m"))
    assert described(serve.structured_input_signature[1]) == {
        "half": ("float32", (None, 2)),
        "double": ("float64", (None, 2)),
    }
    assert described(serve.structured_outputs) == {"total": ("float64", (None, 2))}


def test_a_batch_size_fixed_in_the_model_is_free_in_the_export(tmp_path):
    x = keras.Input(batch_shape=(8, 4), name="x")
    serve = load(export(keras.Model(x, layers.Dense(2, name="y")(x)), tmp_path / "m"))
    assert serve(x=tf.ones((3, 4)))["y"].shape == (3, 2)


def test_a_sequential_model_built_by_its_first_call(tmp_path):
    model = keras.Sequential([layers.Dense(2, name="y")])
    model(np.ones((3, 5), "float32"))
    serve = load(export(model, tmp_path / "m"))
    (name,) = serve.structured_input_signature[1]
    batch = batch_of(model)
    np.testing.assert_allclose(serve(**{name: tf.constant(batch)})["y"], model(batch), rtol=1e-5)


def test_dropout_is_off_and_batch_statistics_are_those_learned(tmp_path):
    model = build(functional)
    model.compile("sgd", "mse")
    model.fit(100 + batch_of(model, 16), np.zeros((16, 3)), verbose=0)
    serve = load(export(model, tmp_path / "m"))
    batch = batch_of(model)
    first, second = (serve(image=tf.constant(batch))["logits"].numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, model.predict(batch, verbose=0), rtol=1e-5, atol=1e-5 * np.abs(first).max())


@pytest.mark.parametrize("policy", POLICIES)
def test_every_variable_is_stored_once_in_float32_and_the_optimizer_is_not(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    shared = layers.Dense(256)
    a = keras.Input((256,), name="a")
    model = keras.Model(a, shared(shared(a)))
    model.compile(keras_mp.LossScaleOptimizer("adam"), "mse")
    model.optimizer.build(model.trainable_variables)
    path = export(model, tmp_path / "m")
    weights = sum(v.numpy().nbytes for v in model.weights)
    assert weights == 4 * (256 * 256 + 256)
    stored = sum(file.stat().st_size for file in (path / "variables").iterdir())
    assert weights <= stored < weights + 4096
    # Nor as constants in the graph.
    assert (path / "saved_model.pb").stat().st_size < weights / 2
    # A copy of a variable in the dtype it is computed in would be found here.
    shapes = [shape for _, shape in tf.train.list_variables(str(path / "variables" / "variables"))]
    assert sorted(shape for shape in shapes if shape) == [[256], [256, 256]]


def test_a_server_of_another_user_can_read_it(tmp_path):
    before = os.umask(0o022)
    try:
        path = export(build(sequential), tmp_path / "deep" / "m")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    for entry in path.rglob("*"):
        assert stat.S_IMODE(entry.stat().st_mode) & 0o444 == 0o444, entry
        assert not entry.is_dir() or stat.S_IMODE(entry.stat().st_mode) & 0o111 == 0o111, entry


class Holder(layers.Layer):
    """A layer with others inside, of a class of the user's."""

    def __init__(self, *inner, **keywords):
        super().__init__(**keywords)
        self.inner = list(inner)

    def call(self, inputs):
        for layer in self.inner:
            inputs = layer(inputs)
        return inputs


def adapted():
    normal, words = layers.Normalization(), layers.StringLookup(output_mode="tf_idf")
    normal.adapt(np.random.default_rng(1).normal(5, 3, (50, 5)).astype("float32"))
    words.adapt([["a", "b", "c"], ["a", "b", "a"]])
    x, s = keras.Input((5,), name="x"), keras.Input((3,), dtype="string", name="s")
    return keras.Model([x, s], layers.Dense(2, name="y")(layers.concatenate([Holder(normal)(x), words(s)])))


def remat():
    with keras.RematScope(mode="full"):
        return sequential()


def quantized():
    model = sequential()
    for layer in model.layers:  # the model's own method warns of layers that it leaves alone
        layer.quantize("int8")
    return model


def with_lora():
    model = build(sequential)
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(np.ones((2, 4)))
    return model


@pytest.mark.parametrize("make", [adapted, remat, quantized, with_lora])
def test_an_export_keeps_what_the_model_holds(make, tmp_path):
    model = make()
    rows = np.random.default_rng(0).normal(5, 3, (3, 5)).astype("float32")
    batch = [rows, np.array([["a", "b", "q"], ["c", "c", "a"], ["b", "b", "b"]])] if make is adapted else rows
    path = keras_mp.export(model, tmp_path / "m", batch=batch)
    answers = keras_mp.verify_export(path, model, batch).answers["y"]
    expected = model([tf.constant(each) for each in batch] if make is adapted else batch)
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Versions


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_versions_count_up_and_keep_what_they_hold(tmp_path):
    model, folder = build(sequential), tmp_path / "m"
    rows = batch_of(model)
    before = model(rows).numpy()
    first = export(model, str(folder))
    assert first == folder / "1"
    model.set_weights([weight + 1 for weight in model.get_weights()])
    assert export(model, folder) == folder / "2"
    assert names_in(folder) == ["1", "2"]
    np.testing.assert_allclose(load(folder / "1")(features=tf.constant(rows))["y"], before, rtol=1e-5)
    np.testing.assert_allclose(load(folder / "2")(features=tf.constant(rows))["y"], model(rows), rtol=1e-5)
    assert not np.allclose(before, model(rows))


def test_the_next_version_follows_the_highest_as_a_number(tmp_path):
    model, folder = build(sequential), tmp_path / "m"
    export(model, folder).rename(folder / "10")
    export(model, folder).rename(folder / "9")
    assert export(model, folder) == folder / "11"


def test_an_export_that_is_overtaken_takes_the_version_after(tmp_path):
    """Another export publishes version 1 after this one has begun, while it traces the model."""
    folder = tmp_path / "m"
    other = export(build(sequential), tmp_path / "other")

    class Overtaken(layers.Layer):
        def call(self, inputs):
            if not tf.executing_eagerly() and not isinstance(inputs, keras.KerasTensor) and not folder.exists():
                folder.mkdir()
                other.rename(folder / "1")
            return inputs

    x = keras.Input((2,), name="x")
    assert export(keras.Model(x, Overtaken()(x)), folder) == folder / "2"
    assert names_in(folder) == ["1", "2"]
    assert list(load(folder / "1").structured_outputs) == ["y"]


def test_a_version_taken_between_the_look_and_the_move_is_not_written_over(tmp_path):
    module = importlib.import_module("keras_mp.exporting.publishing")
    folder = tmp_path / "m"
    mine = folder / ".unfinished-mine"
    mine.mkdir(parents=True)
    (mine / "saved_model.pb").write_text("mine")

    class Racing(type(folder)):
        """A folder in which another export publishes version 1 just after it was listed."""

        def iterdir(self):
            found = list(super().iterdir())
            (folder / "1").mkdir()
            (folder / "1" / "saved_model.pb").write_text("theirs")
            return iter(found)

    assert module.publish(mine, Racing(folder)) == folder / "2"
    assert (folder / "1" / "saved_model.pb").read_text() == "theirs"
    assert (folder / "2" / "saved_model.pb").read_text() == "mine"
    assert names_in(folder) == ["1", "2"]


# Failures leave nothing behind

STRAY = []


class Broken(layers.Layer):
    def call(self, inputs):
        if not isinstance(inputs, keras.KerasTensor):
            raise OverflowError("this layer cannot be traced")
        return inputs


class Untracked(layers.Layer):
    """Reads a variable that no layer owns, which TensorFlow refuses when it saves."""

    def call(self, inputs):
        return inputs * STRAY[0]


def test_a_model_that_cannot_be_traced_leaves_no_folder(tmp_path):
    x = keras.Input((2,), name="x")
    with pytest.raises(OverflowError, match="this layer cannot be traced"):
        export(keras.Model(x, Broken()(x)), tmp_path / "m")
    assert names_in(tmp_path) == []


def test_a_model_that_cannot_be_saved_leaves_no_version(tmp_path):
    folder = tmp_path / "m"
    export(build(sequential), folder)
    STRAY.append(tf.Variable(2.0))
    x = keras.Input((2,), name="x")
    try:
        with pytest.raises(AssertionError, match="untracked"):
            export(keras.Model(x, Untracked()(x)), folder)
    finally:
        STRAY.clear()
    assert names_in(folder) == ["1"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ExportWriteError, match="Permission denied. No version was published"):
            export(build(sequential), tmp_path / "m")
    finally:
        tmp_path.chmod(0o755)
    assert names_in(tmp_path) == []


# Bad input


def message(call, *arguments):
    with pytest.raises(ExportError) as caught:
        call(*arguments)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_a_path_that_is_a_file(tmp_path):
    path = tmp_path / "model.h5"
    path.write_text("weights")
    assert message(export, build(sequential), path) == (
        f"{str(path)!r} is a file. Name a folder of the model's own, such as 'saved_models/digits'."
    )
    assert path.read_text() == "weights"


@pytest.mark.parametrize(
    ("present", "listed"),
    [
        (["notes.txt"], "notes.txt"),
        (["1/weights.h5"], "1"),  # a number, but no SavedModel
        (["saved_model.pb", "variables/variables.index"], "saved_model.pb, variables"),  # a version itself
        ([f"{letter}.txt" for letter in "gfedcba"], "a.txt, b.txt, c.txt, d.txt, e.txt, ..."),
    ],
)
def test_a_path_that_holds_something_else(tmp_path, present, listed):
    for name in present:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    before = names_in(tmp_path)
    assert message(export, build(sequential), tmp_path) == (
        f"{str(tmp_path)!r} holds something that is not a version of a SavedModel: {listed}. Name a folder of the "
        f"model's own, such as {str(tmp_path / 'digits')!r}."
    )
    assert names_in(tmp_path) == before


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="mine")
        self.dense = layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)


def built_subclass():
    model = Subclassed()
    model(np.ones((1, 2), "float32"))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Sequential([layers.Dense(1)], name="mine"),
        lambda: keras.Sequential(name="mine"),
        Subclassed,
        built_subclass,
    ],
    ids=["unbuilt", "empty", "subclassed", "built subclass"],
)
def test_a_model_without_symbolic_inputs(tmp_path, make):
    assert message(export, make(), tmp_path / "m") == (
        "Model 'mine' has no symbolic inputs, so its signature is not known. For a Sequential model put "
        "keras.Input(shape) first; for any other type inputs = keras.Input(shape), which takes a dtype as well, and "
        "export keras.Model(inputs, model(inputs))."
    )
    assert names_in(tmp_path) == []


def test_what_is_not_a_model(tmp_path):
    assert message(export, "model", tmp_path / "m") == "Expected a keras.Model, received 'model' of type str."


# Verification. Each run of an export in a process of its own takes seconds, so a test checks many things in one.


def test_verify_reports_each_output(tmp_path):
    model = build(whole_numbers, "mixed_bfloat16")
    path = export(model, tmp_path / "m")
    batch = batch_of(model)
    report = keras_mp.verify_export(str(path), model, batch)
    mean, best = (tensor.numpy() for tensor in model(batch))
    assert report.path == path
    assert {name: (each.dtype, each.shape, each.finite) for name, each in report.outputs.items()} == {
        "mean": ("float32", (7, 4), True),
        "best": ("int32", (7, 6), True),
    }
    np.testing.assert_array_equal(report.answers["best"], best)
    error = np.abs(report.answers["mean"].astype("float64") - mean.astype("float64")).max()
    assert report.outputs["mean"].largest_error == error
    assert report.outputs["mean"].relative_error == pytest.approx(error / np.abs(mean.astype("float64")).max())
    assert error <= 1e-2


def test_verify_takes_names_that_numpy_has_a_use_for_strings_and_float16(tmp_path):
    file = keras.Input((1,), dtype="string", name="file")
    half = keras.Input((2,), dtype="float16", name="allow_pickle")
    bucket = layers.Hashing(5, name="args")(file)
    product = layers.Dense(3, dtype="mixed_float16", name="kwds")(half)
    model = keras.Model({"file": file, "allow_pickle": half}, [bucket, product])
    runtime.set_remapper(False)
    path = export(model, tmp_path / "m")
    words = np.array([["one"], ["fifteen"]])
    rows = np.array([[0.1, 0.2], [0.3, 0.4]], "float16")
    report = keras_mp.verify_export(path, model, {"file": words, "allow_pickle": rows})
    expected = model({"file": tf.constant(words), "allow_pickle": tf.constant(rows)})
    np.testing.assert_array_equal(report.answers["args"], expected[0])
    np.testing.assert_allclose(report.answers["kwds"], tf.cast(expected[1], "float32"), rtol=1e-2)
    assert report.answers["kwds"].dtype == np.float32


def test_verify_finds_tensorflow_where_this_process_did(tmp_path, monkeypatch):
    """An interpreter that has nothing installed, as where TensorFlow comes by PYTHONPATH."""
    base = getattr(sys, "_base_executable", sys.executable)
    if sys.prefix == sys.base_prefix or not pathlib.Path(base).exists():
        pytest.skip("not in a virtual environment")
    model = build(several)
    path = export(model, tmp_path / "m")
    monkeypatch.setattr(sys, "executable", base)
    right, left = batch_of(model)
    report = keras_mp.verify_export(path, model, [right, left])
    np.testing.assert_allclose(report.answers["one"], model([right, left])[0], rtol=1e-5)


def test_verify_notices_a_model_that_was_trained_on(tmp_path):
    model = build(sequential)
    path = export(model, tmp_path / "m")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    batch = batch_of(model)
    model.fit(batch, np.ones((7, 2)), verbose=0)
    text = message(keras_mp.verify_export, path, model, batch)
    found = load(path)(features=tf.constant(batch))["y"].numpy()
    error = np.abs(found - model(batch).numpy()).max()
    assert text.startswith(f"Output 'y' of the export differs from the model's by {error:g}, which is ")
    names = ", ".join(repr(variable.path) for variable in model.weights[:3])
    assert text.endswith(
        f"rounding explains 1e-05. The model was changed since: 4 of its weights, such as {names}, ..., are others. "
        "Export the model again."
    )


def test_verify_notices_the_export_of_another_model(tmp_path):
    model = build(sequential)
    other = keras.Sequential([keras.Input((5,), name="features"), layers.Dense(2, name="z")])
    path = export(other, tmp_path / "m")
    assert message(keras_mp.verify_export, path, model, batch_of(model)) == (
        f"The export at {str(path)!r} answers with ['z']; the model has the outputs ['y']. Is it the export of this "
        "model?"
    )


def test_verify_notices_an_export_that_does_not_run(tmp_path):
    path = export(build(sequential), tmp_path / "m")
    (path / "variables" / "variables.index").unlink()
    (path / "assets.extra" / "keras_mp.json").unlink()  # which names the file, see `verify_export`
    model = build(sequential)
    text = message(keras_mp.verify_export, path, model, batch_of(model))
    assert text.startswith(f"The export at {str(path)!r} does not run without Keras:\n")
    assert "variables" in text


def test_verify_notices_an_output_in_16_bits(tmp_path):
    model = build(sequential, "mixed_bfloat16")
    module = tf.Module()
    module.model_variables = [variable.value for variable in model.variables]
    serve = tf.function(lambda features: {"y": model(features)}, autograph=False)
    signature = serve.get_concrete_function(features=tf.TensorSpec((None, 5), name="features"))
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": signature})
    assert message(keras_mp.verify_export, tmp_path / "m", model, batch_of(model)) == (
        "Output 'y' of the export is bfloat16 of shape (7, 2); expected float32 of shape (7, 2). Export the model "
        "again."
    )


def test_verify_where_there_is_no_saved_model(tmp_path):
    model = build(sequential)
    for path in (tmp_path, tmp_path / "nowhere"):
        assert message(keras_mp.verify_export, path, model, batch_of(model)) == (
            f"No SavedModel at {str(path)!r}: it has no file saved_model.pb. Export a model there first."
        )


def test_verify_of_the_folder_above_the_versions(tmp_path):
    model = build(sequential)
    export(model, tmp_path).rename(tmp_path / "9")
    export(model, tmp_path)
    assert message(keras_mp.verify_export, tmp_path, model, batch_of(model)) == (
        f"No SavedModel at {str(tmp_path)!r}: it has no file saved_model.pb. One of its versions may be meant: "
        f"{str(tmp_path / '10')!r}."
    )


@pytest.mark.parametrize(
    ("make", "change", "received"),
    [
        (several, lambda batch: batch[:1], "1 arrays"),
        (several, lambda batch: [*batch, batch[0]], "3 arrays"),
        (several, lambda batch: {"right": batch[0]}, "['right']"),
        (dictionaries, lambda batch: {"years": batch["years"]}, "['years']"),
        (dictionaries, lambda batch: {**batch, "name": batch["years"]}, "['euros', 'name', 'years']"),
    ],
    ids=["short list", "long list", "short dictionary for a list", "short dictionary", "long dictionary"],
)
def test_a_batch_with_missing_or_more_inputs(tmp_path, make, change, received):
    model = build(make)
    path = export(model, tmp_path / "m")
    names = {"several": "['right', 'left']", "dictionaries": "['euros', 'years']"}[make.__name__]
    assert message(keras_mp.verify_export, path, model, change(batch_of(model))) == (
        f"The batch must give the model's inputs {names}, as a dictionary or in this order. Received: {received}"
    )


def test_a_batch_of_a_wrong_shape_is_told_by_keras(tmp_path):
    model = build(sequential)
    path = export(model, tmp_path / "m")
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 5"):
        keras_mp.verify_export(path, model, np.ones((2, 6), "float32"))


# Stock Keras


@pytest.mark.stock_defect
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_stock_export_answers_in_float32(tmp_path, policy):
    model = build(sequential, policy)
    model.export(str(tmp_path / "m"), verbose=False)
    (answer,) = load(tmp_path / "m").structured_outputs.values()
    assert answer.dtype == tf.float32


@pytest.mark.stock_defect
def test_stock_export_names_its_outputs(tmp_path):
    model = build(several)
    model.export(str(tmp_path / "m"), verbose=False)
    assert sorted(load(tmp_path / "m").structured_outputs) == ["one", "two"]
