"""`keras_mp.Model` against stock Keras on one device: with XLA and without, alone and with replicas."""

import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp._compat import execution
from keras_mp.errors import ArgumentError, CompilationError, DistributionError, KerasMPWarning, LossScaleStuckError
from tests.helpers.training_models import BATCH, CROSSENTROPY, ROWS, X, Y, classifier, dense, strategy_over


def two_outputs(model_type):
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    x = dense(6)(keras.layers.Concatenate()([inputs["a"], inputs["b"]]))
    outputs = {"class": keras.layers.Dense(3, name="class")(x), "value": keras.layers.Dense(1, name="value")(x)}
    return model_type(inputs, outputs)


@keras.saving.register_keras_serializable(package="tests")
class MeanSquare(keras.layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


def with_add_loss(model_type):
    inputs = keras.Input((4,))
    x = MeanSquare()(dense(8, activity_regularizer="l2")(inputs))
    return model_type(inputs, keras.layers.Dense(3)(x))


def embedding(model_type):
    inputs = keras.Input((3,), dtype="int32")
    x = keras.layers.Embedding(10, 4)(inputs)
    return model_type(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))


def words(model_type):
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(10, 4, mask_zero=True)(inputs)
    return model_type(inputs, keras.layers.Dense(3)(x))


def with_compute_loss(model_type):
    class OwnLoss(model_type):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return super().compute_loss(x, y, y_pred, sample_weight, training) + keras.ops.mean(keras.ops.abs(y_pred))

    return classifier(OwnLoss)


def scalar_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_pred - keras.ops.one_hot(keras.ops.cast(y_true, "int32"), 3)))


WORDS, TAGS = (np.random.default_rng(1).integers(low, high, (ROWS, 6)) for low, high in ((1, 10), (0, 3)))
WORDS[::3, 2:] = 0  # masked: the replicas do not have as many words each
WORDS[:8:2] = 0
TWO_X, TWO_Y = {"a": X, "b": X[::-1]}, {"class": Y, "value": X[:, :1]}

# How the model is made, what `compile` gets besides the optimizer, what `fit` gets.
CASES = {
    "regularizer, accuracy": (
        functools.partial(classifier, kernel_regularizer=keras.regularizers.L2(0.05)),
        {"loss": CROSSENTROPY, "metrics": lambda: ["accuracy"]},
        {"x": X, "y": Y, "validation_data": (X, Y)},
    ),
    "synchronized batch statistics": (
        lambda model_type: classifier(model_type, keras_mp.layers.BatchNormalization(synchronized=True)),
        {"loss": CROSSENTROPY},
        {"x": X, "y": Y, "validation_data": (X, Y)},
    ),
    "sample weights, weighted metrics": (
        classifier,
        {"loss": CROSSENTROPY, "weighted_metrics": lambda: ["accuracy"]},
        {"x": X, "y": Y, "sample_weight": np.linspace(0, 2, ROWS)},
    ),
    "class weights": (classifier, {"loss": CROSSENTROPY}, {"x": X, "y": Y, "class_weight": {0: 0.5, 1: 2.0, 2: 1.0}}),
    "loss that is a sum": (classifier, {"loss": lambda: CROSSENTROPY(reduction="sum")}, {"x": X, "y": Y}),
    "loss of one's own, a scalar": (classifier, {"loss": lambda: scalar_loss}, {"x": X, "y": Y}),
    "add_loss, activity regularizer": (with_add_loss, {"loss": CROSSENTROPY}, {"x": X, "y": Y}),
    "several outputs, dictionaries, loss weights": (
        two_outputs,
        {
            "loss": lambda: {"class": CROSSENTROPY(), "value": "mse"},
            "loss_weights": lambda: {"class": 1.0, "value": 0.3},
            "metrics": lambda: {"class": ["accuracy"], "value": ["mae"]},
        },
        {"x": TWO_X, "y": TWO_Y},
    ),
    "embedding": (embedding, {"loss": CROSSENTROPY}, {"x": np.arange(ROWS * 3).reshape(ROWS, 3) % 10, "y": Y}),
    "masks": (words, {"loss": CROSSENTROPY, "metrics": lambda: ["accuracy"]}, {"x": WORDS, "y": TAGS}),
    "mean over masked weights": (
        words,
        {"loss": lambda: CROSSENTROPY(reduction="mean_with_sample_weight")},
        {"x": WORDS, "y": TAGS, "sample_weight": np.linspace(0, 2, ROWS * 6).reshape(ROWS, 6)},
    ),
    "compute_loss of one's own": (with_compute_loss, {"loss": CROSSENTROPY}, {"x": X, "y": Y}),
    "several steps at once": (
        classifier,
        {"loss": CROSSENTROPY, "steps_per_execution": lambda: 2},
        {"x": X, "y": Y},
    ),
}


