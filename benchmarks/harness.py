"""Takes the times of several cases in turns in one process, writes them as JSON, and makes tables from that.

A ratio of two cases is taken round by round, from runs that follow one another, so that whatever slows the machine for
a while slows both; its median and quartiles over the rounds are what a table shows. `command` makes the command of a
theme; `python -m benchmarks.harness table benchmarks/results/optimizer.json` prints the table of a result.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Case",
    "Comparison",
    "Group",
    "Spread",
    "command",
    "describe_machine",
    "measure",
    "orders",
    "paired_ratios",
    "spread",
    "table",
    "wait_until_idle",
]

RESULTS = Path(__file__).parent / "results"

# Another process that computes all the time adds 1 to the load average.
IDLE_LOAD = 0.5
PATIENCE_SECONDS = 180


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        name: as the table shows it.
        run: does it once, and returns only when it is done.
        note: what the table adds.
    """

    name: str
    run: Callable[[], object]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A ratio to show: the time of one case over that of another.

    Args:
        case: the name of the first.
        against: the names of others; the one with the smallest median is taken.
        at_most: what the ratio should not exceed. None shows it without a target.
    """

    case: str
    against: tuple[str, ...]
    at_most: float | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases that take turns, and the ratios between them.

    Args:
        name: the heading of its table.
        cases: what takes turns. They are made when the group is run and let go after it.
        comparisons: the ratios to show.
        rounds: how many turns each case gets.
    """

    name: str
    cases: Callable[[], Sequence[Case]]
    comparisons: Sequence[Comparison]
    rounds: int = 30


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of some numbers and their first and third quartile."""

    median: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """The median and the quartiles, as `numpy.quantile` has them.

    Args:
        values: at least one number.

    Example:

    >>> spread([4.0, 1.0, 2.0, 3.0])
    Spread(median=2.5, lower=1.75, upper=3.25)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def paired_ratios(times: Sequence[float], against: Sequence[float]) -> list[float]:
    """The ratio of each round.

    Args:
        times: of one case, one for each round.
        against: of another case in the same rounds.

    Example:

    >>> paired_ratios([1.0, 3.0], [2.0, 3.0])
    [0.5, 1.0]
    """
    return [mine / theirs for mine, theirs in zip(times, against, strict=True)]


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """The order of each round: all names, shuffled anew, so that no case always runs behind the same other.

    Args:
        names: of the cases.
        rounds: how many orders.
        seed: makes the same orders again.
    """
    shuffled, generator = list(names), random.Random(seed)
    for _ in range(rounds):
        generator.shuffle(shuffled)
        yield list(shuffled)


