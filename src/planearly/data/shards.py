"""Tokenize files in parallel; each job writes one shard.

A job reads a file, several small ones or a part of a large one. It writes the tokens, an index of
their documents, the documents' hashes in order, those of paragraphs, and what it counted; a job
that is done is not run again, so work that was killed goes on where it was. A shard depends on
nothing but its files and the tokenizer: any number of workers writes the same ones. Memory is that
of a batch per worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planearly import files, keys
from planearly.data import tokenizer as tk
from planearly.data.documents import Document, Problems, Unit, grouped
from planearly.data.encode import Encoder
from planearly.data.readers import read_documents
from planearly.data.subset import Subset
from planearly.data.text import fingerprint, pieces, text_hash
from planearly.engine.work import Advance, Executor, Shard, Work, shard_function

PARAGRAPH = np.dtype([("hash", "<u8"), ("document", "<u8")])

SHARD_DOCUMENT = np.dtype([("source", "<u4"), ("bytes", "<u8"), ("hash", "<u8"), ("unit", "<u4"),
                          ("line", "<u8"), ("offset", "<u8"), ("tokens", "<u8")])
"""A document of a shard: ``offset`` of its first EOT there, ``tokens`` it has as targets."""

MAX_SOURCES = 1_000
"""Sources told apart; documents of further ones count as "other"."""

HASHED = np.dtype([("hash", "<u8"), ("document", "<u8")])
"""Hash of a shard's document, and its number there; a shard's are in order of the hashes."""

# Characters. Our tokenizers give a text the same tokens in pieces as whole (pieces end before
# whitespace); one taken from elsewhere may see a word begin at a piece where none did.
_PIECE, _BATCH = 1 << 17, 1 << 21
_FORMAT = 2  # of a shard's index and marker; those of an older one are made again
_POOL_MEGABYTES = 24.0  # up to this, starting processes costs more than they save


@dataclass(frozen=True)
class Job:
    """What one shard is made of (files with their numbers), and where it goes."""

    number: int
    units: list[tuple[int, Unit]]
    tokenizer: Path
    settings: keys.Data
    out: Path
    subset: Subset | None
    key: str

    @property
    def shard(self) -> Path:
        return self.out / shard_name(self.number)

    @property
    def marker(self) -> Path:
        return self.out / "parts" / f"{self.number:05d}.json"

    def index(self, what: str) -> Path:
        return index_of(self.out / "parts", self.number, what)

    def to_shard(self) -> Shard:
        """The job as the engine takes it."""
        first, more = self.units[0][1].path, len(self.units) - 1
        item = {"number": self.number, "units": [(i, unit.to_json()) for i, unit in self.units],
                "tokenizer": str(self.tokenizer), "settings": asdict(self.settings),
                "out": str(self.out), "subset": self.subset and asdict(self.subset),
                "key": self.key}
        return Shard(f"{self.number} ({first}{f' and {more} more' * bool(more)})",
                     sum(unit.text_bytes for _, unit in self.units) / 1e6, item, self.marker,
                     self.key, (self.shard, self.index("hashes")))

    @classmethod
    def from_item(cls, item: dict[str, Any]) -> Job:
        """The job of which this is the shard's item."""
        return cls(item["number"], [(i, Unit.from_json(unit)) for i, unit in item["units"]],
                   Path(item["tokenizer"]), keys.Data(**item["settings"]), Path(item["out"]),
                   item["subset"] and Subset(**item["subset"]), item["key"])

    def read(self, what: str, dtype: np.dtype) -> np.ndarray:
        path = self.index(what)
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def index_of(parts: Path, number: int, what: str) -> Path:
    """Where a job hands over an index."""
    return parts / f"{number:05d}-{what}.bin"


