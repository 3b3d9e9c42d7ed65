"""The report's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from markupsafe import Markup

from planearly.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector: TypeAlias = Sequence[float] | np.ndarray


def perplexities(rows: Sequence[Mapping[str, Any]], label: Mapping[str, str]) -> Markup:
    """Perplexity per domain and method: before (hollow) and after fine-tuning (filled, 95% CI)."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    gap = 0.7 / max(len(methods), 1)
    height = 1.35 + len(domains) * max(0.5, 0.2 * len(methods))
    with drawing.canvas("perplexity after and before fine-tuning", height) as drawn:
        axes = drawn.axes
        for row in rows:
            colour, marker = drawing.style_of(row["method"], methods)
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
            colour, marker = drawing.style_of(method, methods)
            axes.plot([], [], marker, color=colour, label=label[method])
        axes.set_yticks(range(len(domains)), [drawing.short_name(d) for d in domains])
        axes.set_ylim(len(domains) - 0.45, -0.55)
        axes.set_xscale("log")
        drawing.plain_log(axes)
        axes.set_xlabel("perplexity on held-out text (lower is better)")
        axes.grid(axis="x")
        drawing.legend(drawn)
    return drawn.svg


def curves(runs: Sequence[Mapping[str, Any]], methods: Sequence[str],
           label: Mapping[str, str], title: str) -> Markup:
    """Loss over tokens: training (thin line) and validation (marked)."""
    with drawing.canvas(title, 3.0) as drawn:
        axes = drawn.axes
        top, most = [], max(point["tokens"] for run in runs for point in run["metrics"])
        scale, unit = (1e9, "B") if most >= 2e9 else (1e6, "M") if most >= 2e6 else (1e3, "k")
        for run in runs:
            colour, marker = drawing.style_of(run["method"], methods)
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
        drawing.legend(drawn)
    return drawn.svg


def histograms(clusters: Sequence[int], generic: Vector, domain: Vector,
               name: str) -> Markup:
    """Shares of the heaviest clusters: generic corpus beside the domain."""
    y = np.arange(len(clusters))
    with drawing.canvas(f"cluster histogram of {name}", 1.2 + 0.2 * len(clusters)) as drawn:
        axes = drawn.axes
        axes.barh(y - 0.2, 100 * np.asarray(domain), 0.38, color=drawing.DOMAIN,
                  label=drawing.short_name(name))
        axes.barh(y + 0.2, 100 * np.asarray(generic), 0.38, color=drawing.GENERIC,
                  label="generic corpus")
        _cluster_axis(axes, clusters)
        axes.set_xlabel("share of windows (%)")
        drawing.legend(drawn)
    return drawn.svg


def epochs(clusters: Sequence[int], expected: Vector | None, realised: Vector | None,
           name: str) -> Markup:
    """Passes over each cluster's windows in pretraining: expected (bar) and realised (diamond)."""
    y = np.arange(len(clusters))
    with drawing.canvas(f"epochs per cluster for {name}", 1.2 + 0.2 * len(clusters)) as drawn:
        axes = drawn.axes
        if expected is not None:
            axes.barh(y, expected, 0.5, color=drawing.DOMAIN, alpha=0.45, label="expected")
        if realised is not None:
            axes.plot(realised, y, "D", color=drawing.COLOURS[1], markersize=4.5, label="realised")
        axes.axvline(1, color=drawing.INK, linewidth=0.8, linestyle=(0, (4, 3)))
        _cluster_axis(axes, clusters)
        axes.set_xlim(left=0)
        axes.set_xlabel("epochs (1 = every window seen once)")
        drawing.legend(drawn)
    return drawn.svg


def experts(histogram: Vector, losses: Vector | None, chosen: int | None, title: str) -> Markup:
    """Every expert's loss (where it was measured) above the domain's share in its cluster."""
    share = 100 * np.asarray(histogram)
    x = np.arange(len(share))
    colours = [drawing.DOMAIN if i == chosen or chosen is None else drawing.GENERIC for i in x]
    measured = losses is not None
    with drawing.canvas(title, 3.3 if measured else 1.9, 1 + measured, sharex=True) as drawn:
        if losses is not None:
            drawn.axes.scatter(x, losses, s=22, c=colours)
            drawn.axes.set_ylabel("nats per token")
            drawn.axes.grid(axis="y")
        below = drawn.panels[-1]
        below.bar(x, share, 0.8, color=colours)
        below.set_ylabel("domain (%)")
        below.set_xlabel("expert")
        below.grid(axis="y")
        below.locator_params(axis="x", integer=True)
    return drawn.svg


def similarity(experts: Sequence[Vector], centroids: Sequence[Vector], title: str) -> Markup:
    """Cosines among experts beside those among their clusters' centroids, in the same order."""
    theirs = np.asarray(centroids)
    # By the leading eigenvector, similar clusters come to lie beside each other.
    order = np.argsort(np.linalg.eigh(theirs)[1][:, -1], kind="stable")
    with drawing.canvas(title, 2.15, 1, 2) as drawn:
        for panel, values, name in zip(drawn.panels, (np.asarray(experts), theirs),
                                       ("experts", "clusters"), strict=True):
            image = panel.imshow(values[np.ix_(order, order)], cmap="PuOr_r", vmin=-1, vmax=1,
                                 interpolation="nearest")
            panel.set_title(name, fontsize=9.5)
            panel.set_xticks([])
            few = len(order) <= 20
            panel.set_yticks(range(len(order)) if few else [], order if few else None)
            panel.tick_params(length=0, labelsize=7.5)
        drawn.figure.colorbar(image, ax=drawn.panels, shrink=0.75, label="cosine")
    return drawn.svg


def _cluster_axis(axes: Axes, clusters: Sequence[int]) -> None:
    axes.set_yticks(range(len(clusters)), [str(c) for c in clusters])
    axes.set_ylim(len(clusters) - 0.4, -0.6)
    axes.set_ylabel("cluster")
    axes.grid(axis="x")
