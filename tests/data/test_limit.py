"""Windows of whole documents up to a number of tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planearly.data import limit
from planearly.data.sample import mix
from small_datasets import make, prose, write


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    texts = [prose(i, 1 + i % 60) for i in range(200)]
    return make(write(folder / "texts.jsonl", texts), tokenizer, folder / "tokens")


def test_windows_up_to_a_limit_are_nested_and_whole(dataset):
    allowed = np.ones(len(dataset.documents), bool)
    small, large = (limit.documents_up_to(dataset, allowed, n, 0) for n in (500, 2000))
    assert set(small) < set(large)
    tokens = dataset.windows["length"][small].sum()
    assert 500 <= tokens < 500 + dataset.context
    assert len(limit.documents_up_to(dataset, allowed, None, 0)) == len(dataset)
    # whole documents have all their bytes, parts their share
    assert limit.text_bytes(dataset, np.arange(len(dataset))) == dataset.meta["n_bytes"]
    assert limit.text_bytes(dataset, small) < limit.text_bytes(dataset, large)


def test_windows_up_to_a_limit_are_those_of_a_sort_of_all(dataset, monkeypatch):
    allowed = np.random.default_rng(0).random(len(dataset.documents)) < 0.7
    document, length = dataset.windows["document"].astype(int), dataset.windows["length"]
    usable = np.flatnonzero(allowed[document])
    rank = np.argsort(np.argsort(mix(3, np.asarray(dataset.documents["hash"]))))
    order = usable[np.argsort(rank[document[usable]], kind="stable")]
    ends = np.cumsum(length[order].astype(int))
    for ranked, tokens in itertools.product((7, 1 << 18), (0, 1, 90, 1500, 4000, 10**9)):
        monkeypatch.setattr(limit, "_RANKED", ranked)
        found = limit.documents_up_to(dataset, allowed, tokens, 3)
        wanted = order[:int(np.searchsorted(ends, tokens)) + 1] if tokens else []
        assert found.tolist() == sorted(wanted)
        whole = np.bincount(document, length)
        share = np.bincount(document[found], length[found], len(whole)) / whole
        assert limit.text_bytes(dataset, found) == round(
            float((share * dataset.documents["bytes"]).sum()))
    assert limit.documents_up_to(dataset, allowed, None, 3).tolist() == usable.tolist()
