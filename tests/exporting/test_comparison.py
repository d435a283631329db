"""An export is compared with the model itself; where they differ the error says in which layer, and why."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_mp
from keras_mp.errors import ExportError, KerasMPWarning
from keras_mp.exporting import comparison

ROWS = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


class ByDtype(layers.Layer):
    """Stands for a layer that is another function in another dtype."""

    def call(self, inputs):
        return inputs * (2 if self.compute_dtype == "float16" else 3)


class ByMode(layers.Layer):
    """Stands for a layer that is another function in a graph."""

    def call(self, inputs):
        return inputs * (2 if tf.executing_eagerly() else 3)


class Block(layers.Layer):
    def __init__(self, inner, **keywords):
        super().__init__(**keywords)
        self.dense, self.inner = layers.Dense(4), inner

    def call(self, inputs):
        return self.inner(self.dense(inputs))


class Noise(layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


def model_with(*hidden, policy="float32"):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((4,), name="x")
    for make in hidden:
        x = make()(x)
    return keras.Model(inputs, layers.Dense(2, name="y")(x), name="m")


def plain(policy="float32"):
    return model_with(lambda: layers.Dense(4, name="first"), policy=policy)


def said(call, *arguments, **keywords):
    with pytest.raises(ExportError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize("format", ["saved_model", "litert", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("policy", "inner", "named"),
    [
        (
            "mixed_float16",
            ByDtype,
            "(ByDtype) is the first that differs, by 0.5 of its largest value; it computes in fl",
        ),
        ("float32", ByMode, "(ByMode) is the first that differs, by 0.5 of its largest value. Where that is what you"),
    ],
)
def test_what_is_far_from_the_model_is_not_published_and_the_layer_is_named(format, policy, inner, named, tmp_path):
    model = model_with(
        lambda: layers.Dense(4),
        lambda: Block(inner(name="inner"), name="block"),
        lambda: layers.Dense(4),
        policy=policy,
    )
    text = said(keras_mp.export, model, tmp_path / "m", format=format, precision="float32", batch=ROWS)
    assert text.startswith("The export of 'm' differs from the model far beyond rounding, so it was not published. Out")
    assert f"In the order of the calls layer 'block/inner' {named}" in text
    assert text.endswith("Where that is what you want, type verify=False.")
    assert list(tmp_path.iterdir()) == []


def test_it_is_published_with_a_warning_where_nothing_is_to_be_verified(tmp_path):
    model = model_with(lambda: ByMode())
    with pytest.warns(KerasMPWarning, match="Output 'y' of 'serving_default' differs from the model's by 0.5 of its"):
        assert keras_mp.export(model, tmp_path / "m", verify=False).name == "1"


def test_a_model_that_answers_at_random_is_said_to(tmp_path):
    tf.random.set_seed(None)  # with one, a graph draws the same numbers in every process
    model = model_with(lambda: Noise())
    text = said(keras_mp.export, model, tmp_path / "m")
    assert (
        "Two calls of model 'm' differ: it answers at random. Where that is what you want, type verify=False." in text
    )
    with pytest.warns(KerasMPWarning, match="differs from the model's"):
        path = keras_mp.export(model, tmp_path / "m", verify=False)
    assert "it answers at random, and so nothing can be compared" in said(keras_mp.verify_export, path, model, ROWS)


@pytest.mark.slow  # tf2onnx makes another function of a lookup of strings
def test_the_layer_is_named_that_a_runtime_computes_otherwise(tmp_path):
    lookup = layers.StringLookup(vocabulary=["a", "b"], name="lookup")
    x = keras.Input((3,), dtype="string", name="x")
    model = keras.Model(x, layers.Dense(1)(layers.Flatten()(layers.Embedding(3, 4, name="e")(lookup(x)))), name="m")
    batch = np.array([["a", "b", "z"], ["b", "b", "a"]])
    try:
        path = keras_mp.export(model, tmp_path / "m", format="onnx", batch=batch)
    except ExportError as error:
        assert "onnxruntime does not: layer 'lookup' (StringLookup) is the first that differs there" in str(error)  # noqa: PT017
    else:
        assert keras_mp.verify_export(path, model, batch).outputs


# What verify_export blames


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = plain()
    return model, keras_mp.export(model, tmp_path_factory.mktemp("exported") / "m", batch=ROWS, verify=False)


def test_weights_that_were_changed_are_named(exported):
    _, path = exported
    model = plain()
    kernel = model.get_layer("first").kernel
    kernel.assign(kernel * 1.01)
    text = said(keras_mp.verify_export, path, model, ROWS)
    assert text.endswith(
        "The model was changed since: 1 of its weights, such as 'first/kernel', are others. Export the model again."
    )


def test_a_model_that_is_not_finite_is_blamed_itself(exported, tmp_path):
    _, path = exported
    model = plain()
    kernel = model.get_layer("first").kernel
    kernel.assign(tf.fill(kernel.shape, np.nan))
    reason = "In model 'm' itself NaN first comes out of layer 'first' (Dense), whose kernel is not finite."
    text = said(keras_mp.verify_export, path, model, ROWS)
    assert text.startswith("Output 'y' of the model itself is NaN or infinite where the export's is not. " + reason)
    assert "The weights are not those that were exported." in text
    with pytest.warns(KerasMPWarning) as told:
        other = keras_mp.export(model, tmp_path / "m", batch=ROWS, verify=False)
    assert reason in str(told[0].message)
    with pytest.warns(KerasMPWarning) as told:
        assert not keras_mp.verify_export(other, model, ROWS).outputs["y"].finite
    assert reason in str(told[0].message)
    text = said(keras_mp.verify_export, other, plain(), ROWS)
    assert text.startswith(
        "Output 'y' of the export is NaN or infinite where the model's is not. The model was changed"
    )


def test_a_batch_of_another_kind_is_blamed(exported, tmp_path):
    model, path = exported
    with pytest.warns(KerasMPWarning, match="input 'x' is given NaN or infinite values"):
        keras_mp.verify_export(path, model, ROWS * np.inf)
    model = plain("mixed_float16")
    path = keras_mp.export(model, tmp_path / "m", precision="float32", batch=ROWS, verify=False)
    text = said(keras_mp.verify_export, path, model, 1e5 * ROWS)
    assert "comes out of layer 'first' (Dense), which computes in float16. Give it a batch that it works with" in text
    with pytest.warns(KerasMPWarning, match="thousand times slower"):
        path = keras_mp.export(model, tmp_path / "n", precision="mixed", batch=ROWS, verify=False)
    twin = keras_mp.convert(model, "float32")
    text = said(keras_mp.verify_export, path, twin, 1e5 * ROWS)
    assert "The export computes in float16, and this model does not. Compare it with the one that was exported" in text


def test_a_batch_as_fit_takes_it_and_what_is_no_batch(exported):
    model, path = exported
    report = keras_mp.verify_export(path, model, (ROWS, np.ones((5, 2))))
    assert report.outputs["y"].shape == (5, 2)
    text = said(keras_mp.verify_export, path, model, tf.data.Dataset.from_tensor_slices(ROWS).batch(2))
    assert text.startswith("Input 'x' takes float32 of shape (None, 4); the batch gives _BatchDataset, which is not th")
    assert text.endswith("Give arrays, such as one batch of a dataset: next(iter(dataset)).")
    assert "Cast string to float" in said(keras_mp.verify_export, path, model, np.full((2, 4), "a"))


def test_a_model_whose_infinities_are_meant_is_published_without_a_warning(tmp_path):
    model = model_with(lambda: layers.Lambda(lambda x: tf.where(x > 0, x, -np.inf)))
    model = keras.Model(model.inputs, model.layers[1].output, name="m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = keras_mp.export(model, tmp_path / "m", batch=ROWS, verify=False)
        (report,) = keras_mp.verify_export(path, model, ROWS).outputs.values()
    assert not report.finite
    assert report.largest_error == 0


def test_errors_are_measured():
    nan, inf = np.nan, np.inf
    found, expected = np.array([1.0, nan, inf, 2.0]), np.array([1.0, nan, inf, 4.0])
    report = comparison.measure(found, expected)
    assert (report.largest_error, report.relative_error, report.finite) == (2.0, 0.5, False)
    assert np.isnan(comparison.measure(np.array([nan]), np.array([1.0])).relative_error)
    np.testing.assert_array_equal(comparison.comparable(np.array([1.0, 2.0]), np.array([nan, 3.0])), [1.0, 3.0])
    text = said(comparison.compare, "y", np.array([1, 2]), np.array([1, 3]), 0.0)
    assert text == "Output 'y' of the export differs from the model's in 0.5 of its values. Export the model again."
