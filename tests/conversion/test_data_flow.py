"""Numbers that are no 16-bit numbers pass a converted model exactly: ids, times, positions, levels, and the answer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.conversion.casts import Float32Operation
from keras_mp.errors import ConversionError, KerasMPWarning
from tests.helpers.conversions import MIXED, converted, same_function

layers, ops = keras.layers, keras.ops
# All of them are changed by a rounding to 8 or 11 bits.
IDS = np.array([[4099, 301, 2049, 8191]], "float32")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def looked_up(ids):
    return layers.Dense(2)(layers.Flatten()(layers.Embedding(9000, 4)(ids)))


def moved_ids():
    x = layers.Permute((2, 1))(layers.Reshape((4, 1))(inputs := keras.Input((4,))))
    return keras.Model(inputs, looked_up(layers.Lambda(lambda t: t + 0)(x)))


def joined_ids():
    inner = keras.Model(a := keras.Input((2,)), layers.Concatenate()([a, a]))
    x = layers.Reshape((4, 1))(inner(layers.Reshape((2,))(inputs := keras.Input((2,)))))
    x = layers.TimeDistributed(layers.Embedding(9000, 3))(x)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))


def sequential_ids():
    made = [layers.Reshape((2, 2)), layers.Flatten(), layers.Embedding(9000, 4), layers.Flatten(), layers.Dense(2)]
    return keras.Sequential([keras.Input((4,)), *made])


class SplitIds(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.dense = layers.Embedding(9000, 4), layers.Dense(2)
        self.shape, self.numbers = layers.Reshape((2,)), layers.Dense(4)

    def call(self, x):
        rows = ops.reshape(self.embedding(ops.cast(self.shape(x[:, :2]), "int32")), (-1, 8))
        return self.dense(ops.concatenate([rows, self.numbers(x[:, 2:] / 9000)], -1))


class Rounded(layers.Layer):
    """Takes what was computed for ids."""

    def call(self, x):
        return ops.round(x)


def computed_ids():
    x = layers.Dense(4, kernel_initializer="identity")(inputs := keras.Input((4,)))
    return keras.Model(inputs, looked_up(layers.Reshape((4,))(Rounded()(x))))


def called(model, x):
    model(x)
    return model


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize("make", [moved_ids, sequential_ids, computed_ids, lambda: called(SplitIds(), IDS)])
def test_ids_reach_the_place_where_they_are_looked_up(make, policy):
    same_function(make(), IDS, policy)


@pytest.mark.parametrize("policy", MIXED)
def test_ids_pass_nested_models_and_wrappers(policy):
    same_function(joined_ids(), IDS[:, :2], policy)


@pytest.mark.stock_defect
def test_stock_layers_round_ids_on_their_way():
    with keras_mp.policy_scope("mixed_bfloat16"):
        inputs = keras.Input((4,))
        moved = keras.Model(inputs, layers.Reshape((4, 1))(inputs))
    np.testing.assert_array_equal(np.asarray(moved(IDS)).ravel(), IDS.ravel())


class Waves(layers.Layer):
    """A custom layer with weights, whose input is a time."""

    def build(self, shape):
        self.rates = self.add_weight(shape=(1, 8), initializer="ones", name="rates")

    def call(self, time):
        return ops.sin(time * self.rates)


class Product(layers.Layer):
    """A custom layer with weights that only multiplies."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 8), name="kernel")

    def call(self, x):
        return ops.matmul(ops.reshape(x, (-1, x.shape[-1])), self.kernel)


@pytest.mark.parametrize("policy", MIXED)
def test_a_custom_layer_computes_with_times_in_float32_and_multiplies_in_16_bits(policy):
    inputs = keras.Input((1,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8)(Waves(name="waves")(inputs))))
    copy = same_function(model, np.array([[10001], [30003]], "float32"), policy, 0.05)
    assert copy.get_layer("waves").compute_dtype == "float32"
    inputs = keras.Input((4,))
    copy = same_function(keras.Model(inputs, layers.Dense(2)(Product(name="p")(inputs))), normal(3, 4), policy)
    assert copy.get_layer("p").compute_dtype == policy.removeprefix("mixed_")


