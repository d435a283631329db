"""Updates by TensorFlow's kernels: against NumPy in float64, and against Keras's operations one by one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.optimizers import tf_kernels

# Keras's (1 - 0.999) and the kernel's, of which squares are multiples, differ by 1.3e-5: steps by half of that at most.
STEP = 7e-6
MAKE = {
    "adam": lambda **more: keras.optimizers.Adam(0.1, **more),
    "adamw": lambda **more: keras.optimizers.AdamW(0.1, weight_decay=0.1, **more),
    "sgd": lambda **more: keras.optimizers.SGD(0.1, **more),
    "momentum": lambda **more: keras.optimizers.SGD(0.1, momentum=0.9, **more),
    "nesterov": lambda **more: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, **more),
}


def gradients(count, shape=(3, 4)):
    return np.random.default_rng(0).standard_normal((count, *shape)).astype("float32")


def start(shape=(3, 4)):
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


def in_float64(name, w, grads):
    """The formulas of the papers: Kingma and Ba, 2015; Loshchilov and Hutter, 2019; Sutskever et al., 2013."""
    w, m, v = w.astype("float64"), 0.0, 0.0
    for count, g in enumerate(grads.astype("float64"), 1):
        if name.startswith("adam"):
            w = w - (0.1 * 0.1 * w if name == "adamw" else 0.0)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w - 0.1 * np.sqrt(1 - 0.999**count) / (1 - 0.9**count) * m / (np.sqrt(v) + 1e-7)
        else:
            momentum = 0.0 if name == "sgd" else 0.9
            m = momentum * m - 0.1 * g
            w = w + (momentum * m - 0.1 * g if name == "nesterov" else m)
    return w


def trained(optimizer, grads, dtype="float32", graph=True, scale=8.0):
    """A variable after steps by an optimizer, ours with gradients of a loss that is multiplied by a scale."""
    ours = isinstance(optimizer, keras_mp.LossScaleOptimizer)
    variable = keras.Variable(start(), dtype=dtype)
    optimizer.build([variable])

    def step(gradient):
        if ours:
            optimizer.scale_loss(0.0)
        optimizer.apply([gradient], [variable])

    step = tf.function(step) if graph else step
    for gradient in grads:
        step(tf.constant(gradient * (scale if ours else 1.0)))
    return variable


def wrapped(optimizer, **more):
    return keras_mp.LossScaleOptimizer(optimizer, initial_scale=8.0, **more)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", MAKE)
def test_updates_are_those_of_the_papers(name, graph):
    expected = in_float64(name, start(), gradients(5))
    np.testing.assert_allclose(trained(wrapped(MAKE[name]()), gradients(5), graph=graph), expected, atol=1e-6)


@pytest.mark.stock_defect
def test_stock_adam_takes_its_first_step_in_full():
    """Of gradients that do not change, each step is of the learning rate: Keras's first is 6e-6 of it too short."""
    grads = np.ones((1, 3, 4), "float32")
    taken = start().astype("float64") - trained(keras.optimizers.Adam(1.0, epsilon=1e-12), grads).numpy()
    np.testing.assert_allclose(taken, 1.0, atol=3e-7)


def test_the_first_step_of_adam_is_taken_in_full():
    grads = np.ones((1, 3, 4), "float32")
    taken = start().astype("float64") - trained(wrapped(keras.optimizers.Adam(1.0, epsilon=1e-12)), grads).numpy()
    np.testing.assert_allclose(taken, 1.0, atol=3e-7)


SETTINGS = {
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "ema": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["adam", "adamw", "nesterov"])
def test_what_keras_does_beside_is_done(name, setting):
    ours = trained(wrapped(MAKE[name](**SETTINGS[setting])), gradients(6))
    stock = trained(MAKE[name](**SETTINGS[setting]), gradients(6))
    np.testing.assert_allclose(ours, stock, atol=6 * 0.1 * STEP + 1e-6)
    assert not np.allclose(ours, trained(MAKE[name](), gradients(6)), atol=1e-3), "the setting does nothing"


