"""The memory of a step on a TPU v5e and an H100, without either: `python -m benchmarks.aot`.

TensorFlow lowers the step to HLO on the CPU. The target's own compiler needs no device. It lays the step out, and
reports the memory beside its inputs and weights. So the figures are the compiler's, not an estimate. The steps of
`benchmarks.layers` and `benchmarks.attention` are a chain of layers, forward and backward. The steps of the models of
`benchmarks.workloads` have the optimizer's update too, as one program.

It needs the extra `aot`, and calls private functions of jaxlib. It worked with jax and jaxlib 0.10.2, libtpu 0.0.52,
jax-cuda12-plugin 0.10.2, TensorFlow 2.21.0 and Keras 3.15.1. Each row of a table runs in a separate process. When a
compiler ends that process, another one runs the rest of the row.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import keras
import tensorflow as tf
import typer

from benchmarks import attention, harness, layers, workloads
from keras_mp._compat import execution, keras_models

__all__ = [
    "TARGETS",
    "THEMES",
    "TRAINING",
    "attention_steps",
    "layer_steps",
    "memory",
    "require",
    "training_steps",
    "whole_step",
]

TARGETS = {"tpu-v5e": "TPU v5e", "h100": "H100"}
PACKAGES = {
    "jax": "jax",
    "libtpu": "libtpu",
    "jax_plugins.xla_cuda12": "jax-cuda12-plugin and jax-cuda12-pjrt",
}
_TPU_TOPOLOGY = "v5e:2x2"
# Otherwise libtpu asks for these over the network.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is held, so several processes may compile
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "JAX_PLATFORMS": "cpu",
}
_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
 registers_per_block_limit: 65536 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
 device_description_str: "NVIDIA H100 80GB HBM3" """


def _resized(name: str, row: str, batch: int, **settings: Any) -> workloads.Workload:
    (found,) = (workload for workload in workloads.WORKLOADS if workload.name == name)
    return dataclasses.replace(found, name=row, batch=batch, settings={**found.settings, **settings})


# The workloads of the theme "training". On a CPU they are timed with other sizes, which fill no accelerator.
TRAINING = [
    _resized("ResNet", "ResNet, 64 x 64 pixels", 64, size=64),
    _resized("transformer", "transformer, 256 steps", 32, steps=256, width=256, layers=2),
    dataclasses.replace(workloads.LANGUAGE_MODEL, name="language model, 4096 words"),
]

# Functions that make a step, by the name of a row and of a case.
Steps = Mapping[str, Mapping[str, Callable[[], Callable[[], Any]]]]


def layer_steps() -> Steps:
    """Returns the steps of `benchmarks.layers`."""

    def make(workload: layers.Workload, ours: bool, policy: str) -> Callable[[], Any]:
        what = layers.find(workload, ours)
        # The chain has only a multiplication between layers. A network has ops there that XLA would not compute twice.
        between = execution.optimization_barrier
        return layers.make_step(workload, what, policy, depth=layers.DEPTH, batch_is_static=True, between=between)

    return {workload.name: _cases(functools.partial(make, workload)) for workload in layers.WORKLOADS}


def attention_steps() -> Steps:
    """Returns the steps of `benchmarks.attention`."""
    return {
        attention.group_name(length, causal): _cases(
            functools.partial(attention.make_step, length, causal, batch_is_static=True)
        )
        for causal in (False, True)
        for length in attention.LENGTHS
    }


def training_steps() -> Steps:
    """Returns whole training steps of the models of `benchmarks.workloads`, in the sizes of `TRAINING`."""

    def make(workload: workloads.Workload, ours: bool, policy: str) -> Callable[[], Any]:
        model = workloads.make(workload, workloads.OURS if ours else workloads.STOCK, policy, jit_compile=True)
        return whole_step(model, workload.batches(1))

    return {workload.name: _cases(functools.partial(make, workload)) for workload in TRAINING}


def whole_step(model: keras.Model, batch: Any) -> Callable[[], Any]:
    """Returns the step of `fit`, with the optimizer's update, as a function without arguments and with static shapes.

    Args:
        model: compiled.
        batch: `(x, y)` or `(x, y, sample_weight)`, of arrays.

    Returns:
        A function that trains on this batch and returns the metrics.
    """
    keras_models.build(model, batch)
    model.optimizer.build(model.trainable_variables)
    # In variables, because TensorFlow would compute with constants ahead of time.
    data = keras.tree.map_structure(lambda value: tf.Variable(value, trainable=False), batch)
    return lambda: model.train_step(keras.tree.map_structure(lambda variable: variable.read_value(), data))


def _cases(make: Callable[[bool, str], Callable[[], Any]]) -> dict[str, Callable[[], Callable[[], Any]]]:
    return {
        layers.case_name(ours, policy): functools.partial(make, ours, policy)
        for policy in attention.POLICIES
        for ours in (False, True)
    }


THEMES: Mapping[str, Callable[[], Steps]] = {
    "layers": layer_steps,
    "attention": attention_steps,
    "training": training_steps,
}


