"""Times several cases in turns in one process, writes JSON, and makes tables from it.

A ratio of two cases is taken round by round, from runs that follow one another. So a slow phase of the machine slows
both. A table shows the median and quartiles of the ratios. `command` makes the command of a theme. `python -m
benchmarks.harness table benchmarks/results/optimizer.json` prints the table of a result.

A separate process takes the memory. Its allocator gives every freed block back to the system. The memory of a run is
the peak of resident memory during it, less the resident memory before. Only Linux keeps such a peak and can reset it.
"""

import ctypes
import dataclasses
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Case",
    "Comparison",
    "Grid",
    "Group",
    "Spread",
    "as_group",
    "begin",
    "command",
    "describe_machine",
    "measure",
    "memory_in_child",
    "orders",
    "paired_ratios",
    "peak_memory",
    "resident",
    "run_group",
    "run_module",
    "spread",
    "table",
    "version",
    "wait_until_idle",
    "write",
]

RESULTS = Path(__file__).parent / "results"

# Another process that computes all the time adds 1 to the load average.
IDLE_LOAD = 0.5
PATIENCE_SECONDS = 180

# TensorFlow built with oneDNN has a pool that gives nothing back, and glibc keeps freed blocks. From these sizes on, in
# bytes, glibc gets each block from the system and gives it back. Setting them also stops glibc from raising them.
ALLOCATOR = {
    "TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
MEMORY_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        name: name in the table.
        run: runs it once, and returns when it is done.
        note: a note in the table.
    """

    name: str
    run: Callable[[], object]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A ratio to show: time, and memory where the group has it, of one case over another.

    Args:
        case: the name of the first.
        against: the names of others; the one with the smallest median is taken.
        at_most: target for the ratio of the times. None shows it without a target.
        memory_at_most: the same for the memory.
    """

    case: str
    against: tuple[str, ...]
    at_most: float | None = None
    memory_at_most: float | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases that take turns, and the ratios between them.

    Args:
        name: the heading of its table.
        cases: makes the cases that take turns. They live while the group runs.
        comparisons: the ratios to show.
        rounds: turns of each case.
        memory: cases to take the memory of in a separate process: "module:function" and the function's arguments,
            as for `memory_in_child`. Its cases have the names of timed cases; some may be left out. Empty for no
            memory.
    """

    name: str
    cases: Callable[[], Sequence[Case]]
    comparisons: Sequence[Comparison]
    rounds: int = 30
    memory: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grid:
    """Numbers of one unit in rows and columns, for results that are not times.

    Args:
        name: the heading of its table.
        unit: unit of its numbers.
        corner: heading of the column of row names.
        columns: names of the columns.
        rows: numbers by the name of the row, one for each column; None where there is none.
    """

    name: str
    unit: str
    corner: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]

    def as_json(self) -> dict[str, Any]:
        """Returns its part of the JSON file."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median, the first and the third quartile of some numbers."""

    median: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles, as `numpy.quantile` computes them.

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
    """Returns the ratio of each round.

    Args:
        times: times of one case, one for each round.
        against: times of another case in the same rounds.

    Example:

    >>> paired_ratios([1.0, 3.0], [2.0, 3.0])
    [0.5, 1.0]
    """
    return [mine / theirs for mine, theirs in zip(times, against, strict=True)]


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """Yields the order of each round. Names are shuffled, so that no case always follows the same other.

    Args:
        names: names of the cases.
        rounds: number of orders.
        seed: makes the same orders again.
    """
    shuffled, generator = list(names), random.Random(seed)
    for _ in range(rounds):
        generator.shuffle(shuffled)
        yield list(shuffled)


def measure(cases: Sequence[Case], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Runs the cases in turns.

    Args:
        cases: cases to time, with different names.
        rounds: runs of each case.
        warm_up: runs of each case before, so that everything is traced and compiled.

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


def peak_memory(run: Callable[[], object], warm_up: int = 2, runs: int = MEMORY_RUNS) -> list[float]:
    """Returns the memory that a run adds to this process at its peak.

    Args:
        run: runs it once.
        warm_up: runs before, so that lasting memory is already taken.
        runs: number of measurements.

    Returns:
        MiB, one for each run.

    Raises:
        OSError: where the system is not Linux.
    """
    values = []
    for _ in range(warm_up):
        run()
    for _ in range(runs):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory that is resident now
        before = resident("VmRSS")
        run()
        values.append((resident("VmHWM") - before) / 1024)
    return values


def memory_in_child(target: str, *arguments: str) -> dict[str, list[float]]:
    """Returns `peak_memory` of cases, from a fresh process whose allocator gives freed memory back.

    Args:
        target: "module:function"; the function makes the cases.
        arguments: its arguments.

    Returns:
        MiB by the name of the case.

    Raises:
        subprocess.CalledProcessError: if the process fails, as where the memory of the machine is not enough.
    """
    return json.loads(run_module("benchmarks.harness", "memory", target, *arguments, environment=ALLOCATOR))


def run_module(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Runs a module of this repository in a separate process.

    Args:
        module: its dotted name.
        arguments: arguments of its command.
        environment: variables to add to the environment of this process.

    Returns:
        The last line it printed.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **(environment or {})},
        text=True,
    )
    if process.returncode:
        print(process.stderr, file=sys.stderr)  # not otherwise: TensorFlow's banner fills lines each time
        process.check_returncode()
    return process.stdout.strip().splitlines()[-1]


def describe_machine() -> dict[str, Any]:
    """Returns the processor, accelerators, cores, versions and the day."""
    import keras_mp

    hardware = keras_mp.detect()
    versions = {name: version(name) for name in ("tensorflow", "keras", "numpy", "keras-mp")}
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


def begin(theme: str, loaded: bool) -> dict[str, Any]:
    """Returns the JSON of a theme before anything is timed.

    Args:
        theme: the name of its files.
        loaded: whether to take times on a busy machine.

    Raises:
        typer.Exit: if the machine is busy and that was not asked for.
    """
    load = wait_until_idle(patience=0 if loaded else PATIENCE_SECONDS)
    if load is not None and load > IDLE_LOAD and not loaded:
        print(
            f"Something else computes here: the load average is {load:.2f}, and above {IDLE_LOAD} times mean "
            "little. Stop it, or pass --loaded.",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    return {"theme": theme, "machine": {**describe_machine(), "load": load}, "groups": []}


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
        results = begin(theme, loaded)
        for group in groups:
            if only in group.name:
                print(f"{group.name} ...", file=sys.stderr, flush=True)
                results["groups"].append(run_group(group, rounds or group.rounds))
                write(results, output)  # now, so that an interruption loses only one group
        print(table(results))

    return theme_app


def write(results: Mapping[str, Any], output: Path) -> None:
    """Writes the two files of a theme.

    Args:
        results: content of its JSON file.
        output: the folder, made if it is missing.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{results['theme']}.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / f"{results['theme']}.md").write_text(table(results))


def table(results: Mapping[str, Any]) -> str:
    """Returns Markdown from the content of a theme's JSON file.

    Args:
        results: the file, read.

    Returns:
        The machine in a few lines, for each group its times, its memory and their ratios, and each grid.
    """
    lines = [f"# {results['theme']}", "", *_machine_lines(results["machine"])]
    for group in results.get("groups", []):
        lines += ["", f"## {group['name']}", "", *_case_lines(group)]
        lines += [*_time_ratio_lines(group), *_memory_ratio_lines(group)]
    for grid in results.get("grids", []):
        lines += ["", f"## {grid['name']}, {grid['unit']}", ""]
        lines += [f"| {' | '.join([grid['corner'], *grid['columns']])} |", f"|---|{'---:|' * len(grid['columns'])}"]
        for name, row in grid["rows"].items():
            lines.append(f"| {' | '.join([name, *('' if value is None else _number(value) for value in row)])} |")
    return "\n".join(lines) + "\n"


def run_group(group: Group, rounds: int) -> dict[str, Any]:
    """Runs a group.

    Args:
        group: the group.
        rounds: turns of each case.

    Returns:
        Its part of the JSON file.
    """
    # Memory first, before this process makes copies of the cases.
    memory = memory_in_child(*group.memory) if group.memory else None
    return as_group(group.name, list(group.cases()), group.comparisons, rounds, memory)


def as_group(
    name: str,
    cases: Sequence[Case],
    comparisons: Sequence[Comparison],
    rounds: int,
    memory: Mapping[str, Sequence[float]] | None,
) -> dict[str, Any]:
    """Times cases, and returns a group of the JSON file with their memory.

    Args:
        name: name of the group.
        cases: the cases that take turns.
        comparisons: the ratios to show.
        rounds: turns of each case.
        memory: MiB by the name of the case, or None.
    """
    return {
        "name": name,
        "notes": {case.name: case.note for case in cases if case.note},
        "times_ms": _rounded(measure(cases, rounds)),
        **({} if memory is None else {"memory_mib": _rounded(memory)}),
        "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
    }


def _rounded(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in each] for name, each in values.items()}


def _case_lines(group: Mapping[str, Any]) -> list[str]:
    memory = group.get("memory_mib")
    columns = ["case", "median, ms", "quartiles", *([] if memory is None else ["memory, MiB"])]
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for name, values in group["times_ms"].items():
        each = spread(values)
        note = group["notes"].get(name)
        cells = [
            f"{name} ({note})" if note else name,
            _number(each.median),
            f"{_number(each.lower)} to {_number(each.upper)}",
        ]
        if memory is not None:
            cells.append(_number(statistics.median(memory[name])) if name in memory else "")
        lines.append(f"| {' | '.join(cells)} |")
    for name, reason in group.get("not_run", {}).items():
        lines.append(f"| {name} ({reason}) |{' |' * (len(columns) - 1)}")
    return lines


def _time_ratio_lines(group: Mapping[str, Any]) -> list[str]:
    times = group["times_ms"]
    lines, seen = [], set()
    for comparison in group["comparisons"]:
        against = min(comparison["against"], key=lambda name: statistics.median(times[name]))
        if (comparison["case"], against) in seen:  # the fastest of several was compared with already
            continue
        seen.add((comparison["case"], against))
        each = spread(paired_ratios(times[comparison["case"]], times[against]))
        cells = [
            f"{each.median:.2f}",
            f"{each.lower:.2f} to {each.upper:.2f}",
            _target(each.median, comparison["at_most"]),
        ]
        lines.append(f"| {' | '.join([comparison['case'], against, *cells])} |")
    return (
        ["", "| time of | over that of | ratio | quartiles | target |", "|---|---|---:|---:|---|", *lines]
        if lines
        else []
    )


def _memory_ratio_lines(group: Mapping[str, Any]) -> list[str]:
    memory = {name: statistics.median(values) for name, values in group.get("memory_mib", {}).items()}
    lines = []
    for comparison in group["comparisons"]:
        if all(name in memory for name in (comparison["case"], *comparison["against"])):  # not every case has one
            against = min(comparison["against"], key=memory.__getitem__)
            ratio = memory[comparison["case"]] / memory[against]
            cells = [f"{ratio:.2f}", _target(ratio, comparison["memory_at_most"])]
            lines.append(f"| {' | '.join([comparison['case'], against, *cells])} |")
    return ["", "| memory of | over that of | ratio | target |", "|---|---|---:|---|", *lines] if lines else []


def _target(ratio: float, at_most: float | None) -> str:
    # As shown, to two digits: a page more of some hundred MiB is no miss.
    return "" if at_most is None else f"{at_most:g}, {'met' if round(ratio, 2) <= at_most else 'missed'}"


def resident(name: str) -> int:
    """Returns a number of KiB from /proc/self/status, on Linux.

    Args:
        name: such as "VmRSS" for the resident memory now, and "VmHWM" for its peak.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(f"{name}:")).split()[1])


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


def version(name: str) -> str:
    """Returns the version of an installed package.

    Args:
        name: name of the package.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{name}-cpu")  # TensorFlow without GPU code is a separate package


app = typer.Typer(help="Tables from benchmark results.", add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _main() -> None:
    """Tables from benchmark results."""


@app.command("table")
def _table(paths: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JSON files.")]) -> None:
    """Print the tables of results as Markdown."""
    for path in paths:
        print(table(json.loads(path.read_text())))


@app.command("memory", hidden=True)
def _memory(target: str, arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Print the memory of the cases that a function makes as JSON. `memory_in_child` runs this."""
    module, function = target.split(":")
    cases: Sequence[Case] = getattr(importlib.import_module(module), function)(*(arguments or []))
    print(json.dumps({case.name: peak_memory(case.run) for case in cases}))


if __name__ == "__main__":
    app()
