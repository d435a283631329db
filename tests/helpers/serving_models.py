"""The models that are exported in these tests: one of each kind that is served, small."""

import keras
import numpy as np
from keras import layers

import keras_mp
from keras_mp._compat import runtime


def digits():
    x = keras.Input((8, 8, 1), name="image")
    h = layers.Conv2D(16, 3, name="conv")(x)
    h = layers.ReLU()(keras_mp.layers.BatchNormalization()(h))
    h = layers.Dense(10, name="logits")(layers.Flatten()(h))
    return keras.Model(x, keras_mp.layers.Softmax(name="probabilities")(h), name="digits")


def transformer():
    token, mask = keras.Input((None,), dtype="int32", name="token"), keras.Input((None,), dtype="int32", name="mask")
    h = layers.Embedding(50, 32, name="embedding")(token)
    seen = keras.ops.expand_dims(keras.ops.cast(mask, "bool"), 1)
    h = keras_mp.layers.LayerNormalization()(h + keras_mp.layers.MultiHeadAttention(2, 16)(h, h, attention_mask=seen))
    h = keras_mp.layers.GlobalAveragePooling1D()(layers.Dense(32, activation=keras_mp.activations.gelu)(h))
    return keras.Model({"token": token, "mask": mask}, layers.Dense(3, name="logits")(h), name="transformer")


def recommender():
    user, item = keras.Input((1,), dtype="int32", name="user"), keras.Input((1,), dtype="int32", name="item")
    u = layers.Flatten()(layers.Embedding(40, 16, name="users")(user))
    i = layers.Flatten()(layers.Embedding(30, 16, name="items")(item))
    h = layers.Dense(16, "relu")(layers.concatenate([u, i]))
    return keras.Model([user, item], layers.Dense(1, name="rating")(h), name="recommender")


def detector():
    x = keras.Input((32, 32, 3), name="image")
    h = layers.Conv2D(16, 3, 2, activation="relu")(layers.Conv2D(8, 3, 2, activation="relu")(x))
    boxes = layers.Reshape((-1, 4), name="boxes")(layers.Conv2D(8, 1)(h))
    scores = layers.Activation("sigmoid", name="scores")(layers.Reshape((-1,))(layers.Conv2D(2, 1)(h)))
    count = keras.ops.sum(keras.ops.cast(keras.ops.cast(scores, "float32") > 0.5, "int32"), -1)
    outputs = {"boxes": boxes, "scores": scores, "count": layers.Identity(name="count")(count)}
    return keras.Model(x, outputs, name="detector")


def strings():
    city, text = keras.Input((1,), dtype="string", name="city"), keras.Input((), dtype="string", name="text")
    age = keras.Input((1,), name="age")
    c = layers.StringLookup(vocabulary=["paris", "rome"], output_mode="one_hot", dtype="float32")(city)
    t = layers.TextVectorization(output_sequence_length=4, vocabulary=["good", "bad"], dtype="string")(text)
    t = layers.Flatten()(layers.Embedding(4, 8)(t))
    a = layers.Normalization(mean=[30.0], variance=[100.0], dtype="float32")(age)
    h = layers.Dense(16, "relu")(layers.concatenate([c, a, t]))
    return keras.Model([city, age, text], layers.Dense(1, name="score")(h), name="strings")


def recurrent():
    x = keras.Input((6, 8), name="series")
    h = keras_mp.layers.LSTM(16, return_sequences=True)(x)
    return keras.Model(x, layers.Dense(1, name="next")(keras_mp.layers.GRU(16)(h)), name="recurrent")


def application():
    """Made under float32 and converted, as one that exists would be."""
    return keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)


MAKERS = [digits, transformer, recommender, detector, strings, recurrent, application]


def make(maker, policy):
    """The model under a policy, with batch statistics and biases that are not those it starts with."""
    runtime.set_remapper(False)  # fused float16 products are a thousand times slower on some CPUs
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32" if maker is application else policy)
    try:
        keras.utils.set_random_seed(1)
        model = maker()
    finally:
        keras.config.set_dtype_policy(before)
    rng = np.random.default_rng(1)
    for variable in model.weights:
        if len(variable.shape) == 1 and variable.dtype == "float32":
            variable.assign(rng.uniform(0.5, 1.0, variable.shape))
    if maker is application and policy != "float32":
        model = keras_mp.convert(model, keras.DTypePolicy(policy))
    return model


def batch_for(model, rows=3):
    """Rows for the inputs by name, as clients send them."""
    rng = np.random.default_rng(2)
    made = {}
    for tensor in model.inputs:
        shape = [rows, *(6 if size is None else size for size in tensor.shape[1:])]
        if tensor.dtype == "string":
            words = ["rome", "paris"] if tensor.name == "city" else ["good good", "a bad day", ""]
            made[tensor.name] = rng.choice(words, shape)
        elif tensor.dtype == "int32":
            made[tensor.name] = rng.integers(1, 2 if tensor.name == "mask" else 30, shape, "int32")
        else:
            made[tensor.name] = rng.normal(size=shape).astype("float32")
    if "mask" in made:
        made["mask"][:, -2:] = 0
    return made
