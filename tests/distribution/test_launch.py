"""`keras-mp launch`: processes without TensorFlow, so that what is tested is how they are started and ended."""

import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from keras_mp.cli.app import app
from keras_mp.distribution.launch import launch
from keras_mp.errors import ArgumentError


def run(code, workers=2, **options):
    """Exit code and sorted lines of a program run by several workers."""
    printed = io.BytesIO()
    prelude = "import json, os, signal, sys, time\nindex = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
    result = launch([sys.executable, "-c", prelude + code], workers, output=printed, **options)
    return result, sorted(printed.getvalue().decode().splitlines())


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid):
    """Whether a process ends: one that was sent SIGKILL, and is nobody's here to wait for, does so a moment later."""
    end = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


def test_each_worker_has_the_cluster_and_its_own_index():
    code, lines = run("print(os.environ['TF_CONFIG'])", workers=3)
    assert code == 0
    configs = []
    for index, line in enumerate(lines):
        prefix, _, text = line.partition("] ")
        assert prefix == f"[worker {index}"
        configs.append(json.loads(text))
    assert [config["task"] for config in configs] == [{"type": "worker", "index": index} for index in range(3)]
    addresses = configs[0]["cluster"]["worker"]
    assert len(set(addresses)) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert all(config["cluster"] == configs[0]["cluster"] for config in configs)


def test_both_streams_come_line_by_line():
    code, lines = run("print('out'); print('error', file=sys.stderr); sys.stdout.write('no newline')", workers=1)
    assert (code, lines) == (0, ["[worker 0] error", "[worker 0] no newline", "[worker 0] out"])


def test_a_worker_that_fails_ends_the_others():
    start = time.monotonic()
    code, lines = run("print(os.getpid()); sys.exit(7) if index == 1 else time.sleep(600)", workers=3)
    assert time.monotonic() - start < 60
    assert code == 7
    assert lines[0] == "[launch] worker 1 ended with exit code 7; the other 2 still running are ended too"
    assert not any(is_running(int(line.split()[-1])) for line in lines[1:])


def test_a_worker_that_is_killed_ends_others_that_do_not_listen_with_what_they_started(tmp_path):
    ready = str(tmp_path / "ready")
    code, lines = run(
        "import pathlib, subprocess\n"
        f"ready = pathlib.Path({ready!r})\n"
        "if index == 1:\n"
        "    while not ready.exists():\n"
        "        time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "ready.touch()\n"
        "time.sleep(600)\n",
        grace_seconds=0.5,
    )
    assert code == 128 + signal.SIGKILL
    assert lines[0] == "[launch] worker 1 was ended by SIGKILL; the other 1 still running are ended too"
    assert ends(int(lines[1].split()[-1]))


def test_workers_that_end_well_one_after_the_other_are_waited_for():
    assert run("time.sleep(index); print('done')") == (0, ["[worker 0] done", "[worker 1] done"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_worker_stays_behind_when_the_command_is_ended(number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-c", "from keras_mp.cli.app import app; app()", "launch", "--workers", "2", str(script)]
    # A suite that runs in the background of a shell hands on that Ctrl-C is ignored.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=listens) as process:
        pids = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
        process.send_signal(number)
        try:
            assert process.wait(60) != 0
        finally:
            process.kill()
    assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("command", "workers", "words"),
    [(["true"], 0, r"workers=0.: expected at least 1"), ([], 2, "expected a program to run")],
)
def test_what_cannot_be_launched_is_refused(command, workers, words):
    with pytest.raises(ArgumentError, match=words):
        launch(command, workers)


def test_the_command_passes_arguments_and_the_exit_code(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:], flush=True)\nsys.exit(3 if '--fail' in sys.argv else 0)\n")
    arguments = ["--epochs", "2", "--fail"]
    program = "from keras_mp.cli.app import app; app()"
    result = subprocess.run(
        [sys.executable, "-c", program, "launch", "--workers", "1", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 3
    assert f"[worker 0] {arguments}" in result.stdout


def test_a_script_that_is_not_there_is_named():
    result = CliRunner().invoke(app, ["launch", "nowhere.py"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "There is no file 'nowhere.py'. Name a Python script, or a module after --module." in result.output
