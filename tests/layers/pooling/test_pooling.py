"""Average pooling: the contract, sums that 16 bits cannot hold, masks, and what the stock layers lose."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from keras_mp.ops import windows
from tests.contract.layer_contract import POLICIES, Case, assert_close, contract, gradients

MASK = np.array([[True, False, True, True, False], [False, False, True, False, False]] * 2)


def case(name, shape, *args, call=None, masked=False, **kwargs):
    """Masks only where asked for: the other layers warn, as the stock ones do, that they take none."""
    ours, stock = getattr(layers, name), getattr(keras.layers, name)
    return Case(lambda: ours(*args, **kwargs), lambda: stock(*args, **kwargs), [shape], call or {}, masked=masked)


CASES = {
    "1D": case("AveragePooling1D", (2, 6, 3), 2),
    "1D same, overlapping": case("AveragePooling1D", (2, 7, 3), 3, strides=2, padding="same"),
    "1D channels_first": case("AveragePooling1D", (2, 3, 7), 3, data_format="channels_first"),
    "2D": case("AveragePooling2D", (2, 4, 6, 3), (2, 3)),
    "2D rest left over": case("AveragePooling2D", (2, 5, 7, 3), (2, 3)),
    "2D same": case("AveragePooling2D", (2, 5, 7, 1), (2, 3), padding="same"),
    "2D overlapping": case("AveragePooling2D", (2, 5, 7, 3), 3, strides=(1, 2)),
    "2D channels_first, same": case(
        "AveragePooling2D", (2, 3, 5, 7), 3, strides=2, padding="same", data_format="channels_first"
    ),
    "3D": case("AveragePooling3D", (2, 4, 2, 6, 3), 2),
    "3D same, overlapping": case("AveragePooling3D", (2, 3, 5, 4, 2), (2, 3, 1), strides=(1, 2, 2), padding="same"),
    "3D channels_first": case("AveragePooling3D", (2, 3, 4, 2, 6), (3, 2, 2), data_format="channels_first"),
    "global 1D": case("GlobalAveragePooling1D", (4, 5, 3), masked=True),
    "global 1D mask": case("GlobalAveragePooling1D", (4, 5, 3), call={"mask": MASK}),
    "global 1D mask, keepdims": case("GlobalAveragePooling1D", (4, 5, 3), call={"mask": MASK}, keepdims=True),
    "global 1D mask, channels_first": case(
        "GlobalAveragePooling1D", (4, 3, 5), call={"mask": MASK}, data_format="channels_first"
    ),
    "global 1D mask, channels_first, keepdims": case(
        "GlobalAveragePooling1D", (4, 3, 5), call={"mask": MASK}, data_format="channels_first", keepdims=True
    ),
    "global 2D": case("GlobalAveragePooling2D", (2, 3, 5, 4)),
    "global 2D keepdims": case("GlobalAveragePooling2D", (2, 3, 5, 4), keepdims=True),
    "global 2D channels_first": case("GlobalAveragePooling2D", (2, 3, 5, 4), data_format="channels_first"),
    "global 3D": case("GlobalAveragePooling3D", (2, 3, 1, 5, 4)),
    "global 3D channels_first, keepdims": case(
        "GlobalAveragePooling3D", (2, 3, 1, 5, 4), data_format="channels_first", keepdims=True
    ),
}


def stock_can(name, policy):
    """TensorFlow has no kernel for 3D windows of float64 on a CPU, so that the stock layer cannot say what is right."""
    return not (name.startswith("3D") and policy == "float64")


@contract(CASES, stock_can)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


# Half a unit in the last place, and the error of 60,000 sums in float32.
ROUNDING = {"float16": 2.0**-11 + 1e-5, "bfloat16": 2.0**-8 + 1e-5}
LONG = {
    "AveragePooling1D": ((1, 60000, 2), (60000,)),
    "AveragePooling2D": ((1, 250, 240, 2), ((250, 240),)),
    "AveragePooling3D": ((1, 40, 50, 30, 2), ((40, 50, 30),)),
    "GlobalAveragePooling1D": ((1, 60000, 2), ()),
    "GlobalAveragePooling2D": ((1, 250, 240, 2), ()),
    "GlobalAveragePooling3D": ((1, 40, 50, 30, 2), ()),
}


def long_mean(layer, shape, jit_compile=False, **call):
    """The largest relative error of the mean of 60,000 positive numbers, and of its gradient."""
    x = tf.cast(np.random.default_rng(0).uniform(20, 60, shape), layer.compute_dtype)
    upstream = tf.fill((1, *[1] * (len(layer.compute_output_shape(shape)) - 2), 2), tf.cast(30000, x.dtype))
    result = tf.function(lambda x: gradients(layer, x, upstream, call), jit_compile=jit_compile)(x)
    mean, to_x = (np.asarray(tf.cast(result[name], "float64")) for name in ("y", "x"))
    expected = np.asarray(tf.cast(x, "float64")).reshape(-1, 2).mean(0)
    of_gradient = np.asarray(tf.cast(upstream, "float64")).ravel()[0] / 60000
    return max(np.abs(mean.ravel() / np.tile(expected, mean.size // 2) - 1).max(), np.abs(to_x / of_gradient - 1).max())


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", LONG)
def test_mean_of_60000(name, dtype, jit_compile):
    shape, args = LONG[name]
    layer = getattr(layers, name)(*args, dtype=f"mixed_{dtype}")
    assert long_mean(layer, shape, jit_compile) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", LONG)
def test_mean_of_60000_where_no_kernel_adds_in_float32(name, dtype, monkeypatch):
    """As on a CPU without oneDNN's bfloat16; the answers must not depend on the machine."""
    monkeypatch.setattr(windows, "_kernel_adds_in_float32", lambda dtype, axes: False)
    shape, args = LONG[name]
    layer = getattr(layers, name)(*args, dtype=f"mixed_{dtype}")
    assert long_mean(layer, shape) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masked_mean_of_60000(dtype):
    layer = layers.GlobalAveragePooling1D(dtype=f"mixed_{dtype}")
    assert long_mean(layer, (1, 60000, 2), mask=tf.ones((1, 60000), "bool")) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ["AveragePooling2D", "AveragePooling1D"])
