"""Runs a SavedModel with TensorFlow alone: `python -I _run_saved_model.py JOB.json PATH`.

A script, not a module of the package: it is started by its path, in a process that has neither Keras nor keras_mp, like
a server. It must import nothing of ours. PATH is where to look for TensorFlow. The job names the folder and the
requests, each a signature with a file of inputs and a file for its outputs. These hold the names of tensors first, then
those of their dtypes. The job's "facts" is a file for what was found: dtypes, and times in ms.
"""

import json
import os
import sys
import time
from typing import Any

# TensorFlow imports Keras where it is installed. This makes it as if it were not: an import fails.
for name in ("keras", "tf_keras", "keras_mp"):
    sys.modules[name] = None  # type: ignore[assignment]

sys.path[:] = sys.argv[2].split(os.pathsep)

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

# How long calls are timed, and how many of them.
_SECONDS, _CALLS = 0.3, 30


def main() -> None:
    """Reads the inputs of each request, calls its signature and writes its outputs."""
    with open(sys.argv[1]) as file:
        job = json.load(file)
    tf.config.optimizer.set_experimental_options({"remapping": job["remapping"]})
    loaded = tf.saved_model.load(job["folder"])
    facts = []
    for request in job["requests"]:
        signature = loaded.signatures[request["signature"]]
        with np.load(request["inputs"]) as arrays:
            names, _, *values = (arrays[key] for key in arrays.files)
        given = {str(name): tf.constant(value) for name, value in zip(names, values, strict=True)}
        answers = signature(**given)
        dtypes = [answer.dtype.name for answer in answers.values()]
        found = (answer.numpy() for answer in answers.values())
        # NumPy holds strings as objects, which only a pickle could store.
        values = [array.astype("S") if array.dtype == object else array for array in found]
        np.savez(request["outputs"], np.array(list(answers), "U"), np.array(dtypes, "U"), *values)
        facts.append({"ms": _median_ms(signature, given) if request["timed"] else None})
    with open(job["facts"], "w") as file:
        json.dump(facts, file)


def _median_ms(signature: Any, given: dict[str, Any]) -> float:
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not times or (time.perf_counter() < end and len(times) < _CALLS):
        start = time.perf_counter()
        answers = signature(**given)
        [answer.numpy() for answer in answers.values()]
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
