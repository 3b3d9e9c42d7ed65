"""Spherical k-means: unit centroids, nearest by cosine, on memory-mapped points of any number.

The paper clusters Sentence-BERT embeddings of the generic set's windows with k-means (section 3);
on unit vectors cosine and Euclidean distance order neighbours alike. Nested levels make k a choice
that can be taken afterwards: a coarse cluster is a union of fine ones.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from planearly import parallel
from planearly.errors import UserError
from planearly.files import Array
from planearly.parallel import bf16_is_fast

_BLOCK = 4096  # rows of the score matrix: with 1,024 columns it stays in the processor's cache
_START_POINTS = 8192  # starting centroids are drawn from this many points, or 8 per centroid
_TRIES = 8  # points drawn for each of the first centroids; the one that helps most is taken
_NEST_ATTEMPTS = 5  # fine centroids are few: the best of several starts costs nothing


def fit(
    points: Array,
    k: int,
    *,
    weights: np.ndarray | None = None,
    iterations: int = 25,
    sample_per_centroid: int = 256,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> np.ndarray:
    """Centroids of spherical k-means, float32 ``[k, dim]`` of unit norm.

    Lloyd's iterations from a k-means++ start on a sample of ``sample_per_centroid * k`` points,
    until the inertia (mean of 1 - cosine) falls by less than a ``tolerance`` of itself. Scores of
    large samples are bfloat16 where that is fast, sums float32. A cluster that runs empty starts
    again at the point worst served. The same seed gives the same centroids on the same device.

    Args:
        points: ``[n, dim]``, float16 or float32, of any norm; may be a memmap.
        weights: what each point counts for (default: 1 each).

    Raises:
        UserError: fewer points than clusters.
    """
    n = len(points)
    if k < 1 or k > n:
        raise UserError(f"cannot make {k} clusters of {n} windows: choose k between 1 and {n}")
    generator = np.random.default_rng(seed)
    size = min(n, max(sample_per_centroid, 1) * k)
    chosen = np.arange(n) if size == n else np.sort(generator.choice(n, size, replace=False))
    device = parallel.device()
    sample = F.normalize(torch.as_tensor(points[chosen], dtype=torch.float32, device=device))
    mass = None
    if weights is not None:
        mass = torch.as_tensor(weights[chosen], dtype=torch.float32, device=device)
    centroids = _start(sample, mass, k, generator)
    scored = sample.bfloat16() if size > _BLOCK and bf16_is_fast(device) else sample
    before = np.inf
    for _ in range(iterations):
        nearest, cosine = _nearest(scored, centroids.to(scored.dtype))
        centroids = _means(sample, mass, nearest, cosine, centroids)
        loss = 1 - cosine if mass is None else (1 - cosine) * mass / mass.mean()
        inertia = float(loss.double().mean())
        if before - inertia < tolerance * before:
            break
        before = inertia
    return centroids.cpu().numpy()


def assign(points: Array, centroids: np.ndarray, block: int = 65_536) -> np.ndarray:
    """Nearest centroid by cosine of every point, int32 ``[n]``; float32, ``block`` points at once.

    Memory does not grow with the number of points when they are memory-mapped.
    """
    device = parallel.device()
    table = torch.from_numpy(np.array(centroids, np.float32)).to(device)
    nearest = np.empty(len(points), dtype=np.int32)
    for start in range(0, len(points), block):
        part = np.array(points[start : start + block], dtype=np.float32)
        found, _ = _nearest(torch.from_numpy(part).to(device), table)
        nearest[start : start + block] = found.cpu().numpy()
    return nearest


def nest(centroids: np.ndarray, counts: np.ndarray, k: int, *, seed: int = 0) -> np.ndarray:
    """Merge fine clusters into ``k`` coarser ones; the parent of each, int32 ``[k_fine]``.

    Weighted spherical k-means on the fine centroids. ``counts`` (windows, or window-equivalents)
    are the fine clusters' sizes: empty ones follow their nearest parent. Levels chain: the parents
    of a coarser level are those of ``nest`` on the merged centroids (see :func:`merge`).

    Raises:
        UserError: ``k`` larger than the number of fine clusters.
    """
    weights = np.maximum(np.asarray(counts, dtype=np.float64), 1e-6 * max(np.max(counts), 1e-30))
    best, least = np.zeros(len(centroids), dtype=np.int32), np.inf
    for attempt in range(_NEST_ATTEMPTS):
        coarse = fit(centroids, k, weights=weights, iterations=50, tolerance=0.0,
                     sample_per_centroid=len(centroids), seed=seed + attempt)
        parent = assign(centroids, coarse)
        loss = float(weights @ (1 - (centroids * coarse[parent]).sum(1)))
        if loss < least:
            best, least = parent, loss
    return best


def merge(centroids: np.ndarray, counts: np.ndarray, parent: np.ndarray, k: int) -> np.ndarray:
    """Centroids float32 ``[k, dim]`` of the parents: the normalised sum of their children's.

    Each child counts with its size times its centroid, as the points themselves nearly do.
    """
    sums = np.zeros((k, centroids.shape[1]))
    np.add.at(sums, parent, centroids * np.maximum(counts, 1e-6)[:, None])
    return (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype("f4")


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of and score with the best centroid: int64 and float32 ``[n]``."""
    rows = _BLOCK if points.device.type == "cpu" else 16 * _BLOCK
    nearest = torch.empty(len(points), dtype=torch.int64, device=points.device)
    score = torch.empty(len(points), dtype=torch.float32, device=points.device)
    for start in range(0, len(points), rows):
        best = (points[start : start + rows] @ centroids.T).max(dim=1)
        nearest[start : start + rows] = best.indices
        score[start : start + rows] = best.values
    return nearest, score


