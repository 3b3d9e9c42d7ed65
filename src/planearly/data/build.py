"""Documents to a token dataset: tokenize in parallel, drop duplicates, write the indices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from planearly import files, keys
from planearly.data import tokenizer as tk
from planearly.data.dataset import DOCUMENT, WINDOW, cut_windows
from planearly.data.divide import divided
from planearly.data.documents import Problems, Unit
from planearly.data.shards import PARAGRAPH, SHARD_DOCUMENT, Job, jobs, run_jobs, shard_name
from planearly.data.subset import Subset, subset
from planearly.engine.local import Local
from planearly.engine.work import Executor
from planearly.errors import UserError
from planearly.progress import say

_CHUNK = 1 << 20  # documents at a time when shards are merged
_SORTED = 8 << 20  # hashes at a time when duplicates are looked for


def tokenize_corpus(units: list[Unit], tokenizer: Path, context: int, settings: keys.Data,
                    out: Path, name: str = "documents", max_tokens: int | None = None,
                    executor: Executor | None = None) -> dict[str, Any]:
    """Make the token dataset ``out`` of the documents in ``units``.

    Documents that are equal but for whitespace are kept once, the first. Finished shards of an
    interrupted call with the same arguments are used again; the same files, tokenizer and context
    give the same dataset byte for byte, with any executor.

    Args:
        units: input files, read in this order.
        tokenizer: folder of the tokenizer.
        context: most targets of a window.
        settings: how documents are read.
        out: the dataset's folder.
        name: what the documents are, for messages.
        max_tokens: use a fair sample of the documents of so many tokens (see
            :mod:`planearly.data.subset`); the last one drawn is cut, without a final EOT.
        executor: who tokenizes (None: processes of this machine).

    Returns:
        What ``dataset.json`` holds.

    Raises:
        UserError: no documents; a damaged file; too many bad records; a full disk; a tokenizer
            that does not know the text.
    """
    executor = executor or Local()
    part = subset(units, max_tokens)
    units = [unit for unit in units if part is None or part.most(unit) is not None]
    work = jobs(list(enumerate(units)), tokenizer, settings, out, part)
    key = files.digest([[job.key for job in work], context, max_tokens])
    if (out / "dataset.json").is_file():
        meta: dict[str, Any] = files.read_json(out / "dataset.json")
        if meta["key"] == key:
            return meta
    (out / "dataset.json").unlink(missing_ok=True)
    parts = divided(units, out / "parts" / "divided", executor)
    work = jobs(parts, tokenizer, settings, out, part)
    markers = run_jobs(work, name, executor)
    while part and max_tokens and (found := _distinct_tokens(work)) < max_tokens:
        part = part.larger(found, max_tokens)
        work = jobs(parts, tokenizer, settings, out, part)
        markers = run_jobs(work, name, executor)
    problems = Problems(settings.max_bad_share)
    for marker in markers:
        problems.add(marker["problems"])
    problems.check()
    problems.tell()
    if not any(marker["documents"] for marker in markers):
        raise UserError(f"{name}: no documents with text in {_listed(units)}"
                        + (f"; {problems.first()}" if problems.examples else ""))
    unknown = sum(marker["unknown"] for marker in markers)
    tk.check_unknown(unknown, sum(marker["bytes"] for marker in markers), name)
    by = tk.opened(tokenizer)
    meta = {
        "key": key, "dtype": by.dtype.str, "context": context,
        "vocab_size": by.vocab_size, "eot": by.eot, "begin": by.begin,
        "tokenizer_digest": by.digest,
        **_merge(work, markers, context, max_tokens, out, tokenizer),
        "files": [unit.path for unit in units],
        "unknown_bytes": unknown, "read": problems.good, "set_aside": problems.bad,
        "empty": problems.empty, "bad": problems.examples,
    }
    meta["left_out"] = problems.left_out + meta.pop("not_drawn")
    files.write_json(out / "dataset.json", meta)
    shutil.rmtree(out / "parts")
    for stale in [*out.glob("tokens-*.bin"), *out.glob(".*.tmp")]:  # of earlier, killed calls
        if stale.suffix == ".tmp" or stale.name >= shard_name(len(markers)):
            stale.unlink()
    if meta["duplicates"]:
        say(f"{name}: dropped {meta['duplicates']} duplicate documents")
    return meta


def _listed(units: list[Unit]) -> str:
    more = f" and {len(units) - 3} more" if len(units) > 3 else ""
    return ", ".join(unit.path for unit in units[:3]) + more


def _merge(work: list[Job], markers: list[dict[str, Any]], context: int, max_tokens: int | None,
           out: Path, tokenizer: Path) -> dict[str, Any]:
    """Write windows, documents and paragraphs of all shards without duplicates; return counts."""
    sources: dict[str, int] = {}
    renamed = [np.array([sources.setdefault(name, len(sources)) for name in marker["sources"]],
                        np.uint32) for marker in markers]
    shards = [job.read("documents", SHARD_DOCUMENT) for job in work]
    n = sum(map(len, shards))
    keep = _without_duplicates(shards)
    distinct = int(keep.sum())
    last, cut = _keep_lowest(work, shards, keep, max_tokens, tokenizer) if max_tokens else (-1, {})
    number = np.cumsum(keep) - 1  # new number of a kept document

    def kept() -> Iterator[tuple[int, np.ndarray]]:
        """(shard, kept documents) in order, the one that is cut shortened."""
        for shard, start, chunk in _chunks(shards):
            mine = keep[start:start + len(chunk)]
            here = np.array(chunk[mine])
            if start <= last < start + len(chunk):
                for name, value in cut.items():
                    here[name][mine[:last - start].sum()] = value
            here["source"] = renamed[shard][here["source"]]
            yield shard, here

    counts = {"n_documents": int(keep.sum()), "n_windows": 0, "n_tokens": 0, "n_bytes": 0}
    tokens_by_source = np.zeros(len(sources), np.int64)
    for _, chunk in kept():
        counts["n_windows"] += int((-(-chunk["tokens"].astype(np.int64) // context)).sum())
        counts["n_tokens"] += int(chunk["tokens"].sum())
        counts["n_bytes"] += int(chunk["bytes"].sum())
        np.add.at(tokens_by_source, chunk["source"], chunk["tokens"].astype(np.int64))

    def documents() -> Iterator[np.ndarray]:
        for _, chunk in kept():
            found = np.empty(len(chunk), DOCUMENT)
            for name in DOCUMENT.names or ():
                found[name] = chunk[name]
            yield found

    def windows() -> Iterator[np.ndarray]:
        before = 0
        for shard, chunk in kept():
            yield cut_windows(work[shard].number, chunk["offset"], chunk["tokens"], context, before)
            before += len(chunk)

    def paragraphs() -> Iterator[np.ndarray]:
        before = 0
        for job, shard in zip(work, shards, strict=True):
            found = job.read("paragraphs", PARAGRAPH)
            for i in range(0, len(found), _CHUNK):
                chunk = np.array(found[i:i + _CHUNK])
                chunk["document"] += np.uint64(before)
                chunk = chunk[keep[chunk["document"]]]
                chunk["document"] = number[chunk["document"]]
                yield chunk
            before += len(shard)

    files.write_chunks(out / "documents.npy", DOCUMENT, (counts["n_documents"],), documents())
    files.write_chunks(out / "windows.npy", WINDOW, (counts["n_windows"],), windows())
    found = (sum(map(len, paragraphs())),)
    files.write_chunks(out / "paragraphs.npy", PARAGRAPH, found, paragraphs())
    return {**counts, "duplicates": n - distinct, "not_drawn": distinct - counts["n_documents"],
            "sources": list(sources),
            "source_tokens": tokens_by_source.tolist()}


def _chunks(shards: list[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(shard, number of the first document, documents)"""
    before = 0
    for shard, documents in enumerate(shards):
        for i in range(0, len(documents), _CHUNK):
            yield shard, before + i, documents[i:i + _CHUNK]
        before += len(documents)


