#!/usr/bin/env bash
# Guess: a model whose weights are stored in float16 or bfloat16 and cast in the graph gives a file of half the size.
# Behaviour: tf2onnx folds the cast into the constant: the file holds float32 initializers and is no smaller.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6,
# tf2onnx==1.17.0, onnx==1.23.2
# Output seen (Linux x86-64, Python 3.11):
#   float32 weights of 262144 bytes: 262410 bytes of ONNX, FLOAT
#   float16 weights of 131072 bytes: 262382 bytes of ONNX, FLOAT
#   bfloat16 weights of 131072 bytes: 262382 bytes of ONNX, FLOAT
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
    "$python" -m pip install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6 tf2onnx==1.17.0 onnx==1.23.2
fi
export TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=tensorflow CUDA_VISIBLE_DEVICES=-1 FOLDER=$folder
cd "$folder"
"$python" - <<'EOF' 2>"$folder/log" || { status=$?; tail -n 20 "$folder/log" >&2; exit $status; }
import sys
from importlib.metadata import version

for pin in "tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6 tf2onnx==1.17.0 onnx==1.23.2".split():
    package, wanted = pin.split("==")
    print(package, version(package))
    if version(package) != wanted:
        print("expected", pin, file=sys.stderr)
        sys.exit(2)

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx

sizes, dtypes = [], set()
for dtype in ("float32", "float16", "bfloat16"):
    weights = tf.Variable(tf.cast(np.random.default_rng(0).normal(size=(256, 256)), dtype))
    module = tf.Module()
    module.weights = weights
    run = tf.function(
        lambda x: x @ tf.cast(module.weights, "float32"),
        [tf.TensorSpec((None, 256), name="x")],
        autograph=False,
    )
    model, _ = tf2onnx.convert.from_function(run, input_signature=run.input_signature, opset=17)
    kept = {onnx.TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer}
    sizes.append(len(model.SerializeToString()))
    dtypes |= kept
    print(dtype, "weights of", 65536 * weights.dtype.size, "bytes:", sizes[-1], "bytes of ONNX,", *kept)
as_described = min(sizes) > 260_000 and dtypes == {"FLOAT"}

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
