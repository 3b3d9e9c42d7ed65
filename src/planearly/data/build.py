"""Documents to a token dataset: tokenize in parallel, drop duplicates, write the indices."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from planearly import files, keys
from planearly.data import duplicates
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
_BINS = 16  # bits of a rank by which documents are counted before some are sorted


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
    with contextlib.suppress(UserError):  # it is not finished, or that note is damaged
        meta = files.read_object(out / "dataset.json", "key")
        if meta["key"] == key:
            return meta
    (out / "dataset.json").unlink(missing_ok=True)
    parts = divided(units, out / "parts" / "divided", executor)
    work = jobs(parts, tokenizer, settings, out, part)
    markers = run_jobs(work, name, executor)
    keep = duplicates.firsts(work, out / "parts", executor)
    while part and max_tokens and (found := _tokens(work, keep)) < max_tokens:
        part = part.larger(found, max_tokens)
        work = jobs(parts, tokenizer, settings, out, part)
        markers = run_jobs(work, name, executor)
        keep = duplicates.firsts(work, out / "parts", executor)
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
        **_merge(work, markers, keep, context, max_tokens, out, tokenizer),
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


def _merge(work: list[Job], markers: list[dict[str, Any]], keep: np.ndarray, context: int,
           max_tokens: int | None, out: Path, tokenizer: Path) -> dict[str, Any]:
    """Write windows, documents and paragraphs of all shards, a shard at a time; return counts.

    Args:
        keep: bool [documents]: those to keep, but for the limit of tokens, which is put in.
    """
    sources: dict[str, int] = {}
    renamed = [np.array([sources.setdefault(name, len(sources)) for name in marker["sources"]],
                        np.uint32) for marker in markers]
    shards = [job.read("documents", SHARD_DOCUMENT) for job in work]
    distinct = int(keep.sum())
    last, cut = _keep_lowest(work, shards, keep, max_tokens, tokenizer) if max_tokens else (-1, {})

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
        before = first = 0
        for job, shard in zip(work, shards, strict=True):
            mine = keep[before:before + len(shard)]
            number = first + np.cumsum(mine) - 1  # of a kept document among all
            found = job.read("paragraphs", PARAGRAPH)
            for i in range(0, len(found), _CHUNK):
                chunk = np.array(found[i:i + _CHUNK])
                chunk = chunk[mine[chunk["document"]]]
                chunk["document"] = number[chunk["document"]]
                yield chunk
            before, first = before + len(shard), first + int(mine.sum())

    files.write_chunks(out / "documents.npy", DOCUMENT, (counts["n_documents"],), documents())
    files.write_chunks(out / "windows.npy", WINDOW, (counts["n_windows"],), windows())
    found = (sum(map(len, paragraphs())),)
    files.write_chunks(out / "paragraphs.npy", PARAGRAPH, found, paragraphs())
    return {**counts, "duplicates": len(keep) - distinct,
            "not_drawn": distinct - counts["n_documents"], "sources": list(sources),
            "source_tokens": tokens_by_source.tolist()}


def _chunks(shards: list[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(shard, number of the first document, documents)"""
    before = 0
    for shard, documents in enumerate(shards):
        for i in range(0, len(documents), _CHUNK):
            yield shard, before + i, documents[i:i + _CHUNK]
        before += len(documents)


def _tokens(work: list[Job], keep: np.ndarray) -> int:
    """Tokens of the documents that are kept."""
    shards = [job.read("documents", SHARD_DOCUMENT) for job in work]
    return sum(int(chunk["tokens"][keep[start:start + len(chunk)]].sum())
               for _, start, chunk in _chunks(shards))


def _keep_lowest(work: list[Job], shards: list[np.ndarray], keep: np.ndarray, max_tokens: int,
                 tokenizer: Path) -> tuple[int, dict[str, int]]:
    """Take those out of ``keep`` that ``max_tokens`` tokens of the lowest ranks do without.

    Returns:
        The document that is cut, and the ``tokens`` and ``bytes`` it keeps (-1: none is).
    """
    def ranked() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Documents that are kept, their ranks and their tokens."""
        for shard, start, chunk in _chunks(shards):
            part, ranks = work[shard].subset or Subset(0, 1.0), np.empty(len(chunk), np.uint64)
            for i, unit in work[shard].units:
                mine = chunk["unit"] == i
                ranks[mine] = part.rank(chunk["hash"][mine], unit)
            some = np.flatnonzero(keep[start:start + len(chunk)])
            yield start + some, ranks[some], chunk["tokens"][some].astype(np.int64)

    shift = np.uint64(64 - _BINS)
    held = np.zeros(1 << _BINS, np.int64)
    for _, ranks, tokens in ranked():
        np.add.at(held, ranks >> shift, tokens)
    held = np.cumsum(held)
    if held[-1] <= max_tokens:
        return -1, {}
    border = int(np.searchsorted(held, max_tokens))  # no more than this bin has to be sorted
    inside = []
    for documents, ranks, tokens in ranked():
        bins = ranks >> shift
        keep[documents[bins > border]] = False
        inside.append([of[bins == border] for of in (documents, ranks, tokens)])
    documents, ranks, tokens = map(np.concatenate, zip(*inside, strict=True))
    order = np.argsort(ranks, kind="stable")
    ends = np.cumsum(tokens[order]) + (held[border - 1] if border else 0)
    last = int(np.searchsorted(ends, max_tokens))
    keep[documents[order[last + 1:]]] = False
    if ends[last] == max_tokens:
        return -1, {}
    document = int(documents[order[last]])
    left = int(tokens[order[last]] - (ends[last] - max_tokens))
    for shard, start, chunk in _chunks(shards):
        if start <= document < start + len(chunk):
            by = tk.opened(tokenizer)
            stream = np.memmap(work[shard].shard, by.dtype, "r")
            first = int(chunk["offset"][document - start]) + 1
            text = by.tokenizer.decode(stream[first:first + left].tolist(),
                                       skip_special_tokens=False)
    return document, {"tokens": left, "bytes": len(text.encode())}
