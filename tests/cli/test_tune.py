"""The command `keras-mp tune`."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from keras_mp.cli.app import app


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "program_to_tune.py").write_text(
        "import keras, numpy as np\n"
        "def made():\n"
        "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])\n"
        "    model.compile('sgd', 'mse')\n"
        "    return model, (np.ones((8, 4)), np.ones((8, 2)))\n"
        "def uncompiled():\n"
        "    return keras.Sequential([keras.Input((4,))]), (np.ones((8, 4)), np.ones((8, 2)))\n"
        "def alone():\n"
        "    return made()[0]\n"
        "def three():\n"
        "    return made()[0], 1, 2\n"
        "def fails():\n"
        "    return 1 / 0\n"
        "def needs(rows):\n"
        "    return made()\n"
    )
    (tmp_path / "program_that_imports.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "200"})


def test_the_command_prints_a_table_or_json(program):
    result = run("program_to_tune:made", "--policy", "float32", "--budget", "0.01")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.output.splitlines() if line.strip().startswith("* ")]
    assert row.split()[1:4] == ["float32", "no", "1"]
    assert "Leave the model as it is" in result.output
    told = json.loads(run("program_to_tune:made", "--policy", "float32", "--budget", "0.01", "--json").stdout)
    assert (told["policy"], told["jit_compile"], told["steps_per_execution"]) == ("float32", False, 1)
    assert told["candidates"][0]["step_ms"] > 0
    assert told["candidates"][0]["current"] is True
    assert any("in bfloat16 (" in finding for finding in told["findings"])


def test_the_command_shows_where_a_function_fails_and_not_how_it_was_called(program):
    command = [sys.executable, "-m", "keras_mp", "tune", "program_to_tune:fails"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert re.findall('File ".*/(.*)", line', ran.stderr) == ["program_to_tune.py"]
    assert ran.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("program_to_tune", 2, "Expected MODULE:FUNCTION"),
        ("program_to_tune.py:made", 2, "Expected MODULE:FUNCTION"),
        ("program_of_yours:made", 2, "No module named 'program_of_yours'"),
        ("./program_to_tune:made", 2, "without a path and without .py"),
        ("program_that_imports:made", 2, "was found, but one of its imports was not"),
        ("program_to_tune:needs", 2, "must take no arguments: missing a required argument: 'rows'"),
        ("program_to_tune:three", 2, "returned a tuple of 3. Expected (model, batch)"),
        ("program_to_tune:mad", 2, "It has: made, uncompiled, alone, three, fails, needs."),
        ("program_to_tune:alone", 2, "returned Sequential. Expected (model, batch)"),
        ("program_to_tune:uncompiled", 1, 'model.compile("adam", loss)'),
    ],
)
def test_the_command_says_what_is_missing(program, source, code, words):
    result = run(source)
    assert result.exit_code == code
    assert words in " ".join(result.output.replace("│", "").split())
