"""The shape of the package: which way imports point, what is private and public, and that docstrings' examples run."""

import ast
import doctest
import functools
import importlib
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import errors

PACKAGE = pathlib.Path(keras_mp.__file__).parent

# Data flows in this order. A package may import the ones before it. A new one takes its place here.
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
    "diagnostics",
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


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def place(path):
    """The part of the package that a file belongs to; None for the package's own `__init__`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported_parts(path):
    """The parts of the package that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree_of(path)):
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


def test_order_names_what_exists():
    assert set(ORDER) == {place(path) for path in FILES} - {None}


def test_no_file_is_a_drawer_for_leftovers():
    names = {path.stem for path in FILES}
    assert not names & {"util", "utils", "helper", "helpers", "common", "misc"}


# Lines of the files that are longer than they should be. This list may only shrink.
LONG = {
    "optimizers/loss_scale_optimizer.py": 478,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    lines, name = len(path.read_text().splitlines()), path.relative_to(PACKAGE).as_posix()
    assert lines <= LONG.get(name, 450), "split it by idea"
    assert lines > 450 or name not in LONG, f"take {name} off LONG"


def test_long_files_exist():
    assert all((PACKAGE / name).is_file() for name in LONG)


# --- private names ---------------------------------------------------------------------------------------------------

OUTSIDE = [path for path in FILES if "_compat" not in path.parts]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_modules_of_tensorflow_and_keras_are_named_in_one_place(path):
    tree = tree_of(path)
    imported = [
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    private = ("keras.src", "tensorflow.python", "tensorflow.compiler", "tensorflow.lite")
    assert not [name for name in imported if name.startswith(private)]
    internal = [node for node in ast.walk(tree) if getattr(node, "attr", None) == "__internal__"]
    assert not [f"line {node.lineno}: {ast.unparse(node)}" for node in internal]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_classes_of_others_are_changed_in_one_place(path):
    tree = tree_of(path)
    foreign = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("keras_mp"))
    }
    changed = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, (ast.Store, ast.Del))
        and ast.unparse(node).split(".")[0] in foreign
    ]
    allowed = {"_compat/patches.py", "cli/quiet.py"}  # the second one redirects the command's own messages
    assert not changed or path.relative_to(PACKAGE).as_posix() in allowed


# Methods that Keras's classes call under a private name, and that layers of ours override.
OVERRIDES = {
    "_apply_scores": (keras.layers.Attention, "attention without a matrix of all scores"),
    "_calculate_scores": (keras.layers.Attention, "scores that are summed in float32"),
    "_compute_attention": (keras.layers.MultiHeadAttention, "attention without a matrix of all scores"),
    "_compute_attention_mask": (keras.layers.MultiHeadAttention, "masks that are not written out"),
    "_moments": (keras.layers.BatchNormalization, "statistics in float32"),
    "_validate_inputs": (keras.layers.Attention, "masks by other words"),
}

# Public in spite of its name, or an attribute that our code sets on a Keras object.
KNOWN = {
    "_fields": "of a named tuple",
    "_replace": "of a named tuple",
    "_converted_to": "on a converted model, the policy to write into its files",
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(path):
    """The names that a file defines: functions, classes, variables, and attributes that methods set on `self`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (each.id for each in node.targets if isinstance(each, ast.Name))


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(path):
    """The private attributes that a file reads anywhere or sets on another object, also by `getattr` and its like."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and not (isinstance(node.ctx, ast.Store) and is_self(node.value)):
            name = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = getattr(node.args[1], "value", "")
        else:
            continue
        if isinstance(name, str) and is_private(name):
            yield node.lineno, name


OURS = {name for path in OUTSIDE for name in defined_in(path)}


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_attributes_of_tensorflow_and_keras_are_used_in_one_place(path):
    found = [f"{path.name}:{line}: {name}" for line, name in private_uses(path) if name not in OURS | KNOWN.keys()]
    assert not found, "nothing outside `_compat` defines this attribute: give it a function in `_compat`"


def private_names_of_keras():
    """The private members of Keras's classes that ours may inherit from."""
    bases = [keras.Operation, keras.Loss, keras.Metric, keras.optimizers.Optimizer, keras.callbacks.Callback]
    bases += [keras.DTypePolicy, keras.Variable]
    while bases:
        cls = bases.pop()
        if cls.__module__.startswith("keras."):
            yield from filter(is_private, vars(cls))
            bases.extend(type.__subclasses__(cls))


def test_overrides_of_private_methods_are_listed_and_keras_still_has_them():
    assert OURS & set(private_names_of_keras()) == OVERRIDES.keys()
    assert all(callable(getattr(cls, name, None)) for name, (cls, _) in OVERRIDES.items())


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.KerasMPError)
}

