"""Every layer keeps the contract, and does what the stock layer does not."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.layer_contract import POLICIES, Case, assert_close, check_contract, gradients

MASK = np.array([[True, False, True, True, False]])
CASES = {
    "Softmax": Case(layers.Softmax, keras.layers.Softmax, (4, 5)),
    "Softmax, axis 1": Case(lambda: layers.Softmax(axis=1), lambda: keras.layers.Softmax(axis=1), (4, 3, 5)),
    "Softmax, two axes, mask": Case(
        lambda: layers.Softmax(axis=[1, -1]),
        lambda: keras.layers.Softmax(axis=[1, -1]),
        (4, 3, 5),
        {"mask": MASK},
    ),
    "LayerNormalization": Case(layers.LayerNormalization, keras.layers.LayerNormalization, (4, 3, 5)),
    "LayerNormalization, axes": Case(
        lambda: layers.LayerNormalization(axis=[-1, 1], scale=False),
        lambda: keras.layers.LayerNormalization(axis=[-1, 1], scale=False),
        (4, 3, 2, 3),
    ),
    "BatchNormalization, images": Case(
        layers.BatchNormalization, keras.layers.BatchNormalization, (4, 3, 2, 5), {"training": True}
    ),
    "BatchNormalization, rank 2": Case(
        layers.BatchNormalization, keras.layers.BatchNormalization, (8, 5), {"training": True}
    ),
    "BatchNormalization, inference": Case(
        layers.BatchNormalization, keras.layers.BatchNormalization, (4, 3, 5), {"training": False}
    ),
    "BatchNormalization, channels first": Case(
        lambda: layers.BatchNormalization(axis=1, center=False),
        lambda: keras.layers.BatchNormalization(axis=1, center=False),
        (4, 3, 2, 5),
        {"training": True},
    ),
    "BatchNormalization, mask": Case(
        layers.BatchNormalization, keras.layers.BatchNormalization, (1, 5, 3), {"training": True, "mask": MASK}
    ),
    "Float32": Case(
        lambda: layers.Float32(keras.layers.Dense(5)),
        lambda: keras.layers.Dense(5, dtype="float32"),
        (4, 5),
        output_dtype="float32",
        loads_stock_config=False,
    ),
}
if "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters:  # not in Keras 3.12, for Python 3.10
    CASES["BatchNormalization, renorm"] = Case(
        lambda: layers.BatchNormalization(renorm=True, scale=False),
        lambda: keras.layers.BatchNormalization(renorm=True, scale=False),
        (4, 3, 5),
        {"training": True},
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, policy, tmp_path):
    check_contract(CASES[name], policy, tmp_path)


# Renorm's corrections are constants to the gradient by definition: Ioffe, "Batch Renormalization", 2017, section 3.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("Float32", "BatchNormalization, renorm")])
def test_gradients_equal_finite_differences(name):
    case = CASES[name]
    keras.config.set_dtype_policy("float64")
    layer = case.ours()
    layer.build(case.shape)
    layer.set_weights([np.random.uniform(0.5, 1.5, weight.shape) for weight in layer.weights])
    upstream = np.random.normal(size=case.shape)

    def loss(x):
        return tf.reduce_sum(layer(x, **case.call) * upstream)

    x = np.random.normal(size=case.shape)
    (theoretical,), (numerical,) = tf.test.compute_gradient(loss, [x], delta=1e-4)
    assert_close(theoretical, numerical, 1e-6)


def test_second_derivatives_see_the_whole_formula():
    """A custom gradient that kept results of the forward pass would lose their share of the second derivative."""
    layer = layers.LayerNormalization(dtype="float64")
    layer.build((3, 4))
    upstream = np.random.normal(size=(3, 4))

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) * upstream)
        return tape.gradient(loss, x)

    (theoretical,), (numerical,) = tf.test.compute_gradient(gradient, [np.random.normal(size=(3, 4))], delta=1e-4)
    assert_close(theoretical, numerical, 1e-5)


def test_second_derivatives_of_the_16_bit_softmax():
    x = tf.constant(np.random.normal(size=(3, 4)), "bfloat16")
    weights = tf.constant(np.random.normal(size=(3, 4)), "float32")

    def second(layer, value):
        with tf.GradientTape() as outer:
            outer.watch(value)
            with tf.GradientTape() as inner:
                inner.watch(value)
                loss = tf.reduce_sum(tf.cast(layer(value), "float32") * weights)
            squares = tf.square(tf.cast(inner.gradient(loss, value), "float32"))
        return outer.gradient(squares, value)

    expected = second(keras.layers.Softmax(dtype="float32"), tf.cast(x, "float32"))
    assert_close(second(layers.Softmax(dtype="mixed_bfloat16"), x), expected, 3e-2)


@pytest.mark.parametrize(
    "layer",
    [layers.Softmax(), layers.LayerNormalization(), layers.BatchNormalization(), layers.Float32(keras.layers.ReLU())],
    ids=lambda layer: type(layer).__name__,
)
def test_masks_are_passed_on(layer):
    x = keras.layers.Masking()(np.array([[[1.0, 2.0], [0.0, 0.0]]], "float32"))
    assert layer(x)._keras_mask.numpy().tolist() == [[True, False]]


# --- a float32 input is not cast down, and a 16-bit one is not narrowed on the way -----------------------------------


def softmax_of_neighbours(layer):
    return layer(np.array([[300.0, 301.0]], "float32")).numpy().astype("float64")


def test_softmax_tells_300_from_301_in_bfloat16():
    actual = softmax_of_neighbours(layers.Softmax(dtype="mixed_bfloat16"))
    np.testing.assert_allclose(actual, [[0.2689, 0.7311]], rtol=4e-3)


@pytest.mark.stock_defect
def test_stock_softmax_tells_300_from_301_in_bfloat16():
    actual = softmax_of_neighbours(keras.layers.Softmax(dtype="mixed_bfloat16"))
    np.testing.assert_allclose(actual, [[0.2689, 0.7311]], rtol=4e-3)


def batch_normalization_above_float16(layer):
    y = layer(np.array([[99000.0], [101000.0]], "float32"), training=True)
    return y.numpy().tolist(), layer.moving_mean.numpy().tolist()


def test_batch_normalization_above_float16_range():
    y, moving_mean = batch_normalization_above_float16(layers.BatchNormalization(dtype="mixed_float16"))
    assert y == [[-1.0], [1.0]]
    assert moving_mean == [1000.0]


@pytest.mark.stock_defect
def test_stock_batch_normalization_above_float16_range():
    y, moving_mean = batch_normalization_above_float16(keras.layers.BatchNormalization(dtype="mixed_float16"))
    assert y == [[-1.0], [1.0]]
    assert moving_mean == [1000.0]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float64"])
@pytest.mark.parametrize("layer", [layers.Softmax, layers.LayerNormalization, layers.BatchNormalization])
def test_an_input_of_another_dtype_is_not_rounded_to_it(layer, policy):
    """A bfloat16 input gives the full precision of the compute dtype, and a float64 one is computed in float64."""
    x = tf.constant([[1.0, 2.0], [2.0, 5.0], [3.0, 7.0]], "bfloat16")
    compute_dtype = keras.dtype_policies.get(policy).compute_dtype
    call = {"training": True} if layer is layers.BatchNormalization else {}
    expected = getattr(keras.layers, layer.__name__)(dtype="float64")(tf.cast(x, "float64"), **call)
    for given in (x, tf.cast(x, "float64")):
        actual = layer(dtype=policy)(given, **call)
        assert actual.dtype == compute_dtype
        assert_close(actual, expected, {"float32": 1e-6, "float16": 5e-4, "float64": 1e-12}[compute_dtype])


def test_integers_are_computed_in_float32():
    y = layers.LayerNormalization(dtype="mixed_float16")(np.array([[100000, 100002]], "int32"))
    np.testing.assert_allclose(y, [[-1.0, 1.0]], atol=2e-3)


# --- softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, [1, 2], None])
@pytest.mark.parametrize("policy", POLICIES)
def test_softmax_of_masked_rows_is_zero_with_finite_gradients(axis, policy):
    layer = layers.Softmax(axis=axis, dtype=policy)
    mask = np.ones((2, 2, 3), bool)
    mask[1] = False
    mask[0, 0, 0] = False
    for masked in (mask, mask[:1] & False):
        x = tf.cast(np.random.normal(size=(2, 2, 3)) * 1e4, layer.compute_dtype)
        result = gradients(layer, x, tf.ones_like(x), {"mask": masked})
        y, to_x = (np.asarray(result[name], "float64") for name in ("y", "x"))
        hidden = ~np.broadcast_to(masked, y.shape)
        assert (y[hidden] == 0).all()
        assert (to_x[hidden] == 0).all()
        assert np.isfinite(y).all()
        assert np.isfinite(to_x).all()
        total = y.sum(axis=tuple(axis) if isinstance(axis, list) else axis)
        expected = (~hidden).any(axis=tuple(axis) if isinstance(axis, list) else axis)
        np.testing.assert_allclose(total, expected, atol=1e-2)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("axis", [-1, [0, -1]])
def test_softmax_with_an_additive_mask(axis, policy):
    """-1e9 is -inf in float16; a row of nothing else is what it is in float32, uniform."""
    layer = layers.Softmax(axis=axis, dtype=policy)
    for row in ([2.0, 1.0, -1e9], [-1e9, -1e9, -1e9]):
        x = tf.constant([row], layer.compute_dtype)
        result = gradients(layer, x, tf.constant([[1.0, 2.0, 3.0]], x.dtype), {})
        y = np.exp(np.array(row) - max(row))
        y /= y.sum()
        assert_close(result["y"], [y], 5e-3)
        assert_close(result["x"], [y * ([1, 2, 3] - (y * [1, 2, 3]).sum())], 5e-3)


def test_softmax_does_not_hide_nan():
    x = tf.constant([[1.0, np.nan]], "float16")
    result = gradients(layers.Softmax(dtype="mixed_float16"), x, tf.ones_like(x), {})
    assert np.isnan(result["y"]).any()
    assert np.isnan(result["x"]).any()


def confident_gradient(layer):
    """The gradient where the largest probability is 0.999, which bfloat16 rounds to one."""
    x = tf.constant([[7.0, 0.0]], "bfloat16")
    return gradients(layer, x, tf.constant([[1.0, 0.0]], "bfloat16"), {})["x"]


def test_softmax_keeps_the_gradient_of_a_confident_row():
    p = 1 / (1 + np.exp(-7.0))
    assert_close(confident_gradient(layers.Softmax(dtype="mixed_bfloat16")), [[p * (1 - p), -p * (1 - p)]], 4e-3)


@pytest.mark.stock_defect
def test_stock_softmax_keeps_the_gradient_of_a_confident_row():
    p = 1 / (1 + np.exp(-7.0))
    assert_close(confident_gradient(keras.layers.Softmax(dtype="mixed_bfloat16")), [[p * (1 - p), -p * (1 - p)]], 4e-3)


def test_softmax_over_two_axes_of_large_logits():
    """exp(x - logsumexp(x)) is off by 0.4% at 60000, where float32 numbers are 1/256 apart."""
    x = np.array([[[60000.0, 60001.0], [60002.0, 59990.0]]], "float32")
    expected = np.exp(x.astype("float64") - 60002)
    assert_close(layers.Softmax(axis=[1, 2])(x), expected / expected.sum(), 1e-6)


def test_softmax_words_a_bad_mask_as_keras():
    with pytest.raises(ValueError, match="must not have more dimensions"):
        layers.Softmax()(np.ones((2, 3), "float32"), mask=np.ones((1, 2, 3), bool))
    with pytest.raises(ValueError, match="Each mask dimension must be 1 or match the corresponding input dimension"):
        layers.Softmax()(np.ones((2, 3), "float32"), mask=np.ones((2, 2), bool))


def test_softmax_takes_a_mask_of_numbers():
    y = layers.Softmax()(np.zeros((1, 3), "float32"), mask=np.array([[0, 1, 1]]))
    np.testing.assert_allclose(y, [[0, 0.5, 0.5]])


def test_softmax_refuses_bad_axes():
    x = np.ones((2, 3), "float32")
    with pytest.raises(ValueError, match=r"Axis 2 is out of bounds for input shape \(2, 3\)"):
        layers.Softmax(axis=2)(x)
    with pytest.raises(ValueError, match=r"Axis -3 is out of bounds for input shape \(None, 3\)"):
        layers.Softmax(axis=[-1, -3])(keras.Input((3,)))
    with pytest.raises(keras_mp.errors.ArgumentError, match=r"each axis once. .*Type axis=\[1\]"):
        layers.Softmax(axis=[1, -1])(x)
    with pytest.raises(keras_mp.errors.ArgumentError, match=r"at least one axis.*Type axis=-1"):
        layers.Softmax(axis=[])
    with pytest.raises(TypeError, match=r"Expected an int or a list/tuple of ints.*received: 1.5"):
        layers.Softmax(axis=1.5)


# --- layer normalization --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1e-5), (0, 2e4), (60000, 100), (-60000, 100)])
def test_layer_normalization_over_its_range(mean, deviation, policy):
    """Variances of 1e-10 and above 1e8, inputs to +-60000, rows of 4096: as in float64, forward and backward."""
    layer = layers.LayerNormalization(epsilon=1e-12, dtype=policy)
    layer.build((2, 4096))
    x = np.clip(np.random.normal(mean, deviation, (2, 4096)), -65000, 65000)
    x = tf.cast(tf.cast(x, layer.compute_dtype), "float32")
    upstream = tf.cast(tf.cast(np.random.normal(size=(2, 4096)), layer.compute_dtype), "float32")

    wide = np.asarray(x, "float64")
    inverse = 1 / np.sqrt(wide.var(-1, keepdims=True) + 1e-12)
    n = (wide - wide.mean(-1, keepdims=True)) * inverse
    g = np.asarray(upstream, "float64")
    expected = inverse * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))

    # float32 inputs show the computation; 16-bit ones would hide it behind their own rounding of the gradient.
    result = gradients(layer, x, tf.cast(upstream, layer.compute_dtype), {})
    assert_close(result["y"], n, 2e-3 if policy != "mixed_bfloat16" else 4e-3)
    assert_close(result["x"], expected, 1e-4)


@pytest.mark.parametrize("variance", [1e-10, 1e10])
@pytest.mark.parametrize("make", [layers.LayerNormalization, layers.BatchNormalization])
def test_normalization_of_small_and_large_variances(make, variance):
    """The second is far above what float16 holds."""
    layer = make(epsilon=1e-15, dtype="mixed_float16")
    call = {"training": True} if make is layers.BatchNormalization else {}
    x = np.random.normal(0, np.sqrt(variance), (64, 64)).astype("float32")
    axis = 0 if call else 1
    wide = x.astype("float64")
    expected = (wide - wide.mean(axis, keepdims=True)) / wide.std(axis, keepdims=True)
    assert_close(layer(x, **call), expected, 1e-3)


def cancellation(layer):
    """60000 and 60001 in float32: x * scale - mean * scale rounds both products to multiples of 1/256."""
    x = np.array([[60000.0, 60001.0, 60002.0]], "float32")
    return layer(x), [[-np.sqrt(1.5), 0, np.sqrt(1.5)]]


def test_layer_normalization_subtracts_before_it_scales():
    actual, expected = cancellation(layers.LayerNormalization(epsilon=1e-12))
    assert_close(actual, expected, 1e-6)


@pytest.mark.stock_defect
def test_stock_layer_normalization_subtracts_before_it_scales():
    actual, expected = cancellation(keras.layers.LayerNormalization(epsilon=1e-12))
    assert_close(actual, expected, 1e-6)


def test_layer_normalization_keeps_no_float32_copy_of_a_16_bit_input():
    """What the graph's backward part reads from its forward part is 16-bit or has no feature axis."""
    layer = layers.LayerNormalization(dtype="mixed_bfloat16")
    layer.build((64, 32))

    @tf.function(input_signature=[tf.TensorSpec((64, 32), "bfloat16")])
    def forward(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        kept.extend(tf.nest.flatten(gradient_reads(tape, y, x)))
        return y

    def gradient_reads(tape, y, x):
        before = set(tf.compat.v1.get_default_graph().get_operations())
        gradient = tape.gradient(y, x)
        after = [op for op in gradient.graph.get_operations() if op not in before]
        return [tensor for op in after for tensor in op.inputs if tensor.op in before]

    kept = []
    forward.get_concrete_function()
    assert any(tensor.shape == (64, 32) and tensor.dtype == tf.bfloat16 for tensor in kept)
    assert [tensor for tensor in kept if tensor.dtype == tf.float32 and tensor.shape == (64, 32)] == []


def test_layer_normalization_with_rms_scaling():
    x = np.random.normal(size=(2, 8)).astype("float32")
    results = []
    for make in (layers.LayerNormalization, keras.layers.LayerNormalization):
        with pytest.warns(UserWarning, match="rms_scaling"):
            results.append(make(rms_scaling=True)(x))
    assert_close(*results, 1e-6)


@pytest.mark.parametrize("make", [layers.LayerNormalization, layers.BatchNormalization])
def test_normalization_refuses_an_axis_that_is_not_there(make):
    with pytest.raises(ValueError, match=r"Axis 3 is out of bounds for input shape \(2, 3\)"):
        make(axis=3)(np.ones((2, 3), "float32"))


# --- batch normalization --------------------------------------------------------------------------------------------


def ops_of(layer, x, **call):
    """The ops that a call puts into a graph."""
    layer.build(x.shape)
    function = tf.function(lambda x: layer(x, **call)).get_concrete_function(tf.TensorSpec(x.shape, x.dtype))
    return function.graph.get_operations()


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 5), (4, 3, 2, 5), (2, 2, 2, 2, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_is_one_fused_op_for_every_rank(shape, training, policy):
    layer = layers.BatchNormalization(dtype=policy)
    ops = ops_of(layer, tf.zeros(shape, layer.compute_dtype), training=training)
    assert [op.type for op in ops].count("FusedBatchNormV3") == 1
    # No cast of a whole tensor, only of the count of its elements.
    assert [op for op in ops if op.type == "Cast" and op.outputs[0].shape.rank] == []


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [({"axis": 1}, "float32"), ({"epsilon": 1e-6}, "float32"), ({"synchronized": True}, "float32"), ({}, "float64")],
)
def test_batch_normalization_is_written_out_where_the_kernel_does_not_apply(arguments, dtype):
    layer = layers.BatchNormalization(dtype=dtype, **arguments)
    ops = ops_of(layer, tf.zeros((4, 3, 2, 5), dtype), training=True)
    assert "FusedBatchNormV3" not in {op.type for op in ops}


