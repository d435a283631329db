"""The copy of a compiled model: its optimizers, wrappers, losses and metrics."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.conversion.convert import duplicate
from keras_mp.errors import ConversionError, KerasMPWarning
from tests.helpers.conversions import normal
from tests.helpers.state_of import differences

layers = keras.layers
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def small(dtype=None, **compiled):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, dtype=dtype), layers.Dense(1)], name="small")
    if compiled:
        model.compile(loss="mse", **compiled)
    return model


@pytest.mark.parametrize("name", ["adam", "nadam", "adafactor", "lion"])
def test_the_optimizer_is_wrapped_as_the_policy_needs(name):
    model = small(optimizer=name)
    model.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0)
    mixed = keras_mp.convert(model, "mixed_float16")
    assert type(mixed.optimizer) is keras_mp.LossScaleOptimizer
    assert float(mixed.optimizer.loss_scale) == 2.0**15
    for policy in ("mixed_bfloat16", "float32"):
        other = keras_mp.convert(mixed, policy)
        assert type(other.optimizer) is type(model.optimizer)
        state = [value for value in vars(other.optimizer).values() if isinstance(value, keras.Variable)]
        right = [value for value in vars(model.optimizer).values() if isinstance(value, keras.Variable)]
        for ours, theirs in zip(other.optimizer.variables + state, model.optimizer.variables + right, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("wrapper", [keras.optimizers.LossScaleOptimizer, keras_mp.LossScaleOptimizer])
def test_the_state_of_a_loss_scale_carries_over(wrapper):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*lets its scale run away", KerasMPWarning)
        model = small(
            "mixed_float16", optimizer=wrapper(keras.optimizers.Adam(), initial_scale=8.0, dynamic_growth_steps=2)
        )
    model.fit(np.ones((4, 4)), np.ones((4, 1)), epochs=3, verbose=0)
    mixed = keras_mp.convert(model, "mixed_float16")
    assert type(mixed.optimizer) is keras_mp.LossScaleOptimizer
    assert mixed.optimizer.dynamic_growth_steps == 2
    assert float(mixed.optimizer.loss_scale) == 16.0
    assert int(mixed.optimizer.step_counter) == int(model.optimizer.step_counter) == 1
    assert int(mixed.optimizer.inner_optimizer.iterations) == 3


def test_optimizers_that_a_model_keeps_itself_carry_over():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.left, self.right = layers.Dense(1), layers.Dense(1)

        def compile(self, left_optimizer, right_optimizer):
            super().compile()
            self.left_optimizer, self.right_optimizer = left_optimizer, right_optimizer

        def call(self, x):
            return self.left(x) + self.right(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean((tf.cast(self(x), tf.float32) - y) ** 2)
            for layer, optimizer in ((self.left, self.left_optimizer), (self.right, self.right_optimizer)):
                optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)
            return {"loss": loss}

    model = Two()
    model(normal(2, 4))
    model.compile(keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.1, momentum=0.5))
    model.fit(normal(4, 4), normal(4, 1), verbose=0)
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    for name in ("left_optimizer", "right_optimizer"):
        ours, theirs = getattr(mixed, name), getattr(model, name)
        assert ours is not theirs
        for variable, value in zip(ours.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(variable, value)
    before = np.asarray(mixed.left.kernel)
    mixed.fit(normal(4, 4), normal(4, 1), verbose=0)
    assert int(mixed.left_optimizer.iterations) == 2
    assert not np.array_equal(mixed.left.kernel, before)


def test_float16_without_our_optimizer_is_told_when_a_model_is_compiled():
    model = small("mixed_float16")
    with pytest.warns(KerasMPWarning, match=r"LossScaleOptimizer\(keras.optimizers.Adam\(...\)\)"):
        model.compile("adam", "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.compile(keras_mp.LossScaleOptimizer("adam"), "mse")
        small("mixed_bfloat16", optimizer="adam")
        small(keras_mp.PolicyMap("mixed_bfloat16"), optimizer="adam")


@pytest.mark.parametrize("wrapper", [keras.optimizers.LossScaleOptimizer, keras_mp.LossScaleOptimizer, None])
def test_a_duplicate_is_the_model_as_it_is(wrapper):
    optimizer = keras.optimizers.Adam(1e-2)
    optimizer = optimizer if wrapper is None else wrapper(optimizer, 256.0, 10)
    layers = [keras.Input((4,)), keras.layers.LayerNormalization(dtype="mixed_bfloat16"), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.compile(optimizer, "mse", auto_scale_loss=False)
    x, y = np.random.default_rng(0).standard_normal((2, 8, 4)), np.ones((8, 2))
    model.fit(x[0], y, verbose=0)
    copy = duplicate(model)
    assert [type(layer) for layer in copy.layers] == [type(layer) for layer in model.layers]
    assert [layer.dtype_policy for layer in copy.layers] == [layer.dtype_policy for layer in model.layers]
    assert type(copy.optimizer) is type(model.optimizer)
    for value, other in zip(copy.optimizer.variables, model.optimizer.variables, strict=True):
        assert value is not other
        np.testing.assert_array_equal(value, other)
    copy.fit(x[1], y, verbose=0)
    model.fit(x[1], y, verbose=0)
    for value, other in zip(copy.weights, model.weights, strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("how", ["names", "variables"])
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, keras_mp.LossScaleOptimizer], ids=["bare", "wrapped"])
def test_what_is_excluded_from_weight_decay_stays_so(wrap, how, built, policy):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, bias_initializer="ones")])
    optimizer = wrap(keras.optimizers.SGD(0.1, weight_decay=1.0))
    bias = model.layers[0].bias
    optimizer.exclude_from_weight_decay(**({"var_names": ["bias"]} if how == "names" else {"var_list": [bias]}))
    model.compile(optimizer, "mse")
    if built:
        optimizer.build(model.trainable_variables)
    converted = keras_mp.convert(model, policy)
    for each in (model, converted):
        each.fit(np.zeros((8, 4)), np.ones((8, 2)), epochs=3, verbose=0)
        kernel, bias = each.get_weights()
        np.testing.assert_array_equal(bias, [1, 1])
        assert np.abs(kernel).max() < 0.8 * np.sqrt(6 / (4 + 2))  # of what it is drawn from


def named_mean(y, prediction):
    return prediction


def test_a_metric_that_cannot_be_made_again_is_named():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile("sgd", "mse", metrics=[keras.metrics.MeanMetricWrapper(named_mean, name="mine")])
    with pytest.raises(ConversionError, match="'mine' of class MeanMetricWrapper cannot be made again"):
        keras_mp.convert(model, "float32")


class Sticky(keras.optimizers.Optimizer):
    """An optimizer of the user's, without a configuration, that builds anew whenever it is asked to."""

    def __init__(self, rate, memory):
        super().__init__(learning_rate=rate)
        self.memory = memory

    def build(self, variables):
        super().build(variables)
        self.speeds = [self.add_variable_from_reference(each, name="speed") for each in variables]
        self.steps = self.add_variable((), dtype="float32", name="steps")

    def update_step(self, gradient, variable, learning_rate):
        speed = self.speeds[self._get_variable_index(variable)]
        self.assign(speed, self.memory * speed + gradient)
        self.assign_sub(variable, learning_rate * speed)


