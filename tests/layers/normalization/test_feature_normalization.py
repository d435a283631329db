"""Feature-wise normalization: the contract, and statistics and inputs that 16 bits lose."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract, gradients


class StockNormalization(keras.layers.Normalization):
    """Keras's layer, that also reads the weights which the contract sets: it does so only after loading a file."""

    def set_weights(self, weights):
        super().set_weights(weights)
        self.finalize_state()


CASES = {
    name: Case(
        functools.partial(layers.Normalization, **arguments),
        functools.partial(StockNormalization, **arguments),
        [shape],
    )
    for name, arguments, shape in (
        ("last axis", {}, (4, 3, 5)),
        ("rank 2, inverted", {"invert": True}, (4, 5)),
        ("two axes", {"axis": (1, -1)}, (4, 3, 2, 5)),
        ("no axis", {"axis": None}, (4, 3, 5)),
        ("given", {"mean": [1.0, 2.0, 3.0], "variance": [4.0, 0.25, 1.0]}, (4, 2, 3)),
        ("given numbers, channels first", {"axis": 1, "mean": 2.0, "variance": 9.0}, (4, 3, 2, 5)),
    )
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


INCOMES = np.array([[30000.0, 1.0], [70000.0, 2.0], [140000.0, 6.0]], "float32")


def kinds_of(data):
    """The ways of giving `adapt` the same data."""

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return data[2 * index : 2 * index + 2], np.zeros(2)

    return {
        "array": data,
        "tensor": tf.constant(data),
        "data set": tf.data.Dataset.from_tensor_slices(data).batch(2),
        "data set of pairs": tf.data.Dataset.from_tensor_slices((data, data)).batch(2),
        "data set of unknown batches": tf.data.Dataset.from_generator(
            lambda: iter([data[:1], data[1:1], data[1:]]),
            output_signature=tf.TensorSpec((None, data.shape[1]), data.dtype),
        ),
        "PyDataset": Batches(),
        "list": [data[:2], data[2:]],
        "generator": (row for row in (data[:1], data[1:])),
    }


def adapted(make, kind, policy):
    layer = make(dtype=policy)
    try:
        layer.adapt(kinds_of(INCOMES)[kind])
    except tf.errors.InvalidArgumentError as error:  # of Keras's layer, from adding 16 bits to float32
        raise AssertionError(error) from error
    wide = INCOMES.astype("float64")
    np.testing.assert_allclose(layer.adapt_mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.adapt_variance, wide.var(0), rtol=1e-6)
    y = layer(INCOMES)
    assert y.dtype == layer.compute_dtype
    # Of the rounding of the answer to the compute dtype.
    assert_close(tf.cast(y, "float32"), (wide - wide.mean(0)) / wide.std(0), 1e-5 if policy == "float32" else 4e-3)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", kinds_of(INCOMES))
def test_adapts_to_any_kind_of_data_under_any_policy(kind, policy):
    adapted(layers.Normalization, kind, policy)


@pytest.mark.stock_defect
@pytest.mark.parametrize("kind", ["array", "data set"])
def test_stock_adapts_to_any_kind_of_data_under_any_policy(kind):
    adapted(keras.layers.Normalization, kind, "mixed_float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "float64"])
@pytest.mark.parametrize("kind", ["tensor", "data set"])
def test_adapts_to_data_of_any_dtype(kind, dtype):
    """60,000 rows about 60000: float16 has neither their sum nor their variance."""
    data = tf.cast(np.clip(np.random.normal(6e4, 1e3, (60000, 2)), 0, 65000), dtype)
    wide = np.asarray(tf.cast(data, "float64"))
    layer = layers.Normalization()
    layer.adapt(data if kind == "tensor" else tf.data.Dataset.from_tensor_slices(data).batch(7000))
    np.testing.assert_allclose(layer.adapt_mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.adapt_variance, wide.var(0), rtol=1e-5)


def large_array(layer):
    """In float32, row after row, each 0.1 is rounded to a multiple of 1/32 once the sum is above 262144."""
    data = np.full((4_000_000, 2), 0.1, "float32")
    layer.adapt(data)
    np.testing.assert_allclose(layer.adapt_mean, [0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(layer.adapt_variance, [0.0, 0.0], atol=1e-10)


def test_adapt_adds_up_in_float64():
    large_array(layers.Normalization())


@pytest.mark.stock_defect
def test_stock_adapt_adds_up_in_float64():
    large_array(keras.layers.Normalization())


@pytest.mark.parametrize("axis", [None, 0])
def test_adapts_to_single_numbers(axis):
    numbers = np.random.normal(5.0, 2.0, 300).astype("float32")
    layer = layers.Normalization(axis=axis)
    if axis is None:
        layer.adapt(tf.data.Dataset.from_tensor_slices(numbers))
        np.testing.assert_allclose(layer.adapt_mean, numbers.astype("float64").mean(), rtol=1e-6)
        np.testing.assert_allclose(layer.adapt_variance, numbers.astype("float64").var(), rtol=1e-6)
    else:
        layer.adapt(numbers)  # each is a feature of its own
        np.testing.assert_allclose(layer.adapt_mean, numbers)


def test_adapts_anew():
    layer = layers.Normalization()
    layer.adapt(INCOMES)
    layer.adapt(INCOMES * 2)
    np.testing.assert_allclose(layer.adapt_mean, INCOMES.mean(0) * 2, rtol=1e-6)
    assert_close(layer(INCOMES), (INCOMES - 2 * INCOMES.mean(0)) / (2 * INCOMES.std(0)), 1e-5)


@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_float16", 1e-3), ("mixed_bfloat16", 4e-3)])
@pytest.mark.parametrize("variance", [1e-10, 1e10])
def test_statistics_over_the_range_of_float32(variance, policy, tolerance):
    """Neither variance is in float16."""
    layer = layers.Normalization(mean=0.001, variance=variance, dtype=policy)
    layer.build((None, 3))
    steps = np.array([[-1.0, 0.5, 2.0]])
    # What rounding to 16 bits allows.
    assert_close(tf.cast(layer(0.001 + steps * np.sqrt(variance)), "float32"), steps, tolerance)


@pytest.mark.parametrize(
    ("policy", "variance", "tolerance"),
    [("mixed_float16", 1e-10, 1e-3), ("mixed_bfloat16", 1e-10, 4e-3), ("mixed_bfloat16", 1e10, 4e-3)],
)
def test_inverted_statistics_over_the_range_of_float32(variance, policy, tolerance):
    layer = layers.Normalization(mean=0.001, variance=variance, invert=True, dtype=policy)
    layer.build((None, 3))
    steps = np.array([[-1.0, 0.5, 2.0]])
    assert_close(tf.cast(layer(steps), "float32"), 0.001 + steps * np.sqrt(variance), tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_inputs_are_not_cast_down_first(dtype):
    """In eager code, in a graph, and in a `tf.data` pipeline, where Keras casts by another way."""
    layer = layers.Normalization(mean=100000.0, variance=4.0, dtype="mixed_float16")
    layer.build((None, 2))
    x = np.array([[100002, 99998]], dtype)
    for y in (
        layer(x),
        tf.function(layer)(tf.constant(x)),
        next(iter(tf.data.Dataset.from_tensors(x).map(layer))),
    ):
        assert y.dtype == tf.float16
        assert y.numpy().tolist() == [[1.0, -1.0]]


@pytest.mark.stock_defect
def test_stock_inputs_are_not_cast_down_first():
    layer = keras.layers.Normalization(mean=100000.0, variance=4.0, dtype="mixed_float16")
    assert layer(np.array([[100002.0, 99998.0]], "float32")).numpy().tolist() == [[1.0, -1.0]]


def test_float64_is_computed_in_float64():
    """Seconds since 1970 are further apart in float32 than the events here."""
    layer = layers.Normalization(mean=[1.7e9 + 0.5], variance=[0.25])
    layer.build((None, 1))
    assert layer(np.array([[1.7e9], [1.7e9 + 1]])).numpy().tolist() == [[-1.0], [1.0]]


def test_a_variance_of_zero_is_divided_by_keras_epsilon():
    results = []
    for make in (layers.Normalization, keras.layers.Normalization):
        layer = make(mean=1.0, variance=0.0)
        layer.build((None, 2))
        results.append(gradients(layer, tf.constant([[1.0, 1.5]]), tf.ones((1, 2)), {}))
    for name in ("y", "x"):
        assert_close(results[0][name], results[1][name], 1e-6)


@pytest.mark.parametrize("kind", ["adapted", "given"])
def test_a_layer_built_in_a_graph_outlives_it(kind):
    layer = layers.Normalization(**({"mean": 2.0, "variance": 4.0} if kind == "given" else {}))
    if kind == "given":
        first = tf.function(lambda x: layer(x))(tf.constant([[4.0]]))
        assert first.numpy().tolist() == [[1.0]]
    else:
        layer.adapt(np.array([[0.0], [4.0]], "float32"))
    assert layer(np.array([[4.0]], "float32")).numpy().tolist() == [[1.0]]


def test_weights_that_are_set_count():
    layer = layers.Normalization()
    layer.build((None, 1))
    layer.set_weights([np.array([2.0]), np.array([4.0]), np.array(0)])
    assert layer(np.array([[4.0]], "float32")).numpy().tolist() == [[1.0]]


@pytest.mark.parametrize("make", [layers.Normalization, keras.layers.Normalization])
def test_errors_are_worded_as_keras_words_them(make):
    with pytest.raises(ValueError, match="both `mean` and `variance` must be set"):
        make(mean=1.0)
    with pytest.raises(ValueError, match=r"`axis` values must be in the range \[-ndim, ndim\)"):
        make(axis=3)(keras.Input((2,)))
    with pytest.raises(ValueError, match="to be kept must have a known shape"):
        make()(keras.Input((3, None)))
    layer = make()
    layer.build((None, 3))
    with pytest.raises(ValueError, match="an incompatible shape, data.shape=\\(4, 2\\)"):
        layer.adapt(np.ones((4, 2), "float32"))


def test_errors_of_newer_keras_hold_for_all():
    """Keras 3.12 takes no iterables, and words what it does not take in another way."""
    with pytest.raises(TypeError, match="Unsupported data type"):
        layers.Normalization().adapt(3)
    with pytest.raises(ValueError, match=r"empty iterable \(no batches\)"):
        layers.Normalization().adapt([])
    with pytest.raises(ValueError, match=r"empty iterable \(no batches\)"):
        layers.Normalization().adapt(np.zeros((0, 3), "float32"))
    with pytest.raises(TypeError, match="with a `.shape` attribute.*Got an element of type float"):
        layers.Normalization().adapt([1.0, 2.0])
    with pytest.raises(ValueError, match="incompatible shape"):
        layers.Normalization().adapt([np.ones((2, 3)), np.ones((2, 4))])
