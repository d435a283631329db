"""TensorFlow's runtime. Each test fails with the private name in its docstring when that moves."""

import subprocess
import sys

from keras_mp._compat import runtime


def test_runtime_started_tells_without_starting_it():
    """Rests on `tensorflow.python.eager.context.context()._initialized`."""
    code = (
        "from keras_mp._compat import runtime\n"
        "import tensorflow as tf\n"
        "before = runtime.runtime_started(), runtime.runtime_started()\n"
        "tf.constant(1) + 1\n"
        "print(before, runtime.runtime_started())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "(False, False) True"


def test_the_remapper_is_switched():
    runtime.set_remapper(False)
    assert not runtime.remapper_enabled()
    runtime.set_remapper(True)
    assert runtime.remapper_enabled()
