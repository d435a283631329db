"""What every layer here promises under every dtype policy, checked by one helper."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16", "float64")

# Of the largest value: what rounding to the dtype allows, and the difference between two ways of computing in float32.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-5}


@dataclass(frozen=True)
class Case:
    """A layer, the stock layer it replaces, and what to call both with.

    Args:
        ours: makes the layer.
        stock: makes the layer it replaces.
        shapes: of its inputs, the first axis that of the batch, which must be even for two replicas.
        call: further arguments of the call.
        as_list: whether the inputs are given as one list, as Keras's `Attention` takes them.
        output_dtype: of the answer; None for the compute dtype.
        loads_stock_config: whether the class takes the configuration of the stock layer.
        differentiable: whether the gradient is that of the function, so that finite differences agree with it.
        random: whether two calls in training differ.
        synchronized: whether replicas answer as one device does to the whole batch.
        masked: whether to call both with inputs that carry a Keras mask; needs inputs of rank 3 or more.
        weights: the range of the random weights, positive for those of which some are variances.
        vanishing: ends of the paths of weights whose gradient is zero but for rounding.
        scale: the inputs are normally distributed with mean 1 and deviation 2, times this.
        tolerance: of 16-bit results relative to the largest, where rounding the output is not all; state the reason.
    """

    ours: Callable[[], Any]
    stock: Callable[[], Any]
    shapes: Sequence[tuple[int, ...]]
    call: dict[str, Any] = field(default_factory=dict)
    as_list: bool = False
    output_dtype: str | None = None
    loads_stock_config: bool = True
    differentiable: bool = True
    random: bool = False
    synchronized: bool = False
    masked: bool = True
    weights: tuple[float, float] = (0.5, 1.5)
    vanishing: tuple[str, ...] = ()
    scale: float = 1.0
    tolerance: dict[str, float] = field(default_factory=dict)

    def __call__(self, layer: Any, inputs: Sequence[Any], **call: Any) -> Any:
        """Calls a layer in this case's way."""
        arguments = {**self.call, **call}
        return layer(list(inputs), **arguments) if self.as_list else layer(*inputs, **arguments)

    def build(self, layer: Any) -> None:
        """Builds a layer for this case's shapes."""
        if not layer.built:
            self(layer, [keras.Input(shape[1:], batch_size=shape[0]) for shape in self.shapes])

    def allows(self, dtype: str) -> float:
        """The difference to allow, of the largest value."""
        return self.tolerance.get(dtype, TOLERANCE[dtype])


def checked(
    cases: dict[str, Case],
    stock_can: Callable[[str, str], bool] = lambda name, policy: True,
    firsts: Collection[str] = (),
) -> list[Any]:
    """Parameters of `name` and `policy`: a first case of each class in 16 bits and float64, the others in bfloat16.

    The rest, which takes minutes and shows little more, is of the slow tests.

    Args:
        cases: by name.
        stock_can: whether the stock layer of a case has kernels for a policy.
        firsts: names of cases to take instead of the first of each class.
    """
    firsts = firsts or {type(case.ours()): name for name, case in reversed(cases.items())}.values()
    return [
        pytest.param(name, policy, marks=() if policy in quick else pytest.mark.slow)
        for name in cases
        for quick in [POLICIES[1:] if name in firsts else ["mixed_bfloat16"]]
        for policy in POLICIES
        if stock_can(name, policy)
    ]


def check_contract(case: Case, policy: str, folder: Path, strategy: tf.distribute.Strategy) -> None:
    """Asserts everything a layer promises.

    Args:
        case: the layer and its stock twin.
        policy: name of the dtype policy to check under.
        folder: where a model file may be written.
        strategy: of two replicas.
    """
    keras.config.set_dtype_policy(policy)
    layer = case.ours()
    compute_dtype = keras.dtype_policies.get(policy).compute_dtype
    output_dtype = case.output_dtype or compute_dtype
    rng = np.random.default_rng(0)

    # Symbolic tensors tell the truth, also where the batch size is not known.
    symbolic = case(layer, [keras.Input(shape[1:], dtype=compute_dtype) for shape in case.shapes])
    # Rounded to the compute dtype, so that the float32 twin sees the same numbers.
    inputs = [
        tf.cast(tf.cast(case.scale * rng.normal(1.0, 2.0, shape), compute_dtype), "float32") for shape in case.shapes
    ]
    real = case(layer, [tf.cast(x, compute_dtype) for x in inputs])
    assert symbolic.dtype == output_dtype
    assert keras.backend.standardize_dtype(real.dtype) == output_dtype
    assert symbolic.shape == (None, *real.shape[1:])
    shapes = [list(case.shapes)] if case.as_list else case.shapes
    assert tuple(layer.compute_output_shape(*shapes)) == tuple(real.shape)
    upstream = tf.cast(tf.cast(rng.normal(0.0, 1.0, real.shape), output_dtype), "float32")

    # The weights keep the variable dtype.
    in_float32 = layer.dtype_policy.name == "float32"  # whatever the policy: `Float32` has made it so
    variable_dtype = "float32" if in_float32 else keras.dtype_policies.get(policy).variable_dtype
    assert {weight.dtype for weight in layer.weights if weight.dtype.startswith(("float", "bf"))} <= {variable_dtype}

    _randomize(case, layer, rng)
    _check_config(case)
    _check_saving(case, layer, inputs, folder)
    if not case.random:
        _check_against_stock(case, layer, inputs, upstream, compute_dtype, output_dtype)
        _check_training_flag(case, layer, inputs, compute_dtype)
        _check_xla(case, layer, inputs, upstream, compute_dtype, output_dtype)
        _check_replicas(case, layer, inputs, upstream, compute_dtype, output_dtype, strategy)
        _check_variables(case, layer, inputs, upstream, compute_dtype, output_dtype)
        if policy in ("float32", "mixed_bfloat16"):  # it takes a second, and float16 goes the ways of bfloat16
            _check_forward_mode(case, layer, inputs, compute_dtype)
    _check_masks(case, layer, inputs, compute_dtype)
    if policy == "float64" and case.differentiable and not case.random and output_dtype == "float64":
        _check_finite_differences(case, layer, inputs, upstream)


