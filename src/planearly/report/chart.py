"""A table as a figure: lines or groups of bars, each value with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from planearly import methods
from planearly.methods import label
from planearly.report import drawing
from planearly.report.table import Axis, Figure, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Transform

Row = Mapping[str, Any]

_LINES_HEIGHT = 3.1  # inches
_APART = 2.6  # points between lines, so that intervals at the same x do not hide each other


def draw(table: Table) -> drawing.Canvas | None:
    """The figure that the table asks for; None if it asks for none or has nothing to draw."""
    rows = table.drawn_rows()
    if table.figure is None or not rows:
        return None
    return (_bars if table.figure.kind == "bars" else _lines)(table.figure, rows, table.title)


def _lines(figure: Figure, rows: Sequence[Row], title: str) -> drawing.Canvas:
    names = _series(figure, rows)
    with drawing.canvas(title, _LINES_HEIGHT + _legend_height(names)) as drawn:
        for i, name in enumerate(names):
            colour, marker = _style(name, names)
            beside = _beside(drawn, (i - (len(names) - 1) / 2) * _APART
                             * (figure.kind != "curves"))  # they have no intervals
            mine = sorted((row for row in rows if str(row.get(figure.series)) == name),
                          key=lambda row: row[figure.x.key])
            x, y = zip(*((row[figure.x.key], row[figure.y.key]) for row in mine), strict=True)
            parts = drawn.axes.plot(x, y, color=colour, markersize=5,
                                    marker="" if figure.kind == "curves" else marker,
                                    linewidth=0 if figure.kind == "points" else 1.4,
                                    linestyle=drawing.dash_of(name, _known(names))
                                    if figure.kind == "curves" else "-",
                                    label=drawing.short_name(label(name), 28))
            for row in mine:
                if bounds := _interval(figure, row):
                    parts += drawn.axes.plot([row[figure.x.key]] * 2, bounds, color=colour,
                                             linewidth=2.2, alpha=0.45)
            for part in parts:  # after plotting: the axes' limits are the data's own
                part.set_transform(beside)
        _scale(drawn.axes, "x", figure.x, [row[figure.x.key] for row in rows])
        _scale(drawn.axes, "y", figure.y)
        drawn.axes.grid()
        drawing.legend(drawn.axes)
    return drawn


def _beside(drawn: drawing.Canvas, points: float) -> Transform:
    """The data's coordinates, moved aside by some points."""
    from matplotlib.transforms import ScaledTranslation

    return drawn.axes.transData + ScaledTranslation(points / 72, 0, drawn.figure.dpi_scale_trans)


def _bars(figure: Figure, rows: Sequence[Row], title: str) -> drawing.Canvas:
    """Lying bars, whose names are read without turning one's head; dots on a logarithmic axis,
    which has no zero for a bar to stand on."""
    names = _series(figure, rows)
    groups = list(dict.fromkeys(str(row[figure.x.key]) for row in rows))
    beside = 1 if len(rows) == len(groups) else len(names)  # bars that a group has room for
    thick = min(0.8 / beside, 0.6)
    height = 0.8 + len(groups) * max(0.34, 0.15 * beside) + _legend_height(names)
    with drawing.canvas(title, height) as drawn:
        axes = drawn.axes
        for i, name in enumerate(names):
            colour, marker = _style(name, names)
            mine = [row for row in rows if str(row.get(figure.series)) == name]
            y = np.array([groups.index(str(row[figure.x.key])) for row in mine])
            y = y + (i - (len(names) - 1) / 2) * thick * (beside > 1)
            values = [row[figure.y.key] for row in mine]
            shown = drawing.short_name(label(name), 28)
            if figure.y.log:
                axes.plot(values, y, marker, color=colour, markersize=5, label=shown)
            else:
                axes.barh(y, values, thick * 0.88, color=colour, alpha=0.75, label=shown,
                          hatch=drawing.hatch_of(name, _known(names)))
            for row, place in zip(mine, y, strict=True):
                if bounds := _interval(figure, row):
                    axes.plot(bounds, [place, place], color=colour if figure.y.log else drawing.INK,
                              linewidth=2.5 if figure.y.log else 1, alpha=0.6)
        if not figure.y.log:
            axes.axvline(0, color=drawing.INK, linewidth=0.7)
        axes.set_yticks(range(len(groups)), [drawing.short_name(group, 28) for group in groups])
        axes.set_ylim(len(groups) - 0.45, -0.55)
        _scale(axes, "x", figure.y)
        axes.grid(axis="x")
        drawing.legend(axes)
    return drawn


def _series(figure: Figure, rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.get(figure.series)) for row in rows))


def _known(names: Sequence[str]) -> list[str]:
    """The series among which these are numbered: methods look the same in every figure."""
    of_methods = all(name.partition(",")[0] in methods.TABLE for name in names)
    return list(dict.fromkeys([*(methods.TABLE if of_methods else ()), *names]))


def _style(name: str, names: Sequence[str]) -> tuple[str, str]:
    return drawing.style_of(name, _known(names))


def _interval(figure: Figure, row: Row) -> list[float] | None:
    bounds = row.get(figure.interval) if figure.interval else None
    if not bounds or not all(b is not None and math.isfinite(b) for b in bounds):
        return None
    return None if figure.y.log and min(bounds) <= 0 else list(bounds)


def _legend_height(names: Sequence[str]) -> float:
    return 0.2 * math.ceil(len(names) / 2)


def _far_apart(values: Sequence[float]) -> bool:
    """Whether each may be a tick of a logarithmic axis."""
    ordered = sorted(set(values))
    return all(b > 1.3 * a for a, b in pairwise(ordered)) and len(ordered) <= 8


def _scale(axes: Axes, which: str, axis: Axis, values: Sequence[float] = ()) -> None:
    """Label and scale; ticks at the ``values`` of x themselves where a log axis has few."""
    from matplotlib.ticker import FixedLocator

    (axes.set_xlabel if which == "x" else axes.set_ylabel)(axis.label)
    if axis.log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        drawing.plain_log(axes, which)
        if values and _far_apart(values):
            axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    else:
        ticks = axes.xaxis if which == "x" else axes.yaxis
        ticks.set_major_formatter(drawing.as_told(ticks))