class Residue(keras.Model):
    """Forecasts by what a series is above its last value."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(8, "relu"), layers.Dense(1)

    def call(self, x):
        last = x[:, -1:]
        return self.out(self.hidden(x - last)) + last


def residue_of_operations():
    inputs = keras.Input((16,))
    return keras.Model(inputs, layers.Dense(1)(inputs - inputs[:, -1:]) + inputs[:, -1:])


def residue_of_layers():
    inputs = keras.Input((16,))
    last = layers.Lambda(lambda x: x[:, -1:])(inputs)
    return keras.Model(inputs, layers.Add()([layers.Dense(1)(layers.Subtract()([inputs, last])), last]))


LEVEL = 20000 + normal(8, 16)


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize("make", [residue_of_operations, residue_of_layers, lambda: called(Residue(), LEVEL)])
def test_a_level_is_taken_off_and_added_in_float32(make, policy):
    model = make()
    copy, said = converted(model, policy)
    assert said == ""
    np.testing.assert_allclose(copy(LEVEL) - LEVEL[:, -1:], model(LEVEL) - LEVEL[:, -1:], atol=0.05)


class Product2(keras.Model):
    """Multiplies 16-bit numbers by a difference of its inputs, in code of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = layers.Dense(16), layers.Dense(16), layers.Dense(1)

    def call(self, x):
        difference = x - x[:, -1:]
        return self.out(self.second(self.first(difference) * difference))


class Recommender(keras.Model):
    """Joins what it has looked up and numbers as they are, in code of its own."""

    def __init__(self):
        super().__init__()
        self.users, self.hidden, self.out = layers.Embedding(9000, 4), layers.Dense(4, "relu"), layers.Dense(1)

    def call(self, x):
        return self.out(self.hidden(tf.concat([self.users(x[:, 0]), tf.math.log1p(x[:, 1:])], -1)))


