"""Writes tests/golden/export, the export that later versions must go on reading: `python -m tests.golden.make_export`.

Make a new one, beside the old one, only when the format changes on purpose.
"""

import pathlib

import keras
import numpy as np

import keras_mp
from keras_mp._compat import runtime

FOLDER = pathlib.Path(__file__).parent / "export"
ROWS = {"image": np.arange(2 * 64, dtype="float32").reshape(2, 8, 8, 1) / 64, "kind": np.array([[1], [3]], "int32")}


def main() -> None:
    """Exports a model of two inputs and two outputs, trained in bfloat16, with half-size weights."""
    keras.utils.set_random_seed(7)
    runtime.set_remapper(False)
    policy = keras.DTypePolicy("mixed_bfloat16")
    image, kind = keras.Input((8, 8, 1), name="image"), keras.Input((1,), dtype="int32", name="kind")
    h = keras_mp.layers.BatchNormalization(dtype=policy)(keras.layers.Conv2D(4, 3, dtype=policy)(image))
    h = keras.layers.concatenate(
        [keras.layers.Flatten()(h), keras.layers.Flatten()(keras.layers.Embedding(5, 4)(kind))]
    )
    scores = keras.layers.Dense(3, name="scores", dtype=policy)(h)
    best = keras.layers.Identity(name="best")(keras.ops.argmax(scores, -1))
    model = keras.Model([image, kind], {"scores": scores, "best": best}, name="golden")
    print(keras_mp.export(model, FOLDER, precision="mixed", weights="half", batch=[ROWS["image"], ROWS["kind"]]))


if __name__ == "__main__":
    main()