def test_batch_normalization_keeps_a_tiny_epsilon():
    """`tf.compat.v1.nn.fused_batch_norm` would make it 1.001e-5."""
    x = np.array([[0.0], [2e-4]], "float32")
    np.testing.assert_allclose(layers.BatchNormalization(epsilon=1e-12)(x, training=True), [[-1.0], [1.0]], rtol=1e-3)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
def test_batch_normalization_of_a_large_mean(axis, jit_compile):
    """XLA's own expansion of the fused op answers a variance of 48 here."""
    layer = layers.BatchNormalization(axis=axis, momentum=0.0, epsilon=1.1e-5)
    x = np.random.normal(1e4, 1.0, (8, 1, 4, 1)).astype("float32")
    layer.build(x.shape)
    y = tf.function(lambda x: layer(x, training=True), jit_compile=jit_compile)(tf.constant(x))
    wide = x.astype("float64")
    assert_close(y, (wide - wide.mean()) / wide.std(), 5e-4)
    np.testing.assert_allclose(layer.moving_variance, [wide.var()], rtol=1e-4)


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("trainable", [True, False])
def test_batch_normalization_moves_when_it_trains(training, trainable):
    x = np.random.normal(3.0, 2.0, (16, 4)).astype("float32")
    after = []
    for make in (layers.BatchNormalization, keras.layers.BatchNormalization):
        layer = make(trainable=trainable, momentum=0.5)
        after.append([layer(x, training=training), *layer.get_weights()])
    for ours, stock in zip(*after, strict=True):
        assert_close(ours, stock, 1e-5)
    moved = after[0][3]  # gamma and beta come last of a frozen layer's weights, and first of a trainable one's
    assert np.abs(moved - 0).max() > 1 if training and trainable else (np.isin(moved, [0.0, 1.0])).all()


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
def test_batch_normalization_of_one_element(shape):
    """Its variance is 0, and n - 1 is 0 as well."""
    layer = layers.BatchNormalization(momentum=0.5)
    result = gradients(layer, tf.fill(shape, 7.0), tf.ones(shape), {"training": True})
    assert np.asarray(result["y"]).ravel().tolist() == [0, 0, 0]
    assert np.asarray(result["x"]).ravel().tolist() == [0, 0, 0]
    assert layer.moving_mean.numpy().tolist() == [3.5] * 3
    assert layer.moving_variance.numpy().tolist() == [0.5] * 3