def train(model_type, case, strategy, optimizer=None, epochs=3, **settings):
    """Weights and history of a model trained on a case."""
    build, compiled, fitted = CASES[case]
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = build(model_type)
        arguments = {name: make() for name, make in compiled.items()}
        model.compile((optimizer or functools.partial(keras.optimizers.SGD, 0.3))(), **arguments, **settings)
    history = model.fit(**fitted, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0).history
    return model, history


@functools.cache
def stock(case):
    """The same by stock Keras on one device."""
    model, history = train(keras.Model, case, tf.distribute.get_strategy(), jit_compile=False)
    return model.get_weights(), history


def assert_same_training(model, history, case):
    weights, expected = stock(case)
    for mine, theirs in zip(model.get_weights(), weights, strict=True):
        # Replicas' sums are added up in another order than the rows of one batch, and so are XLA's.
        np.testing.assert_allclose(mine, theirs, rtol=3e-5, atol=3e-6)
    assert set(history) == set(expected)
    for name, values in history.items():
        np.testing.assert_allclose(values, expected[name], rtol=3e-5, atol=3e-6, err_msg=name)


# XLA compiles for seconds. These hold what XLA has to do with; the others are compiled in the slow suite.
QUICK_UNDER_XLA = {"synchronized batch statistics", "several outputs, dictionaries, loss weights", "masks"}


@pytest.mark.parametrize(
    ("case", "jit_compile"),
    [
        pytest.param(case, jit_compile, marks=() if jit_compile == (case in QUICK_UNDER_XLA) else pytest.mark.slow)
        for case in CASES
        for jit_compile in (False, True)
    ],
)
def test_two_replicas_train_as_stock_keras_does_on_one_device(case, jit_compile, mirrored):
    model, history = train(keras_mp.Model, case, mirrored(2), jit_compile=jit_compile)
    assert model.jit_compile is jit_compile
    assert_same_training(model, history, case)


