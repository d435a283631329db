"""`subprocess.run` for verifications of exports, which starts TensorFlow once for all of them."""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

SERVER = pathlib.Path(__file__).parents[1] / "programs" / "run_saved_models.py"
PYTHON = sys.executable


@functools.cache
def _server(script, folders):
    command = [PYTHON, "-I", str(SERVER), script, folders]
    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    atexit.register(_stop, server)
    return server


def _stop(server):
    server.stdin.close()
    server.stdout.close()
    server.wait()


def run(command, *, env, **arguments):
    """Runs the script of a verification in a fork of a process that has imported TensorFlow; others as they are.

    Args:
        command: as `keras_mp.exporting.verification` gives it.
        env: the environment.
        **arguments: what else `subprocess.run` gets.
    """
    python, _, script, job, folders = command
    if python != PYTHON:
        return subprocess.run(command, env=env, **arguments)
    server = _server(script, folders)
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        files = {"stdout": stdout.name, "stderr": stderr.name}
        work = {"arguments": [job, folders], "env": dict(env), "cwd": os.getcwd(), **files}
        print(json.dumps(work), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, stdout.read().decode(), stderr.read().decode())