def moving_statistics_after_an_empty_batch(make, **arguments):
    layer = make(**arguments)
    layer.build((None, 2, 2, 3))
    step = tf.function(
        lambda x: gradients(layer, x, tf.ones_like(x), {"training": True}),
        input_signature=[tf.TensorSpec((None, 2, 2, 3))],
    )
    result = step(tf.zeros((0, 2, 2, 3)))
    assert result["y"].shape == (0, 2, 2, 3)
    assert all(np.isfinite(gradient).all() for gradient in result.values())
    return layer.moving_mean.numpy().tolist(), layer.moving_variance.numpy().tolist()


@pytest.mark.parametrize("arguments", [{}, {"epsilon": 1e-6}, {"scale": False, "center": False}])
def test_batch_normalization_survives_an_empty_batch(arguments):
    statistics = moving_statistics_after_an_empty_batch(layers.BatchNormalization, **arguments)
    assert statistics == ([0.0] * 3, [1.0] * 3)


@pytest.mark.stock_defect
def test_stock_batch_normalization_survives_an_empty_batch():
    assert moving_statistics_after_an_empty_batch(keras.layers.BatchNormalization) == ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("make", [layers.BatchNormalization, keras.layers.BatchNormalization])
def test_batch_normalization_words_a_bad_mask_as_keras(make):
    with pytest.raises(ValueError, match="one dimension less than the inputs"):
        make()(np.ones((2, 3, 4), "float32"), mask=np.ones((2, 3, 4), bool))