@pytest.mark.parametrize(
    ("case", "replicas", "jit_compile"),
    [
        ("regularizer, accuracy", 1, True),
        pytest.param("several outputs, dictionaries, loss weights", 1, True, marks=pytest.mark.slow),
        ("add_loss, activity regularizer", 1, False),
        pytest.param("synchronized batch statistics", 1, True, marks=pytest.mark.slow),
        pytest.param("synchronized batch statistics", 2, False, marks=pytest.mark.slow),
        pytest.param("synchronized batch statistics", 4, True, marks=pytest.mark.slow),
        ("several outputs, dictionaries, loss weights", 4, False),
        pytest.param("masks", 4, False, marks=pytest.mark.slow),
        pytest.param("regularizer, accuracy", 4, True, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_replicas_trains_so_with_xla_and_without(case, replicas, jit_compile, mirrored):
    model, history = train(keras_mp.Model, case, strategy_over(replicas, mirrored), jit_compile=jit_compile)
    assert_same_training(model, history, case)


@pytest.mark.stock_defect
def test_stock_keras_takes_several_steps_at_once_with_replicas(mirrored):
    try:
        train(keras.Model, "several steps at once", mirrored(2), jit_compile=False)
    except tf.errors.InvalidArgumentError as error:
        raise AssertionError(str(error)) from None


@pytest.mark.stock_defect
def test_stock_keras_compiles_with_replicas(mirrored):
    try:
        train(keras.Model, "class weights", mirrored(2), jit_compile=True)
    except tf.errors.InvalidArgumentError as error:
        raise AssertionError(str(error)) from None


@pytest.mark.parametrize(
    ("model_type", "jit_compile", "replicas", "warned"),
    [
        (keras.Model, True, 2, True),
        (keras.Model, "auto", 2, False),
        (keras.Model, True, 1, False),
        (keras_mp.Model, True, 2, False),
    ],
)
def test_a_step_of_replicas_that_keras_is_to_compile_is_warned_of(model_type, jit_compile, replicas, warned, mirrored):
    with strategy_over(replicas, mirrored).scope():
        inputs = keras.Input((2,))
        model = model_type(inputs, keras.layers.Dense(1)(inputs))
        optimizer = keras_mp.LossScaleOptimizer("sgd")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", KerasMPWarning)
            model.compile(optimizer, "mse", jit_compile=jit_compile)
    assert ["keras_mp.Model.from_model(model)" in str(each.message) for each in told] == [True] * warned


@pytest.mark.stock_defect
def test_stock_keras_weighs_the_rows_of_an_uneven_batch_alike(mirrored):
    model, history = train(keras.Model, "class weights", mirrored(2), jit_compile=False)
    assert_same_training(model, history, "class weights")


OPTIMIZERS = {
    "clipnorm": lambda: keras.optimizers.SGD(0.3, clipnorm=0.1),
    "accumulation, global_clipnorm": lambda: keras.optimizers.SGD(
        0.3, momentum=0.9, gradient_accumulation_steps=2, global_clipnorm=0.2
    ),
    "ema overwriting": lambda: keras.optimizers.SGD(0.3, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "loss scaling by Keras": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.3)),
    "loss scaling by ours": lambda: keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.3, clipnorm=0.1)),
}


@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [
        pytest.param(name, jit_compile, marks=() if jit_compile == (name == "clipnorm") else pytest.mark.slow)
        for name in OPTIMIZERS
        for jit_compile in (False, True)
    ],
)
def test_any_optimizer_of_keras_steps_with_replicas_as_on_one_device(name, jit_compile, mirrored):
    """Promise 4 for optimizers that are not wrapped: alone, Keras's clip too early or fail under a strategy."""
    trained = [
        train(model_type, "class weights", strategy, OPTIMIZERS[name], jit_compile=compiled)
        for model_type, strategy, compiled in (
            (keras.Model, tf.distribute.get_strategy(), False),
            (keras_mp.Model, mirrored(2), jit_compile),
        )
    ]
    (stock_model, expected), (model, history) = trained
    for mine, theirs in zip(model.get_weights(), stock_model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=3e-5, atol=3e-6)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "replicas", "jit_compile"),
    [
        ("mixed_float16", 1, False),
        ("mixed_bfloat16", 2, True),
        pytest.param("mixed_float16", 2, True, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", 1, True, marks=pytest.mark.slow),
    ],
)
def test_losses_of_layers_are_added_up_in_float32(policy, replicas, jit_compile, mirrored):
    keras.config.set_dtype_policy(policy)
    optimizer = lambda: keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.3))  # noqa: E731
    strategy = strategy_over(replicas, mirrored)
    case = "add_loss, activity regularizer"
    _, history = train(keras_mp.Model, case, strategy, optimizer, jit_compile=jit_compile)
    keras.config.set_dtype_policy("float32")
    _, expected = stock("add_loss, activity regularizer")
    # The layers compute in 16 bits, the sum of losses does not.
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=0.03)


@pytest.mark.stock_defect
@pytest.mark.filterwarnings("ignore:.*computes in float16, and:keras_mp.errors.KerasMPWarning")
def test_stock_keras_adds_up_losses_of_layers_in_16_bits():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        train(keras.Model, "add_loss, activity regularizer", tf.distribute.get_strategy(), jit_compile=False)
    except (TypeError, tf.errors.InvalidArgumentError) as error:
        raise AssertionError(str(error)) from None


