"""Nothing that a model holds is lost in a copy, whatever holds it and wherever it is kept."""

import collections
import functools
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_mp
from keras_mp.conversion.convert import duplicate
from tests.helpers.state_of import differences

layers = keras.layers
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
Pair = collections.namedtuple("Pair", "first second")


def normal(*shape):
    return np.random.normal(size=shape).astype("float32")


class Counter:
    """An object that is no part of Keras and holds some of it."""

    def __init__(self, owner, *held):
        self.owner, self.held, self.count = owner, held, 3


class Slots:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer


@keras.saving.register_keras_serializable("tests")
class Scale(layers.Layer):
    """A layer that has a configuration, which tells nothing of what is set on it later."""

    def __init__(self, factor=2.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.seen, self.limit = 0, -1e9 if self.compute_dtype != "float16" else -6e4

    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), initializer="ones", name="gain")

    def call(self, x):
        return x * self.gain * self.factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


def hide(owner, name, value):
    object.__setattr__(owner, name, value)


def table():
    made = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    made.insert(tf.constant(["a", "b"]), tf.constant([1, 2], tf.int64))
    return made


def trained(optimizer):
    weight = keras.Variable(np.ones((2, 3), "float32"))
    for _ in range(3):
        optimizer.apply([tf.ones((2, 3))], [weight])
    return optimizer


def metric():
    made = keras.metrics.Mean(name="level")
    made.update_state([3.0, 4.0])
    return made


def dense(units=3, width=4, **arguments):
    layer = layers.Dense(units, **arguments)
    layer.build((None, width))
    return layer


def seeds():
    made = keras.random.SeedGenerator(7)
    made.next()
    return made


def generator():
    made = tf.random.Generator.from_seed(5)
    made.normal((2,))
    return made


# What an attribute may hold, made for the layer that is to hold it.
HELD = {
    "plain": lambda owner: {"a": [1, "x", None, (2.5, b"y")], 3: {4}},
    "array": lambda owner: normal(3),
    "tensor": lambda owner: tf.constant([1.5, 2.5]),
    "layer": lambda owner: dense(),
    "frozen": lambda owner: dense(trainable=False),
    "twin": lambda owner: layers.LayerNormalization(),
    "attention": lambda owner: layers.MultiHeadAttention(2, 4),
    "dropout": lambda owner: layers.Dropout(0.5, seed=3),
    "scale": lambda owner: Scale(3.0),
    "vocabulary": lambda owner: layers.StringLookup(vocabulary=["a", "b"], output_mode="multi_hot"),
    "variable": lambda owner: keras.Variable(normal(2, 3), name="loose"),
    "counter": lambda owner: keras.Variable(np.array([3], "int64"), trainable=False, name="whole", dtype="int64"),
    "tf.Variable": lambda owner: tf.Variable(normal(2)),
    "seeds": lambda owner: seeds(),
    "generator": lambda owner: generator(),
    "table": lambda owner: table(),
    "metric": lambda owner: metric(),
    "adam": lambda owner: trained(keras.optimizers.Adam(0.01, weight_decay=0.1, use_ema=True)),
    "nadam": lambda owner: trained(keras.optimizers.Nadam(keras.optimizers.schedules.CosineDecay(0.1, 9))),
    "closure": lambda owner: (lambda layer: lambda x: layer(x))(dense()),
    "partial": lambda owner: functools.partial(Counter, owner, b=dense()),
    "method": lambda owner: owner.count_params,
    "object": lambda owner: Counter(owner, dense(), [dense()]),
    "slots": lambda owner: Slots(dense()),
    "weak": lambda owner: weakref.ref(owner),
    "owner": lambda owner: owner,
    "pair": lambda owner: Pair(dense(), [1, dense()]),
    "default": lambda owner: collections.defaultdict(list, a=[dense()]),
    "sequential": lambda owner: keras.Sequential([keras.Input((4,)), layers.Dense(2), layers.BatchNormalization()]),
}
NAMES = ("optimizer", "loss", "metric", "x", "_y", "teacher", "train_function_of_mine", "compile_config", "states", "z")


class Holder(layers.Layer):
    """Holds what it is told to, in attributes that Keras sees, in hidden ones, and in lists and dicts."""

    def __init__(self, attributes):
        super().__init__()
        shared = {}
        for name, kinds, how in attributes:
            made = []
            for kind in kinds:
                # One object may stand in several places. What refers to its owner is hidden, or Keras runs in circles.
                made.append(shared.setdefault(kind, HELD[kind](self)))
            value = {"list": made, "dict": {str(n): each for n, each in enumerate(made)}}.get(how, made[0])
            hidden = how == "hidden" or any(kind in ("owner", "weak", "method", "partial", "object") for kind in kinds)
            if hidden:
                hide(self, name, made if how == "list" else made[0])
            else:
                setattr(self, name, value)
        self.dense = dense()

    def build(self, shape):
        pass

    def call(self, x):
        return self.dense(x)