class Joined(layers.Layer):
    """Is given activations and times, and compares the times."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def call(self, x, times):
        return self.dense(x) * tf.cast(times > 4097.5, x.dtype) + tf.sin(times)


def joined():
    inputs, times = keras.Input((4,)), keras.Input((1,))
    return keras.Model([inputs, times], layers.Dense(2)(Joined()(layers.Dense(4)(inputs), times)))


RATINGS = np.array([[4099, 1e5], [2049, 7e4], [8191, 3]], "float32")


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: called(Product2(), LEVEL), LEVEL),
        (lambda: called(Recommender(), RATINGS), RATINGS),
        (joined, [normal(3, 4), np.array([[4097], [4098], [5001]], "float32")]),
    ],
)
def test_code_that_mixes_inputs_and_activations_runs_in_float32_and_its_layers_in_16_bits(make, x, policy):
    copy = same_function(make(), x, policy)
    dtypes = {layer.compute_dtype for layer in copy._flatten_layers() if isinstance(layer, layers.Dense)}
    assert dtypes == {policy.removeprefix("mixed_")}
    copy.compile(keras_mp.LossScaleOptimizer("sgd", initial_scale=8.0), "mse", jit_compile=True)
    assert np.isfinite(copy.fit(x, np.ones(copy(x).shape), verbose=0).history["loss"][0])


class Positions(layers.Layer):
    def call(self, x):
        position = ops.cast(ops.arange(ops.shape(x)[1]), self.compute_dtype)
        return ops.sin(ops.outer(position, ops.exp(-ops.arange(8, dtype=self.compute_dtype))))


class Encoder(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.positions = layers.Embedding(50, 8), Positions()
        self.hidden, self.out = layers.Dense(8), layers.Dense(2)

    def call(self, ids):
        x = self.embedding(ids)
        return self.out(self.hidden(x + self.positions(x)))


def functional_encoder():
    x = layers.Embedding(50, 8)(inputs := keras.Input((700,), dtype="int32"))
    x = layers.LayerNormalization()(x + Positions(name="positions")(x))
    return keras.Model(inputs, layers.Dense(2)(layers.Dense(8)(x)))


@pytest.mark.parametrize("policy", MIXED)
def test_positions_are_counted_in_float32_and_added_in_16_bits(policy):
    ids = np.arange(700).reshape(1, -1) % 50
    copy = same_function(called(Encoder(), ids), ids, policy)
    assert copy.positions.compute_dtype == "float32"
    assert copy.positions(copy.embedding(ids)).dtype == policy.removeprefix("mixed_")
    copy = same_function(functional_encoder(), ids, policy)
    assert copy.get_layer("positions").compute_dtype == "float32"
    added = next(each for each in copy.operations if isinstance(each, Float32Operation))
    assert added.output.dtype == policy.removeprefix("mixed_")


class Decoded(layers.Layer):
    def call(self, x):
        return ops.cast(x, "float32") * 4.0 + ops.reshape(ops.arange(0, 1024, 16, dtype="float32"), (1, 8, 8, 1))


class Detector(keras.Model):
    def __init__(self):
        super().__init__()
        self.convolution, self.decoded, self.boxes = layers.Conv2D(4, 1), Decoded(), layers.Reshape((64, 4))

    def call(self, x):
        return self.boxes(self.decoded(self.convolution(x)))


@pytest.mark.parametrize("policy", MIXED)
def test_what_stands_behind_the_last_computing_layer_is_not_rounded(policy):
    x = normal(2, 8, 8, 3)
    copy = same_function(called(Detector(), x), x, policy, 1e-3)
    assert copy.convolution.compute_dtype == "float32"
    inputs = keras.Input((16, 16, 3))
    y = layers.Conv2DTranspose(3, 3, name="last")(layers.Conv2D(4, 3, name="first")(inputs))
    copy = same_function(keras.Model(inputs, layers.Activation("tanh")(y)), normal(1, 16, 16, 3), policy)
    dtypes = [copy.get_layer(name).compute_dtype for name in ("first", "last")]
    assert dtypes == [policy.removeprefix("mixed_"), "float32"]


def test_layers_whose_output_computes_on_stay_in_16_bits():
    """A stream of residuals reaches the output, and still computes in 16 bits until its last branch."""
    x = layers.Dense(8)(inputs := keras.Input((8,)))
    for index in range(3):
        y = layers.Dense(8, name=f"branch{index}")(layers.Dense(16, "relu")(x))
        x = layers.Add(name=f"add{index}")([x, y])
    copy = same_function(keras.Model(inputs, x), normal(3, 8), "mixed_bfloat16")
    kinds = [type(copy.get_layer(f"branch{index}")).__name__ for index in range(3)]
    assert kinds == ["Dense", "Dense", "Head"]
    assert [copy.get_layer(f"add{index}").compute_dtype for index in range(3)] == ["bfloat16", "bfloat16", "float32"]


def test_a_pattern_of_the_user_holds():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Conv1D(2, 1, name="last")(layers.Reshape((4, 1), name="first")(inputs)))
    policies = keras_mp.PolicyMap("mixed_bfloat16", {"first": "mixed_bfloat16", "last": "mixed_bfloat16"})
    copy = keras_mp.convert(model, policies)
    assert [copy.get_layer(name).compute_dtype for name in ("first", "last")] == ["bfloat16"] * 2
    assert copy(np.ones((1, 4))).dtype == "float32"


class FailsInTraining(layers.Layer):
    def call(self, x, training=False):
        return x + tf.random.normal(tf.shape(x)) if training else x


class Trained(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.noisy, self.out = layers.Dense(8), FailsInTraining(name="noisy"), layers.Dense(1)

    def call(self, x, training=False):
        return self.out(self.first(self.noisy(self.first(x), training=training)))


@pytest.mark.parametrize("policy", MIXED)
def test_a_layer_that_fails_in_training_alone_is_named(policy):
    x = normal(8, 8)
    model = called(Trained(), x)
    model.compile("sgd", "mse")
    copy, said = converted(model, policy)
    assert "'trained/noisy' is left in float32" in said or "/noisy' is left in float32" in said
    copy.fit(x, normal(8, 1), verbose=0)
    assert keras.config.dtype_policy().name == "float32"


class OnlyFloat32(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense, self.out = layers.Dense(8), layers.Dense(8)

    def call(self, x):
        if self.dense.compute_dtype != "float32":
            raise TypeError("I compute in float32.")
        return self.out(self.dense(x))


def test_a_model_that_would_not_run_is_refused():
    with pytest.raises(ConversionError, match="cannot be converted to 'mixed_float16'.*I compute in float32"):
        converted(called(OnlyFloat32(), normal(2, 8)), "mixed_float16")
    assert keras.config.dtype_policy().name == "float32"


def test_a_16_bit_output_is_named():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding, self.recurrent = layers.Embedding(30, 8), layers.LSTM(8, return_sequences=True)

        def call(self, ids):
            return ops.matmul(self.recurrent(self.embedding(ids)), ops.transpose(self.embedding.embeddings))

    ids = np.arange(12).reshape(2, 6)
    with pytest.warns(KerasMPWarning, match="is still a 16-bit float"):
        keras_mp.convert(called(Tied(), ids), "mixed_bfloat16")