# --- state -----------------------------------------------------------------------------------------------------------


def copies(variable):
    return [copy.numpy() for copy in getattr(variable.value, "values", [variable.value])]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_copies_of_batch_statistics_are_the_mean_over_replicas(jit_compile, mirrored):
    """Keras lets each replica move its own, keeps those of the first, and forgets the others in every checkpoint."""
    batches = X[:10].reshape(1, 10, 4)
    with mirrored(2).scope():
        inputs = keras.Input((4,))
        model = keras_mp.Model(inputs, keras_mp.layers.BatchNormalization(momentum=0.5)(inputs))
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    model.fit(batches[0], batches[0], batch_size=10, epochs=2, shuffle=False, verbose=0)
    halves = np.split(batches[0].astype("float64"), 2)
    mean, variance = np.zeros(4), np.ones(4)
    for _ in range(2):
        mean = 0.5 * mean + 0.5 * np.mean([half.mean(0) for half in halves], 0)
        variance = 0.5 * variance + 0.5 * np.mean([half.var(0) for half in halves], 0)
    layer = model.layers[-1]
    for moving, expected in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        for copy in copies(moving):
            np.testing.assert_allclose(copy, expected, rtol=1e-5, atol=1e-6)


def test_replicas_draw_numbers_of_their_own_and_keep_equal_seeds(mirrored):
    class Noise(keras.layers.Layer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.generator = keras.random.SeedGenerator(3)

        def call(self, x):
            return x + keras.random.normal((1, 4), seed=self.generator)

    strategy = mirrored(2)
    with strategy.scope():
        inputs = keras.Input((4,))
        model = keras_mp.Model(inputs, Noise()(inputs))
        model.compile(keras.optimizers.SGD(), "mse", jit_compile=True)
    zeros = np.zeros((4, 4), "float32")
    first, second = (model.predict(zeros, batch_size=4, verbose=0) for _ in range(2))
    numbers = {tuple(row) for row in [*first, *second]}
    assert len(numbers) == 4  # one row for each replica in each of the two calls
    state = model.layers[-1].generator.state
    assert [copy.tolist() for copy in copies(state)] == [[3, 2], [3, 2]]


def test_a_batch_that_is_not_finite_leaves_no_trace_but_in_the_scale(mirrored):
    x = X[:8].copy()
    x[0] = np.nan  # of the first replica alone
    with mirrored(2).scope():
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(3)(keras.layers.BatchNormalization()(inputs))  # Keras's own
        model = keras_mp.Model(inputs, outputs)
        optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
        model.compile(optimizer, CROSSENTROPY(), jit_compile=True)
    before = model.get_weights()
    model.fit(x, Y[:8], batch_size=8, verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (float(optimizer.loss_scale), int(optimizer.skipped_steps)) == (4.0, 1)


def test_a_loss_that_is_never_finite_is_blamed(mirrored):
    with mirrored(2).scope():
        model = classifier(keras_mp.Model)
        model.compile(keras_mp.LossScaleOptimizer("sgd", max_consecutive_skips=2), CROSSENTROPY(), jit_compile=True)
    with pytest.raises(LossScaleStuckError, match="loss"):
        model.fit(np.full((8, 4), np.nan), Y[:8], batch_size=8, epochs=3, verbose=0)


def test_weights_that_a_layer_assigns_to_have_the_gradients_of_keras():
    def build(model_type):
        inputs = keras.Input((4,))
        return model_type(inputs, keras.layers.SpectralNormalization(keras.layers.Dense(3))(inputs))

    results = []
    for model_type, jit_compile in ((keras.Model, False), (keras_mp.Model, False), (keras_mp.Model, True)):
        keras.utils.set_random_seed(0)
        model = build(model_type)
        model.compile(keras.optimizers.SGD(0.1), CROSSENTROPY(), jit_compile=jit_compile)
        model.fit(X, Y, batch_size=9, epochs=2, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for weights in results[1:]:
        for mine, theirs in zip(weights, results[0], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# --- the class -------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras_mp.Model):
    def __init__(self, units=5, **arguments):
        super().__init__(**arguments)
        self.units = units
        self.hidden, self.head = dense(units), keras.layers.Dense(3)
        self.dropout = keras.layers.Dropout(0.5)

    def call(self, x, training=False):
        return self.head(self.dropout(self.hidden(x), training=training))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class OfInputs(keras_mp.Model):
    """Calls `super().__init__` with inputs and outputs, which makes Keras change the bases of classes."""

    def __init__(self):
        inputs = keras.Input((4,))
        super().__init__(inputs, keras.layers.Dense(3)(inputs))


def test_functional_and_subclassed_models_stay_apart():
    functional, of_inputs, subclassed = classifier(keras_mp.Model), OfInputs(), Subclassed()
    assert isinstance(functional, keras.Model)
    assert isinstance(functional, type(keras.Model(functional.inputs, functional.outputs)))
    assert type(functional).__name__ == "Functional"
    assert type(of_inputs) is OfInputs
    assert len(of_inputs.layers) == 2
    assert isinstance(of_inputs, type(functional))
    assert not isinstance(subclassed, type(functional))
    assert Subclassed()(X).shape == (ROWS, 3)  # also after a class with inputs was made
    assert keras_mp.Model.__bases__ == (keras.Model,)


def compiled_adam(model):
    model.compile(
        keras_mp.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
        CROSSENTROPY(),
        metrics=["accuracy"],
        jit_compile="auto",
    )
    return model


@pytest.mark.parametrize("make", [lambda: classifier(keras_mp.Model), Subclassed], ids=["functional", "subclassed"])
def test_a_saved_model_is_the_same_model_and_goes_on_as_it_would_have(make, tmp_path):
    model = compiled_adam(make())
    model.fit(X, Y, batch_size=9, epochs=1, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is type(model)
    assert isinstance(again, keras_mp.Model)
    assert again.jit_compile_reason == model.jit_compile_reason
    assert again.get_compile_config()["jit_compile"] == "auto"
    np.testing.assert_array_equal(again.predict(X, verbose=0), model.predict(X, verbose=0))
    if not isinstance(model, Subclassed):  # whose dropout draws other numbers: Keras saves no seeds
        for each in (model, again):
            each.fit(X, Y, batch_size=9, epochs=1, verbose=0, shuffle=False)
        for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_clone_and_a_copy_from_its_config_are_of_the_same_class():
    model = classifier(keras_mp.Model)
    for copy in (keras.models.clone_model(model), type(model).from_config(model.get_config())):
        assert type(copy) is type(model)
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(copy(X), model(X))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_model_from_a_sequential_one_shares_its_layers(jit_compile):
    sequential = keras.Sequential([keras.Input((4,)), dense(5), keras.layers.Dense(3)], name="mine")
    model = keras_mp.Model.from_model(sequential)
    model.compile(keras.optimizers.SGD(0.1), CROSSENTROPY(), jit_compile=jit_compile)
    model.fit(X, Y, verbose=0)
    assert model.name == "mine"
    # XLA rounds otherwise.
    np.testing.assert_allclose(model.predict(X, verbose=0), sequential.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


def test_a_model_from_a_functional_one_keeps_the_structure_of_its_inputs():
    stock_model = two_outputs(keras.Model)
    model = keras_mp.Model.from_model(stock_model)
    found = model(TWO_X)
    assert set(found) == {"class", "value"}
    np.testing.assert_array_equal(found["class"], stock_model(TWO_X)["class"])


class StockSubclass(keras.Model):
    pass


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: keras.Sequential([keras.layers.Dense(1)]), "does not know its input yet. Begin it with keras.Input"),
        (StockSubclass, r"Make it `class StockSubclass\(keras_mp.Model\)` instead"),
        (lambda: keras.layers.Dense(1), "takes a Keras model. Received: <Dense"),
    ],
)
def test_what_has_no_inputs_and_outputs_cannot_be_taken_over(model, words):
    with pytest.raises(ArgumentError, match=words):
        keras_mp.Model.from_model(model())


def test_a_model_is_built_by_whatever_comes_first(mirrored):
    for strategy in (tf.distribute.get_strategy(), mirrored(2)):
        for first in ("fit", "evaluate", "predict", "train_on_batch"):
            with strategy.scope():
                model = compiled_adam(Subclassed())
            batch = (X[:8],) if first == "predict" else (X[:8], Y[:8])
            arguments = {} if first == "train_on_batch" else {"verbose": 0}
            getattr(model, first)(*batch, **arguments)
            assert model.built
            assert model.hidden.kernel.shape == (4, 5)


def test_a_train_step_that_calls_ours_runs_with_replicas_under_xla(mirrored):
    class Counting(Subclassed):
        def train_step(self, data):
            return {**super().train_step(data), "one": tf.constant(1.0)}

    with mirrored(2).scope():
        model = Counting()
        model.compile(keras.optimizers.SGD(0.1), CROSSENTROPY(), jit_compile=True)
    history = model.fit(X, Y, batch_size=8, epochs=1, verbose=0).history
    assert history["one"] == [1.0]


@pytest.mark.parametrize(("replicas", "jit_compile"), [(1, True), (1, False), (2, False)])
def test_a_train_step_of_ones_own_runs_as_keras_runs_it(replicas, jit_compile, mirrored):
    seen = []

    class Own(Subclassed):
        def train_step(self, data):
            x, y = data
            seen.append(execution.in_xla_context())
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=False))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"own_loss": loss}

    with strategy_over(replicas, mirrored).scope():
        model = Own()
        model(X[:1])
        model.compile(keras.optimizers.SGD(0.1), CROSSENTROPY(), jit_compile=jit_compile)
    losses = model.fit(X[:24], Y[:24], batch_size=8, epochs=3, verbose=0).history["own_loss"]
    assert losses[-1] < losses[0]
    assert set(seen) == {jit_compile}