class Model(keras.Model):
    def __init__(self, holder):
        super().__init__()
        self.holder = holder
        hide(holder, "parent", self)
        self.answer = layers.Dense(2)

    def call(self, x):
        return self.answer(self.holder(x))


def model_of(holder, kind):
    if kind == "functional":
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(2)(holder(inputs)))
    if kind == "sequential":
        return keras.Sequential([keras.Input((4,)), holder, layers.Dense(2)])
    if kind == "nested":
        return Model(keras.Sequential([keras.Input((4,)), layers.TimeDistributed(layers.Dense(4)) and holder]))
    model = Model(holder)
    model(normal(1, 4))
    return model


def check(model, policies=POLICIES):
    """Compares every copy, of copies too, with the model."""
    assert differences(model, duplicate(model)) == []
    for policy in policies:
        converted = keras_mp.convert(model, policy)
        assert differences(model, converted, converted=policy != "float32") == [], policy
        assert differences(converted, duplicate(converted)) == [], policy
        back = keras_mp.convert(converted, "float32")
        assert differences(model, back) == [], f"{policy} and back"


ATTRIBUTES = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.lists(st.sampled_from(sorted(HELD)), min_size=1, max_size=3),
        st.sampled_from(["value", "value", "hidden", "list", "dict"]),
    ),
    max_size=5,
    unique_by=lambda each: each[0],
)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ATTRIBUTES, st.sampled_from(["functional", "sequential", "nested", "subclassed"]), st.sampled_from(POLICIES[1:]))
def test_nothing_is_lost_of_random_models(attributes, kind, policy):
    check(model_of(Holder(attributes), kind), [policy])


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("how", ["value", "hidden", "list", "dict"])
def test_nothing_is_lost_of_what_an_attribute_holds(how, policy):
    held = [(kind.replace(".", "_"), [kind, "layer"][: 1 + (how == "list")], how) for kind in HELD]
    check(model_of(Holder(held), "subclassed"), [policy])


STRINGS = np.array(["a", "b", "b", "c", "", "unknown"])


def lookups(mode):
    """Adapted layers for strings, whole numbers and numbers, by the name of what they take."""
    tokens = 6 if mode not in ("int",) else None
    made = {
        "string": layers.StringLookup(output_mode=mode, max_tokens=tokens, num_oov_indices=2),
        "whole": layers.IntegerLookup(output_mode=mode, max_tokens=tokens),
    }
    made["string"].adapt(STRINGS[:4])
    made["whole"].adapt(np.array([5, 5, 7, 9]))
    if mode in ("int", "multi_hot", "count", "tf_idf"):
        made["text"] = layers.TextVectorization(output_mode=mode)
        made["text"].adapt(["a b c", "a a d"])
    if mode in ("int", "one_hot", "multi_hot", "count"):
        made["number"] = layers.Discretization(num_bins=4, output_mode=mode)
        made["number"].adapt(np.random.normal(50, 20, (100, 1)).astype("float32"))
    if mode in ("int", "one_hot"):
        made["hashed"] = layers.Hashing(5, salt=3, output_mode=mode)
        made["crossed"] = layers.HashedCrossing(5, output_mode=mode)
    if mode == "int":
        made["normal"] = layers.Normalization()
        made["normal"].adapt(np.random.normal(50, 20, (100, 1)).astype("float32"))
    return made


def prepared():
    numbers = np.round(np.random.normal(50, 20, (6, 1))).astype("float32")  # that bfloat16 does not round further
    words = tf.constant(STRINGS)
    return {
        "string": words,
        "hashed": words,
        "text": tf.constant(["a d", "b", "c c c", "", "z", "d"]),
        "crossed": (words, tf.constant([1, 2, 3, 1, 2, 3])),
        "whole": tf.constant([5, 7, 9, 1, 0, 5]),
        "number": numbers,
        "normal": numbers,
    }


class Inside(layers.Layer):
    def __init__(self, layer):
        super().__init__(autocast=False)
        self.inner = [{"layer": layer}]

    def call(self, x):
        return self.inner[0]["layer"](x)


class Prepare(keras.Model):
    def __init__(self, made):
        super().__init__()
        self.by_name = made
        self.nested = {name: Inside(layer) for name, layer in made.items()}
        self.answer = layers.Dense(2)

    def call(self, x):
        found = {name: layer(x[name]) for name, layer in self.by_name.items()}
        return found, {name: layer(x[name]) for name, layer in self.nested.items()}, self.answer(x["number"])


