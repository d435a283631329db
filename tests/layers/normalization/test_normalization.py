"""Layer, group, RMS and unit normalization: the contract, and numbers that stock Keras or 16 bits lose."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from keras_mp.errors import ArgumentError
from tests.contract.layer_contract import Case, assert_close, contract, gradients

CASES = {
    "LayerNormalization": Case(layers.LayerNormalization, keras.layers.LayerNormalization, [(4, 3, 5)]),
    "LayerNormalization, axes": Case(
        lambda: layers.LayerNormalization(axis=[-1, 1], scale=False),
        lambda: keras.layers.LayerNormalization(axis=[-1, 1], scale=False),
        [(4, 3, 2, 3)],
    ),
    # Keras's layer does not pass masks on, and warns.
    "RMSNormalization": Case(layers.RMSNormalization, keras.layers.RMSNormalization, [(4, 3, 5)], masked=False),
    "RMSNormalization, axes": Case(
        lambda: layers.RMSNormalization(axis=[-2, -1], epsilon=0.1),
        lambda: keras.layers.RMSNormalization(axis=[-2, -1], epsilon=0.1),
        [(4, 2, 5, 3)],
        masked=False,
    ),
    "RMSNormalization, rank 2": Case(layers.RMSNormalization, keras.layers.RMSNormalization, [(6, 7)]),
    "UnitNormalization": Case(layers.UnitNormalization, keras.layers.UnitNormalization, [(4, 3, 5)]),
    "UnitNormalization, axes": Case(
        lambda: layers.UnitNormalization(axis=[1, -1]),
        lambda: keras.layers.UnitNormalization(axis=[1, -1]),
        [(4, 3, 2, 5)],
    ),
    "UnitNormalization, rank 2": Case(layers.UnitNormalization, keras.layers.UnitNormalization, [(6, 7)]),
    **{
        f"GroupNormalization, {name}": Case(
            functools.partial(layers.GroupNormalization, **arguments),
            functools.partial(keras.layers.GroupNormalization, **arguments),
            [shape],
        )
        for name, arguments, shape in (
            ("images", {"groups": 3}, (4, 3, 5, 6)),
            ("channels first", {"groups": 2, "axis": 1}, (4, 6, 3, 5)),
            ("axis in the middle", {"groups": 2, "axis": -2, "center": False}, (4, 3, 4, 5)),
            ("one group", {"groups": 1, "scale": False}, (4, 3, 6)),
            ("instances", {"groups": -1}, (4, 7, 3)),
            ("rank 2", {"groups": 2, "scale": False, "center": False}, (4, 6)),
            ("volumes", {"groups": 2, "epsilon": 0.1}, (2, 2, 3, 1, 4)),
        )
    },
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


@pytest.mark.parametrize(
    "make",
    [
        layers.LayerNormalization,
        layers.RMSNormalization,
        layers.UnitNormalization,
        functools.partial(layers.GroupNormalization, groups=2),
    ],
)
def test_second_derivatives_see_the_whole_formula(make):
    """A custom gradient that kept results of the forward pass would lose their share of the second derivative."""
    layer = make(dtype="float64")
    layer.build((3, 4))
    upstream = np.random.normal(size=(3, 4))

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) * upstream)
        return tape.gradient(loss, x)

    (theoretical,), (numerical,) = tf.test.compute_gradient(gradient, [np.random.normal(size=(3, 4))], delta=1e-4)
    assert_close(theoretical, numerical, 1e-5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (layers.LayerNormalization, [[-1.0, 1.0]]),
        (layers.RMSNormalization, [[0.99999, 1.00001]]),
        (layers.UnitNormalization, [[0.70710, 0.70711]]),
        (functools.partial(layers.GroupNormalization, groups=1), [[-1.0, 1.0]]),
    ],
)
@pytest.mark.parametrize("dtype", ["int32", "float32", "float64"])
def test_numbers_above_float16_are_not_cast_down_first(make, expected, dtype):
    y = make(dtype="mixed_float16")(np.array([[100000, 100002]], dtype))
    assert y.dtype == tf.float16
    np.testing.assert_allclose(y, expected, atol=2e-3)


@pytest.mark.stock_defect
@pytest.mark.parametrize(
    ("make", "expected"),
    [(keras.layers.RMSNormalization, [[1.0, 1.0]]), (keras.layers.UnitNormalization, [[0.70710, 0.70711]])],
)
def test_stock_numbers_above_float16_are_not_cast_down_first(make, expected):
    y = make(dtype="mixed_float16")(np.array([[100000, 100002]], "float32"))
    np.testing.assert_allclose(y, expected, atol=2e-3)


@pytest.mark.parametrize(
    "make",
    [
        layers.LayerNormalization,
        layers.RMSNormalization,
        layers.UnitNormalization,
        functools.partial(layers.GroupNormalization, groups=1),
    ],
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_float64_inputs_are_computed_in_float64(make, policy):
    """float32 has no number between 1e8 and 1e8 + 8; squares of 1e30 are not in it at all."""
    x = np.array([[1e30, 1e30 + 1e22, 1e30 + 3e22]])
    expected = {
        "LayerNormalization": (x - x.mean()) / x.std(),
        "GroupNormalization": (x - x.mean()) / x.std(),
        "RMSNormalization": x / np.sqrt((x**2).mean()),
        "UnitNormalization": x / np.linalg.norm(x),
    }
    layer = make(dtype=policy)
    y = layer(x)
    assert y.dtype == layer.compute_dtype
    # float64 itself rounds 1e22 to 1.4e14; bfloat16 rounds the answer.
    assert_close(y, expected[type(layer).__name__], 1e-6 if policy == "float32" else 4e-3)


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


def group_normalized(x, g, epsilon):
    """Group normalization of (batch, steps, channels) in two groups, and its gradient, in float64."""
    shape = x.shape
    x, g = (np.asarray(each, "float64").reshape(shape[0], shape[1], 2, -1) for each in (x, g))
    over = {"axis": (1, 3), "keepdims": True}
    inverse = 1 / np.sqrt(x.var(**over) + epsilon)
    n = (x - x.mean(**over)) * inverse
    to_x = inverse * (g - g.mean(**over) - n * (g * n).mean(**over))
    return n.reshape(shape), to_x.reshape(shape)


def rms_normalized(x, g, epsilon):
    x, g = (np.asarray(each, "float64") for each in (x, g))
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    n = x * inverse
    return n, inverse * (g - n * (g * n).mean(-1, keepdims=True))


def unit_normalized(x, g, epsilon):
    x, g = (np.asarray(each, "float64") for each in (x, g))
    inverse = 1 / np.sqrt((x**2).sum(-1, keepdims=True))
    n = x * inverse
    return n, inverse * (g - n * (g * n).sum(-1, keepdims=True))


RANGE = {
    "group": (functools.partial(layers.GroupNormalization, groups=2), group_normalized, (2, 15000, 8)),
    "instance": (
        functools.partial(layers.GroupNormalization, groups=-1, axis=1),
        lambda x, g, epsilon: tuple(
            each.swapaxes(1, 2) for each in group_normalized(x.swapaxes(1, 2), g.swapaxes(1, 2), epsilon)
        ),
        (2, 2, 60000),
    ),
    "RMS": (layers.RMSNormalization, rms_normalized, (2, 60000)),
    "unit": (layers.UnitNormalization, unit_normalized, (2, 60000)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1e-5), (0, 2e4), (60000, 100), (-60000, 100)])
@pytest.mark.parametrize("name", RANGE)
def test_over_its_range(name, mean, deviation, policy, compiled):
    """Variances of 1e-10 and above 1e8, inputs to +-60000, sums of 60,000: as in float64, forward and backward.

    In the graph of a training step XLA compiles the sums.
    """
    make, reference, shape = RANGE[name]
    arguments = {} if name == "unit" else {"epsilon": 1e-12}
    layer = make(dtype=policy, **arguments)
    layer.build(shape)
    x = np.clip(np.random.normal(mean, deviation, shape), -65000, 65000)
    x = tf.cast(tf.cast(x, layer.compute_dtype), "float32")
    upstream = tf.cast(tf.cast(np.random.normal(size=shape), layer.compute_dtype), "float32")
    y, to_x = reference(x.numpy(), upstream.numpy(), 1e-12)
    compute = lambda x, upstream: gradients(layer, x, upstream, {})  # noqa: E731
    if compiled:
        compute = tf.function(compute)
    # float32 inputs show the computation; 16-bit ones would hide it behind their own rounding of the gradient.
    result = compute(x, tf.cast(upstream, layer.compute_dtype))
    assert_close(result["y"], y, {"float32": 1e-4, "mixed_float16": 2e-3, "mixed_bfloat16": 4e-3}[policy])
    assert_close(result["x"], to_x, 1e-4)


def zero_vectors(layer, dtype):
    x = tf.constant([[0.0, 0.0], [3.0, 4.0]], dtype)
    return gradients(layer, x, tf.constant([[1.0, 2.0], [0.0, 0.0]], layer.compute_dtype), {})


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_unit_normalization_of_a_zero_vector(policy):
    layer = layers.UnitNormalization(dtype=policy)
    result = zero_vectors(layer, layer.compute_dtype)
    np.testing.assert_allclose(result["y"], [[0.0, 0.0], [0.6, 0.8]], rtol=4e-3)
    expected = (
        zero_vectors(keras.layers.UnitNormalization(), "float32")["x"] if policy == "float32" else np.zeros((2, 2))
    )
    np.testing.assert_array_equal(result["x"], expected)


@pytest.mark.stock_defect
def test_stock_unit_normalization_of_a_zero_vector():
    result = zero_vectors(keras.layers.UnitNormalization(dtype="mixed_float16"), "float16")
    np.testing.assert_allclose(result["y"], [[0.0, 0.0], [0.6, 0.8]], rtol=4e-3)
    assert np.isfinite(result["x"]).all()


@pytest.mark.parametrize("length", [1e-14, 1e-30])
def test_unit_normalization_of_a_vector_too_short_to_divide_by(length):
    """Keras multiplies it by 1e12, and so does the gradient; the square of the second is 0 in float32."""
    x = tf.constant([[0.6 * length, 0.8 * length]])
    results = [
        gradients(make(), x, tf.constant([[1.0, 2.0]]), {})
        for make in (layers.UnitNormalization, keras.layers.UnitNormalization)
    ]
    for name in ("y", "x"):
        assert_close(results[0][name], results[1][name], 1e-6, name)


def scale_of_a_middle_axis(layer):
    """Axis 1 of (2, 3, 3): each row of the last two axes has the factor of its own."""
    layer.build((2, 3, 3))
    layer.set_weights([np.array([1.0, 2.0, 3.0])])
    return layer(np.ones((2, 3, 3), "float32"))[0, :, 0].numpy()


def test_rms_normalization_scales_along_its_axis():
    np.testing.assert_allclose(scale_of_a_middle_axis(layers.RMSNormalization(axis=1)), [1.0, 2.0, 3.0], rtol=1e-5)


@pytest.mark.stock_defect
def test_stock_rms_normalization_scales_along_its_axis():
    np.testing.assert_allclose(
        scale_of_a_middle_axis(keras.layers.RMSNormalization(axis=1)), [1.0, 2.0, 3.0], rtol=1e-5
    )


def test_rms_normalization_with_axes_out_of_order():
    """Sorted as numbers, -1 stands before 1, and the weight has the last axis first."""
    layer = layers.RMSNormalization(axis=[1, -1], epsilon=1e-12)
    layer.build((2, 3, 4))
    weight = np.random.uniform(0.5, 1.5, (4, 3))
    layer.set_weights([weight])
    x = np.random.normal(size=(2, 3, 4)).astype("float32")
    expected = x / np.sqrt((x.astype("float64") ** 2).mean((1, 2), keepdims=True)) * weight.T
    assert_close(layer(x), expected, 1e-6)


def test_rms_normalization_does_not_round_its_weight():
    """Under a mixed policy Keras hands a layer its weights in 16 bits, unless it asks for them as they are."""
    layer = layers.RMSNormalization(dtype="mixed_bfloat16", epsilon=1e-12)
    layer.build((1, 2))
    layer.set_weights([np.array([1.003, 1.003])])
    # 1.003 would be 1 in bfloat16. Without a mean of the products, the gradient shows it in float32.
    result = gradients(layer, tf.constant([[1.0, -1.0]]), tf.constant([[1.0, 1.0]], tf.bfloat16), {})
    np.testing.assert_allclose(result["x"], [[1.003, 1.003]], rtol=1e-6)


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


@pytest.mark.parametrize(
    "make",
    [
        layers.LayerNormalization,
        layers.RMSNormalization,
        layers.UnitNormalization,
        functools.partial(layers.GroupNormalization, groups=4),
    ],
)
def test_no_float32_copy_of_a_16_bit_input_is_kept(make):
    """What the graph's backward part reads from its forward part is 16-bit or has no feature axis."""
    layer = make(dtype="mixed_bfloat16")
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


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        layers.LayerNormalization,
        layers.BatchNormalization,
        layers.RMSNormalization,
        layers.UnitNormalization,
        layers.GroupNormalization,
    ],
)
def test_normalization_refuses_an_axis_that_is_not_there(make, eager):
    with pytest.raises(ValueError, match=r"Axis 3 is out of bounds for input shape \((2|None), 3\)"):
        make(axis=3)(np.ones((2, 3), "float32") if eager else keras.Input((3,)))


