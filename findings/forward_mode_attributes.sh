#!/usr/bin/env bash
# Guess: what has a gradient in reverse mode has one under tf.autodiff.ForwardAccumulator.
# Behaviour: tf.ensure_shape inside a tf.function raises TypeError (a shape is not hashable); eagerly it works.
# tf.nn.avg_pool and max_pool of five dimensions raise AttributeError eagerly unless data_format is given;
# in a tf.function they work, as with four dimensions.
# Versions: tensorflow-cpu==2.21.0, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   ensure_shape, eager -> (2, 3)
#   ensure_shape, graph -> TypeError Could not generate a generic TraceType for dim {
#   avg_pool, eager -> AttributeError 'NoneType' object has no attribute 'decode'
#   avg_pool, graph -> (1, 2, 2, 2, 1)
#   avg_pool NDHWC, eager -> (1, 2, 2, 2, 1)
#   avg_pool NDHWC, graph -> (1, 2, 2, 2, 1)
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


def derivative(function, x):
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
        y = function(x)
    return accumulator.jvp(y)


def attempt(what, run):
    try:
        results[what] = str(run().shape)
    except (TypeError, AttributeError) as error:
        results[what] = type(error).__name__
        print(what, "->", type(error).__name__, str(error).splitlines()[0])
    else:
        print(what, "->", results[what])


results = {}
square, cube = tf.ones((2, 3)), tf.ones((1, 3, 3, 3, 1))
calls = {
    "ensure_shape": (lambda x: tf.ensure_shape(x, (2, 3)), square),
    "avg_pool": (lambda x: tf.nn.avg_pool(x, 2, 1, "VALID"), cube),
    "avg_pool NDHWC": (lambda x: tf.nn.avg_pool(x, 2, 1, "VALID", "NDHWC"), cube),
}
for what, (call, x) in calls.items():
    attempt(what + ", eager", lambda: derivative(call, x))
    attempt(what + ", graph", lambda: tf.function(lambda x: derivative(call, x), autograph=False)(x))
failed = {what for what, result in results.items() if "Error" in result}
as_described = failed == {"ensure_shape, graph", "avg_pool, eager"}

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
