"""The optimizer's promises on several replicas of one process: agreement on what is finite, and equality."""

import functools
import itertools
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.errors import ArgumentError, LossScaleStuckError

INF, NAN = math.inf, math.nan
SLOW = pytest.mark.slow
BATCH = 8


def adamw_without_decay_of_biases(**arguments):
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.3, **arguments)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def multi_optimizer():
    kernels = keras.optimizers.Adam(0.1, global_clipnorm=0.2)
    others = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, momentum=0.9), {".*kernel": kernels})
    return keras.optimizers.MultiOptimizer(others)


# Each makes the inner optimizer; together they hold every optimizer and every option of the promise.
RECIPES = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum, clipvalue": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, clipvalue=0.05),
    "adam, clipnorm": lambda: keras.optimizers.Adam(0.1, clipnorm=0.1),
    "adam, global_clipnorm": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.1),
    "adamw with exclusions, ema overwriting": lambda: adamw_without_decay_of_biases(
        use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "adamw with exclusions, global_clipnorm, accumulation": lambda: adamw_without_decay_of_biases(
        global_clipnorm=0.1, gradient_accumulation_steps=2
    ),
    "rmsprop, clipnorm, accumulation, ema overwriting": lambda: keras.optimizers.RMSprop(
        0.1, clipnorm=0.1, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=2
    ),
    "nadam, schedule": lambda: keras.optimizers.Nadam(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "lion": lambda: keras.optimizers.Lion(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.1),
    "muon": lambda: keras.optimizers.Muon(0.1),
    "lamb": lambda: keras.optimizers.Lamb(0.1),
    "multi": multi_optimizer,
}


def strategy_over(replicas, mirrored):
    return tf.distribute.get_strategy() if replicas == 1 else mirrored(replicas)


def spread(strategy, values):
    """A value for each replica; the only one where there are no replicas."""
    if strategy.num_replicas_in_sync == 1:
        return values[0]
    return strategy.experimental_distribute_values_from_function(
        lambda context: values[context.replica_id_in_sync_group]
    )


def copies(variable):
    value = variable.value
    return [copy.numpy() for copy in getattr(value, "values", [value])]


def assert_copies_agree(variables, replicas):
    for variable in variables:
        first, *others = copies(variable)
        assert len(others) == replicas - 1, variable.path
        for other in others:
            np.testing.assert_array_equal(first, other, err_msg=variable.path)


def weights_and_slots(optimizer, variables):
    """Everything that a skipped step must leave alone, every copy of it."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return [copy for variable in [*variables, *inner.variables] for copy in copies(variable)]


def assert_same(before, after):
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def counters(optimizer):
    return (
        float(optimizer.loss_scale),
        int(optimizer.skipped_steps),
        int(optimizer.consecutive_skips),
        bool(optimizer.last_step_skipped),
    )


class Loop:
    """A custom loop over shards of the global batch, as a user writes it."""

    def __init__(self, strategy, inner, wrapper=keras_mp.LossScaleOptimizer, **arguments):
        random = np.random.default_rng(1)
        self.strategy = strategy
        with strategy.scope():
            self.kernel = keras.Variable(random.normal(size=(4, 3)).astype("float32"), name="kernel")
            self.bias = keras.Variable(random.normal(size=3).astype("float32"), name="bias")
            self.variables = [self.kernel, self.bias]
            self.optimizer = wrapper(inner(), initial_scale=1024.0, dynamic_growth_steps=3, **arguments)
            self.optimizer.build(self.variables)
        self.run = tf.function(lambda x: strategy.run(self.on_replica, (x,)))

    def on_replica(self, x):
        with tf.GradientTape() as tape:
            y = tf.tanh(x @ self.kernel.value + self.bias.value)
            loss = self.optimizer.scale_loss(tf.reduce_sum((y - x[:, :3]) ** 2) / BATCH)
        gradients = tape.gradient(loss, [v.value for v in self.variables])
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))

    def step(self, x):
        self.run(spread(self.strategy, tf.split(tf.constant(x), self.strategy.num_replicas_in_sync)))


def batches_with_bad_rows():
    batches = np.random.default_rng(2).normal(size=(8, BATCH, 4)).astype("float32")
    batches[1, -1] = NAN  # the last replica's
    batches[3, 0] = INF  # the first one's
    batches[6, 0, 0] = batches[6, -1, -1] = -INF  # of both
    return batches


def train(loop):
    """Trains on batches of which some are bad; returns all state there is."""
    for x in batches_with_bad_rows():
        before = weights_and_slots(loop.optimizer, loop.variables)
        loop.step(x)
        if not np.isfinite(x).all():
            assert_same(before, weights_and_slots(loop.optimizer, loop.variables))
    everything = [*loop.variables, *loop.optimizer.variables]
    assert_copies_agree(everything, loop.strategy.num_replicas_in_sync)
    assert int(loop.optimizer.skipped_steps) == 3
    return [variable.numpy() for variable in everything]


@functools.cache
def trained_on_one_device(recipe):
    return train(Loop(tf.distribute.get_strategy(), RECIPES[recipe], jit_compile=False))


EQUALITY = [
    *((recipe, 2, False) for recipe in RECIPES),
    *((recipe, 4, False) for recipe in ("adamw with exclusions, global_clipnorm, accumulation",)),
    *((recipe, 2, True) for recipe in ("adam, global_clipnorm", "rmsprop, clipnorm, accumulation, ema overwriting")),
]
REST_OF_EQUALITY = [
    case for r in RECIPES for n in (2, 4) for jit in (False, True) if (case := (r, n, jit)) not in EQUALITY
]


@pytest.mark.parametrize(
    ("recipe", "replicas", "jit_compile"),
    [*EQUALITY, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST_OF_EQUALITY)],
)
def test_replicas_on_shards_equal_one_device_on_the_whole_batch(recipe, replicas, jit_compile, mirrored):
    """Promises 1, 2, 4 and 6: weights, slots and scale, with bad rows on any one replica."""
    expected = trained_on_one_device(recipe)
    actual = train(Loop(mirrored(replicas), RECIPES[recipe], jit_compile=jit_compile))
    for mine, theirs in zip(actual, expected, strict=True):
        # Shards are added up in another order than rows of one batch, and optimizers divide by square roots.
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.stock_defect
@pytest.mark.parametrize("recipe", ["adam, clipnorm", "adam, global_clipnorm"])
def test_stock_replicas_on_shards_equal_one_device_with_clipping(recipe, mirrored):
    """It clips the gradient of each replica's shard."""
    results = []
    for strategy in (tf.distribute.get_strategy(), mirrored(2)):
        loop = Loop(strategy, RECIPES[recipe], wrapper=keras.optimizers.LossScaleOptimizer)
        for x in np.random.default_rng(2).normal(size=(3, BATCH, 4)).astype("float32"):
            loop.step(x)
        results.append([v.numpy() for v in loop.variables])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(two, one, rtol=2e-5, atol=1e-6)


@pytest.mark.stock_defect
@pytest.mark.parametrize(
    "recipe", ["rmsprop, clipnorm, accumulation, ema overwriting", "adamw with exclusions, ema overwriting"]
)
def test_stock_accumulation_and_ema_overwriting_work_on_replicas(recipe, mirrored):
    loop, error = Loop(mirrored(2), RECIPES[recipe], wrapper=keras.optimizers.LossScaleOptimizer), None
    try:
        loop.step(np.ones((BATCH, 4), "float32"))
    except RuntimeError as raised:
        error = str(raised).splitlines()[0]
    assert error is None


class Applied:
    """Gradients given by hand for each replica, applied to variables of every kind."""

    def __init__(self, strategy, inner, variables, how="graph", wrapper=keras_mp.LossScaleOptimizer, **arguments):
        self.strategy = strategy
        with strategy.scope():
            self.variables = [make() for make in variables]
            self.optimizer = wrapper(inner(), **arguments)
            self.optimizer.build(self.variables)
        self.optimizer.scale_loss(0.0)  # the tests scale by hand
        self.run = lambda gradients: strategy.run(self.on_replica, (gradients,))
        if how == "graph":
            self.run = tf.function(self.run)

    def on_replica(self, gradients):
        # Graphs take no None, so an empty tuple stands for it.
        self.optimizer.apply([None if isinstance(g, tuple) else g for g in gradients], self.variables)

    def step(self, *gradients):
        """Takes a list of gradients for each replica."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Keras's about a None, once a trace
            self.run([spread(self.strategy, of_replicas) for of_replicas in zip(*gradients, strict=True)])

    def state(self):
        return weights_and_slots(self.optimizer, self.variables)


def story_of_agreement(applied, bad, culprits):
    """A finite step, two with a bad value on some replicas, a finite one; returns the counters after each."""
    replicas = applied.strategy.num_replicas_in_sync
    good = [[tf.constant([1.0, 2.0]), tf.constant([3.0])]] * replicas
    bad = [[tf.constant([1.0, bad]), tf.constant([3.0])] if r in culprits else good[r] for r in range(replicas)]
    seen = []
    for gradients in (good, bad, bad, good):
        before = applied.state()
        applied.step(*gradients)
        after = applied.state()
        if gradients is bad:
            assert_same(before, after)
        else:
            assert any((one != other).any() for one, other in zip(before, after, strict=True))
        assert_copies_agree([*applied.variables, *applied.optimizer.variables], replicas)
        seen.append(counters(applied.optimizer) if hasattr(applied.optimizer, "skipped_steps") else None)
    return seen


def ones(shape):
    return lambda: keras.Variable(np.ones(shape, "float32"))


# Every kind of state that a skipped step could touch: slots, averages, accumulators, iterations.
STATEFUL = functools.partial(
    keras.optimizers.Adam,
    0.1,
    clipnorm=1.0,
    use_ema=True,
    ema_overwrite_frequency=1,
    gradient_accumulation_steps=2,
)


@pytest.mark.parametrize(
    ("replicas", "jit_compile", "how"),
    [
        pytest.param(
            *ways, marks=() if ways in ((2, True, "graph"), (2, False, "eager"), (4, False, "graph")) else SLOW
        )
        for ways in itertools.product([2, 4], [False, True], ["graph", "eager"])
    ],
)
def test_a_bad_value_on_any_replica_skips_the_step_on_all(replicas, jit_compile, how, mirrored):
    """Promises 1 and 2."""
    cases = [(NAN, [0]), (NAN, [1]), (INF, [0]), (INF, [replicas - 1]), (-INF, [1]), (INF, range(replicas))]
    arguments = {"initial_scale": 8.0, "jit_compile": jit_compile}
    applied = Applied(mirrored(replicas), STATEFUL, [ones(2), ones(1)], how, **arguments)
    fresh = [variable.numpy() for variable in applied.optimizer.variables]
    for bad, culprits in cases:
        seen = story_of_agreement(applied, bad, culprits)
        assert seen == [(8.0, 0, 0, False), (4.0, 1, 1, True), (2.0, 2, 2, True), (2.0, 2, 0, False)]
        for variable, value in zip(applied.optimizer.variables, fresh, strict=True):
            variable.assign(value)


def test_infinities_of_opposite_sign_do_not_cancel(mirrored):
    applied = Applied(mirrored(2), STATEFUL, [ones(1)])
    before = applied.state()
    applied.step([tf.constant([INF])], [tf.constant([-INF])])
    assert_same(before, applied.state())
    assert counters(applied.optimizer)[1:] == (1, 1, True)


@pytest.mark.stock_defect
def test_stock_a_bad_value_on_the_second_replica_alone_skips_the_step(mirrored):
    """It believes the first replica."""
    inner = functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9)
    applied = Applied(mirrored(2), inner, [ones(2), ones(1)], wrapper=keras.optimizers.LossScaleOptimizer)
    story_of_agreement(applied, INF, [1])


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("float32", 3e38)])
def test_finite_gradients_whose_sum_overflows_are_finite(dtype, largest, jit_compile, mirrored):
    """Promise 7: the sum of the scaled ones overflows, that of the gradients does not."""
    applied = Applied(
        mirrored(2),
        lambda: keras.optimizers.SGD(1.0, global_clipnorm=1.0),
        [ones(1)],
        initial_scale=1024.0,
        jit_compile=jit_compile,
    )
    applied.step(*[[tf.constant([largest], dtype)]] * 2)
    assert counters(applied.optimizer) == (1024.0, 0, 0, False)
    np.testing.assert_allclose(applied.variables[0], [0.0], atol=1e-6)  # one, minus a gradient clipped to one


@pytest.mark.parametrize("jit_compile", [False, True])
def test_float16_gradients_are_summed_in_float32(jit_compile, mirrored):
    """Their sum over two replicas equals what one device has, where float16 would round."""
    applied = Applied(
        mirrored(2), lambda: keras.optimizers.SGD(1.0), [ones(2)], initial_scale=2.0, jit_compile=jit_compile
    )
    applied.step([tf.constant([2048.0, 2.0**-24], "float16")], [tf.constant([1.0, 2.0**-24], "float16")])
    np.testing.assert_array_equal(applied.variables[0], np.float32([1 - 2049 / 2, 1 - 2.0**-24]))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("inner", [keras.optimizers.SGD, functools.partial(keras.optimizers.Adam, clipnorm=1.0)])
def test_variables_of_every_kind_on_replicas_equal_those_on_one_device(inner, jit_compile, mirrored):
    """An embedding with sparse gradients, a frozen variable, one without a gradient, one that its gradient replaces."""

    def replaced():
        variable = keras.Variable(np.zeros(2, "float32"), name="amax_history")
        variable.overwrite_with_gradient = True
        return variable

    def rows(indices, values):
        return tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([5, 2]))

    kinds = [ones((5, 2)), ones(3), ones(2), replaced]
    dense = tf.constant([4.0, -8.0, 1.0])
    one = Applied(tf.distribute.get_strategy(), lambda: inner(0.5), kinds, initial_scale=4.0, jit_compile=jit_compile)
    two = Applied(mirrored(2), lambda: inner(0.5), kinds, initial_scale=4.0, jit_compile=jit_compile)
    with two.strategy.scope():
        frozen = keras.Variable([7.0], trainable=False)
    whole = rows([1, 3, 3, 4], [[4.0, 8.0], [1.0, 2.0], [1.0, 2.0], [4.0, 0.0]])
    first, second = rows([1, 3], [[4.0, 8.0], [1.0, 2.0]]), rows([3, 4], [[1.0, 2.0], [4.0, 0.0]])
    for low, high in ((1.0, 5.0), (7.0, 3.0)):
        larger = tf.constant([high, max(low, high)])
        one.step([whole, dense, (), tf.maximum(larger, low)])
        two.step(
            [first, dense / 4, (), tf.constant([low, low])],
            [second, dense * 3 / 4, (), larger],
        )
        np.testing.assert_array_equal(two.variables[3], [max(low, high)] * 2)
    bad = rows([0], [[NAN, 0.0]]), dense, (), tf.constant([9.0, 9.0])
    before = two.state()
    two.step([first, dense, (), larger], list(bad))
    assert_same(before, two.state())
    two.step([first, dense, (), tf.constant([INF, 0.0])], [second, dense, (), larger])
    assert_same(before, two.state())
    for mine, theirs in zip(
        [*two.variables, *two.optimizer.inner_optimizer.variables],
        [*one.variables, *one.optimizer.inner_optimizer.variables],
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert_copies_agree(two.variables, 2)
    np.testing.assert_array_equal(two.variables[0][0], [1.0, 1.0])  # a row without a gradient, under SGD and Adam
    np.testing.assert_array_equal(two.variables[2], [1.0, 1.0])
    np.testing.assert_array_equal(frozen, [7.0])


def test_sparse_gradients_stay_sparse_on_replicas(mirrored):
    """Promise 7."""

    seen = set()

    class Sparse(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            seen.add(type(gradient))
            super().update_step(gradient, variable, learning_rate)

    applied = Applied(mirrored(2), lambda: Sparse(1.0), [ones((5, 2))], initial_scale=1.0)
    gradient = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([2]), tf.constant([5, 2]))
    applied.step([gradient], [gradient])
    assert seen == {tf.IndexedSlices}
    np.testing.assert_array_equal(applied.variables[0][2], [-1.0, -1.0])


def make_model(inner, jit_compile="auto", **arguments):
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1, name="logits")]
    )
    model.compile(
        keras_mp.LossScaleOptimizer(inner, jit_compile=jit_compile, **arguments), loss="mse", jit_compile=False
    )
    return model


def data(rows=64):
    random = np.random.default_rng(3)
    return random.normal(size=(rows, 8)).astype("float32"), random.normal(size=(rows, 1)).astype("float32")


def fitted(strategy, make_inner, **arguments):
    x, y = data()
    x[20] = NAN  # one row, so that one replica of one batch in four is bad
    with strategy.scope():
        model = make_model(make_inner(), dynamic_growth_steps=2, **arguments)
    model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    return model


FITTED = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw, accumulation, ema, global_clipnorm": lambda: keras.optimizers.AdamW(
        0.01, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=3, global_clipnorm=0.5
    ),
}


@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [
        pytest.param(name, jit_compile, marks=() if jit_compile == (name == "adam") else SLOW)
        for name in FITTED
        for jit_compile in (False, True)
    ],
)
def test_fit_of_a_stock_model_on_replicas_equals_fit_on_one_device(name, jit_compile, mirrored):
    make_inner = FITTED[name]
    one = fitted(tf.distribute.get_strategy(), make_inner)
    two = fitted(mirrored(2), make_inner, jit_compile=jit_compile)
    assert type(two) is keras.Sequential
    assert counters(two.optimizer) == counters(one.optimizer) == (2.0**15, 3, 0, False)
    for mine, theirs in zip(two.variables, one.variables, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)
    assert_copies_agree([*two.variables, *two.optimizer.variables], 2)


STRATEGIES = {
    "default": lambda mirrored: tf.distribute.get_strategy(),
    "one device": lambda mirrored: tf.distribute.OneDeviceStrategy("CPU:1"),
    "mirrored over one": lambda mirrored: mirrored(1),
    "mirrored over two": lambda mirrored: mirrored(2),
    "mirrored over four": lambda mirrored: mirrored(4),
}


@pytest.mark.parametrize("build", [True, False], ids=["built", "built by the first step"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loop_under_any_strategy_and_its_state_from_outside(name, build, mirrored):
    strategy = STRATEGIES[name](mirrored)
    with strategy.scope():
        weights = keras.Variable([1.0, 2.0])
        optimizer = keras_mp.LossScaleOptimizer(
            keras.optimizers.Adam(0.1, gradient_accumulation_steps=2), dynamic_growth_steps=2, jit_compile=True
        )
        assert counters(optimizer) == (2.0**15, 0, 0, False)
        if build:
            optimizer.build([weights])

    @tf.function
    def step(bad):
        def on_replica():
            def loss():
                # In a replica the state can be read too.
                read = tf.cast(optimizer.skipped_steps, tf.float32) * 0.0
                return tf.reduce_sum(weights.value**2) / strategy.num_replicas_in_sync * bad + read

            optimizer.minimize(loss, [weights])

        strategy.run(on_replica)

    for bad in (1.0, NAN, 1.0, 1.0, 1.0):
        step(tf.constant(bad))
        assert bool(optimizer.last_step_skipped) is math.isnan(bad)
    with strategy.scope():
        assert counters(optimizer) == (2.0**15, 1, 0, False)  # halved, then doubled
    assert counters(optimizer) == (2.0**15, 1, 0, False)
    assert int(optimizer.iterations) == 2  # of two micro-batches each
    np.testing.assert_allclose(weights, [0.8, 1.8], atol=1e-3)  # Adam's first steps are as long as its learning rate
    assert_copies_agree([weights, *optimizer.variables], strategy.num_replicas_in_sync)


def test_what_was_made_outside_the_scope_is_refused_in_words(mirrored):
    strategy = mirrored(2)

    @tf.function
    def step():
        strategy.run(lambda: optimizer.minimize(lambda: tf.reduce_sum(weights.value**2), [weights]))

    weights = keras.Variable([1.0, 2.0], name="outside")
    with strategy.scope():
        inside = keras.Variable([1.0, 2.0], name="inside")
        optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.Adam(0.1))
    with pytest.raises(
        ArgumentError,
        match="'outside' was made outside the strategy's scope, so it has no copy on each of the 2 devices of "
        r"MirroredStrategy. Make the model and the optimizer, and call `compile`, inside `with strategy.scope\(\):`",
    ):
        step()
    optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.Adam(0.1))
    weights = inside
    optimizer.build([inside])
    step = tf.function(step.python_function)
    with pytest.raises(ArgumentError, match="'.*' was made outside the strategy's scope"):
        step()
    np.testing.assert_array_equal(inside, [1.0, 2.0])


def test_apply_across_replicas_is_refused_in_words(mirrored):
    with mirrored(2).scope():
        weights = keras.Variable([1.0])
        optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.1))
        with pytest.raises(ValueError, match=r"in a cross-replica context.*the function that strategy.run\(...\) runs"):
            optimizer.apply([tf.constant([1.0])], [weights])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_on_replicas_raises_when_stuck(jit_compile, mirrored):
    """Promise 8."""
    with mirrored(2).scope():
        model = make_model(keras.optimizers.SGD(0.1), jit_compile, max_consecutive_skips=3)
    x, y = data()
    x[15::16] = NAN  # the second replica's in each batch
    with pytest.raises(LossScaleStuckError, match="3 training steps in a row .* The loss itself was not finite in 3"):
        model.fit(x, y, batch_size=16, verbose=0)
    assert int(model.optimizer.consecutive_skips) == 3


class CountsTraces(keras.optimizers.SGD):
    """Python runs `update_step` when a graph is traced, and not when it runs."""

    traces = 0

    def update_step(self, gradient, variable, learning_rate):
        self.traces += 1
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.parametrize(
    ("replicas", "jit_compile"),
    [(1, False), (2, True), pytest.param(1, True, marks=SLOW), pytest.param(2, False, marks=SLOW)],
)
def test_fit_traces_once_through_epochs_another_learning_rate_and_a_resume(replicas, jit_compile, mirrored, tmp_path):
    with strategy_over(replicas, mirrored).scope():
        inner = CountsTraces(0.01, momentum=0.9)
        model = make_model(inner, jit_compile)
    x, y = data()
    model.fit(x[:32], y[:32], batch_size=16, verbose=0)
    traces = inner.traces
    assert traces >= replicas * len(model.trainable_variables)
    x[20] = NAN
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    model.save_weights(tmp_path / "saved.weights.h5")
    model.optimizer.inner_optimizer.learning_rate = 0.5
    before = model.get_weights()
    model.fit(x, y, batch_size=16, epochs=1, verbose=0)
    assert any((b != a).any() for b, a in zip(before, model.get_weights(), strict=True))
    model.load_weights(tmp_path / "saved.weights.h5")
    assert_same(before, model.get_weights())
    model.fit(x, y, batch_size=16, epochs=1, verbose=0)
    assert inner.traces == traces


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_new_learning_rate_takes_effect_without_a_new_trace(replicas, mirrored):
    strategy = strategy_over(replicas, mirrored)
    with strategy.scope():
        weights, inner = keras.Variable([0.0]), CountsTraces(1.0)
        optimizer = keras_mp.LossScaleOptimizer(inner, jit_compile=True)

    @tf.function
    def step():
        strategy.run(lambda: optimizer.minimize(lambda: tf.reduce_sum(weights.value) / replicas, [weights]))

    step()
    traces = inner.traces
    optimizer.learning_rate = 0.25
    step()
    np.testing.assert_allclose(weights, [-1.25])
    assert inner.traces == traces


@pytest.mark.parametrize("jit_compile", [False, True])
def test_two_optimizers_in_one_step_have_a_scale_each(jit_compile):
    """A generative adversarial pair: each one's skipped steps leave the other alone."""
    generator, discriminator = keras.Variable([1.0]), keras.Variable([1.0])
    ours = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=4.0)
    theirs = keras_mp.LossScaleOptimizer(keras.optimizers.Adam(0.5), initial_scale=64.0, dynamic_growth_steps=2)
    for optimizer, variable in ((ours, generator), (theirs, discriminator)):
        optimizer.build([variable])

    @tf.function(jit_compile=jit_compile)
    def step(first, second):
        with tf.GradientTape(persistent=True) as tape:
            fake = generator.value * first
            one = ours.scale_loss(tf.reduce_sum(fake))
            other = theirs.scale_loss(tf.reduce_sum(discriminator.value * second + 0.0 * fake))
        ours.apply(tape.gradient(one, [generator.value]), [generator])
        theirs.apply(tape.gradient(other, [discriminator.value]), [discriminator])

    story = [
        # factors of the two losses, both weights, both scales, both counts of skipped steps
        (1.0, 1.0, 0.5, 0.5, 4.0, 64.0, 0, 0),
        (INF, 1.0, 0.5, 0.0, 2.0, 128.0, 1, 0),
        (1.0, NAN, 0.0, 0.0, 2.0, 64.0, 1, 1),
        (1.0, 1.0, -0.5, -0.5, 2.0, 64.0, 1, 1),
    ]
    for first, second, weight, other_weight, scale, other_scale, skipped, other_skipped in story:
        step(tf.constant([first]), tf.constant([second]))
        # Adam's epsilon and bias corrections make its first steps shorter than 0.5 by as much.
        np.testing.assert_allclose([generator.numpy(), discriminator.numpy()], [[weight], [other_weight]], atol=1e-4)
        assert (float(ours.loss_scale), float(theirs.loss_scale)) == (scale, other_scale)
        assert (int(ours.skipped_steps), int(theirs.skipped_steps)) == (skipped, other_skipped)


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_gradients_added_up_in_16_bits_cost_no_more_than_their_rounding(dtype, bits, replicas, mirrored):
    """One step of SGD at rate 1 shows the gradient: each replica's is rounded, and each partial sum."""
    x = np.random.default_rng(5).normal(size=(BATCH, 4)).astype("float32")
    steps = {}
    for name in ("float32", dtype):
        loop = Loop(mirrored(replicas), lambda: keras.optimizers.SGD(1.0), reduce_dtype=name)
        before = [v.numpy() for v in loop.variables]
        loop.step(x)
        steps[name] = [old - v.numpy() for old, v in zip(before, loop.variables, strict=True)]
    for exact, rounded in zip(steps["float32"], steps[dtype], strict=True):
        assert (exact != rounded).any()
        # Parts of the sum may be larger than the sum itself, so what is lost is measured against the largest.
        np.testing.assert_allclose(rounded, exact, atol=replicas * 2.0**-bits * np.abs(exact).max() * 2, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_with_gradients_added_up_in_16_bits_ends_where_float32_does(dtype, mirrored):
    losses = {}
    batches = np.random.default_rng(6).normal(size=(60, BATCH, 4)).astype("float32")
    for name in ("float32", dtype):
        loop = Loop(mirrored(2), lambda: keras.optimizers.SGD(0.05, momentum=0.9), reduce_dtype=name, dynamic=False)
        for x in batches:
            loop.step(x)
        y = np.tanh(batches[0] @ loop.kernel.numpy() + loop.bias.numpy())
        losses[name] = np.mean((y - batches[0][:, :3]) ** 2)
        assert int(loop.optimizer.skipped_steps) == 0
        assert_copies_agree(loop.variables, 2)
    np.testing.assert_allclose(losses[dtype], losses["float32"], rtol=0.01)


@pytest.mark.parametrize("how", ["graph", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sparse_gradients_are_added_up_in_any_dtype(dtype, how, mirrored):
    applied = Applied(
        mirrored(2), lambda: keras.optimizers.SGD(1.0), [ones((5, 3)), ones(2)], how, reduce_dtype=dtype, dynamic=False
    )
    scale = float(applied.optimizer.loss_scale)
    values = np.random.default_rng(0).normal(size=(2, 3, 3)).astype("float32") * [[[1.0], [300.0], [1e-4]]]
    rows, expected = np.int32([[1, 3, 1], [3, 4, 4]]), np.zeros((5, 3))
    for one, other in zip(rows, values, strict=True):
        np.add.at(expected, one, other)
    gradients = [
        [tf.IndexedSlices(tf.constant(v * scale, "float32"), tf.constant(r), tf.constant([5, 3])), tf.ones(2) * scale]
        for v, r in zip(values, rows, strict=True)
    ]
    if dtype == "float16":  # in which scaled gradients of 300 overflow
        gradients = [[tf.IndexedSlices(g.values * 2.0**-12, g.indices, g.dense_shape), d] for g, d in gradients]
        gradients = [[g, d * 2.0**-12] for g, d in gradients]
        expected *= 2.0**-12
    applied.step(*gradients)
    moved = 1.0 - applied.variables[0].numpy()
    rounding = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype]
    np.testing.assert_allclose(moved, expected, rtol=rounding, atol=rounding * np.abs(values).max(axis=2).min() + 1e-6)
    assert_copies_agree(applied.variables, 2)
    bad = tf.IndexedSlices(tf.constant([[NAN, 0.0, INF]]), tf.constant([0]), tf.constant([5, 3]))
    before = applied.state()
    applied.step([gradients[0][0], tf.ones(2)], [bad, tf.ones(2)])
    assert_same(before, applied.state())
    assert int(applied.optimizer.skipped_steps) == 1


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_model_with_an_embedding_fits_with_gradients_added_up_in_bfloat16(jit_compile, mirrored):
    ids, y = np.arange(24).reshape(8, 3) % 20, np.ones((8, 1), "float32")
    ends = []
    for dtype in ("float32", "bfloat16"):
        keras.utils.set_random_seed(0)
        with mirrored(2).scope():
            inputs = keras.Input((3,), dtype="int32")
            x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(20, 4)(inputs))
            model = keras_mp.Model(inputs, keras.layers.Dense(1)(x))
            optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), reduce_dtype=dtype)
            model.compile(optimizer, "mse", jit_compile=jit_compile)
        model.fit(ids, y, batch_size=8, epochs=2, verbose=0)
        ends.append(model.get_weights())
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(other, one, atol=2.0**-7)


