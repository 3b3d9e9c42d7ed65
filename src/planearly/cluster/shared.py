"""A domain's histogram as a file: what its owner gives away so that generic text can be weighed.

The file holds window-equivalents per cluster (:mod:`planearly.cluster.histogram`), how many
documents they are of, and by digests which clusters they are of; no text, no name, and nothing of a
single document. With noise it is differentially private by document: of two sets that differ in one
document, either gives the same file with probabilities at most a factor e^epsilon apart. Each
document counts for at most :data:`MOST_WINDOWS`, so replacing one changes the counts by at most
twice that in sum, and each count gets whole tokens of two-sided geometric noise of that scale, the
Laplace mechanism on whole numbers (Dwork et al. 2006; Ghosh, Roughgarden and Sundararajan 2009):
sums of binary fractions would tell by their last bits what the noise hides.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planearly.cluster.histogram import Smoothed, smooth_counts
from planearly.data.readers import HISTOGRAM
from planearly.errors import UserError
from planearly.files import read_json, write_json

MOST_WINDOWS = 1.0
"""Window-equivalents that one document counts for at most, where noise is added."""
_FORMAT = 1
_SAYS = re.compile(rf'"planearly"\s*:\s*"{HISTOGRAM}"')
_END = 1 << 12
"""Bytes of either end of a file in which it says so: a tool may have sorted its keys."""


@dataclass(frozen=True)
class Level:
    """The histogram at one number of clusters.

    Attributes:
        clusters: digest of the clusters.
        counts: window-equivalents of each, float64 ``[k]``.
        tau, gain: of :class:`planearly.cluster.histogram.Smoothed`, as the owner found them from
            the documents; None where that would tell of these, or no generic counts were at hand.
    """

    clusters: str
    counts: np.ndarray
    tau: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Shared:
    """A histogram as its file holds it.

    Attributes:
        embedder: name and digest of what the documents were embedded with.
        documents: how many they are.
        levels: by number of clusters.
        epsilon: of the noise; None: there is none.
        noise: its scale on each count, in window-equivalents.
    """

    embedder: Mapping[str, str]
    documents: int
    levels: Mapping[int, Level]
    epsilon: float | None = None
    noise: float = 0.0

    @property
    def numbers(self) -> str:
        """Its numbers of clusters in words, as ``16 and 64``."""
        return " and ".join(map(str, sorted(self.levels)))

    def smoothed(self, k: int, generic: np.ndarray, tau: float | None = None) -> Smoothed:
        """As :func:`planearly.cluster.histogram.smooth` of the documents themselves.

        Args:
            generic: the generic histogram ``[k]``, in any unit.
            tau: prior in windows; None takes the owner's, or chooses it. What the owner found the
                histogram to be worth is of the owner's prior alone.
        """
        level = self.levels[k]
        tau = level.tau if tau is None else tau
        found = smooth_counts(level.counts, generic, self.documents, tau=tau, noise=self.noise)
        if level.gain is None or tau is None or tau != level.tau:
            return found
        return Smoothed(found.p, found.tau, level.gain)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        noise = {} if self.epsilon is None else {
            "epsilon": self.epsilon, "scale": self.noise, "most_windows": MOST_WINDOWS,
            "mechanism": "two-sided geometric noise on every count, in whole tokens; neighbouring "
                         "sets differ in one document"}
        write_json(path, {
            "planearly": HISTOGRAM, "format": _FORMAT, "embedder": dict(self.embedder),
            "documents": self.documents, "noise": noise or None,
            "levels": {str(k): asdict(level) for k, level in sorted(self.levels.items())}})


def is_shared(path: Path) -> bool:
    """Whether a file says to be what :meth:`Shared.save` writes."""
    try:
        with open(path, "rb") as handle:
            ends = [handle.read(_END)]
            handle.seek(max(handle.seek(0, os.SEEK_END) - _END, 0))
            ends.append(handle.read())
    except OSError:
        return False
    encoding = json.detect_encoding(ends[0])  # an editor may have written it in another
    begins, ended = (end.decode(encoding, "ignore") for end in ends)
    return begins.lstrip().startswith("{") and bool(_SAYS.search(begins) or _SAYS.search(ended))


def load(path: Path) -> Shared:
    """Read what :meth:`Shared.save` wrote.

    Raises:
        UserError: it is not such a file, or one of its values cannot be.
    """
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise UserError(f"{path} is not a histogram that can be used: {what}; ask its owner "
                            "for another ('planearly weigh --share')")

    found = read_json(path)
    need(isinstance(found, dict) and found.get("planearly") == HISTOGRAM,
         "it does not say to be one")
    need(found.get("format") == _FORMAT, f"its format is {found.get('format')!r}, and this version "
                                         f"of planearly reads {_FORMAT}")
    embedder, levels = found.get("embedder"), found.get("levels")
    need(isinstance(embedder, dict) and _text(embedder.get("name"))
         and _text(embedder.get("digest")), "it does not name the embedder")
    documents = found.get("documents")
    need(type(documents) is int and 1 <= documents <= _MOST, "it does not give a number of "
                                                             "documents, at least 1")
    noise = found.get("noise")
    need(noise is None or (isinstance(noise, dict) and all(
        _number(noise.get(key)) and noise[key] > 0 for key in ("epsilon", "scale"))),
        "its noise has no positive epsilon and scale")
    need(isinstance(levels, dict) and bool(levels), "it has no levels")
    read = {}
    for name, level in levels.items():
        where = f"level {name}"
        need(bool(re.fullmatch(r"[1-9]\d{0,8}", name)) and isinstance(level, dict)
             and _text(level.get("clusters")),
             f"{where} is no number of clusters with their digest")
        counts = level.get("counts")
        need(isinstance(counts, list) and len(counts) == int(name),
             f"{where} does not have one count for each cluster")
        need(all(_number(count) and (count >= 0 or noise is not None) for count in counts),
             f"{where} has a count that is no number" + ("" if noise else ", or negative"))
        need(noise is not None or sum(counts) > 0, f"{where} counts nothing")
        tau, gain = level.get("tau"), level.get("gain")
        need(tau is None or (_number(tau) and tau >= 0), f"tau of {where} is no number from 0 up")
        need(gain is None or _number(gain), f"gain of {where} is no number")
        read[int(name)] = Level(level["clusters"], np.array(counts, np.float64), tau, gain)
    return Shared({key: embedder[key] for key in ("name", "digest")}, documents, read,
                  noise and float(noise["epsilon"]), float(noise["scale"]) if noise else 0.0)


_MOST = 10**12
"""Of documents or of window-equivalents: more than there are."""


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST  # neither NaN nor infinite


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


# Noise ------------------------------------------------------------------------------------------

def bounded(groups: np.ndarray, tokens: np.ndarray, documents: np.ndarray, k: int,
            context: int) -> np.ndarray:
    """Tokens per cluster, ints ``[k]``, to which no document adds more than :data:`MOST_WINDOWS`
    windows: a longer one counts for that much, spread as its windows are.

    Args:
        groups: cluster of each window, ``[n]``.
        tokens: of each window, ints ``[n]``.
        documents: document of each window, ``[n]``.
        context: tokens of a whole window.
    """
    most = int(MOST_WINDOWS * context)
    _, number = np.unique(documents, return_inverse=True)
    cell, where = np.unique(number.astype(np.int64) * k + groups, return_inverse=True)
    held = np.bincount(where, tokens, len(cell)).astype(np.int64)
    whole = np.bincount(cell // k, held).astype(np.int64)[cell // k]
    kept = np.where(whole > most, held * most // np.maximum(whole, 1), held)
    return np.bincount(cell % k, kept, k).astype(np.int64)


def scale(epsilon: float, context: int) -> float:
    """Tokens of noise, as a scale of Laplace's distribution, that epsilon asks of every count."""
    return 2 * int(MOST_WINDOWS * context) / epsilon


def noisy(tokens: np.ndarray, epsilon: float, context: int,
          random: np.random.Generator | None = None) -> np.ndarray:
    """Counts ``[k]`` of :func:`bounded` with noise that makes them private.

    Args:
        random: for tests; by default it is begun by the system anew, since whoever knew its seed
            could take the noise off again.
    """
    random = random or np.random.default_rng()
    ends = -math.expm1(-1 / scale(epsilon, context))
    return tokens + random.geometric(ends, tokens.shape) - random.geometric(ends, tokens.shape)
