#!/usr/bin/env bash
# Guess: float16 quantization in TFLite stores weights in 16 bits and leaves single numbers alone.
# Behaviour: scalar constants are rounded as well, though nothing is saved by it: an epsilon of 1e-12 becomes 0,
# so that a guarded division gives NaN, and 1e5 becomes 65504. No warning.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6,
# ai-edge-litert==2.3.0
# Output seen (Linux x86-64, Python 3.11):
#   0 / (0 + 1e-12) and 0 + 1e5: float32 [0.0, 100000.0] float16 quantization [nan, 65504.0]
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
    "$python" -m pip install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6 ai-edge-litert==2.3.0
fi
export TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=tensorflow CUDA_VISIBLE_DEVICES=-1 FOLDER=$folder
cd "$folder"
"$python" - <<'EOF' 2>"$folder/log" || { status=$?; tail -n 20 "$folder/log" >&2; exit $status; }
import sys
from importlib.metadata import version

for pin in "tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6 ai-edge-litert==2.3.0".split():
    package, wanted = pin.split("==")
    print(package, version(package))
    if version(package) != wanted:
        print("expected", pin, file=sys.stderr)
        sys.exit(2)

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

module = tf.Module()
module.run = tf.function(
    lambda x: tf.stack([tf.reduce_sum(x) / (tf.reduce_sum(tf.abs(x)) + 1e-12), tf.reduce_sum(x) + 1e5]),
    [tf.TensorSpec((4,))],
    autograph=False,
)


def run(float16):
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.run.get_concrete_function()], module)
    if float16:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    interpreter = Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.zeros(4, "float32"))
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


plain, quantized = run(False), run(True)
print("0 / (0 + 1e-12) and 0 + 1e5: float32", plain.tolist(), "float16 quantization", quantized.tolist())
as_described = plain.tolist() == [0, 1e5] and np.isnan(quantized[0]) and quantized[1] == 65504

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