def test_eager_steps_are_the_same(mirrored):
    for replicas in (1, 2):
        model, history = train(
            keras_mp.Model, "class weights", strategy_over(replicas, mirrored), run_eagerly=True, jit_compile=False
        )
        assert_same_training(model, history, "class weights")


# --- the choice of the compiler --------------------------------------------------------------------------------------


def test_auto_does_not_compile_on_a_cpu_and_says_why():
    model = classifier(keras_mp.Model)
    model.compile("sgd", "mse")
    assert model.jit_compile is keras_mp.detect().recommended_jit_compile
    assert keras_mp.detect().reason in model.jit_compile_reason
    assert 'jit_compile="auto"' in model.jit_compile_reason


def test_auto_compiles_for_a_gpu_and_not_what_cannot_be_compiled(monkeypatch):
    from keras_mp import hardware

    gpu = hardware.Device("gpu", "A100", compute_capability=(8, 0))
    monkeypatch.setattr(hardware, "detect_for", lambda kinds: hardware.recommend([gpu]))
    model = classifier(keras_mp.Model)
    model.compile("sgd", "mse")
    assert model.jit_compile
    assert model.jit_compile_reason.startswith('jit_compile="auto": XLA compiles the forward and backward pass. A100')
    inputs = keras.Input((1,), dtype="string")
    hashing = keras_mp.Model(inputs, keras.layers.Hashing(4, name="words", output_mode="one_hot")(inputs))
    hashing.compile("sgd", "mse")
    assert not hashing.jit_compile
    assert hashing.jit_compile_reason == (
        "not compiled: jit_compile=\"auto\", and XLA cannot compile 'words' (Hashing)."
    )


