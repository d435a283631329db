"""Losses of 16-bit predictions: equal to stock Keras in float32, with what they keep, and what the stock ones lose."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import losses
from tests.contract.layer_contract import assert_close

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
LABELS = np.array([[0, 4, 2], [1, 1, 3]])
CASES = {
    "sparse, logits": ("SparseCategoricalCrossentropy", {"from_logits": True}),
    "sparse, probabilities": ("SparseCategoricalCrossentropy", {}),
    "sparse, ignored": ("SparseCategoricalCrossentropy", {"from_logits": True, "ignore_class": 1}),
    "sparse, ignored, probabilities": ("SparseCategoricalCrossentropy", {"ignore_class": 1, "axis": 2}),
    "categorical, logits": ("CategoricalCrossentropy", {"from_logits": True, "label_smoothing": 0.1}),
    "categorical, probabilities": ("CategoricalCrossentropy", {}),
    "categorical, axis 1": ("CategoricalCrossentropy", {"from_logits": True, "axis": 1}),
    "binary, logits": ("BinaryCrossentropy", {"from_logits": True, "label_smoothing": 0.1}),
    "binary, probabilities": ("BinaryCrossentropy", {"axis": 1}),
}
REDUCTIONS = ("sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", None)
WAYS = pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "XLA"])


def data(name, dtype):
    logits = tf.constant(np.random.normal(size=(2, 3, 5)) * 4, dtype)
    labels = LABELS if name.startswith("sparse") else np.eye(5, dtype="float32")[LABELS]
    if "from_logits" in CASES[name][1]:
        return labels, logits
    probabilities = tf.sigmoid(logits) if name.startswith("binary") else tf.nn.softmax(tf.cast(logits, "float32"))
    return labels, tf.cast(probabilities, dtype)


def value_and_gradient(loss, labels, predictions, *weights):
    with tf.GradientTape() as tape:
        tape.watch(predictions)
        value = loss(labels, predictions, *weights)
    return value, tape.gradient(value, predictions)


def run_in(jit_compile, function, *arguments):
    arguments = [None if x is None else tf.convert_to_tensor(x) for x in arguments]
    if jit_compile is None:
        return function(*arguments)
    return tf.function(function, jit_compile=jit_compile)(*arguments)


def make(module, name, **further):
    cls, settings = CASES[name]
    return getattr(module, cls)(**settings, **further)


def compare(ours, stock, labels, predictions, weights=None, jit_compile=None, for_stock=None):
    """Asserts that values are stock float32's, and gradients too, once rounded; answers the gradient.

    Stock gets the same predictions, or others that are to make no difference.
    """
    for_stock = predictions if for_stock is None else for_stock
    value, gradient = run_in(
        jit_compile,
        lambda *given: value_and_gradient(ours, *given),
        labels,
        predictions,
        *([weights] * (weights is not None)),
    )
    expected, to_predictions = value_and_gradient(stock, labels, tf.cast(for_stock, "float32"), weights)
    assert value.dtype == tf.float32
    assert gradient.dtype == predictions.dtype
    # XLA's exp and log differ from those of TensorFlow's kernels in the last digits.
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-6)
    # A gradient below the normal numbers of float16, 2**-14, is rounded to a multiple of 2**-24.
    np.testing.assert_allclose(
        tf.cast(gradient, "float32"), to_predictions, rtol=1.01 * ROUNDING[predictions.dtype.name], atol=2.0**-24
    )
    return gradient


@WAYS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_stock_float32(name, dtype, jit_compile):
    labels, predictions = data(name, dtype)
    compare(make(losses, name), make(keras.losses, name), labels, predictions, None, jit_compile)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["sparse, logits", "sparse, ignored", "categorical, logits", "binary, logits"])
def test_weights_masks_and_reductions_are_those_of_keras(name, reduction):
    labels, predictions = data(name, "bfloat16")
    weights = np.array([[1.0, 2.0, 0.5], [0.0, 3.0, 1.0]], "float32")
    mask = tf.constant([[True, True, False], [True, False, True]])
    wide = tf.cast(predictions, "float32")
    for given in (None, weights, weights[:, :1]):
        results = []
        for module, x in ((losses, predictions), (keras.losses, wide)):
            x = tf.identity(x)
            x._keras_mask = mask
            results.append(make(module, name, reduction=reduction)(labels, x, given))
        assert results[0].shape == results[1].shape
        np.testing.assert_allclose(*results, rtol=1e-6)
        compare(
            make(losses, name, reduction=reduction),
            make(keras.losses, name, reduction=reduction),
            labels,
            predictions,
            given,
        )


def test_a_batch_that_is_ignored_altogether_is_zero():
    logits = tf.constant(np.random.normal(size=(2, 3)), "float16")
    ours, stock = (
        module.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1) for module in (losses, keras.losses)
    )
    gradient = compare(ours, stock, np.array([-1, -1]), logits)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@WAYS
def test_ignored_rows_hide_what_is_in_them(jit_compile):
    logits = tf.constant([[np.nan, np.inf, 0.0], [1.0, 2.0, 3.0]], "bfloat16")
    ours, stock = (
        module.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255) for module in (losses, keras.losses)
    )
    # Keras 3.12 does not hide them from the gradient, so its loss gets others there.
    others = tf.where(tf.math.is_finite(logits), logits, tf.zeros_like(logits))
    gradient = compare(ours, stock, np.array([255, 0], "uint8"), logits, None, jit_compile, for_stock=others)
    np.testing.assert_array_equal(tf.cast(gradient, "float32")[0], [0, 0, 0])


@WAYS
def test_large_and_masked_logits(jit_compile):
    logits = tf.constant([[60000.0, -60000.0, 59968.0], [1.0, -np.inf, 2.0], [60000.0, 60000.0, -np.inf]], "float16")
    for labels in (np.array([0, 0, 1]), np.array([1, 2, 0])):
        ours, stock = (module.SparseCategoricalCrossentropy(from_logits=True) for module in (losses, keras.losses))
        compare(ours, stock, labels, logits, None, jit_compile)


def masked_class(module, **settings):
    logits = tf.constant([[1.0, -np.inf, 2.0]], "float16")
    loss = module.CategoricalCrossentropy(from_logits=True, **settings)
    value, gradient = value_and_gradient(loss, np.array([[1.0, 0.0, 0.0]]), logits)
    p = 1 / (1 + np.exp([1.0, -np.inf, -1.0])) * [1, 0, 1]
    np.testing.assert_allclose(value, np.log1p(np.exp(1.0)), rtol=1e-6)
    np.testing.assert_allclose(gradient, [p - [1, 0, 0]], rtol=1e-3)


def test_one_hot_labels_leave_out_a_class_that_cannot_be():
    masked_class(losses)


@pytest.mark.stock_defect
def test_stock_one_hot_labels_leave_out_a_class_that_cannot_be():
    masked_class(keras.losses)


def smoothing_along_axis_1(module):
    logits = tf.constant(np.random.normal(size=(2, 3, 5)), "bfloat16")
    labels = np.moveaxis(np.eye(3)[np.random.randint(0, 3, (2, 5))], -1, 1)
    loss = module.CategoricalCrossentropy(from_logits=True, axis=1, label_smoothing=0.3)
    wide = np.asarray(tf.cast(logits, "float64"))
    log = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    np.testing.assert_allclose(loss(labels, logits), -((0.7 * labels + 0.1) * log).sum(1).mean(), rtol=1e-5)


def test_label_smoothing_counts_the_classes_along_axis():
    smoothing_along_axis_1(losses)


@pytest.mark.stock_defect
def test_stock_label_smoothing_counts_the_classes_along_axis():
    smoothing_along_axis_1(keras.losses)


def label_2049(module, **settings):
    """float16 has no 2049; the nearest is 2048."""
    logits = tf.constant(np.eye(2050)[2049:] * 20, "float16")
    loss = module.SparseCategoricalCrossentropy(from_logits=True, dtype="float16")
    assert float(loss(np.array([2049]), logits)) < 0.01


def label_above_2_to_24(module):
    """float32 has no 2**24 + 1; the nearest is 2**24."""
    logits = tf.tensor_scatter_nd_update(
        tf.zeros((1, 2**24 + 2), "bfloat16"), [[0, 2**24 + 1]], tf.ones([1], "bfloat16") * 40
    )
    loss = module.SparseCategoricalCrossentropy(from_logits=True)
    assert float(loss(np.array([2**24 + 1]), logits)) < 0.01


@pytest.mark.parametrize("check", [label_2049, label_above_2_to_24])
def test_labels_are_not_rounded(check):
    check(losses)


@pytest.mark.stock_defect
@pytest.mark.parametrize("check", [label_2049, label_above_2_to_24])
def test_stock_labels_are_not_rounded(check):
    check(keras.losses)


def logits_behind_probabilities(module):
    """The label's probability, e**-30, is below the 1e-7 that a loss of probabilities stops at."""
    probabilities = keras_mp.activations.softmax(tf.constant([[0.0, 30.0]], "bfloat16"))
    np.testing.assert_allclose(module.SparseCategoricalCrossentropy()(np.array([0]), probabilities), 30.0, rtol=1e-5)
    np.testing.assert_allclose(module.CategoricalCrossentropy()(np.eye(2)[:1], probabilities), 30.0, rtol=1e-5)
    sigmoid = keras.activations.sigmoid(tf.constant([[30.0]], "bfloat16"))
    np.testing.assert_allclose(module.BinaryCrossentropy()(np.zeros((1, 1)), sigmoid), 30.0, rtol=1e-5)


