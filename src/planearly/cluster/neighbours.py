"""The windows of a corpus that are nearest to some points, a shard of windows at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from planearly import parallel
from planearly.cluster.embed import open_embeddings
from planearly.cluster.select import BLOCK, merged, nearest
from planearly.engine.work import Advance, Executor, Work, shard_function, window_shards
from planearly.files import file_digest, read_array, read_json, write_array

_ROWS = 64 * BLOCK  # of a shard, seconds of work for some thousand points
_MOST_SHARDS = 512  # each hands over as many neighbours as are asked for
_SMALL = 1 << 29  # scores that one process computes in seconds


def nearest_windows(embedded: Path, candidates: np.ndarray, own: np.ndarray, ranks: int,
                    folder: Path, executor: Executor) -> tuple[np.ndarray, np.ndarray]:
    """:func:`planearly.cluster.select.nearest` among embeddings in files.

    Args:
        embedded: folder of the embeddings.
        folder: for what the shards hand over; it is removed at last.
    """
    n = len(candidates)
    rows = max(_ROWS, -(-n // (_MOST_SHARDS * BLOCK)) * BLOCK)
    item: dict[str, Any] = {
        "embeddings": str(embedded), "candidates": str(folder / "candidates.npy"),
        "own": str(folder / "own.npy"), "ranks": ranks}
    write_array(folder / "candidates.npy", candidates)
    write_array(folder / "own.npy", own)
    made = [read_json(embedded / "embeddings.json"), rows, ranks,
            *(file_digest(Path(item[name])) for name in ("candidates", "own"))]
    shards = window_shards(n, rows, item, made, folder, lambda number: [
        folder / f"{name}-{number:05d}.npy" for name in ("where", "cosine")])
    executor.map(Work("looking for neighbours", "windows", search_shard, shards,
                      small=_SMALL / max(len(own), 1)))
    found = None
    for shard in shards:
        here = read_array(shard.made[0]), read_array(shard.made[1])
        found = here if found is None else merged(found, here, ranks)
    shutil.rmtree(folder, ignore_errors=True)
    assert found is not None
    return np.array(found[0]), np.array(found[1])


@shard_function
def search_shard(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Look for neighbours among the windows of one shard, in one thread."""
    points, start = open_embeddings(Path(item["embeddings"])), item["start"]
    candidates = read_array(Path(item["candidates"]))[start:item["stop"]]
    with parallel.one_thread():
        where, cosine = nearest(points, candidates, read_array(Path(item["own"])), item["ranks"],
                                advance)
    write_array(Path(item["to"][0]), where + start)
    write_array(Path(item["to"][1]), cosine)
    return {"windows": len(candidates)}