def test_layers_that_keras_knows_cannot_be_compiled_are_named():
    inputs = keras.Input((1,), dtype="string")
    model = keras_mp.Model(inputs, keras.layers.Hashing(4, name="words", output_mode="one_hot")(inputs), name="m")
    with pytest.raises(CompilationError, match=r"XLA cannot compile 'words' \(Hashing\) of 'm'.*jit_compile=False"):
        model.compile("sgd", "mse", jit_compile=True)


@pytest.mark.parametrize("replicas", [1, 2])
def test_layers_that_xla_cannot_compile_are_named(replicas, mirrored):
    class Unique(keras.layers.Layer):
        def call(self, x):
            return x + tf.cast(tf.strings.length(tf.strings.as_string(x)), x.dtype)

    with strategy_over(replicas, mirrored).scope():
        inputs = keras.Input((4,))
        model = keras_mp.Model(inputs, keras.layers.Dense(3)(Unique(name="letters")(dense(4)(inputs))), name="m")
        model.compile("sgd", CROSSENTROPY(), jit_compile=True)
    with pytest.raises(CompilationError, match=r"XLA cannot compile 'letters' \(Unique\) of 'm': it uses .*AsString"):
        model.fit(X[:8], Y[:8], batch_size=8, verbose=0)


def test_another_jit_compile_is_refused():
    with pytest.raises(ArgumentError, match="must be True, False or \"auto\". Received: jit_compile='yes'"):
        classifier(keras_mp.Model).compile("sgd", "mse", jit_compile="yes")