def test_the_logits_behind_16_bit_probabilities_are_found():
    logits_behind_probabilities(losses)


@pytest.mark.stock_defect
def test_the_stock_losses_find_the_logits_behind_16_bit_probabilities():
    logits_behind_probabilities(keras.losses)


def test_a_label_that_is_no_class_is_refused_or_nan():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    logits = tf.zeros((2, 3), "bfloat16")
    for label in (3, -1):
        labels = tf.constant([0, label])
        for jit_compile in (None, False):
            with pytest.raises(tf.errors.InvalidArgumentError, match="outside the valid range"):
                run_in(jit_compile, lambda *given: value_and_gradient(loss, *given), labels, logits)
        value, gradient = run_in(True, lambda *given: value_and_gradient(loss, *given), labels, logits)
        assert np.isnan(value)
        assert np.isnan(tf.cast(gradient, "float32")[1]).all()


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_for_the_backward_pass_is_16_bit(name):
    """What the graph's backward part reads from its forward part, of the size of the predictions."""
    labels, predictions = data(name, "bfloat16")
    loss, kept = make(losses, name), []

    @tf.function
    def step(predictions):
        predictions = tf.identity(predictions)
        with tf.GradientTape() as tape:
            tape.watch(predictions)
            value = loss(labels, predictions)
        before = set(tf.compat.v1.get_default_graph().get_operations())
        gradient = tape.gradient(value, predictions)
        after = [op for op in tf.compat.v1.get_default_graph().get_operations() if op not in before]
        kept.extend(tensor for op in after for tensor in op.inputs if tensor.op in before)
        return gradient

    step(predictions)
    large = [tensor for tensor in kept if tensor.shape.num_elements() == 30 and tensor.op.type != "Const"]
    assert large
    assert {tensor.dtype for tensor in large} == {tf.bfloat16}


