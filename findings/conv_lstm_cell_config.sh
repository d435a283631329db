#!/usr/bin/env bash
# Guess: a cell comes back from from_config(get_config()), as LSTMCell does.
# Behaviour: the cell of ConvLSTM1D and 2D does not write the argument `rank`, which it requires: TypeError.
# Versions: tensorflow-cpu==2.21.0, keras==3.15.1, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   lstm comes back
#   conv_lstm1d raises: ...red: ConvLSTMCell.__init__() missing 1 required positional argument: 'rank'
#   conv_lstm2d raises: ...red: ConvLSTMCell.__init__() missing 1 required positional argument: 'rank'
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

errors = {}
for layer in (keras.layers.LSTM(2), keras.layers.ConvLSTM1D(2, 3), keras.layers.ConvLSTM2D(2, 3)):
    try:
        type(layer.cell).from_config(layer.cell.get_config())
        errors[layer.name] = ""
    except TypeError as error:
        errors[layer.name] = str(error)
    print(layer.name, "raises: ..." + errors[layer.name][-75:].strip().splitlines()[-1] if errors[layer.name] else "comes back")
as_described = not errors.pop("lstm") and all("'rank'" in each for each in errors.values())

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
