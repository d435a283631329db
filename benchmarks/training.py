"""Whole training steps, ours against stock Keras's: `python -m benchmarks.training`.

Each workload of `benchmarks.workloads` runs in eight ways: with Keras's layers and ours, in float32 and mixed_bfloat16,
with XLA and without. A step is the step of `fit` on a batch that is ready. Ours is `keras_mp.Model` with
`LossScaleOptimizer` and our layers. `convert` makes ours from models of `keras.applications`; in float32 those keep
Keras's layers.

The memory is the peak of a process that runs five steps, less the memory before it makes its model. It holds weights,
optimizer state, compilers and programs, and tensors that grow with the rows. A second process with twice the rows shows
the last part alone.

`python -m benchmarks.training curves` trains each workload for 300 steps, in batches of an eighth of the rows. It uses
five seeds of stock float32, and the first of them for ours. `python -m benchmarks.training summary` prints the table in
docs/measured.md and draws its plot, from the files of the other commands.
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import keras
import numpy as np
import tensorflow as tf
import typer

from benchmarks import harness, workloads
from benchmarks.harness import Case, Comparison, Grid
from benchmarks.workloads import OURS, STOCK, Kit, Workload

__all__ = ["CASES", "compare_curves", "find", "loss_curve", "make_case", "plot", "require_match", "speedup", "summary"]

POLICIES = ("float32", "mixed_bfloat16")
# By name: the kit, the policy, and whether XLA compiles.
CASES: dict[str, tuple[Kit, str, bool]] = {
    f"{name}, {policy}{', XLA' * jit_compile}": (kit, policy, jit_compile)
    for jit_compile in (False, True)
    for name, kit in (("stock", STOCK), ("ours", OURS))
    for policy in POLICIES
}
STOCK_FLOAT32, STOCK_MIXED, OURS_FLOAT32, OURS_MIXED = (
    f"{name}, {policy}" for name in ("stock", "ours") for policy in POLICIES
)
# At least 2.5 times as fast as stock float32, 1.5 times as fast as stock in the same dtype.
COMPARISONS = [
    Comparison(OURS_MIXED, (STOCK_FLOAT32,), 1 / 2.5),
    Comparison(OURS_MIXED, (STOCK_MIXED,), 1 / 1.5),
    Comparison(OURS_MIXED, (STOCK_FLOAT32, f"{STOCK_FLOAT32}, XLA", STOCK_MIXED, f"{STOCK_MIXED}, XLA")),
    Comparison(STOCK_MIXED, (STOCK_FLOAT32,)),
    Comparison(OURS_FLOAT32, (STOCK_FLOAT32,)),
    Comparison(f"{OURS_MIXED}, XLA", (f"{STOCK_MIXED}, XLA",)),
    Comparison(f"{OURS_FLOAT32}, XLA", (f"{STOCK_FLOAT32}, XLA",)),
]
ROUNDS = 15
STEPS, SEEDS, SEGMENT = 300, 5, 10
ANOTHER_SEED = "stock, float32, another seed"
_LEAST_MEMORY = 100  # MiB; a peak differs by some 20 from run to run
PLOT = Path(__file__).parent.parent / "docs" / "training.png"


def find(name: str) -> Workload:
    """Returns a workload by name.

    Args:
        name: name of one of `benchmarks.workloads`.
    """
    known = [*workloads.WORKLOADS, *workloads.APPLICATIONS, workloads.LANGUAGE_MODEL]
    return next(workload for workload in known if workload.name == name)


def make_case(workload: Workload, name: str) -> Case:
    """Returns one training step of `fit`, on a batch that is ready.

    Args:
        workload: the workload to train.
        name: name of one of `CASES`.
    """
    kit, policy, jit_compile = CASES[name]
    model = workloads.make(workload, kit, policy, jit_compile)
    batch = workload.batches(1)
    model.fit(*batch, batch_size=workload.batch, verbose=0)  # builds everything
    # The size is known to the graph, as with `drop_remainder`.
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    step = model.make_train_function()
    return Case(name, lambda: {key: float(value) for key, value in step(iterator).items()})


def loss_curve(workload: Workload, name: str, seed: int, steps: int) -> list[float]:
    """Returns the loss of each step of a training.

    Args:
        workload: the workload to train.
        name: name of one of `CASES`.
        seed: seed of the initial weights and of the order of batches.
        steps: number of steps.
    """
    kit, policy, jit_compile = CASES[name]
    model = workloads.make(workload, kit, policy, jit_compile, seed)
    x, y = workload.batches(steps)  # each row once, because rows learnt by heart have almost no loss
    size = workload.batch
    losses = []
    for start in np.random.default_rng(seed).permutation(steps) * size:
        batch = keras.tree.map_structure(lambda values: values[start : start + size], (x, y))  # noqa: B023
        model.reset_metrics()
        losses.append(float(model.train_on_batch(*batch, return_dict=True)["loss"]))
    return losses


def compare_curves(curves: dict[str, Sequence[float]]) -> dict[str, float]:
    """Returns how far ours is from the same seed of stock float32, over the spread of five seeds.

    Args:
        curves: losses by name: "seed 0" to "seed 4" of stock float32, and the names of cases.

    Returns:
        For each case, the largest difference of a mean over ten steps to that of "seed 0", over the spread of the
        seeds there (the largest less the smallest), and beside it, under " at the end", that of the last 50 steps.
        Under `ANOTHER_SEED`, what that difference is for another seed of stock float32, over the spread of the rest:
        the median over the seeds.
    """
    means = {name: _means(values, SEGMENT) for name, values in curves.items()}
    seeds = np.array([values for name, values in means.items() if name.startswith("seed")])
    spreads = np.ptp(seeds, 0)
    left_out = [
        (np.abs(seeds[seed] - seeds[0]) / np.ptp(np.delete(seeds, seed, 0), 0)).max() for seed in range(1, len(seeds))
    ]
    found = {ANOTHER_SEED: float(np.median(left_out))}
    for name, values in means.items():
        if not name.startswith("seed"):
            differences = np.abs(np.array(values) - seeds[0])
            found[name] = float((differences / spreads).max())
            last = seeds[:, -5:].mean(1)
            found[f"{name} at the end"] = float(differences[-5:].mean() / (last.max() - last.min()))
    return found


def require_match(only: str, every: Sequence[Workload]) -> None:
    """Refuses a text that is in the name of no workload.

    Args:
        only: the name.
        every: the workloads.

    Raises:
        typer.BadParameter: with those that there are.
    """
    if not any(only in workload.name for workload in every):
        names = ", ".join(workload.name for workload in every)
        raise typer.BadParameter(f"No workload has {only!r} in its name. There are: {names}.")


def speedup(group: Mapping[str, Any], case: str, against: str) -> float | None:
    """Returns how many times as fast as another one case is, the median over rounds.

    Args:
        group: a group of the JSON file.
        case: the name of a case.
        against: the name of another.

    Returns:
        None where one of them was not run.

    Example:
        >>> speedup({"times_ms": {"a": [1.0, 2.0], "b": [3.0, 6.0]}}, "a", "b")
        3.0
    """
    times = group["times_ms"]
    if case not in times or against not in times:
        return None
    return statistics.median(harness.paired_ratios(times[against], times[case]))


def summary(results: Mapping[str, Any], curves: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the table in docs/measured.md.

    Args:
        results: content of the JSON file of the times.
        curves: content of the JSON file of the curves.
    """
    columns = [name for name in CASES if name != STOCK_FLOAT32]
    yield f"| times as fast as stock float32 | {' | '.join(columns)} | memory | of rows | loss |"
    yield f"|---|{'---:|' * (len(columns) + 3)}"
    grids = results["grids"]
    place, base = (grids[0]["columns"].index(name) for name in (OURS_MIXED, STOCK_FLOAT32))
    deviations = curves["grids"][0]["rows"]
    for group in results["groups"]:
        ratios = [speedup(group, case, STOCK_FLOAT32) for case in columns]
        memory = [grid["rows"].get(group["name"]) for grid in grids]
        loss = deviations.get(group["name"].partition(",")[0], [None])[0]
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        # For rows that need little memory, the difference of two processes says nothing.
        cells += [f"{m[place] / m[base]:.2f}" if m and m[base] >= _LEAST_MEMORY else "" for m in memory]
        cells += ["" if loss is None else f"{loss:.2f}"]
        yield f"| {group['name']} | {' | '.join(cells)} |"
    for kind, groups in (("workloads", _groups(results, False)), ("applications", _groups(results, True))):
        if not groups:
            continue
        means = [_geometric_mean([speedup(group, case, STOCK_FLOAT32) for group in groups]) for case in columns]
        yield f"| geometric mean, {kind} | {' | '.join('' if m is None else f'{m:.2f}' for m in means)} | | | |"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draws the speed of each workload over stock float32.

    Args:
        results: content of the JSON file.
        path: path of the picture, a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {STOCK_MIXED: "#9e9e9e", OURS_FLOAT32: "#90caf9", OURS_MIXED: "#1565c0"}
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for index, (case, color) in enumerate(shown.items()):
        heights = [speedup(group, case, STOCK_FLOAT32) or 0 for group in results["groups"]]
        places = [place + 0.27 * (index - 1) for place in range(len(heights))]
        bars = axes.bar(places, heights, 0.27, label=case, color=color)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results["groups"])), [group["name"].partition(",")[0] for group in results["groups"]])
    axes.tick_params(axis="x", labelrotation=20)
    axes.set_ylabel("times as fast as\nstock Keras in float32")
    axes.legend(frameon=False, fontsize=8, ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _groups(results: Mapping[str, Any], applications: bool) -> list[Mapping[str, Any]]:
    names = {_heading(workload) for workload in workloads.APPLICATIONS}
    return [group for group in results["groups"] if (group["name"] in names) is applications]


def _geometric_mean(ratios: Sequence[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio is not None]
    return math.exp(statistics.fmean(map(math.log, known))) if known and len(known) == len(ratios) else None


def _means(values: Sequence[float], count: int) -> list[float]:
    return [statistics.fmean(values[start : start + count]) for start in range(0, len(values), count)]


def _heading(workload: Workload) -> str:
    return f"{workload.name}, batch {workload.batch}"


def _peak(workload: Workload, name: str) -> float:
    """Returns the MiB that training adds to a process at its peak."""
    before = harness.resident("VmRSS")
    case = make_case(workload, name)
    for _ in range(5):
        case.run()
    return (harness.resident("VmHWM") - before) / 1024


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Output = Annotated[Path, typer.Option(help="Folder for the results.")]
Only = Annotated[
    str, typer.Option(help="Run only workloads with this in their name, and keep what there is of others.")
]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    output: Output = harness.RESULTS,
    loaded: Annotated[bool, typer.Option("--loaded", help="Run on a busy machine; the results say so.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each workload.")] = ROUNDS,
    only: Only = "",
    xla: Annotated[
        bool, typer.Option(help="Whether to time the applications with XLA, too; minutes to compile.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Whether to take the memory, too; minutes of processes.")] = True,
) -> None:
    """Time the training steps and take their memory; write JSON and a table."""
    if context.invoked_subcommand:
        return
    every = [*workloads.WORKLOADS, *workloads.APPLICATIONS]
    require_match(only, every)
    results = harness.begin("training", loaded)
    earlier = _earlier(output / "training.json") if only else {}
    groups = {group["name"]: group for group in earlier.get("groups", [])}
    peaks, of_rows = (dict(grid["rows"]) for grid in earlier["grids"]) if earlier else ({}, {})
    for workload in every:
        if only not in workload.name:
            continue
        heading = _heading(workload)
        print(f"{heading} ...", file=sys.stderr, flush=True)
        is_application = workload in workloads.APPLICATIONS
        names = [name for name, (_, _, jit_compile) in CASES.items() if xla or not jit_compile or not is_application]
        without_xla = [name for name, (_, _, jit_compile) in CASES.items() if not jit_compile]
        if memory:
            peaks[heading] = [_peak_in_child(workload, name) for name in without_xla]
            twice = [_peak_in_child(workload, name, 2) for name in without_xla]
            of_rows[heading] = [round(more - peak, 1) for more, peak in zip(twice, peaks[heading], strict=True)]
        cases = [make_case(workload, name) for name in names]
        comparisons = [each for each in COMPARISONS if {each.case, *each.against} <= set(names)]
        groups[heading] = harness.as_group(heading, cases, comparisons, rounds, None)
        del cases
        in_order = [_heading(each) for each in every if _heading(each) in groups]
        results["groups"] = [groups[name] for name in in_order]
        results["grids"] = [
            Grid(
                title, "MiB", "workload", without_xla, {name: rows[name] for name in in_order if name in rows}
            ).as_json()
            for title, rows in (
                ("Peak of the resident memory of a training process", peaks),
                ("What a second batch's rows add to the peak", of_rows),
            )
        ]
        harness.write(results, output)
    print(harness.table(results))


@app.command("curves")
def curves(output: Output = harness.RESULTS, only: Only = "") -> None:
    """Train each workload for 300 steps in ours, and with five seeds in stock float32; write JSON and a table."""
    require_match(only, workloads.WORKLOADS)
    path = output / "training_curves.json"
    earlier = _earlier(path) if only else {}
    found = dict(earlier.get("curves", {}))
    for workload in workloads.WORKLOADS:
        if only not in workload.name:
            continue
        small = dataclasses.replace(workload, batch=max(4, workload.batch // 8))
        print(f"{_heading(small)} ...", file=sys.stderr, flush=True)
        each = {f"seed {seed}": loss_curve(small, STOCK_FLOAT32, seed, STEPS) for seed in range(SEEDS)}
        each |= {name: loss_curve(small, name, 0, STEPS) for name in (STOCK_MIXED, OURS_FLOAT32, OURS_MIXED)}
        found[workload.name] = {name: [round(value, 5) for value in values] for name, values in each.items()}
        columns = [OURS_MIXED, f"{OURS_MIXED} at the end", OURS_FLOAT32, STOCK_MIXED, ANOTHER_SEED]
        deviations = {name: compare_curves(each) for name, each in found.items()}
        rows = {name: [each[column] for column in columns] for name, each in deviations.items()}
        name = "Largest difference of the loss to stock float32 of the same seed, by the spread of five seeds"
        grid = Grid(name, "1 is the spread", "workload, 300 steps", columns, rows)
        results = {"theme": "training_curves", "machine": harness.describe_machine(), "grids": [grid.as_json()]}
        harness.write({**results, "curves": found}, output)


@app.command("summary")
def print_summary(output: Output = harness.RESULTS) -> None:
    """Print the table in docs/measured.md and draw its plot."""
    if not (path := output / "training.json").exists():
        raise typer.BadParameter(f"There are no results in {output}. Run `python -m benchmarks.training` first.")
    results = json.loads(path.read_text())
    print(*summary(results, _earlier(output / "training_curves.json") or {"grids": [{"rows": {}}]}), sep="\n")
    plot(results, PLOT if output == harness.RESULTS else output / PLOT.name)


@app.command(hidden=True)
def peak(workload: str, name: str, batches: int) -> None:
    """Print the result of `_peak` for batches with a multiple of the rows."""
    found = find(workload)
    print(_peak(dataclasses.replace(found, batch=batches * found.batch), name))


def _peak_in_child(workload: Workload, name: str, batches: int = 1) -> float:
    return round(float(harness.run_module("benchmarks.training", "peak", workload.name, name, str(batches))), 1)


def _earlier(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    app()
