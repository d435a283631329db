"""Prints the table of layers in docs/measured.md from its JSON file: `python -m benchmarks.summary`."""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["rows"]

RESULTS = Path(__file__).parent / "results" / "layers.json"
COLUMNS = (  # a case, the case to divide by, and the quantity
    ("ours, float32", "stock, float32", "times_ms"),
    ("ours, mixed_bfloat16", "stock, mixed_bfloat16", "times_ms"),
    ("ours, mixed_bfloat16", "stock, float32", "times_ms"),
    ("ours, float32", "stock, float32", "memory_mib"),
    ("ours, mixed_bfloat16", "stock, mixed_bfloat16", "memory_mib"),
)


def _ratio(case: list[float], against: list[float]) -> float:
    """Returns the median over rounds of the ratio of two cases taken in turn."""
    return statistics.median(ours / stock for ours, stock in zip(case, against, strict=True))


def rows(results: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of the table.

    Args:
        results: the JSON of `benchmarks.layers`.

    Example:
        >>> case = {"ours, float32": [1.0], "stock, float32": [2.0]}
        >>> case |= {"ours, mixed_bfloat16": [1.0], "stock, mixed_bfloat16": [4.0]}
        >>> list(rows({"groups": [{"name": "Softmax, 2x3", "times_ms": case, "memory_mib": case}]}))[-1]
        '| Softmax, 2x3 | 0.50 | 0.25 | 0.50 | 0.50 | 0.25 |'
    """
    yield "| | time, float32 | time, bfloat16 | bfloat16 over stock float32 | memory, float32 | memory, bfloat16 |"
    yield "|---|---:|---:|---:|---:|---:|"
    for group in results["groups"]:
        ratios = (_ratio(group[kind][case], group[kind][against]) for case, against, kind in COLUMNS)
        yield f"| {group['name']} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"


if __name__ == "__main__":
    print(*rows(json.loads(RESULTS.read_text())), sep="\n")