def test_gradients_too_small_for_float16_are_added_up_in_it_scaled(mirrored):
    """2^-30 underflows in float16; times the scale it does not."""
    strategy = mirrored(2)
    with strategy.scope():
        weight = keras.Variable(0.0)
        optimizer = keras_mp.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), initial_scale=2.0**15, reduce_dtype="float16"
        )
        optimizer.build([weight])

    def on_replica():
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(weight.value * 2.0**-30)
        optimizer.apply([tape.gradient(loss, weight.value)], [weight])

    tf.function(lambda: strategy.run(on_replica))()
    assert float(weight.numpy()) == -(2.0**-29)


def test_a_sum_that_overflows_float16_skips_the_step_everywhere(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        weight = keras.Variable(0.0)
        optimizer = keras_mp.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), initial_scale=2.0**15, reduce_dtype="float16"
        )
        optimizer.build([weight])

    def on_replica():
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(weight.value * 1.5)
        optimizer.apply([tape.gradient(loss, weight.value)], [weight])

    tf.function(lambda: strategy.run(on_replica))()
    assert (float(optimizer.loss_scale), int(optimizer.skipped_steps), float(weight.numpy())) == (2.0**14, 1, 0.0)


def test_another_reduce_dtype_is_refused_and_the_config_keeps_it():
    with pytest.raises(ArgumentError, match=r'`reduce_dtype` must be "float32".*Received: reduce_dtype=.int8'):
        keras_mp.LossScaleOptimizer("sgd", reduce_dtype="int8")
    optimizer = keras_mp.LossScaleOptimizer("sgd", reduce_dtype="bfloat16")
    assert type(optimizer).from_config(optimizer.get_config()).reduce_dtype == "bfloat16"
    assert "reduce_dtype" not in keras_mp.LossScaleOptimizer("sgd").get_config()
