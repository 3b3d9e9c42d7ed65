"""Held-out text must not be trained on: finding documents that two token datasets share.

Documents are recognised by the hash of their text with whitespace collapsed, and by the hashes of
their long paragraphs (:func:`planearly.data.text.fingerprint`), both kept in the datasets. Nothing
is read again. The hashes of the held-out sets go to every worker as files, those of the training
set are looked through a range at a time. Memory is that of the former and of what is found.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planearly import files
from planearly.data.dataset import TokenDataset
from planearly.engine.local import Local
from planearly.engine.work import Advance, Executor, Shard, Work, shard_function

BOILERPLATE = 3
"""A paragraph in as many held-out documents (a licence, a footer) says nothing; of at most four
documents, one in two of them."""

_CHUNK = 1 << 18  # hashes looked up at once
_SHARD = 16 * _CHUNK
_SMALL = 2e7  # hashes that one process looks up in seconds
_EXAMPLES = 20
_PAIR = np.dtype([("hash", "<u8"), ("document", "<u8")])


def held_out_overlap(
    training: TokenDataset, held_out: Sequence[TokenDataset], folder: Path,
    executor: Executor | None = None, others: Sequence[TokenDataset] = (),
) -> tuple[np.ndarray, dict[str, Any], list[np.ndarray]]:
    """Training documents that hold text of a held-out set.

    A training document is marked when it equals a held-out document, or has a paragraph of 200
    characters or more (whitespace collapsed) in common with one. Paragraphs that are common among
    the held-out documents themselves (:data:`BOILERPLATE`) do not count; one that is common in
    training alone does, for a text that is copied often leaks most.

    Args:
        folder: for what the shards hand over; it is removed at last.
        executor: who looks (None: processes of this machine).
        others: sets whose documents are looked for as well, without being held out.

    Returns:
        bool [n_documents of training], True for the documents to leave out; a report:
        ``documents`` (how many), ``windows`` and ``tokens`` they have, ``equal`` and
        ``by_paragraph`` (documents found either way), ``boilerplate`` (paragraphs passed over),
        and ``examples`` of {training, held_out, why} with file and line; and the numbers of the
        training documents that each of ``others`` holds, which the mask is not of.
    """
    mask = np.zeros(len(training.documents), bool)
    known = _sorted([_hashes(dataset.documents) for dataset in held_out])
    theirs = [_sorted([_hashes(dataset.documents)]) for dataset in others]
    paragraphs, common = _held_out_paragraphs(held_out)
    whole, shared = _matches(training, _sorted([known, *theirs]), paragraphs, folder,
                             executor or Local())
    pairs = whole[np.isin(whole["hash"], known)]
    equal = pairs["document"]
    mask[equal] = True

    shared = np.unique(shared)
    passed_over = np.isin(shared["hash"], common)
    boilerplate = len(np.unique(shared["hash"][passed_over]))
    shared = shared[~passed_over]
    mask[shared["document"]] = True

    windows = tokens = 0
    marked = np.flatnonzero(mask)
    for i in range(0, len(marked), _CHUNK):
        lengths = training.windows["length"][training.windows_of(marked[i:i + _CHUNK])]
        windows += len(lengths)
        tokens += int(lengths.sum())
    report = {
        "documents": len(marked), "windows": windows, "tokens": tokens, "equal": len(equal),
        "by_paragraph": len(np.unique(shared["document"])),
        "boilerplate": boilerplate,
        "examples": [
            *_examples(training, held_out, pairs[:_EXAMPLES], "equal"),
            *_examples(training, held_out, shared[:_EXAMPLES], "a paragraph in common"),
        ][:_EXAMPLES],
    }
    return mask, report, [whole["document"][np.isin(whole["hash"], one)] for one in theirs]


def _held_out_paragraphs(held_out: Sequence[TokenDataset]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the paragraphs of held-out sets, sorted, and those of them that are boilerplate."""
    once = [np.unique(np.array(dataset.paragraphs))["hash"] for dataset in held_out]
    documents = sum(len(dataset.documents) for dataset in held_out)
    known, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *once]), return_counts=True)
    return known, known[counts >= (BOILERPLATE if documents > 4 else 2)]


def _hashes(records: np.ndarray) -> np.ndarray:
    return np.array(records["hash"])


def _sorted(hashes: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))


def _matches(training: TokenDataset, documents: np.ndarray, paragraphs: np.ndarray, folder: Path,
             executor: Executor) -> tuple[np.ndarray, np.ndarray]:
    """The (hash, document) pairs of training documents whose hash is among ``documents``, and of
    those with a paragraph whose hash is among ``paragraphs``; both are sorted."""
    shards, of = [], {"documents": training.documents, "paragraphs": training.paragraphs}
    for what, known in (("documents", documents), ("paragraphs", paragraphs)):
        if not len(known):
            continue
        files.write_array(folder / f"{what}.npy", known)
        made = [training.meta["key"], files.file_digest(folder / f"{what}.npy")]
        for number, start in enumerate(range(0, len(of[what]), _SHARD)):
            stop, to = min(start + _SHARD, len(of[what])), folder / f"{what}-{number:05d}.npy"
            item = {"dataset": str(training.path), "what": what, "start": start, "stop": stop,
                    "known": str(folder / f"{what}.npy"), "to": str(to)}
            shards.append(Shard(f"{what} {start} to {stop}", stop - start, item,
                                to.with_suffix(".json"), files.digest([*made, start]), (to,)))
    if shards:
        executor.map(Work("looking for held-out text", "hashes", look_up, shards, small=_SMALL))
    found = {what: np.concatenate([np.empty(0, _PAIR), *(
        files.read_array(shard.made[0]) for shard in shards if shard.item["what"] == what)])
        for what in of}
    shutil.rmtree(folder, ignore_errors=True)
    return found["documents"], found["paragraphs"]


@shard_function
def look_up(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Write the (hash, document) pairs of a range of hashes that are among the known ones."""
    training, known = TokenDataset(Path(item["dataset"])), files.read_array(Path(item["known"]))
    whole = item["what"] == "documents"
    of = training.documents if whole else training.paragraphs
    found = [np.empty(0, _PAIR)]
    for start in range(item["start"], item["stop"], _CHUNK):
        chunk = np.array(of[start:min(start + _CHUNK, item["stop"])])
        place = np.minimum(np.searchsorted(known, chunk["hash"]), len(known) - 1)
        mine = np.flatnonzero(known[place] == chunk["hash"])
        pairs = np.empty(len(mine), _PAIR)
        pairs["hash"] = chunk["hash"][mine]
        pairs["document"] = start + mine if whole else chunk["document"][mine]
        found.append(pairs)
        advance(len(chunk))
    pairs = np.concatenate(found)
    files.write_array(Path(item["to"]), pairs)
    return {"found": len(pairs)}


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
