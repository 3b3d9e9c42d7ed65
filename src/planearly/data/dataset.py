"""Token datasets: documents as windows of tokens, in memory-mapped files.

A document of n tokens is the stream ``EOT t1 .. tn EOT``. Its n + 1 targets are cut into
consecutive windows of at most ``context`` targets that do not overlap; a window's inputs are the
same span one token earlier. So every token, and the final EOT, is predicted exactly once, and a
window's first input is EOT or the last token of the window before it. Generic and specialization
text are cut alike.

A dataset is a folder::

    tokens-00000.bin ...  little-endian uint16 (uint32 above 65,536 entries), streams back to back
    windows.npy           WINDOW [n_windows], by document
    documents.npy         DOCUMENT [n_documents], in reading order
    paragraphs.npy        PARAGRAPH [n], the hashes of long paragraphs (see overlap.py)
    dataset.json          context, tokenizer, counts, sources, files, what was set aside
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planearly import files, keys
from planearly.data import tokenizer as tk
from planearly.data.corpus import Problems, Unit
from planearly.data.encode import Encoder
from planearly.data.shards import PARAGRAPH, PART_DOCUMENT, Job, jobs, make_parts, shard_name
from planearly.errors import UserError
from planearly.progress import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE = -100
"""Target of a position that holds no token: it never counts in a loss."""

WINDOW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("document", "<u8")])
"""Shard number, index of the first input in it, number of targets, document number."""

DOCUMENT = np.dtype([("source", "<u4"), ("bytes", "<u8"), ("hash", "<u8"), ("unit", "<u4"),
                     ("line", "<u8")])
"""Index into the sources, UTF-8 bytes of the text, hash of it with whitespace collapsed, index
into the files, line (or row) in the file."""

_CHUNK = 1 << 20  # documents at a time when parts are merged
_SORTED = 8 << 20  # hashes at a time when duplicates are looked for


class TokenDataset:
    """A finished token dataset, read through memory maps.

    Attributes:
        windows: WINDOW [n_windows].
        documents: DOCUMENT [n_documents].
        meta: what ``dataset.json`` holds.
        context: most targets of a window.

    Raises:
        UserError: the folder does not hold a finished dataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.meta: dict[str, Any] = files.read_json(self.path / "dataset.json")
        self.context: int = self.meta["context"]
        self.windows = files.read_array(self.path / "windows.npy")
        self.documents = files.read_array(self.path / "documents.npy")
        self._shards: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def paragraphs(self) -> np.ndarray:
        """PARAGRAPH [n], by document."""
        return files.read_array(self.path / "paragraphs.npy")

    def place(self, document: int) -> str:
        """File and line of a document, for people."""
        record = self.documents[document]
        return f"{self.meta['files'][record['unit']]} line {record['line']}"

    def rows(self, row_windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [R, context]: row r holds the windows ``row_windows[r]``.

        Positions that no window fills have input 0 and target :data:`IGNORE`.
        """
        counts = np.array([len(windows) for windows in row_windows], np.int64)
        record = self.windows[np.concatenate([*row_windows, np.empty(0, np.int64)]).astype(int)]
        length = record["length"].astype(np.int64)
        ends = np.cumsum(length)
        row = np.repeat(np.arange(len(counts)), counts)
        row_start = np.concatenate([[0], ends])[np.cumsum(counts) - counts]
        place = ends - length - row_start[row]  # of a window's first position in its row
        if len(place) and (place + length).max() > self.context:
            raise ValueError(f"a row holds more than {self.context} targets")
        inputs = np.zeros((len(counts), self.context), np.int64)
        targets = np.full((len(counts), self.context), IGNORE, np.int64)
        for shard in np.unique(record["shard"]):
            mine = np.flatnonzero(record["shard"] == shard)
            n = length[mine]
            step = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            source = np.repeat(record["offset"][mine].astype(np.int64), n) + step
            target = np.repeat(row[mine] * self.context + place[mine], n) + step
            tokens = self._shard(int(shard))
            inputs.ravel()[target] = tokens[source]
            targets.ravel()[target] = tokens[source + 1]
        return inputs, targets

    def tokens(self, window: int) -> np.ndarray:
        """A window's first input and its targets: [length + 1] token ids."""
        record = self.windows[window]
        start = int(record["offset"])
        return self._shard(int(record["shard"]))[start:start + int(record["length"]) + 1]

    def text(self, window: int, tokenizer: Tokenizer) -> str:
        """The text of a window's targets; a character cut by its border shows as U+FFFD."""
        return self.texts([window], tokenizer)[0]

    def texts(self, windows: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[str]:
        """:meth:`text` of many windows at once."""
        eot = self.meta["eot"]
        targets = (self.tokens(int(window))[1:] for window in windows)
        return tokenizer.decode_batch(
            [t[t != eot].tolist() for t in targets], skip_special_tokens=False
        )

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._shards:
            mapped = np.memmap(self.path / shard_name(shard), self.meta["dtype"], "r")
            self._shards[shard] = np.asarray(mapped)
        return self._shards[shard]


def tokenize_corpus(units: list[Unit], tokenizer: Path, context: int, settings: keys.Data,
                    out: Path, name: str = "documents", max_tokens: int | None = None,
                    processes: int | None = None) -> dict[str, Any]:
    """Make the token dataset ``out`` of the documents in ``units``.

    Documents that are equal but for whitespace are kept once, the first. Finished parts of an
    interrupted call with the same arguments are used again; the same files, tokenizer and context
    give the same dataset byte for byte, with any number of processes.

    Args:
        units: input files, read in this order.
        tokenizer: folder of the tokenizer.
        context: most targets of a window.
        settings: how documents are read.
        out: the dataset's folder.
        name: what the documents are, for messages.
        max_tokens: use the first so many tokens (before duplicates are dropped); the document in
            which they end is cut there, without a final EOT.
        processes: how many to use (None: one a core, one on little text).

    Returns:
        What ``dataset.json`` holds.

    Raises:
        UserError: no documents; a damaged file; too many bad records; a full disk.
    """
    work = jobs(units, tokenizer, settings, out, max_tokens)
    key = files.digest([[job.key for job in work], context, max_tokens])
    if (out / "dataset.json").is_file():
        meta: dict[str, Any] = files.read_json(out / "dataset.json")
        if meta["key"] == key:
            return meta
    (out / "dataset.json").unlink(missing_ok=True)
    markers = make_parts(work, max_tokens, name, processes)
    problems = Problems(settings.max_bad_share)
    for marker in markers:
        problems.add(marker["problems"])
    problems.check()
    problems.tell()
    if not any(marker["documents"] for marker in markers):
        raise UserError(f"{name}: no documents with text in {_listed(units)}"
                        + (f"; {problems.first()}" if problems.examples else ""))
    loaded = tk.load(tokenizer)
    meta = {
        "key": key, "dtype": Encoder(loaded).dtype.str, "context": context,
        "vocab_size": tk.vocab_size(loaded), "eot": tk.eot_id(tokenizer),
        "tokenizer_digest": tk.digest(tokenizer),
        **_merge(work[:len(markers)], markers, context, max_tokens, out, tokenizer),
        "files": [unit.path for unit in units],
        "read": problems.good, "set_aside": problems.bad, "empty": problems.empty,
        "bad": problems.examples,
    }
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
    """Write windows, documents and paragraphs of the parts without duplicates; return counts."""
    sources: dict[str, int] = {}
    renamed = [np.array([sources.setdefault(name, len(sources)) for name in marker["sources"]],
                        np.uint32) for marker in markers]
    parts = [job.read("documents", PART_DOCUMENT) for job in work]
    total = sum(marker["tokens"] for marker in markers)
    n, cut = _shorten(work, parts, total - max_tokens if max_tokens else 0, tokenizer)
    keep = np.ones(n, bool)
    for doubled in _duplicates(parts, n):
        keep[doubled] = False
    number = np.cumsum(keep) - 1  # new number of a kept document

    def kept() -> Iterator[tuple[int, np.ndarray]]:
        """(part, kept documents) in order, the last one shortened."""
        for part, start, chunk in _chunks(parts, n):
            here = np.array(chunk[keep[start:start + len(chunk)]])
            if cut and start + len(chunk) == n and keep[-1]:
                here["tokens"][-1], here["bytes"][-1] = cut
            here["source"] = renamed[part][here["source"]]
            yield part, here

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
        for part, chunk in kept():
            yield cut_windows(work[part].number, chunk["offset"], chunk["tokens"], context, before)
            before += len(chunk)

    def paragraphs() -> Iterator[np.ndarray]:
        before = 0
        for job, part in zip(work, parts, strict=True):
            found = job.read("paragraphs", PARAGRAPH)
            for i in range(0, len(found), _CHUNK):
                chunk = np.array(found[i:i + _CHUNK])
                chunk["document"] += np.uint64(before)
                chunk = chunk[chunk["document"] < n]
                chunk = chunk[keep[chunk["document"]]]
                chunk["document"] = number[chunk["document"]]
                yield chunk
            before += len(part)

    _write_chunks(out / "documents.npy", DOCUMENT, counts["n_documents"], documents())
    _write_chunks(out / "windows.npy", WINDOW, counts["n_windows"], windows())
    _write_chunks(out / "paragraphs.npy", PARAGRAPH, sum(map(len, paragraphs())), paragraphs())
    return {**counts, "duplicates": n - counts["n_documents"], "sources": list(sources),
            "source_tokens": tokens_by_source.tolist()}


def cut_windows(shard: int, offset: np.ndarray, tokens: np.ndarray, context: int,
                first_document: int) -> np.ndarray:
    """WINDOW records of documents whose streams begin at ``offset`` and have ``tokens`` targets."""
    tokens = tokens.astype(np.int64)
    counts = -(-tokens // context)
    document = np.repeat(np.arange(len(tokens)), counts)
    done = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * context
    windows = np.empty(len(document), WINDOW)
    windows["shard"] = shard
    windows["offset"] = offset.astype(np.int64)[document] + done
    windows["length"] = np.minimum(context, tokens[document] - done)
    windows["document"] = first_document + document
    return windows


def _chunks(parts: list[np.ndarray], n: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(part, number of the first document, documents) over the first ``n`` documents."""
    before = 0
    for part, documents in enumerate(parts):
        for i in range(0, min(len(documents), n - before), _CHUNK):
            yield part, before + i, documents[i:min(i + _CHUNK, n - before)]
        before += min(len(documents), n - before)


def _shorten(work: list[Job], parts: list[np.ndarray], surplus: int,
             tokenizer: Path) -> tuple[int, tuple[int, int] | None]:
    """How many documents are used, and the (tokens, bytes) that the last of them keeps."""
    n = sum(map(len, parts))
    for job, part in zip(reversed(work), reversed(parts), strict=True):
        for record in reversed(part):
            if surplus <= 0:
                return n, None
            tokens = int(record["tokens"])
            if tokens > surplus:
                loaded = tk.load(tokenizer)
                shard = np.memmap(job.shard, Encoder(loaded).dtype, "r")
                start = int(record["offset"]) + 1
                ids = shard[start:start + tokens - surplus]
                text = loaded.decode(ids.tolist(), skip_special_tokens=False)
                return n, (len(ids), len(text.encode()))
            surplus -= tokens
            n -= 1
    return n, None


def _duplicates(parts: list[np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Numbers of documents whose hash an earlier one has; a share of the hashes at a time."""
    passes = n // _SORTED + 1
    for share in range(passes):
        hashes, numbers = [], []
        for _, start, chunk in _chunks(parts, n):
            mine = np.flatnonzero(chunk["hash"] % np.uint64(passes) == share)
            hashes.append(chunk["hash"][mine])
            numbers.append(mine + start)
        found = np.concatenate(hashes)
        order = np.argsort(found, kind="stable")
        found = found[order]
        yield np.concatenate(numbers)[order[1:][found[1:] == found[:-1]]]


def _write_chunks(path: Path, dtype: np.dtype, n: int, chunks: Iterable[np.ndarray]) -> None:
    """A ``.npy`` file of ``n`` records that come in chunks."""
    with files.atomic_write(path) as handle:
        np.lib.format.write_array_header_1_0(handle, {
            "descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n,)})
        for chunk in chunks:
            handle.write(chunk.tobytes())
