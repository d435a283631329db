#!/usr/bin/env bash
# Guess: a TFLite model gives what Keras gives: UnitNormalization of a row of zeros is zeros.
# Behaviour: it is NaN: rsqrt(0) is NaN, not infinity, in the XNNPACK delegate that the interpreter applies by default.
# The interpreter's own kernels give infinity. Seen on x86-64.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6,
# ai-edge-litert==2.3.0
# Output seen (Linux x86-64, Python 3.11):
#   rsqrt of [0, 4]: TensorFlow [inf 0.5] TFLite [nan 0.5] TFLite without XNNPACK [inf 0.5]
#   UnitNormalization of zeros: Keras [0. 0. 0. 0.] TFLite [nan nan nan nan]
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

import os

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType


def run(content, x, **options):
    interpreter = Interpreter(model_content=content, **options)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


module = tf.Module()
module.run = tf.function(lambda x: tf.math.rsqrt(x), [tf.TensorSpec((2,))], autograph=False)
content = tf.lite.TFLiteConverter.from_concrete_functions([module.run.get_concrete_function()], module).convert()
x = np.array([0, 4], "float32")
default = run(content, x)
plain = run(content, x, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
print("rsqrt of [0, 4]: TensorFlow", module.run(x).numpy(), "TFLite", default, "TFLite without XNNPACK", plain)

x = np.array([[[3, 4, 0, 0], [0, 0, 0, 0]]], "float32")
inputs = keras.Input((2, 4), batch_size=1)
model = keras.Model(inputs, keras.layers.UnitNormalization()(inputs))
model.export(os.environ["FOLDER"] + "/saved", verbose=False)
content = tf.lite.TFLiteConverter.from_saved_model(os.environ["FOLDER"] + "/saved").convert()
normal = run(content, x)
print("UnitNormalization of zeros: Keras", model(x).numpy()[0, 1], "TFLite", normal[0, 1])
as_described = np.isnan(default[0]) and np.isinf(plain[0]) and np.isnan(normal[0, 1]).all()

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
