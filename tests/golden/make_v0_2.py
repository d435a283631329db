"""Writes tests/golden/v0_2, which later versions must go on reading: `python -m tests.golden.make_v0_2`.

These are files of the build of version 0.2.0 whose modules lay flat, made by this script. Together they hold every
class and function that was registered under `keras_mp`. Run it again only for a new folder beside this one.
"""

import json
import pathlib
import shutil
import warnings

import keras
import numpy as np
import tensorflow as tf

import keras_mp
from keras_mp import layers

FOLDER = pathlib.Path(__file__).parent / "v0_2"
EXPORTED = ("classes", "several")
ROWS = 5  # keras.ops.add takes a column as long as a row for a bias, so not four
stock, ops = keras.layers, keras.ops


def images():
    """Makes a model of 2D layers, in bfloat16."""
    x = keras.Input((8, 8, 2))
    h = layers.Resizing(6, 6)(x)
    h = layers.Conv2D(2, 3, padding="same")(h)
    h = layers.BatchNormalization()(h)
    h = layers.PReLU(shared_axes=[1, 2])(h)
    h = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(h)
    h = layers.GroupNormalization(2)(h)
    h = layers.SeparableConv2D(2, 2)(h)
    h = layers.SpatialDropout2D(0.2)(h)
    h = layers.MaxPooling2D(2)(layers.UpSampling2D(2)(h))
    h = layers.Conv2DTranspose(2, 2, use_bias=False)(layers.AveragePooling2D(2)(h))
    h = layers.SpectralNormalization(layers.Conv2D(2, 2, use_bias=False))(h)
    h = stock.Reshape((1, 2, 2, 2))(h)
    h = layers.ConvLSTM2D(2, 1)(h)
    return keras.Model(x, layers.Head(2)(layers.GlobalAveragePooling2D()(h)))


def volumes():
    """Makes a model of 3D layers, in bfloat16."""
    x = keras.Input((4, 4, 4, 2))
    h = layers.Conv3D(2, 2)(x)
    h = layers.Conv3DTranspose(2, 2, use_bias=False)(h)
    h = layers.SpatialDropout3D(0.2)(layers.UpSampling3D(2)(h))
    h = layers.AveragePooling3D(2)(layers.MaxPooling3D(2)(h))
    h = layers.ConvLSTM3D(2, 1)(stock.Reshape((1, 2, 2, 2, 2))(h))
    return keras.Model(x, layers.Head(2)(layers.GlobalAveragePooling3D()(h)))


def sequences():
    """Makes a model of recurrent and 1D layers, in float16."""
    x = keras.Input((6, 3))
    masked = layers.GlobalAveragePooling1D()(layers.Masking()(x))
    h = layers.LSTM(3, return_sequences=True)(x)
    h = layers.GRU(3, return_sequences=True)(h)
    h = layers.SimpleRNN(3, return_sequences=True)(h)
    cells = layers.StackedRNNCells([layers.LSTMCell(2), layers.GRUCell(2), layers.SimpleRNNCell(2)])
    h = layers.RNN(cells, return_sequences=True)(h)
    h = layers.Conv1D(2, 2, padding="causal")(h)
    h = layers.Conv1DTranspose(2, 2, use_bias=False)(layers.DepthwiseConv1D(2, use_bias=False)(h))
    h = layers.SpatialDropout1D(0.2)(layers.SeparableConv1D(2, 2)(h))
    h = layers.AveragePooling1D(1)(layers.MaxPooling1D(2)(layers.UpSampling1D(2)(h)))
    h = layers.ConvLSTM1D(2, 1, return_sequences=True)(stock.Reshape((1, 5, 2))(h))
    h = layers.GlobalAveragePooling1D()(stock.Reshape((5, 2))(h))
    return keras.Model(x, layers.Head(2)(stock.Concatenate()([h, masked])))


