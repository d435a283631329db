#!/usr/bin/env bash
# Guess: tf.matmul of bfloat16 with float32 raises, as float16 with float32 does; or it works whatever the rank.
# Behaviour: it works and gives float32 for matrices, and raises for a batch of matrices and in tf.einsum.
# Versions: tensorflow-cpu==2.21.0, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   matmul bfloat16 -> float32
#   matmul of a batch bfloat16 -> InvalidArgumentError
#   einsum bfloat16 -> InvalidArgumentError
#   matmul float16 -> InvalidArgumentError
#   matmul of a batch float16 -> InvalidArgumentError
#   einsum float16 -> InvalidArgumentError
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
    "$python" -m pip install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0 numpy==2.4.6
fi
export TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=tensorflow CUDA_VISIBLE_DEVICES=-1 FOLDER=$folder
cd "$folder"
"$python" - <<'EOF' 2>"$folder/log" || { status=$?; tail -n 20 "$folder/log" >&2; exit $status; }
import sys
from importlib.metadata import version

for pin in "tensorflow-cpu==2.21.0 numpy==2.4.6".split():
    package, wanted = pin.split("==")
    print(package, version(package))
    if version(package) != wanted:
        print("expected", pin, file=sys.stderr)
        sys.exit(2)

import tensorflow as tf


def attempt(what, run):
    try:
        results[what] = run().dtype.name
    except tf.errors.InvalidArgumentError as error:
        results[what] = type(error).__name__
    print(what, "->", results[what])


results = {}
for dtype in ("bfloat16", "float16"):
    a, b = tf.ones((2, 2), dtype), tf.ones((2, 2))
    attempt(f"matmul {dtype}", lambda: tf.matmul(a, b))
    attempt(f"matmul of a batch {dtype}", lambda: tf.matmul(a[None], b[None]))
    attempt(f"einsum {dtype}", lambda: tf.einsum("ij,jk->ik", a, b))
as_described = results.pop("matmul bfloat16") == "float32" and set(results.values()) == {"InvalidArgumentError"}

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