def shard_name(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def jobs(units: Sequence[tuple[int, Unit]], tokenizer: Path, settings: keys.Data, out: Path,
         subset: Subset | None = None) -> list[Job]:
    """A job for each group of neighbouring files.

    Args:
        units: the files, or parts of them, with the files' numbers.
        subset: the documents to tokenize (None: all).
    """
    encodes = tk.opened(tokenizer).digest
    part = None if subset is None else asdict(subset)
    return [Job(number, share, tokenizer, settings, out, subset,
                files.digest([_FORMAT, [(i, unit.identity) for i, unit in share], encodes, part,
                              settings.text_field, settings.source_field]))
            for number, group in enumerate(grouped([unit for _, unit in units]))
            for share in [[(units[i][0], unit) for i, unit in group]]]


def run_jobs(jobs: list[Job], name: str, executor: Executor) -> list[dict[str, Any]]:
    """Run the jobs that are not done yet; return the markers of all.

    Raises:
        UserError: a damaged file, too many bad records, a full disk, a process that is killed again
            and again.
    """
    problems = Problems(jobs[0].settings.max_bad_share) if jobs else Problems(0)

    def seen(marker: dict[str, Any]) -> None:
        problems.add(marker["problems"])
        if problems.good + problems.bad >= 1_000:
            problems.check()

    known = all(unit.size for job in jobs for _, unit in job.units if unit.kind == "hub")
    return executor.map(Work(f"tokenizing {name}", "MB", tokenize, [job.to_shard() for job in jobs],
                             small=_POOL_MEGABYTES, known=known), seen)


@shard_function
def tokenize(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """:func:`run_job`, of a job's shard."""
    return run_job(Job.from_item(item), advance)


def run_job(job: Job, advance: Advance) -> dict[str, Any]:
    """Tokenize the files of one job; write its shard; return what was counted."""
    by = tk.opened(job.tokenizer)
    encoder, begin, eot = Encoder(by.tokenizer), by.begin, by.eot
    problems = Problems(job.settings.max_bad_share)
    sources: dict[str, int] = {}
    n_documents = n_tokens = n_bytes = offset = n_paragraphs = 0
    with (files.atomic_write(job.shard) as shard,
          files.atomic_write(job.index("documents")) as to_documents,
          files.atomic_write(job.index("paragraphs")) as to_paragraphs):
        opened, length = 0, 0  # where the open document begins, and its tokens so far
        for batch in _batches(_documents(job, problems, advance)):
            stream, counts = _stream(encoder, begin, eot, batch)
            shard.write(stream.tobytes())
            records: list[tuple[int, ...]] = []
            for count, first, last in zip(counts.tolist(), batch.first, batch.last, strict=True):
                if first:
                    opened, length = offset, 0
                length += count
                offset += count + first + last
                if last:
                    unit, document = batch.documents[len(records)]
                    digest, paragraphs = fingerprint(document.text)
                    source = document.source
                    if source not in sources and len(sources) >= MAX_SOURCES:
                        source = "other"
                    records.append((sources.setdefault(source, len(sources)), document.n_bytes,
                                    digest, unit, document.line, opened, length + 1))
                    n_tokens += length + 1
                    n_bytes += document.n_bytes
                    if paragraphs:
                        found = np.empty(len(paragraphs), PARAGRAPH)
                        found["hash"], found["document"] = paragraphs, n_documents
                        to_paragraphs.write(found.tobytes())
                        n_paragraphs += len(paragraphs)
                    n_documents += 1
            to_documents.write(np.array(records, SHARD_DOCUMENT).tobytes())
            advance(sum(map(len, batch.pieces)) / 1e6)
    _write_hashes(job)
    return {"documents": n_documents, "tokens": n_tokens, "paragraphs": n_paragraphs,
            "unknown": encoder.unknown, "bytes": n_bytes, "sources": list(sources),
            "problems": problems.to_dict()}


def _write_hashes(job: Job) -> None:
    """Write the hashes of a job's documents in order, for who looks for equal ones elsewhere."""
    found = np.array(job.read("documents", SHARD_DOCUMENT)["hash"])
    hashed = np.empty(len(found), HASHED)
    hashed["document"] = order = np.argsort(found, kind="stable")
    hashed["hash"] = found[order]
    with files.atomic_write(job.index("hashes")) as handle:
        handle.write(hashed.tobytes())


@dataclass
class _Batch:
    """Pieces of documents; which of them begin and end one; the documents that end here."""

    pieces: list[str]
    first: list[bool]
    last: list[bool]
    documents: list[tuple[int, Document]]


def _documents(job: Job, problems: Problems,
               advance: Advance) -> Iterator[tuple[int, Document]]:
    """The documents to tokenize, with the numbers of their files."""
    subset = job.subset
    for number, unit in job.units:
        left = float("inf") if subset is None else subset.most(unit) or 0.0
        for document in read_documents(unit, job.settings, problems):
            if subset is None or subset.rank([text_hash(document.text)], unit)[0] < subset.below:
                yield number, document
            else:
                problems.left_out += 1
                advance(len(document.text) / 1e6)
            left -= document.n_bytes
            if left <= 0:
                break


def _batches(documents: Iterator[tuple[int, Document]]) -> Iterator[_Batch]:
    """Batches of about two million characters; a long document goes over several."""
    batch, held = _Batch([], [], [], []), 0
    for numbered in documents:
        first = True
        text = numbered[1].text
        seen = 0
        for piece in pieces(text, _PIECE):
            seen += len(piece)
            batch.pieces.append(piece)
            batch.first.append(first)
            batch.last.append(seen == len(text))
            first = False
            held += len(piece)
            if batch.last[-1]:
                batch.documents.append(numbered)
            if held >= _BATCH:
                yield batch
                batch, held = _Batch([], [], [], []), 0
    if batch.pieces:
        yield batch


def _stream(encoder: Encoder, begin: int, eot: int,
            batch: _Batch) -> tuple[np.ndarray, np.ndarray]:
    """The token stream of a batch, a begin before each first and an EOT after each last piece."""
    ids, counts = encoder.encode(batch.pieces)
    first = np.array(batch.first, np.int64)
    lengths = counts + first + np.array(batch.last, np.int64)
    stream = np.full(lengths.sum(), eot, encoder.dtype)
    stream[(np.cumsum(lengths) - lengths)[first == 1]] = begin
    start = np.cumsum(lengths) - lengths + first - (np.cumsum(counts) - counts)
    stream[np.repeat(start, counts) + np.arange(len(ids))] = ids
    return stream, counts
