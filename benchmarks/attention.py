"""Memory of attention by the length of a sequence: `python -m benchmarks.attention`.

It takes a training step of one `MultiHeadAttention`, batch 1, 8 heads of 64, forward and backward. The layer is ours or
stock, in float32 or mixed_bfloat16, with a causal mask or without. Stock keeps matrices of the length squared, so twice
the length takes four times the memory. Above the limit it is not run, and the table says so. A separate process takes
the memory of each case. The cases of a length take turns in one process for the times.

`benchmarks.aot` compiles the same steps for TPU v5e and H100. The plot shows its results where there are any.
`--plot-only` draws again from the results.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import keras
import typer

import keras_mp
from benchmarks import harness, layers
from benchmarks.harness import Case, Comparison

__all__ = [
    "LENGTHS",
    "POLICIES",
    "compiler_curves",
    "cpu_curves",
    "draw",
    "group_name",
    "make_step",
    "one_case",
    "run_length",
]

LENGTHS = (512, 1024, 2048, 4096, 8192)
POLICIES = ("float32", "mixed_bfloat16")
HEADS, KEY_DIM = 8, 64
LIMIT_GIB = 12.0
ROUNDS = 5
PLOT = Path(__file__).parent.parent / "docs" / "attention-memory.png"
CLASS = "keras_mp.layers.MultiHeadAttention"


def make_step(
    length: int, causal: bool, ours: bool, policy: str, *, path: str = CLASS, batch_is_static: bool = False
) -> Callable[[], list[Any]]:
    """Returns a training step of one attention layer; see `benchmarks.layers.make_step`.

    Args:
        length: length of the sequence.
        causal: whether each timestep attends only to earlier ones.
        ours: whether the layer is ours, not the stock one.
        policy: the name of its policy.
        path: the path of our layer.
        batch_is_static: whether the graph knows that the batch is 1.
    """
    workload = layers.Workload(
        "attention",
        "layers.MultiHeadAttention",
        ((1, length, HEADS * KEY_DIM),),
        {"num_heads": HEADS, "key_dim": KEY_DIM},
        call=lambda layer, x: layer(x, x, use_causal_mask=causal),
    )
    what = _class(path) if ours else keras.layers.MultiHeadAttention
    return layers.make_step(workload, what, policy, batch_is_static=batch_is_static)


def _class(path: str) -> Any:
    package, module, name = path.split(".")
    return getattr(getattr({"keras": keras, "keras_mp": keras_mp}[package], module), name)


def group_name(length: int, causal: bool) -> str:
    """Returns the name of a case in the tables."""
    return f"{'causal' if causal else 'not causal'}, length {length}"


def one_case(length: str, causal: str, ours: str, policy: str, path: str = CLASS) -> list[Case]:
    """Makes the cases for `harness.memory_in_child`, from the arguments of a command line.

    Args:
        length: a number.
        causal: "causal" or "not".
        ours: "ours" or "stock".
        policy: the name of the layer's policy.
        path: the path of our layer.
    """
    step = make_step(int(length), causal == "causal", ours == "ours", policy, path=path)
    return [Case(layers.case_name(ours == "ours", policy), layers.runner(step))]


def run_length(
    length: int, causal: bool, before: Mapping[str, float], *, path: str = CLASS, limit: float, rounds: int
) -> dict[str, Any]:
    """Takes the memory, then the times, of one length.

    Args:
        length: length of the sequence.
        causal: whether each timestep attends only to earlier ones.
        before: MiB of each case at half the length, as far as it was run.
        path: the path of our layer.
        limit: MiB above which stock is not run.
        rounds: turns of each case.

    Returns:
        A group of the harness's results; a case that was not run is in its "not_run", with the reason.
    """
    memory: dict[str, list[float]] = {}
    not_run: dict[str, str] = {}
    runs: list[tuple[str, bool, str]] = []
    for policy in POLICIES:
        for ours in (False, True):
            name = layers.case_name(ours, policy)
            if not ours and 4 * before.get(name, 0.0) > limit:
                expected = 4 * before[name]
                not_run[name] = f"not run: {expected / 1024:.0f} GiB expected, the limit is {limit / 1024:g}"
                told = not_run[name]
            else:
                words = (str(length), "causal" if causal else "not", "ours" if ours else "stock", policy, path)
                memory |= harness.memory_in_child("benchmarks.attention:one_case", *words)
                told = f"{statistics.median(memory[name]):.0f} MiB"
                runs.append((name, ours, policy))
            print(f"{group_name(length, causal)}: {name}: {told}", file=sys.stderr, flush=True)
    cases = [
        Case(name, layers.runner(make_step(length, causal, ours, policy, path=path))) for name, ours, policy in runs
    ]
    comparisons = [
        Comparison(layers.case_name(True, mine), (layers.case_name(False, theirs),), at_most, at_most)
        for mine, theirs, at_most in (
            ("float32", "float32", 1.0),
            ("mixed_bfloat16", "mixed_bfloat16", 1.0),
            ("mixed_bfloat16", "float32", None),
        )
        if layers.case_name(False, theirs) in memory
    ]
    group = harness.as_group(group_name(length, causal), cases, comparisons, rounds, memory)
    return {**group, "length": length, "causal": causal, "not_run": not_run}


def draw(results: Mapping[str, Any], aot: Mapping[str, Any] | None, path: Path) -> None:
    """Draws memory over length on logarithmic axes, in a panel for the CPU and one for the TPU.

    Args:
        results: content of the theme's JSON file.
        aot: content of the JSON file of `benchmarks.aot`. None leaves its panel out.
        path: path of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"A CPU, seen": cpu_curves(results)}
    if aot is not None:
        panels |= {
            f"{grid['name'].split(':')[0]}, as its compiler lays it out": compiler_curves(grid) for grid in aot["grids"]
        }
    columns = len(panels)
    figure, all_axes = pyplot.subplots(1, columns, figsize=(5.6 * columns, 5), squeeze=False, layout="constrained")
    for axes, (title, curves) in zip(all_axes[0], panels.items(), strict=True):
        lengths = sorted({length for curve in curves.values() for length in curve})
        for name, curve in curves.items():
            ours, causal = name.startswith("ours"), name.endswith(", causal")
            axes.plot(
                list(curve),
                list(curve.values()),
                label=name,
                color=("tab:blue" if "float32" in name else "tab:cyan")
                if ours
                else ("tab:red" if "float32" in name else "tab:orange"),
                marker="o" if ours else "s",
                linestyle="--" if causal else "-",
                linewidth=1.8,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.yaxis.set_major_formatter(lambda mib, _: f"{mib:g}")
        axes.set_xlabel("length of the sequence, tokens")
        axes.set_ylabel("memory of a training step, MiB")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("MultiHeadAttention, batch 1, 8 heads of 64, forward and backward")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def cpu_curves(results: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Returns MiB by length, by the name of the curve.

    Args:
        results: content of the theme's JSON file.
    """
    curves: dict[str, dict[int, float]] = {}
    for group in results["groups"]:
        for name, values in group["memory_mib"].items():
            curve = curves.setdefault(name + (", causal" if group["causal"] else ""), {})
            curve[group["length"]] = statistics.median(values)
    return curves


def compiler_curves(grid: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Returns the same from a grid that `benchmarks.aot` writes.

    Args:
        grid: one of the JSON file's grids.
    """
    curves: dict[str, dict[int, float]] = {}
    for row, values in grid["rows"].items():
        causal, length = row.rsplit(", length ", 1)
        for name, value in zip(grid["columns"], values, strict=True):
            if value is not None:
                curves.setdefault(name + (", causal" if causal == "causal" else ""), {})[int(length)] = value
    return curves


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = harness.RESULTS,
    plot: Annotated[Path, typer.Option(help="Where the picture goes.")] = PLOT,
    plot_only: Annotated[bool, typer.Option("--plot-only", help="Draw what the results hold; run nothing.")] = False,
    loaded: Annotated[bool, typer.Option("--loaded", help="Run on a busy machine; the results say so.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the times.")] = ROUNDS,
    lengths: Annotated[str, typer.Option(help="Lengths, each twice the one before.")] = ",".join(map(str, LENGTHS)),
    limit_gib: Annotated[float, typer.Option(help="Memory above which stock is not run.")] = LIMIT_GIB,
    ours: Annotated[str, typer.Option(help="The class to take for ours.")] = CLASS,
) -> None:
    """Take memory and times of attention by length; write JSON, table and picture."""
    if not plot_only:
        results: dict[str, Any] = harness.begin("attention", loaded)
        for causal in (False, True):
            before: dict[str, float] = {}
            for length in map(int, lengths.split(",")):
                group = run_length(length, causal, before, path=ours, limit=limit_gib * 1024, rounds=rounds)
                expected = {name: 4 * value for name, value in before.items()}  # of cases that are not run
                before = expected | {name: statistics.median(values) for name, values in group["memory_mib"].items()}
                results["groups"].append(group)
                harness.write(results, output)
        print(harness.table(results))
    path, of_aot = output / "attention.json", output / "attention_aot.json"
    aot: Mapping[str, Any] | None = json.loads(of_aot.read_text()) if of_aot.exists() else None
    draw(json.loads(path.read_text()), aot, plot)
    print(f"Drew {plot}.", file=sys.stderr)


if __name__ == "__main__":
    app()
