"""Memory of the data stages: of a block, and not of the corpus."""

import json
import sys
import tracemalloc

import numpy as np
import pytest

from planearly import files, keys
from planearly.cluster import assign, embed, neighbours, select
from planearly.data import build, documents, domains, duplicates, limit, overlap, pack, shards
from planearly.data import tokenizer as tk
from planearly.data.dataset import TokenDataset
from planearly.data.inputs import resolve
from planearly.engine.local import Local

WORDS = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"],
                 object)
DIM = 16


def write(path, megabytes: float, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    with open(path, "w") as handle:
        written = 0
        while written < megabytes * 1e6:
            written += handle.write(json.dumps(
                {"text": " ".join(WORDS[rng.integers(0, len(WORDS), 60)])}) + "\n")


class Letters(embed.Embedder):
    """Counts of the letters of a text's end: quick, and without weights."""

    def __init__(self) -> None:
        super().__init__("letters", "letters", lambda: self.vectors)

    @staticmethod
    def vectors(texts):
        ends = np.array([list(text[-40:].rjust(40).encode()[-40:]) for text in texts], np.int64)
        return np.stack([(ends % DIM == i).sum(1) + 0.1 for i in range(DIM)], 1).astype(np.float32)


@pytest.fixture
def names():
    """Python's table of interned names, with room: it grows by megabytes at once, whoever adds the
    name that fills it."""
    kept, before = [], 0
    tracemalloc.start()
    while (peak := tracemalloc.get_traced_memory()[1]) - before < 1_000_000:
        kept.append(sys.intern(f"name {len(kept)}"))
        before = peak
    tracemalloc.stop()
    return kept


@pytest.fixture
def small_blocks(monkeypatch):
    for module, name, size in (
            (documents, "_GROUP", 50_000), (shards, "_BATCH", 1 << 16), (build, "_CHUNK", 512),
            (duplicates, "_RANGE", 512), (overlap, "_CHUNK", 256), (overlap, "_SHARD", 1024),
            (pack, "_RANGE", 512), (embed, "_BLOCK", 64), (embed, "_STATIC_ROWS", 512),
            (assign, "_BLOCK", 512), (embed, "_LOOKED_AT", 4), (select, "BLOCK", 64),
            (neighbours, "BLOCK", 64), (neighbours, "_ROWS", 512), (limit, "_RANKED", 512)):
        monkeypatch.setattr(module, name, size)


@pytest.mark.slow
def test_peaks_do_not_grow_with_the_corpus(tmp_path, small_blocks, names):
    """Eight times the text: what a stage needs stays, but for a few bytes a document or window."""
    write(tmp_path / "held.jsonl", 0.02, seed=1)
    tokenizer = tk.train([" ".join(WORDS)] * 3, keys.Tokenizer(vocab_size=800))
    tk.save(tokenizer, tmp_path / "tok")
    by, here, embedder = tk.opened(tmp_path / "tok"), Local(1), Letters()
    held = tmp_path / "held"
    build.tokenize_corpus(resolve([str(tmp_path / "held.jsonl")]), tmp_path / "tok", 64,
                          keys.Data(), held)
    rng = np.random.default_rng(0)
    centroids = rng.normal(size=(64, DIM)).astype(np.float32)
    own = rng.normal(size=(4, DIM)).astype(np.float32)

    def peaks(megabytes: float) -> tuple[dict[str, int], int]:
        out = tmp_path / f"{megabytes:g}"
        out.mkdir()
        write(out / "text.jsonl", megabytes)
        units = resolve([str(out / "text.jsonl")])
        files.write_array(out / "centroids.npy", centroids)

        def overlapping():
            mask, *_ = overlap.held_out_overlap(TokenDataset(out / "tokens"), [TokenDataset(held)],
                                                out / "parts", here)
            files.write_array(out / "excluded.npy", mask)

        steps = {
            "split": lambda: domains.hold_out(units, ["valid"], "text", keys.Data(), 0,
                                              out / "parts", here),
            "tokenize": lambda: build.tokenize_corpus(units, tmp_path / "tok", 64, keys.Data(),
                                                      out / "tokens", executor=here),
            "limit": lambda: build.tokenize_corpus(units, tmp_path / "tok", 64, keys.Data(),
                                                   out / "limited", max_tokens=5_000,
                                                   executor=here),
            "overlap": overlapping,
            "held out": lambda: limit.documents_up_to(
                TokenDataset(out / "tokens"), ~files.read_array(out / "excluded.npy"), 2_000, 0),
            "embed": lambda: embed.embed_dataset(TokenDataset(out / "tokens"), by, embedder,
                                                 out / "blocks", executor=here),
            "assign": lambda: assign.assign_windows(out / "blocks", out / "centroids.npy",
                                                    out / "assigned.npy", here),
            "pack": lambda: pack.pack_corpus(TokenDataset(out / "tokens"), out / "groups.npy",
                                             out / "excluded.npy", 400, 0, out / "rows", here),
            "neighbours": lambda: neighbours.nearest_windows(
                out / "blocks", np.arange(len(TokenDataset(out / "tokens"))), own, 5,
                out / "parts", here)}
        found = {}
        for name, step in steps.items():
            if name == "pack":  # groups of one size: the largest is what packing holds
                n = len(TokenDataset(out / "tokens"))
                files.write_array(out / "groups.npy", np.arange(n) // 64)
            tracemalloc.start()
            step()
            found[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found, len(TokenDataset(out / "tokens"))

    peaks(0.03)  # what is loaded once
    (small, few), (large, many) = peaks(0.1), peaks(0.8)
    assert many > 7 * few
    # bytes per window: the split's hashes, all windows' numbers, and shards in the leader's list,
    # of which there are four thousand at most and here one for every 512 windows
    more = {"split": 16, "neighbours": 40, "pack": 64, "embed": 64}
    grown = {name: (small[name], large[name]) for name in small
             if large[name] > 1.25 * small[name] + (many - few) * more.get(name, 8)}
    assert not grown, (grown, few, many)