def test_gradients_of_steps_with_other_scales_are_accumulated_unscaled():
    optimizer = keras_mp.LossScaleOptimizer(
        MAKE["adam"](gradient_accumulation_steps=2), initial_scale=8.0, dynamic_growth_steps=1
    )
    variable = keras.Variable(start())
    optimizer.build([variable])
    scales = []
    for gradient in gradients(4):
        scales.append(float(optimizer.loss_scale))
        optimizer.apply([tf.constant(gradient * scales[-1])], [variable])
    assert scales == [8.0, 16.0, 32.0, 64.0]
    stock = trained(MAKE["adam"](gradient_accumulation_steps=2), gradients(4))
    np.testing.assert_allclose(variable, stock, atol=4 * 0.1 * STEP + 1e-6)


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_a_schedule_is_followed_and_iterations_are_counted(name):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    results = []
    for wrap in (wrapped, lambda optimizer: optimizer):
        optimizer = MAKE[name]()
        optimizer._learning_rate = schedule
        results.append(trained(wrap(optimizer), gradients(4)).numpy())
        assert int(optimizer.iterations) == 4
    np.testing.assert_allclose(*results, atol=2e-6)
    assert np.abs(results[0] - trained(wrapped(MAKE[name]()), gradients(4)).numpy()).max() > 0.01


@pytest.mark.parametrize("name", ["adam", "nesterov"])
def test_variables_in_float64(name):
    ours = trained(wrapped(MAKE[name]()), gradients(3), "float64")
    # The learning rate is a variable in float32.
    np.testing.assert_allclose(ours, in_float64(name, start(), gradients(3)), atol=3e-8)


