"""How figures are drawn: as SVG inside a page, in the page's text colour, and as files.

Colours are those of Okabe and Ito, told apart with every common colour blindness, and each series
has its own marker as well.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from planearly.files import atomic_write
from planearly.units import prefixed, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK = "#010203"  # replaced by the page's text colour
GENERIC, DOMAIN = "#8C96A3", COLOURS[0]
WIDTH = 4.9  # inches; two figures stand side by side on a desktop, one fills a phone
_ONE_LINE = 0.3  # inches that a legend of one line takes


def style_of(name: str, names: Sequence[str]) -> tuple[str, str]:
    """(colour, marker) of a series among all that the page shows; 36 before one repeats."""
    i = list(names).index(name)
    return (COLOURS[i % len(COLOURS)],
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])


def hatch_of(name: str, names: Sequence[str]) -> str:
    """What tells bars apart whose colour repeats."""
    return ("", "///", "xxx")[list(names).index(name) // len(COLOURS) % 3]


def dash_of(name: str, names: Sequence[str]) -> str:
    """What tells curves without markers apart whose colour repeats."""
    return ("-", "--", ":")[list(names).index(name) // len(COLOURS) % 3]


@dataclass
class Canvas:
    """A figure being drawn; ``svg`` is there once the context of :func:`canvas` has ended."""

    figure: Figure
    panels: list[Axes]
    title: str
    svg: Markup = Markup()

    @property
    def axes(self) -> Axes:
        return self.panels[0]

    def save(self, stem: Path) -> None:
        """Write ``stem.png`` and ``stem.svg``, dark on white."""
        for kind in ("png", "svg"):
            with _settings(self.title), atomic_write(stem.with_name(f"{stem.name}.{kind}")) as out:
                self.figure.savefig(out, format=kind, dpi=160, facecolor="white",
                                    metadata=_NO_DATES if kind == "svg" else None)


_NO_DATES = {"Date": None, "Creator": None, "Format": None, "Type": None}


@contextlib.contextmanager
def canvas(title: str, height: float, rows: int = 1, columns: int = 1,
           **grid: Any) -> Iterator[Canvas]:
    """Panels to draw on, of matplotlib's ``subplots``; afterwards the figure as SVG."""
    from matplotlib.figure import Figure

    with _settings(title):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, **grid).ravel().tolist()
        drawn = Canvas(figure, panels, title)
        yield drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_DATES)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    drawn.svg = Markup(svg)  # matplotlib escapes the text it writes


def _settings(title: str) -> Any:
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False,
        "font.size": 9.5, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.linewidth": 0.7, "grid.color": "#80808055",
        "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.fontsize": 9,
    }
    return matplotlib.rc_context(settings)


def plain_log(axes: Axes, which: str = "x") -> None:
    """A logarithmic axis with ticks a reader can read: 20, 30, 50 rather than powers of ten."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    ratio = high / low
    if ratio < 4:  # hardly bent: even steps, of which there are enough in any range
        places = MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)).tick_values(low, high)
    else:
        steps = (1, 1.5, 2, 3, 5, 7) if ratio < 12 else (1, 2, 5) if ratio < 150 else (1,)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        places = [step * 10.0**d for d in decades for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in places if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(as_told(axis))


def as_told(axis: Any) -> Callable[[float, float], str]:
    """How the numbers of an axis are written, by its label: large FLOPs and tokens to three digits,
    counts of clusters or experts in full."""
    label = axis.label.get_text()
    write, least = (prefixed, 1e3) if "FLOP" in label else (short, 1e3 if "token" in label else 1e5)
    return lambda value, _: write(value) if abs(value) >= least else f"{value:,.6g}"


def short_name(text: str, length: int = 24) -> str:
    """A name that leaves the figure room: on one line, its middle left out where it is long."""
    line = " ".join(text.split())
    half = (length - 1) // 2
    return line if len(line) <= length else f"{line[:half]}…{line[-half:]}"


def wrapped(text: str, width: int = 28) -> str:
    """A name on at most three lines, its middle left out where it is longer."""
    return textwrap.fill(short_name(text, 3 * width - 6), width)


def legend(drawn: Canvas) -> None:
    """Above the panels, so that it never hides data, in as many columns as the figure is wide; the
    figure grows by what it needs beyond one line."""
    found: dict[str, Any] = {}
    for axes in drawn.panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if not found:
        return
    names = sorted(found, key=lambda name: not hasattr(found[name], "patches"))  # bars first
    figure = drawn.figure
    for columns in range(min(3, len(names)), 0, -1):
        made = figure.legend([found[name] for name in names], names, loc="outside upper left",
                             ncols=columns, frameon=False, borderaxespad=0.2, handletextpad=0.5,
                             columnspacing=1.2)
        size = made.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        if columns == 1 or size.width < 0.98 * WIDTH:
            break
        made.remove()
    figure.set_figheight(figure.get_figheight() + max(0.0, size.height - _ONE_LINE))
