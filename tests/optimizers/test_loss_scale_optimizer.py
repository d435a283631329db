"""The optimizer's promises on one device."""

import functools
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.errors import ArgumentError, KerasMPWarning, LossScaleStuckError

INF, NAN = math.inf, math.nan


def make_optimizer(inner=None, **arguments):
    return keras_mp.LossScaleOptimizer(inner or keras.optimizers.SGD(0.5), **arguments)


def apply(optimizer, variables, gradients, how="eager"):
    """Applies gradients that are already scaled, in eager code, a graph, or a graph compiled by XLA."""
    optimizer.scale_loss(0.0)  # the tests scale by hand; the warning for loops that forget to is tested below

    # One function for all steps of a test, as in a training loop: compiling it is what costs.
    steps = optimizer.__dict__.setdefault("_steps_of_this_test", {})
    key = how, *map(id, variables)
    if key not in steps:

        def step(gradients):
            optimizer.apply(gradients, variables)

        steps[key] = step if how == "eager" else tf.function(step, jit_compile=how == "xla")
    steps[key]([g if g is None or isinstance(g, tf.IndexedSlices) else tf.constant(g) for g in gradients])


def snapshot(optimizer, variables):
    state = [*variables, *optimizer.inner_optimizer.variables]
    return [variable.numpy() for variable in state]


def assert_same(before, after):
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


HOWS = ["eager", "graph", "xla"]


@pytest.mark.parametrize("how", HOWS)
def test_a_story_of_finite_and_bad_steps(how):
    variable = keras.Variable([1.0, 2.0])
    optimizer = make_optimizer(initial_scale=4.0, dynamic_growth_steps=2, hysteresis=1)
    story = [
        # gradient of the scaled loss, weights after, scale after, skipped, in a row, iterations
        ([4.0, 8.0], [0.5, 1.0], 4.0, 0, 0, 1),
        ([4.0, 0.0], [0.0, 1.0], 8.0, 0, 0, 2),
        ([INF, 0.0], [0.0, 1.0], 4.0, 1, 1, 2),
        ([0.0, NAN], [0.0, 1.0], 2.0, 2, 2, 2),
        ([2.0, 2.0], [-0.5, 0.5], 2.0, 2, 0, 3),
        ([-INF, 2.0], [-0.5, 0.5], 1.0, 3, 1, 3),
        ([1.0, 1.0], [-1.0, 0.0], 1.0, 3, 0, 4),
        ([1.0, 1.0], [-1.5, -0.5], 2.0, 3, 0, 5),
    ]
    for gradient, weights, scale, skipped, in_a_row, iterations in story:
        apply(optimizer, [variable], [gradient], how)
        np.testing.assert_array_equal(variable, weights)
        assert float(optimizer.loss_scale) == scale
        assert int(optimizer.skipped_steps) == skipped
        assert int(optimizer.consecutive_skips) == in_a_row
        assert bool(optimizer.last_step_skipped) is (in_a_row > 0)
        assert int(optimizer.iterations) == iterations


@pytest.mark.parametrize("how", ["graph", "xla", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "inner",
    [
        keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        keras.optimizers.Adam(0.1, weight_decay=0.1, global_clipnorm=1.0),
        keras.optimizers.AdamW(0.1, use_ema=True, ema_overwrite_frequency=2),
        keras.optimizers.Nadam(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), clipvalue=0.5),
        keras.optimizers.RMSprop(0.1, clipnorm=1.0, gradient_accumulation_steps=3),
        keras.optimizers.Adafactor(0.1),
        keras.optimizers.Lion(0.01),
    ],
    ids=lambda inner: inner.__class__.__name__,
)
def test_skipped_steps_change_nothing_and_the_others_equal_the_inner_optimizer_alone(inner, how):
    """Promises 2 and 6: with bad steps in between, the run is the plain float32 run of the good ones."""
    config = inner.get_config()
    plain, wrapped = type(inner).from_config(config), type(inner).from_config(config)
    optimizer = make_optimizer(wrapped, initial_scale=1024.0)
    start = np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)
    plain_variables = [keras.Variable(start), keras.Variable(start[0])]
    variables = [keras.Variable(start), keras.Variable(start[0])]
    random = np.random.default_rng(0)
    for step in range(7):
        gradients = [random.normal(size=v.shape).astype("float32") for v in variables]
        plain.apply([tf.constant(g) for g in gradients], plain_variables)
        scale = float(optimizer.loss_scale)
        apply(optimizer, variables, [g * scale for g in gradients], how)
        for mine, theirs in zip(variables, plain_variables, strict=True):
            # Scaling by a power of two is exact. What rounds is the order in which the clipping factor is applied, and
            # XLA, which may fuse a multiplication with an addition; and each step of 0.1 by TensorFlow's kernel for
            # Adam is 6.5e-6 of it longer than Keras's at first (see test_tf_kernels.py).
            kernel = isinstance(inner, keras.optimizers.Adam) and how != "xla"
            np.testing.assert_allclose(mine, theirs, rtol=3e-6, atol=4e-6 if kernel else 1e-6)
        if step in (1, 4):
            before = snapshot(optimizer, variables)
            apply(optimizer, variables, [gradients[0], np.array([1.0, NAN, INF], "float32")], how)
            assert_same(before, snapshot(optimizer, variables))
    assert int(optimizer.skipped_steps) == 2


