"""What every layer here promises under every dtype policy, checked by one helper."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16", "float64")

# Of the largest value: what rounding to the dtype allows, and the difference between two ways of computing in float32.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-5}


@dataclass(frozen=True)
class Case:
    """A layer, the stock layer it replaces, and what to call both with."""

    ours: Callable[[], Any]
    stock: Callable[[], Any]
    shape: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=dict)
    output_dtype: str | None = None  # None: the compute dtype
    loads_stock_config: bool = True


def check_contract(case: Case, policy: str, folder: Path) -> None:
    """Asserts everything a layer promises.

    Args:
        case: the layer and its stock twin.
        policy: name of the dtype policy to check under.
        folder: where a model file may be written.
    """
    keras.config.set_dtype_policy(policy)
    layer = case.ours()
    compute_dtype = keras.dtype_policies.get(policy).compute_dtype
    output_dtype = case.output_dtype or compute_dtype
    rng = np.random.default_rng(0)
    # Rounded to the compute dtype, so that the float32 twin sees the same numbers.
    x = tf.cast(tf.cast(rng.normal(1.0, 2.0, case.shape), compute_dtype), "float32")
    upstream = tf.cast(tf.cast(rng.normal(0.0, 1.0, case.shape), output_dtype), "float32")

    # Symbolic tensors tell the truth, also where the batch size is not known.
    symbolic = layer(keras.Input(case.shape[1:], dtype=compute_dtype), **case.call)
    real = layer(tf.cast(x, compute_dtype), **case.call)
    assert symbolic.dtype == output_dtype
    assert keras.backend.standardize_dtype(real.dtype) == output_dtype
    assert symbolic.shape == (None, *real.shape[1:])
    assert layer.compute_output_shape(case.shape) == tuple(real.shape)

    # The weights keep the variable dtype.
    variable_dtype = "float32" if case.output_dtype == "float32" else keras.dtype_policies.get(policy).variable_dtype
    assert {weight.dtype for weight in layer.weights} <= {variable_dtype}

    _randomize(layer, rng)
    _check_config(case)
    _check_saving(case, layer, x, folder)
    _check_against_stock(case, layer, x, upstream, compute_dtype, output_dtype)
    _check_xla(case, layer, x, upstream, compute_dtype, output_dtype)


def gradients(layer: Any, x: Any, upstream: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Calls a layer and pulls `upstream` back through it.

    Args:
        layer: a built layer.
        x: its input.
        upstream: gradient to its output, of the output's shape.
        call: further arguments of the call.

    Returns:
        float64 arrays by name: the output, the gradients to the input and to each trainable weight.
    """
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, **call)
        loss = tf.reduce_sum(tf.cast(y, upstream.dtype) * upstream)
    variables = [weight.value for weight in layer.trainable_weights]
    to_x, *to_weights = tape.gradient(loss, [x, *variables])
    return {"y": y, "x": to_x} | {
        weight.path: gradient for weight, gradient in zip(layer.trainable_weights, to_weights, strict=True)
    }


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Asserts that two arrays differ by at most `tolerance` of the largest expected magnitude."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    largest = max(np.abs(expected).max(initial=0.0), 1e-30)
    np.testing.assert_allclose(actual / largest, expected / largest, rtol=0, atol=tolerance, err_msg=what)


def _randomize(layer: Any, rng: np.random.Generator) -> None:
    # Positive, as a moving variance is.
    layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.weights])


def _check_config(case: Case) -> None:
    layer = case.ours()
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert again.dtype_policy.name == layer.dtype_policy.name
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == f"keras_mp>{type(layer).__name__}"
    if case.loads_stock_config:
        assert type(layer).from_config(case.stock().get_config()).get_config().keys() == config.keys()


def _check_saving(case: Case, layer: Any, x: Any, folder: Path) -> None:
    inputs = keras.Input(case.shape[1:], dtype="float32")
    model = keras.Model(inputs, layer(inputs, **{k: v for k, v in case.call.items() if k != "training"}))
    path = folder / "model.keras"
    model.save(path)
    keras.config.set_dtype_policy("float32")  # the file knows better
    loaded = keras.models.load_model(path)
    keras.config.set_dtype_policy(layer.dtype_policy)
    assert type(loaded.layers[-1]) is type(layer)
    expected = model(x)
    assert loaded(x).dtype == expected.dtype
    np.testing.assert_array_equal(loaded(x), expected)


def _check_against_stock(case: Case, layer: Any, x: Any, upstream: Any, compute_dtype: str, output_dtype: str) -> None:
    """The function and the weights are the stock layer's, and the weights go from one to the other and back."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64" if policy.name == "float64" else "float32")
    stock = case.stock()
    stock.build(case.shape)
    keras.config.set_dtype_policy(policy)
    assert [w.name for w in stock.weights] == [w.name for w in layer.weights]
    before = layer.get_weights()
    stock.set_weights(before)
    layer.set_weights(stock.get_weights())

    wide = "float64" if policy.name == "float64" else "float32"
    expected = gradients(stock, tf.cast(x, wide), tf.cast(upstream, wide), case.call)
    actual = gradients(layer, tf.cast(x, compute_dtype), tf.cast(upstream, output_dtype), case.call)
    for (name, value), reference in zip(actual.items(), expected.values(), strict=True):
        assert_close(value, reference, TOLERANCE[compute_dtype], name)
    for weight, reference in zip(layer.weights, stock.get_weights(), strict=True):
        assert_close(weight, reference, 1e-5, weight.path)  # also the moving statistics, which the call has moved
    layer.set_weights(before)


def _check_xla(case: Case, layer: Any, x: Any, upstream: Any, compute_dtype: str, output_dtype: str) -> None:
    """Compiled by XLA, and as a plain graph of unknown batch size, the numbers and the moved weights agree."""
    before = layer.get_weights()
    arguments = tf.cast(x, compute_dtype), tf.cast(upstream, output_dtype)
    results = {}
    for jit_compile in (False, True):
        shape = case.shape if jit_compile else (None, *case.shape[1:])
        signature = [tf.TensorSpec(shape, argument.dtype) for argument in arguments]
        step = tf.function(
            lambda x, upstream: gradients(layer, x, upstream, case.call),
            input_signature=signature,
            jit_compile=jit_compile,
        )
        results[jit_compile] = step(*arguments) | {f"after {w.path}": w.numpy() for w in layer.weights}
        layer.set_weights(before)
    for name, value in results[True].items():
        after = name.startswith("after ")
        assert_close(value, results[False][name], 1e-5 if after else TOLERANCE[compute_dtype], name)