def attention():
    """Makes a model of attention, normalization, lookups, noise and activations, in bfloat16."""
    x = keras.Input((4,), dtype="int32")
    embedding = layers.ReversibleEmbedding(9, 4)
    h = stock.Add()([embedding(x), layers.Embedding(9, 4)(x)])
    h = layers.Normalization(mean=0.5, variance=2.0)(h)
    h = layers.MultiHeadAttention(2, 2, use_bias=False)(h, h)
    h = layers.LayerNormalization()(h)
    h = layers.GroupedQueryAttention(2, 2, 1, use_bias=False)(h, h)
    h = layers.RMSNormalization()(h)
    h = layers.Average()([layers.Attention()([h, h]), layers.AdditiveAttention()([h, h])])
    h = layers.EinsumDense("abc,cd->abd", (None, 4), activation=keras_mp.activations.silu)(h)
    h = layers.AlphaDropout(0.1)(layers.Dropout(0.1)(layers.UnitNormalization()(h)))
    h = layers.GaussianNoise(0.1)(layers.GaussianDropout(0.1)(h))
    h = layers.Dense(4, activation=keras_mp.activations.mish)(h)
    h = keras_mp.activations.gelu(h)
    h = stock.Activation(keras_mp.activations.hard_silu)(h)
    logits = embedding(h, reverse=True)
    h = layers.Float32(stock.Dense(4, activation=keras_mp.activations.log_softmax))(h)
    h = layers.Softmax()(layers.Dot(2)([h, h]))
    h = layers.RepeatVector(2)(stock.Reshape((16,))(h))
    return keras.Model(x, [layers.Head(2, activation=keras_mp.activations.softmax)(h), logits])


def graph():
    """Makes a converted model with all that `convert` inserts, under a map of policies."""
    x, ids = keras.Input((4,), name="x"), keras.Input((2,), name="ids")
    h = stock.Dense(4, "gelu", activity_regularizer="l2", name="first")(x)
    inner = keras.Model(a := keras.Input((2,)), stock.Concatenate(name="twice")([a, a]), name="inner")
    moved = stock.Reshape((4, 1), name="moved")(inner(ids))
    rows = stock.TimeDistributed(stock.Embedding(9, 3), name="rows")(moved)
    h = ops.add(h, ops.mean(ops.exp(h), -1, keepdims=True))
    h = stock.Dense(4, name="second")(stock.Concatenate(name="all")([h, stock.Flatten(name="flat")(rows)]))
    attended, scores = stock.MultiHeadAttention(1, 2, use_bias=False, name="attention")(
        (s := stock.Reshape((2, 2), name="split")(h)), s, return_attention_scores=True
    )
    model = keras.Model({"x": x, "ids": ids}, {"attended": attended, "scores": scores}, name="graph")
    return keras_mp.convert(model, keras_mp.PolicyMap("mixed_bfloat16", {"first": "mixed_float16"}))


def classes():
    """Makes a `keras_mp.Model` with one output."""
    x = keras.Input((3,))
    return keras_mp.Model(
        x, layers.Head(3, activation="softmax")(layers.Dense(3, "relu", activity_regularizer="l2")(x))
    )


