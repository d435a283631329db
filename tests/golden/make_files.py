"""Writes tests/golden/files, which later versions must go on reading: `python -m tests.golden.make_files`.

Run it again only for a new folder beside this one. These are files of version 0.1.0, which kept the weights of a `Head`
under another name.
"""

import pathlib
import shutil

import keras
import numpy as np

import keras_mp
from keras_mp._compat import runtime

FOLDER = pathlib.Path(__file__).parent / "files"
X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")


@keras.saving.register_keras_serializable(package="golden")
class Subclassed(keras.Model):
    """Makes its layers in its constructor, as a user's model does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(5, "gelu")
        self.norm = keras.layers.LayerNormalization()
        self.heads = [keras.layers.Dense(3), keras.layers.Dense(2)]

    def call(self, x):
        """Returns the outputs of both heads, side by side."""
        h = self.norm(self.first(x))
        return keras.ops.concatenate([head(h) for head in self.heads], -1)


def functional():
    """Makes a model with a layer of each kind, and a dense one on either side of the head."""
    x = keras.Input((6,))
    h = keras.layers.Dense(5, "gelu", name="a")(x)
    head = keras.layers.Dense(3, name="b")
    y = head(h)
    z = keras.layers.Dense(2, name="c")(keras.layers.BatchNormalization(name="n")(h))
    return keras.Model(x, [y, keras.layers.Dense(2, name="d")(z)])


def sequential():
    """Makes three dense layers. The last becomes a head."""
    return keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(units) for units in (5, 4, 3))])


def nested():
    """Makes a model whose head is in an inner one."""
    x = keras.Input((6,))
    return keras.Model(x, sequential()(keras.layers.Dense(6, name="outer")(x)))


def subclassed():
    """Makes and builds a model that makes its own layers."""
    model = Subclassed()
    model(X)
    return model


MODELS = {each.__name__: each for each in (functional, sequential, nested, subclassed)}
POLICIES = {"functional": "mixed_float16", "sequential": "mixed_bfloat16", "nested": "mixed_float16"}


def converted(name):
    """Makes the converted model, before training."""
    return keras_mp.convert(MODELS[name](), POLICIES.get(name, "mixed_bfloat16"))


def labels(outputs):
    """Returns zeros as labels."""
    return keras.tree.map_structure(np.zeros_like, outputs)


def main() -> None:
    """Converts each model, trains it for two steps, and writes it whole and its weights alone."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    keras.utils.set_random_seed(7)
    runtime.set_remapper(False)
    for name in MODELS:
        model = converted(name)
        model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.Adam(0.01)), "mse", jit_compile=False)
        y = labels(model.predict(X, verbose=0))
        model.fit(X, y, batch_size=2, verbose=0)
        model.save(FOLDER / f"{name}.keras")
        model.save_weights(FOLDER / f"{name}.weights.h5")
        outputs = keras.tree.flatten(model.predict(X, verbose=0))
        np.savez(FOLDER / f"{name}.npz", *outputs)


if __name__ == "__main__":
    main()
