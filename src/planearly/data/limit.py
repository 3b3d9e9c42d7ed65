"""A part of a token dataset: windows of whole documents up to a number of tokens, and their bytes.

Documents are taken in the order of a hash of (seed, text): a fair sample, in which more tokens give
a superset, whatever else the dataset holds.
"""

from __future__ import annotations

import numpy as np

from planearly.data.dataset import TokenDataset
from planearly.data.sample import mix

_AHEAD = 4.0
"""Times the tokens wanted that are looked for at once, among the documents of the lowest ranks."""
_RANKED = 1 << 18  # documents at once


def documents_up_to(
    dataset: TokenDataset, allowed: np.ndarray, limit: int | None, seed: int
) -> np.ndarray:
    """Windows of whole documents, in an order fixed by seed and content, up to a token limit.

    The last document is cut at a window. A larger limit gives a superset.

    Args:
        allowed: bool [n_documents].
        limit: tokens; None takes all, 0 nothing.

    Returns:
        int64 [n], sorted window numbers.
    """
    if limit is None:
        return dataset.windows_without(~allowed)
    if limit == 0:
        return np.empty(0, np.int64)
    share = _AHEAD * limit / max(dataset.meta["n_tokens"], 1)
    while True:
        documents, ranks = _of_low_rank(dataset, allowed, seed, share)
        windows = dataset.windows_of(documents[np.argsort(ranks)])
        tokens = np.cumsum(dataset.windows["length"][windows].astype(np.int64))
        if share >= 1 or (len(tokens) and tokens[-1] >= limit):
            return np.sort(windows[:int(np.searchsorted(tokens, limit)) + 1])
        share *= _AHEAD


def _of_low_rank(dataset: TokenDataset, allowed: np.ndarray, seed: int,
                 share: float) -> tuple[np.ndarray, np.ndarray]:
    """About this share of the allowed documents, those of the lowest ranks; their ranks."""
    most = np.uint64(min(int(share * (1 << 64)), (1 << 64) - 1))
    found, ranked = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for start in range(0, len(allowed), _RANKED):
        ranks = mix(seed, np.asarray(dataset.documents["hash"][start:start + _RANKED]))
        mine = np.flatnonzero(allowed[start:start + _RANKED] & (ranks <= most))
        found.append(start + mine)
        ranked.append(ranks[mine])
    return np.concatenate(found), np.concatenate(ranked)


def text_bytes(dataset: TokenDataset, windows: np.ndarray) -> int:
    """UTF-8 bytes of the text that windows of whole documents hold.

    A document of which only some windows are given counts in proportion to their tokens.
    """
    document = dataset.windows["document"][windows].astype(np.int64)
    documents = np.unique(document)
    every = dataset.windows_of(documents)

    def tokens(of: np.ndarray) -> np.ndarray:
        place = np.searchsorted(documents, dataset.windows["document"][of].astype(np.int64))
        return np.bincount(place, dataset.windows["length"][of], len(documents))

    share = tokens(windows) / tokens(every)
    return round(float((share * dataset.documents["bytes"][documents]).sum()))
