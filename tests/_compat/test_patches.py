"""What importing keras_mp changes, and what its first use changes: a table in `docs/importing.md` names all of it."""

import ast
import importlib
import json
import pathlib
import re
import subprocess
import sys
import threading

import keras
import pytest

import keras_mp
from keras_mp._compat import execution, patches
from keras_mp._compat.replacing import around, replaced

ROOT = pathlib.Path(__file__).parents[2]
ROWS = re.findall(r"^\| `((?:keras|tensorflow)\.[^`]*)` \| ([^|]*) \|", (ROOT / "docs/importing.md").read_text(), re.M)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a program sees that imports keras_mp and uses stock Keras."""
    command = [sys.executable, str(ROOT / "tests/programs/plain_keras.py"), str(tmp_path_factory.mktemp("plain"))]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("when", ["tracebacks", "tracebacks after first use"])
def test_no_frame_of_ours_is_in_a_traceback_of_stock_keras(seen, when):
    assert len(seen[when]) > 20
    for case, text in seen[when].items():
        assert text, f"{case!r} does not fail any more"
        assert seen["package"] not in text, f"{case}:\n{text}"


def test_the_table_in_the_docs_names_what_importing_changes(seen):
    at_import = sorted(name for name, when in ROWS if when == "import")
    assert seen["changed at import"] == seen["changed before first use"] == at_import


def test_the_table_in_the_docs_names_what_the_first_use_changes(seen):
    assert seen["changed at first use"] == sorted(name for name, when in ROWS if when in ("import", "first use"))


def test_importing_the_package_imports_nothing_but_itself_beside_keras(seen):
    # Every program of every user pays for a heavy import.
    assert seen["imported"] == ["keras_mp"]


def test_importing_changes_no_setting_of_the_process(seen):
    assert seen["settings"] == []


def test_a_program_of_stock_keras_gets_no_warning_of_ours(seen):
    assert seen["warnings"] == []


@pytest.mark.parametrize(
    "use",
    [
        lambda: keras_mp.set_policy("float32"),
        lambda: keras_mp.policy_scope("float32").__enter__(),
        lambda: keras_mp.PolicyMap("float32"),
        lambda: keras_mp.LossScaleOptimizer("sgd"),
        lambda: keras_mp.Model(),
        lambda: keras_mp.convert(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), "float32"),
        execution.current,
    ],
    ids=["set_policy", "policy_scope", "PolicyMap", "LossScaleOptimizer", "Model", "convert", "a layer's call"],
)
def test_the_first_use_is_noticed(use, monkeypatch):
    seen = []
    monkeypatch.setattr(patches, "install_on_first_use", lambda: seen.append(True))
    use()
    assert seen


def test_the_table_in_the_docs_names_what_is_replaced_for_a_block():
    """Reads the calls of `replaced` in `_compat`, whose functions are keywords or a dictionary of the module."""
    found = set()
    for path in (ROOT / "keras_mp/_compat").glob("*.py"):
        module = importlib.import_module(f"keras_mp._compat.{path.stem}") if path.stem != "__init__" else None
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "replaced":
                for keyword in node.keywords:
                    found |= {keyword.arg} if keyword.arg else set(getattr(module, keyword.value.id))
    assert found == {name.rpartition(".")[2] for name, when in ROWS if when.startswith("block")}


def test_a_function_around_another_one_is_in_no_traceback():
    def fails(x):
        return 1 / x

    seen = []
    outer = around(around(fails, before=lambda x: seen.append(x)), after=lambda result, x: result + x)
    assert outer(2) == 2.5
    assert seen == [2]
    with pytest.raises(ZeroDivisionError) as caught:
        outer(0)
    assert [each.name for each in caught.traceback][1:] == ["fails"]
    with pytest.raises(TypeError) as caught:
        outer()
    assert len(caught.traceback) <= 2


def test_threads_may_replace_the_same_function_at_the_same_time():
    original, ours = keras.Layer.add_loss, lambda self, loss: None
    inside, leave = threading.Event(), threading.Event()

    def other():
        with replaced(keras.Layer, add_loss=ours):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with replaced(keras.Layer, add_loss=ours):
        leave.set()
        thread.join()
        assert keras.Layer.add_loss is ours
    assert keras.Layer.add_loss is original