@pytest.mark.parametrize(
    ("policy", "jit_compile"), [("float32", False), ("mixed_bfloat16", False), ("mixed_float16", True)]
)
def test_a_model_of_these_layers_trains_as_the_stock_one(policy, jit_compile):
    def losses(family):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                keras.layers.Conv2D(8, 3),
                family.BatchNormalization(),
                keras.layers.Flatten(),
                family.LayerNormalization(),
                keras.layers.Dense(3),
                family.Softmax(),
            ]
        )
        model.compile("sgd", keras.losses.CategoricalCrossentropy(), jit_compile=jit_compile)
        return model.fit(x, labels, batch_size=16, epochs=2, shuffle=False, verbose=0).history["loss"]

    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(64, 6, 6, 2)), np.eye(3)[rng.integers(0, 3, 64)]
    keras.config.set_dtype_policy(policy)
    tolerance = {"float32": 1e-5, "mixed_float16": 5e-3, "mixed_bfloat16": 4e-2}[policy]
    np.testing.assert_allclose(losses(layers), losses(keras.layers), rtol=tolerance)


# --- Float32 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.LSTM(3),
        lambda: keras.layers.Bidirectional(keras.layers.GRU(2)),
        lambda: keras.layers.MultiHeadAttention(2, 3),
        lambda: keras.Sequential([keras.layers.Dense(2), keras.layers.Bidirectional(keras.layers.LSTM(2))]),
    ],
    ids=["LSTM", "Bidirectional", "MultiHeadAttention", "Sequential"],
)
def test_float32_reaches_the_layers_inside(make, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    layer = layers.Float32(make())
    x = tf.random.normal((2, 4, 5))
    inputs = keras.Input((4, 5))
    several = isinstance(layer.layer, keras.layers.MultiHeadAttention)
    outputs = layer(inputs, value=inputs) if several else layer(inputs)
    assert outputs.dtype == "float32"
    assert layer.weights
    model = keras.Model(inputs, outputs)
    y = model(x)
    assert y.dtype == tf.float32

    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), y)
    twin = make()
    arguments = {"value": x} if several else {}
    twin(x, **arguments)
    twin.set_weights(layer.get_weights())
    assert_close(twin(x, **arguments), y, 1e-5)


