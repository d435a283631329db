"""Convolutions: the contract, and gradients to the kernel against TensorFlow's own, with second derivatives."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from keras_mp.ops import conv_gradients
from tests.contract.layer_contract import POLICIES, Case, contract
from tests.helpers.derivatives import early_operations


def case(name, shape, *arguments, **settings):
    ours, stock = getattr(layers, name), getattr(keras.layers, name)
    return Case(
        lambda **more: ours(*arguments, **settings, **more),
        lambda **more: stock(*arguments, **settings, **more),
        [shape],
        masked=False,
    )


CASES = {
    "pointwise": case("Conv2D", (2, 5, 4, 3), 6, 1),
    "pointwise, strides": case("Conv2D", (2, 5, 4, 3), 6, 1, strides=(2, 3), padding="same"),
    "small": case("Conv2D", (2, 5, 4, 3), 2, 3, padding="same", activation="relu"),
    "small, valid, uneven": case("Conv2D", (2, 5, 6, 3), 2, (2, 3), use_bias=False),
    "small, even kernel": case("Conv2D", (2, 5, 6, 3), 2, (4, 2), padding="same"),
    "kernel larger than the image": case("Conv2D", (2, 2, 2, 3), 2, 5, padding="same"),
    "strides": case("Conv2D", (2, 7, 6, 3), 2, 3, strides=2, padding="same"),
    "strides, valid": case("Conv2D", (2, 7, 6, 3), 2, 3, strides=(1, 2)),
    "wide": case("Conv2D", (2, 2, 16, 3), 2, 3, padding="same"),
    "dilation": case("Conv2D", (2, 6, 6, 3), 2, 2, dilation_rate=2),
    "depthwise, 3": case("DepthwiseConv2D", (2, 5, 6, 3), 3, padding="same"),
    "depthwise, 5": case("DepthwiseConv2D", (2, 5, 6, 3), 5, padding="same", activation="relu"),
    "depthwise, 7, strides": case("DepthwiseConv2D", (2, 9, 8, 3), 7, strides=2, padding="same"),
    "depthwise, uneven, valid": case("DepthwiseConv2D", (2, 6, 9, 3), (2, 5), use_bias=False),
    "depthwise, 3, strides": case("DepthwiseConv2D", (2, 7, 6, 3), 3, strides=2, padding="same"),
    "a group a channel": case("Conv2D", (2, 6, 7, 3), 6, 5, groups=3, padding="same", activation="relu"),
    "a group a channel, strides": case("Conv2D", (2, 7, 6, 3), 3, 3, groups=3, strides=2, use_bias=False),
    "two channels a group": case("Conv2D", (2, 5, 6, 4), 6, 3, groups=2),
    "depthwise, multiplier": case("DepthwiseConv2D", (2, 6, 7, 3), (4, 1), depth_multiplier=2, padding="same"),
    "depthwise, dilation": case("DepthwiseConv2D", (2, 6, 7, 3), 3, dilation_rate=2),
    "separable": case("SeparableConv2D", (2, 6, 7, 3), 4, 3, padding="same", activation="relu"),
    "separable, 5, strides": case("SeparableConv2D", (2, 9, 8, 3), 4, 5, strides=2, depth_multiplier=2),
    "separable, dilation": case("SeparableConv2D", (2, 6, 7, 3), 4, 3, dilation_rate=2, use_bias=False),
    "transposed": case("Conv2DTranspose", (2, 4, 5, 3), 4, 3, strides=2, padding="same", activation="relu"),
    "transposed, output padding": case("Conv2DTranspose", (2, 4, 5, 3), 4, (3, 2), strides=2, output_padding=1),
    "1D": case("Conv1D", (2, 7, 3), 4, 3, strides=2, padding="same", activation="relu"),
    "1D, causal, dilation": case("Conv1D", (2, 7, 3), 4, 3, padding="causal", dilation_rate=2),
    "1D, groups": case("Conv1D", (2, 7, 4), 4, 2, groups=2, use_bias=False),
    "1D, a group a channel": case("Conv1D", (2, 9, 3), 6, 5, groups=3, padding="causal", activation="relu"),
    "1D, a group a channel, strides": case("Conv1D", (2, 9, 3), 3, 3, groups=3, strides=2),
    "1D, depthwise": case("DepthwiseConv1D", (2, 7, 3), 5, padding="same", depth_multiplier=2, activation="relu"),
    "1D, separable": case("SeparableConv1D", (2, 7, 3), 4, 3, strides=2, padding="same"),
    "1D, transposed": case("Conv1DTranspose", (2, 5, 3), 4, 3, strides=2, padding="same"),
    "3D": case("Conv3D", (2, 4, 5, 3, 2), 4, (2, 3, 1), padding="same", activation="relu"),
    "3D, strides": case("Conv3D", (2, 5, 5, 4, 2), 4, 3, strides=2, padding="same", use_bias=False),
    "3D, transposed": case("Conv3DTranspose", (2, 3, 2, 3, 2), 4, 2, strides=2),
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def derivatives(layer, x, upstream, compile_by):
    """The gradients to input and kernel, and those of a function of both gradients."""
    variables = layer.trainable_variables

    def run(x, upstream):
        with tf.GradientTape() as outer:
            outer.watch([x, upstream])
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
            first = tape.gradient(y, [x, *variables], upstream)
            penalty = tf.add_n([tf.reduce_sum(tf.cast(g, tf.float32) ** 2) for g in first])
        second = outer.gradient(penalty, [x, upstream, *variables])
        return first, [tf.zeros([]) if gradient is None else gradient for gradient in second]  # None: of the bias

    return compile_by(run)(x, upstream)


@pytest.mark.parametrize(
    ("name", "compile_by"),
    [
        pytest.param(name, compile_by, id=f"{name}-{how}", marks=() if number % 2 == order else pytest.mark.slow)
        for number, name in enumerate(CASES)
        for order, (how, compile_by) in enumerate({"graph": tf.function, "eager": lambda run: run}.items())
    ],
)
def test_first_and_second_derivatives_are_tensorflows(name, compile_by):
    ours, stock = CASES[name].ours(), CASES[name].stock()
    (shape,) = CASES[name].shapes
    generator = np.random.default_rng(0)
    x = tf.constant(generator.standard_normal(shape).astype("float32"))
    upstream = tf.constant(generator.standard_normal(ours(x).shape).astype("float32"))
    stock.build(shape)
    stock.set_weights(ours.get_weights())
    results = [tf.nest.flatten(derivatives(layer, x, upstream, compile_by)) for layer in (ours, stock)]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pointwise", "pointwise"),
        ("pointwise, strides", "pointwise"),
        ("small", "by_offsets"),
        ("strides", "by_patches"),
        ("wide", None),
        ("dilation", None),
        ("depthwise, 3", None),
        ("a group a channel", "by_tiles"),
        ("two channels a group", None),
        ("depthwise, 5", "by_tiles"),
        ("separable", "pointwise"),
        ("1D, depthwise", "by_tiles"),
        ("1D, a group a channel", "by_tiles"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_way_is_the_one_meant(name, expected, dtype, monkeypatch, gains_from_16_bits):
    """In 16 bits on a CPU that is fast in bfloat16, and in float32 inside on one that is not."""
    taken = []
    for way in ("pointwise", "by_offsets", "by_patches", "by_tiles"):
        original = getattr(conv_gradients, way)
        monkeypatch.setattr(
            conv_gradients, way, lambda *a, way=way, original=original, **k: taken.append(way) or original(*a, **k)
        )
    keras.config.set_dtype_policy(f"mixed_{dtype}")
    layer = CASES[name].ours()
    (shape,) = CASES[name].shapes
    with tf.GradientTape() as tape:
        y = layer(tf.ones(shape, dtype))
    weights = layer.trainable_weights
    assert [each.shape for each in tape.gradient(y, weights)] == [weight.shape for weight in weights]
    if not gains_from_16_bits:
        assert taken == ([expected] if expected and expected != "by_patches" else [])
    else:
        assert taken == ([expected] if expected and dtype == "bfloat16" else [])


@pytest.mark.parametrize("name", ["pointwise", "small", "depthwise, 5"])
def test_what_is_no_training_step_is_keras_graph(name):
    """So that an export holds what Keras's layer would: TensorFlow ends the process over a convolution fused with its
    bias where an input has the wrong rank."""
    layers_ = CASES[name].ours(), CASES[name].stock()
    x = tf.ones(CASES[name].shapes[0])
    operations = [
        [operation.type for operation in tf.function(layer).get_concrete_function(x).graph.get_operations()]
        for layer in layers_
        if layer(x) is not None
    ]
    assert operations[0] == operations[1]


def compiled_gradients(layer):
    """A function, compiled by XLA, from an input to the gradients to it and to the layer's variables."""

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.sin(tf.cast(layer(x), "float32"))
        return tape.gradient(y, [x, *(variable.value for variable in layer.trainable_variables)])

    return tf.function(gradients, jit_compile=True, autograph=False)


