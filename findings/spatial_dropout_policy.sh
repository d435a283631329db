#!/usr/bin/env bash
# Guess: a layer's get_config keeps its dtype policy, as Dropout's does.
# Behaviour: SpatialDropout1D, 2D and 3D write the dtype of variables instead, so mixed_bfloat16 comes back as float32
# from from_config, clone_model and load_model; `trainable` is not written either.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   Dropout mixed_bfloat16 -> mixed_bfloat16
#   SpatialDropout1D mixed_bfloat16 -> float32
#   SpatialDropout2D mixed_bfloat16 -> float32
#   SpatialDropout3D mixed_bfloat16 -> float32
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

policies = {}
for make in (keras.layers.Dropout, keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D):
    layer = make(0.5, dtype="mixed_bfloat16")
    policies[make.__name__] = make.from_config(layer.get_config()).dtype_policy.name
    print(make.__name__, layer.dtype_policy.name, "->", policies[make.__name__])
as_described = policies.pop("Dropout") == "mixed_bfloat16" and set(policies.values()) == {"float32"}

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
