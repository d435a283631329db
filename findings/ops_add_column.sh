#!/usr/bin/env bash
# Guess: keras.ops.add broadcasts as numpy.add does, or raises.
# Behaviour: on TensorFlow, a second argument with one dimension over 1 is taken for a bias when that dimension equals the
# second or the last of the first argument. So a column is added as a row to a square matrix, and to scores (batch, n, n).
# A vector that fits no last dimension is added along the second, where NumPy raises.
# `x + y` of tensors is right, and so is add(y, x), where the second argument is the matrix.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   matrix (3, 3) and column (3, 1): [[0. 1. 2.] [0. 1. 2.] [0. 1. 2.]], NumPy [[0. 0. 0.] [1. 1. 1.] [2. 2. 2.]]
#   scores (2, 3, 3) and column (3, 1): differ from NumPy by 2.0
#   (2, 3, 4) and (3,): shape (2, 3, 4), NumPy raises ValueError
#   column first: differs from NumPy by 0.0
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

matrix, scores, column = np.zeros((3, 3), "float32"), np.zeros((2, 3, 3), "float32"), np.arange(3.0, dtype="float32")[:, None]
got = np.asarray(keras.ops.add(matrix, column))
text = lambda array: str(array).replace("\n", "")
print(f"matrix (3, 3) and column (3, 1): {text(got)}, NumPy {text(matrix + column)}")
of_scores = float(np.abs(np.asarray(keras.ops.add(scores, column)) - (scores + column)).max())
print(f"scores (2, 3, 3) and column (3, 1): differ from NumPy by {of_scores}")
shape = tuple(keras.ops.add(np.zeros((2, 3, 4), "float32"), column[:, 0]).shape)
try:
    np.zeros((2, 3, 4)) + column[:, 0]
    raised = "raises nothing"
except ValueError:
    raised = "raises ValueError"
print(f"(2, 3, 4) and (3,): shape {shape}, NumPy {raised}")
first = float(np.abs(np.asarray(keras.ops.add(column, matrix)) - (column + matrix)).max())
print(f"column first: differs from NumPy by {first}")
as_described = (
    bool((got == column.T).all()) and of_scores == 2.0 and shape == (2, 3, 4) and raised == "raises ValueError" and first == 0.0
)

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
