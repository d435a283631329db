#!/usr/bin/env bash
# Guess: keras.ops.add and multiply of tf.IndexedSlices give what they give on the dense tensors.
# Behaviour: with a repeated row, add raises InvalidArgumentError and multiply forgets one of the two values.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   multiply: dense [0.0, 0.0, 2.0, 0.0] IndexedSlices [0.0, 0.0, 1.0, 0.0]
#   add: dense [2.0, 0.0, 3.0, 0.0]
#   add: IndexedSlices InvalidArgumentError indices[1] = 5 is not in [0, 4) [Op:GatherV2] name:
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
import tensorflow as tf

twice = tf.IndexedSlices(tf.ones((2, 1)), tf.constant([2, 2]), tf.constant([4, 1]))
three = tf.IndexedSlices(tf.ones((3, 1)), tf.constant([0, 2, 2]), tf.constant([4, 1]))
once = tf.IndexedSlices(tf.ones((2, 1)), tf.constant([0, 2]), tf.constant([4, 1]))
dense = tf.convert_to_tensor
expected = (dense(twice) * dense(once)).numpy().ravel().tolist()
given = dense(keras.ops.multiply(twice, once)).numpy().ravel().tolist()
print("multiply: dense", expected, "IndexedSlices", given)
print("add: dense", (dense(three) + dense(once)).numpy().ravel().tolist())
try:
    error = None
    print("add: IndexedSlices", dense(keras.ops.add(three, once)).numpy().ravel().tolist())
except tf.errors.InvalidArgumentError as raised:
    error = raised
    print("add: IndexedSlices", type(error).__name__, str(error).partition("} ")[2])
as_described = expected == [0, 0, 2, 0] and given == [0, 0, 1, 0] and "is not in [0, 4)" in str(error)

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