@pytest.mark.parametrize(("dtype", "epsilon"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
@pytest.mark.parametrize("name", ["adam", "nesterov"])
def test_variables_in_16_bits_are_updated_in_float32_and_rounded(name, dtype, epsilon):
    ours = trained(wrapped(MAKE[name]()), gradients(3), dtype)
    rounded = np.asarray(tf.cast(tf.cast(start(), dtype), "float64"))
    right = in_float64(name, rounded, gradients(3))
    # The weights are rounded after each of the three steps, and Adam divides by what it has of the last ones.
    np.testing.assert_allclose(tf.cast(ours, "float64"), right, atol=3 * epsilon * np.abs(right).max())


def operations(optimizer, grads):
    """The types of operations in the graph of an update, functions included, and the definitions of all nodes."""
    variables = [keras.Variable(np.ones(g.shape, "float32")) for g in grads]
    optimizer.build(variables)

    def step():
        optimizer.scale_loss(0.0)
        optimizer.apply(grads, variables)

    graph = tf.function(step).get_concrete_function().graph.as_graph_def()
    return [*graph.node, *(node for function in graph.library.function for node in function.node_def)]


@pytest.mark.parametrize(
    ("make", "asked", "kernel"),
    [
        (MAKE["adam"], "auto", "ResourceApplyAdam"),
        (MAKE["adamw"], "auto", "ResourceApplyAdam"),
        (MAKE["sgd"], "auto", "ResourceApplyGradientDescent"),
        (MAKE["momentum"], "auto", "ResourceApplyKerasMomentum"),
        (MAKE["adam"], False, None),
        (MAKE["adam"], True, None),
        (lambda: keras.optimizers.Adam(amsgrad=True), "auto", None),
        (keras.optimizers.Nadam, "auto", None),
    ],
)
def test_the_kernel_is_taken_where_it_is_meant_to_be(make, asked, kernel):
    optimizer = wrapped(make(), jit_compile=asked)
    kinds = {node.op for node in operations(optimizer, [tf.ones((1200, 1000))])}
    assert {kind for kind in kinds if kind.startswith("ResourceApply")} == ({kernel} if kernel else set())
    assert ("TensorFlow has a kernel" in optimizer.jit_compile_reason) is (kernel is not None)


@pytest.mark.parametrize("sparse", [True, False])
def test_large_gradients_are_prepared_one_after_the_other(sparse):
    """The gradients of tables, of the size of the tables, and those in float32 are not all in memory at once."""
    size = (1 << 10, 1 << 6)
    grads = [
        tf.IndexedSlices(tf.ones((2, size[1])), tf.constant([1, 1]), tf.constant(size))
        if sparse
        else tf.ones(size, "bfloat16")
        for _ in range(4)
    ]
    nodes = {node.name: node for node in operations(wrapped(MAKE["adam"]()), grads)}

    def waits_for(name):
        """All that has to be done before a node."""
        inputs = [each.lstrip("^").partition(":")[0] for each in nodes[name].input]
        inputs = [each for each in inputs if each in nodes]
        return set(inputs).union(*map(waits_for, inputs))

    updates = {name: node for name, node in nodes.items() if node.op == "ResourceApplyAdam"}
    prepared = [
        next(each for each in node.input if "^" not in each and ("Sum" in each or "mul" in each))
        for node in updates.values()
    ]
    assert sorted(len(set(updates) & waits_for(name.partition(":")[0])) for name in prepared) == [0, 0, 1, 1]


def test_an_optimizer_is_as_it_was_after_an_error():
    optimizer = keras.optimizers.Adam()

    def fail():
        with tf_kernels.by_kernels(optimizer, lambda gradient, _: gradient):
            assert "update_step" in vars(optimizer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "update_step" not in vars(optimizer)


def test_two_replicas_equal_one_device(mirrored):
    results = []
    for strategy in (tf.distribute.get_strategy(), mirrored(2)):
        with strategy.scope():
            variable = keras.Variable(start())
            optimizer = wrapped(MAKE["adamw"]())
            optimizer.build([variable])
        replicas = strategy.num_replicas_in_sync

        def step(gradient, variable=variable, optimizer=optimizer, replicas=replicas):
            optimizer.scale_loss(0.0)
            optimizer.apply([gradient / replicas], [variable])

        run = tf.function(lambda gradient, strategy=strategy, step=step: strategy.run(step, args=(gradient,)))
        for gradient in gradients(4):
            run(tf.constant(8.0 * gradient))
        results.append(variable.numpy())
    np.testing.assert_allclose(*results, atol=1e-6)


BESIDE = {
    "adamw": lambda: MAKE["adamw"](),
    "adam, decay": lambda: MAKE["adam"](weight_decay=0.1),
    "adam, average": lambda: MAKE["adam"](use_ema=True, ema_overwrite_frequency=2),
    "momentum, decay": lambda: MAKE["momentum"](weight_decay=0.1),
    "momentum, average": lambda: MAKE["momentum"](use_ema=True, ema_overwrite_frequency=2),
    "sgd, decay": lambda: MAKE["sgd"](weight_decay=0.1),
    "adam, constraint": lambda: MAKE["adam"](),
}


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(name, policy, marks=() if number % 2 == other else pytest.mark.slow)
        for number, name in enumerate(BESIDE)
        for other, policy in enumerate(("float32", "mixed_float16"))
    ],
)
def test_an_embedding_beside_a_dense_layer_trains_as_keras_does(name, policy):
    """What Keras does beside the update needs sparse gradients as tensors, made inside the step's condition, while
    dense ones come from outside of it."""

    def fitted(optimizer, policy):
        keras.utils.set_random_seed(0)
        limit = keras.constraints.MaxNorm(0.08) if "constraint" in name else None
        embedding = keras.layers.Embedding(10, 3, embeddings_constraint=limit, dtype=policy)
        layers = [keras.layers.Flatten(dtype=policy), keras.layers.Dense(1, dtype=policy)]
        model = keras.Sequential([keras.Input((2,)), embedding, *layers])
        model.compile(optimizer, "mse", jit_compile=policy == "float32")
        rows = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
        model.fit(rows, np.arange(4.0)[:, None], batch_size=2, epochs=3, shuffle=False, verbose=0)
        return model.get_weights()

    scaled = keras_mp.LossScaleOptimizer(BESIDE[name](), initial_scale=16.0)  # at which no step overflows
    ours, stock = fitted(scaled, policy), fitted(BESIDE[name](), "float32")
    for one, other in zip(ours, stock, strict=True):
        # float16's activations are rounded to 2^-11 of themselves, through six steps of a tenth.
        np.testing.assert_allclose(one, other, atol=1e-5 if policy == "float32" else 5e-3)
