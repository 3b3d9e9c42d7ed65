"""DSIR's log weights of the windows of a corpus, a shard of windows at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from planearly.cluster.select import Hasher, log_weights
from planearly.data.dataset import TokenDataset
from planearly.data.tokenizer import Opened, opened
from planearly.engine.work import Advance, Executor, Work, shard_function, window_shards
from planearly.files import file_digest, read_array, write_array

_ROWS, _MOST_SHARDS = 1 << 14, 4096
_FEW = 50_000.0  # windows that one process weighs in seconds


def weigh_windows(dataset: TokenDataset, tokenizer: Opened, windows: np.ndarray, gain: np.ndarray,
                  folder: Path, executor: Executor) -> np.ndarray:
    """:func:`planearly.cluster.select.log_weights` of these windows, float64 ``[n]``.

    Args:
        folder: for what the shards hand over; it is removed at last.
    """
    n, rows = len(windows), max(_ROWS, -(-len(windows) // _MOST_SHARDS))
    item = {"dataset": str(dataset.path), "tokenizer": str(tokenizer.folder),
            "windows": str(folder / "windows.npy"), "gain": str(folder / "gain.npy")}
    write_array(folder / "windows.npy", windows)
    write_array(folder / "gain.npy", gain)
    made = [dataset.meta["key"], tokenizer.digest, rows,
            *(file_digest(Path(item[name])) for name in ("windows", "gain"))]
    shards = window_shards(n, rows, item, made, folder,
                           lambda number: [folder / f"{number:05d}.npy"])
    executor.map(Work("weighing n-grams", "windows", weigh_shard, shards, small=_FEW))
    found = np.concatenate([np.empty(0), *(read_array(shard.made[0]) for shard in shards)])
    shutil.rmtree(folder, ignore_errors=True)
    return found


@shard_function
def weigh_shard(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Weigh the windows of one shard, a block at a time."""
    dataset = TokenDataset(Path(item["dataset"]))
    tokenizer = opened(Path(item["tokenizer"])).tokenizer
    windows = read_array(Path(item["windows"]))[item["start"]:item["stop"]]
    write_array(Path(item["to"][0]), log_weights(
        Hasher(), lambda ids: dataset.texts(ids, tokenizer), windows,
        read_array(Path(item["gain"]), mapped=False), advance))
    return {"windows": len(windows)}
