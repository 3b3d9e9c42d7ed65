"""Held-out text must not be trained on: finding documents that two token datasets share.

Documents are recognised by the hash of their text with whitespace collapsed, and by the hashes of
their long paragraphs (:func:`planearly.data.text.fingerprint`), both kept in the datasets. Nothing
is read again. Memory is that of the held-out sets' hashes and of what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from planearly.data.dataset import TokenDataset

BOILERPLATE = 3
"""A paragraph in as many held-out documents (a licence, a footer) says nothing; of at most four
documents, one in two of them."""

_CHUNK = 1 << 20
_EXAMPLES = 20
_PAIR = np.dtype([("hash", "<u8"), ("document", "<u8")])


def held_out_overlap(training: TokenDataset,
                     held_out: Sequence[TokenDataset]) -> tuple[np.ndarray, dict[str, Any]]:
    """Training documents that hold text of a held-out set.

    A training document is marked when it equals a held-out document, or has a paragraph of 200
    characters or more (whitespace collapsed) in common with one. Paragraphs that are common among
    the held-out documents themselves (:data:`BOILERPLATE`) do not count; one that is common in
    training alone does, for a text that is copied often leaks most.

    Returns:
        bool [n_documents of training], True for the documents to leave out, and a report:
        ``documents`` (how many), ``windows`` and ``tokens`` they have, ``equal`` and
        ``by_paragraph`` (documents found either way), ``boilerplate`` (paragraphs passed over),
        and ``examples`` of {training, held_out, why} with file and line.
    """
    mask = np.zeros(len(training.documents), bool)
    known = _sorted([_hashes(dataset.documents) for dataset in held_out])
    pairs = _matches(training.documents["hash"], np.arange(len(mask)), known)
    equal = pairs["document"]
    mask[equal] = True

    known, common = _held_out_paragraphs(held_out)
    paragraphs = training.paragraphs
    shared = np.unique(_matches(paragraphs["hash"], paragraphs["document"], known))
    passed_over = np.isin(shared["hash"], common)
    boilerplate = len(np.unique(shared["hash"][passed_over]))
    shared = shared[~passed_over]
    mask[shared["document"]] = True

    lengths = training.windows["length"]
    windows = tokens = 0
    for i in range(0, len(lengths), _CHUNK):
        hit = mask[training.windows["document"][i:i + _CHUNK]]
        windows += int(hit.sum())
        tokens += int(lengths[i:i + _CHUNK][hit].sum())
    report = {
        "documents": int(mask.sum()), "windows": windows, "tokens": tokens, "equal": len(equal),
        "by_paragraph": len(np.unique(shared["document"])),
        "boilerplate": boilerplate,
        "examples": [
            *_examples(training, held_out, pairs[:_EXAMPLES], "equal"),
            *_examples(training, held_out, shared[:_EXAMPLES], "a paragraph in common"),
        ][:_EXAMPLES],
    }
    return mask, report


def _held_out_paragraphs(held_out: Sequence[TokenDataset]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the paragraphs of held-out sets, sorted, and those of them that are boilerplate."""
    pairs, documents = [np.empty(0, _PAIR)], 0
    for dataset in held_out:
        here = np.empty(len(dataset.paragraphs), _PAIR)
        here["hash"] = dataset.paragraphs["hash"]
        here["document"] = dataset.paragraphs["document"] + np.uint64(documents)
        pairs.append(np.unique(here))
        documents += len(dataset.documents)
    known, counts = np.unique(np.concatenate(pairs)["hash"], return_counts=True)
    return known, known[counts >= (BOILERPLATE if documents > 4 else 2)]


def shared_documents(dataset: TokenDataset, other: TokenDataset) -> np.ndarray:
    """bool [n_documents of dataset]: the documents that ``other`` holds as well."""
    mask = np.zeros(len(dataset.documents), bool)
    known = _sorted([_hashes(other.documents)])
    mask[_matches(dataset.documents["hash"], np.arange(len(mask)), known)["document"]] = True
    return mask


def _hashes(records: np.ndarray) -> np.ndarray:
    return np.array(records["hash"])


def _sorted(hashes: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


def _matches(hashes: np.ndarray, documents: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The (hash, document) pairs whose hash is among the sorted ``known``."""
    found = [np.empty(0, _PAIR)]
    for i in range(0, len(hashes) if len(known) else 0, _CHUNK):
        chunk = np.array(hashes[i:i + _CHUNK])
        place = np.minimum(np.searchsorted(known, chunk), len(known) - 1)
        mine = np.flatnonzero(known[place] == chunk)
        pairs = np.empty(len(mine), _PAIR)
        pairs["hash"], pairs["document"] = chunk[mine], documents[i:i + _CHUNK][mine]
        found.append(pairs)
    return np.concatenate(found)


def _examples(training: TokenDataset, held_out: Sequence[TokenDataset], pairs: np.ndarray,
              why: str) -> list[dict[str, str]]:
    """Where the two sides of each pair stand."""
    told = []
    for pair in pairs:
        for dataset in held_out:
            if why == "equal":
                there = np.flatnonzero(dataset.documents["hash"] == pair["hash"])
            else:
                paragraphs = dataset.paragraphs
                there = paragraphs["document"][paragraphs["hash"] == pair["hash"]]
            if len(there):
                told.append({"training": training.place(int(pair["document"])),
                             "held_out": dataset.place(int(there[0])), "why": why})
                break
    return told
