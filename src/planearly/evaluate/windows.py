"""Loss of the windows of a corpus under a trained model, a shard of windows at a time."""

from __future__ import annotations

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from planearly import company, parallel
from planearly.data.dataset import TokenDataset
from planearly.engine import local
from planearly.engine.work import Advance, Executor, Work, shard_function, window_shards
from planearly.evaluate.perplexity import batch_tokens, forward_of, score
from planearly.files import file_digest, read_array, write_array
from planearly.model import outside
from planearly.model.outside import AnyModel, AnyShape

_TOKENS, _MOST_SHARDS = 1 << 18, 4096
_FEW = 1 << 16  # tokens that one process scores in seconds


def window_losses(dataset: TokenDataset, windows: np.ndarray, weights: Path, shape: AnyShape,
                  bf16: bool, folder: Path, executor: Executor) -> tuple[np.ndarray, float]:
    """Mean nats per token of each of some windows, scored alone.

    Args:
        weights: file of the model's weights.
        bf16: matrix products under bfloat16 autocast.
        folder: for what the shards hand over; it is removed at last.

    Returns:
        float64 ``[n]``; and the device-seconds that it took, where a core is a part of its machine.
    """
    n, rows = len(windows), max(_TOKENS // dataset.context, 1, -(-len(windows) // _MOST_SHARDS))
    item = {"dataset": str(dataset.path), "windows": str(folder / "windows.npy"), "bf16": bf16,
            "weights": str(weights), "digest": file_digest(weights), "shape": shape.to_dict()}
    write_array(folder / "windows.npy", windows)
    made = [dataset.meta["key"], item["digest"], item["shape"], bf16, rows,
            file_digest(folder / "windows.npy")]
    lengths = dataset.windows["length"]
    shards = window_shards(
        n, rows, item, made, folder, lambda number: [folder / f"{number:05d}.npy"],
        lambda start, stop: float(lengths[windows[start:stop]].sum()))
    began, had = time.monotonic(), company.device_time()
    counts = executor.map(Work("scoring windows", "tokens", score_shard, shards, small=_FEW,
                               gpu=True))
    found = np.concatenate([np.empty(0), *(read_array(shard.made[0]) for shard in shards)])
    _model.cache_clear()
    shutil.rmtree(folder, ignore_errors=True)
    # of cores a process counts its own; of GPUs what others had is taken off here
    part = ((company.device_time() - had) / (time.monotonic() - began)
            if parallel.device().type == "cuda" else 1.0)
    return found, sum(each["seconds"] for each in counts) * part


@shard_function
def score_shard(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Score the windows of one shard, on the CPU in one thread."""
    began = time.monotonic()
    dataset = TokenDataset(Path(item["dataset"]))
    windows = read_array(Path(item["windows"]))[item["start"]:item["stop"]]
    lengths = dataset.windows["length"][windows].astype(np.int64)
    with parallel.one_thread():
        model = _model(item["weights"], item["digest"], json.dumps(item["shape"]))
        nll = score(forward_of(model, item["bf16"]),
                    lambda ids: dataset.rows([windows[i:i + 1] for i in ids]), lengths,
                    batch_tokens(dataset.meta["vocab_size"]), advance)
    sums = np.add.reduceat(nll, np.cumsum(lengths) - lengths, dtype=np.float64)
    write_array(Path(item["to"][0]), sums / lengths)
    share = 1.0 if parallel.device().type == "cuda" else 1 / local.cores()
    return {"windows": len(windows), "seconds": (time.monotonic() - began) * share}


@functools.lru_cache(maxsize=1)
def _model(weights: str, content: str, shape: str) -> AnyModel:
    """The model of a shard, loaded once in a process."""
    model = outside.with_weights(outside.shape_of(json.loads(shape)), Path(weights))
    return model.to(parallel.device())