def _distinct_tokens(work: list[Job]) -> int:
    """Tokens of the documents so far, equal ones counted once."""
    shards = [job.read("documents", SHARD_DOCUMENT) for job in work]
    keep = _without_duplicates(shards)
    return sum(int(chunk["tokens"][keep[start:start + len(chunk)]].sum())
               for _, start, chunk in _chunks(shards))


def _without_duplicates(shards: list[np.ndarray]) -> np.ndarray:
    """bool [documents]: those that no earlier one is equal to."""
    keep = np.ones(sum(map(len, shards)), bool)
    for doubled in _duplicates(shards, len(keep)):
        keep[doubled] = False
    return keep


def _keep_lowest(work: list[Job], shards: list[np.ndarray], keep: np.ndarray, max_tokens: int,
                 tokenizer: Path) -> tuple[int, dict[str, int]]:
    """Take those out of ``keep`` that ``max_tokens`` tokens of the lowest ranks do without.

    Returns:
        The document that is cut, and the ``tokens`` and ``bytes`` it keeps (-1: none is).
    """
    ranks, tokens = np.empty(len(keep), np.uint64), np.empty(len(keep), np.int64)
    for shard, start, chunk in _chunks(shards):
        part = work[shard].subset or Subset(0, 1.0)
        tokens[start:start + len(chunk)] = chunk["tokens"]
        for i, unit in work[shard].units:
            mine = np.flatnonzero(chunk["unit"] == i)
            ranks[start + mine] = part.rank(chunk["hash"][mine], unit)
    order = np.flatnonzero(keep)
    order = order[np.argsort(ranks[order], kind="stable")]
    ends = np.cumsum(tokens[order])
    if not len(order) or ends[-1] <= max_tokens:
        return -1, {}
    last = int(np.searchsorted(ends, max_tokens))
    keep[order[last + 1:]] = False
    left, document = int(tokens[order[last]] - (ends[last] - max_tokens)), int(order[last])
    if ends[last] == max_tokens:
        return -1, {}
    for shard, start, chunk in _chunks(shards):
        if start <= document < start + len(chunk):
            by = tk.opened(tokenizer)
            stream = np.memmap(work[shard].shard, by.dtype, "r")
            first = int(chunk["offset"][document - start]) + 1
            text = by.tokenizer.decode(stream[first:first + left].tolist(),
                                       skip_special_tokens=False)
    return document, {"tokens": left, "bytes": len(text.encode())}


def _duplicates(shards: list[np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Numbers of documents whose hash an earlier one has; a share of the hashes at a time."""
    passes = n // _SORTED + 1
    for share in range(passes):
        hashes, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for _, start, chunk in _chunks(shards):
            mine = np.flatnonzero(chunk["hash"] % np.uint64(passes) == share)
            hashes.append(chunk["hash"][mine])
            numbers.append(mine + start)
        found = np.concatenate(hashes)
        order = np.argsort(found, kind="stable")
        found = found[order]
        yield np.concatenate(numbers)[order[1:][found[1:] == found[:-1]]]