@pytest.mark.parametrize("name", ["sparse, logits", "categorical, probabilities", "binary, logits"])
def test_second_derivatives(name):
    labels, predictions = data(name, "bfloat16")

    def second(loss, x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            _, gradient = value_and_gradient(loss, labels, x)
            total = tf.reduce_sum(tf.cast(gradient, "float32") ** 2)
        return outer.gradient(total, x)

    expected = second(make(keras.losses, name), tf.cast(predictions, "float32"))
    for way in (None, False, True):
        if way and "probabilities" not in name and name.startswith("sparse"):
            continue  # TensorFlow has no second derivative of this kernel in XLA, in float32 neither
        actual = run_in(way, lambda x: second(make(losses, name), x), predictions)
        assert_close(tf.cast(actual, "float32"), expected, 2e-2)  # of first derivatives that are rounded in between


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_to_soft_labels(jit_compile):
    labels, predictions = data("categorical, logits", "bfloat16")
    results = []
    for module, x in ((losses, predictions), (keras.losses, tf.cast(predictions, "float32"))):

        def step(labels, x, loss=make(module, "categorical, logits")):  # noqa: B008
            with tf.GradientTape() as tape:
                tape.watch([labels, x])
                value = loss(labels, x)
            return tape.gradient(value, labels)

        results.append(run_in(jit_compile, step, labels, x))
    np.testing.assert_allclose(*results, rtol=1e-5)


# Both losses are trained by Keras's optimizer as it is, of whose loss scale in float16 we warn.
BY_KERAS = pytest.mark.filterwarnings("ignore:.*computes in float16, and:keras_mp.errors.KerasMPWarning")


def model(loss):
    keras.utils.set_random_seed(1)
    outputs = 1 if isinstance(loss, keras.losses.BinaryCrossentropy) else 3
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(outputs)])
    made.compile("sgd", loss=loss, metrics=["accuracy"])
    return made


