"""A table as a figure: lines or groups of bars, each value with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from planearly import methods
from planearly.methods import label
from planearly.report import drawing
from planearly.report.table import Axis, Figure, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

_LINES_HEIGHT = 3.3  # inches
_PANEL_HEIGHT = 2.6  # of one of several
_APART = 2.6  # points between lines, so that intervals at the same x do not hide each other
_NEAR = 0.02  # of the width of x: what is nearer is at the same place
_FARTHEST = 14.0  # points from the first line to the last: more would tell of another x
_FILLS: tuple[Any, ...] = ("full", "none", "left", "top")
_LEGEND = 44  # letters of a line of the legend


def draw(table: Table) -> drawing.Canvas | None:
    """The figure that the table asks for; None if it asks for none or has nothing to draw."""
    rows = table.drawn_rows()
    if table.figure is None or not rows:
        return None
    return (_bars if table.figure.kind == "bars" else _lines)(table.figure, rows, table.title)


def _lines(figure: Figure, rows: Sequence[Row], title: str) -> drawing.Canvas:
    names, parts = _series(figure, rows), _panels(figure, rows)
    apart = 0.0 if figure.kind == "curves" or not any(
        map(partial(_crowded, figure), parts.values())) else min(
            _APART, _FARTHEST / max(1, len(names) - 1))
    height = _LINES_HEIGHT if len(parts) == 1 else len(parts) * _PANEL_HEIGHT
    with drawing.canvas(title, height, len(parts), sharex=True, sharey=True) as drawn:
        for axes, (words, of_panel) in zip(drawn.panels, parts.items(), strict=True):
            axes.set_title(words, loc="left", fontsize=9.5)
            for i, name in enumerate(names):
                mine = sorted((row for row in of_panel if str(row.get(figure.series)) == name),
                              key=lambda row: row[figure.x.key])
                if mine:
                    _line(drawn, axes, figure, mine, names, name,
                          (i - (len(names) - 1) / 2) * apart)
        for axes in drawn.panels:
            _scale(axes, "y", figure.y)
            axes.grid()
        _scale(drawn.panels[-1], "x", figure.x, [row[figure.x.key] for row in rows])
        drawing.legend(drawn)
    return drawn


def _line(drawn: drawing.Canvas, axes: Axes, figure: Figure, rows: Sequence[Row],
          names: Sequence[str], name: str, aside: float) -> None:
    """One line, of rows in the order of x, with their intervals, moved aside by some points."""
    from matplotlib.transforms import ScaledTranslation

    colour, marker = _style(name, names)
    curve = figure.kind == "curves"
    drawn_parts = axes.plot(
        [row[figure.x.key] for row in rows], [row[figure.y.key] for row in rows], color=colour,
        marker="" if curve else marker, markersize=5, fillstyle=_fill(name, names),
        linewidth=0 if figure.kind == "points" else 1.4,
        linestyle=drawing.dash_of(_plain(name), _known(names)),
        label=drawing.wrapped(label(name), _LEGEND))
    for row in rows:
        if bounds := _interval(figure, row):
            drawn_parts += axes.plot([row[figure.x.key]] * 2, bounds, color=colour, linewidth=2.2,
                                     alpha=0.45)
    for part in drawn_parts:  # after plotting: the axes' limits are the data's own
        part.set_transform(axes.transData + ScaledTranslation(
            aside / 72, 0, drawn.figure.dpi_scale_trans))


def _crowded(figure: Figure, rows: Sequence[Row]) -> bool:
    """Whether different lines have values at the same x."""
    at = sorted((math.log(row[figure.x.key]) if figure.x.log else row[figure.x.key],
                 str(row.get(figure.series))) for row in rows)
    return any(b - a <= _NEAR * (at[-1][0] - at[0][0]) and one != other
               for (a, one), (b, other) in pairwise(at))


def _bars(figure: Figure, rows: Sequence[Row], title: str) -> drawing.Canvas:
    """Lying bars, whose names are read without turning one's head; dots on a logarithmic axis,
    which has no zero for a bar to stand on."""
    names, parts = _series(figure, rows), _panels(figure, rows)
    groups = {words: list(dict.fromkeys(str(row[figure.x.key]) for row in mine))
              for words, mine in parts.items()}
    many = sum(map(len, groups.values()))
    at = {words: _places(figure, mine, names) for words, mine in parts.items()}
    beside = 1 + max(round(2 * max(each)) for each in at.values())  # bars of the largest group
    written = {group: drawing.wrapped(label(group)) for of in groups.values() for group in of}
    lines = max(text.count("\n") + 1 for text in written.values())
    room = max(0.34, 0.15 * beside, 0.17 * lines) + 0.1 * bool(figure.told)
    height = 1.05 + many * room + 0.35 * (len(parts) - 1)
    with drawing.canvas(title, height, len(parts), sharex=True,
                        height_ratios=[len(of) for of in groups.values()]) as drawn:
        for axes, (words, mine) in zip(drawn.panels, parts.items(), strict=True):
            axes.set_title(words, loc="left", fontsize=9.5)
            for name in names:
                if of_name := [i for i, row in enumerate(mine)
                               if str(row.get(figure.series)) == name]:
                    thick = min(0.8 / beside, 0.6)
                    _bars_of(axes, figure, [mine[i] for i in of_name], names, name, np.array([
                        groups[words].index(str(mine[i][figure.x.key])) + thick * at[words][i]
                        for i in of_name]), thick)
            if not figure.y.log:
                axes.axvline(0, color=drawing.INK, linewidth=0.7)
            axes.set_yticks(range(len(groups[words])), [written[of] for of in groups[words]])
            axes.set_ylim(len(groups[words]) - 0.45, -0.55)
            axes.grid(axis="x")
        if len(parts) == 1:
            drawn.axes.set_ylabel(figure.x.label)
        else:
            drawn.figure.supylabel(figure.x.label, fontsize=9.5)
        _scale(drawn.panels[-1], "x", figure.y)
        drawing.legend(drawn)
    return drawn


def _bars_of(axes: Axes, figure: Figure, rows: Sequence[Row], names: Sequence[str], name: str,
             y: np.ndarray, thick: float) -> None:
    """The bars of one series, at ``y``; groups are 1 apart."""
    colour, marker = _style(name, names)
    shown = drawing.wrapped(label(name), _LEGEND)
    values = [row[figure.y.key] for row in rows]
    if figure.told:
        for row, at in zip(rows, y, strict=True):
            axes.annotate(str(row.get(figure.told) or ""), (0, at - 0.22), (3, 0),
                          axes.get_yaxis_transform(), "offset points", va="center", fontsize=9)
        y, thick = y + 0.2, thick / 2
    if figure.y.log:
        axes.plot(values, y, marker, color=colour, markersize=5, label=shown,
                  fillstyle=_fill(name, names))
    else:
        axes.barh(y, values, thick * 0.88, color=colour, alpha=0.75, label=shown,
                  hatch=drawing.hatch_of(_plain(name), _known(names))
                  + "..." * (_fill(name, names) != "full"))
    for row, at in zip(rows, y, strict=True):
        if bounds := _interval(figure, row):
            axes.plot(bounds, [at, at], color=colour if figure.y.log else drawing.INK,
                      linewidth=2.5 if figure.y.log else 1, alpha=0.6)


def _places(figure: Figure, rows: Sequence[Row], names: Sequence[str]) -> list[float]:
    """Where each bar stands beside those of its group, from the group's middle on, in bars."""
    groups: dict[str, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: names.index(str(rows[i].get(figure.series)))):
        groups.setdefault(str(rows[i][figure.x.key]), []).append(i)
    return [group.index(i) - (len(group) - 1) / 2 for i, row in enumerate(rows)
            for group in [groups[str(row[figure.x.key])]]]


