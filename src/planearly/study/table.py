"""A table of the study: data with the meaning of each column, and how it is drawn."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from planearly.errors import UserError
from planearly.files import atomic_write, read_json, write_json

Kind = Literal["text", "perplexity", "interval", "tokens", "flops", "hours", "number", "percent",
               "nats"]
"""What a column's values are: ``text`` a string; ``interval`` a list [low, high] in the unit of the
column before it; ``hours`` device-hours; ``percent`` a share from 0 to 1; ``nats`` nats per token
or of entropy; the others plain numbers."""


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
        kind: ``lines`` (x is a number), ``points`` (the same, unconnected) or ``bars`` (x is a
            text: groups of bars side by side).
        x, y: the axes; a row in which either is None, or whose ``drawn`` is false, is not drawn.
        series: key of the text by which rows are one line, or one colour of bars; its order is the
            order of first appearance.
        interval: key of [low, high] around y, or None.
    """

    kind: Literal["lines", "points", "bars"]
    x: Axis
    y: Axis
    series: str
    interval: str | None = None


@dataclass(frozen=True)
class Table:
    """One table of the study, and the figure drawn from it, if any.

    Attributes:
        name: stem of its files, such as ``table-04-baselines``.
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
                              for value in _cells(column, row.get(column.key))])


def read(path: Path) -> Table:
    """A table from its JSON file.

    Raises:
        UserError: no such file, or it is not a table's.
    """
    values = read_json(path)
    try:
        return from_dict(values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a table of a study: write it anew") from error


def _names(column: Column) -> list[str]:
    if column.kind == "interval":
        return [f"{column.key}_low", f"{column.key}_high"]
    return [column.key]


def _cells(column: Column, value: Any) -> list[Any]:
    if column.kind == "interval":
        return ["", ""] if value is None else list(value)
    return ["" if value is None else value]
