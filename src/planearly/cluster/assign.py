"""The nearest centroid of every window of a corpus, a shard of windows at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from planearly import parallel
from planearly.cluster.embed import open_embeddings
from planearly.cluster.kmeans import assign
from planearly.engine.work import Advance, Executor, Work, shard_function, window_shards
from planearly.files import file_digest, read_array, write_array, write_chunks

_BLOCK = 1 << 16  # windows scored at once
_MOST_SHARDS = 4096
_SMALL = 1 << 29  # scores that one process computes in seconds


def assign_windows(embedded: Path, centroids: Path, out: Path, executor: Executor) -> np.ndarray:
    """Write ``out``, int32 ``[n]``: the nearest of the centroids for every row of embeddings.

    Args:
        embedded: folder of the embeddings.
        centroids: ``.npy`` file, float32 ``[k, dim]``.
    """
    n, k = len(open_embeddings(embedded)), len(read_array(centroids))
    rows = max(-(-n // (_MOST_SHARDS * _BLOCK)), -(-_SMALL // (k * _BLOCK))) * _BLOCK
    parts, made = out.parent / f"{out.stem}-parts", [file_digest(centroids), n, rows]
    item = {"embeddings": str(embedded), "centroids": str(centroids)}
    shards = window_shards(n, rows, item, made, parts,
                           lambda number: [parts / f"{number:05d}.npy"])
    executor.map(Work(f"assigning to {k} clusters", "windows", assign_shard, shards,
                      small=_SMALL / k, gpu=True))
    write_chunks(out, np.dtype("<i4"), (n,), (read_array(shard.made[0]) for shard in shards))
    shutil.rmtree(parts, ignore_errors=True)
    return read_array(out)


@shard_function
def assign_shard(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Assign the windows of one shard, a block at a time, in one thread."""
    points = open_embeddings(Path(item["embeddings"]))
    centroids = read_array(Path(item["centroids"]))
    nearest = []
    with parallel.one_thread():
        for start in range(item["start"], item["stop"], _BLOCK):
            stop = min(start + _BLOCK, item["stop"])
            nearest.append(assign(points[start:stop], centroids, _BLOCK))
            advance(stop - start)
    write_array(Path(item["to"][0]), np.concatenate(nearest))
    return {"windows": item["stop"] - item["start"]}
