"""Runs a SavedModel with TensorFlow alone: `python _run_saved_model.py FOLDER INPUTS.npz OUTPUTS.npz`.

A script, not a module of the package: `verify_export` starts it by its path, in a process that has neither Keras nor
keras_mp, like a server. It must import nothing of ours.
"""

import sys

# TensorFlow imports Keras where it is installed. This makes it as if it were not: an import fails.
for name in ("keras", "tf_keras", "keras_mp"):
    sys.modules[name] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def main() -> None:
    """Reads the inputs, calls `serving_default` and writes its outputs."""
    folder, inputs, outputs = sys.argv[1:]
    # Grappler's fused float16 product is a thousand times slower than the plain one on CPUs with AMX.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    with np.load(inputs) as arrays:
        given = {name: tf.constant(arrays[name]) for name in arrays.files}
    loaded = tf.saved_model.load(folder)
    answers = loaded.signatures["serving_default"](**given)
    np.savez(outputs, **{name: answer.numpy() for name, answer in answers.items()})


if __name__ == "__main__":
    main()
