"""The whole step of a `keras_mp.Model`, compiled for a TPU that is not there: `python -m tests.programs.tpu POLICY`.

The last line of its output is JSON. The compiler needs the extra `aot` and a separate process.
"""

import json
import sys

import keras_mp  # isort: skip  (first, so that TensorFlow's banner stays out of the output)

import keras
import numpy as np

from benchmarks import aot

ROWS = 4


def build_model(policy):
    """A model of images and of words, most layers of ours, with random numbers, losses of layers and statistics."""
    with keras_mp.policy_scope(policy):
        images = keras.Input((16, 16, 3), name="images")
        x = keras_mp.layers.Resizing(12, 12)(images)
        x = keras.layers.Conv2D(8, 3, padding="same", kernel_regularizer="l2")(x)
        x = keras.layers.Activation(keras_mp.activations.gelu)(keras_mp.layers.BatchNormalization()(x))
        x = keras_mp.layers.GroupNormalization(groups=4)(keras_mp.layers.UpSampling2D(interpolation="bilinear")(x))
        x = keras_mp.layers.GlobalAveragePooling2D()(keras_mp.layers.AveragePooling2D(2)(x))
        words = keras.Input((6,), dtype="int32", name="words")
        y = keras.layers.Embedding(20, 16, mask_zero=True)(words)
        y = keras_mp.layers.LSTM(16, return_sequences=True)(y)
        y = y + keras_mp.layers.MultiHeadAttention(2, 8)(keras_mp.layers.LayerNormalization()(y), y)
        y = keras.layers.Dense(16, activity_regularizer="l2")(keras_mp.layers.RMSNormalization()(y))
        y = keras_mp.layers.GlobalAveragePooling1D()(keras.layers.Dropout(0.2)(y))
        joined = keras.layers.Concatenate()([x, y])
        outputs = {
            "class": keras_mp.layers.Head(5, name="class")(joined),
            "kind": keras_mp.layers.Softmax(name="kind")(keras.layers.Dense(3)(joined)),
        }
        model = keras_mp.Model({"images": images, "words": words}, outputs)
        model.compile(
            keras_mp.LossScaleOptimizer(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0, use_ema=True)),
            {
                "class": keras_mp.losses.SparseCategoricalCrossentropy(from_logits=True),
                "kind": "sparse_categorical_crossentropy",
            },
            metrics={"class": ["accuracy"], "kind": ["accuracy"]},
            jit_compile=True,
        )
    return model


def make_step(policy):
    """The step as `fit` takes it, as a function of nothing whose shapes are static."""
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(0)
    model = build_model(policy)
    x = {"images": generator.random((ROWS, 16, 16, 3), "float32"), "words": np.arange(ROWS * 6).reshape(ROWS, 6) % 20}
    y = {"class": np.arange(ROWS) % 5, "kind": np.arange(ROWS) % 3}
    return aot.whole_step(model, (x, y, {name: np.ones(ROWS, "float32") for name in y}))


if __name__ == "__main__":
    print(json.dumps({"mib": aot.memory(make_step(sys.argv[1]), "tpu-v5e")}))