def _series(figure: Figure, rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(row.get(figure.series)) for row in rows))


def _panels(figure: Figure, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each panel by its heading."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(str(row[figure.panels]) if figure.panels else "", []).append(row)
    return parts


def _plain(name: str) -> str:
    """The method of a series that may be of a variant of it (``slm-pn, blend``)."""
    method = name.partition(",")[0]
    return method if method in methods.TABLE else name


def _known(names: Sequence[str]) -> list[str]:
    """The series among which these are numbered: methods look the same in every figure."""
    plain = list(dict.fromkeys(map(_plain, names)))
    of_methods = all(name in methods.TABLE for name in plain)
    return list(dict.fromkeys([*(methods.TABLE if of_methods else ()), *plain]))


def _style(name: str, names: Sequence[str]) -> tuple[str, str]:
    return drawing.style_of(_plain(name), _known(names))


def _fill(name: str, names: Sequence[str]) -> Any:
    """How a mark is filled: it tells a method's variants, which have its colour."""
    variants = [each for each in names if _plain(each) == _plain(name) != each]
    return _FILLS[(variants.index(name) + 1) % len(_FILLS) if name in variants else 0]


def _interval(figure: Figure, row: Row) -> list[float] | None:
    bounds = row.get(figure.interval) if figure.interval else None
    if not bounds or not all(b is not None and math.isfinite(b) for b in bounds):
        return None
    return None if figure.y.log and min(bounds) <= 0 else list(bounds)


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