def test_a_bad_micro_batch_does_not_poison_the_accumulation_window():
    variable = keras.Variable([0.0])
    optimizer = make_optimizer(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), initial_scale=2.0)
    for gradient in ([2.0], [NAN], [INF]):
        apply(optimizer, [variable], [gradient])
    np.testing.assert_array_equal(variable, [0.0])
    apply(optimizer, [variable], [[6.0 / 4]])  # the scale has been halved twice, from 2 to 0.5
    np.testing.assert_array_equal(variable, [-(1.0 + 3.0) / 2])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_gradients_of_variables_that_are_not_float32_are_accumulated(dtype, how):
    variable = keras.Variable([0.0, 1.0], dtype=dtype)
    optimizer = make_optimizer(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), initial_scale=2.0)
    for gradient in ([2.0, 4.0], [6.0, 0.0]):
        apply(optimizer, [variable], [tf.constant(gradient, dtype)], how)
    np.testing.assert_array_equal(np.asarray(variable.value, "float32"), [-(1.0 + 3.0) / 2, 1.0 - (2.0 + 0.0) / 2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_gradients_of_any_dtype_are_unscaled_without_underflow(dtype):
    variable = keras.Variable([0.0])
    optimizer = make_optimizer(keras.optimizers.SGD(1.0), initial_scale=2.0**20)
    apply(optimizer, [variable], [tf.constant([2.0**-20], dtype)])
    # 2**-40 is 0 in float16.
    np.testing.assert_array_equal(variable, [-(2.0**-40)])


@pytest.mark.parametrize("how", HOWS)
def test_the_largest_finite_gradient_is_not_called_non_finite(how):
    variable = keras.Variable([0.0, 0.0])
    optimizer = make_optimizer(keras.optimizers.SGD(1.0), initial_scale=2.0)
    apply(optimizer, [variable], [[3.4e38, -3.4e38]], how)
    np.testing.assert_allclose(variable, [-1.7e38, 1.7e38])
    assert not bool(optimizer.last_step_skipped)


@pytest.mark.parametrize("how", HOWS)
def test_none_is_passed_over_and_sparse_gradients_stay_sparse(how):
    table, unused = keras.Variable(np.ones((4, 2))), keras.Variable([5.0])

    class SparseOnly(keras.optimizers.SGD):
        seen = ()

        def update_step(self, gradient, variable, learning_rate):
            type(self).seen += (type(gradient),)
            super().update_step(gradient, variable, learning_rate)

    optimizer = make_optimizer(SparseOnly(1.0), initial_scale=4.0)
    gradient = tf.IndexedSlices(tf.constant([[4.0, 8.0], [4.0, 0.0]]), tf.constant([2, 2]), tf.constant([4, 2]))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        apply(optimizer, [table, unused], [gradient, None], how)
    np.testing.assert_array_equal(table, [[1, 1], [1, 1], [-1, -1], [1, 1]])
    np.testing.assert_array_equal(unused, [5.0])
    assert set(SparseOnly.seen) == {tf.IndexedSlices}
    bad = tf.IndexedSlices(tf.constant([[INF, 0.0]]), tf.constant([0]), tf.constant([4, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the same line of Keras's about the None, once a trace
        apply(optimizer, [table, unused], [bad, None], how)
    np.testing.assert_array_equal(table[0], [1, 1])
    assert bool(optimizer.last_step_skipped)


ROW_OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "sgd, schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adagrad, schedule": lambda: keras.optimizers.Adagrad(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "adagrad, clipnorm": lambda: keras.optimizers.Adagrad(0.1, clipnorm=0.1),
    "adagrad, ema": lambda: keras.optimizers.Adagrad(0.1, use_ema=True, ema_overwrite_frequency=2),
    "adagrad, decay": lambda: keras.optimizers.Adagrad(0.1, weight_decay=0.1),
    "adam": lambda: keras.optimizers.Adam(0.1),
    "adam, clipvalue": lambda: keras.optimizers.Adam(0.1, clipvalue=0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.1),
}


def sparse_and_dense_steps(make, wrap, how, jit_compile="auto"):
    """Variables and slots after steps with sparse gradients, and after the same steps with dense ones, by stock Keras.

    The table's row 2 comes twice in a batch, row 0 never.
    """
    optimizers = wrap(make(), jit_compile), make()
    tables = [keras.Variable(np.ones((4, 2)), name="table") for _ in optimizers]
    vectors = [keras.Variable([1.0, 2.0], name="vector") for _ in optimizers]
    generator = np.random.default_rng(0)
    for optimizer, table, vector in zip(optimizers, tables, vectors, strict=True):
        optimizer.build([table, vector])
    for _ in range(3):
        values, rows = generator.standard_normal((3, 2)).astype("float32"), np.array([2, 3, 2])
        dense = np.zeros((4, 2), "float32")
        np.add.at(dense, rows, values)
        other = tf.constant(generator.standard_normal(2).astype("float32"))
        sparse = tf.IndexedSlices(tf.constant(values), tf.constant(rows), tf.constant([4, 2]))

        if isinstance(optimizers[0], keras_mp.LossScaleOptimizer):
            apply(optimizers[0], [tables[0], vectors[0]], [sparse, other], how)
        else:
            optimizers[0].apply([sparse, other], [tables[0], vectors[0]])
        optimizers[1].apply([tf.constant(dense), other], [tables[1], vectors[1]])
    inner = getattr(optimizers[0], "inner_optimizer", optimizers[0])
    return [tables[0], vectors[0], *inner.variables], [tables[1], vectors[1], *optimizers[1].variables]


def with_scale_of_one(optimizer, jit_compile, sum_repeated_ids=True):
    return keras_mp.LossScaleOptimizer(
        optimizer, initial_scale=1.0, jit_compile=jit_compile, sum_repeated_ids=sum_repeated_ids
    )


@pytest.mark.parametrize(
    ("how", "jit_compile"),
    [
        *(("eager", False), ("graph", True), ("graph", "auto"), ("xla", False)),
        *(
            pytest.param(*ways, marks=pytest.mark.slow)
            for ways in (("eager", True), ("eager", "auto"), ("graph", False))
        ),
    ],
)
@pytest.mark.parametrize("make", ROW_OPTIMIZERS.values(), ids=ROW_OPTIMIZERS)
def test_sparse_gradients_do_what_dense_ones_do(make, how, jit_compile):
    ours, expected = sparse_and_dense_steps(make, with_scale_of_one, how, jit_compile)
    for one, other in zip(ours, expected, strict=True):
        # The square of a gradient in Adam's kernel differs by 1.3e-5 from Keras's (see test_tf_kernels.py).
        np.testing.assert_allclose(one, other, rtol=2e-5 if jit_compile == "auto" else 1e-5, err_msg=one.path)


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", ["adagrad", "adam", "rmsprop"])
def test_stock_adds_up_squares_of_rows_that_come_twice(name):
    """Where the square of the sum is meant, as it is of dense gradients."""
    stock, expected = sparse_and_dense_steps(ROW_OPTIMIZERS[name], lambda optimizer, _: optimizer, "eager")
    for one, other in zip(stock, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=one.path)


REPEATED = {
    **ROW_OPTIMIZERS,
    "adam, beta_2=0": lambda: keras.optimizers.Adam(0.1, beta_2=0.0),
    "adam, global_clipnorm": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.01),
    "adam, accumulation": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
    "adagrad, global_clipnorm": lambda: keras.optimizers.Adagrad(0.1, global_clipnorm=0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.1),
    "adamw, amsgrad": lambda: keras.optimizers.AdamW(0.1, amsgrad=True),
    "adafactor": lambda: keras.optimizers.Adafactor(0.1),
}


def steps_with_repeated_ids(optimizer, how, dtype="float32", steps=3):
    """Variables and slots after steps with a sparse gradient, row 2 of which comes twice."""
    table = keras.Variable(np.ones((4, 2)), dtype=dtype, name="table")
    optimizer.build([table])
    optimizer.scale_loss(0.0)

    def step(values):
        optimizer.apply([tf.IndexedSlices(values, tf.constant([2, 3, 2]), tf.constant([4, 2]))], [table])

    step = step if how == "eager" else tf.function(step, jit_compile=how == "xla")
    generator = np.random.default_rng(0)
    for _ in range(steps):
        step(tf.constant(generator.standard_normal((3, 2)).astype("float32")))
    return [table, *getattr(optimizer, "inner_optimizer", optimizer).variables]


@functools.cache
def steps_with_repeated_ids_without_the_wrapper(make):
    return [variable.numpy() for variable in steps_with_repeated_ids(make(), "graph")]


@pytest.mark.parametrize(
    ("how", "jit_compile"),
    [("graph", "auto"), ("xla", "auto"), pytest.param("graph", True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("make", REPEATED.values(), ids=REPEATED)
def test_repeated_ids_train_alike_with_the_wrapper_and_without_it(make, how, jit_compile):
    expected = steps_with_repeated_ids_without_the_wrapper(make)
    ours = steps_with_repeated_ids(with_scale_of_one(make(), jit_compile, sum_repeated_ids=False), how)
    for one, other in zip(ours, expected, strict=False):  # Nadam has one that Keras does not list
        np.testing.assert_allclose(one, other, rtol=3e-5, atol=1e-6, err_msg=one.path)


def test_an_id_that_is_repeated_very_often_leaves_averages_of_squares_positive():
    table = keras.Variable(np.ones((3, 1), "float32"))
    optimizer = with_scale_of_one(keras.optimizers.Adam(0.1), "auto", sum_repeated_ids=False)
    optimizer.build([table])
    optimizer.scale_loss(0.0)
    rows = tf.zeros([1 << 21], tf.int32)
    for _ in range(2):
        optimizer.apply([tf.IndexedSlices(tf.fill([1 << 21, 1], 0.37), rows, tf.constant([3, 1]))], [table])
    assert np.isfinite(table.numpy()).all()
    assert float(table[0, 0]) < 1


def test_sum_repeated_ids_is_a_bool_that_the_config_keeps():
    with pytest.raises(ArgumentError, match="`sum_repeated_ids` must be True or False. Received: .*='yes'"):
        make_optimizer(sum_repeated_ids="yes")
    optimizer = make_optimizer(sum_repeated_ids=True)
    assert type(optimizer).from_config(optimizer.get_config()).sum_repeated_ids is True
    assert "sum_repeated_ids" not in make_optimizer().get_config()


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_an_update_of_rows_makes_no_tensor_of_the_size_of_the_table(name):
    table = keras.Variable(np.ones((7, 2)))
    optimizer = with_scale_of_one(ROW_OPTIMIZERS[name](), False)
    optimizer.build([table])
    optimizer.scale_loss(0.0)

    @tf.function
    def step():
        gradient = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]), tf.constant([7, 2]))
        optimizer.apply([gradient], [table])

    graph = step.get_concrete_function().graph.as_graph_def(add_shapes=True)
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    shapes = {
        (node.op, *(size.size for size in shape.dim))
        for node in nodes
        for shape in node.attr["_output_shapes"].list.shape
    }
    assert {shape[1:] for shape in shapes} >= {(2, 2)}
    assert not {shape for shape in shapes if shape[1:] == (7, 2)}
    step()
    assert int(optimizer.iterations) == 1
    np.testing.assert_array_equal(table[0], [1.0, 1.0])
    assert float(table[1, 0]) < 1


NARROW = {
    name: getattr(keras.optimizers, name)
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Nadam", "Adamax", "Adadelta", "Adagrad", "Ftrl", "Lion", "Lamb")
}
NARROW["Adafactor"], NARROW["Muon"] = keras.optimizers.Adafactor, keras.optimizers.Muon
NARROW["amsgrad"] = lambda rate: keras.optimizers.Adam(rate, amsgrad=True, weight_decay=0.01)
NARROW["centered"] = lambda rate: keras.optimizers.RMSprop(rate, centered=True, momentum=0.9)
NARROW["accumulation"] = lambda rate: keras.optimizers.Adam(rate, gradient_accumulation_steps=2)
NARROW["average"] = lambda rate: keras.optimizers.Adam(rate, use_ema=True, ema_overwrite_frequency=1, clipnorm=1.0)
GRADIENTS = [(0.0, 1.0), (1e-4, 0.0), (1.0, 1.0), (3e4, 1.0), (6e4, 6e4), (1e-7, 1.0)]


@pytest.mark.parametrize("how", ["graph", pytest.param("xla", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NARROW)
def test_finite_gradients_leave_weights_of_16_bits_finite(name, dtype, how):
    weights = [keras.Variable(np.full((3, 4), start), dtype=dtype) for _, start in GRADIENTS]
    optimizer = make_optimizer(NARROW[name](0.1), initial_scale=1.0)
    optimizer.build(weights)
    for _ in range(4):
        apply(optimizer, weights, [tf.cast(tf.fill((3, 4), each), dtype) for each, _ in GRADIENTS], how)
    for variable in [*weights, *optimizer.inner_optimizer.variables]:
        assert np.isfinite(np.asarray(variable.value, "float32")).all(), variable.path
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("name", NARROW)
def test_a_step_on_weights_of_16_bits_is_that_of_float32_rounded(name):
    generator, ends = np.random.default_rng(0), []
    start = np.float32(np.float16(generator.normal(size=(3, 4))))
    gradients = [np.float32(np.float16(generator.normal(size=(3, 4)) * 1e-3)) for _ in range(2)]
    for dtype in ("float32", "float16"):
        weight = keras.Variable(start, dtype=dtype)
        optimizer = make_optimizer(NARROW[name](0.1), initial_scale=1.0, jit_compile=False)
        optimizer.build([weight])
        for gradient in gradients:
            apply(optimizer, [weight], [tf.cast(gradient, dtype)], "graph")
        ends.append(np.asarray(weight.value, "float32"))
    # Two steps, each rounded once to 11 bits, which the second one reads.
    np.testing.assert_allclose(ends[1], ends[0], rtol=3 * 2.0**-11, atol=2e-4)


@pytest.mark.stock_defect
@pytest.mark.parametrize(("name", "gradient"), [("Adafactor", 0.0), ("Lamb", 1.0)])
def test_stock_finite_gradients_leave_weights_of_16_bits_finite(name, gradient):
    weight = keras.Variable(np.ones((300, 300)), dtype="float16")
    NARROW[name](1e-3).apply([tf.fill((300, 300), tf.cast(gradient, "float16"))], [weight])
    assert np.isfinite(np.asarray(weight.value, "float32")).all()


@pytest.mark.parametrize("how", ["graph", "xla"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_repeated_ids_in_a_table_of_16_bits_do_what_they_do_in_float32(name, how):
    ends = []
    for dtype in ("float32", "bfloat16"):
        optimizer = with_scale_of_one(NARROW[name](0.1), "auto", sum_repeated_ids=False)
        ends.append([np.asarray(v.value, "float32") for v in steps_with_repeated_ids(optimizer, how, dtype, steps=1)])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(other, one, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("constraint", ["unit_norm", "max_norm", "min_max_norm", "non_neg"])
def test_a_constraint_of_16_bits_is_computed_in_float32(constraint):
    weight = keras.Variable(np.full((600, 2), 20.0) * [1.0, 0.0], dtype="float16")
    weight.constraint = keras.constraints.get(constraint)
    optimizer = make_optimizer(keras.optimizers.SGD(0.1), initial_scale=1.0)
    optimizer.build([weight])
    apply(optimizer, [weight], [tf.zeros((600, 2), "float16")])
    expected = keras.constraints.get(constraint)(np.full((600, 2), 20.0, "float32") * np.float32([1.0, 0.0]))
    np.testing.assert_allclose(np.asarray(weight.value, "float32"), expected, rtol=2e-3, atol=1e-6)
    assert type(weight.constraint) is type(keras.constraints.get(constraint))


def test_no_gradient_at_all_is_keras_error():
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        apply(make_optimizer(), [keras.Variable([1.0])], [None])


@pytest.mark.filterwarnings("ignore:.* were skipped because:keras_mp.errors.KerasMPWarning")  # has tests of its own
def test_the_scale_neither_runs_away_nor_decays_to_zero():
    variable = keras.Variable([1.0])
    optimizer = make_optimizer(initial_scale=2.0**23, dynamic_growth_steps=1, max_consecutive_skips=1000)
    for _ in range(5):
        apply(optimizer, [variable], [[0.0]])
    assert float(optimizer.loss_scale) == 2.0**24
    for _ in range(200):
        apply(optimizer, [variable], [[NAN]])
    assert float(optimizer.loss_scale) == 2.0**-14
    apply(optimizer, [variable], [[0.0]])
    np.testing.assert_array_equal(variable, [1.0])


@pytest.mark.stock_defect
def test_stock_the_scale_neither_runs_away_nor_decays_to_zero():
    variable = keras.Variable([1.0])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=2.0**23)
    for _ in range(200):
        optimizer.apply([tf.constant([NAN])], [variable])
    optimizer.apply([tf.constant([0.0])], [variable])
    np.testing.assert_array_equal(variable, [1.0])


@pytest.mark.parametrize("built", [False, True])
def test_scale_loss_casts_to_float32_first(built):
    optimizer = make_optimizer()
    if built:
        optimizer.build([keras.Variable([1.0])])
    for dtype in ("float16", "bfloat16", "float32"):
        scaled = optimizer.scale_loss(tf.constant(3.0, dtype))
        assert scaled.dtype == tf.float32
        assert float(scaled) == 3.0 * 2**15
    assert optimizer.scale_loss(tf.constant(3.0, tf.float64)).dtype == tf.float64
    assert float(optimizer.scale_loss(3)) == 3.0 * 2**15


@pytest.mark.stock_defect
def test_stock_scale_loss_casts_to_float32_first():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    assert float(optimizer.scale_loss(tf.constant(3.0, tf.float16))) == 3.0 * 2**15


def test_the_state_is_readable_before_the_build_and_in_a_graph():
    optimizer = make_optimizer()

    def read():
        return optimizer.loss_scale, optimizer.skipped_steps, optimizer.consecutive_skips, optimizer.last_step_skipped

    expected = (2.0**15, 0, 0, False)
    assert tuple(value.numpy() for value in read()) == expected
    assert tuple(value.numpy() for value in tf.function(read)()) == expected
    optimizer.build([keras.Variable([1.0])])
    assert tuple(value.numpy() for value in tf.function(read, jit_compile=True)()) == expected
    assert [value.dtype for value in read()] == [tf.float32, tf.int64, tf.int64, tf.bool]


def test_minimize_takes_whole_steps_and_returns_the_loss():
    weights = keras.Variable([2.0, -2.0])
    optimizer = make_optimizer(keras.optimizers.SGD(0.25))

    @tf.function
    def step():
        return optimizer.minimize(lambda: tf.reduce_sum(weights.value**2), [weights])

    assert float(step()) == 8.0
    np.testing.assert_array_equal(weights, [1.0, -1.0])


def test_a_loop_that_forgets_scale_loss_is_told_once_with_the_right_lines():
    variable, optimizer = keras.Variable([1.0]), make_optimizer()
    with pytest.warns(KerasMPWarning, match=r"loss = optimizer.scale_loss\(compute_loss\(\)\)") as seen:
        optimizer.apply_gradients([(tf.constant([1.0]), variable)])
        optimizer.apply_gradients([(tf.constant([1.0]), variable)])
    assert len(seen) == 1
    assert seen[0].filename == __file__


def make_model(policy="mixed_float16", loss="mse", **arguments):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, dtype=policy), keras.layers.Dense(1, dtype=policy)]
    )
    model.compile(make_optimizer(keras.optimizers.Adam(0.01), **arguments), loss=loss)
    return model


def test_keras_does_not_wrap_it_again():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    optimizer = make_optimizer()
    model.compile(optimizer, loss="mse")
    assert model.optimizer is optimizer


@pytest.mark.filterwarnings("ignore:.* were skipped because:keras_mp.errors.KerasMPWarning")  # has tests of its own
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_raises_when_stuck_and_says_that_the_loss_is_at_fault(jit_compile):
    model = make_model(max_consecutive_skips=3)
    model.jit_compile = jit_compile
    x, y = np.full((40, 3), NAN, "float32"), np.zeros((40, 1), "float32")
    with pytest.raises(LossScaleStuckError, match="The loss itself was not finite in") as stuck:
        model.fit(x, y, batch_size=4, verbose=0)
    skipped = int(model.optimizer.skipped_steps)
    # Compiled by XLA, the step cannot raise; the end of `fit` does.
    assert skipped == (10 if jit_compile else 3)
    assert f"{skipped} training steps in a row were skipped" in str(stuck.value)
    assert "global_clipnorm" in str(stuck.value)


def test_stuck_with_a_finite_loss_names_the_gradients_and_the_floor():
    variable = keras.Variable([1.0])
    optimizer = make_optimizer(max_consecutive_skips=4, initial_scale=4.0, min_scale=1.0)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            # The gradient of the root at 0 is infinite, the value is not.
            loss = optimizer.scale_loss(tf.reduce_sum(tf.sqrt(variable.value * 0.0)))
        optimizer.apply(tape.gradient(loss, [variable.value]), [variable])

    for _ in range(3):
        step()
    with pytest.raises(
        LossScaleStuckError, match=r"4 training steps .* loss scale is 1 now; its floor is 1\. "
    ) as stuck:
        step()
    assert "The loss was finite and its gradients were not, and the scale cannot fall any further" in str(stuck.value)
    assert "dtype='float32'" in str(stuck.value)
    assert int(optimizer.consecutive_skips) == 4  # told once, the state can be read
    with pytest.raises(LossScaleStuckError, match="5 training steps"):
        step()


def test_stuck_above_the_floor_says_to_let_the_scale_fall():
    optimizer, variable = make_optimizer(max_consecutive_skips=2), keras.Variable([1.0])
    apply(optimizer, [variable], [[INF]])
    with pytest.raises(LossScaleStuckError) as stuck:
        apply(optimizer, [variable], [[INF]])
    assert "and the scale is still above its floor. See that the data are finite" in str(stuck.value)
    assert "turn NaN into 0, but not its gradient. Start from a smaller `initial_scale`" in str(stuck.value)


def test_a_graph_that_fails_otherwise_keeps_its_error():
    def fail():
        raise RuntimeError("something else")

    with pytest.raises(tf.errors.UnknownError, match="something else") as raised:
        tf.function(lambda: tf.py_function(fail, [], tf.float32))()
    assert type(raised.value) is tf.errors.UnknownError


ARGUMENT_ERRORS = [
    ({"clipnorm": 1.0}, r"does not take `clipnorm`. Received: clipnorm=1.0. Set it on the `inner_optimizer`"),
    ({"learning_rate": 0.1}, "does not take `learning_rate`"),
    ({"gradient_accumulation_steps": 2}, r"keras.optimizers.Adam\(gradient_accumulation_steps=2\)"),
    ({"growth_factor": 0.9}, "`growth_factor` must be"),
    ({"backoff_factor": 1.5}, "`backoff_factor` must be"),
    ({"initial_scale": -1.0}, "`initial_scale` must be a positive number"),
    ({"initial_scale": INF}, "`initial_scale` must be a positive number between"),
    ({"max_consecutive_skips": 0}, "`max_consecutive_skips` must be an integer of at least 1. Received: .*=0"),
    ({"max_consecutive_skips": None}, "Received: max_consecutive_skips=None"),
    ({"dynamic_growth_steps": 0}, "`dynamic_growth_steps` must be an integer"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENT_ERRORS)
def test_bad_arguments_are_refused_in_words(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        make_optimizer(**arguments)


def test_a_wrapped_optimizer_is_not_wrapped_again():
    for wrapper in (keras_mp.LossScaleOptimizer, keras.optimizers.LossScaleOptimizer):
        with pytest.raises(ArgumentError, match=r"already scales its loss. Received: LossScaleOptimizer around Adam"):
            keras_mp.LossScaleOptimizer(wrapper(keras.optimizers.Adam()))


def test_what_is_no_optimizer_is_refused_and_a_name_is_taken():
    with pytest.raises(ArgumentError, match="or the name of one.*Received: 0.1 .of type float"):
        keras_mp.LossScaleOptimizer(0.1)
    assert isinstance(keras_mp.LossScaleOptimizer("adam").inner_optimizer, keras.optimizers.Adam)


def test_config_round_trip_keeps_every_argument():
    arguments = {
        "initial_scale": 8.0,
        "dynamic_growth_steps": 3,
        "growth_factor": 4.0,
        "backoff_factor": 0.25,
        "hysteresis": 2,
        "min_scale": 0.5,
        "max_scale": 64.0,
        "max_consecutive_skips": 7,
        "dynamic": False,
        "name": "scaled",
    }
    optimizer = make_optimizer(keras.optimizers.Adam(0.1, clipnorm=2.0), **arguments)
    config = optimizer.get_config()
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is keras_mp.LossScaleOptimizer
    assert again.get_config() == config
    assert {name: config[name] for name in arguments} == arguments
    assert again.inner_optimizer.clipnorm == 2.0


def batches():
    random = np.random.default_rng(1)
    return random.normal(size=(8, 4, 3)).astype("float32"), random.normal(size=(8, 4, 1)).astype("float32")


def train(model, steps):
    xs, ys = batches()
    for step in steps:
        x = xs[step]
        if step == 3:
            x = np.full_like(x, NAN)
        model.train_on_batch(x, ys[step])


def all_state(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", "checkpoint"])
def test_the_step_after_a_restore_is_the_step_that_would_have_come(suffix, tmp_path):
    keras.utils.set_random_seed(3)
    arguments = {"dynamic_growth_steps": 3, "hysteresis": 2}
    model = make_model(**arguments)
    train(model, range(5))
    path = str(tmp_path / f"saved{suffix}")
    if suffix == ".keras":
        model.save(path)
        restored = keras.models.load_model(path)
        assert type(restored.optimizer) is keras_mp.LossScaleOptimizer
    else:
        restored = make_model(**arguments)
        restored.optimizer.build(restored.trainable_variables)
        if suffix == "checkpoint":
            tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(path)
            tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).read(path).assert_consumed()
        else:
            # Keras saves the optimizer of a compiled model with its weights.
            model.save_weights(path)
            restored.load_weights(path)
    assert_same(all_state(model), all_state(restored))
    train(model, range(5, 8))
    train(restored, range(5, 8))
    assert_same(all_state(model), all_state(restored))


# Models that compute in float16 and are trained without our optimizer


def small(dtype):
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, dtype=dtype), keras.layers.Dense(1)])


class Gan(keras.Model):
    """With an optimizer for each of its halves, and a `compile` of its own, as Keras's examples have it."""

    def __init__(self, dtype):
        super().__init__()
        self.generator, self.discriminator = small(dtype), small(dtype)

    def compile(self, generator_optimizer, discriminator_optimizer):
        super().compile(loss="mse")
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer

    def call(self, x):
        return self.discriminator(x)

    def train_step(self, data):
        return {"loss": tf.reduce_mean(self(data[0]))}


X, Y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")


@pytest.mark.parametrize("dtype", ["mixed_float16", "float16"])
def test_compiling_a_float16_model_with_a_bare_optimizer_says_what_to_write(dtype):
    model = small(dtype)
    with pytest.warns(KerasMPWarning) as told:
        model.compile(keras.optimizers.Adam(1e-3), "mse")
    (message,) = [str(each.message) for each in told]
    assert "computes in float16, and its optimizer scales no loss" in message
    assert "model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.Adam(...)), ...)" in message
    assert told[0].filename == __file__


def test_compiling_with_kerass_wrapper_says_what_is_wrong_with_it():
    with pytest.warns(KerasMPWarning, match=r"lets its scale run away.*LossScaleOptimizer\(keras.optimizers.SGD\("):
        small("mixed_float16").compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "mse")


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float32"])
def test_other_models_are_compiled_in_silence(dtype):
    small(dtype).compile("adam", "mse")
    small("mixed_float16").compile(make_optimizer(), "mse")
    small("mixed_float16").compile(loss="mse", optimizer=None)


@pytest.mark.parametrize(("ours", "warned"), [((True, True), False), ((True, False), True), ((False, False), True)])
def test_a_gan_is_looked_at_before_it_trains(ours, warned):
    model = Gan("mixed_float16")
    generator, discriminator = (make_optimizer() if each else keras.optimizers.Adam() for each in ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.compile(generator, discriminator)  # Keras's own `compile` has only the optimizer that nobody gave
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.fit(X, Y, verbose=0)
        model.fit(X, Y, verbose=0)
    found = [str(each.message) for each in told if issubclass(each.category, KerasMPWarning)]
    assert len(found) == int(warned)
    assert not warned or "keras.optimizers.Adam(...)" in found[0]


@pytest.mark.parametrize("large", [1e30, 1e38, 3e38])
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e25])
def test_a_norm_near_the_end_of_float32_is_limited_not_lost(large, limit):
    """A limit over such a norm is a subnormal number, which a CPU takes for zero."""
    weight = keras.Variable(np.zeros(2, "float32"))
    optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(1.0, global_clipnorm=limit), initial_scale=1.0)
    optimizer.build([weight])
    optimizer.scale_loss(tf.constant(1.0))
    optimizer.apply([tf.constant([large, 0.0])], [weight])
    np.testing.assert_allclose(weight, [-limit, 0.0], rtol=1e-5)
    assert int(optimizer.skipped_steps) == 0


# Gradients unscaled before they are applied


def ways_to_limit():
    """From an optimizer and scaled gradients to what a user applies, and the same of gradients by NumPy."""

    def by_norm(gradients):
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients))
        return [g / max(norm, 1.0) for g in gradients]

    nested = {}

    def in_function(optimizer, gradients):
        if optimizer not in nested:
            nested[optimizer] = tf.function(lambda *g: tf.clip_by_global_norm(optimizer.unscale(list(g)), 1.0)[0])
        return nested[optimizer](*gradients)

    def in_condition(optimizer, gradients):
        unscaled = optimizer.unscale(gradients)
        norm = tf.linalg.global_norm(unscaled)
        return tf.cond(norm > 1.0, lambda: [g / norm for g in unscaled], lambda: unscaled)

    def finite_only(optimizer, gradients):
        kept = [
            tf.where(tf.math.is_finite(g), u, 0.0) for g, u in zip(gradients, optimizer.unscale(gradients), strict=True)
        ]
        return tf.clip_by_global_norm(kept, 1.0)[0]

    def logged(optimizer, gradients):
        tf.linalg.global_norm(optimizer.unscale(gradients))
        return gradients

    def part(optimizer, gradients):
        return [*optimizer.unscale(gradients[:1]), gradients[1]]

    def replaced(optimizer, gradients):
        return [optimizer.unscale(gradients)[0], tf.zeros_like(gradients[1])]

    same = lambda gradients: gradients  # noqa: E731
    return {
        "norm of all": (lambda o, g: tf.clip_by_global_norm(o.unscale(g), 1.0)[0], by_norm),
        "value": (
            lambda o, g: [tf.clip_by_value(u, -1, 1) for u in o.unscale(g)],
            lambda g: [np.clip(x, -1, 1) for x in g],
        ),
        "as it is": (lambda o, g: o.unscale(g), same),
        "noise": (lambda o, g: [u + 0.5 for u in o.unscale(tuple(g))], lambda g: [x + 0.5 for x in g]),
        "by keras": (
            lambda o, g: [keras.ops.clip(u, -1, 1) for u in o.unscale(iter(g))],
            lambda g: [np.clip(x, -1, 1) for x in g],
        ),
        "in a function": (in_function, by_norm),
        "in a condition": (in_condition, by_norm),
        "where finite": (finite_only, by_norm),
        "log only": (logged, same),
        "no unscale": (lambda o, g: g, same),
        "a part": (part, same),
        "one replaced": (replaced, lambda g: [g[0], np.zeros_like(g[1])]),
    }


