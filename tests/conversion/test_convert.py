"""Conversion to another policy and back: the same function, weights, classes, names and optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.errors import ConversionError, KerasMPWarning, PolicyError
from tests.helpers.conversions import MIXED, TOLERANCE, Block, normal

layers = keras.layers


class Lazy(layers.Layer):
    """Makes its layer and a weight when it is built."""

    def build(self, input_shape):
        self.dense = layers.Dense(input_shape[-1])
        self.dense.build(input_shape)
        self.shift = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="shift")

    def call(self, x):
        return self.dense(x) + self.shift


class Cell(layers.Layer):
    """A recurrent cell of the user's."""

    def __init__(self, units):
        super().__init__()
        self.units, self.state_size = units, units
        self.dense = layers.Dense(units, "tanh")

    def build(self, input_shape):
        self.dense.build((input_shape[0], input_shape[-1] + self.units))

    def call(self, x, states):
        state = self.dense(keras.ops.concatenate([x, keras.ops.cast(states[0], x.dtype)], -1))
        return state, [state]


class Network(keras.Model):
    """A model that was given a layer, so that Keras cannot make it again from a configuration."""

    def __init__(self, backbone, depth):
        super().__init__()
        self.backbone = backbone
        self.blocks = [Block(8) for _ in range(depth)]
        self.named = {"lazy": Lazy()}
        self.dropout = layers.Dropout(0.1)
        self.answer = layers.Dense(3, "softmax")

    def call(self, x, training=False):
        x = self.backbone(x)
        for block in self.blocks:
            x = block(x)
        return self.answer(self.dropout(self.named["lazy"](x), training=training))


class Encoder(keras.Model):
    """A model made of symbolic tensors by a constructor of its own."""

    def __init__(self, units):
        inputs = keras.Input((4,))
        first = layers.Dense(units, "silu")
        super().__init__(inputs, layers.LayerNormalization()(first(inputs)))
        self.first, self.units = first, units

    def get_config(self):
        return {"units": self.units}


def subclassed():
    backbone = keras.Sequential([keras.Input((5,)), layers.Dense(8, "relu"), layers.BatchNormalization()])
    model = Network(backbone, 2)
    model(normal(2, 5))
    return model, normal(4, 5)


def recurrent():
    x = inputs = keras.Input((6, 4))
    shared = layers.Dense(4, "silu")
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(shared(shared(x)))
    x = layers.TimeDistributed(layers.Dense(4, "tanh"))(x)
    x = layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)
    x = layers.RNN([Cell(3), layers.LSTMCell(4)], return_sequences=True)(x)
    return keras.Model(inputs, layers.Dense(2)(layers.GRU(5)(x) * 2.0 + 1.0)), normal(3, 6, 4)


def images():
    inner = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(4, 3),
            layers.UpSampling2D(interpolation="bilinear"),
            layers.GroupNormalization(2),
        ]
    )
    layered = [keras.Input((8, 8, 3)), inner, layers.SpectralNormalization(layers.Conv2D(2, 3))]
    return keras.Sequential([*layered, layers.Conv2D(2, 1, activation="sigmoid")]), 255 * np.random.rand(
        2, 8, 8, 3
    ).astype("float32")


def inputs_and_outputs():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), dtype="int32", name="b")
    x = layers.Concatenate()([a, layers.Flatten()(layers.Embedding(10, 4)(b))])
    outputs = {
        "p": layers.Dense(2, "softmax", name="p")(x),
        "q": layers.Activation("sigmoid", name="q")(layers.Dense(1)(x)),
        "r": keras.ops.relu(x),
        "s": Block(16)(x),
    }
    return keras.Model({"a": a, "b": b}, outputs), {"a": normal(3, 4), "b": np.arange(9).reshape(3, 3)}