@pytest.mark.parametrize("name", ["wide", "strides", "dilation", "two channels a group"])
@pytest.mark.parametrize("policy", POLICIES)
def test_xla_keeps_no_rounded_kernel_between_the_passes(name, policy):
    (shape,) = CASES[name].shapes
    ours, stock = CASES[name].ours(dtype=policy), CASES[name].stock(dtype=policy)
    ours.build(shape)
    stock.build(shape)
    stock.set_weights(ours.get_weights())
    x = tf.cast(np.random.default_rng(0).standard_normal(shape), ours.compute_dtype)
    for one, other in zip(compiled_gradients(ours)(x), compiled_gradients(stock)(x), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(tf.cast(one, "float32"), tf.cast(other, "float32"))
    lines = compiled_gradients(ours).experimental_get_compiler_ir(x)(stage="hlo").splitlines()
    held = [line for line in lines if "opt-barrier(" in line]
    size = ",".join(map(str, ours.kernel.shape))
    assert len(held) == policy.startswith("mixed"), held
    assert all(f"f32[{size}]" in line for line in held), held


@pytest.mark.parametrize("name", ["a group a channel", "1D, a group a channel"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_group_a_channel_is_a_depthwise_convolution(dtype, training, name):
    """Keras has XLA compile it, which is slow on a CPU, and which TensorFlow Serving refuses."""
    found = []
    (shape,) = CASES[name].shapes
    for layer in (CASES[name].ours(), CASES[name].stock()):
        layer.build(shape)

        def step(x, layer=layer):
            with tf.GradientTape() if training else contextlib.nullcontext():
                return layer(x)

        graph = tf.function(step).get_concrete_function(tf.TensorSpec(shape, dtype)).graph
        found.append({operation.type for operation in graph.get_operations()})
    assert "DepthwiseConv2dNative" in found[0]
    assert not {kind for kind in found[0] if "Call" in kind}
    assert {kind for kind in found[1] if "Call" in kind}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("depthwise, 3", "bfloat16"), ("depthwise, 3, strides", "float32"), ("a group a channel, strides", "float32")],
)
def test_the_gradient_to_the_input_is_computed_in_the_dtype_that_is_fast(name, expected, gains_from_16_bits):
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = CASES[name].ours()
    (shape,) = CASES[name].shapes
    layer.build(shape)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, x)

    function = tf.function(step).get_concrete_function(tf.TensorSpec(shape, "bfloat16"))
    gradients = [each for each in function.graph.get_operations() if each.type == "DepthwiseConv2dNativeBackpropInput"]
    assert [each.outputs[0].dtype.name for each in gradients] == [expected if gains_from_16_bits else "float32"]
    assert function.output_dtypes == tf.bfloat16


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rank", [2, 3])
def test_a_convolution_of_ones_own_may_answer_in_another_dtype(rank, policy):
    def made(base):
        class Halved(base):
            def convolution_op(self, inputs, kernel):
                inputs, kernel = tf.cast(inputs, "float32"), tf.cast(kernel, "float32")
                return super().convolution_op(inputs, kernel) / 2

        return Halved(3, 2, bias_initializer="ones", dtype=policy)

    ours, stock = made(getattr(layers, f"Conv{rank}D")), made(getattr(keras.layers, f"Conv{rank}D"))
    x = tf.constant(np.random.default_rng(0).standard_normal((2, *[4] * rank, 2)), stock.compute_dtype)
    results = []
    for layer in (ours, stock):
        layer.build(x.shape)
        layer.set_weights(ours.get_weights())
        with tf.GradientTape() as tape:
            y = layer(x)
        results.append([y, *tape.gradient(y, layer.trainable_weights)])
    tolerance = {"bfloat16": 2**-7, "float16": 2**-10}.get(ours.compute_dtype, 1e-5)  # TensorFlow sums the bias's in it
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(tf.cast(one, "float64"), tf.cast(other, "float64"), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "strides" in name])
def test_float64_is_not_rounded_on_the_way(name):
    ours, stock = CASES[name].ours(dtype="float64"), CASES[name].stock(dtype="float64")
    (shape,) = CASES[name].shapes
    ours.build(shape)
    stock.build(shape)
    stock.set_weights(ours.get_weights())
    x = tf.constant(np.random.default_rng(0).standard_normal(shape))
    upstream = tf.constant(np.random.default_rng(1).standard_normal(ours(x).shape))
    results = [tf.nest.flatten(derivatives(layer, x, upstream, lambda run: run)[0]) for layer in (ours, stock)]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12 * np.abs(other).max())


