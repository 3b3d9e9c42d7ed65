"""Embeddings, clusters and scores of a corpus are the same bytes, by one process or several."""

from pathlib import Path

import numpy as np
import pytest

from planearly import files, keys
from planearly.cluster import assign, embed, kmeans, ngrams, select
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.inputs import resolve
from planearly.engine.local import Local
from small_models import sentence_model
from small_runs import TOPICS, corpus


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> tuple[TokenDataset, tk.Opened]:
    root = corpus(tmp_path_factory.mktemp("text"))
    units = resolve([str(root / "generic.jsonl")])
    tk.build(keys.Tokenizer(vocab_size=320), keys.Data(), units, root / "tokenizer")
    tokenize_corpus(units, root / "tokenizer", 16, keys.Data(), root / "tokens")
    return TokenDataset(root / "tokens"), tk.opened(root / "tokenizer")


def clustered(dataset, embedder: embed.Embedder, out: Path, executor) -> dict[str, bytes]:
    points = embed.embed_dataset(*dataset, embedder, out / "blocks", executor=executor)
    files.write_array(out / "centroids.npy", kmeans.fit(points, 5, seed=1))
    found = assign.assign_windows(out / "blocks", out / "centroids.npy", out / "assignment.npy",
                                  executor)
    assert np.array_equal(found, kmeans.assign(points, files.read_array(out / "centroids.npy")))
    some, gain = np.arange(0, len(points), 3), np.random.default_rng(0).normal(size=select.BUCKETS)
    weights = ngrams.weigh_windows(*dataset, some, gain, out / "parts", executor)
    assert np.array_equal(weights, select.log_weights(
        select.Hasher(), lambda ids: dataset[0].texts(ids, dataset[1].tokenizer), some, gain))
    files.write_array(out / "weights.npy", weights)
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(embed, "_FEW", 0)
    monkeypatch.setattr(embed, "_BLOCK", 500)
    monkeypatch.setattr(assign, "_SMALL", 1)
    monkeypatch.setattr(assign, "_BLOCK", 700)
    monkeypatch.setattr(ngrams, "_FEW", 0)
    monkeypatch.setattr(ngrams, "_ROWS", 300)


@pytest.mark.slow
def test_two_processes_make_the_same(dataset, tmp_path, small_shards):
    words = [word for topic in TOPICS.values() for word in topic.split()]
    embedder = embed.load_embedder(str(sentence_model(tmp_path / "embedder", words)))
    one = clustered(dataset, embedder, tmp_path / "one", Local(1))
    assert clustered(dataset, embedder, tmp_path / "two", Local(2)) == one
    assert len([name for name in one if "part-" in name]) > 3
    assert {name for name in one if "part-" not in name} == {
        "blocks/embeddings.json", "centroids.npy", "assignment.npy", "weights.npy"}
