"""The text that a tokenizer is trained on: a fair sample of a corpus, in pieces of documents.

A piece's place is a hash of its text, and the sample are the first: the same documents give the
same sample, whatever files they stand in and in whatever order. Local files are read whole, in
parallel; of a dataset on the hub so much is read as holds the sample twenty times over, and its
pieces then stand for those that were not read, by earlier places. Memory is that of the sample.
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from planearly import files, keys
from planearly.data.divide import divided
from planearly.data.documents import Problems, Unit, grouped
from planearly.data.readers import read_documents
from planearly.data.subset import head
from planearly.data.text import pieces
from planearly.engine.local import Local
from planearly.engine.work import Advance, Executor, Shard, Work, shard_function

_PIECE = 1 << 16  # characters
_END = 1 << 64
READ_AHEAD = 20
"""Times the sample: how much of the hub is read to draw it from."""
_LIKELY = 4.0  # times the sample: what the shards hand over; sizes of packed files are guesses
_SMALL = 100.0  # megabytes: up to this, starting processes costs more than they save


def draw(units: list[Unit], settings: keys.Data, n_bytes: int, problems: Problems, folder: Path,
         executor: Executor | None = None) -> list[str]:
    """About ``n_bytes`` characters of text, or all if there is less, in the order of their places.

    Args:
        problems: what could not be read is added here.
        folder: for what the shards hand over; work that was killed goes on from there. It is
            removed at last.
        executor: who reads (None: processes of this machine).

    Raises:
        UserError: a damaged file; too many bad records; a full disk.
    """
    read = read_share(units, n_bytes)
    executor = executor or Local()
    units = [unit for _, unit in divided(
        [unit for unit in units if head(unit, read) is not None], folder / "divided", executor,
        unpack=False)]
    below = min(int(_LIKELY * read / READ_AHEAD * _END), _END)
    while True:
        shards = _shards(units, settings, read, below, folder)
        found = executor.map(Work(
            "sampling text for the tokenizer", "MB", hand_over, shards, small=_SMALL,
            known=all(unit.size for unit in units if unit.kind == "hub")))
        held = sum(counts["characters"] for counts in found)
        if below == _END or held >= n_bytes:
            break
        below = min(int(below * min(max(1.25 * n_bytes / max(held, 1), 2), 16)) + 1, _END)
    for counts in found:
        problems.add(counts["problems"])
    first = _first(_handed_over(shards), n_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    return first


def read_share(units: list[Unit], n_bytes: int) -> float:
    """Share of the text on the hub that is read to draw ``n_bytes`` (1 and more: all of it)."""
    return READ_AHEAD * n_bytes / max(sum(unit.text_bytes for unit in units), 1)


def _shards(units: list[Unit], settings: keys.Data, read: float, below: int,
            folder: Path) -> list[Shard]:
    shards = []
    for number, group in enumerate(grouped(units)):
        item: dict[str, Any] = {
            "units": [unit.to_json() for _, unit in group], "settings": asdict(settings),
            "read": read, "below": below, "out": str(folder / f"{number:05d}.jsonl")}
        shards.append(Shard(
            f"{number} ({group[0][1].path})", sum(unit.text_bytes for _, unit in group) / 1e6, item,
            folder / f"{number:05d}.json", files.digest(item), (Path(item["out"]),)))
    return shards


@shard_function
def hand_over(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Write the pieces of some units whose place is below a number, each with its place."""
    settings, characters = keys.Data(**item["settings"]), 0
    problems = Problems(settings.max_bad_share)
    with files.atomic_write(Path(item["out"]), "w") as out:
        for unit in map(Unit.from_json, item["units"]):
            left = (head(unit, item["read"]) or 0.0) if unit.kind == "hub" else float("inf")
            share = min(item["read"], 1.0) if unit.kind == "hub" else 1.0
            for document in read_documents(unit, settings, problems):
                for piece in pieces(document.text, _PIECE):
                    place = int.from_bytes(blake2b(piece.encode(), digest_size=8).digest(), "big")
                    if share < 1:
                        place = int(place * share)
                    if place < item["below"]:
                        out.write(json.dumps([place, piece]) + "\n")
                        characters += len(piece)
                advance(document.n_bytes / 1e6)
                left -= document.n_bytes
                if left <= 0:
                    break
    return {"characters": characters, "problems": problems.to_dict()}


def _handed_over(shards: list[Shard]) -> Iterator[tuple[int, str]]:
    for shard in shards:
        with open(shard.made[0], encoding="utf-8") as handle:
            yield from map(json.loads, handle)


def _first(placed: Iterator[tuple[int, str]], n_bytes: int) -> list[str]:
    """The first pieces that together have so many characters."""
    kept: list[tuple[int, str]] = []  # a heap, the last place on top
    held = 0
    for place, piece in placed:
        heapq.heappush(kept, (-place, piece))
        held += len(piece)
        while held - len(kept[0][1]) >= n_bytes:
            held -= len(heapq.heappop(kept)[1])
    return [piece for _, piece in sorted(kept, key=lambda one: (-one[0], one[1]))]