def test_float16_layers_get_our_loss_scaling_by_themselves():
    inputs = keras.Input((4,))
    model = keras_mp.Model(inputs, keras.layers.Dense(3, dtype="mixed_float16")(inputs))
    model.compile("sgd", CROSSENTROPY())
    assert isinstance(model.optimizer, keras_mp.LossScaleOptimizer)
    model.compile("sgd", CROSSENTROPY(), auto_scale_loss=False)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    model = classifier(keras_mp.Model)
    model.compile("sgd", CROSSENTROPY())
    assert isinstance(model.optimizer, keras.optimizers.SGD)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch_size", "words"),
    [
        (21, 7, r"A batch of 7 rows does not divide among 2 replicas.*batch_size=6 or batch_size=8"),
        (1, 8, r"The first batch has 1 row for 2 replicas.*at least 2 rows"),
    ],
)
def test_batches_that_replicas_cannot_share_are_refused(rows, batch_size, words, mirrored):
    with mirrored(2).scope():
        model = compiled_adam(classifier(keras_mp.Model))
    with pytest.raises(DistributionError, match=words):
        model.fit(X[:rows], Y[:rows], batch_size=batch_size, verbose=0)


def test_a_single_row_can_be_evaluated_and_predicted_by_two_replicas(mirrored):
    with mirrored(2).scope():
        model = compiled_adam(classifier(keras_mp.Model))
    one = model.predict(X[:1], verbose=0)
    np.testing.assert_allclose(one, model(X[:1]), rtol=1e-5)  # the product of one row takes another order
    expected = CROSSENTROPY()(Y[:1], one)
    np.testing.assert_allclose(model.evaluate(X[:1], Y[:1], verbose=0)[0], expected, rtol=1e-6)


def test_a_model_made_outside_the_scope_is_refused(mirrored):
    model = compiled_adam(classifier(keras_mp.Model))
    with mirrored(2).scope():
        for use in (
            lambda: model.compile("sgd", "mse"),
            lambda: model.fit(X, Y, verbose=0),
            lambda: model.evaluate(X, Y, verbose=0),
            lambda: model.predict(X, verbose=0),
        ):
            with pytest.raises(DistributionError, match="of 2 replicas is in force, and .* was made outside it. Make"):
                use()


def test_layers_made_outside_the_scope_are_refused(mirrored):
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3)(inputs)
    with mirrored(2).scope(), pytest.raises(ArgumentError, match="was made outside the strategy's scope"):
        compiled_adam(keras_mp.Model(inputs, outputs))


def test_two_strategies_are_not_mixed(mirrored):
    with mirrored(2).scope():
        model = classifier(keras_mp.Model)
    with mirrored(4).scope():
        optimizer = keras.optimizers.SGD()
        with pytest.raises(
            DistributionError, match="of 4 replicas is in force, and .* was made under a Mirrored.* of 2"
        ):
            model.compile("sgd", "mse")
    with pytest.raises(DistributionError, match="The optimizer was made under a Mirrored.* of 4 replicas, and .* of 2"):
        model.compile(optimizer, "mse")


