"""Every block of code in a Markdown page runs as it stands, or says above it why it does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keras_mp.distribution import cluster
from keras_mp.distribution.launch import launch
from tests.test_structure import ORDER

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "examples", "findings", "saved_models", "benchmarks")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)
DISTRIBUTION = "docs/distribution.md"
NOT_RUN = r"<!-- not run: .{10,} -->"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "KERAS_BACKEND": "tensorflow"}


def blocks(page):
    """The blocks of a page: line number, language, text, and whether a comment above says why it is not run."""
    lines = (ROOT / page).read_text().splitlines()
    fences = [number for number, line in enumerate(lines) if re.match(r" *```", line)]
    assert len(fences) % 2 == 0, f"{page} has a block without an end"
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        before = lines[begin - 1].strip() if begin else ""
        text = "\n".join(lines[begin + 1 : end])
        yield begin + 1, lines[begin].strip("` "), text, re.fullmatch(NOT_RUN, before) is not None


def programs(page):
    """The Python blocks that are a file, by the name in their first line."""
    named = [(re.match(r"# (\w+\.py)\n", text), text) for _, language, text, _ in blocks(page) if language == "python"]
    return {match.group(1): text for match, text in named if match}


def joined(page):
    """All other Python blocks as one program, in which a line has the number that it has in the page."""
    lines = []
    for number, language, text, not_run in blocks(page):
        if language == "python" and not not_run and text not in programs(page).values():
            lines += [""] * (number - len(lines)) + text.splitlines()
    return "\n".join(lines)


def run(program, folder, *arguments):
    path = folder / "program.py"
    path.write_text(program)
    finished = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
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


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page):
    for number, language, text, not_run in blocks(page):
        runs = language in ("python", "text") and not not_run
        assert runs or not_run, f"{page}:{number}: a block of {language!r} needs <!-- not run: why --> above it"
        if language == "text":  # output
            assert not re.search(r"^(import|from|def) ", text, re.MULTILINE), f"{page}:{number}: say ```python"


@pytest.mark.parametrize("page", [page for page in PAGES if joined(page).strip()])
def test_the_python_of_a_page_runs(page, tmp_path):
    printed = run(joined(page), tmp_path)
    if page == DISTRIBUTION:
        assert "jit_compile=True: XLA compiles the forward and backward pass." in printed.splitlines()
    if page == "README.md":
        accuracies = [float(each) for each in re.findall(r" accuracy: (\S+)", printed)]
        assert accuracies[-1] > 0.5, "the model of the README learns nothing"
        assert (tmp_path / "saved_models" / "example" / "1" / "saved_model.pb").exists()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match(r"https?:|#", target):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), f"{page} links to {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8000


def test_the_program_for_several_workers(tmp_path):
    program = programs(DISTRIBUTION)["train.py"]
    alone = re.findall(r"loss \d\.\d{4}$", run(program, tmp_path, tmp_path / "alone"), re.MULTILINE)
    printed = run_by_workers(program, tmp_path, tmp_path / "two")
    assert len(alone) == 1
    for worker in (0, 1):
        assert f"[worker {worker}] {alone[0]}" in printed.splitlines()
    assert (tmp_path / "two" / "model.keras").exists()


def test_workers_share_files_and_elements(tmp_path):
    program = programs(DISTRIBUTION)["shards.py"]
    rows = [(a, b, (a * b) % 7) for a in range(5) for b in range(5)]
    for number in range(3):  # one worker has two files, and the files have different numbers of rows
        part = rows[number * 10 : (number + 1) * 10]
        (tmp_path / f"{number}.csv").write_text("".join(f"{a},{b},{c}\n" for a, b, c in part))
    loss = sum((a + b - c) ** 2 for a, b, c in rows) / len(rows)
    expected = f"by file {loss:.4f}, by element {loss:.4f}"
    assert expected in run(program, tmp_path, tmp_path).splitlines()
    printed = run_by_workers(program, tmp_path, tmp_path).splitlines()
    assert f"[worker 0] {expected}" in printed
    assert f"[worker 1] {expected}" in printed


def test_the_example_of_tf_config_is_one():
    text = re.search(r"TF_CONFIG='(.*?)'", (ROOT / DISTRIBUTION).read_text()).group(1)
    assert cluster.from_environment({"TF_CONFIG": text}).own_address == "10.0.0.2:12345"


def test_the_page_on_the_structure_lists_the_rooms_in_the_order_of_imports():
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (ROOT / "docs" / "structure.md").read_text(), re.MULTILINE)
    rooms = [name for cell in cells for name in re.findall(r"\w+", cell)]
    assert rooms == [room for room in ORDER if room != "__main__"]
