"""What a cluster is about: its characteristic words, and the window nearest its centroid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import regex

from planearly.data.text import found_words
from planearly.files import Array

_WORD = regex.compile(r"[^\W\d_](?:[\w'’-]*\w)?")
_HAN = regex.compile(r"\p{Han}{2}")
_PRIOR = 0.01  # windows' worth of prior per window of the sample


def characteristic_words(texts: Sequence[str], clusters: Sequence[int], count: int = 8,
                         ) -> dict[int, list[str]]:
    """The words that tell each cluster's windows from all others'.

    Ranked by the z-score of the log-odds ratio with an informative Dirichlet prior (Monroe,
    Colaresi and Quinn, "Fightin' Words", 2008). A word counts once per window, so that one odd
    window cannot name its cluster, and must occur in two windows.

    Args:
        texts: a sample of windows; some tens per cluster suffice.
        clusters: the cluster of each text.
        count: words per cluster, at most.

    Returns:
        words by cluster, best first, for every cluster in ``clusters``.
    """
    inside: dict[int, Counter[str]] = {}
    for text, cluster in zip(texts, clusters, strict=True):
        inside.setdefault(int(cluster), Counter()).update(_words(text))
    everywhere = Counter[str]()
    for counted in inside.values():
        everywhere.update(counted)
    total = everywhere.total()
    found = {}
    for cluster, counted in sorted(inside.items()):
        size, scored = counted.total(), []
        for word, n in counted.items():
            if n < 2:
                continue
            prior = _PRIOR * everywhere[word]
            here, there = n + prior, everywhere[word] - n + prior
            odds = np.log(here / (size + _PRIOR * total - here))
            odds -= np.log(there / (total - size + _PRIOR * total - there))
            scored.append((-float(odds / np.sqrt(1 / here + 1 / there)), word))
        found[cluster] = [word for score, word in sorted(scored)[:count] if score < 0]
    return found


def nearest_windows(points: Array, assignment: np.ndarray, centroids: np.ndarray,
                    clusters: Iterable[int]) -> dict[int, int]:
    """The window most typical of each cluster: largest cosine to its centroid.

    Args:
        points: embeddings [n, dim], L2-normalised; may be memory-mapped, only members are read.
        assignment: cluster of each point [n].
        centroids: [k, dim], unit norm.
        clusters: those wanted; an empty one is left out of the answer.

    Returns:
        row of ``points`` by cluster.
    """
    nearest = {}
    for cluster in clusters:
        members = np.flatnonzero(assignment == cluster)
        if members.size:
            cosines = points[members].astype(np.float32) @ centroids[cluster].astype(np.float32)
            nearest[int(cluster)] = int(members[np.argmax(cosines)])
    return nearest


def snippet(text: str, length: int = 280) -> str:
    """The beginning of ``text`` on one line, cut between words."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    return line[:length].rsplit(" ", 1)[0] + " …"


def _words(text: str) -> set[str]:
    """Words of three letters or more; of two, of Chinese characters."""
    return {word.lower() for word in found_words(_WORD, text)
            if len(word) > 2 or _HAN.fullmatch(word)}