def text():
    lookup = layers.StringLookup()
    lookup.adapt(np.array(["apple", "pear", "plum"]))
    x = inputs = keras.Input((3,), dtype="string")
    x = layers.Embedding(8, 4, mask_zero=True)(lookup(x))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(1)(x)), tf.constant([["apple", "plum", "fig"], ["pear", "", "apple"]])


MODELS = {
    "subclassed": subclassed,
    "recurrent": recurrent,
    "images": images,
    "inputs_and_outputs": inputs_and_outputs,
    "text": text,
    "encoder": lambda: (Encoder(6), normal(3, 4)),
}


def layers_of(model):
    return [layer for layer in model._flatten_layers() if not isinstance(layer, layers.InputLayer)]


def flat(outputs):
    return [np.asarray(output) for output in keras.tree.flatten(outputs)]


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(name, policy, marks=pytest.mark.slow if (name, policy) == ("recurrent", "mixed_float16") else ())
        for name in MODELS
        for policy in MIXED
    ],
)
def test_a_model_converts_computes_the_same_trains_and_returns(name, policy):
    model, x = MODELS[name]()
    for weight in model.trainable_weights:  # zeros, as biases are at first, would not show a weight that was left out
        weight.assign(weight + 0.1 * normal(*weight.shape))
    before = [np.asarray(weight) for weight in model.weights]
    expected = model(x)
    mixed = keras_mp.convert(model, policy)

    assert type(mixed) is type(model)
    assert mixed.name == model.name
    assert any(layer.compute_dtype == policy.removeprefix("mixed_") for layer in layers_of(mixed))
    assert {weight.dtype for weight in mixed.weights if weight.dtype != "int32"} == {"float32"}
    for ours, theirs in zip(mixed.weights, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for answer, right in zip(keras.tree.flatten(mixed(x)), flat(expected), strict=True):
        assert answer.dtype == "float32"
        np.testing.assert_allclose(answer, right, atol=TOLERANCE[policy] * np.abs(right).max())

    back = keras_mp.convert(mixed, "float32")
    assert [type(layer) for layer in layers_of(back)] == [type(layer) for layer in layers_of(model)]
    assert [layer.name for layer in back.layers] == [layer.name for layer in model.layers]
    assert [weight.path for weight in back.weights] == [weight.path for weight in model.weights]
    for ours, right in zip(flat(back(x)), flat(expected), strict=True):
        np.testing.assert_array_equal(ours, right)

    mixed.compile(keras_mp.LossScaleOptimizer("sgd", initial_scale=256.0), loss="mse", jit_compile=False)
    mixed.fit(x, keras.tree.map_structure(lambda y: np.ones(y.shape, "float32"), expected), verbose=0)
    assert not bool(mixed.optimizer.last_step_skipped)
    moved = [not np.array_equal(ours, theirs) for ours, theirs in zip(mixed.trainable_weights, before, strict=False)]
    assert any(moved)
    for ours, theirs in zip(model.weights, before, strict=True):  # the model itself has not been touched
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("images", "mixed_bfloat16"),
        pytest.param("recurrent", "mixed_float16", marks=pytest.mark.slow),
        pytest.param("images", "mixed_float16", marks=pytest.mark.slow),
        pytest.param("recurrent", "mixed_bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_converted_model_trains_compiled_by_xla(name, policy):
    model, x = MODELS[name]()
    losses = []
    for jit_compile in (False, True):
        mixed = keras_mp.convert(model, policy)
        mixed.compile(keras_mp.LossScaleOptimizer("sgd", initial_scale=256.0), loss="mse", jit_compile=jit_compile)
        y = np.ones((len(x), *mixed.output_shape[1:]), "float32")
        history = mixed.fit(x, y, epochs=3, verbose=0)
        losses.append(history.history["loss"])
    # XLA rounds elsewhere than TensorFlow's own kernels, in 16 bits.
    np.testing.assert_allclose(losses[1], losses[0], rtol=TOLERANCE[policy])


def test_delicate_layers_become_ours_and_the_last_one_answers_in_float32():
    model, _ = images()
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    found = {layer.name.rstrip("_0123456789"): layer for layer in layers_of(mixed)}
    assert type(found["group_normalization"]) is keras_mp.layers.GroupNormalization
    assert type(found["up_sampling2d"]) is keras_mp.layers.UpSampling2D
    assert type(found["spectral_normalization"]) is keras_mp.layers.SpectralNormalization
    assert found["rescaling"].compute_dtype == "float32"
    assert mixed.layers[-1].compute_dtype == "float32"
    mixed, _ = recurrent()
    mixed = keras_mp.convert(mixed, "mixed_float16")
    kinds = {type(layer) for layer in layers_of(mixed)}
    ours = keras_mp.layers
    assert {ours.LSTM, ours.LSTMCell, ours.GRU, ours.RNN, ours.MultiHeadAttention, ours.Head} <= kinds
    dense = next(layer for layer in mixed.layers if getattr(layer, "activation", None) is keras_mp.activations.silu)
    assert type(dense) is keras_mp.layers.Dense


def test_shared_layers_stay_shared():
    model, _ = recurrent()
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert len(mixed.weights) == len(model.weights)
    encoder = keras_mp.convert(Encoder(3), "mixed_bfloat16")
    assert encoder.first is encoder.layers[1]
    network = keras_mp.convert(subclassed()[0], "mixed_bfloat16")
    assert network.blocks[0].inner.__closure__[0].cell_contents is network.blocks[0]


def test_the_model_trains_on_from_where_it_was():
    """Bit for bit: there and back again, and the two take the same steps."""
    model, x = images()
    y = np.random.rand(*model(x).shape).astype("float32")
    model.compile(keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(1e-2, 2, 0.5)), "mse")
    model.fit(x, y, epochs=3, verbose=0)
    for policy in MIXED:
        mixed = keras_mp.convert(model, policy)
        inner = mixed.optimizer.inner_optimizer if policy == "mixed_float16" else mixed.optimizer
        assert type(inner) is keras.optimizers.AdamW
        for ours, theirs in zip(inner.variables, model.optimizer.variables, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        back = keras_mp.convert(mixed, "float32")
        assert int(back.optimizer.iterations) == 3
        twin = keras_mp.convert(model, "float32")
        for each in (back, twin):
            each.fit(x, y, epochs=2, verbose=0)
        for ours, theirs in zip(back.variables, twin.variables, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert not np.array_equal(back.weights[0], model.weights[0])


def small(dtype=None, **compiled):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, dtype=dtype), layers.Dense(1)], name="small")
    if compiled:
        model.compile(loss="mse", **compiled)
    return model