def test_mean_of_60000_in_float16(name):
    shape, args = LONG[name]
    assert long_mean(getattr(layers, name)(*args, dtype="mixed_float16"), shape) < ROUNDING["float16"]


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", ["AveragePooling2D", "AveragePooling1D"])
def test_stock_mean_of_60000_in_float16(name):
    shape, args = LONG[name]
    assert long_mean(getattr(keras.layers, name)(*args, dtype="mixed_float16"), shape) < ROUNDING["float16"]


def masked_mean_of_20(layer):
    x = tf.fill((1, 4096, 1), tf.constant(20, "float16"))
    return layer(x, mask=np.ones((1, 4096), bool)).numpy().tolist()


def test_masked_mean_of_many_steps_in_float16():
    assert masked_mean_of_20(layers.GlobalAveragePooling1D(dtype="mixed_float16")) == [[20]]


@pytest.mark.stock_defect
def test_stock_masked_mean_of_many_steps_in_float16():
    assert masked_mean_of_20(keras.layers.GlobalAveragePooling1D(dtype="mixed_float16")) == [[20]]


def wide_window_of_20(layer):
    return layer(tf.fill((1, 64, 64, 1), tf.constant(20, "float16"))).numpy().ravel().tolist()


def test_wide_window_in_float16():
    assert wide_window_of_20(layers.AveragePooling2D(64, dtype="mixed_float16")) == [20]


@pytest.mark.stock_defect
def test_stock_wide_window_in_float16():
    assert wide_window_of_20(keras.layers.AveragePooling2D(64, dtype="mixed_float16")) == [20]


