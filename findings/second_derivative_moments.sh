#!/usr/bin/env bash
# Guess: the second derivative of LayerNormalization in float64 agrees with finite differences.
# Behaviour: it is off by percents, in LayerNormalization, BatchNormalization (training) and GroupNormalization. tf.nn.moments stops
# the gradient at the mean, which is right for the first derivative only: the Hessian of the variance
# of n values comes out as 2/n I instead of 2/n (I - 1/n).
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   LayerNormalization: 0.33929 against 0.29520, off by 5.3% of the largest
#   BatchNormalization: 0.50653 against 0.72463, off by 6.9% of the largest
#   GroupNormalization: 0.60623 against 0.45205, off by 3.5% of the largest
#   RMSNormalization: 0.03945 against 0.03945, off by 0.0% of the largest
#   Hessian of the variance of 8 values, [0, :2]: tf.nn.moments [0.25, 0.0] tf.math.reduce_variance [0.21875, -0.03125]
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
import tensorflow as tf

x, v = (tf.constant(np.random.default_rng(seed).normal(size=(4, 8))) for seed in (0, 1))


def gradient(layer, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(tf.sin(layer(x, training=True) if "Batch" in layer.name else layer(x)))
    return tape.gradient(total, x)


off = {}
for layer in (
    keras.layers.LayerNormalization(dtype="float64", name="LayerNormalization"),
    keras.layers.BatchNormalization(dtype="float64", name="BatchNormalization"),
    keras.layers.GroupNormalization(2, dtype="float64", name="GroupNormalization"),
    keras.layers.RMSNormalization(dtype="float64", name="RMSNormalization"),
):
    layer.build(x.shape)
    with tf.GradientTape() as tape:
        tape.watch(x)
        along = tf.reduce_sum(gradient(layer, x) * v)
    second = tape.gradient(along, x).numpy()
    finite = ((gradient(layer, x + 1e-5 * v) - gradient(layer, x - 1e-5 * v)) / 2e-5).numpy()
    off[layer.name] = abs(second - finite).max() / abs(finite).max()
    print(f"{layer.name}: {second[0, 0]:.5f} against {finite[0, 0]:.5f}, off by {off[layer.name]:.1%} of the largest")


def hessian(function):
    y = x[0]
    with tf.GradientTape() as outer:
        outer.watch(y)
        with tf.GradientTape() as inner:
            inner.watch(y)
            value = function(y)
        first = inner.gradient(value, y)
    return outer.jacobian(first, y).numpy()


moments = hessian(lambda y: tf.nn.moments(y, [0])[1])[0, :2].tolist()
exact = hessian(tf.math.reduce_variance)[0, :2].tolist()
print("Hessian of the variance of 8 values, [0, :2]: tf.nn.moments", moments, "tf.math.reduce_variance", exact)
as_described = off.pop("RMSNormalization") < 1e-6 and min(off.values()) > 0.02 and moments == [0.25, 0.0]

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