@BY_KERAS
@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    [
        ("mixed_float16", True),
        ("mixed_bfloat16", False),
        pytest.param("float32", False, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", True, marks=pytest.mark.slow),
        pytest.param("float64", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("cls", losses.__all__)
def test_fit_with_weights(cls, policy, jit_compile):
    keras.config.set_dtype_policy(policy)
    x = np.random.normal(size=(8, 4)).astype("float32")
    labels = np.random.randint(0, 2 if cls == "BinaryCrossentropy" else 3, 8)
    y = np.eye(3, dtype="float32")[labels] if cls == "CategoricalCrossentropy" else labels
    weights = np.random.uniform(size=8).astype("float32")
    histories = []
    for module in (losses, keras.losses):
        made = model(getattr(module, cls)(from_logits=True))
        made.jit_compile = jit_compile
        values = [made.fit(x, y, batch_size=4, sample_weight=weights, shuffle=False, verbose=0).history["loss"]]
        values.append(made.fit(x, y, 4, class_weight={0: 1, 1: 2, 2: 3}, shuffle=False, verbose=0).history["loss"])
        values.append(made.evaluate(x, y, 4, verbose=0)[:1])
        histories.append(values)
    # The same numbers, until gradients that are rounded once here and twice there have moved the weights.
    np.testing.assert_allclose(*histories, rtol=1e-5 if "16" not in policy else 2e-3)


@BY_KERAS
@pytest.mark.parametrize("policy", ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)])
def test_fit_on_two_replicas(policy, mirrored):
    keras.config.set_dtype_policy(policy)
    x, y = np.random.normal(size=(8, 4)).astype("float32"), np.random.randint(0, 3, 8)
    histories = []
    for module in (losses, keras.losses):
        with mirrored(2).scope():
            made = model(module.SparseCategoricalCrossentropy(from_logits=True))
        histories.append(made.fit(x, y, epochs=2, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*histories, rtol=2e-3)  # as above


@pytest.mark.parametrize("cls", losses.__all__)
def test_files_and_configurations(cls, tmp_path):
    loss = getattr(losses, cls)(from_logits=True, reduction="sum", name="mine")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is type(loss)
    assert again.get_config() == loss.get_config()
    assert repr(loss).startswith(f"<{cls}({{'name': 'mine'")
    stock = getattr(keras.losses, cls)(from_logits=True).get_config()
    assert getattr(losses, cls).from_config(stock).get_config().items() >= stock.items()
    model(loss).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.loss) is getattr(losses, cls)
    assert loaded.loss.from_logits
    assert loaded.loss.reduction == "sum"


def test_wider_and_narrower_dtypes():
    labels, predictions = data("sparse, logits", "bfloat16")
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")(
        labels, tf.cast(predictions, "float64")
    )
    ours = losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")(labels, predictions)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    narrow = losses.SparseCategoricalCrossentropy(from_logits=True, dtype="mixed_bfloat16")(labels, predictions)
    assert narrow == tf.cast(expected, "bfloat16")


def test_bad_arguments_are_worded_as_keras():
    logits = tf.zeros((2, 3), "bfloat16")
    with pytest.raises(ValueError, match="Invalid value for argument `reduction`"):
        losses.BinaryCrossentropy(reduction="none at all")
    with pytest.raises(ValueError, match="Only axis=-1 is currently supported. Received: axis=0"):
        losses.SparseCategoricalCrossentropy(axis=0)(np.array([0, 1]), logits)
    with pytest.raises(ValueError, match="must have the same shape up until the last dimension"):
        losses.SparseCategoricalCrossentropy()(np.array([0, 1, 2]), logits)
    with pytest.raises(ValueError, match=r"must have rank \(ndim\) `target.ndim - 1`"):
        losses.SparseCategoricalCrossentropy()(np.zeros((2, 3), int), logits)
    for cls in (losses.CategoricalCrossentropy, losses.BinaryCrossentropy):
        with pytest.raises(ValueError, match="must have the same shape"):
            cls()(np.zeros((2, 4)), logits)
        with pytest.raises(ValueError, match="must have the same rank"):
            cls()(np.zeros((2, 3, 4)), logits)
    with pytest.raises(ValueError, match="`axis` must be of type `int`"):
        losses.CategoricalCrossentropy(axis=True)(np.zeros((2, 3)), logits)
    with pytest.warns(SyntaxWarning, match="Consider using 'binary_crossentropy'"):
        losses.CategoricalCrossentropy(from_logits=True)(np.ones((2, 1)), logits[:, :1])
    with pytest.warns(UserWarning, match="was produced by a Softmax activation"):
        losses.SparseCategoricalCrossentropy(from_logits=True)(np.array([0, 1]), keras_mp.activations.softmax(logits))