def test_float32_passes_training_and_masks():
    dropout = layers.Float32(keras.layers.Dropout(0.5))
    x = np.ones((1, 1000), "float16")
    assert set(np.unique(dropout(x, training=True))) == {0.0, 2.0}
    assert np.unique(dropout(x)).tolist() == [1.0]
    embedding = layers.Float32(keras.layers.Embedding(4, 2, mask_zero=True, dtype="mixed_float16"))
    embedded = embedding(np.array([[3, 0]]))
    assert embedded.dtype == tf.float32
    assert embedded._keras_mask.numpy().tolist() == [[True, False]]
    lstm = layers.Float32(keras.layers.LSTM(2))
    masked = lstm(tf.ones((1, 3, 2)), mask=np.array([[True, False, False]]))
    np.testing.assert_allclose(masked, lstm(tf.ones((1, 1, 2))), rtol=1e-6)


def test_float32_answers_the_mask_of_the_wrapped_layer():
    masked = keras.layers.Masking()(keras.Input((3, 2)))
    assert layers.Float32(keras.layers.ReLU())(masked)._keras_mask is not None
    assert getattr(layers.Float32(keras.layers.LSTM(2))(masked), "_keras_mask", None) is None


def test_float32_leaves_integers_alone():
    assert layers.Float32(keras.layers.Lambda(lambda x: x + 1))(np.array([16777216], "int32")).numpy() == 16777217


