"""A part of a corpus of so many tokens (``data.max_tokens``): the documents with the lowest ranks.

A document's rank is a fixed hash of its text, so the part is a fair sample of all documents,
whatever files they stand in and in whatever order, and more tokens give a superset. Nothing but
the documents below a rank that should suffice is tokenized.

Local files are read whole. Of a dataset on the hub only so much is read as the part is likely to
need four times over (:func:`head`); its documents then stand for those that were not read, by
lower ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planearly.data.documents import Unit
from planearly.data.sample import mix

_SEED = 0x5EED
_END = 1 << 64
_BYTES_PER_TOKEN = 8  # more than any tokenizer gets, records' other fields included
_READ_AHEAD = 4  # times what is needed, of the hub
_HEAD = 16e6  # bytes of text: less of a shard is not worth opening it for
_LEAST = 64  # shards that a part of a dataset is spread over


def head(unit: Unit, share: float) -> float | None:
    """Bytes of text to read of a unit for a ``share`` of all text; None: it is not opened.

    That share of each unit, but of a dataset in many shards (27,938 of DCLM's) that of some, drawn
    once for all by a hash of their numbers, and as much more of each.
    """
    number, shards = unit.shard
    wanted = share * shards * max(unit.text_bytes / _HEAD, 1.0)
    drawn = min(max(math.ceil(wanted), _LEAST), shards)
    return share * unit.text_bytes * shards / drawn if number in _drawn(shards, drawn) else None


@functools.lru_cache(maxsize=64)
def _drawn(shards: int, count: int) -> frozenset[int]:
    ranks = mix(_SEED, np.arange(shards, dtype=np.uint64))
    return frozenset(np.argsort(ranks, kind="stable")[:count].tolist())


@dataclass(frozen=True)
class Subset:
    """What is tokenized.

    Attributes:
        below: documents whose rank is below this.
        read: share of the text that is read of datasets on the hub.
    """

    below: int
    read: float

    def most(self, unit: Unit) -> float | None:
        """Bytes of text that are read of a unit; None: it is not opened."""
        return head(unit, self.read) if unit.kind == "hub" else float("inf")

    def rank(self, hashes: np.ndarray | Sequence[int], unit: Unit) -> np.ndarray:
        """Ranks uint64 [n] of documents of ``unit`` by the hashes of their texts."""
        ranks = mix(_SEED, np.asarray(hashes, np.uint64))
        if unit.kind == "hub" and self.read < 1:
            ranks = (ranks * self.read).astype(np.uint64)
        return ranks

    def larger(self, found: int, wanted: int) -> Subset | None:
        """More, as ``found`` of ``wanted`` tokens were below; None: everything."""
        more = min(max(1.25 * wanted / max(found, 1), 2), 16)
        below = max(int(self.below * more), 1)
        return Subset(below, self.read) if below < _END // 2 else None


def subset(units: list[Unit], max_tokens: int | None) -> Subset | None:
    """What should hold ``max_tokens`` of the units' tokens; None: everything."""
    n_bytes = max(sum(unit.text_bytes for unit in units), 1)
    share = (max_tokens or float("inf")) * _BYTES_PER_TOKEN / n_bytes
    return Subset(int(share * _END), read_share(n_bytes, max_tokens)) if share < 0.5 else None


def read_share(n_bytes: float, max_tokens: int | None) -> float:
    """Share of ``n_bytes`` of text on the hub that is read for ``max_tokens`` of it (None: all)."""
    if max_tokens is None:
        return 1.0
    return min(_READ_AHEAD * max_tokens * _BYTES_PER_TOKEN / max(n_bytes, 1), 1.0)
