"""Files of converted models: each layer comes back as it was saved, whoever makes it, and weights fit both models."""

import pickle
import warnings

import keras
import numpy as np
import pytest

import keras_mp
from keras_mp import layers
from keras_mp._compat import keras_files
from keras_mp.conversion.convert import duplicate
from keras_mp.conversion.layer_record import record_of
from keras_mp.conversion.twins import STOCK
from keras_mp.errors import ConversionError, KerasMPWarning
from tests.golden import make_files

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*computes in float16, and:keras_mp.errors.KerasMPWarning"),
    pytest.mark.filterwarnings("ignore:Model's `__init__\\(\\)` arguments contain non-serializable:UserWarning"),
]

X = make_files.X
LOADERS = [keras_mp.load_model, keras.saving.load_model]


@keras.saving.register_keras_serializable(package="test_layer_record")
class Block(keras.layers.Layer):
    """Makes layers of many kinds in its own code, and has no configuration that tells of them."""

    def __init__(self, units=6, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.attention = keras.layers.MultiHeadAttention(2, 3)
        self.rest = [keras.layers.LayerNormalization(), keras.layers.Dense(units, "gelu", activity_regularizer="l2")]
        self.by_name = {
            "rnn": keras.layers.LSTM(units, return_sequences=True),
            "norm": keras.layers.BatchNormalization(),
        }

    def build(self, shape):
        self.attention.build(shape, shape)
        for layer in [*self.rest, *self.by_name.values()]:
            layer.build(shape)

    def call(self, x):
        """The sequence of the same shape."""
        x = self.attention(x, x) + self.rest[1](self.rest[0](x))
        return self.by_name["norm"](self.by_name["rnn"](x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="test_layer_record")
class OfBlocks(keras.Model):
    """A model whose layers stand in attributes, lists and dictionaries, before and behind its own ones in the file."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a = keras.layers.Dense(6, "softmax", name="a")
        self.blocks = [Block(), Block()]
        self.z = keras.layers.Dense(3, name="z")

    def call(self, x):
        """Three numbers a row."""
        x = self.a(x)[:, None, :] * keras.ops.ones((1, 2, 1), x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.z(x[:, -1])


def in_a_graph():
    x = keras.Input((6,))
    y = Block()(keras.layers.RepeatVector(2)(x))
    return keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(y)))


def of_blocks():
    model = OfBlocks()
    model(X)
    return model


MODELS = {**make_files.MODELS, "in_a_graph": in_a_graph, "of_blocks": of_blocks}


def outputs(model):
    return [np.asarray(each) for each in keras.tree.flatten(model(X))]


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    for one, other in zip(outputs(ours), outputs(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
    assert what_they_are(ours) == what_they_are(theirs)


def what_they_are(model):
    """Of each layer, the class, policy, functions and penalty, by its place in the model."""
    return {
        address: (
            type(layer),
            layer.dtype_policy.name,
            getattr(layer, "activation", None),
            type(layer.activity_regularizer),
            layer.trainable,
        )
        for address, layer in keras_files.layers_by_address(model).items()
    }


@pytest.mark.parametrize(
    ("name", "policy", "load"),
    [
        pytest.param(
            name,
            policy,
            load,
            id=f"{name}-{policy}-{by}",
            marks=() if (number + other) % 2 == (by == "stock") else pytest.mark.slow,
        )
        for number, name in enumerate(MODELS)
        for other, policy in enumerate(("mixed_bfloat16", "mixed_float16", "float32"))
        for by, load in zip(("ours", "stock"), LOADERS, strict=True)
    ],
)
def test_a_converted_model_comes_back_as_it_was(tmp_path, name, policy, load):
    model = keras_mp.convert(MODELS[name](), policy)
    model.save(tmp_path / "model.keras")
    keras.layers.Dense(1)  # names that are made go on from here
    with keras_mp.policy_scope("mixed_bfloat16" if policy == "float32" else "float32"):
        assert_same(load(tmp_path / "model.keras"), model)


@pytest.mark.parametrize("load", LOADERS, ids=["ours", "stock"])
def test_it_comes_back_with_its_optimizer(tmp_path, load):
    model = keras_mp.convert(make_files.subclassed(), "mixed_float16")
    optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.AdamW(1e-2), initial_scale=64.0)
    model.first.trainable = False
    model.compile(optimizer, "mse", jit_compile=False)
    y = np.ones((4, 5))
    model.fit(X, y, batch_size=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras")
    assert_same(loaded, model)
    assert type(loaded.optimizer) is keras_mp.LossScaleOptimizer
    assert type(loaded.optimizer.inner_optimizer) is keras.optimizers.AdamW
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for each in (model, loaded):
        each.fit(X, y, batch_size=2, shuffle=False, verbose=0)
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_second_file_and_a_copy_say_the_same(tmp_path):
    model = keras_mp.convert(of_blocks(), "mixed_bfloat16")
    model.save(tmp_path / "first.keras")
    again = keras_mp.load_model(tmp_path / "first.keras")
    assert record_of(again) == record_of(model) == record_of(duplicate(model))
    again.save(tmp_path / "second.keras")
    assert_same(keras_mp.load_model(tmp_path / "second.keras"), model)
    back = keras_mp.convert(again, "float32")
    assert record_of(back)["converted_to"]["config"] == {"name": "float32"}


def test_what_was_changed_after_the_conversion_stays_changed(tmp_path):
    model = keras_mp.convert(of_blocks(), keras_mp.PolicyMap("mixed_bfloat16", {".*/z": "float32"}))
    model.blocks[0].by_name["norm"].dtype_policy = "float32"
    model.save(tmp_path / "model.keras")
    loaded = keras_mp.load_model(tmp_path / "model.keras")
    assert_same(loaded, model)
    assert loaded.z.compute_dtype == loaded.blocks[0].by_name["norm"].compute_dtype == "float32"
    assert loaded.blocks[1].by_name["norm"].compute_dtype == "bfloat16"


def test_a_converted_part_of_another_model_comes_back(tmp_path):
    x = keras.Input((6,))
    part = keras_mp.convert(of_blocks(), "mixed_bfloat16")
    model = keras.Model(x, keras.layers.Dense(2)(part(x)))
    model.save(tmp_path / "model.keras")
    assert_same(keras_mp.load_model(tmp_path / "model.keras"), model)


def test_a_pickle_and_a_folder_say_it_too(tmp_path):
    model = keras_mp.convert(of_blocks(), "mixed_bfloat16")
    assert_same(pickle.loads(pickle.dumps(model)), model)
    keras.saving.save_model(model, tmp_path / "folder", zipped=False)
    for load in LOADERS:
        assert_same(load(tmp_path / "folder"), model)


def test_without_anything_of_ours_files_are_what_they_were():
    assert record_of(of_blocks()) is None


def test_a_layer_that_cannot_be_made_as_it_was_is_named(tmp_path, monkeypatch):
    keras_mp.convert(of_blocks(), "mixed_bfloat16").save(tmp_path / "model.keras")
    original = OfBlocks.__init__

    def with_another(self, **kwargs):
        original(self, **kwargs)
        self.more = keras.layers.Dense(1)

    monkeypatch.setattr(OfBlocks, "__init__", with_another)
    with pytest.warns(
        KerasMPWarning, match=r"'/layers/dense_2' of 'of_blocks.*' is not as it was saved.*load_weights\(path\)"
    ):
        keras_mp.load_model(tmp_path / "model.keras")


def test_no_file_puts_a_layer_of_another_kind_in(tmp_path, monkeypatch):
    keras_mp.convert(of_blocks(), "mixed_bfloat16").save(tmp_path / "model.keras")
    original = OfBlocks.__init__

    def with_another(self, **kwargs):
        original(self, **kwargs)
        self.a = keras.layers.EinsumDense("ab,bc->ac", 6, bias_axes="c", name="a")  # of the same weights

    monkeypatch.setattr(OfBlocks, "__init__", with_another)
    with pytest.raises(ConversionError, match="has a layer of class 'keras_mp>Dense' where .* makes a EinsumDense"):
        keras_mp.load_model(tmp_path / "model.keras")


def h5_paths(path):
    import h5py

    with h5py.File(path) as file:
        names = []
        file.visit(names.append)
    return {name for name in names if "output_cast" not in name}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_files_fit_the_model_and_the_original(tmp_path, name, policy):
    model, mixed = MODELS[name](), keras_mp.convert(MODELS[name](), policy)
    before = outputs(model)
    model.save_weights(tmp_path / "model.weights.h5")
    mixed.save_weights(tmp_path / "mixed.weights.h5")
    assert h5_paths(tmp_path / "model.weights.h5") == h5_paths(tmp_path / "mixed.weights.h5")
    mixed.load_weights(tmp_path / "model.weights.h5")
    for ours, theirs in zip(mixed.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    mixed.save(tmp_path / "mixed.keras")
    other = MODELS[name]()
    other.load_weights(tmp_path / "mixed.keras")
    for one, two in zip(outputs(other), before, strict=True):
        np.testing.assert_array_equal(one, two)


def test_sharded_weights_fit_both_models(tmp_path):
    model, mixed = make_files.functional(), keras_mp.convert(make_files.functional(), "mixed_bfloat16")
    mixed.save_weights(tmp_path / "mixed.weights.json", max_shard_size=0.0000003)
    model.load_weights(tmp_path / "mixed.weights.json")
    for ours, theirs in zip(mixed.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_class_of_the_users_may_be_called_head(tmp_path):
    head = type("Head", (keras.layers.Dense,), {})

    def make():
        x = keras.Input((6,))
        kinds = [layers.Head(4), head(4), keras.layers.Dense(4), layers.Head(4), head(4)]
        return keras.Model(x, [layer(x) for layer in kinds])

    one, other = make(), make()
    one.save_weights(tmp_path / "one.weights.h5")
    other.load_weights(tmp_path / "one.weights.h5")
    for ours, theirs in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_old_h5_files_fit_both_models(tmp_path):
    model, mixed = make_files.functional(), keras_mp.convert(make_files.functional(), "mixed_bfloat16")
    mixed.save(tmp_path / "mixed.h5")
    model.load_weights(tmp_path / "mixed.h5")
    loaded = keras.saving.load_model(tmp_path / "mixed.h5", compile=False)
    for one, other in zip(outputs(loaded), outputs(mixed), strict=True):
        np.testing.assert_array_equal(one, other)
    model.save(tmp_path / "model.h5")
    keras_mp.convert(make_files.functional(), "mixed_bfloat16").load_weights(tmp_path / "model.h5")
    for ours, theirs in zip(mixed.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_other_twin_is_called_otherwise_than_the_layer_that_it_is_for():
    assert {ours for ours, stock in STOCK.items() if ours.__name__ != stock.__name__} == {layers.Head}


@pytest.mark.parametrize("name", make_files.MODELS)
def test_files_of_version_0_1_still_load(name):
    wanted = list(np.load(make_files.FOLDER / f"{name}.npz").values())
    loaded = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # which is how Keras says that it left something out
        # That version could not load the subclassed one either, with layers in a list. Keras 3.15 wrote them all, in
        # a form that Keras 3.13 does not read.
        if name != "subclassed" and keras.version() >= "3.15":
            loaded = [load(make_files.FOLDER / f"{name}.keras") for load in LOADERS]
    for model in loaded:
        assert type(model.optimizer) is keras_mp.LossScaleOptimizer
        assert int(model.optimizer.iterations) == 2
    model = make_files.converted(name)
    model.load_weights(make_files.FOLDER / f"{name}.weights.h5")
    for each in [*loaded, model]:
        for ours, theirs in zip(keras.tree.flatten(each.predict(X, verbose=0)), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.03)  # numbers up to 2.4 in bfloat16, by another CPU


def hub_models():
    models = pytest.importorskip("keras_hub").models
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    ids, ones = np.arange(8).reshape(2, 4), np.ones((2, 4), int)
    both = {
        f"{part}_{name}": x
        for part in ("encoder", "decoder")
        for name, x in (("token_ids", ids), ("padding_mask", ones))
    }
    return {
        "bert": lambda: (
            models.BertTextClassifier(models.BertBackbone(9, max_sequence_length=4, **sizes), num_classes=3),
            {"token_ids": ids, "segment_ids": ids * 0, "padding_mask": ones},
            np.array([0, 2]),
        ),
        "gpt2": lambda: (
            models.GPT2CausalLM(models.GPT2Backbone(9, max_sequence_length=4, **sizes), preprocessor=None),
            {"token_ids": ids, "padding_mask": ones},
            ids,
        ),
        "t5": lambda: (models.T5Backbone(9, **sizes), both, None),
        "bart": lambda: (models.BartSeq2SeqLM(models.BartBackbone(9, max_sequence_length=4, **sizes)), both, ids),
    }


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart"])
def test_models_of_keras_hub_come_back_with_their_optimizers(tmp_path, name, policy):
    model, x, y = hub_models()[name]()
    model = keras_mp.convert(model, policy)
    if y is not None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.AdamW(1e-2)), loss, jit_compile=False)
        model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    for load in LOADERS:
        loaded = load(tmp_path / "model.keras")
        assert what_they_are(loaded) == what_they_are(model)
        for ours, theirs in zip(
            *(keras.tree.flatten(each.predict(x, verbose=0)) for each in (loaded, model)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        if y is not None:
            assert type(loaded.optimizer.inner_optimizer) is keras.optimizers.AdamW
            for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
                np.testing.assert_array_equal(ours, theirs)


@keras.saving.register_keras_serializable("test_layer_record")
class Positions(keras.layers.Layer):
    def call(self, x):
        position = keras.ops.cast(keras.ops.arange(keras.ops.shape(x)[1]), self.compute_dtype)
        return keras.ops.sin(keras.ops.outer(position, keras.ops.exp(-keras.ops.arange(8, dtype=self.compute_dtype))))


@keras.saving.register_keras_serializable("test_layer_record")
class Encoder(keras.Model):
    """Counts, and adds a loss, in code of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding, self.positions = keras.layers.Embedding(50, 8), Positions()
        self.out = keras.layers.Dense(2)

    def call(self, ids):
        x = self.embedding(ids)
        self.add_loss(keras.ops.mean(x**2))
        return self.out(x + self.positions(x))


@pytest.mark.parametrize("load", [keras_mp.load_model, keras.saving.load_model])
def test_casts_around_layers_come_back(load, tmp_path):
    ids = np.arange(700).reshape(1, -1) % 50
    model = Encoder()
    model(ids)
    mixed = keras_mp.convert(model, "mixed_bfloat16")
    mixed.save(tmp_path / "model.keras")
    loaded = load(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(ids), mixed(ids))
    assert loaded.positions.compute_dtype == "float32"
    assert loaded.positions(loaded.embedding(ids)).dtype == "bfloat16"
    assert [loss.dtype for loss in loaded.losses] == ["float32"]
