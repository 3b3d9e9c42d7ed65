"""Cluster importance sampling: the weights that make the generic corpus look like a domain.

Training draws a cluster with the domain's frequency p_c = P(c | domain) and a row inside it
uniformly, which weighs every generic row by w_c = p_c / g_c, g_c = P(c | generic) (the paper,
section 3). Hot clusters hold few distinct rows: passes over each are capped, and what the cap holds
back flows to the clusters most like it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planearly.cluster import kmeans
from planearly.errors import UserError
from planearly.units import short

_FAMILY = 8  # clusters per family, where the clustering brings no tree of its own
_NEGLIGIBLE = 1e-13  # of probability


@dataclass(frozen=True)
class Weights:
    """What training draws clusters with, and what to know before it starts.

    Attributes:
        weights: probability of drawing a row of each cluster, float64 ``[k]``, sum 1.
        target: p, the domain's (smoothed) histogram ``[k]``, before the cap.
        importance: p_c / g_c ``[k]``; 0 where the generic corpus has no row.
        rows: generic rows per cluster ``[k]``.
        draws: rows that training is to draw.
        max_epochs: the cap on passes over a cluster.
        expected: rows drawn of each cluster ``[k]``: exact when the sampler's counts were given.
        epochs_before, epochs: passes over each cluster ``[k]`` without and with the cap.
        overflow: share of the draws that the cap (or the want of rows) moves elsewhere.
        moved: how much of it found room at each level: family, family of families, ..., anywhere.
        effective_rows: Kish's effective sample size of the generic rows under the weights.
        divergence: KL(weights || generic), nats.
        distinct_rows: different rows that training will see.
    """

    weights: np.ndarray
    target: np.ndarray
    importance: np.ndarray
    rows: np.ndarray
    draws: int
    max_epochs: float
    expected: np.ndarray
    epochs_before: np.ndarray
    epochs: np.ndarray
    overflow: float
    moved: list[float]
    effective_rows: float
    divergence: float
    distinct_rows: float


def weigh(
    p: np.ndarray,
    rows: np.ndarray,
    draws: int,
    max_epochs: float,
    *,
    parent: np.ndarray | None = None,
    centroids: np.ndarray | None = None,
    realised: Callable[[np.ndarray], np.ndarray] | None = None,
    context: int | None = None,
) -> Weights:
    """Sampling weights for a domain, under a cap on repetition.

    No cluster is drawn more than ``max_epochs`` times its rows. What a cluster holds back goes to
    its siblings in proportion to their own p (to their rows, where p is 0), then to the siblings of
    its parent, and so on up to the whole corpus.

    Args:
        p: the domain's histogram ``[k]``, smoothed, in any unit.
        rows: generic rows per cluster, ints ``[k]``; one without rows is never drawn.
        draws: rows that training will draw.
        parent: the coarser cluster of each, ``[k]``, of a nested clustering.
        centroids: float ``[k, dim]``; they tell which clusters are alike where ``parent`` does not.
        realised: the sampler's exact rows per cluster for given weights; the cap then holds for
            these, not merely in expectation.
        context: positions of a row, for the message of the error.

    Raises:
        UserError: no generic rows, or fewer than the cap lets ``draws`` be made of.
    """
    target = np.asarray(p, np.float64) / np.sum(p)
    rows = np.asarray(rows, np.int64)
    if rows.sum() == 0:
        raise UserError("the generic corpus has no rows to draw from: give it more text")
    most = np.floor(max_epochs * rows)
    limit = most / draws
    families = _families(parent, centroids, rows)
    while True:
        if limit.sum() < 1 - _NEGLIGIBLE * len(limit):
            raise _too_little(float(limit.sum()) * draws, draws, max_epochs, context)
        weights, moved = _flow(target, limit, rows, families)
        expected = weights * draws if realised is None else realised(weights)
        excess = np.zeros(0) if realised is None else expected - most
        over = np.flatnonzero(excess > 0)
        if not len(over):
            break
        # the sampler's rounding passes the cap by a row or so: aim that much lower
        limit[over] = np.maximum(np.minimum(limit, weights)[over] - excess[over] / draws, 0)
    share = rows / rows.sum()
    some = rows > 0
    each = np.where(some, rows, 1)
    drawn = weights > 0
    return Weights(
        weights=weights,
        target=target,
        importance=np.where(some, target / np.where(some, share, 1), 0.0),
        rows=rows,
        draws=draws,
        max_epochs=max_epochs,
        expected=np.asarray(expected, np.float64),
        epochs_before=np.where(some, target * draws / each, 0.0),
        epochs=expected / each,
        overflow=float(np.maximum(target - weights, 0).sum()),
        moved=moved,
        effective_rows=float(1 / (weights[drawn] ** 2 / rows[drawn]).sum()),
        divergence=max(float((weights[drawn] * np.log(weights[drawn] / share[drawn])).sum()), 0.0),
        distinct_rows=float(np.minimum(expected, rows).sum()),
    )


def explain(weights: Weights, warn_epochs: float = 4.0) -> list[str]:
    """What to know before any training, one sentence each."""
    total = float(weights.rows.sum())
    hottest = int(weights.epochs.argmax())
    sentences = [
        f"the weights differ from the generic corpus by {weights.divergence:.2f} nats and leave "
        f"{short(weights.effective_rows)} effective rows of {short(total)} "
        f"({weights.effective_rows / total:.1%})",
        f"{short(weights.draws)} rows are drawn of {short(weights.distinct_rows)} different ones; "
        f"the hottest cluster, {hottest}, has {weights.weights[hottest]:.1%} of the draws and "
        f"{weights.rows[hottest] / total:.1%} of the rows: {weights.epochs[hottest]:.1f} epochs",
    ]
    if weights.overflow > 1e-6:
        families = weights.moved[:-1]  # the last level is the whole corpus
        near = sum(families) / max(sum(weights.moved), _NEGLIGIBLE)
        sentences.append(
            f"without the cap of {weights.max_epochs:g} epochs it would be "
            f"{weights.epochs_before.max():.1f}; the cap moves {weights.overflow:.1%} of the "
            f"draws, {near:.0%} of these to kindred clusters"
        )
    hot = weights.epochs > warn_epochs
    if hot.any():
        sentences.append(
            f"warning: {int(hot.sum())} clusters, {weights.weights[hot].sum():.1%} of the draws, "
            f"are read more than {warn_epochs:g} times: give more generic text, fewer "
            "tokens of pretraining, or fewer clusters"
        )
    return sentences


def facts(weights: Weights) -> dict[str, Any]:
    """The same for a manifest: numbers, and lists over clusters."""
    return {
        "draws": weights.draws,
        "max_epochs": weights.max_epochs,
        "rows": int(weights.rows.sum()),
        "effective_rows": weights.effective_rows,
        "effective_share": weights.effective_rows / float(weights.rows.sum()),
        "distinct_rows": weights.distinct_rows,
        "divergence": weights.divergence,
        "hottest": int(weights.epochs.argmax()),
        "hottest_epochs": float(weights.epochs.max()),
        "hottest_epochs_uncapped": float(weights.epochs_before.max()),
        "overflow": weights.overflow,
        "moved": weights.moved,
        "clusters": {
            "rows": weights.rows.tolist(),
            "target": weights.target.tolist(),
            "weights": weights.weights.tolist(),
            "importance": weights.importance.tolist(),
            "epochs": weights.epochs.tolist(),
            "epochs_uncapped": weights.epochs_before.tolist(),
        },
    }


def _families(
    parent: np.ndarray | None, centroids: np.ndarray | None, rows: np.ndarray
) -> list[np.ndarray]:
    """Labels ``[k]`` of ever larger families, ending with one that holds every cluster."""
    labels = [] if parent is None else [np.asarray(parent, np.int64)]
    if centroids is not None:
        k = len(rows)
        groups = labels[-1] if labels else np.arange(k)
        n = int(groups.max()) + 1
        while n > _FAMILY:
            middle = kmeans.merge(centroids, rows, groups, n)
            fewer = -(-n // _FAMILY)
            groups = kmeans.nest(middle, np.bincount(groups, rows, n), fewer)[groups]
            labels.append(groups.astype(np.int64))
            n = fewer
    return [*labels, np.zeros(len(rows), np.int64)]


def _flow(
    target: np.ndarray, limit: np.ndarray, rows: np.ndarray, families: list[np.ndarray]
) -> tuple[np.ndarray, list[float]]:
    """Weights at most ``limit``, of the same sum as ``target``; and what each level took in."""
    weights = np.minimum(target, limit)
    owed = target - weights
    moved = []
    for family in families:
        n = int(family.max()) + 1
        due = np.bincount(family, owed, n)
        before = due.sum()
        while True:
            room = np.maximum(limit - weights, 0)
            base = np.where(room > 0, target, 0.0)
            pull = np.bincount(family, base, n)
            silent = pull[family] <= _NEGLIGIBLE  # siblings that the domain never visits
            base = np.where(silent & (room > 0), rows, base)
            pull = np.bincount(family, base, n)
            able = (due > _NEGLIGIBLE) & (pull > 0)
            if not able.any():
                break
            wish = base * np.where(able, due, 0.0)[family] / np.where(pull > 0, pull, 1)[family]
            full = (wish >= room) & (room > 0)
            given = np.minimum(wish, room)
            weights = np.where(full, limit, weights + given)
            due = np.maximum(due - np.bincount(family, given, n), 0)
        moved.append(float(before - due.sum()))
        # what found no room is owed by the family as a whole: its first member carries it upwards
        owed = np.zeros_like(target)
        first = np.unique(family, return_index=True)
        owed[first[1]] = due[first[0]]
    return weights / weights.sum(), moved


def _too_little(supply: float, draws: int, max_epochs: float, context: int | None) -> UserError:
    unit = "rows" if context is None else "tokens"
    size = context or 1
    return UserError(
        f"the generic corpus can supply {int(supply * size):,} {unit} at {max_epochs:g} epochs per "
        f"cluster, fewer than the {draws * size:,} asked for: give more generic text, lower "
        "pretrain_tokens, or raise importance.max_epochs"
    )
