"""A limit of tokens: a fair sample, exact, whatever the files."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest

from planearly import keys
from planearly.data import build, documents, shards, subset
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.documents import Unit
from planearly.data.inputs import resolve
from small_datasets import CONTEXT, make, prose, write


def windows_of(dataset: TokenDataset) -> list[tuple[int, ...]]:
    return [tuple(dataset.tokens(w).tolist()) for w in range(len(dataset))]


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_the_lowest_ranks_are_those_of_a_sort_of_all(tmp_path, corpus, tokenizer, monkeypatch,
                                                     bits):
    monkeypatch.setattr(build, "_BINS", bits)
    write(corpus / "a.jsonl", [prose(i, 5) for i in range(60)])
    whole = make(corpus, tokenizer, tmp_path / "whole", 64)
    ranks = subset.Subset(0, 1.0).rank(whole.documents["hash"], Unit("a", "lines"))
    tokens = np.bincount(whole.windows["document"].astype(int), whole.windows["length"])
    for limit in (1, 40, 700):
        part = make(corpus, tokenizer, tmp_path / str(limit), 64, max_tokens=limit)
        order = np.argsort(ranks)
        many = int(np.searchsorted(np.cumsum(tokens[order]), limit)) + 1
        assert set(part.documents["hash"]) == set(whole.documents["hash"][order[:many]])


@pytest.mark.parametrize("limit", [1, 17, 100, 333, 10**9])
def test_a_limit_of_tokens_is_exact_and_a_larger_one_gives_a_superset(
        tmp_path, corpus, tokenizer, monkeypatch, limit):
    monkeypatch.setattr(documents, "_GROUP", 500)
    monkeypatch.setattr(shards, "_BATCH", 200)
    for name in "abc":
        write(corpus / f"{name}.jsonl", [prose(ord(name) * 100 + i, 12) for i in range(8)] * 2)
    whole = make(corpus, tokenizer, tmp_path / "whole", 64)
    part = make(corpus, tokenizer, tmp_path / "part", 64, max_tokens=limit)
    assert part.meta["n_tokens"] == min(limit, whole.meta["n_tokens"])
    assert set(part.documents["hash"]) <= set(whole.documents["hash"])
    assert part.meta["read"] == 48 == (
        part.meta["n_documents"] + part.meta["duplicates"] + part.meta["left_out"])
    full = {w[1:] for w in windows_of(whole)}
    broken = [w for w in windows_of(part) if w[1:] not in full]
    assert len(broken) <= 1 and all(any(f[:len(w) - 1] == w[1:] for f in full) for w in broken)
    loaded = tk.load(tokenizer)
    for document in range(len(part.documents)):
        text = "".join(part.texts(np.flatnonzero(part.windows["document"] == document), loaded))
        if "\ufffd" not in text:
            assert part.documents["bytes"][document] == len(text.encode())
    more = make(corpus, tokenizer, tmp_path / "more", 64, max_tokens=limit + 150)
    assert set(part.documents["hash"]) <= set(more.documents["hash"])


def test_a_limit_is_a_fair_sample_whatever_the_files(tmp_path, tokenizer, monkeypatch):
    texts = [f"{source} {prose(i)}" for source in ("a", "b") for i in range(400)]
    tokenized = []
    real = shards.run_job

    def run_job(job, advance):
        counts = real(job, advance)
        tokenized.append(counts["documents"])
        return counts

    monkeypatch.setattr(shards, "run_job", run_job)
    monkeypatch.setattr(subset, "_BYTES_PER_TOKEN", 3)
    found = {}
    for name, cuts in (("one", [0, 800]), ("many", [*range(0, 801, 50)])):
        folder = tmp_path / name
        folder.mkdir()
        for i, (start, stop) in enumerate(pairwise(cuts)):
            packed = "".join(json.dumps({"text": t}) + "\n" for t in texts[start:stop]).encode()
            place = folder / f"{i:03d}.jsonl"
            if i % 2:
                place = place.with_suffix(".jsonl.gz")
                packed = gzip.compress(packed)
            place.write_bytes(packed)
        found[name] = make(folder, tokenizer, tmp_path / f"{name}-out", max_tokens=3_000)
    assert windows_of(found["one"]) == windows_of(found["many"])
    assert tokenized[0] < 400  # not all of it was tokenized for a sample
    shares = [sum(t.startswith(s) for t in found["one"].texts(
        np.arange(len(found["one"])), tk.load(tokenizer))) for s in ("a ", "b ")]
    assert min(shares) > 0.3 * sum(shares)
    monkeypatch.setattr(subset, "_BYTES_PER_TOKEN", 0.02)  # too few at first: more is drawn
    tokenized.clear()
    short = make(tmp_path / "one", tokenizer, tmp_path / "short", max_tokens=3_000)
    assert len(tokenized) > 1 and tokenized[0] < 10
    assert windows_of(short) == windows_of(found["one"])


def test_of_a_large_dataset_on_the_hub_a_part_is_read(tmp_path, tokenizer, monkeypatch):
    local = write(tmp_path / "a.jsonl", [f"local {prose(i)}" for i in range(300)])
    read = []

    def records(unit, columns):
        for i in range(100_000):
            read.append(i)
            yield {"text": f"hub {unit.shard[0]} {prose(i)}"}

    monkeypatch.setattr("planearly.data.hub.records", records)
    size = local.stat().st_size
    units = [*resolve([str(local)]), *(Unit("hf://x", "hub", 50 * size, 0, (i, 2))
                                       for i in range(2))]
    tokenize_corpus(units, tokenizer, CONTEXT, keys.Data(), tmp_path / "out", max_tokens=6_000)
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.meta["n_tokens"] == 6_000 and len(read) < 10_000
    units_of = np.bincount(dataset.documents["unit"], minlength=3)
    assert units_of[0] < 10 and units_of[1:].min() > 0.3 * units_of.sum()


def test_a_part_of_many_shards_is_heads_of_some_worth_opening():
    def units(shards, size):
        return [Unit("hf://x", "hub", size, shard=(i, shards)) for i in range(shards)]

    def heads(units, tokens):
        part = subset.subset(units, tokens)
        return {unit.shard[0]: size for unit in units if (size := part.most(unit)) is not None}

    many, few = units(20_000, 600_000_000), units(20, 600_000_000)
    for tokens, opened in ((1_000_000, 64), (10_000_000, 64), (1_000_000_000, 2_000)):
        found = heads(many, tokens)
        assert len(found) == opened
        assert sum(found.values()) == pytest.approx(32 * tokens)
        assert max(found) > 19_000 and min(found) < 1_000  # of all parts of the corpus
    assert heads(many, 10_000_000).keys() <= heads(many, 1_000_000_000).keys()
    assert len(heads(few, 1_000_000)) == 20  # of few shards every one
    assert len(heads(units(20_000, 1_000), 10_000)) == 320  # small ones are not asked for more
    assert max(heads(units(20_000, 1_000), 10_000).values()) <= 1_000