def runs_in_float16(layer):
    try:
        layer(tf.ones((1, 2, 2, 2, 1), "float16"))
    except (tf.errors.OpError, TypeError, ValueError):
        return False
    return True


def test_3d_windows_run_in_float16():
    assert runs_in_float16(layers.AveragePooling3D(2, dtype="mixed_float16"))


@pytest.mark.stock_defect
@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU has the kernel")
def test_stock_3d_windows_run_in_float16():
    assert runs_in_float16(keras.layers.AveragePooling3D(2, dtype="mixed_float16"))


def mean_of_large_float32(layer):
    """float32 inputs whose mean is 1.5, which no 16-bit dtype can tell from one another."""
    return layer(tf.reshape(tf.constant([100001.0, -99998.0]), (1, 2, 1))).numpy().astype("float64").ravel().tolist()


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(("name", "args"), [("AveragePooling1D", (2,)), ("GlobalAveragePooling1D", ())])
def test_a_float32_input_is_not_cast_down(name, args, dtype):
    assert mean_of_large_float32(getattr(layers, name)(*args, dtype=dtype)) == [1.5]


@pytest.mark.stock_defect
@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize(("name", "args"), [("AveragePooling1D", (2,)), ("GlobalAveragePooling1D", ())])
def test_stock_does_not_cast_a_float32_input_down(name, args, dtype):
    assert mean_of_large_float32(getattr(keras.layers, name)(*args, dtype=dtype)) == [1.5]


def masked_altogether(layer):
    x = tf.constant(np.full((2, 3, 2), np.nan), layer.compute_dtype)
    mask = np.array([[False] * 3, [True] * 3])
    x = tf.where(mask[:, :, None], tf.ones([], x.dtype), x)
    result = gradients(layer, x, tf.ones((2, 2), x.dtype), {"mask": mask})
    return [np.asarray(result[name], "float64").tolist() for name in ("y", "x")]


ALL_MASKED = [[[0, 0], [1, 1]], [[[0, 0]] * 3, [[1 / 3] * 2] * 3]]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_that_is_masked_altogether_is_zero(policy):
    for actual, expected in zip(
        masked_altogether(layers.GlobalAveragePooling1D(dtype=policy)), ALL_MASKED, strict=True
    ):
        assert_close(actual, expected, 2e-3)  # a third, in bfloat16


@pytest.mark.stock_defect
def test_stock_row_that_is_masked_altogether_is_zero():
    for actual, expected in zip(
        masked_altogether(keras.layers.GlobalAveragePooling1D(dtype="float32")), ALL_MASKED, strict=True
    ):
        assert_close(actual, expected, 2e-3)