def _means(
    points: torch.Tensor,
    mass: torch.Tensor | None,
    nearest: torch.Tensor,
    cosine: torch.Tensor,
    centroids: torch.Tensor,
) -> torch.Tensor:
    """Normalised sums per cluster; empty clusters move to the points with the lowest cosine."""
    k = len(centroids)
    order = torch.argsort(nearest, stable=True)
    sizes = torch.bincount(nearest, minlength=k)
    sums = F.embedding_bag(  # one bag per cluster: parallel, and summed in a fixed order
        order, points, torch.cumsum(sizes, 0) - sizes, mode="sum",
        per_sample_weights=None if mass is None else mass[order],
    )
    empty = torch.nonzero(sizes == 0)[:, 0]
    if len(empty):
        sums[empty] = points[torch.argsort(cosine, stable=True)[: len(empty)]]
    return F.normalize(sums)


def _start(
    points: torch.Tensor, mass: torch.Tensor | None, k: int, generator: np.random.Generator
) -> torch.Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007) on a subset of the points.

    Beyond the first 32, rounds draw several at once, as k-means|| does (Bahmani et al. 2012): one
    at a time would cost k passes over memory, and the start of many clusters is no better for it.
    """
    size = min(len(points), max(_START_POINTS, 8 * k))
    chosen = torch.from_numpy(np.sort(generator.choice(len(points), size, replace=False)))
    subset = points[chosen.to(points.device)]
    weight = np.ones(size)
    if mass is not None:
        weight = mass[chosen.to(points.device)].double().cpu().numpy()
    gap = np.ones(size)  # 1 - cosine with the nearest taken so far; -1 for the taken themselves
    taken = np.empty(0, dtype=np.int64)
    while len(taken) < k:
        want = min(max(len(taken) // 16, 1), k - len(taken))
        race = gap * weight / generator.standard_exponential(size)
        tries = min(_TRIES if want == 1 else want, size)
        new = np.argpartition(-race, tries - 1)[:tries]
        cosine = (subset @ subset[torch.from_numpy(new).to(points.device)].T).cpu().numpy()
        left = np.minimum(gap[:, None], np.maximum(1 - cosine, 0))
        if want == 1:
            best = [int(np.argmin(weight @ left))]
            new, left = new[best], left[:, best]
        gap = left.min(axis=1)
        taken = np.concatenate([taken, new])
        gap[taken] = -1
    return subset[torch.from_numpy(taken).to(points.device)]
