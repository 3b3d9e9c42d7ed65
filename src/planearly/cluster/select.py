"""Selectors: from a generic corpus and a specialization set to what pretraining draws by.

A selector's answer is a :class:`Selection`: the group of every generic window, and a weight for
every group. Packing, sampler and pretraining are the same for all of them. Plain pretraining and
cluster importance sampling group by cluster; the methods here, its peers, take some windows and
leave the others out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import regex

from planearly.data.sample import mix
from planearly.data.text import found_words
from planearly.files import Array

BUCKETS = 10_000
"""Buckets that DSIR hashes n-grams into."""

_FIT_WINDOWS = 50_000
"""Windows that DSIR's model of the generic corpus is counted on, spread evenly over it; at most so
many of each side a linear head is fitted on."""

_SMOOTHING = 1e-8
"""Added to DSIR's probabilities, as its authors' program does."""

_ASCII_WORDS = re.compile(r"\w+|[^\w\s]+")
_WORDS = regex.compile(  # with their vowel signs and joiners; a joiner or a break is no word
    r"(?V1)[\w\p{N}--[\u200c\u200d]][\w\p{N}]*|[^\w\s\p{N}\u200b]+")
BLOCK = 4096
"""Windows looked at together."""

Texts = Callable[[np.ndarray], list[str]]
"""Texts of the windows with these numbers."""

Weigh = Callable[[np.ndarray], np.ndarray]
"""Log weights of all candidates, by what every bucket counts for."""

Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""Of candidates, points and a number of ranks: as :func:`nearest`."""


@dataclass(frozen=True)
class Selection:
    """What to draw, and how.

    Attributes:
        groups: group of each generic window, int ``[n_windows]``; -1 is never drawn.
        weights: float64 ``[n_groups]``; inside a group every row is drawn alike.
        notes: facts for the manifest.
    """

    groups: np.ndarray
    weights: np.ndarray
    notes: dict[str, Any] = field(default_factory=dict)


def chosen(n: int, windows: np.ndarray, **notes: Any) -> Selection:
    """The selection of ``windows`` among ``n``, each drawn alike."""
    groups = np.full(n, -1)
    groups[windows] = 0
    return Selection(groups, np.ones(1), notes)


def enough(order: np.ndarray, size: np.ndarray, need: float) -> np.ndarray:
    """The first windows in ``order`` that together fill ``need`` rows.

    Args:
        size: share of a row that each window fills ``[n_windows]``.
    """
    filled = np.cumsum(size[order])
    return order[: int(np.searchsorted(filled, need)) + 1]


def highest(candidates: np.ndarray, score: np.ndarray, size: np.ndarray,
            need: float) -> np.ndarray:
    """The ``candidates`` of highest ``score`` that together fill ``need`` rows, as :func:`enough`.
    """
    return enough(candidates[np.argsort(-score, kind="stable")], size, need)


# Hashed n-grams (DSIR) --------------------------------------------------------------------------