def measure(cases: Sequence[Case], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Runs the cases in turns.

    Args:
        cases: what to time, by different names.
        rounds: how many times each is run.
        warm_up: how many times each is run before that, so that everything is traced, compiled and in place.

    Returns:
        Milliseconds by the name of the case, one for each round.
    """
    runs = {case.name: case.run for case in cases}
    if len(runs) != len(cases):
        raise ValueError(f"Cases need different names. Received: {[case.name for case in cases]}")
    for run_once in runs.values():
        for _ in range(warm_up):
            run_once()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for order in orders(list(runs), rounds):
        for name in order:
            start = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - start) * 1000)
    return times


def describe_machine() -> dict[str, Any]:
    """What the times depend on: processor, accelerators, cores, versions, and the day."""
    import keras_mp

    hardware = keras_mp.detect()
    versions = {name: _version(name) for name in ("tensorflow", "keras", "numpy", "keras-mp")}
    return {
        "devices": [
            {"kind": device.kind, "name": device.name, "features": list(device.features)} for device in hardware.devices
        ],
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.date.today().isoformat(),
    }


def wait_until_idle(limit: float = IDLE_LOAD, patience: float = PATIENCE_SECONDS) -> float | None:
    """Waits until nothing else computes on this machine.

    Args:
        limit: the load average of the last minute to wait for.
        patience: how many seconds to wait for it.

    Returns:
        The load average after waiting, which may still be above the limit; None where the system has none.
    """
    if not hasattr(os, "getloadavg"):
        return None
    end = time.monotonic() + patience
    told = False
    while (load := os.getloadavg()[0]) > limit and time.monotonic() < end:
        if not told:
            print(
                f"The load average is {load:.2f}; waiting up to {patience:.0f} s for {limit} ...",
                file=sys.stderr,
                flush=True,
            )
            told = True
        time.sleep(2)
    return load


def command(theme: str, groups: Sequence[Group]) -> typer.Typer:
    """The command line of a theme: takes the times, writes `results/<theme>.json` and `.md`, prints the table.

    Args:
        theme: the name of its files.
        groups: what to time.
    """
    theme_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @theme_app.command(help=f"Time the theme {theme!r}; write its JSON and its table.")
    def main(
        output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
        loaded: Annotated[bool, typer.Option("--loaded", help="Run on a busy machine; the results say so.")] = False,
        rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each group, instead of its own.")] = None,
        only: Annotated[str, typer.Option(help="Run only groups with this in their name.")] = "",
    ) -> None:
        load = wait_until_idle(patience=0 if loaded else PATIENCE_SECONDS)
        if load is not None and load > IDLE_LOAD and not loaded:
            print(
                f"Something else computes here: the load average is {load:.2f}, and above {IDLE_LOAD} times mean "
                "little. Stop it, or pass --loaded.",
                file=sys.stderr,
            )
            raise typer.Exit(1)
        results: dict[str, Any] = {"theme": theme, "machine": {**describe_machine(), "load": load}, "groups": []}
        for group in groups:
            if only in group.name:
                print(f"{group.name} ...", file=sys.stderr, flush=True)
                results["groups"].append(_run_group(group, rounds or group.rounds))
                # Now, so that an interruption loses one group and not all.
                output.mkdir(parents=True, exist_ok=True)
                (output / f"{theme}.json").write_text(json.dumps(results, indent=1) + "\n")
                (output / f"{theme}.md").write_text(table(results))
        print(table(results))

    return theme_app


def table(results: Mapping[str, Any]) -> str:
    """Markdown from what a theme's JSON file holds.

    Args:
        results: the file, read.

    Returns:
        The machine in a few lines, and for each group its times and its ratios.
    """
    lines = [f"# {results['theme']}", "", *_machine_lines(results["machine"])]
    for group in results["groups"]:
        times = group["times_ms"]
        lines += ["", f"## {group['name']}", ""]
        lines += ["| case | median, ms | quartiles |", "|---|---:|---:|"]
        for name, values in times.items():
            each = spread(values)
            note = group["notes"].get(name)
            cells = (
                f"{name} ({note})" if note else name,
                _number(each.median),
                f"{_number(each.lower)} to {_number(each.upper)}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        if group["comparisons"]:
            lines += ["", "| time of | over that of | ratio | quartiles | target |", "|---|---|---:|---:|---|"]
        for comparison in group["comparisons"]:
            against = min(comparison["against"], key=lambda name: statistics.median(times[name]))
            each = spread(paired_ratios(times[comparison["case"]], times[against]))
            at_most = comparison["at_most"]
            target = "" if at_most is None else f"{at_most:g}, {'met' if each.median <= at_most else 'missed'}"
            quartiles = f"{each.lower:.2f} to {each.upper:.2f}"
            lines.append(f"| {comparison['case']} | {against} | {each.median:.2f} | {quartiles} | {target} |")
    return "\n".join(lines) + "\n"


def _run_group(group: Group, rounds: int) -> dict[str, Any]:
    cases = list(group.cases())
    times = measure(cases, rounds)
    return {
        "name": group.name,
        "notes": {case.name: case.note for case in cases if case.note},
        "times_ms": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "comparisons": [dataclasses.asdict(comparison) for comparison in group.comparisons],
    }


def _machine_lines(machine: Mapping[str, Any]) -> list[str]:
    devices = "; ".join(
        f"{device['name']} ({', '.join([device['kind'].upper(), *device['features']])})"
        for device in machine["devices"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"{devices}, {machine['cores']} cores, {machine['system']}. {versions}. {machine['date']}."]
    load = machine.get("load")
    if load is not None and load > IDLE_LOAD:
        lines += ["", f"**Taken on a busy machine (load average {load:.2f}): ratios only, and with care.**"]
    return lines


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{name}-cpu")  # TensorFlow without GPU code is a package of its own


app = typer.Typer(help="Tables from benchmark results.", add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _main() -> None:
    """Tables from benchmark results."""


@app.command("table")
def _table(paths: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JSON files.")]) -> None:
    """Print the tables of results as Markdown."""
    for path in paths:
        print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    app()