# Stand-ins for Keras's own classes and functions raise what those raise for the same mistake.
DROP_INS = ("activations/", "layers/", "losses/", "optimizers/loss_scale_optimizer.py")

# All the other exceptions that are no `KerasMPError`.
RAISED = {
    ("_compat/graph_errors.py", "RuntimeError"): "a mark that becomes the real error outside the graph",
    ("conversion/copying.py", "NotImplementedError"): "an abstract method",
    ("distribution/launch.py", "SystemExit"): "the launcher's exit status",
    ("exporting/publishing.py", "AssertionError"): "unreachable",
    ("exporting/publishing.py", "OSError"): "the system's error that another program met",
    ("ops/attention/blocks.py", "NotImplementedError"): "a gradient that does not exist",
    ("policies/policy.py", "TypeError"): "an object that is no model, as Python refuses it",
    ("training/forward_backward.py", "_TotalsWantedError"): "caught in the same file",
    ("tuning/timing.py", "ValueError"): "`tune` reports it with all other errors of a candidate",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_errors_raised_on_purpose_are_ours_or_keras_own(path):
    name, tree = path.relative_to(PACKAGE).as_posix(), tree_of(path)
    makers = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) in ERRORS
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue  # an error that was caught, or made before
        made = ast.unparse(node.exc.func)
        known = made in ERRORS or made.removeprefix("self.") in makers or (name, made) in RAISED
        drop_in = name.startswith(DROP_INS) and made in ("ValueError", "TypeError")
        command = name.startswith("cli/") and made.startswith("typer.")
        again = made == "type(error)"
        assert known or drop_in or command or again, f"{name}:{node.lineno} raises {made}"


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_gradients_of_ones_own_and_static_shapes_go_through_fusion(path):
    """Where TensorFlow's know neither variables nor forward accumulators."""
    found = {
        node.attr
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and node.attr in ("custom_gradient", "ensure_shape")
        and isinstance(node.value, ast.Name)
        and node.value.id == "tf"
    }
    assert not found or "_compat" in path.parts or path.name == "fusion.py"


# --- the public face -------------------------------------------------------------------------------------------------

PUBLIC_MODULES = {"activations", "diagnostics", "errors", "hardware", "layers", "losses"}


def test_all_names_what_is_public():
    public = {
        name for name, value in vars(keras_mp).items() if not name.startswith("_") and not isinstance(value, type(ast))
    }
    # Modules that the user reaches by the package's name are listed, the others are not.
    assert set(keras_mp.__all__) == public | PUBLIC_MODULES
    assert keras_mp.__all__ == sorted(keras_mp.__all__)


def test_dir_shows_what_is_public():
    shown = dir(keras_mp)
    assert [name for name in shown if not name.startswith("__")] == keras_mp.__all__
    assert {"__version__", "__all__", "__doc__"} <= set(shown)


def test_no_public_function_has_the_name_of_a_package():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - PUBLIC_MODULES
    assert not packages & set(keras_mp.__all__)
    assert all(isinstance(getattr(keras_mp, name), type(ast)) for name in PUBLIC_MODULES)


def test_the_version_has_one_source():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert 'version = { attr = "keras_mp.__version__" }' in project
    # Building reads the file and does not run it.
    assert f'\n__version__ = "{keras_mp.__version__}"\n' in (PACKAGE / "__init__.py").read_text()


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("keras_mp", "keras_mp.cli.app")])
def test_every_module_lists_what_it_defines_for_others(name):
    module = importlib.import_module(name)
    listed = set(getattr(module, "__all__", ()))
    defined = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and isinstance(value, (type, type(lambda: None)))
        and getattr(value, "__module__", "").startswith(name)
    }
    # `_compat` hands on what it imports as itself, and an object of a module may be no function or class.
    nodes = list(ast.walk(ast.parse(pathlib.Path(module.__file__).read_text())))
    handed_on = {
        alias.asname
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assigned = {
        each.id for node in nodes if isinstance(node, ast.Assign) for each in node.targets if isinstance(each, ast.Name)
    }
    assert defined | handed_on <= listed <= defined | handed_on | assigned


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = {"tf": tf, "np": np, "keras": keras, "keras_mp": keras_mp, **vars(module)}
    result = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(keras_mp.__all__) - PUBLIC_MODULES))
def test_what_is_public_has_a_docstring_with_its_arguments(name):
    text = getattr(keras_mp, name).__doc__
    assert text
    assert any(section in text for section in ("Args:", "Returns:", "Attributes:"))
