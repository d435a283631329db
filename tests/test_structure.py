"""The shape of the package: which way imports point, what is public, and that the examples in docstrings run."""

import ast
import doctest
import importlib
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp

PACKAGE = pathlib.Path(keras_mp.__file__).parent

# Data flows in this order. A module may import what stands before it; a new one takes its place here.
ORDER = [
    "errors",
    "_compat",
    "hardware",
    "policies",
    "distribution",
    "ops",
    "activations",
    "losses",
    "layers",
    "optimizers",
    "training",
    "conversion",
    "tuning",
    "exporting",
    "cli",
    "__main__",
]

FILES = sorted(path for path in PACKAGE.rglob("*.py"))
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES
    if not path.name.startswith("_run_")
)


def place(path):
    """The part of the package that a file belongs to; None for the package's own `__init__`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported_parts(path):
    """The parts of the package that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write the whole name, from keras_mp..."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "keras_mp":
                yield node.lineno, name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = place(path)
    edges = list(imported_parts(path))
    if path.name == "_run_saved_model.py":
        assert edges == [], "it runs where the package cannot be imported"
        return
    if part is None:
        return
    assert part in ORDER, f"{part} has no place in ORDER"
    for line, other in edges:
        assert other == part or ORDER.index(other) < ORDER.index(part), f"{path.name}:{line}: {part} imports {other}"


def test_no_file_is_a_drawer_for_leftovers():
    names = {path.stem for path in FILES}
    assert not names & {"util", "utils", "helper", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_modules_of_tensorflow_and_keras_are_named_in_one_place(path):
    found = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.startswith(("keras.src", "tensorflow.python"))
    ]
    assert not found or "_compat" in path.parts


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_gradients_of_ones_own_and_static_shapes_go_through_fusion(path):
    """Where TensorFlow's know neither variables nor forward accumulators."""
    found = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("custom_gradient", "ensure_shape")
        and isinstance(node.value, ast.Name)
        and node.value.id == "tf"
    }
    assert not found or "_compat" in path.parts or path.name == "fusion.py"


def test_all_names_what_is_public():
    public = {
        name for name, value in vars(keras_mp).items() if not name.startswith("_") and not isinstance(value, type(ast))
    }
    # Modules that the user is meant to reach by the package's name are listed, the others are not.
    assert set(keras_mp.__all__) == public | {"activations", "errors", "layers", "losses"}
    assert keras_mp.__all__ == sorted(keras_mp.__all__)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("keras_mp", "keras_mp.cli.app")])
def test_every_module_lists_what_it_defines_for_others(name):
    module = importlib.import_module(name)
    defined = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and isinstance(value, (type, type(lambda: None)))
        and getattr(value, "__module__", "").startswith(name)
    }
    assert set(getattr(module, "__all__", ())) == defined


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = {"tf": tf, "np": np, "keras": keras, "keras_mp": keras_mp, **vars(module)}
    result = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(keras_mp.__all__) - {"activations", "errors", "layers", "losses"}))
def test_what_is_public_has_a_docstring_with_its_arguments(name):
    text = getattr(keras_mp, name).__doc__
    assert text
    assert any(section in text for section in ("Args:", "Returns:", "Attributes:"))


def test_importing_the_package_imports_nothing_but_itself_beside_keras():
    # What a heavy import costs, every program of every user pays.
    code = (
        "import sys, keras\n"
        "before = set(sys.modules)\n"
        "import keras_mp\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "['keras_mp']\n"
