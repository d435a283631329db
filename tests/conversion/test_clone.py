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
from tests.helpers.conversions import normal
from tests.helpers.state_of import differences

layers = keras.layers
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
Pair = collections.namedtuple("Pair", "first second")


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


def close(found, expected, tolerance=0.05):  # some roundings to bfloat16
    found, expected = np.asarray(found, "float32"), np.asarray(expected, "float32")
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


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
