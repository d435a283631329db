#!/usr/bin/env bash
# Guess: load_model gives the saved weights, or raises.
# Behaviour: a subclassed model that takes integers is run with floats to build it. Where that fails, load_model warns
# of it, restores no weight at all, raises nothing, and the model says that it is built.
# It then computes with new random weights.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   warning: Model 'of_ids' had a build config, but the model cannot be built automatically in `build_from_conf
#   built: True - weights: 0 of 8
#   the outputs differ: True - weights after the call: 8
#
# PYTHON_WITH_PACKAGES: an interpreter that has these versions already; without it they are installed in a temporary folder.
# Exit status: 0 as described, 1 the behaviour has changed, other: it could not be tried.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON_WITH_PACKAGES:-}
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6
fi
export TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=tensorflow CUDA_VISIBLE_DEVICES=-1 FOLDER=$folder
cd "$folder"
"$python" - <<'EOF' 2>"$folder/log" || { status=$?; tail -n 20 "$folder/log" >&2; exit $status; }
import sys
from importlib.metadata import version

for pin in "tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6".split():
    package, wanted = pin.split("==")
    print(package, version(package))
    if version(package) != wanted:
        print("expected", pin, file=sys.stderr)
        sys.exit(2)

import os
import warnings

import keras
import numpy as np
import tensorflow as tf


@keras.saving.register_keras_serializable("findings")
class OfIds(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 2)

    def call(self, ids):
        x = tf.one_hot(ids, 4)  # takes integers only
        return self.attention(x, x)


ids = np.array([[0, 1, 2]])
model = OfIds()
wanted = model(ids).numpy()
path = os.environ["FOLDER"] + "/model.keras"
model.save(path)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = keras.saving.load_model(path)
print("warning:", *(str(each.message)[:98] for each in caught))
weights = len(loaded.weights)
print("built:", loaded.built, "- weights:", weights, "of", len(model.weights))
difference = abs(loaded(ids).numpy() - wanted).max()
print("the outputs differ:", bool(difference > 1e-3), "- weights after the call:", len(loaded.weights))
as_described = loaded.built and weights == 0 and difference > 1e-3 and len(loaded.weights) == 8

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
