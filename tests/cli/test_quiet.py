"""TensorFlow's banner stays off the screen of the command, and all else reaches it."""

import os
import pathlib
import subprocess
import sys

import pytest

import keras_mp

FILE = pathlib.Path(keras_mp.__file__).parent / "cli" / "quiet.py"
PROGRAM = """
import os, runpy, sys
runpy.run_path(sys.argv[1])["start"]()
os.write(2, b"I0000 00:00 port.cc:153] oneDNN custom operations are on. You may see\\n")
os.write(2, b"F0000 00:00 kernel.cc:1] Check failed\\n")
print("Error: said by Python", file=sys.stderr)
if sys.argv[2] == "crash":
    os.write(2, b"no newline at the end")
    os.abort()
"""


@pytest.mark.parametrize("end", ["crash", "exit"])
def test_native_messages_but_the_banner_reach_the_screen(end):
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-X", "faulthandler", "-c", PROGRAM, str(FILE), end]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (ran.returncode == 0) == (end == "exit")
    assert "oneDNN" not in ran.stderr
    assert "F0000 00:00 kernel.cc:1] Check failed\n" in ran.stderr
    assert "Error: said by Python\n" in ran.stderr
    assert ("no newline at the end" in ran.stderr) == ("Fatal Python error: Aborted" in ran.stderr) == (end == "crash")


def test_the_banner_is_kept_on_demand():
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}
    command = [sys.executable, "-c", PROGRAM, str(FILE), "exit"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "oneDNN custom operations are on" in ran.stderr
