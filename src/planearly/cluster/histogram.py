"""Cluster histograms: how a set of windows spreads over the clusters, and how sure one can be.

Counts are in window-equivalents: a window counts for the share of the context that it fills, so
that many short documents weigh no more than their text does. A small specialization set says little
about each of 1,024 clusters; its histogram is therefore smoothed towards the generic one,

    p_c = (n_c + tau * g_c) / (n + tau),

with as many windows' worth of generic prior, tau, as best predicts each part of the set from the
rest. The paper (section 3) takes n_c / n, which is tau = 0. :mod:`planearly.cluster.shared` is a
histogram as a file, which its owner gives away in place of the texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_LEAST_TAU = 1.0  # one window's worth of prior: three alike windows do not make a certainty
_MOST_TAU = 1e4  # times the size of the set: the generic histogram, in effect
_TINY_TAU = 1e-6
_GRID = 49
_BLOCK = 1 << 18  # windows counted at once


def histogram(groups: np.ndarray, size: np.ndarray, k: int) -> np.ndarray:
    """Window-equivalents per cluster, float64 ``[k]``.

    Args:
        groups: cluster of each window, ``[n]``; negative ones are left out.
        size: share of the context that each window fills, ``[n]``.
    """
    inside = np.asarray(groups) >= 0
    return np.bincount(groups[inside], np.asarray(size, np.float64)[inside], k)


def counted(groups: np.ndarray, windows: np.ndarray, context: int, k: int) -> np.ndarray:
    """:func:`histogram` of a corpus's windows, WINDOW ``[n]``, a block at a time: none has no
    group. The same additions in the same order as at once."""
    counts = np.zeros(k)
    for start in range(0, len(windows), _BLOCK):
        part = slice(start, start + _BLOCK)
        np.add.at(counts, groups[part], windows["length"][part] / context)
    return counts


def summary(counts: np.ndarray) -> dict[str, Any]:
    """Spread of a histogram: the quantities of the paper's Tables 9 and 10, and kin.

    ``entropy`` in nats; ``relative_entropy``, its share of ln k; ``largest_share`` and
    ``largest``, the most frequent cluster; ``empty`` clusters; ``effective``, the number of
    equally frequent clusters with the same entropy.
    """
    counts = np.asarray(counts, np.float64)
    k, total = len(counts), float(counts.sum())
    share = counts / total if total > 0 else np.zeros(k)
    used = share[share > 0]
    entropy = max(0.0, float(-(used * np.log(used)).sum()))  # not -0.0
    return {
        "k": k,
        "windows": total,
        "entropy": entropy,
        "relative_entropy": entropy / math.log(k) if k > 1 else 1.0,
        "largest_share": float(share.max()),
        "largest": int(share.argmax()),
        "empty": int((counts == 0).sum()),
        "effective": math.exp(entropy) if total > 0 else 0.0,
    }


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two histograms ``[k]`` in any units, nats, over the clusters that q has."""
    p, q = (np.where(q > 0, each, 0.0) for each in (p, q))
    p, q = p / p.sum(), q / q.sum()
    used = p > 0
    return max(float((p[used] * np.log(p[used] / q[used])).sum()), 0.0)


@dataclass(frozen=True)
class Smoothed:
    """A smoothed histogram: ``p`` float64 ``[k]`` (sum 1), its prior, and its worth.

    ``gain`` is the leave-one-out estimate of the mean of ln(p_c / g_c) over the set's windows: how
    many nats per window the histogram knows better than the generic one. Being a density ratio it
    compares numbers of clusters: take the k with the largest. 0 when the set is too small to tell.
    """

    p: np.ndarray
    tau: float
    gain: float


def smooth(
    groups: np.ndarray,
    size: np.ndarray,
    generic: np.ndarray,
    *,
    tau: float | None = None,
    documents: np.ndarray | None = None,
) -> Smoothed:
    """Smooth a set's histogram towards the generic one.

    Args:
        groups: cluster of each window of the specialization set, ``[n]``.
        size: share of the context that each window fills, ``[n]``.
        generic: the generic histogram ``[k]``, in any unit.
        tau: prior in windows; None chooses it by the leave-one-out likelihood.
        documents: document of each window, ``[n]``. Given, whole documents are left out, not single
            windows: windows of one document are alike and would vouch for each other.
    """
    groups, size = np.asarray(groups), np.asarray(size, np.float64)
    share = _shares(generic)
    parts = _Parts.of_windows(groups, size, share, documents)
    if tau is None:
        tau = parts.best()
    return Smoothed(_towards(histogram(groups, size, len(share)), share, tau), float(tau),
                    parts.gain(tau))


