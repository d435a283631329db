"""Nothing on the step's path that a TPU cannot compile, seen without one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from benchmarks import aot
from keras_mp._compat import graph_errors
from tests.programs import tpu as tpu_program

# What a policy gains on this machine does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::keras_mp.errors.KerasMPWarning")

POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]

# What runs in Python or on the host, or whose result has a shape that depends on values.
UNFIT = re.compile(
    r".*PyFunc.*|.*Host.*|.*Infeed.*|.*Outfeed.*|Assert|Print.*|Debug.*|CheckNumerics.*|Where|Unique.*|BooleanMask|"
    r"DynamicPartition|SetDiff1D|ListDiff|.*String.*|AsString|.*Summary|NonMaxSuppression(V[1-4])?|.*Cudnn.*|_Mkl.*"
)


def operations(function):
    """The types of all operations of a function, those of the functions that it calls among them."""
    definition = function.get_concrete_function().graph.as_graph_def()
    nodes = [*definition.node, *(node for inner in definition.library.function for node in inner.node_def)]
    return {node.op for node in nodes}


@pytest.mark.parametrize(
    "policy",
    [pytest.param(policy, marks=() if policy == "mixed_bfloat16" else pytest.mark.slow) for policy in POLICIES],
)
def test_the_step_has_nothing_that_a_tpu_cannot_compile(policy):
    function = tf.function(tpu_program.make_step(policy), jit_compile=True, autograph=False)
    found = operations(function)
    assert len(found) > 50
    assert {"AssignVariableOp", "MatMul", "Conv2D"} <= found
    assert not {name for name in found if UNFIT.fullmatch(name)}
    # XLA itself takes all of it, and knows every shape: "<=" marks the bound of a dimension that it does not know.
    hlo = function.experimental_get_compiler_ir()(stage="hlo")
    assert "ENTRY" in hlo
    assert not re.findall(r"\w+\[[^\]]*<=[^\]]*\]", hlo)
    assert not re.findall(r" (?:infeed|outfeed|send|recv)\(", hlo)


def test_what_a_tpu_cannot_compile_would_be_seen():
    def raises(x):
        with tf.control_dependencies([graph_errors.raise_from_graph(ValueError, [x])]):
            return tf.boolean_mask(tf.debugging.check_numerics(x, "x"), x > 0)

    function = tf.function(lambda: raises(tf.ones(3)))
    assert {"EagerPyFunc", "CheckNumerics", "Where"} <= {name for name in operations(function) if UNFIT.fullmatch(name)}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_compiler_of_a_tpu_takes_the_whole_step(policy):
    try:
        aot.require()
    except ImportError as error:
        pytest.skip(str(error))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.programs.tpu", policy],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1])["mib"] > 0