class Growing(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of the user's, with a variable."""

    def __init__(self):
        self.rate = keras.Variable(0.01, trainable=False, name="rate")

    def __call__(self, step):
        return self.rate * (1 + keras.ops.cast(step, "float32"))


OPTIMIZERS = {
    "custom": lambda: Sticky(0.1, 0.5),
    "schedule": lambda: keras.optimizers.SGD(Growing(), momentum=0.5),
    "callable": lambda: keras.optimizers.Adam(lambda: 0.01),
    "factor": lambda: keras.optimizers.Adam(0.01, loss_scale_factor=128.0),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "averaging": lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_overwrite_frequency=2),
    "muon": lambda: keras.optimizers.Muon(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "ftrl": lambda: keras.optimizers.Ftrl(0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_from_where_they_were(name):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    model.compile(OPTIMIZERS[name](), "mse")
    x, y = normal(8, 4), normal(8, 2)
    model.fit(x, y, epochs=3, verbose=0)
    copies = [duplicate(model), keras_mp.convert(keras_mp.convert(model, "mixed_float16"), "float32")]
    for copy in copies:
        assert differences(model, copy) == []
    mixed = keras_mp.convert(model, "mixed_float16")
    assert type(mixed.optimizer) is keras_mp.LossScaleOptimizer
    mixed.fit(x, y, verbose=0)
    for each in (model, *copies):
        each.fit(x, y, epochs=2, verbose=0)
    for copy in copies:
        for ours, theirs in zip(copy.variables, model.variables, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("policy", POLICIES)
def test_optimizers_may_know_variables_that_are_gone(policy):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    model.compile("adam", "mse")
    model.fit(normal(8, 4), normal(8, 2), verbose=0)
    model.pop()
    model.add(layers.Dense(5))
    converted = keras_mp.convert(model, policy)
    inner = getattr(converted.optimizer, "inner_optimizer", converted.optimizer)
    assert len(inner.variables) == len(model.optimizer.variables)
    for ours, theirs in zip(inner.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    kernel = converted.layers[0].kernel
    assert inner._get_variable_index(kernel) == 0
    converted.compile(keras_mp.LossScaleOptimizer("adam"), "mse")
    converted.fit(normal(8, 4), normal(8, 5), verbose=0)


class Agent(keras.Model):
    """Keeps optimizers in its own ways, before `compile` and without it."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = layers.Dense(2), layers.Dense(1)
        self.optimizer = keras.optimizers.Adam(0.01)
        self.loss = keras.losses.Huber()
        self.others = {"critic": [keras.optimizers.SGD(0.01, momentum=0.5)]}
        self.same = self.optimizer

    def call(self, x):
        return self.actor(x), self.critic(x)


@pytest.mark.parametrize("policy", POLICIES)
def test_optimizers_on_attributes_of_any_name_are_wrapped_as_needed(policy):
    agent = Agent()
    agent(normal(1, 3))
    agent.optimizer.build(agent.actor.trainable_variables)
    converted = keras_mp.convert(agent, policy)
    wrapped = policy == "mixed_float16"
    for optimizer in (converted.optimizer, converted.others["critic"][0]):
        assert isinstance(optimizer, keras_mp.LossScaleOptimizer) is wrapped
    assert converted.same is converted.optimizer is not agent.optimizer
    assert type(converted.loss) is keras.losses.Huber
    inner = converted.optimizer.inner_optimizer if wrapped else converted.optimizer
    assert inner._get_variable_index(converted.actor.kernel) == 0
    back = keras_mp.convert(converted, "float32")
    assert differences(agent, back) == []
    assert type(back.optimizer) is keras.optimizers.Adam


def test_models_in_a_model_stay_compiled():
    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            self.judge = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
            self.judge.compile(keras.optimizers.Adam(0.03), "mse")

        def call(self, x):
            return self.judge(x)

    model = Gan()
    model.judge.fit(normal(4, 4), normal(4, 1), verbose=0)
    model(normal(1, 4))
    mixed = keras_mp.convert(model, "mixed_float16")
    assert type(mixed.judge.optimizer) is keras_mp.LossScaleOptimizer
    mixed.judge.fit(normal(4, 4), normal(4, 1), verbose=0)
    assert int(mixed.judge.optimizer.inner_optimizer.iterations + mixed.judge.optimizer.skipped_steps) == 2
    assert differences(model, keras_mp.convert(mixed, "mixed_bfloat16"), converted=True) != []
    assert differences(model, duplicate(model)) == []