def gradients(layer: Any, x: Any, upstream: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Calls a layer of one input and pulls `upstream` back through it.

    Args:
        layer: a built layer.
        x: its input.
        upstream: gradient to its output, of the output's shape.
        call: further arguments of the call.

    Returns:
        Tensors by name: the output, the gradients to the input and to each trainable weight.
    """
    results = gradients_of(Case(None, None, [x.shape], call), layer, [x], upstream)
    return {"y": results.pop("y"), "x": results.pop("input 0"), **results}


def gradients_of(case: Case, layer: Any, inputs: Sequence[Any], upstream: Any) -> dict[str, Any]:
    """The same for a layer of several inputs, called as a case says."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = case(layer, inputs)
        loss = tf.reduce_sum(tf.cast(y, upstream.dtype) * upstream)
    variables = [weight.value for weight in layer.trainable_weights]
    to_inputs, to_weights = tape.gradient(loss, [list(inputs), variables], unconnected_gradients="zero")
    return (
        {"y": y}
        | {f"input {index}": gradient for index, gradient in enumerate(to_inputs)}
        | {
            # Without the name of the layer, which is another for each copy of it.
            weight.path.partition("/")[2]: tf.convert_to_tensor(gradient)
            for weight, gradient in zip(layer.trainable_weights, to_weights, strict=True)
        }
    )


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Asserts that two arrays differ by at most `tolerance` of the largest expected magnitude."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    largest = max(np.abs(expected).max(initial=0.0), 1e-30)
    np.testing.assert_allclose(actual / largest, expected / largest, rtol=0, atol=tolerance, err_msg=what)


def _randomize(case: Case, layer: Any, rng: np.random.Generator) -> None:
    # Counters and the state of random numbers stay what they are.
    layer.set_weights(
        [
            rng.uniform(*case.weights, weight.shape) if weight.dtype.startswith(("float", "bf")) else weight.numpy()
            for weight in layer.weights
        ]
    )


def _assert_all_close(
    case: Case, actual: dict[str, Any], expected: dict[str, Any], tolerance: float, what: str
) -> None:
    """Each result against its reference, relative to that; where it is nothing but rounding, to the largest of all."""
    largest = max(np.abs(np.asarray(value, "float64")).max(initial=0.0) for value in expected.values())
    for (name, value), reference in zip(actual.items(), expected.values(), strict=True):
        if name.endswith(case.vanishing or ("no such",)):
            np.testing.assert_allclose(value, np.zeros_like(value), atol=tolerance * largest, err_msg=name)
        else:
            assert_close(value, reference, tolerance, f"{what}{name}")


def _wide(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _stock_twin(case: Case, layer: Any) -> Any:
    """The stock layer, in float32 (or float64, if `layer` is), with the same weights."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(_wide(policy.name))
    try:
        stock = case.stock()
        case.build(stock)
    finally:
        keras.config.set_dtype_policy(policy)
    assert [weight.name for weight in stock.weights] == [weight.name for weight in layer.weights]
    stock.set_weights(layer.get_weights())
    return stock


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


def _check_saving(case: Case, layer: Any, inputs: Sequence[Any], folder: Path) -> None:
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
    expected = model(inputs)
    assert loaded(inputs).dtype == expected.dtype
    np.testing.assert_array_equal(loaded(inputs), expected)


def _check_against_stock(
    case: Case, layer: Any, inputs: Sequence[Any], upstream: Any, compute_dtype: str, output_dtype: str
) -> None:
    """The function and the weights are the stock layer's, and the weights go from one to the other and back."""
    before = layer.get_weights()
    stock = _stock_twin(case, layer)
    layer.set_weights(stock.get_weights())

    wide = _wide(compute_dtype)
    expected = gradients_of(case, stock, [tf.cast(x, wide) for x in inputs], tf.cast(upstream, wide))
    given = [tf.cast(x, compute_dtype) for x in inputs]
    actual = gradients_of(case, layer, given, tf.cast(upstream, output_dtype))
    _assert_all_close(case, actual, expected, case.allows(compute_dtype), "")
    for weight, reference in zip(layer.weights, stock.get_weights(), strict=True):
        assert_close(weight, reference, 1e-5, weight.path)  # also the moving statistics, which the call has moved
    layer.set_weights(before)


def _check_training_flag(case: Case, layer: Any, inputs: Sequence[Any], compute_dtype: str) -> None:
    """Both values of the flag mean what they mean to the stock layer, and the flag is that of the model around it."""
    if "training" not in inspect.signature(type(layer).call).parameters:
        return
    before = layer.get_weights()
    wide = _wide(compute_dtype)
    for training in (True, False):
        stock = _stock_twin(case, layer)
        expected = case(stock, [tf.cast(x, wide) for x in inputs], training=training)
        actual = case(layer, [tf.cast(x, compute_dtype) for x in inputs], training=training)
        assert_close(actual, expected, case.allows(compute_dtype), f"training={training}")
        layer.set_weights(before)


def _check_masks(case: Case, layer: Any, inputs: Sequence[Any], compute_dtype: str) -> None:
    """The mask that comes with the input does, and becomes, what it does with the stock layer."""
    if not case.masked or "mask" in case.call or any(x.shape.rank < 3 for x in inputs):
        return
    before = layer.get_weights()
    stock = _stock_twin(case, layer)
    assert layer.supports_masking == stock.supports_masking
    wide = _wide(compute_dtype)
    results = []
    for each, dtype in ((stock, wide), (layer, compute_dtype)):
        masked = []
        for x in inputs:
            # The last step is not there, nor the one before it in the second half of the batch.
            steps = x.shape[1]
            lengths = [steps - 1] * (x.shape[0] // 2) + [max(steps - 2, 1)] * (x.shape[0] - x.shape[0] // 2)
            there = tf.reshape(tf.sequence_mask(lengths, steps, dtype), [x.shape[0], steps] + [1] * (x.shape.rank - 2))
            masked.append(keras.layers.Masking(dtype=dtype)(tf.cast(x, dtype) * there))
        y = case(each, masked)
        results.append((y, getattr(y, "_keras_mask", None)))
    (expected, expected_mask), (actual, actual_mask) = results
    if not case.random:
        assert_close(actual, expected, case.allows(compute_dtype), "masked")
    assert (actual_mask is None) == (expected_mask is None)
    if actual_mask is not None:
        np.testing.assert_array_equal(actual_mask, expected_mask)
    layer.set_weights(before)


def _check_xla(
    case: Case, layer: Any, inputs: Sequence[Any], upstream: Any, compute_dtype: str, output_dtype: str
) -> None:
    """Compiled by XLA, and as a plain graph of unknown batch size, the numbers and the moved weights agree."""
    before = layer.get_weights()
    arguments = [tf.cast(x, compute_dtype) for x in inputs], tf.cast(upstream, output_dtype)
    results, after = {}, {}
    for jit_compile in (False, True):
        signature = tf.nest.map_structure(
            lambda tensor: tf.TensorSpec(tensor.shape if jit_compile else (None, *tensor.shape[1:]), tensor.dtype),  # noqa: B023
            arguments,
        )
        step = tf.function(
            lambda inputs, upstream: gradients_of(case, layer, inputs, upstream),
            input_signature=signature,
            jit_compile=jit_compile,
        )
        results[jit_compile] = step(*arguments)
        after[jit_compile] = {w.path: w.numpy() for w in layer.weights}
        layer.set_weights(before)
    in_order = {name: results[True][name] for name in results[False]}
    _assert_all_close(case, in_order, results[False], case.allows(compute_dtype), "XLA: ")
    for path, value in after[True].items():
        assert_close(value, after[False][path], 1e-5, path)


def _check_replicas(
    case: Case,
    layer: Any,
    inputs: Sequence[Any],
    upstream: Any,
    compute_dtype: str,
    output_dtype: str,
    strategy: tf.distribute.Strategy,
) -> None:
    """Each of two replicas answers to its half of the batch what one device does; synchronized ones, to all of it."""
    before = layer.get_weights()
    given, pulled = [tf.cast(x, compute_dtype) for x in inputs], tf.cast(upstream, output_dtype)
    batch = given[0].shape[0]
    assert batch % 2 == 0, "an odd batch does not divide among two replicas"
    # Masks among the further arguments are divided with the batch.
    masks = {name: value for name, value in case.call.items() if isinstance(value, np.ndarray) and len(value) == batch}
    halves = [
        ([x[part] for x in given], pulled[part], {name: tf.constant(mask[part]) for name, mask in masks.items()})
        for part in (slice(0, batch // 2), slice(batch // 2, batch))
    ]
    with strategy.scope():
        copy = case.ours()
        case.build(copy)
        copy.set_weights(before)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: halves[context.replica_id_in_sync_group]
    )

    def answers(layer: Any, inputs: Any, upstream: Any, masks: Any) -> dict[str, Any]:
        return gradients_of(dataclasses.replace(case, call={**case.call, **masks}), layer, inputs, upstream)

    step = tf.function(lambda values: strategy.run(lambda *half: answers(copy, *half), values))
    results = {name: strategy.experimental_local_results(value) for name, value in step(values).items()}
    tolerance = case.allows(compute_dtype)
    if case.synchronized:
        whole = gradients_of(case, layer, given, pulled)
        for name, parts in results.items():
            joined = tf.concat(parts, 0) if name == "y" or name.startswith("input ") else parts[0] + parts[1]
            assert_close(joined, whole[name], tolerance, f"both replicas: {name}")
        layer.set_weights(before)
        return
    for index, half in enumerate(halves):
        layer.set_weights(before)
        expected = answers(layer, *half)
        actual = {name: results[name][index] for name in expected}
        _assert_all_close(case, actual, expected, tolerance, f"replica {index}: ")
    layer.set_weights(before)


def _check_variables(
    case: Case, layer: Any, inputs: Sequence[Any], upstream: Any, compute_dtype: str, output_dtype: str
) -> None:
    """Variables are inputs as tensors are, and have gradients."""
    before = layer.get_weights()
    given, pulled = [tf.cast(x, compute_dtype) for x in inputs], tf.cast(upstream, output_dtype)
    expected = gradients_of(case, layer, given, pulled)
    for of_keras in (False, True):
        layer.set_weights(before)
        variables = [keras.Variable(x, dtype=compute_dtype) if of_keras else tf.Variable(x) for x in given]
        with tf.GradientTape() as tape:
            y = case(layer, variables)
            loss = tf.reduce_sum(tf.cast(y, pulled.dtype) * pulled)
        np.testing.assert_array_equal(y, expected["y"])
        for index, to_x in enumerate(tape.gradient(loss, [x.value if of_keras else x for x in variables])):
            assert_close(to_x, expected[f"input {index}"], 1e-6, f"variable {index}")
    layer.set_weights(before)


def _check_forward_mode(case: Case, layer: Any, inputs: Sequence[Any], compute_dtype: str) -> None:
    """A forward accumulator finds the derivative of the stock layer in float32, in eager code and in a graph."""
    before = layer.get_weights()
    rng = np.random.default_rng(1)
    tangents = [tf.cast(tf.cast(rng.normal(0.0, 1.0, x.shape), compute_dtype), "float32") for x in inputs]

    def derivative(layer: Any, inputs: Any, tangents: Any) -> Any:
        with tf.autodiff.ForwardAccumulator(list(inputs), list(tangents)) as accumulator:
            y = case(layer, inputs)
        return accumulator.jvp(y)

    stock = _stock_twin(case, layer)
    try:
        expected = derivative(stock, inputs, tangents)
    except LookupError:  # kernels for images, whose gradients have none; they are linear
        expected = case(stock, [x + t for x, t in zip(inputs, tangents, strict=True)]) - case(stock, inputs)
    given = [[tf.cast(x, compute_dtype) for x in each] for each in (inputs, tangents)]
    for run in (derivative, tf.function(derivative, autograph=False)):
        layer.set_weights(before)
        assert_close(run(layer, *given), expected, 2 * case.allows(compute_dtype), "forward derivative")
    layer.set_weights(before)


def _check_finite_differences(case: Case, layer: Any, inputs: Sequence[Any], upstream: Any) -> None:
    before = layer.get_weights()
    wide = [tf.cast(x, "float64") for x in inputs]
    upstream = tf.cast(upstream, "float64")

    @tf.function  # it is called twice for each number
    def loss(*given: Any) -> Any:
        return tf.reduce_sum(case(layer, given) * upstream)

    theoretical, numerical = tf.test.compute_gradient(loss, wide, delta=1e-5)
    for index, (ours, reference) in enumerate(zip(theoretical, numerical, strict=True)):
        # The error of the central difference is of the order of delta squared, and rounding divided by delta.
        assert_close(ours, reference, 1e-6, f"finite differences, input {index}")
    layer.set_weights(before)
