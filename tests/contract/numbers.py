"""The part of the contract that runs in eager code: dtypes, configuration, files, and the stock layer's numbers."""

import inspect
import json
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tests.contract.case import Case, Subject, assert_all_close, assert_close, gradients_of, stock_twin, wide_dtype


def check_numbers(subject: Subject, folder: Path) -> None:
    """Asserts everything a layer promises in eager code.

    Args:
        subject: the layer, its stock twin and its inputs.
        folder: where a model file may be written.
    """
    _check_variable_dtype(subject)
    _check_config(subject.case)
    _check_saving(subject, folder)
    if not subject.case.random:
        _check_against_stock(subject)
        _check_training_flag(subject)
        _check_variables(subject)
    _check_masks(subject)
    if subject.output_dtype == "float64" and subject.case.differentiable and not subject.case.random:
        _check_finite_differences(subject)


def _check_variable_dtype(subject: Subject) -> None:
    """Weights have the policy's variable dtype; under `Float32` they are float32 whatever the policy."""
    policy = subject.layer.dtype_policy if subject.layer.dtype_policy.name == "float32" else keras.config.dtype_policy()
    dtypes = {weight.dtype for weight in subject.layer.weights if weight.dtype.startswith(("float", "bf"))}
    assert dtypes <= {policy.variable_dtype}


def _check_config(case: Case) -> None:
    layer = case.ours()
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert json.dumps(again.get_config(), sort_keys=True) == json.dumps(config, sort_keys=True)
    assert again.dtype_policy.name == layer.dtype_policy.name
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == f"keras_mp>{type(layer).__name__}"
    if case.loads_stock_config:
        assert type(layer).from_config(case.stock().get_config()).get_config().keys() == config.keys()


def _check_saving(subject: Subject, folder: Path) -> None:
    case, layer = subject.case, subject.layer
    symbolic = [keras.Input(shape[1:], dtype="float32") for shape in case.shapes]
    call = {name: value for name, value in case.call.items() if name != "training"}
    outputs = layer(symbolic, **call) if case.as_list else layer(*symbolic, **call)
    model = keras.Model(symbolic, outputs)
    path = folder / "model.keras"
    model.save(path)
    keras.config.set_dtype_policy("float32")  # the file knows better
    loaded = keras.models.load_model(path)
    keras.config.set_dtype_policy(layer.dtype_policy)
    assert type(loaded.layers[-1]) is type(layer)
    expected, actual = model(subject.inputs), loaded(subject.inputs)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


def _check_against_stock(subject: Subject) -> None:
    """Results and weights are the stock layer's, and weights can be set from one to the other and back."""
    case, layer = subject.case, subject.layer
    before = layer.get_weights()
    stock = stock_twin(case, layer)
    layer.set_weights(stock.get_weights())

    wide = wide_dtype(subject.compute_dtype)
    expected = gradients_of(case, stock, [tf.cast(x, wide) for x in subject.inputs], tf.cast(subject.upstream, wide))
    actual = gradients_of(case, layer, subject.given, subject.pulled)
    assert_all_close(case, actual, expected, case.allows(subject.compute_dtype), "")
    for weight, reference in zip(layer.weights, stock.get_weights(), strict=True):
        assert_close(weight, reference, 1e-5, weight.path)  # also the moving statistics, which the call has moved
    layer.set_weights(before)


def _check_training_flag(subject: Subject) -> None:
    """Each value of `training` has the effect that it has on the stock layer."""
    case, layer = subject.case, subject.layer
    if "training" not in inspect.signature(type(layer).call).parameters:
        return
    before = layer.get_weights()
    wide = wide_dtype(subject.compute_dtype)
    for training in (True, False):
        stock = stock_twin(case, layer)
        expected = case(stock, [tf.cast(x, wide) for x in subject.inputs], training=training)
        actual = case(layer, subject.given, training=training)
        assert_close(actual, expected, case.allows(subject.compute_dtype), f"training={training}")
        layer.set_weights(before)


def _check_masks(subject: Subject) -> None:
    """An input's mask has the effect that it has on the stock layer, and so does the output's mask."""
    case, layer = subject.case, subject.layer
    if not case.masked or "mask" in case.call or any(len(shape) < 3 for shape in case.shapes):
        return
    before = layer.get_weights()
    stock = stock_twin(case, layer)
    assert layer.supports_masking == stock.supports_masking
    wide = wide_dtype(subject.compute_dtype)
    results = []
    for each, dtype in ((stock, wide), (layer, subject.compute_dtype)):
        masked = []
        for x in subject.inputs:
            # The last step is not there, nor the one before it in the second half of the batch.
            steps = x.shape[1]
            lengths = [steps - 1] * (x.shape[0] // 2) + [max(steps - 2, 1)] * (x.shape[0] - x.shape[0] // 2)
            there = tf.reshape(tf.sequence_mask(lengths, steps, dtype), [x.shape[0], steps] + [1] * (x.shape.rank - 2))
            masked.append(keras.layers.Masking(dtype=dtype)(tf.cast(x, dtype) * there))
        y = case(each, masked)
        results.append((y, getattr(y, "_keras_mask", None)))
    (expected, expected_mask), (actual, actual_mask) = results
    if not case.random:
        assert_close(actual, expected, case.allows(subject.compute_dtype), "masked")
    assert (actual_mask is None) == (expected_mask is None)
    if actual_mask is not None:
        np.testing.assert_array_equal(actual_mask, expected_mask)
    layer.set_weights(before)


def _check_variables(subject: Subject) -> None:
    """Variables are taken as inputs, and have gradients."""
    case, layer = subject.case, subject.layer
    before = layer.get_weights()
    given, pulled = subject.given, subject.pulled
    expected = gradients_of(case, layer, given, pulled)
    for of_keras in (False, True):
        layer.set_weights(before)
        variables = [keras.Variable(x, dtype=subject.compute_dtype) if of_keras else tf.Variable(x) for x in given]
        with tf.GradientTape() as tape:
            y = case(layer, variables)
            loss = tf.reduce_sum(tf.cast(y, pulled.dtype) * pulled)
        np.testing.assert_array_equal(y, expected["y"])
        for index, to_x in enumerate(tape.gradient(loss, [x.value if of_keras else x for x in variables])):
            assert_close(to_x, expected[f"input {index}"], 1e-6, f"variable {index}")
    layer.set_weights(before)


def _check_finite_differences(subject: Subject) -> None:
    case, layer = subject.case, subject.layer
    before = layer.get_weights()
    wide = [tf.cast(x, "float64") for x in subject.inputs]
    upstream = tf.cast(subject.upstream, "float64")

    @tf.function  # it is called twice for each number
    def loss(*given: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(case(layer, given) * upstream)

    theoretical, numerical = tf.test.compute_gradient(loss, wide, delta=1e-5)
    for index, (ours, reference) in enumerate(zip(theoretical, numerical, strict=True)):
        # The error of the central difference is of the order of delta squared, and rounding divided by delta.
        assert_close(ours, reference, 1e-6, f"finite differences, input {index}")
    layer.set_weights(before)
