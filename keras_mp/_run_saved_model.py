"""Runs a SavedModel with TensorFlow alone: `python -I _run_saved_model.py FOLDER INPUTS.npz OUTPUTS.npz PATH`.

A script, not a module of the package: `verify_export` starts it by its path, in a process that has neither Keras nor
keras_mp, like a server. It must import nothing of ours. PATH is where to look for TensorFlow. Both files hold the names
of tensors first; OUTPUTS then has the names of their dtypes.
"""

import os
import sys

# TensorFlow imports Keras where it is installed. This makes it as if it were not: an import fails.
for name in ("keras", "tf_keras", "keras_mp"):
    sys.modules[name] = None  # type: ignore[assignment]

sys.path[:] = sys.argv[4].split(os.pathsep)

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def main() -> None:
    """Reads the inputs, calls `serving_default` and writes its outputs."""
    folder, inputs, outputs = sys.argv[1:4]
    # Grappler's fused float16 product is a thousand times slower than the plain one on CPUs with AMX.
    tf.config.optimizer.set_experimental_options({"remapping": False})
    with np.load(inputs) as arrays:
        names, *values = (arrays[key] for key in arrays.files)
    given = {str(name): tf.constant(value) for name, value in zip(names, values, strict=True)}
    answers = tf.saved_model.load(folder).signatures["serving_default"](**given)
    dtypes = [answer.dtype.name for answer in answers.values()]
    found = (answer.numpy() for answer in answers.values())
    # NumPy holds strings as objects, which only a pickle could store.
    values = [array.astype("S") if array.dtype == object else array for array in found]
    np.savez(outputs, np.array(list(answers)), np.array(dtypes), *values)


if __name__ == "__main__":
    main()