@pytest.mark.parametrize("make", [layers.UnitNormalization, keras.layers.UnitNormalization])
def test_unit_normalization_words_an_axis_of_the_wrong_type_as_keras(make):
    with pytest.raises(TypeError, match=r"Invalid value for `axis` argument: expected an int or a list/tuple of ints"):
        make(axis="last")


@pytest.mark.parametrize("make", [layers.GroupNormalization, keras.layers.GroupNormalization])
@pytest.mark.parametrize(
    ("groups", "channels", "text"),
    [
        (8, 4, r"Number of groups \(8\) cannot be more than the number of channels \(4\)"),
        (3, 4, r"Number of groups \(3\) must be a multiple of the number of channels \(4\)"),
        (2, None, r"Axis -1 of input tensor should have a defined dimension"),
    ],
)
def test_group_normalization_words_groups_that_do_not_divide_as_keras(make, groups, channels, text):
    with pytest.raises(ValueError, match=text):
        make(groups=groups)(keras.Input((5, channels)))


@pytest.mark.parametrize("groups", [0, -2, 1.5])
def test_group_normalization_refuses_a_number_of_groups_that_is_none(groups):
    with pytest.raises(ValueError, match=rf"invalid value for argument `groups`.*Received: groups={groups}"):
        layers.GroupNormalization(groups=groups)