class Hasher:
    """Words and pairs of words, lower case, as buckets (Xie et al. 2023, section 3)."""

    def __init__(self, buckets: int = BUCKETS) -> None:
        self.buckets = buckets
        self._words: dict[str, int] = {}

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Buckets of all unigrams and bigrams of all texts, and the number of the text of each."""
        found = [_ASCII_WORDS.findall(text.lower()) if text.isascii()
                 else found_words(_WORDS, text.lower()) for text in texts]
        counts = [len(words) for words in found]
        hashes = np.fromiter((self._hash(word) for words in found for word in words), np.uint64,
                             sum(counts))
        text = np.repeat(np.arange(len(texts)), counts)
        pair = text[1:] == text[:-1]
        pairs = mix(hashes[:-1][pair], hashes[1:][pair])
        grams = np.concatenate([mix(hashes), pairs]) % np.uint64(self.buckets)
        return grams.astype(np.int64), np.concatenate([text, text[1:][pair]])

    def _hash(self, word: str) -> int:
        known = self._words.get(word)
        if known is None:
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            known = self._words[word] = int.from_bytes(digest, "little")
        return known


def dsir(generic: Texts, candidates: np.ndarray, domain: Texts, own: np.ndarray, size: np.ndarray,
         need: float, seed: int, weigh: Weigh | None = None) -> np.ndarray:
    """Data selection via importance resampling (Xie et al. 2023, arXiv 2302.03169).

    Bag-of-n-grams models of the specialization set and of the generic corpus give each generic
    window x the log weight  sum over its n-grams of ln p_domain - ln p_generic;  windows are then
    resampled without replacement, which is taking the largest log weight + Gumbel noise.

    Args:
        generic, candidates: texts of generic windows; the numbers of those that may be taken.
        domain, own: texts of the domain's windows; the numbers of its specialization set.
        size: share of a row that each generic window fills ``[n_windows]``.
        need: rows to fill.
        weigh: gives the log weights of the candidates (default: :func:`log_weights` of all).

    Returns:
        int64 ``[n]``: numbers of the windows taken, by falling weight.
    """
    hasher = Hasher()
    every = -(-len(candidates) // _FIT_WINDOWS)
    target = _frequencies(hasher, domain, own)
    raw = _frequencies(hasher, generic, candidates[::every])
    gain = np.log(target + _SMOOTHING) - np.log(raw + _SMOOTHING)
    weight = weigh(gain) if weigh else log_weights(hasher, generic, candidates, gain)
    noise = np.random.default_rng(seed).gumbel(size=len(candidates))
    return highest(candidates, weight + noise, size, need)


def log_weights(hasher: Hasher, texts: Texts, windows: np.ndarray, gain: np.ndarray,
                advance: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """Sum of the ``gain`` of each window's n-grams, float64 ``[n]``.

    Args:
        gain: of every bucket.
        advance: told of every block of windows that is done.
    """
    weight = np.empty(len(windows))
    for start, block in _blocks(windows):
        grams, text = hasher(texts(block))
        weight[start : start + len(block)] = np.bincount(text, gain[grams], len(block))
        advance(len(block))
    return weight


def _frequencies(hasher: Hasher, texts: Texts, windows: np.ndarray) -> np.ndarray:
    counts = np.zeros(hasher.buckets)
    for _, block in _blocks(windows):
        counts += np.bincount(hasher(texts(block))[0], minlength=hasher.buckets)
    return counts / max(counts.sum(), 1)


def _blocks(windows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(windows), BLOCK):
        yield start, windows[start : start + BLOCK]


# Nearest neighbours -----------------------------------------------------------------------------

def neighbours(candidates: np.ndarray, own: np.ndarray, size: np.ndarray, need: float,
               search: Search) -> tuple[np.ndarray, int]:
    """Generic windows nearest to any specialization window: all first neighbours, all second, ...

    Args:
        candidates: numbers of those that may be taken.
        own: embeddings of the specialization windows ``[m, dim]``.
        size: share of a row that each generic window fills ``[n_windows]``.
        need: rows to fill.
        search: finds the neighbours, as :func:`nearest` does.

    Returns:
        Numbers of the windows taken, by rank and within it by cosine; and the last rank used.
    """
    mean = float(size[candidates].mean())
    ranks = max(round(2 * need / (mean * len(own))), 1)
    while True:
        ranks = min(ranks, len(candidates))
        where, cosine = search(candidates, own, ranks)
        rank = np.repeat(np.arange(ranks)[None], len(own), 0)
        order = np.lexsort((where.ravel(), -cosine.ravel(), rank.ravel()))
        listed = where.ravel()[order]
        first = np.sort(np.unique(listed, return_index=True)[1])  # each window at its best rank
        distinct = candidates[listed[first]]
        taken = enough(distinct, size, need)
        if size[taken].sum() >= need or ranks == len(candidates):
            return taken, int(rank.ravel()[order][first[len(taken) - 1]]) + 1
        ranks *= 2


def nearest(points: Array, candidates: np.ndarray, own: np.ndarray, ranks: int,
            advance: Callable[[int], None] = lambda n: None) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of every own point, nearest first.

    Args:
        points: embeddings ``[n_windows, dim]``, of unit norm.
        candidates: numbers of the windows among which to look.
        own: ``[m, dim]``.
        ranks: how many of them.
        advance: told of every block of windows that is done.

    Returns:
        Indices into ``candidates``, int64 ``[m, ranks]``, and cosines, float32; fewer columns where
        there are fewer candidates.
    """
    import torch

    queries = torch.as_tensor(np.array(own, np.float32))
    found = np.empty((len(own), 0), np.int64), np.empty((len(own), 0), np.float32)
    for start, block in _blocks(candidates):
        table = torch.as_tensor(np.asarray(points[block], np.float32))
        here = np.arange(start, start + len(block))[None].repeat(len(own), 0)
        found = merged(found, (here, (queries @ table.T).numpy()), ranks)
        advance(len(block))
    return found