def assert_same(found, expected):
    keras.tree.map_structure(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("mode", ["int", "one_hot", "multi_hot", "count", "tf_idf"])
def test_adapted_layers_stay_adapted(mode):
    model, x = Prepare(lookups(mode)), prepared()
    expected = model(x)[:2]
    for policy in POLICIES:
        converted = keras_mp.convert(model, policy)
        assert_same(converted(x)[:2], expected)
        assert differences(model, converted, converted=True) == []
        assert_same(keras_mp.convert(converted, "float32")(x)[:2], expected)
    copy = duplicate(model)
    assert_same(copy(x)[:2], expected)
    if mode == "int":  # in others the number of words must stay
        copy.by_name["string"].adapt(np.array(["z"]))  # and the model's own keeps what it has learnt
        assert_same(model(x)[:2], expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("graph", [False, True])
def test_feature_spaces_stay_adapted(graph, policy):
    space = keras.utils.FeatureSpace(
        {
            "age": keras.utils.FeatureSpace.float_normalized(),
            "size": keras.utils.FeatureSpace.float_discretized(3),
            "kind": keras.utils.FeatureSpace.string_categorical(),
            "code": keras.utils.FeatureSpace.integer_hashed(4),
        },
        crosses=[keras.utils.FeatureSpace.cross(("kind", "code"), 8)],
        output_mode="concat",
    )
    numbers = np.round(normal(2, 6) * 8) / 8  # that bfloat16 does not round
    x = {"age": numbers[0], "size": numbers[1], "kind": STRINGS, "code": np.arange(6)}
    space.adapt(tf.data.Dataset.from_tensor_slices(x).batch(6))

    class Spaced(keras.Model):
        def __init__(self):
            super().__init__()
            self.space, self.answer = space, layers.Dense(2)

        def call(self, x):
            return self.answer(self.space(x))

    data = {name: tf.constant(each[:, None]) for name, each in x.items()}
    if graph:
        model = keras.Model(dict(space.get_inputs()), layers.Dense(2)(space.get_encoded_features()))
        data = dict(sorted(data.items()))
        expected = model(data)
    else:
        model = Spaced()
        expected = model({name: tf.constant(each) for name, each in x.items()})
        data = {name: tf.constant(each) for name, each in x.items()}
    converted = keras_mp.convert(model, policy)
    np.testing.assert_allclose(converted(data), expected, atol=0 if policy == "float32" else 0.05)
    assert differences(model, converted, converted=True) == []
    np.testing.assert_array_equal(keras_mp.convert(converted, "float32")(data), expected)


def attention():
    inputs = keras.Input((5, 4))
    layer = layers.MultiHeadAttention(2, 4)
    return (
        keras.Model(inputs, layers.Dense(2)(layer(inputs, inputs))),
        normal(2, 5, 4),
        lambda m: [
            m.layers[1].query_dense,
            m.layers[1].value_dense,
        ],
    )


def encoder():
    keras_hub = pytest.importorskip("keras_hub")
    inputs = keras.Input((5, 4))
    layer = keras_hub.layers.TransformerEncoder(8, 2)
    model = keras.Model(inputs, layers.Dense(2)(layer(inputs)))
    return (
        model,
        normal(2, 5, 4),
        lambda m: [
            m.layers[1]._feedforward_intermediate_dense,
            m.layers[1]._self_attention_layer.query_dense,
        ],
    )


def simple():
    x = inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(30, 4)(x)
    x = layers.EinsumDense("abc,cd->abd", (None, 6), bias_axes="d")(x)
    x = layers.TimeDistributed(layers.Dense(4))(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    return model, np.arange(10).reshape(2, 5), lambda m: [*m.layers[1:3], m.layers[3].layer, m.layers[4]]


def images():
    inputs = keras.Input((6, 6, 4))
    model = keras.Model(inputs, layers.Dense(2)(layers.Conv2D(3, 3)(inputs)))
    return model, normal(2, 6, 6, 4), lambda m: m.layers[1:3]


def reversible():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = layers.ReversibleEmbedding(30, 4)
            self.middle = layers.Dense(4)

        def call(self, x):
            return keras.ops.cast(self.table(self.middle(self.table(x)), reverse=True), "float32")

    model, x = Tied(), np.arange(10).reshape(2, 5)
    model(x)
    return model, x, lambda m: [m.table, m.middle]


STRUCTURED = {each.__name__: each for each in (attention, encoder, simple, images, reversible)}


def close(found, expected, tolerance=0.05):  # some roundings to bfloat16
    found, expected = np.asarray(found, "float32"), np.asarray(expected, "float32")
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def enable_lora(chosen):
    for layer in chosen:
        layer.enable_lora(2, lora_alpha=3)
        for weight in layer.trainable_weights:
            weight.assign(weight + 0.1 * normal(*weight.shape))


@pytest.mark.parametrize("name", STRUCTURED)
def test_lora_comes_along_both_ways(name):
    model, x, chosen = STRUCTURED[name]()
    converted = keras_mp.convert(model, "mixed_bfloat16")
    enable_lora(chosen(model))
    for policy in POLICIES:
        with_lora = keras_mp.convert(model, policy)
        assert differences(model, with_lora, converted=policy != "float32") == []
        close(with_lora(x), model(x), 0 if policy == "float32" else 0.05)
        back = keras_mp.convert(with_lora, "float32")
        assert differences(model, back) == []
        np.testing.assert_array_equal(back(x), model(x))
    enable_lora(chosen(converted))
    back = keras_mp.convert(converted, "float32")
    assert differences(converted, back, converted=True) == []
    close(back(x), converted(x))
    assert chosen(back)[0].lora_enabled


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize:UserWarning")
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize("name", STRUCTURED)
def test_quantization_comes_along_both_ways(name, mode):
    model, x, chosen = STRUCTURED[name]()
    if mode not in getattr(chosen(model)[0], "variable_serialization_spec", {"int8"}):
        pytest.skip("Keras does not quantize this layer so")
    converted = keras_mp.convert(model, "mixed_bfloat16")
    model.quantize(mode)
    quantized = [layer.name for layer in model._flatten_layers() if getattr(layer, "_is_quantized", False)]
    assert quantized
    for policy in POLICIES[:2]:
        copy = keras_mp.convert(model, policy)
        assert differences(model, copy, converted=policy != "float32") == []
        close(copy(x), model(x), 0 if policy == "float32" else 0.1)
        back = keras_mp.convert(copy, "float32")
        assert differences(model, back) == []
        np.testing.assert_array_equal(back(x), model(x))
    some = [layer for layer in copy._flatten_layers() if getattr(layer, "_is_quantized", False)]
    assert {layer.dtype_policy.name.partition("_from_")[2] for layer in some} <= {"mixed_bfloat16", "float32"}
    converted.quantize(mode)
    names = [layer.name for layer in converted._flatten_layers() if getattr(layer, "_is_quantized", False)]
    assert names == quantized
    back = keras_mp.convert(converted, "float32")
    assert differences(converted, back, converted=True) == []
    close(back(x), converted(x), 0.1)


def test_gptq_comes_along():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dense(2)])
    config = keras.quantizers.GPTQConfig(dataset=None, tokenizer=None, weight_bits=4, group_size=4)
    for layer in model.layers:
        layer.quantize("gptq", config=config)
        layer.quantized_kernel.assign(np.random.randint(0, 200, layer.quantized_kernel.shape))
        layer.kernel_scale.assign(np.random.uniform(0.1, 0.2, layer.kernel_scale.shape))
        layer.is_gptq_calibrated = True
        del layer._kernel  # as Keras does once it is calibrated
    x = normal(3, 8)
    for policy in POLICIES:
        copy = keras_mp.convert(model, policy)
        assert differences(model, copy, converted=policy != "float32") == []
        close(copy(x), model(x), 0 if policy == "float32" else 0.05)
        np.testing.assert_array_equal(keras_mp.convert(copy, "float32")(x), model(x))


def test_rematerialization_is_kept():
    with keras.RematScope(mode="full"):
        inputs = keras.Input((3, 4))
        x = layers.Dense(4, name="dense")(inputs)
        model = keras.Model(inputs, [x, layers.MultiHeadAttention(2, 4, name="attention")(x, x)])
    x = normal(2, 3, 4)
    for policy in POLICIES:
        converted = keras_mp.convert(model, policy)
        for name in ("dense", "attention"):
            assert converted.get_layer(name)._remat_mode == model.get_layer(name)._remat_mode
        assert converted.get_layer("attention").query_dense._remat_mode is not None
        close(converted(x)[0], model(x)[0])


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


@pytest.mark.parametrize("policy", POLICIES)
def test_a_teacher_is_copied_as_it_is_and_not_tracked(policy):
    class Student(keras.Model):
        def __init__(self, teacher):
            super().__init__()
            self.dense = layers.Dense(3)
            hide(self, "teacher", teacher)
            hide(self, "all", [self.dense, teacher])

        def call(self, x):
            return self.dense(x)

    teacher = keras.Sequential([keras.Input((6,)), layers.LayerNormalization(), layers.Dense(3)])
    x, y = normal(4, 6), normal(4, 3)
    model = Student(teacher)
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    converted = keras_mp.convert(model, policy)
    assert len(converted.weights) == len(model.weights) == 2
    assert converted.teacher is not teacher
    assert converted.all == [converted.dense, converted.teacher]
    assert [type(layer) for layer in converted.teacher.layers] == [type(layer) for layer in teacher.layers]
    np.testing.assert_array_equal(converted.teacher(x), teacher(x))
    converted.fit(x, y, verbose=0)
    assert differences(model, keras_mp.convert(model, policy), converted=policy != "float32") == []
