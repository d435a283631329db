"""What all reports have in common: text of 80 columns, JSON, a picture and a page of HTML."""

import dataclasses
import html
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from keras_mp.errors import ArgumentError

__all__ = ["Report", "Table", "as_json", "axes", "label_rows"]

_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: above it.
        columns: the names of the columns.
        rows: texts, one for each column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Report:
    """The base of what the diagnostics return: a frozen dataclass that can be printed, kept and looked at."""

    title = ""

    def headline(self) -> str:
        """Returns the most important thing in a sentence or two."""
        raise NotImplementedError

    def tables(self) -> list[Table]:
        """Returns the tables of the report, the most important rows first."""
        raise NotImplementedError

    def figure(self) -> Any:
        """Returns a Matplotlib figure, or None where there is nothing to draw."""
        return None

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table as RichTable

        stream = io.StringIO()
        console = Console(file=stream, width=_WIDTH, force_terminal=False, color_system=None, highlight=False)
        console.print(self.headline(), markup=False)
        for table in self.tables():
            console.print()
            drawn = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
            for number, column in enumerate(table.columns):
                drawn.add_column(column, overflow="fold", ratio=None if number else 1)
            for row in table.rows[:_ROWS]:
                drawn.add_row(*(_plain_text(cell) for cell in row))
            console.print(drawn)
            if len(table.rows) > _ROWS:
                console.print(f"... and {len(table.rows) - _ROWS} more; `to_json()` and `save()` have all of them.")
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def to_json(self) -> str:
        """Returns the whole report as JSON. Infinities and NaN are strings."""
        return as_json(self)

    def plot(self, path: "str | pathlib.Path") -> None:
        """Writes the picture of the report.

        Args:
            path: of a file whose suffix Matplotlib knows, such as ".png" or ".svg".
        """
        figure = self.figure()
        if figure is None:
            raise ArgumentError("This report has nothing to draw. Print it, or call `save`.")
        figure.savefig(path, bbox_inches="tight", dpi=150)

    def save(self, path: "str | pathlib.Path") -> None:
        """Writes one page of HTML that needs no other file.

        Args:
            path: of the file.
        """
        figure, picture = self.figure(), ""
        if figure is not None:
            stream = io.StringIO()
            figure.savefig(stream, format="svg", bbox_inches="tight")
            picture = stream.getvalue()[stream.getvalue().index("<svg") :]
        tables = "".join(_html_table(table) for table in self.tables())
        title = html.escape(self.title)
        page = _PAGE.format(title=title, headline=html.escape(self.headline()), picture=picture, tables=tables)
        pathlib.Path(path).write_text(page, encoding="utf-8")


_ROWS = 30


def axes(rows: int) -> tuple[Any, Any]:
    """Returns a Matplotlib figure that has a line for each row, and its axes."""
    try:
        from matplotlib.figure import Figure  # late: few reports are drawn
    except ModuleNotFoundError:
        raise ArgumentError("Pictures of reports need Matplotlib. Type: pip install matplotlib") from None

    figure = Figure(figsize=(9, 1 + 0.2 * rows))
    drawn = figure.add_subplot()
    drawn.grid(axis="x", color="#dde4ec", linewidth=0.6)
    for side in ("top", "right", "left"):
        drawn.spines[side].set_visible(False)
    return figure, drawn


def label_rows(axes: Any, names: Sequence[str]) -> None:
    """Names the rows of a figure from the top down."""
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _plain_text(text: str) -> str:
    """Returns text that rich takes for text, not for its markup."""
    return str(text).replace("[", "\\[")


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"<h2>{html.escape(table.title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def as_json(report: Any) -> str:
    """Returns a dataclass as JSON. Infinities and NaN are strings."""
    return json.dumps(_plain(dataclasses.asdict(report)), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b2733; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }} svg {{ max-width: 100%; height: auto }}
.headline {{ background: #eef4fb; border-left: 4px solid #2f6db5; padding: .8rem 1rem; border-radius: 4px }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #dde4ec }}
th {{ position: sticky; top: 0; background: #fff }}
</style></head><body><h1>{title}</h1><p class="headline">{headline}</p>{picture}{tables}</body></html>
"""
