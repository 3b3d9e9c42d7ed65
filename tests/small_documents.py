"""Documents written to files and read back, for tests."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa

from planearly import keys
from planearly.data import domains
from planearly.data.documents import Problems
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents

DATA = keys.Data()


def read(*paths, data: keys.Data = DATA):
    problems = Problems(data.max_bad_share)
    documents = [d for unit in resolve([str(p) for p in paths])
                 for d in read_documents(unit, data, problems)]
    problems.check()
    return documents, problems


def domain_splits(root: str | None, entry: str, settings: keys.Data, seed: int):
    """The input files of a domain's train, valid and test documents, as a run finds them."""
    given = domains.given_splits(root, entry)
    if absent := domains.missing(given):
        with tempfile.TemporaryDirectory() as parts:
            given |= domains.hold_out(given["train"], absent, entry, settings, seed, Path(parts))
    return {split: given[split] for split in domains.SPLITS}


def texts(*paths, data: keys.Data = DATA) -> list[str]:
    return [document.text for document in read(*paths, data=data)[0]]


def lines(*records) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n"
                    for r in records)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()