def test_frozen_layers_stay_frozen_and_variables_keep_their_paths():
    model, _ = images()
    model.layers[0].trainable = False
    model.layers[0].layers[1].bias.trainable = False
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert [v.path for v in mixed.trainable_variables] == [v.path for v in model.trainable_variables]
    assert [v.path for v in mixed.variables] == [v.path for v in model.variables]


def test_dropout_draws_the_same_masks():
    model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5)])
    model(np.ones((1, 64)), training=True)
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    x = np.ones((2, 64), "float32")
    np.testing.assert_array_equal(mixed(x, training=True), model(x, training=True))


def test_a_policy_map_decides_layer_by_layer_and_tells_of_patterns_that_match_nothing():
    model, x = recurrent()
    policies = keras_mp.PolicyMap("mixed_bfloat16", {"gru.*": "float32", "lstmm": "float32"})
    with pytest.warns(KerasMPWarning, match="'lstmm' matches no layer"):
        mixed = keras_mp.convert(model, policies)
    dtypes = {layer.name: layer.compute_dtype for layer in layers_of(mixed)}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("gru")} == {"float32"}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("forward_lstm")} == {"bfloat16"}
    assert mixed(x).dtype == "float32"


def test_a_converted_model_comes_back_from_its_file(tmp_path):
    a = keras.Input((4,))
    outputs = [layers.Dense(2, "gelu")(a), keras.ops.relu(layers.LayerNormalization()(a))]
    model = keras.Model(a, outputs)
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    mixed.save(tmp_path / "mixed.keras")
    loaded = keras.saving.load_model(tmp_path / "mixed.keras")
    x = normal(3, 4)
    for ours, theirs in zip(loaded(x), mixed(x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == "float32"
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in mixed.layers]


def test_a_model_that_is_not_built_converts():
    model = keras.Sequential([layers.Dense(3), layers.LayerNormalization(), layers.Dense(2)])
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert not mixed.built
    assert mixed(normal(2, 4)).dtype == "float32"
    assert type(mixed.layers[1]) is keras_mp.layers.LayerNormalization


def test_auto_is_what_the_hardware_is_good_at():
    mixed = keras_mp.convert(small(), "auto")
    assert mixed.layers[0].dtype_policy.name == keras_mp.detect().recommended_policy


def test_two_replicas_train_a_converted_model(mirrored):
    strategy = mirrored(2)
    x, y = normal(8, 4), normal(8, 1)
    one = keras_mp.convert(small(optimizer="sgd"), "mixed_bfloat16")
    with strategy.scope():
        model = small(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
        model.set_weights(one.get_weights())
        mixed = keras_mp.convert(model, "mixed_bfloat16")
    mixed.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert int(mixed.optimizer.iterations.numpy()) == 2
    back = keras_mp.convert(mixed, "float32")
    for ours, theirs in zip(back.optimizer.variables, mixed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ConversionError, match=r"takes a keras.Model.*Dense"):
        keras_mp.convert(layers.Dense(3), "mixed_bfloat16")
    with pytest.raises(PolicyError, match='Did you mean "mixed_bfloat16"'):
        keras_mp.convert(small(), "mixed_bf16")

    class Fails(keras.Model):
        def __init__(self):
            inputs = keras.Input((4,))
            super().__init__(inputs, Odd()(inputs))

    class Odd(layers.Layer):
        def __init__(self):
            super().__init__()
            self.times = 0

        def build(self, input_shape):
            self.first = self.add_weight(shape=(4,))
            self.built = True

        def call(self, x):
            self.times += 1
            if self.times > 1:
                raise RuntimeError("not twice")
            return x * self.first

    model = Fails()
    with pytest.raises(ConversionError, match="cannot be converted to 'mixed_bfloat16'.*not twice"):
        keras_mp.convert(model, "mixed_bfloat16")


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_states_of_recurrent_layers_come_along_and_stay_out_of_files(kind, policy, tmp_path):
    inputs = keras.Input(batch_shape=(3, 5, 4))
    model = keras.Model(inputs, layers.Dense(2)(getattr(layers, kind)(3, stateful=True)(inputs)))
    model(normal(3, 5, 4))
    converted = keras_mp.convert(model, policy)
    assert [weight.path for weight in converted.weights] == [weight.path for weight in model.weights]
    for mine, theirs in zip(converted.layers[1].states, model.layers[1].states, strict=True):
        assert np.any(theirs.numpy() != 0)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE.get(policy, 0))
    given = normal(3, 5, 4)
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.layers[1].reset_state()
    converted.layers[1].reset_state()
    model.layers[1].reset_state()
    np.testing.assert_array_equal(loaded(given), converted(given))
    converted.layers[1].reset_state()
    np.testing.assert_allclose(converted(given), model(given), rtol=0, atol=TOLERANCE.get(policy, 0))


def test_layers_of_one_name_all_convert():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (layers.Dense(4, name="same") for _ in range(3))

        def call(self, x):
            return self.c(self.b(self.a(x)))

    model = Twins()
    model(normal(2, 4))
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    assert [layer.compute_dtype for layer in (mixed.a, mixed.b, mixed.c)] == ["bfloat16"] * 3
    assert [type(layer).__name__ for layer in (mixed.a, mixed.b, mixed.c)] == ["Dense", "Dense", "Head"]
