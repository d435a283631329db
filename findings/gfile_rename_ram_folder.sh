#!/usr/bin/env bash
# Guess: tf.io.gfile.rename moves a folder with what is in it, under ram:// as on a disk.
# Behaviour: under ram:// it makes a new empty folder; the file stays under the old name. No error.
# Versions: tensorflow-cpu==2.21.0, numpy==2.4.6
# Output seen (Linux x86-64, Python 3.11):
#   disk new folder: ['a.txt'] file under the old name: False
#   ram new folder: [] file under the old name: True
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

import os

import tensorflow as tf

as_seen = {}
for kind, root in (("disk", os.environ["FOLDER"] + "/files"), ("ram", "ram://files")):
    tf.io.gfile.makedirs(root + "/old")
    with tf.io.gfile.GFile(root + "/old/a.txt", "w") as file:
        file.write("a")
    tf.io.gfile.rename(root + "/old", root + "/new")
    as_seen[kind] = (tf.io.gfile.listdir(root + "/new"), tf.io.gfile.exists(root + "/old/a.txt"))
    print(kind, "new folder:", as_seen[kind][0], "file under the old name:", as_seen[kind][1])
as_described = as_seen == {"disk": (["a.txt"], False), "ram": ([], True)}

print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(0 if as_described else 1)
EOF
