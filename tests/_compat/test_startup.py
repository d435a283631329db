"""A missing or unfit TensorFlow is explained."""

import os
import subprocess
import sys

import pytest

MISSING = {
    "no tensorflow": (
        "import sys; sys.modules['tensorflow'] = None",
        {},
        ["keras-mp[cpu]", "keras-mp[gpu]", "keras-mp[tpu]", "no `tensorflow` is installed here"],
    ),
    "an old tensorflow": (
        "import sys, types; sys.modules['tensorflow'] = types.SimpleNamespace(__version__='2.16.1')",
        {},
        ["2.16.1 is installed here", "pip install --upgrade"],
    ),
    "a backend that is not installed": ("", {"KERAS_BACKEND": "jax"}, ["Keras runs on 'jax' here"]),
    "another backend": ("", {"KERAS_BACKEND": "numpy"}, ["Keras runs on 'numpy' here", 'KERAS_BACKEND="tensorflow"']),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named_with_what_to_type(case):
    prelude, environment, expected = MISSING[case]
    code = (
        f"{prelude}\ntry:\n    import keras_mp\nexcept ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    assert run.stdout.startswith("MissingTensorFlowError ")
    for text in expected:
        assert text in run.stdout