def merged(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray],
           ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of two sets of neighbours, each as :func:`nearest` gives them."""
    import torch

    where, best = (torch.cat([torch.as_tensor(np.array(each)) for each in both], 1)
                   for both in zip(one, other, strict=True))
    best, kept = best.topk(min(ranks, best.shape[1]), 1)
    return where.gather(1, kept).numpy(), best.numpy()


# A linear head on embeddings --------------------------------------------------------------------

def linear(points: Array, candidates: np.ndarray, own: np.ndarray, size: np.ndarray, need: float,
           seed: int, advance: Callable[[int], None] = lambda n: None) -> np.ndarray:
    """Generic windows that a linear head takes for the domain's most surely.

    A logistic regression on the embeddings tells the specialization set from random generic
    windows, as the classifier by which BETR scores a corpus (Mizrahi et al. 2025, arXiv
    2507.12466); there it is fitted to a ranking by similarity, here to the two sets themselves.

    Args:
        points: embeddings of the generic windows ``[n_windows, dim]``.
        candidates: numbers of those that may be taken.
        own: embeddings of the specialization windows ``[m, dim]``.
        size: share of a row that each generic window fills ``[n_windows]``.
        need: rows to fill.
        advance: told of every block of windows that is scored.

    Returns:
        int64 ``[n]``: numbers of the windows taken, by falling score.
    """
    draw = np.random.default_rng(seed)
    mine, others = (np.sort(draw.permutation(of)[:_FIT_WINDOWS])
                    for of in (np.arange(len(own)), candidates))
    head = separating(own[mine], points[others])
    score = np.empty(len(candidates))
    for start, block in _blocks(candidates):
        score[start : start + len(block)] = np.asarray(points[block], np.float64) @ head
        advance(len(block))
    return highest(candidates, score, size, need)


def separating(own: Array, others: Array, penalty: float = 1.0) -> np.ndarray:
    """Weights of the logistic regression that tells two sets of points ``[n, dim]`` apart.

    They minimise  penalty / 2 |w|^2 + sum over points of c ln(1 + exp(-y (w x + b))),  y = 1 for
    own points and -1 for others, c such that both sets weigh alike and all points n together.

    Returns:
        w, float64 ``[dim]``.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    points = np.concatenate([own, others]).astype(np.float64)
    counts = [len(own), len(others)]
    sign = np.repeat([1.0, -1.0], counts)
    share = np.repeat(len(points) / 2 / np.array(counts, float), counts)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        w, margin = x[:-1], sign * (points @ x[:-1] + x[-1])
        pull = -share * sign * expit(-margin)
        value = penalty / 2 * w @ w + share @ np.logaddexp(0.0, -margin)
        return float(value), np.append(penalty * w + points.T @ pull, pull.sum())

    found = minimize(loss, np.zeros(points.shape[1] + 1), jac=True, method="L-BFGS-B")
    weights: np.ndarray = found.x[:-1]
    return weights


def most_frequent(groups: np.ndarray, size: np.ndarray, k: int) -> int:
    """The cluster that holds most of a set, by window-equivalents."""
    return int(np.bincount(groups, size, k).argmax())
