"""Equal documents of different shards: hashes are divided into ranges, in which equal ones meet.

Every shard brings the hashes of its documents in order (:mod:`planearly.data.shards`), so a range
of hashes is a slice of each. One range after the other, or several at once on different machines,
the documents are found whose hash an earlier one has. Memory is that of a range.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planearly import files
from planearly.data.shards import HASHED, Job, index_of
from planearly.engine.work import Advance, Executor, Shard, Work, shard_function

_RANGE = 1 << 20  # hashes looked through at once
_SMALL = 8e6  # documents that one process looks through in seconds
_END = 1 << 64


def firsts(work: Sequence[Job], parts: Path, executor: Executor) -> np.ndarray:
    """bool [documents of all jobs]: those that no earlier one is equal to, but for whitespace.

    Args:
        parts: folder of what the jobs handed over; the array lies there, memory-mapped.
    """
    n = sum(_hashes_in(parts, job.number) for job in work)
    many = n // _RANGE + 1
    made, shards = [[job.key for job in work], many], []
    for number in range(many):
        to = parts / f"later-{number:05d}.npy"
        item = {"parts": str(parts), "shards": len(work), "low": _END * number // many,
                "high": _END * (number + 1) // many, "to": str(to)}
        shards.append(Shard(f"{number} of {many}", n / many, item, to.with_suffix(".json"),
                            files.digest([*made, number]), (to,)))
    executor.map(Work("looking for duplicates", "documents", later_ones, shards, small=_SMALL))
    return _but(parts / "keep.npy", n, (files.read_array(shard.made[0]) for shard in shards))


def _but(path: Path, n: int, numbers: Iterable[np.ndarray]) -> np.ndarray:
    """bool [n], in a file: all but these numbers."""
    files.write_chunks(path, np.dtype(bool), (n,), (
        np.ones(min(_RANGE, n - start), bool) for start in range(0, n, _RANGE)))
    keep = np.load(path, mmap_mode="r+") if n else np.ones(0, bool)
    for some in numbers:
        keep[some] = False
    return keep


def _hashes_in(parts: Path, number: int) -> int:
    return index_of(parts, number, "hashes").stat().st_size // HASHED.itemsize


@shard_function
def later_ones(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Write the numbers of the documents in a range of hashes that an earlier one is equal to."""
    hashes, numbers, first = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], 0
    for shard in range(item["shards"]):
        if n := _hashes_in(parts := Path(item["parts"]), shard):
            hashed = np.memmap(index_of(parts, shard, "hashes"), HASHED, "r")
            start = np.searchsorted(hashed["hash"], np.uint64(item["low"]))
            stop = n if item["high"] == _END else np.searchsorted(hashed["hash"],
                                                                 np.uint64(item["high"]))
            hashes.append(np.array(hashed["hash"][start:stop]))
            numbers.append(hashed["document"][start:stop] + np.uint64(first))
            first += n
    found, number = np.concatenate(hashes), np.concatenate(numbers)
    order = np.argsort(found, kind="stable")  # of equal ones the first stays before
    found = found[order]
    later = np.sort(number[order[1:][found[1:] == found[:-1]]])
    files.write_array(Path(item["to"]), later)
    advance(len(found))
    return {"documents": len(found), "later": len(later)}
