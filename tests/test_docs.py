"""The code in `docs/` and in the README's section on several devices runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keras_mp.distribution.launch import launch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "distribution.md").read_text()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def blocks(text):
    """The Python blocks of a page: programs by their file names, and all others one after the other."""
    found = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    programs = {match.group(1): block for block in found if (match := re.match(r"# (\w+\.py)\n", block))}
    return programs, "\n".join(block for block in found if block not in programs.values())


def run(program, folder, *arguments, **variables):
    path = folder / "program.py"
    path.write_text(program)
    finished = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**ENVIRONMENT, **variables},
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def run_by_workers(program, folder, *arguments):
    path, log = folder / "program.py", folder / "log"
    path.write_text(program)
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as output:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PYTHONWARNINGS", "ignore")
        code = launch([sys.executable, str(path), *map(str, arguments)], 2, output=output, grace_seconds=1.0)
    assert code == 0, log.read_text()[-3000:]
    return log.read_text()


def test_what_runs_in_one_process(tmp_path):
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"\*\*Several devices and machines\*\*.*?(?=\n\*\*)", readme, re.DOTALL).group()
    tells = "print('README:', model.jit_compile_reason)\n"
    printed = run("\n".join([blocks(PAGE)[1], blocks(section)[1], tells]), tmp_path).splitlines()
    assert "jit_compile=True: XLA compiles the forward and backward pass." in printed
    assert "README: jit_compile=True: XLA compiles the forward and backward pass." in printed


def test_the_program_for_several_workers(tmp_path):
    program = blocks(PAGE)[0]["train.py"]
    alone = re.findall(r"loss \d\.\d{4}$", run(program, tmp_path, tmp_path / "alone"), re.MULTILINE)
    printed = run_by_workers(program, tmp_path, tmp_path / "two")
    assert len(alone) == 1
    for worker in (0, 1):
        assert f"[worker {worker}] {alone[0]}" in printed.splitlines()
    assert (tmp_path / "two" / "model.keras").exists()


def test_workers_share_files_and_elements(tmp_path):
    program = blocks(PAGE)[0]["shards.py"]
    rows = [(a, b, (a * b) % 7) for a in range(5) for b in range(5)]
    for number in range(3):  # one worker has two files, and the files have not as many rows
        part = rows[number * 10 : (number + 1) * 10]
        (tmp_path / f"{number}.csv").write_text("".join(f"{a},{b},{c}\n" for a, b, c in part))
    loss = sum((a + b - c) ** 2 for a, b, c in rows) / len(rows)
    expected = f"by file {loss:.4f}, by element {loss:.4f}"
    assert expected in run(program, tmp_path, tmp_path).splitlines()
    printed = run_by_workers(program, tmp_path, tmp_path).splitlines()
    assert f"[worker 0] {expected}" in printed
    assert f"[worker 1] {expected}" in printed


def test_the_example_of_tf_config_is_one():
    from keras_mp.distribution import cluster

    text = re.search(r"TF_CONFIG='(.*?)'", PAGE).group(1)
    assert cluster.from_environment({"TF_CONFIG": text}).own_address == "10.0.0.2:12345"
