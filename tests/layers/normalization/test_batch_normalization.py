"""Batch normalization: the contract, the fused kernel, and batches that are empty or not finite."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract, gradients
from tests.helpers.derivatives import early_operations

MASK = np.array([[True, False, True, True, False], [True, True, True, False, False]])
# Of each channel something shows: Keras moves the statistics of one of which nothing does towards 0.
MASK_OF_CHANNELS = np.array([[True, False, True, True, True], [True, True, True, False, False]])
CASES = {
    "images": Case(layers.BatchNormalization, keras.layers.BatchNormalization, [(4, 3, 2, 5)], {"training": True}),
    "rank 2": Case(layers.BatchNormalization, keras.layers.BatchNormalization, [(8, 5)], {"training": True}),
    "inference": Case(layers.BatchNormalization, keras.layers.BatchNormalization, [(4, 3, 5)], {"training": False}),
    "channels first": Case(
        lambda: layers.BatchNormalization(axis=1, center=False),
        lambda: keras.layers.BatchNormalization(axis=1, center=False),
        [(4, 3, 2, 5)],
        {"training": True},
        masked=False,  # a mask has the shape of the input without its last axis
    ),
    "mask": Case(
        layers.BatchNormalization, keras.layers.BatchNormalization, [(2, 5, 3)], {"training": True, "mask": MASK}
    ),
    "mask, channels first": Case(
        functools.partial(layers.BatchNormalization, axis=1),
        functools.partial(keras.layers.BatchNormalization, axis=1),
        [(2, 5, 3)],
        {"training": True, "mask": MASK_OF_CHANNELS},
    ),
    **{
        f"synchronized, {name}": Case(
            functools.partial(layers.BatchNormalization, synchronized=True, **arguments),
            functools.partial(keras.layers.BatchNormalization, synchronized=True, **arguments),
            [shape],
            {"training": True, **call},
            synchronized=True,
            masked=not arguments,  # a mask has the shape of the input without its last axis
        )
        for name, arguments, shape, call in (
            ("images", {}, (4, 3, 2, 5), {}),
            ("rank 2", {}, (8, 5), {}),
            ("channels first", {"axis": 1, "center": False}, (4, 3, 2, 5), {}),
            ("mask", {}, (2, 5, 3), {"mask": MASK}),
        )
    },
}
if "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters:  # not in Keras 3.12, for Python 3.10
    CASES["renorm"] = Case(
        lambda: layers.BatchNormalization(renorm=True, scale=False),
        lambda: keras.layers.BatchNormalization(renorm=True, scale=False),
        [(4, 3, 5)],
        {"training": True},
        # The corrections are constants to the gradient by definition: Ioffe, "Batch Renormalization", 2017, section 3.
        differentiable=False,
    )


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


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


def ops_of(layer, x, **call):
    """The ops that a call puts into a graph."""
    layer.build(x.shape)
    function = tf.function(lambda x: layer(x, **call)).get_concrete_function(tf.TensorSpec(x.shape, x.dtype))
    return function.graph.get_operations()


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", [(8,), (4, 3), (4, 3, 2), (2, 2, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_is_one_fused_op_for_every_rank(shape, training, policy):
    layer = layers.BatchNormalization(dtype=policy)
    ops = ops_of(layer, tf.zeros((*shape, 16), layer.compute_dtype), training=training)
    assert [op.type for op in ops].count("FusedBatchNormV3") == 1
    # No cast of a whole tensor, only of the count of its elements.
    assert [op for op in ops if op.type == "Cast" and op.outputs[0].shape.rank] == []


@pytest.mark.parametrize(
    ("channels", "training", "inside"),
    [
        (16, True, ["bfloat16"] * 2),
        (16, False, ["bfloat16"] * 2),
        (24, True, []),  # XLA compiles the formula
        (24, False, ["float32"] * 2),
        (8, True, []),
        (8, False, ["float32"] * 2),
        (32, True, ["bfloat16"] * 2),
        (32, False, ["bfloat16"] * 2),
    ],
)
def test_the_fused_op_computes_in_the_dtype_that_is_fast_and_keeps_16_bits(channels, training, inside):
    layer = layers.BatchNormalization(dtype="mixed_bfloat16")
    layer.build((4, 3, 2, channels))
    kept = []

    @tf.function(input_signature=[tf.TensorSpec((4, 3, 2, channels), "bfloat16")])
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        before = set(tf.compat.v1.get_default_graph().get_operations())
        gradient = tape.gradient(y, x)
        after = [op for op in tf.compat.v1.get_default_graph().get_operations() if op not in before]
        kept.extend(tensor for op in after for tensor in op.inputs if tensor.op in before)
        return y, gradient

    function = step.get_concrete_function()
    kernels = [op for op in function.graph.get_operations() if op.type in ("FusedBatchNormV3", "FusedBatchNormGradV3")]
    assert [op.inputs[0].dtype.name for op in kernels] == inside
    assert function.output_dtypes == (tf.bfloat16, tf.bfloat16)
    assert {tensor.dtype for tensor in kept if tensor.shape == (4, 3, 2, channels)} == {tf.bfloat16}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [16, 24])
def test_no_image_is_cast_before_the_gradient_comes(channels, training):
    layer = layers.BatchNormalization(dtype="mixed_bfloat16")
    layer.build((4, 3, 2, channels))
    # What XLA compiles is handed the image itself.
    handed = ["Identity"] if training and channels == 24 else []
    assert early_operations(layer, (4, 3, 2, channels), "bfloat16", training=training) == handed


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


def by_replicas(strategy, make, halves, masks=None, dtype="float32"):
    """One training step of a synchronized layer: (outputs and gradients of each replica, copies of each statistic)."""
    with strategy.scope():
        layer = make(synchronized=True, momentum=0.0, epsilon=1e-12, dtype=dtype)
        layer.build((None, *halves[0].shape[1:]))
    values, given_masks = (
        strategy.experimental_distribute_values_from_function(
            lambda context, parts=parts: parts[context.replica_id_in_sync_group]
        )
        if parts is not None
        else None
        for parts in ([tf.constant(half) for half in halves], masks and [tf.constant(mask) for mask in masks])
    )

    def step(x, mask):
        weights = tf.reshape(tf.range(tf.size(x), dtype=tf.float32), tf.shape(x))
        return gradients(layer, x, tf.cos(weights), {"training": True, "mask": mask})

    outputs = tf.function(lambda x, mask: strategy.run(step, (x, mask)))(values, given_masks)
    results = {name: strategy.experimental_local_results(value) for name, value in outputs.items()}
    copies = [
        [copy.numpy() for copy in strategy.experimental_local_results(weight.value)]
        for weight in (layer.moving_mean, layer.moving_variance)
    ]
    return results, copies


def synchronized_large_mean(strategy, make):
    x = np.random.normal(6e4, 1.0, (8, 3, 2)).astype("float32")
    results, (means, variances) = by_replicas(strategy, make, [x[:5], x[5:]])
    wide = x.astype("float64")
    mean, variance = wide.mean((0, 1)), wide.var((0, 1))
    for copy in means:
        np.testing.assert_allclose(copy, mean, rtol=1e-6)
    for copy in variances:
        # The mean of 24 numbers of 60000 is known to 1/256, of a deviation of 1.
        np.testing.assert_allclose(copy, variance, rtol=1e-4)
    return tf.concat(results["y"], 0), (wide - mean) / np.sqrt(variance)


def test_synchronized_replicas_subtract_the_mean_before_they_square(mirrored):
    y, expected = synchronized_large_mean(mirrored(2), layers.BatchNormalization)
    np.testing.assert_allclose(y, expected, atol=1e-2)


@pytest.mark.stock_defect
def test_stock_synchronized_replicas_subtract_the_mean_before_they_square(mirrored):
    y, expected = synchronized_large_mean(mirrored(2), keras.layers.BatchNormalization)
    np.testing.assert_allclose(y, expected, atol=1e-2)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("half", [60000, 20000])
def test_synchronized_replicas_over_the_range_of_16_bits(mirrored, half, policy):
    """One replica sees numbers about 60000, the other about -60000 or -20000."""
    compute_dtype = keras.dtype_policies.get(policy).compute_dtype
    x = [np.random.normal(center, 1000.0, (4, 3)) for center in (60000, -half)]
    x = [tf.cast(tf.clip_by_value(part, -65000, 65000), compute_dtype) for part in x]
    results, (means, variances) = by_replicas(mirrored(2), layers.BatchNormalization, x, dtype=policy)
    wide = np.concatenate([np.asarray(tf.cast(part, "float64")) for part in x])
    np.testing.assert_allclose(means, [wide.mean(0)] * 2, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(variances, [wide.var(0)] * 2, rtol=1e-5)
    expected = (wide - wide.mean(0)) / wide.std(0)
    assert_close(tf.cast(tf.concat(results["y"], 0), "float32"), expected, 2e-3 if policy == "mixed_float16" else 4e-3)


def test_synchronized_replicas_count_an_empty_batch_as_none(mirrored):
    x = np.random.normal(3.0, 2.0, (6, 2, 3)).astype("float32")
    results, (means, variances) = by_replicas(mirrored(2), layers.BatchNormalization, [x, x[:0]])
    wide = x.astype("float64")
    np.testing.assert_allclose(means, [wide.mean((0, 1))] * 2, rtol=1e-5)
    np.testing.assert_allclose(variances, [wide.var((0, 1))] * 2, rtol=1e-5)
    assert results["y"][1].shape == (0, 2, 3)
    assert all(np.isfinite(part).all() for parts in results.values() for part in parts)


def test_synchronized_replicas_that_are_all_empty_leave_the_statistics_alone(mirrored):
    x = np.zeros((0, 2, 3), "float32")
    results, (means, variances) = by_replicas(mirrored(2), layers.BatchNormalization, [x, x])
    np.testing.assert_array_equal(means, np.zeros((2, 3)))
    np.testing.assert_array_equal(variances, np.ones((2, 3)))
    assert all(np.isfinite(part).all() for parts in results.values() for part in parts)


def test_synchronized_replicas_pass_over_a_batch_that_is_not_finite(mirrored):
    """A NaN on one replica is one in the statistics of both; the other channel moves on."""
    x = np.random.normal(3.0, 2.0, (6, 2)).astype("float32")
    x[1, 0] = np.nan
    _, (means, variances) = by_replicas(mirrored(2), layers.BatchNormalization, [x[:3], x[3:]])
    wide = x.astype("float64")[:, 1]
    np.testing.assert_allclose(means, [[0.0, wide.mean()]] * 2, rtol=1e-5)
    np.testing.assert_allclose(variances, [[1.0, wide.var()]] * 2, rtol=1e-5)


def synchronized_with_a_mask(strategy, make):
    x = np.random.normal(3.0, 2.0, (2, 5, 3)).astype("float32")
    _, statistics = by_replicas(strategy, make, [x[:1], x[1:]], [MASK[:1], MASK[1:]])
    shown = x.astype("float64")[MASK]
    for copies, expected in zip(statistics, (shown.mean(0), shown.var(0)), strict=True):
        np.testing.assert_allclose(copies, [expected] * 2, rtol=1e-5)


def test_synchronized_replicas_with_a_mask(mirrored):
    synchronized_with_a_mask(mirrored(2), layers.BatchNormalization)


@pytest.mark.stock_defect
def test_stock_synchronized_replicas_with_a_mask(mirrored):
    """Each replica keeps to its own batch."""
    synchronized_with_a_mask(mirrored(2), keras.layers.BatchNormalization)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("shown", [False, True])
def test_batch_normalization_with_a_mask_passes_over_what_is_not_finite(shown, compiled):
    """Where the mask hides it, it does not count; where not, the channel stays where it was."""
    layer = layers.BatchNormalization(momentum=0.0)
    x = np.random.normal(size=(2, 5, 2)).astype("float32")
    hidden = x[MASK].astype("float64")
    x[0, 0 if shown else 1, 0] = np.inf
    layer.build(x.shape)
    tf.function(lambda x: layer(x, training=True, mask=tf.constant(MASK)), jit_compile=compiled)(tf.constant(x))
    expected = np.stack([hidden.mean(0), hidden.var(0)])
    if shown:
        expected[:, 0] = 0.0, 1.0
    np.testing.assert_allclose(
        [layer.moving_mean.numpy(), layer.moving_variance.numpy()], expected, rtol=1e-4, atol=1e-6
    )


def test_batch_normalization_of_one_channel_with_a_mask():
    layer = layers.BatchNormalization(momentum=0.0)
    layer(np.array([[[1.0], [3.0]]], "float32"), training=True, mask=np.array([[True, True]]))
    assert layer.moving_mean.numpy().tolist() == [2.0]


def test_batch_normalization_with_a_mask_that_hides_all():
    layer = layers.BatchNormalization(momentum=0.0)
    x = tf.random.normal((2, 5, 3))
    result = gradients(layer, x, tf.ones_like(x), {"training": True, "mask": np.zeros((2, 5), bool)})
    assert layer.moving_mean.numpy().tolist() == [0.0] * 3
    assert layer.moving_variance.numpy().tolist() == [1.0] * 3
    assert all(np.isfinite(value).all() for value in result.values())


@pytest.mark.parametrize("arguments", [{}, {"mask": np.array([[True, False, True]] * 2)}])
def test_second_derivatives_of_synchronized_batch_normalization(arguments):
    layer = layers.BatchNormalization(synchronized=True, dtype="float64")
    layer.build((2, 3, 2))
    upstream = np.random.normal(size=(2, 3, 2))

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True, **arguments) * upstream)
        return tape.gradient(loss, x)

    (theoretical,), (numerical,) = tf.test.compute_gradient(gradient, [np.random.normal(size=(2, 3, 2))], delta=1e-4)
    assert_close(theoretical, numerical, 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_words_a_bad_mask_in_either_mode(training):
    with pytest.raises(ValueError, match="one dimension less than the inputs"):
        layers.BatchNormalization()(np.ones((2, 3, 4), "float32"), mask=np.ones((2, 3, 4), bool), training=training)