def test_float32_refuses_what_it_cannot_run():
    with pytest.raises(keras_mp.errors.ArgumentError, match=r"Received: dtype='mixed_float16'. Leave `dtype` out"):
        layers.Float32(keras.layers.Dense(2), dtype="mixed_float16")
    narrow = keras.layers.Dense(2, dtype="float16")
    narrow.build((None, 3))
    with pytest.raises(
        keras_mp.errors.ArgumentError, match=r"was built with 16-bit ones: .*Wrap it before it is built"
    ):
        layers.Float32(narrow)
    with pytest.raises(ValueError, match="isn't a supported layer type"):
        layers.Float32(lambda x: x)


def test_exported_without_keras(tmp_path):
    """A SavedModel with the custom gradients and the fused kernel answers as the model does."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.BatchNormalization(),
            layers.LayerNormalization(),
            layers.Softmax(),
            layers.Float32(keras.layers.Dense(2)),
        ]
    )
    x = tf.random.normal((2, 4, 4, 3))
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "xla"])
def test_batch_normalization_passes_over_a_batch_that_is_not_finite(compiled):
    """The optimizer skips the step of a bad batch; its statistics must not outlive it either."""
    layer = layers.BatchNormalization(dtype="mixed_float16")
    call = tf.function(lambda x: layer(x, training=True), jit_compile=compiled)
    good = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    call(good)
    before = [layer.moving_mean.numpy(), layer.moving_variance.numpy()]
    call(tf.constant([[float("nan"), 2.0], [3.0, 4.0]]))
    mean, variance = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    assert (mean[0], variance[0]) == (before[0][0], before[1][0])
    # The other channel moves on as if nothing had happened.
    np.testing.assert_allclose(mean[1], before[0][1] * 0.99 + 3.0 * 0.01, rtol=1e-6)
    np.testing.assert_allclose(variance[1], before[1][1] * 0.99 + 1.0 * 0.01, rtol=1e-6)