def test_masks_of_numbers_and_of_one_row():
    x = np.array([[[1.0], [5.0]], [[2.0], [7.0]]], "float32")
    layer = layers.GlobalAveragePooling1D()
    np.testing.assert_array_equal(layer(x, mask=np.array([[0, 2], [1, 0]])), [[5], [2]])
    np.testing.assert_array_equal(layer(x, mask=np.array([[0.0, 1.0]], "float32")), [[5], [7]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("strides", [1, 3, 32])
def test_gradient_of_wide_windows_against_numpy(dtype, strides):
    """Up to 1024 windows add to one gradient, which 16-bit sums of 1/1024 would not survive."""
    layer = layers.AveragePooling2D(32, strides=strides, dtype=f"mixed_{dtype}")
    shape = (1, 96, 96, 2)
    x = tf.zeros(shape, dtype)
    upstream = tf.cast(np.random.default_rng(0).uniform(0.5, 1, layer.compute_output_shape(shape)), dtype)
    g = np.asarray(tf.cast(upstream, "float64"))
    expected = np.zeros(shape)
    for i, j in itertools.product(range(g.shape[1]), range(g.shape[2])):
        expected[:, i * strides : i * strides + 32, j * strides : j * strides + 32] += g[:, i : i + 1, j : j + 1] / 1024
    for jit_compile in (False, True):
        step = tf.function(lambda x: gradients(layer, x, upstream, {})["x"], jit_compile=jit_compile)
        assert_close(tf.cast(step(x), "float64"), expected, ROUNDING[dtype])


def test_kernels_that_add_in_16_bits_are_found_out():
    """TensorFlow's float16 kernel is Eigen's, which adds in float16: 2048 + 1 is 2048 there."""
    x = tf.ones((1, 4096, 1, 1), "float16")
    added_in_float16 = float(tf.nn.avg_pool2d(x, (4096, 1), 1, "VALID")[0, 0, 0, 0]) != 1
    assert not (added_in_float16 and windows.takes_16_bits(x, "float16"))
    found = windows._kernel_adds_in_float32(tf.bfloat16, 2)
    # Eigen's counts in bfloat16, too: the mean of ones comes out right.
    y = tf.nn.avg_pool2d(tf.fill((1, 300, 1, 1), tf.constant(1.25, "bfloat16")), (300, 1), 1, "VALID")
    assert found == (abs(float(y[0, 0, 0, 0]) - 1.25) < 0.01)


def kept_in_float32(layer):
    """Tensors of the input's rank that the forward pass hands to the backward pass in float32."""
    forward = tf.function(layer)

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 16), "float16")])
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x)
        return tape.gradient(y, x)

    calls = [op for op in step.get_concrete_function().graph.get_operations() if op.type.endswith("PartitionedCall")]
    assert len(calls) == 2
    return [tensor.name for tensor in calls[0].outputs if tensor.dtype == tf.float32 and tensor.shape.rank == 4]


@pytest.mark.parametrize(
    ("name", "args"),
    [("AveragePooling2D", (2,)), ("AveragePooling2D", (3, 1)), ("GlobalAveragePooling2D", ())],
)
def test_no_float32_copy_of_the_input_is_kept(name, args):
    assert kept_in_float32(getattr(layers, name)(*args, dtype="mixed_float16")) == []


@pytest.mark.stock_defect
def test_stock_keeps_no_float32_copy_of_the_input():
    assert kept_in_float32(keras.layers.GlobalAveragePooling2D(dtype="mixed_float16")) == []


def test_integers_are_averaged():
    y = layers.AveragePooling1D(2, dtype="mixed_float16")(np.array([[[1], [4]]]))
    assert (y.numpy().tolist(), y.dtype) == ([[[2.5]]], tf.float16)
    y = layers.GlobalAveragePooling1D(dtype="mixed_float16")(np.array([[[1], [4]]]), mask=np.array([[True, True]]))
    assert (y.numpy().tolist(), y.dtype) == ([[2.5]], tf.float16)


def test_sizes_that_are_not_static():
    for name, args in (("AveragePooling1D", (2,)), ("GlobalAveragePooling1D", ())):
        layer = getattr(layers, name)(*args, dtype="mixed_bfloat16")
        stock = getattr(keras.layers, name)(*args, dtype="float32")
        step = tf.function(
            lambda x, upstream: gradients(layer, x, upstream, {}),  # noqa: B023
            input_signature=[
                tf.TensorSpec((None, None, 3), "bfloat16"),
                tf.TensorSpec((None,) * (3 if args else 2), "bfloat16"),
            ],
        )
        for steps in (4, 7):
            x = tf.cast(np.random.normal(size=(2, steps, 3)), "bfloat16")
            upstream = tf.cast(np.random.normal(size=stock.compute_output_shape(x.shape)), "bfloat16")
            expected = gradients(stock, tf.cast(x, "float32"), tf.cast(upstream, "float32"), {})
            for key, value in step(x, upstream).items():
                assert_close(tf.cast(value, "float32"), expected[key], 8e-3)  # rounding to bfloat16


