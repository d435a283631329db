"""The limit that matmuls set for the speed of a training step: `python -m benchmarks.ceiling`.

TensorFlow runs one op after the other here, on all cores, and its profiler reports the time of each. Matmuls and
convolutions take the time of the hardware's kernels, whoever calls them. The update takes the time to read and write
the weights. `keras_mp` can speed up only the rest.
"""

import collections
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tensorflow as tf
import typer

# TensorFlow has no public name for its profiler's format.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks import harness, training, workloads
from benchmarks.harness import Grid

__all__ = ["Parts", "parts", "time_ops"]

CASES = (training.STOCK_FLOAT32, training.STOCK_MIXED, training.OURS_MIXED)
ROUNDS, STEPS = 3, 3
_PRODUCTS = re.compile("MatMul|Conv[123]D|DepthwiseConv|Einsum")
# Op by op, an update looks like other arithmetic, so stock Keras's counts as the rest.
_UPDATES = re.compile("ResourceApply|ResourceSparseApply|ResourceScatter")


class Parts(NamedTuple):
    """Milliseconds of a whole step, of its matmuls, and of its updates by kernels."""

    step: float
    products: float
    updates: float


def time_ops(run: Callable[[], object], steps: int = STEPS) -> dict[str, float]:
    """Returns the times of the ops of a step.

    Args:
        run: runs one step, and waits for it.
        steps: number of steps.

    Returns:
        Milliseconds of a step by the type of the op, all of that type together.
    """
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(steps):
            run()
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space.ParseFromString(path.read_bytes())
    found: dict[str, float] = collections.defaultdict(float)
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                # "name:type" is an op that TensorFlow ran; others are calls of Python and what a program of XLA's does.
                name, _, kind = plane.event_metadata[event.metadata_id].name.partition(":")
                if kind.isidentifier() and not name.startswith("$"):
                    found[kind] += event.duration_ps / 1e9 / steps
    return dict(found)


def parts(run: Callable[[], object], steps: int = STEPS) -> Parts:
    """Returns the time of a step, of its matmuls, and of its updates.

    Args:
        run: runs one step, and waits for it.
        steps: number of steps.
    """
    start = time.perf_counter()
    for _ in range(steps):
        run()
    step = (time.perf_counter() - start) / steps * 1000
    ops = time_ops(run, steps)
    products, updates = (
        sum(took for kind, took in ops.items() if pattern.search(kind)) for pattern in (_PRODUCTS, _UPDATES)
    )
    return Parts(step, products, updates)


def _speedups(rounds: Mapping[str, Sequence[Parts]]) -> list[float]:
    """Returns the speed over stock Keras in float32: of our step, of its matmuls and update, and of its matmuls."""
    stock = [of.step for of in rounds[training.STOCK_FLOAT32]]
    ours = rounds[training.OURS_MIXED]
    times = ([of.step for of in ours], [of.products + of.updates for of in ours], [of.products for of in ours])
    return [statistics.median(harness.paired_ratios(stock, each)) for each in times]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = harness.RESULTS,
    loaded: Annotated[bool, typer.Option("--loaded", help="Run on a busy machine; the results say so.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each workload.")] = ROUNDS,
    only: Annotated[str, typer.Option(help="Run only workloads with this in their name.")] = "",
) -> None:
    """Time the ops of the training steps; write JSON and a table."""
    every = [*workloads.WORKLOADS, *workloads.APPLICATIONS]
    training.require_match(only, every)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    results: dict[str, Any] = harness.begin("ceiling", loaded)
    took: dict[str, list[float]] = {}
    speedups: dict[str, list[float]] = {}
    for workload in every:
        if only not in workload.name:
            continue
        print(f"{workload.name} ...", file=sys.stderr, flush=True)
        cases = {name: training.make_case(workload, name) for name in CASES}
        for case in cases.values():
            case.run()
        found: dict[str, list[Parts]] = {name: [] for name in CASES}
        for _ in range(rounds):
            for name, case in cases.items():
                found[name].append(parts(case.run))
        took[workload.name] = [
            round(statistics.median(of), 1) for name in CASES for of in zip(*found[name], strict=True)
        ]
        speedups[workload.name] = _speedups(found)
        columns = [f"{name}{of}" for name in CASES for of in (": step", ": products", ": update by kernels")]
        results["grids"] = [
            Grid("A training step, one op after the other", "ms", "workload", columns, took).as_json(),
            Grid(
                "Times as fast as the step of stock Keras in float32",
                "ours in mixed_bfloat16",
                "workload",
                ["step", "its products and update alone", "its products alone"],
                speedups,
            ).as_json(),
        ]
        harness.write(results, output)
    print(harness.table(results))


if __name__ == "__main__":
    app()
