"""Loads a model server with requests, and prints their times.

python -m examples.serve.load saved_models/digits                                        # against the double
python -m examples.serve.load saved_models/digits --rest http://127.0.0.1:8501           # against a server that runs

Against the double the figures are of the double: Python and one process. They compare exports with each other, such as
float32 with half-size weights, and say nothing of TensorFlow Serving.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import pathlib
import statistics
import threading
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from examples.serve.client import ask_rest
from examples.serve.double import Double
from keras_mp.exporting.sample import read_sample

__all__ = ["load"]


def load(url: str, version: pathlib.Path, clients: int, requests: int) -> list[float]:
    """Sends requests from several clients at once.

    Args:
        url: the server's REST interface.
        version: the export, whose own rows are sent.
        clients: how many at once.
        requests: how many each sends.

    Returns:
        The time of each request, in ms.
    """
    rows, _ = read_sample(version)
    name = version.resolve().parent.name
    times: list[float] = []

    def client() -> None:
        for _ in range(requests):
            start = time.perf_counter()
            ask_rest(url, name, rows["serving_default"])
            times.append(1e3 * (time.perf_counter() - start))

    ask_rest(url, name, rows["serving_default"])  # the first call makes what the others use
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(times)


def main(
    folder: Annotated[pathlib.Path, typer.Argument(help="The model's folder, such as saved_models/digits.")],
    rest: Annotated[str | None, typer.Option(help="A server that runs; else the double is started.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="How many at once.")] = 4,
    requests: Annotated[int, typer.Option(min=1, help="How many each sends.")] = 200,
) -> None:
    """Send requests to a model server from several clients at once, and print their times."""
    version = folder / str(max(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()))
    with contextlib.ExitStack() as stack:
        url = rest or stack.enter_context(Double(folder).listening()).url
        start = time.perf_counter()
        times = load(url, version, clients, requests)
        seconds = time.perf_counter() - start
    table = Table("clients", "requests", "a second", "median ms", "95% ms", "longest ms")
    figures = (statistics.median(times), times[int(0.95 * (len(times) - 1))], times[-1])
    table.add_row(str(clients), str(len(times)), f"{len(times) / seconds:.0f}", *(f"{each:.1f}" for each in figures))
    Console().print(f"{version} through {rest or 'the double of TensorFlow Serving'}", table)


if __name__ == "__main__":
    typer.run(main)
