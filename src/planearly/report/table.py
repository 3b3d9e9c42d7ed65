"""A table: data with the meaning of each column, how its cells are written, how it is drawn."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from planearly import methods
from planearly.errors import UserError
from planearly.files import atomic_write, read_json, write_json
from planearly.report import form

Kind = Literal["text", "perplexity", "interval", "tokens", "flops", "hours", "number", "percent",
               "nats"]
"""What a column's values are: ``text`` a string; ``interval`` a list [low, high] in the unit of the
column before it; ``hours`` device-hours; ``percent`` a share from 0 to 1; ``nats`` nats per token
or of entropy; the others plain numbers."""
TALL = 25
"""Rows from which a table scrolls in a box of its own."""


@dataclass(frozen=True)
class Cell:
    """A cell as a page shows it: its text, what it is sorted by (None: last), its column's kind."""

    text: str
    sort: Any
    kind: Kind


@dataclass(frozen=True)
class Column:
    """A column: the rows' key, its heading, and what its values are."""

    key: str
    label: str
    kind: Kind = "number"


@dataclass(frozen=True)
class Axis:
    """An axis of a figure: the rows' key, its label, and whether its scale is logarithmic."""

    key: str
    label: str
    log: bool = False


@dataclass(frozen=True)
class Figure:
    """How a table's rows are drawn.

    Attributes:
        kind: ``lines`` (x is a number), ``curves`` (without a mark at every value), ``points``
            (unconnected) or ``bars`` (x is a text: groups of bars side by side).
        x, y: the axes; a row in which either is None, or whose ``drawn`` is false, is not drawn.
        series: key of the text by which rows are one line, or one colour of bars; its order is the
            order of first appearance.
        interval: key of [low, high] around y, or None.
        panels: key of the text by which rows are drawn on panels below each other, in order of
            first appearance; None: on one.
        told: key of a text that stands above each bar, or None.
    """

    kind: Literal["lines", "curves", "points", "bars"]
    x: Axis
    y: Axis
    series: str
    interval: str | None = None
    panels: str | None = None
    told: str | None = None


@dataclass(frozen=True)
class Table:
    """One table, and the figure drawn from it, if any.

    Attributes:
        name: stem of its files, and its place on the page, such as ``table-04-baselines``.
        title: heading.
        paper: its counterpart, such as "Table 4"; "" where the paper has none.
        note: what it says, how to read it, what is missing.
        columns: in order; ``rows`` may hold further keys, which are not shown.
        rows: values by key; None where there is none.
        figure: how its rows are drawn; None where they are not.
    """

    name: str
    title: str
    paper: str
    note: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    figure: Figure | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def tall(self) -> bool:
        return len(self.rows) > TALL

    def drawn_rows(self) -> list[dict[str, Any]]:
        """The rows that its figure shows; none where it has no figure."""
        figure = self.figure
        if figure is None:
            return []
        axes = [figure.y] + [figure.x] * (figure.kind != "bars")
        return [row for row in self.rows
                if row.get("drawn", True) and row.get(figure.x.key) is not None and all(
                    isinstance(value := row.get(axis.key), int | float) and math.isfinite(value)
                    and (value > 0 or not axis.log) for axis in axes)]

    def cells(self) -> list[list[Cell]]:
        """The cells of every row, as a page shows them."""
        return [[Cell(*written, column.kind) for column, written in zip(
            self.columns, _row(self.columns, row), strict=True)] for row in self.rows]


def from_dict(values: Mapping[str, Any]) -> Table:
    """The inverse of :meth:`Table.to_dict`."""
    figure = None
    if drawn := values["figure"]:
        figure = Figure(**{**drawn, "x": Axis(**drawn["x"]), "y": Axis(**drawn["y"])})
    columns = [Column(**column) for column in values["columns"]]
    return Table(**{**values, "columns": columns, "figure": figure})


def write(tables: Iterable[Table], folder: Path) -> None:
    """Each table as ``NAME.csv`` (an interval as two columns) and as ``NAME.json``."""
    for table in tables:
        write_json(folder / f"{table.name}.json", table.to_dict())
        with atomic_write(folder / f"{table.name}.csv", "w") as handle:
            out = csv.writer(handle, lineterminator="\n")
            out.writerow([name for column in table.columns for name in _names(column)])
            for row in table.rows:
                out.writerow([value for column in table.columns
                              for value in _values(column, row.get(column.key))])


def read(path: Path) -> Table:
    """A table from its JSON file.

    Raises:
        UserError: no such file, or it is not a table's.
    """
    values = read_json(path)
    try:
        return from_dict(values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a table: write it anew") from error


def _row(columns: Sequence[Column], row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    unit = "number"
    for column in columns:
        value = row.get(column.key)
        if column.kind != "interval":
            unit = column.kind
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            yield "–", None
        elif column.key == "method":
            yield methods.label(value), value
        elif column.kind == "interval":
            yield f"[{', '.join(_written(unit, bound) for bound in value)}]", value[0]
        else:
            yield _written(unit, value), value


def _written(kind: str, value: Any) -> str:
    if value is None:
        return "–"
    if kind == "text":
        return str(value)
    if kind == "nats":
        return f"{value:.3f}"
    if kind == "number" and isinstance(value, int):
        return f"{value:,}"
    return {"tokens": form.si, "flops": form.flops, "hours": form.hours,
            "percent": form.percent}.get(kind, form.number)(value)


def _names(column: Column) -> list[str]:
    if column.kind == "interval":
        return [f"{column.key}_low", f"{column.key}_high"]
    return [column.key]


def _values(column: Column, value: Any) -> list[Any]:
    if column.kind == "interval":
        return ["", ""] if value is None else list(value)
    return ["" if value is None else value]
