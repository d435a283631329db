"""Activations: against float64, their gradients, every way of running them, and what the stock ones lose in 16 bits."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import activations
from tests.contract.layer_contract import assert_close

EVERYWHERE = np.concatenate([np.linspace(-12, 12, 481), [-60000.0, -300.0, -40.0, 40.0, 300.0, 60000.0]])
NAMES = ("gelu", "gelu, approximate", "silu", "hard_silu", "mish")
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-22, "float64": 1e-12}
# A factor below the smallest normal number, 2**-126 in float32, may be taken for zero, and is multiplied by |x| < 2**7.
SMALLEST = {"float16": 2.0**-25, "bfloat16": 2.0**-119, "float32": 2.0**-119, "float64": 1e-290}


def function(name, module=activations):
    if name == "gelu, approximate":
        return lambda x: module.gelu(x, approximate=True)
    return getattr(module, name)


def in_float64(name, x):
    """The function and its slope at one number, in Python's own floating point."""
    if name == "gelu":
        cdf = 0.5 * math.erfc(-x / math.sqrt(2))
        return x * cdf, cdf + x * math.exp(-min(x * x / 2, 700)) / math.sqrt(2 * math.pi)
    if name == "gelu, approximate":
        u = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        s, other = 1 / (1 + math.exp(min(-u, 700))), 1 / (1 + math.exp(min(u, 700)))
        return x * s, s + x * s * other * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    if name == "hard_silu":
        s = min(max(x + 3, 0), 6) / 6
        return x * s, (2 * x + 3) / 6 if -3 < x < 3 else s
    s = 1 / (1 + math.exp(min(-x, 700)))
    if name == "silu":
        return x * s, s * (1 + x / (1 + math.exp(min(x, 700))))
    t = math.tanh(math.log1p(math.exp(x)) if x < 30 else x)
    return x * t, t + x * s * (1 - t * t)


def value_and_gradient(run, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = run(x)
    return y, tape.gradient(y, x)


def assert_rounded(actual, expected, dtype, steps):
    """Asserts relative errors of at most so many roundings, except for numbers too small for the dtype."""
    actual = np.asarray(tf.cast(actual, "float64"))
    allowed = steps * ROUNDING[dtype] * np.abs(expected) + SMALLEST[dtype]
    assert (np.abs(actual - expected) <= allowed).all(), np.argmax(np.abs(actual - expected) / allowed)


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "XLA"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_float64_rounded_once(name, dtype, jit_compile):
    run = function(name)
    x = tf.constant(EVERYWHERE, dtype)
    expected = np.array([in_float64(name, float(value)) for value in np.asarray(tf.cast(x, "float64"))]).T
    step = lambda x: value_and_gradient(run, x)  # noqa: E731
    y, slope = step(x) if jit_compile is None else tf.function(step, jit_compile=jit_compile)(x)
    assert y.dtype == slope.dtype == x.dtype
    # In the tails float32 rounds the arguments of exp and erfc, up to 72, which is 100 units of the last digit.
    steps = 200 if dtype in ("float32", "float64") else 1.01
    assert_rounded(y, expected[0], dtype, steps)
    # The slope passes zero, where two terms of about 0.1 cancel.
    error = np.abs(np.asarray(tf.cast(slope, "float64")) - expected[1])
    assert (error <= steps * ROUNDING[dtype] * np.abs(expected[1]) + max(SMALLEST[dtype], 2e-7)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in NAMES if "hard" not in name])
