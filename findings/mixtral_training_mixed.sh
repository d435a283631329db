#!/usr/bin/env bash
# Guess: a MixtralBackbone that predicts under mixed_bfloat16 also trains under it.
# Behaviour: with training=True its auxiliary loss multiplies bfloat16 by float32 and raises InvalidArgumentError,
# under mixed_float16 too. float32 works.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6,
# absl-py packaging regex rich kagglehub sentencepiece tokenizers, keras-hub==0.32.0
# Output seen (Linux x86-64, Python 3.11):
#   float32 predicts (1, 4, 8)
#   float32 training=True gives (1, 4, 8)
#   mixed_bfloat16 predicts (1, 4, 8)
#   mixed_bfloat16 training=True raises InvalidArgumentError cannot compute Mul as input #1(zero-based) was expected to be a bfloa
#   mixed_float16 predicts (1, 4, 8)
#   mixed_float16 training=True raises InvalidArgumentError cannot compute Mul as input #1(zero-based) was expected to be a half t
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
    "$python" -m pip install --quiet --disable-pip-version-check tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6 absl-py packaging regex rich kagglehub sentencepiece tokenizers
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps keras-hub==0.32.0
fi
export TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=tensorflow CUDA_VISIBLE_DEVICES=-1 FOLDER=$folder
cd "$folder"
"$python" - <<'EOF' 2>"$folder/log" || { status=$?; tail -n 20 "$folder/log" >&2; exit $status; }
import sys
from importlib.metadata import version

for pin in "tensorflow-cpu==2.21.0 keras==3.15.1 numpy==2.4.6 keras-hub==0.32.0".split():
    package, wanted = pin.split("==")
    print(package, version(package))
    if version(package) != wanted:
        print("expected", pin, file=sys.stderr)
        sys.exit(2)

import keras_hub
import numpy as np
import tensorflow as tf

ids = {"token_ids": np.ones((1, 4), "int32"), "padding_mask": np.ones((1, 4), "int32")}
errors = {}
for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
    model = keras_hub.models.MixtralBackbone(
        vocabulary_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        num_experts=2,
        top_k=1,
        dtype=policy,
    )
    print(policy, "predicts", model.predict(ids, verbose=0).shape)
    try:
        errors[policy] = None
        print(policy, "training=True gives", model(ids, training=True).shape)
    except (TypeError, tf.errors.InvalidArgumentError) as error:
        errors[policy] = str(error)
        print(policy, "training=True raises", type(error).__name__, *(each for each in str(error).splitlines() if "Mul" in each))
as_described = errors.pop("float32") is None and all(each and "Mul" in each for each in errors.values())

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
