"""A part of a corpus of so many tokens (``data.max_tokens``): the documents with the lowest ranks.

A document's rank is a fixed hash of its text, so the part is a fair sample of all documents,
whatever files they stand in and in whatever order, and more tokens give a superset. Nothing but
the documents below a rank that should suffice is tokenized.

Local files are read whole. Of a dataset on the hub only so much is read as the part is likely to
need four times over; its documents then stand for those that were not read, by lower ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planearly.data.documents import Unit
from planearly.data.sample import mix

_SEED = 0x5EED
_END = 1 << 64
_BYTES_PER_TOKEN = 8  # more than any tokenizer gets, records' other fields included
_READ_AHEAD = 4  # times what is needed, of the hub


@dataclass(frozen=True)
class Subset:
    """What is tokenized.

    Attributes:
        below: documents whose rank is below this.
        read: share of the text that is read of datasets on the hub.
    """

    below: int
    read: float

    def most(self, unit: Unit) -> float:
        """Bytes of text that are read of a unit."""
        return self.read * unit.text_bytes if unit.kind == "hub" else float("inf")

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
    share = (max_tokens or float("inf")) * _BYTES_PER_TOKEN / max(
        sum(unit.text_bytes for unit in units), 1)
    return Subset(int(share * _END), min(_READ_AHEAD * share, 1.0)) if share < 0.5 else None