def smooth_counts(counts: np.ndarray, generic: np.ndarray, documents: int, *,
                  tau: float | None = None, noise: float = 0.0) -> Smoothed:
    """As :func:`smooth`, of a set of which nothing is known but its histogram.

    What is left out at once is an average document, taken to lie in one cluster. Counts with noise
    are kept where they stand above it, at ``noise`` ln k, which one cluster in two k passes by
    chance; what is missing of their sum is spread as the generic corpus is.

    Args:
        counts: window-equivalents ``[k]``; with noise some may be negative.
        documents: of the set.
        tau: as of :func:`smooth`.
        noise: scale of the Laplace noise on each count, in window-equivalents.
    """
    share, counts = _shares(generic), np.asarray(counts, np.float64)
    whole = counts.sum()
    if noise:
        counts = np.where(counts > noise * math.log(max(len(counts), 2)), counts, 0.0)
    parts = _Parts.of_counts(counts, share, documents)
    if tau is None:
        tau = parts.best()
    tau += max(float(whole - counts.sum()), 0.0)
    return Smoothed(_towards(counts, share, tau), tau, parts.gain(tau))


def _towards(counts: np.ndarray, share: np.ndarray, tau: float) -> np.ndarray:
    total = counts.sum() + tau
    p = (counts + tau * share) / total if total > 0 else share
    return p / p.sum()


def _shares(generic: np.ndarray) -> np.ndarray:
    share = np.asarray(generic, np.float64)
    return share / share.sum() if share.sum() > 0 else np.full(len(share), 1 / len(share))


@dataclass(frozen=True)
class _Parts:
    """The set as (part, cluster) cells, a part being what is left out at once.

    Of each cell: its ``weight``, the generic ``share`` of its cluster, what ``others`` have in the
    cluster, and the ``rest`` of the set without the cell's part. ``total`` is the set's.
    """

    weight: np.ndarray
    share: np.ndarray
    others: np.ndarray
    rest: np.ndarray
    total: float

    @classmethod
    def of_windows(cls, groups: np.ndarray, size: np.ndarray, share: np.ndarray,
                   documents: np.ndarray | None) -> _Parts:
        part = np.arange(len(groups)) if documents is None else documents
        _, part = np.unique(part, return_inverse=True)
        cell, where = np.unique(part * len(share) + groups, return_inverse=True)
        weight = np.bincount(where, size, len(cell))
        own = np.bincount(part, size) if len(part) else np.zeros(0)
        cluster = (cell % len(share)).astype(np.int64)
        total = float(weight.sum())
        return cls(weight, _floored(share, total)[cluster],
                   histogram(groups, size, len(share))[cluster] - weight,
                   total - own[(cell // len(share)).astype(np.int64)], total)

    @classmethod
    def of_counts(cls, counts: np.ndarray, share: np.ndarray, documents: int) -> _Parts:
        total = float(counts.sum())
        part = total / documents
        return cls(counts, _floored(share, total), counts - part,
                   np.full(len(counts), total - part), total)

    def gain(self, tau: float) -> float:
        if self.total <= 0:
            return 0.0
        tau = max(tau, _TINY_TAU)  # without any prior, one unseen cluster costs infinitely much
        others, rest = np.maximum(self.others, 0), np.maximum(self.rest, 0)  # rounding
        ratio = (others + tau * self.share) / ((rest + tau) * self.share)
        return float((self.weight * np.log(ratio)).sum() / self.total)

    def best(self) -> float:
        """The prior of the largest gain; among equals the largest prior."""
        most = _MOST_TAU * max(self.total, 1.0)
        grid = np.geomspace(_LEAST_TAU, most, _GRID)
        gains = [self.gain(tau) for tau in grid]
        best = _GRID - 1 - int(np.argmax(gains[::-1]))
        if gains[best] <= 0 or best == _GRID - 1:
            return float(most)
        low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[best + 1])
        golden = (math.sqrt(5) - 1) / 2
        for _ in range(30):  # golden section on ln tau: the gain has one peak between neighbours
            left, right = high - golden * (high - low), low + golden * (high - low)
            if self.gain(math.exp(left)) > self.gain(math.exp(right)):
                high = right
            else:
                low = left
        return math.exp((low + high) / 2)


def _floored(share: np.ndarray, total: float) -> np.ndarray:
    """A cluster without generic text has no density ratio; half a window stands for the absent."""
    return np.maximum(share, np.where(share > 0, 0.0, 0.5 / max(total, 1.0)))
