#!/usr/bin/env bash
# Guess: an Embedding learns the same under Adam as the same table behind a one-hot matmul.
# Behaviour: where an id occurs twice in a batch, Adam squares each of the two gradient rows and adds the squares;
# the square of their sum is right. RMSprop, Adagrad, Nadam and clipnorm are off too; SGD, Lion and Adamax are not.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   SGD Embedding against one-hot, largest difference: 0.0
#   Adam Embedding against one-hot, largest difference: 0.0361
#   RMSprop Embedding against one-hot, largest difference: 0.128
#   Adagrad Embedding against one-hot, largest difference: 0.0236
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

import keras
import numpy as np

TABLE = np.arange(12, dtype="float32").reshape(6, 2) / 10 + 0.1


def trained(optimizer, one_hot):
    ids = keras.Input((4,), dtype="int32")
    if one_hot:
        rows = keras.layers.Dense(2, use_bias=False)
        x = rows(keras.ops.one_hot(ids, 6))
    else:
        rows = keras.layers.Embedding(6, 2)
        x = rows(ids)
    head = keras.layers.Dense(1, kernel_initializer="ones", trainable=False)
    model = keras.Model(ids, head(keras.layers.Flatten()(x)))
    rows.set_weights([TABLE])
    model.compile(optimizer, "mse")
    for batch in ([1, 1, 3, 4], [1, 2, 3, 4]):  # id 1 twice in the first batch
        model.fit(np.array([batch]), np.array([[5.0]]), verbose=0)
    return rows.get_weights()[0]


off = {}
for make in (keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.RMSprop, keras.optimizers.Adagrad):
    off[make.__name__] = abs(trained(make(0.1), False) - trained(make(0.1), True)).max()
    print(make.__name__, "Embedding against one-hot, largest difference:", round(float(off[make.__name__]), 4))
as_described = off["SGD"] < 1e-5 and all(off[each] > 0.01 for each in ("Adam", "RMSprop", "Adagrad"))

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