@keras.saving.register_keras_serializable(package="golden")
class Trained(keras_mp.Model):
    """A subclass of `keras_mp.Model`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.head = layers.Dense(3, "relu"), layers.Head(3)

    def call(self, x):
        """Returns the logits."""
        return self.head(self.hidden(x))


def subclassed():
    """Makes and builds the subclass."""
    model = Trained()
    model(np.zeros((2, 3), "float32"))
    return model


def several():
    """Makes a model with two outputs, for two losses in one file."""
    x = keras.Input((3,))
    return keras_mp.Model(x, {"yes": layers.Head(1, name="yes")(x), "kind": layers.Head(3, name="kind")(x)})


# By name: the function, the policy, the shapes of its inputs, and its losses where it is compiled.
MODELS = {
    "images": (images, "mixed_bfloat16", (8, 8, 2), None),
    "volumes": (volumes, "mixed_bfloat16", (4, 4, 4, 2), None),
    "sequences": (sequences, "mixed_float16", (6, 3), None),
    "attention": (attention, "mixed_bfloat16", (4,), None),
    "graph": (graph, "float32", {"x": (4,), "ids": (2,)}, None),
    "classes": (classes, "mixed_float16", (3,), lambda: keras_mp.losses.SparseCategoricalCrossentropy()),
    "subclassed": (subclassed, "mixed_bfloat16", (3,), lambda: "mse"),
    "several": (
        several,
        "mixed_bfloat16",
        (3,),
        lambda: {
            "yes": keras_mp.losses.BinaryCrossentropy(from_logits=True),
            "kind": keras_mp.losses.CategoricalCrossentropy(from_logits=True),
        },
    ),
}


def inputs(name):
    """Returns rows of each input: whole numbers for `attention` and for ids."""
    rng = np.random.default_rng(1)
    shapes = MODELS[name][2]

    def rows(key, shape):
        if name == "attention" or key == "ids":
            return rng.integers(0, 9, (ROWS, *shape)).astype("int32" if name == "attention" else "float32")
        return rng.normal(size=(ROWS, *shape)).astype("float32")

    return {key: rows(key, shape) for key, shape in shapes.items()} if isinstance(shapes, dict) else rows("", shapes)


def make(name):
    """Makes a new model, which takes the file of weights."""
    build, policy, _, _ = MODELS[name]
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build()
    finally:
        keras.config.set_dtype_policy(before)


def flat(outputs):
    """Returns the outputs as a list of arrays, in the order of their names."""
    return [np.asarray(each) for each in keras.tree.flatten(outputs)]


def registered():
    """Returns the names registered under keras_mp, without twins of KerasHub's classes."""
    names = (
        name.removeprefix("keras_mp>") for name in keras.saving.get_custom_objects() if name.startswith("keras_mp>")
    )
    return sorted(name for name in names if not name.startswith("KerasHub"))


def _randomized(model):
    rng = np.random.default_rng(2)
    for weight in model.weights:
        if weight.dtype.startswith(("float", "bf")):
            positive = len(weight.shape) < 2 and weight.name != "bias"
            weight.assign(rng.uniform(0.5, 1.5, weight.shape) if positive else rng.normal(0.0, 0.5, weight.shape))


def _trained(model, name, x, loss):
    model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.01, 0.9)), loss, jit_compile=False)
    rng = np.random.default_rng(3)
    kind = rng.integers(0, 3, ROWS)
    one_hot = np.eye(3, dtype="float32")[kind]
    y = {"classes": kind, "subclassed": one_hot, "several": {"yes": one_hot[:, :1], "kind": one_hot}}[name]
    model.fit(x, y, batch_size=2, verbose=0)


def main() -> None:
    """Writes each model, its weights and its outputs, exports two, and lists the registered names."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    keras.utils.set_random_seed(7)
    tf.config.optimizer.set_experimental_options({"remapping": False})
    for name, (_, _, _, loss) in MODELS.items():
        model, x = make(name), inputs(name)
        _randomized(model)
        if loss is not None:
            _trained(model, name, x, loss())
        model.save(FOLDER / f"{name}.keras")
        model.save_weights(FOLDER / f"{name}.weights.h5")
        outputs = flat(model.predict(x, verbose=0))
        assert all(np.isfinite(each).all() and np.ptp(each) > 0.01 for each in outputs), (name, outputs)
        print(name, *(f"{np.abs(each).max():.2f}" for each in outputs), flush=True)
        np.savez(FOLDER / f"{name}.npz", *outputs)
        if name in EXPORTED:
            keras_mp.export(model, FOLDER / "exports" / name, precision="mixed", batch=x, warmup_requests=False)
    (FOLDER / "registered.json").write_text(json.dumps(registered(), indent=1) + "\n")


if __name__ == "__main__":
    main()