@pytest.mark.parametrize("jit_compile", [False, True])
def test_what_layers_read_in_16_bits_has_its_gradient_in_these(jit_compile):
    """But for what is read in several places or in float32 as well, whose parts are added up in float32."""
    seen = {}

    class Seeing(keras_mp.LossScaleOptimizer):
        def apply(self, grads, trainable_variables=None):
            seen.update({v.path: g.dtype.name for g, v in zip(grads, trainable_variables, strict=True)})
            super().apply(grads, trainable_variables)

    def trained(model_type, optimizer, jit_compile):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((6, 4))
        x = keras.layers.LSTM(8, name="loop")(inputs)  # which reads its weights inside a loop
        shared = keras.layers.Dense(8, activation="tanh", name="shared")
        x = shared(shared(x))
        x = keras.layers.Dense(8, kernel_regularizer="l2", name="regularized")(x)
        outputs = keras.layers.Dense(3, name="once")(keras.layers.Dense(8, name="before")(x))
        model = model_type(inputs, outputs)
        model.compile(optimizer, "mse", jit_compile=jit_compile)
        generator = np.random.default_rng(0)
        data = generator.standard_normal((16, 6, 4), "float32"), generator.standard_normal((16, 3), "float32")
        before = model.get_weights()
        model.fit(*data, batch_size=16, verbose=0)
        return [after - value for after, value in zip(model.get_weights(), before, strict=True)]

    with keras_mp.policy_scope("mixed_bfloat16"):
        ours = trained(keras_mp.Model, Seeing(keras.optimizers.SGD(1.0), initial_scale=1.0), jit_compile)
        stock = trained(keras.Model, keras.optimizers.SGD(1.0), False)
    assert seen["once/kernel"] == seen["before/kernel"] == seen["once/bias"] == "bfloat16"
    assert seen["shared/kernel"] == seen["regularized/kernel"] == "float32"
    for one, other in zip(ours, stock, strict=True):
        assert np.abs(other).max() > 0
        # XLA rounds in other places; both are bfloat16 and a loop of six steps.
        np.testing.assert_allclose(one, other, atol=0.03 * np.abs(other).max())


def test_other_optimizers_get_gradients_of_the_variables_dtype():
    seen = []

    class Seeing(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            seen.append(gradient.dtype.name)
            super().update_step(gradient, variable, learning_rate)

    with keras_mp.policy_scope("mixed_bfloat16"):
        inputs = keras.Input((4,))
        model = keras_mp.Model(inputs, keras.layers.Dense(3)(inputs))
        model.compile(Seeing(0.1), "mse")
    model.fit(np.ones((8, 4), "float32"), np.zeros((8, 3), "float32"), batch_size=8, verbose=0)
    assert seen == ["float32", "float32"]


def check_top_k(model):
    """Metrics of the ranks of predictions, by name and by class, in `fit` and in `evaluate`."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    inputs = keras.Input((4,))
    made = model(inputs, keras.layers.Dense(10, "softmax")(inputs))
    metrics = ["sparse_top_k_categorical_accuracy", keras.metrics.SparseTopKCategoricalAccuracy(3, name="of_three")]
    made.compile("sgd", "sparse_categorical_crossentropy", metrics=metrics, jit_compile=False)
    x, y = np.random.default_rng(0).normal(size=(8, 4)), np.arange(8)
    made.fit(x, y, verbose=0)
    top = np.argsort(-np.asarray(made(x), "float32"), -1, "stable")
    result = made.evaluate(x, y, verbose=0, return_dict=True)
    assert result["of_three"] == pytest.approx(np.mean([label in row[:3] for label, row in zip(y, top, strict=True)]))
    assert result["sparse_top_k_categorical_accuracy"] >= result["of_three"]


def test_top_k_metrics_take_16_bit_predictions():
    check_top_k(keras_mp.Model)