def test_errors_in_keras_words():
    x = np.ones((2, 4, 4, 3), "float32")
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        layers.AveragePooling2D(2)(x[0])
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=4"):
        layers.GlobalAveragePooling1D()(keras.Input((4, 4, 3)))
    with pytest.raises(ValueError, match="Computed output size would be zero or negative.*pool_size=.5, 5"):
        layers.AveragePooling2D(5)(x)
    with pytest.raises(ValueError, match="Computed output size would be zero or negative"):
        layers.AveragePooling2D(5)(keras.Input((4, 4, 3)))
    with pytest.raises(ValueError, match="Argument `padding` must be either 'valid' or 'same'. Received: full"):
        layers.AveragePooling1D(2, padding="full")
    with pytest.raises(ValueError, match=r"`strides` argument must be integers > 0. Received: strides=\(1, 0\)"):
        layers.AveragePooling2D(2, strides=(1, 0))
    with pytest.raises(ValueError, match="The `pool_size` argument must be a tuple of 3 integers"):
        layers.AveragePooling3D((2, 2))
    for make in (lambda f: layers.AveragePooling1D(2, data_format=f), lambda f: layers.GlobalAveragePooling3D(f)):
        with pytest.raises(ValueError, match="`data_format` argument must be one of .*Received: data_format=channels"):
            make("channels")


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (np.ones((2, 3), bool), ValueError, r"shape \(batch_size, steps\), here \(2, 4\).*mask.shape=\(2, 3\)"),
        (np.ones((3, 4), bool), ValueError, r"mask.shape=\(3, 4\)"),
        (np.ones((2, 1), bool), ValueError, r"mask.shape=\(2, 1\)"),
        (np.ones((2, 4, 1), bool), ValueError, r"mask.shape=\(2, 4, 1\)"),
        (np.full((2, 4), "yes"), TypeError, "must hold bools or numbers. Received: mask.dtype=string"),
    ],
)
def test_wrong_masks(mask, error, words):
    with pytest.raises(error, match=words):
        layers.GlobalAveragePooling1D()(np.ones((2, 4, 3), "float32"), mask=tf.constant(mask))
    with pytest.raises(ValueError, match=r"mask.shape=\(None, 3\)"):
        layers.GlobalAveragePooling1D()(keras.Input((4, 3)), mask=keras.Input((3,), dtype="bool"))


@pytest.mark.parametrize("name", ["3D", "3D same, overlapping", "3D channels_first"])
def test_3d_windows_of_float64(name):
    x = tf.constant(np.random.normal(size=CASES[name].shapes[0]))
    layer, stock = CASES[name].ours(), CASES[name].stock()
    layer.dtype_policy = "float64"
    upstream = tf.constant(np.random.normal(size=stock.compute_output_shape(x.shape)))
    expected = gradients(stock, tf.cast(x, "float32"), tf.cast(upstream, "float32"), {})
    for key, value in gradients(layer, x, upstream, {}).items():
        assert value.dtype == tf.float64
        assert_close(value, expected[key], 1e-6)
    theoretical, numerical = tf.test.compute_gradient(lambda x: layer(x) * upstream, [x])
    assert_close(theoretical[0], numerical[0], 1e-6)


def test_padding_in_capitals_is_what_it_is_in_small_letters():
    x = np.arange(5, dtype="float32").reshape(1, 5, 1)
    assert layers.AveragePooling1D(2, padding="SAME")(x).numpy().ravel().tolist() == [0.5, 2.5, 4]


def test_second_derivatives():
    x = tf.constant(np.random.normal(size=(1, 4, 4, 2)), "float32")
    for layer, stock in (
        (layers.AveragePooling2D(2), keras.layers.AveragePooling2D(2)),
        (layers.AveragePooling2D(2, strides=1), keras.layers.AveragePooling2D(2, strides=1)),
    ):
        results = []
        for each in (layer, stock):
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(each(x) ** 3)
                squares = tf.reduce_sum(inner.gradient(loss, x) ** 2)
            results.append(outer.gradient(squares, x))
        assert_close(results[0], results[1], 1e-5)