def require() -> None:
    """Raises `ImportError`, with what to install, where a compiler is missing."""
    missing = [name for module, name in PACKAGES.items() if not _there(module)]
    if missing:
        raise ImportError(
            f"The compilers for TPU and H100 need {', '.join(missing)}. Install them with: pip install -e '.[cpu,aot]' "
            "(or run `make bench-aot`, which does)."
        )


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def memory(step: Callable[[], Any], target: str) -> float:
    """Returns the temporaries and results of a step as a target's compiler lays them out.

    Results that take the place of an input do not count, as the weights, slots and metrics that a whole training step
    updates: they are in memory before it, between steps and after it. So of a whole step these are its temporaries.

    Args:
        step: a function for `tf.function`. The shapes of its variables are static.
        target: one of `TARGETS`.

    Returns:
        MiB.

    Raises:
        ImportError: where the extra `aot` is not installed.
    """
    require()
    os.environ.update(_ENVIRONMENT)
    graph = tf.function(step, jit_compile=True, autograph=False)
    hlo = graph.experimental_get_compiler_ir()(stage="hlo_serialized")
    stats = _compile(hlo, _device(target)).get_compiled_memory_stats()
    # The place of a result serves for temporaries until it is written, so the two belong together.
    return (stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes) / 2**20


def _device(target: str) -> Any:
    from jax.experimental import topologies

    if target == "h100":
        return topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology="1x1x1").devices[0]
    return topologies.get_topology_desc(_TPU_TOPOLOGY, "tpu").devices[0]


def _compile(hlo: bytes, device: Any) -> Any:
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    text = _jax.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(hlo))
    text = text if isinstance(text, str) else text.decode()
    # TensorFlow leaves mhlo.copy on variables that pass through. StableHLO has no name for it.
    text = re.sub(r"mhlo\.copy (%\S+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2", text)
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
    options = xla_client.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
    return device.client.compile(module, xla_client.DeviceList((device,)), options)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = harness.RESULTS,
    theme: Annotated[list[str] | None, typer.Option(help="layers, attention, training. All without this.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="tpu-v5e, h100. Both without this.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Compile only rows of this name, and keep the others of results of the same versions."),
    ] = None,
) -> None:
    """Compile the steps for TPU v5e and H100; write the memory they need as JSON and as a table."""
    if context.invoked_subcommand:
        return
    try:
        require()
    except ImportError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    known = [row for name in theme or THEMES for row in THEMES[name]()]
    if unknown := [row for row in only or [] if row not in known]:
        raise typer.BadParameter(f"There is no row named {unknown[0]!r}. Rows: {', '.join(known)}.")
    for name in theme or THEMES:
        _run_theme(name, target or list(TARGETS), only or [], output)


@app.command(hidden=True)
def row(theme: str, name: str, target: str, cases: list[str]) -> None:
    """Print the MiB of some cases of a row, or null and the error, a JSON line for each."""
    for case in cases:
        try:
            line = [case, round(memory(THEMES[theme]()[name][case](), target), 3), ""]
        except Exception as error:  # of any kind; the other cases go on
            line = [case, None, f"{type(error).__name__}: {error}"]
        print(json.dumps(line), flush=True)


def _run_theme(theme: str, targets: Sequence[str], only: Sequence[str], output: Path) -> None:
    machine = harness.describe_machine()
    machine["versions"] |= {name: harness.version(name) for name in ("jax", "libtpu", "jax-cuda12-plugin")}
    steps = THEMES[theme]()
    names = {target: f"{TARGETS[target]}: temporaries and results of a step" for target in targets}
    grids = _earlier(output / f"{theme}_aot.json", machine) if only else {}
    for target, grid_name in names.items():
        rows: dict[str, Sequence[float | None]] = dict(grids[grid_name]["rows"]) if grid_name in grids else {}
        for name, cases in steps.items():
            if only and name not in only:
                continue
            print(f"{theme}, {TARGETS[target]}: {name} ...", file=sys.stderr, flush=True)
            rows[name] = _in_children(theme, name, target, list(cases))
            in_order = {name: rows[name] for name in steps if name in rows}
            columns = list(next(iter(steps.values())))
            grids[grid_name] = harness.Grid(grid_name, "MiB", theme, columns, in_order).as_json()
            results = {"theme": f"{theme}_aot", "machine": machine, "grids": list(grids.values())}
            harness.write(results, output)
    print(harness.table(results))


def _earlier(path: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the grids of earlier results by name, or none where other versions made them."""
    results = json.loads(path.read_text()) if path.exists() else {}
    if not results or results["machine"]["versions"] != machine["versions"]:
        return {}
    return {grid["name"]: grid for grid in results["grids"]}


def _in_children(theme: str, name: str, target: str, cases: Sequence[str]) -> list[float | None]:
    """Returns the MiB of the cases of a row, None where one does not compile, such as stock 16-bit bilinear resizing.

    One process compiles them all. Where the compiler ends it, another one goes on after the case that it was at.
    """
    found: dict[str, float | None] = {}
    while left := [case for case in cases if case not in found]:
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.aot", "row", theme, name, target, *left],
            capture_output=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **_ENVIRONMENT},
            text=True,
        )
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        if len(lines) < len(left):
            lines.append([left[len(lines)], None, f"exit {process.returncode}\n{process.stderr[-2000:]}"])
        for case, mebibytes, error in lines:
            found[case] = mebibytes
            if error:
                print(f"{theme}, {name}, {case}, {target}: {error}", file=sys.stderr, flush=True)
    return [found[case] for case in cases]


if __name__ == "__main__":
    app()
