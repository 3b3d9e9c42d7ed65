"""The report's figures: inline SVG that takes the page's text colour, light or dark.

Colours are those of Okabe and Ito, told apart with every common colour blindness, and each method
has its own marker as well.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from markupsafe import Markup, escape

from planearly.progress import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector: TypeAlias = Sequence[float] | np.ndarray

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#010203"  # replaced by the page's text colour
_GENERIC, _DOMAIN = "#8C96A3", _COLOURS[0]
_WIDTH = 4.9  # inches; two figures stand side by side on a desktop, one fills a phone


def style_of(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """(colour, marker) of a method among all that the page shows."""
    i = list(methods).index(method)
    return _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]


def perplexities(rows: Sequence[Mapping[str, Any]], label: Mapping[str, str]) -> Markup:
    """Perplexity per domain and method: before (hollow) and after fine-tuning (filled, 95% CI)."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    gap = 0.7 / max(len(methods), 1)
    height = 1.35 + len(domains) * max(0.5, 0.2 * len(methods))
    with _figure("perplexity after and before fine-tuning", height) as (axes, finished):
        for row in rows:
            colour, marker = style_of(row["method"], methods)
            place = methods.index(row["method"]) - (len(methods) - 1) / 2
            y = domains.index(row["domain"]) + place * gap
            after, before = row["ppl_after"], row.get("ppl_before")
            if before is not None:
                axes.plot([after, before], [y, y], color=colour, alpha=0.35, linewidth=1.2)
                axes.plot(before, y, marker, color=colour, markersize=5, fillstyle="none")
            if row.get("ppl_after_ci"):
                axes.plot(row["ppl_after_ci"], [y, y], color=colour, linewidth=3, alpha=0.6)
            axes.plot(after, y, marker, color=colour, markersize=6)
        for method in methods:
            colour, marker = style_of(method, methods)
            axes.plot([], [], marker, color=colour, label=label[method])
        axes.set_yticks(range(len(domains)), domains)
        axes.set_ylim(len(domains) - 0.45, -0.55)
        axes.set_xscale("log")
        _plain_log(axes)
        axes.set_xlabel("perplexity on held-out text (lower is better)")
        axes.grid(axis="x")
        _legend(axes, len(methods))
    return finished[0]


def curves(runs: Sequence[Mapping[str, Any]], methods: Sequence[str],
           label: Mapping[str, str], title: str) -> Markup:
    """Loss over tokens: training (thin line) and validation (marked)."""
    with _figure(title, 3.0) as (axes, finished):
        top, most = [], max(point["tokens"] for run in runs for point in run["metrics"])
        scale, unit = (1e9, "G") if most >= 2e9 else (1e6, "M") if most >= 2e6 else (1e3, "k")
        for run in runs:
            colour, marker = style_of(run["method"], methods)
            for key in ("loss", "validation"):
                points = [(p["tokens"] / scale, p[key]) for p in run["metrics"]
                          if p.get(key) is not None and math.isfinite(p[key])]
                if not points:
                    continue
                x, y = np.array(points).T
                # The first steps are a cliff that would flatten the rest of the picture.
                top.append(np.interp(0.06 * most / scale, x, y))
                if key == "loss":
                    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.55)
                else:
                    every = max(1, len(x) // 10)
                    axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.4,
                              markevery=every, label=label[run["method"]])
        if top:
            axes.set_ylim(top=max(top) * 1.04)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"tokens ({unit})" if unit != "k" else "tokens (thousands)")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(axis="y")
        _legend(axes, len(runs))
    return finished[0]


def histograms(clusters: Sequence[int], generic: Vector, domain: Vector,
               name: str) -> Markup:
    """Shares of the heaviest clusters: generic corpus beside the domain."""
    y = np.arange(len(clusters))
    with _figure(f"cluster histogram of {name}", 1.2 + 0.2 * len(clusters)) as (axes, finished):
        axes.barh(y - 0.2, 100 * np.asarray(domain), 0.38, color=_DOMAIN, label=name)
        axes.barh(y + 0.2, 100 * np.asarray(generic), 0.38, color=_GENERIC, label="generic corpus")
        _cluster_axis(axes, clusters)
        axes.set_xlabel("share of windows (%)")
        _legend(axes, 2)
    return finished[0]


def epochs(clusters: Sequence[int], expected: Vector | None, realised: Vector | None,
           name: str) -> Markup:
    """Passes over each cluster's windows in pretraining: expected (bar) and realised (diamond)."""
    y = np.arange(len(clusters))
    with _figure(f"epochs per cluster for {name}", 1.2 + 0.2 * len(clusters)) as (axes, finished):
        if expected is not None:
            axes.barh(y, expected, 0.5, color=_DOMAIN, alpha=0.45, label="expected")
        if realised is not None:
            axes.plot(realised, y, "D", color=_COLOURS[1], markersize=4.5, label="realised")
        axes.axvline(1, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        _cluster_axis(axes, clusters)
        axes.set_xlim(left=0)
        axes.set_xlabel("epochs (1 = every window seen once)")
        _legend(axes, 2)
    return finished[0]


def _cluster_axis(axes: Axes, clusters: Sequence[int]) -> None:
    axes.set_yticks(range(len(clusters)), [str(c) for c in clusters])
    axes.set_ylim(len(clusters) - 0.4, -0.6)
    axes.set_ylabel("cluster")
    axes.grid(axis="x")


def _plain_log(axes: Axes) -> None:
    """Ticks a reader can read: 20, 30, 50 rather than powers of ten."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = axes.get_xlim()
    ratio = high / low
    steps = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if ratio < 4 else (1, 1.5, 2, 3, 5, 7)
             if ratio < 12 else (1, 2, 5) if ratio < 150 else (1,))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**d for d in decades for step in steps if low <= step * 10.0**d <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: short(value))


def _legend(axes: Axes, entries: int) -> None:
    """Above the axes, so that it never hides data."""
    handles, names = axes.get_legend_handles_labels()
    bars_first = sorted(range(len(names)), key=lambda i: not hasattr(handles[i], "patches"))
    axes.legend([handles[i] for i in bars_first], [names[i] for i in bars_first],
                loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(3, max(1, entries)),
                frameon=False, borderaxespad=0.2, handletextpad=0.5, columnspacing=1.2)


@contextlib.contextmanager
def _figure(title: str, height: float) -> Iterator[tuple[Axes, list[Markup]]]:
    """Axes to draw on; afterwards the list holds the figure as SVG for the page."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False,
        "font.size": 9.5, "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.linewidth": 0.7, "grid.color": "#80808055",
        "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.fontsize": 9,
    }
    finished: list[Markup] = []
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        yield axes, finished
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace(_INK, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    finished.append(Markup(svg))  # matplotlib escapes the text it writes