def limited_step(limit, how, optimizer=None, scale=2.0**10, times=2):
    weights = [keras.Variable([3.0, -4.0]), keras.Variable([0.25])]
    optimizer = optimizer or make_optimizer(keras.optimizers.SGD(1.0), initial_scale=scale)
    optimizer.build(weights)

    def step():
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(sum(tf.reduce_sum(w.value**2) / 2 for w in weights))
        gradients = tape.gradient(loss, [w.value for w in weights])
        optimizer.apply_gradients(zip(limit(optimizer, gradients), weights, strict=True))

    step = step if how == "eager" else tf.function(step, jit_compile=how == "xla")
    for _ in range(times):
        step()
    return [w.numpy() for w in weights]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ways_to_limit())
def test_unscaled_gradients_are_not_unscaled_again(name, how):
    if how == "eager" and name in ("a part", "in a function"):
        pytest.skip("eager gradients do not tell what they were made of")
    limit, by_numpy = ways_to_limit()[name]
    expected = [np.float32([3.0, -4.0]), np.float32([0.25])]
    for _ in range(2):
        expected = [w - g for w, g in zip(expected, by_numpy(expected), strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", KerasMPWarning)
        for one, other in zip(limited_step(limit, how), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_unscale_keeps_structure_and_kind(how):
    optimizer = make_optimizer(initial_scale=4.0)
    sparse = tf.IndexedSlices(tf.constant([[4.0, 8.0]], tf.float16), tf.constant([1]), tf.constant([3, 2]))

    def unscale():
        found = optimizer.unscale([tf.constant([8.0, INF], tf.float16), sparse, tf.constant(2.0, tf.float64)])
        assert isinstance(found[1], tf.IndexedSlices)
        return found[0], found[1].values, found[1].indices, found[2]

    assert optimizer.unscale((None, {"a": None})) == (None, {"a": None})
    dense, values, rows, double = (unscale if how == "eager" else tf.function(unscale, jit_compile=how == "xla"))()
    np.testing.assert_array_equal(dense, np.float32([2.0, NAN]))
    np.testing.assert_array_equal(values, np.float32([[1.0, 2.0]]))
    assert (rows.numpy().tolist(), dense.dtype, double.dtype, float(double)) == ([1], tf.float32, tf.float64, 0.5)


@pytest.mark.parametrize("how", HOWS)
def test_an_infinity_does_not_hide_behind_a_clipped_value(how):
    weight = keras.Variable([1.0])
    optimizer = make_optimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer.build([weight])

    def step(gradient):
        optimizer.apply([tf.clip_by_value(g, -1.0, 1.0) for g in optimizer.unscale([gradient])], [weight])

    (step if how == "eager" else tf.function(step, jit_compile=how == "xla"))(tf.constant([INF]))
    assert (float(weight[0]), int(optimizer.skipped_steps)) == (1.0, 1)


def test_an_unscale_that_is_only_logged_leaves_the_next_eager_step_alone():
    weight, optimizer = keras.Variable([1.0]), make_optimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer.build([weight])
    optimizer.unscale([tf.constant([1.0])])  # of other data, and never applied
    optimizer.scale_loss(1.0)
    optimizer.apply([tf.constant([2.0])], [weight])
    assert float(weight[0]) == 0.5


def test_two_optimizers_tell_their_gradients_apart():
    one, other = (make_optimizer(keras.optimizers.SGD(1.0), initial_scale=s) for s in (4.0, 64.0))
    weights = [keras.Variable([8.0]), keras.Variable([8.0])]
    for optimizer, weight in zip((one, other), weights, strict=True):
        optimizer.build([weight])

    @tf.function
    def step():
        with tf.GradientTape(persistent=True) as tape:
            losses = [o.scale_loss(w.value**2 / 2) for o, w in zip((one, other), weights, strict=True)]
        gradients = [tape.gradient(loss, w.value) for loss, w in zip(losses, weights, strict=True)]
        one.apply([tf.clip_by_norm(one.unscale(gradients[:1])[0], 1.0)], weights[:1])
        other.apply(gradients[1:], weights[1:])

    step()
    assert [float(w[0]) for w in weights] == [7.0, 0.0]


def test_gradients_of_both_kinds_are_refused():
    def mixed(optimizer, gradients):
        norm = tf.linalg.global_norm(gradients)
        return [g / norm for g in optimizer.unscale(gradients)]

    with pytest.raises(ArgumentError, match="made of scaled gradients as well as of such as `unscale` returned"):
        limited_step(mixed, "graph")


def test_gradients_unscaled_in_another_function_are_told_of():
    weight, optimizer = keras.Variable([1.0]), make_optimizer(keras.optimizers.SGD(1.0))
    optimizer.build([weight])
    unscaled = optimizer.unscale([tf.constant([2.0])])
    with pytest.warns(KerasMPWarning, match="call both in the same tf.function"):
        tf.function(lambda gradient: optimizer.apply([gradient], [weight]))(unscaled[0])
    inside = tf.function(lambda gradient: optimizer.unscale([gradient])[0])(tf.constant([2.0]))
    with pytest.warns(KerasMPWarning, match="call both in the same tf.function"):
        optimizer.apply([inside], [weight])


CLIPPED = {
    "clip_by_global_norm": lambda o, g: tf.clip_by_global_norm(g, 1.0)[0],
    "clip_by_norm": lambda o, g: [tf.clip_by_norm(each, 1.0) for each in g],
    "clip_by_value": lambda o, g: [keras.ops.clip(each, -1.0, 1.0) * 2.0 for each in g],
}


@pytest.mark.parametrize("name", CLIPPED)
def test_gradients_clipped_while_they_are_scaled_are_warned_of(name):
    with pytest.warns(KerasMPWarning, match=rf"limited by tf.{name} while they were still multiplied") as told:
        limited_step(CLIPPED[name], "graph")
    assert len(told) == 1
    assert "gradients = optimizer.unscale(tape.gradient(loss, variables))" in str(told[0].message)


SCALED_LIMITS = {
    "norm of all": lambda o, g: tf.clip_by_global_norm(g, 1.0 * o.loss_scale)[0],
    "norm": lambda o, g: [tf.clip_by_norm(each, o.loss_scale) for each in g],
    "value": lambda o, g: [tf.clip_by_value(each, -o.loss_scale, o.loss_scale) for each in g],
}


@pytest.mark.parametrize("name", SCALED_LIMITS)
def test_a_limit_that_is_scaled_itself_is_not_warned_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", KerasMPWarning)
        limited_step(SCALED_LIMITS[name], "graph")


def test_a_model_that_clips_inside_is_not_warned_of():
    weight, optimizer = keras.Variable([3.0]), make_optimizer(keras.optimizers.SGD(1.0))
    optimizer.build([weight])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_sum(tf.clip_by_norm(tf.clip_by_value(weight.value, -5, 5), 1.0)))
        optimizer.apply(tape.gradient(loss, [weight.value]), [weight])

    with warnings.catch_warnings():
        warnings.simplefilter("error", KerasMPWarning)
        step()


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_of_several_losses_is_blamed(place, how):
    weight = keras.Variable(1.0)
    optimizer = make_optimizer(keras.optimizers.SGD(0.1), max_consecutive_skips=3)
    optimizer.build([weight])

    def step():
        with tf.GradientTape() as tape:
            losses = [weight.value**2 * (NAN if each == place else 1.0) for each in range(3)]
            loss = sum(optimizer.scale_loss(each) for each in losses)
        gradient = tape.gradient(loss, weight.value)
        tf.cond(tf.constant(True), lambda: optimizer.apply([gradient], [weight]), lambda: None)

    step = step if how == "eager" else tf.function(step)
    for _ in range(2):
        step()
    with pytest.raises(LossScaleStuckError, match="The loss itself was not finite in 3 of them"):
        step()


# Trainings of which most steps are skipped


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("make", [keras.Model, keras_mp.Model])
def test_fit_tells_after_its_first_epoch_that_most_steps_were_skipped(make, jit_compile):
    inputs = keras.Input((3,))
    model = make(inputs, keras.layers.Dense(1)(inputs))
    optimizer = make_optimizer(keras.optimizers.SGD(0.0), initial_scale=2.0**20)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    x = np.ones((40, 3), "float32")
    x[8:] = NAN
    with pytest.warns(KerasMPWarning) as told:
        model.fit(x, np.ones((40, 1)), batch_size=4, epochs=3, shuffle=False, verbose=0)
    (found,) = [each for each in told if each.category is KerasMPWarning]
    message = str(found.message)
    assert "8 of 10 training steps of the first epoch were skipped" in message
    assert "the model has learnt from 2 only. The loss scale is 4096 now" in message
    assert "np.isfinite(x).all()" in message
    assert found.filename == __file__


def test_fit_says_where_to_begin_when_the_scale_has_settled():
    model = make_model(initial_scale=2.0**10)
    x = np.ones((40, 3), "float32")
    x[:24] = NAN
    with pytest.warns(
        KerasMPWarning, match=r"6 of 10 .*Type LossScaleOptimizer\(..., initial_scale=16\) to begin there"
    ):
        model.fit(x, np.ones((40, 1)), batch_size=4, shuffle=False, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KerasMPWarning)
        model.fit(x[20:], np.ones((20, 1)), batch_size=4, shuffle=False, verbose=0)


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_loop_of_ones_own_is_told_after_a_hundred_steps(how):
    weight, optimizer = keras.Variable([1.0]), make_optimizer()
    optimizer.build([weight])
    optimizer.scale_loss(1.0)
    step = lambda gradient: optimizer.apply([gradient], [weight])  # noqa: E731
    step = step if how == "eager" else tf.function(step)
    with pytest.warns(KerasMPWarning, match="66 of 100 training steps so far were skipped"):
        for number in range(120):
            step(tf.constant([NAN if number % 3 else 1.0]))