@pytest.mark.parametrize("axis", [0, -2])
def test_group_normalization_refuses_the_axis_of_the_batch(axis):
    with pytest.raises(ArgumentError, match=rf"axis={axis} for input shape \(2, 4\)\. Type the axis of the channels"):
        layers.GroupNormalization(groups=2, axis=axis)(np.ones((2, 4), "float32"))


@pytest.mark.parametrize("name", ["channels last", "channels first"])
def test_group_normalization_of_images_of_any_size(name):
    """One function for all sizes, in a training step; and the sums are those of each size."""
    axis = -1 if name == "channels last" else 1
    shape = (None, None, None, 4) if axis == -1 else (None, 4, None, None)
    layer = layers.GroupNormalization(groups=2, axis=axis, dtype="mixed_bfloat16")
    layer.build(shape)
    step = tf.function(
        lambda x: gradients(layer, x, tf.ones_like(x), {}), input_signature=[tf.TensorSpec(shape, "bfloat16")]
    )
    stock = keras.layers.GroupNormalization(groups=2, axis=axis)
    for size in ((1, 2, 3), (3, 5, 2)):
        x = np.random.normal(size=(*size, 4) if axis == -1 else (size[0], 4, *size[1:])).astype("float32")
        x = tf.cast(tf.cast(x, "bfloat16"), "float32")
        assert_close(step(tf.cast(x, "bfloat16"))["y"], stock(x), 4e-3)