def test_in_a_training_step_on_a_cpu_values_are_looked_up(name, dtype):
    """Each is the float64 value rounded to the nearest, as no computation in float32 is."""
    bits = np.arange(0, 1 << 16, 7, np.uint16)
    numbers = tf.bitcast(tf.constant(bits), dtype)
    numbers = tf.boolean_mask(numbers, tf.math.is_finite(numbers))
    wide = numbers.numpy().astype("float64")  # with subnormal numbers, which TensorFlow's cast takes for zero
    expected = np.array([in_float64(name, float(value))[0] for value in wide])
    run = function(name)
    y, _ = tf.function(lambda x: value_and_gradient(run, x))(numbers)
    np.testing.assert_array_equal(y.numpy(), expected.astype(numbers.dtype.as_numpy_dtype))


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", NAMES)
def test_stock_value_in_bfloat16_is_that_of_float64_rounded_once(name):
    x = tf.constant(EVERYWHERE, "bfloat16")
    expected = np.array([in_float64(name, float(value))[0] for value in np.asarray(tf.cast(x, "float64"))])
    assert_rounded(function(name, keras.activations)(x), expected, "bfloat16", 1.01)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_infinities_have_their_limits_and_nan_stays(name, dtype, in_graph):
    step = lambda x: value_and_gradient(function(name), x)  # noqa: E731
    y, slope = (tf.function(step) if in_graph else step)(tf.constant([-np.inf, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(tf.cast(y, "float32"), [0, np.inf, np.nan])
    np.testing.assert_array_equal(tf.cast(slope, "float32"), [0, 1, np.nan])


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", NAMES)
def test_stock_infinities_have_their_limits(name):
    y, slope = value_and_gradient(function(name, keras.activations), tf.constant([-np.inf, np.inf]))
    np.testing.assert_array_equal(y, [0, np.inf])
    np.testing.assert_array_equal(slope, [0, 1])


@pytest.mark.parametrize("name", [*NAMES, "softmax", "log_softmax"])
def test_gradients_are_finite_differences(name):
    """Of softmax and log_softmax in float32, as stock: their 16-bit operation is compared with these below."""
    if name in NAMES:
        x, delta, tolerance = tf.constant(np.random.normal(size=(3, 4)), "float64"), 1e-5, 1e-8
    else:
        # Rounding of float32 divided by delta.
        x, delta, tolerance = tf.constant(np.random.normal(size=(3, 4)), "float32"), 1e-2, 1e-3
    theoretical, numerical = tf.test.compute_gradient(function(name), [x], delta=delta)
    assert_close(theoretical[0], numerical[0], tolerance)


@pytest.mark.parametrize("name", [*NAMES, "softmax", "log_softmax"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_second_derivatives_of_16_bit_tensors(name, jit_compile):
    x = tf.constant(np.random.normal(size=(5, 4)), "bfloat16")

    def second(run, x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            _, slope = value_and_gradient(lambda x: tf.cast(run(x), "float32") ** 2, x)
            total = tf.reduce_sum(tf.cast(slope, "float32") ** 2)
        return outer.gradient(total, x)

    stock = getattr(keras.activations, name.split(",")[0])
    reference = (lambda x: stock(x, approximate=True)) if "," in name else stock
    if name == "gelu":
        reference = lambda x: stock(x, approximate=False)  # noqa: E731
    expected = second(reference, tf.cast(x, "float32"))
    actual = tf.function(lambda x: second(function(name), x), jit_compile=jit_compile)(x)
    assert_close(tf.cast(actual, "float32"), expected, 3e-2)  # first derivatives are rounded to bfloat16 in between


@pytest.mark.parametrize("axis", [-1, 0, None])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_softmax_and_its_logarithm_against_stock_float32(name, axis, dtype):
    x = tf.constant(np.random.normal(size=(3, 4)) * 5, dtype)
    upstream = tf.constant(np.random.normal(size=(3, 4)), dtype)
    results = []
    for module, given in ((activations, x), (keras.activations, tf.cast(x, "float32"))):
        with tf.GradientTape() as tape:
            tape.watch(given)
            y = getattr(module, name)(given, axis=axis)
        results.append((y, tape.gradient(y, given, tf.cast(upstream, given.dtype))))
    for (actual, expected), roundings in zip(zip(*results, strict=True), (1, 2), strict=True):
        assert actual.dtype == x.dtype
        # The gradient of the softmax is that of its rounded probabilities, rounded again.
        assert_close(tf.cast(actual, "float32"), expected, roundings * ROUNDING[dtype] * 1.01)


def test_log_softmax_of_large_and_masked_logits():
    y = activations.log_softmax(tf.constant([[60000.0, 59968.0, -np.inf], [-np.inf] * 3], "float16"))
    np.testing.assert_allclose(y, [[0, -32, -np.inf], [-math.log(3)] * 3], rtol=1e-3)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["gelu", "silu", "hard_silu", "mish", "softmax", "log_softmax"])
def test_in_layers_and_files(name, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    run = getattr(activations, name)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, activation=run)(inputs)
    hidden = run(hidden)
    if name == "gelu":
        hidden = activations.gelu(hidden, approximate=True)
    model = keras.Model(inputs, keras.layers.Activation(run)(hidden))
    x = np.random.normal(size=(2, 4)).astype("float32")
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[1].activation is run
    assert loaded(x).dtype == keras.dtype_policies.get(policy).compute_dtype
    np.testing.assert_array_equal(loaded(x), model(x))
    assert keras.activations.deserialize(keras.activations.serialize(run)) is run


@pytest.mark.parametrize("name", ["gelu", "silu", "hard_silu", "mish", "softmax", "log_softmax"])
def test_nothing_but_the_16_bit_input_is_kept(name):
    """What the graph's backward part reads from its forward part."""
    kept = []

    @tf.function(input_signature=[tf.TensorSpec((8, 32), "bfloat16")])
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = getattr(activations, name)(x)
        before = set(tf.compat.v1.get_default_graph().get_operations())
        tape.gradient(y, x)
        after = [op for op in tf.compat.v1.get_default_graph().get_operations() if op not in before]
        kept.extend(tensor for op in after for tensor in op.inputs if tensor.op in before)
        return y

    step.get_concrete_function()
    assert any(tensor.shape == (8, 32) for tensor in kept)
    assert {tensor.dtype for tensor in kept if tensor.shape == (8, 32)} == {tf.bfloat16}


def test_replicas_answer_for_their_own_part(mirrored):
    strategy = mirrored(2)
    x = np.random.normal(size=(4, 3)).astype("float32")
    parts = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(x[2 * context.replica_id_in_sync_group :][:2], "bfloat16")
    )
    step = tf.function(lambda part: value_and_gradient(activations.gelu, part))
    for index, whole in enumerate(value_and_gradient(activations.gelu, tf.constant(x, "bfloat16"))):
        results = strategy.run(step, [parts])[index]
        np.testing.assert_array_equal(tf.concat(strategy.experimental_local_results(results), 0), whole)


def test_bad_inputs_are_worded():
    with pytest.raises(ValueError, match="`gelu` takes a tensor of a floating-point dtype. Received: x.dtype=int32"):
        activations.gelu(np.array([1], "int32"))
    with pytest.raises(ValueError, match="`silu` takes a tensor of a floating-point dtype. Received: x.dtype=int32"):
        activations.silu(keras.Input((3,), dtype="int32"))
    for x in (np.ones((2, 3), "float16"), keras.Input((3,))):
        with pytest.raises(ValueError, match="Axis 2 is out of bounds for input shape"):
            activations.softmax(x, axis=2)


@pytest.mark.parametrize("how", ["eager", "graph", "XLA"])
@pytest.mark.parametrize("name", [*NAMES, "softmax", "log_softmax"])
@pytest.mark.parametrize("inside", [False, True], ids=["tape outside", "tape inside"])
def test_a_vectorized_map_has_the_gradients_of_each_row(name, how, inside):
    """`tf.vectorized_map` replaces ops one by one, and a tape outside of it never sees a gradient of one's own."""
    run = function(name)
    x = tf.constant([[1.0, 2.0, 0.5], [-1.0, 2.5, 0.25]], "bfloat16")

    def loss(x):
        return tf.reduce_sum(tf.cast(run(x), "float32") * [1.0, 2.0, 3.0])

    def gradient(x):
        if inside:
            return tf.vectorized_map(lambda row: value_and_gradient(loss, row)[1], x)
        return value_and_gradient(lambda x: tf.vectorized_map(loss, x), x)[1]

    mapped = gradient(x) if how == "eager" else tf.function(gradient, jit_compile=how == "XLA")(x)
    expected = tf.map_fn(lambda row: value_and_gradient(loss, row)[1], tf.cast(x, "float64"))
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(tf.cast(mapped, "float64"), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [*NAMES, "softmax", "log_softmax"])
def test_variables_and_forward_derivatives(name, dtype):
    run = function(name)
    x = tf.constant(np.linspace(-4, 4, 24).reshape(4, 6), dtype)
    direction = tf.constant(np.linspace(2, -2, 24).reshape(4, 6), dtype)
    variable = tf.Variable(x)
    y, slope = value_and_gradient(run, x)
    with tf.GradientTape() as tape:
        of_variable = run(variable)
    to_variable = tape.gradient(of_variable, variable)
    np.testing.assert_array_equal(of_variable, y)
    np.testing.assert_array_equal(to_variable, slope)
    h = 1e-4
    wide, along = tf.cast(x, "float64"), tf.cast(direction, "float64")
    expected = (run(wide + h * along) - run(wide - h * along)) / (2 * h)

    def derivative(x, direction):
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            y = run(x)
        return accumulator.jvp(y)

    for way in (derivative, tf.function(derivative)):
        assert_close(way(x, direction), expected, 2e-2 if dtype == "bfloat16" else 1e-5)