@pytest.mark.parametrize("known", [True, False], ids=["known sizes", "unknown sizes"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [name for name in CASES if "a group a channel" in name])
def test_no_rows_of_a_group_a_channel_have_the_shape_of_others(name, policy, known):
    """Of no rows TensorFlow's depthwise convolution answers with the shape of its input, Keras's by XLA does not."""
    layer = CASES[name].ours(dtype=policy)
    (shape,) = CASES[name].shapes
    expected = layer(tf.ones(shape)).shape
    signature = [None, *(shape[1:-1] if known else [None] * layer.rank), shape[-1]]
    served = tf.function(layer, input_signature=[tf.TensorSpec(signature, "float32")])
    assert served(tf.zeros((0, *shape[1:]))).shape == (0, *expected[1:])


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", ["pointwise", "1D", "3D", "depthwise, multiplier", "separable"])
def test_stock_no_rows_have_the_shape_of_others(name):
    layer, (shape,) = CASES[name].stock(use_bias=False), CASES[name].shapes
    assert layer(tf.zeros((0, *shape[1:]))).shape == (0, *layer(tf.ones(shape)).shape[1:])


@pytest.mark.parametrize(
    ("name", "policy", "known"),
    [
        pytest.param(name, policy, known, marks=() if number % 2 == known else pytest.mark.slow)
        for number, name in enumerate(CASES)
        for policy, known in (("mixed_bfloat16", True), ("float64", False))
    ],
)
def test_a_replica_without_rows_leaves_the_step_to_the_others(name, policy, known, mirrored):
    strategy = mirrored(2)
    (shape,) = CASES[name].shapes
    with strategy.scope():
        layer = CASES[name].ours(dtype=policy)
        layer.build(shape)
    x = tf.constant(np.random.default_rng(0).standard_normal(shape).astype("float32"))

    def step(x):
        sizes = shape[1:-1] if known else [None] * layer.rank
        x = tf.compat.v1.placeholder_with_default(x, [None, *sizes, shape[-1]])  # as from a data set
        with tf.GradientTape() as tape:
            y = layer(x)
        gradients = tape.gradient(y, [variable.value for variable in layer.trainable_variables], y)
        return tf.shape(y), tf.shape(layer(x)), gradients  # the second outside the tape, as in `evaluate`

    run = tf.function(lambda x: strategy.run(step, [x]), autograph=False)
    given = strategy.experimental_distribute_values_from_function(
        lambda context: x[: 0 if context.replica_id_in_sync_group else None]
    )
    trained, evaluated, gradients = tf.nest.map_structure(strategy.experimental_local_results, run(given))
    expected = layer(x).shape
    for shapes in (trained, evaluated):
        assert [list(each) for each in shapes] == [list(expected), [0, *expected[1:]]]
    for with_rows, without in gradients:
        assert np.any(tf.cast(with_rows, "float32") != 0)
        np.testing.assert_array_equal(tf.cast(without, "float32"), np.zeros(without.shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_parts_of_images_are_not_made_before_the_gradient_comes(name, dtype, gains_from_16_bits):
    keras.config.set_dtype_policy("float32" if dtype == "float32" else f"mixed_{dtype}")
    layer = CASES[name].ours()
    layer.build(CASES[name].shapes[0])
    assert early_operations(layer, CASES[name].shapes[0], dtype) == []


def gradients_of_no_rows(layer, shape, dtype):
    layer.build((1, *shape))
    x = tf.zeros((0, *shape), dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    return y, tape.gradient(y, layer.trainable_weights, tf.zeros_like(y))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_no_rows_have_no_gradient(policy, kernel_size, strides, rank):
    """As those of a replica whose share of an epoch's last batch is none."""
    settings = {"padding": "same", "strides": strides, "dtype": policy}
    made = [
        getattr(layers, f"Conv{rank}D")(4, kernel_size, groups=4, **settings),
        getattr(layers, f"DepthwiseConv{rank}D")(kernel_size, **settings),
    ]
    for layer in made:
        y, gradients = gradients_of_no_rows(layer, [8] * rank + [4], keras.DTypePolicy(policy).compute_dtype)
        assert y.shape == (0, *[8 // strides] * rank, 4)
        for gradient, weight in zip(gradients, layer.trainable_weights, strict=True):
            np.testing.assert_array_equal(tf.cast(gradient, "float32"), tf.zeros(weight.shape))
