"""benchmarks/sources.py: the pools that recipes/study-inside, -tenth and -outside.yaml read."""

import importlib.util
import json
from pathlib import Path

import pytest

from planearly.errors import UserError

SCRIPT = Path(__file__).parents[1] / "benchmarks/sources.py"


@pytest.fixture(scope="module")
def sources():
    spec = importlib.util.spec_from_file_location("sources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def pool(tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(
        json.dumps({"text": f"{name} number {i}, and a few more words", "source": name}) + "\n"
        for i in range(60) for name in ("law", "tides", "tea")))
    return file


def test_a_domains_documents_are_in_neither_pool_and_its_source_in_one(sources, pool, tmp_path):
    sources.divide([str(pool)], ["law", "tides"], 700, 0, tmp_path / "out")
    whole = set(texts(pool))
    inside, outside = (texts(tmp_path / f"out/{arm}/part-00.jsonl")
                       for arm in ("inside", "outside"))
    taken = []
    for name in ("law", "tides"):
        parts = {split: texts(tmp_path / f"out/domains/{name}/{split}.jsonl")
                 for split in ("train", "valid", "test")}
        sizes = {split: sum(map(len, part)) for split, part in parts.items()}
        assert all(text.startswith(name) for part in parts.values() for text in part)
        assert 700 <= sum(sizes.values()) < 750
        assert all(abs(sizes[s] - share * 700) <= 45 for s, share in sources.SPLITS.items())
        taken += [text for part in parts.values() for text in part]
    assert len(taken) == len(set(taken))
    assert sorted(inside) == sorted(whole - set(taken))
    assert sorted(outside) == sorted(text for text in whole if text.startswith("tea"))


def test_a_share_of_a_source_stays_in_a_pool_of_its_own(sources, pool, tmp_path):
    sources.divide([str(pool)], ["law", "tides"], 700, 0, tmp_path / "out", keep=[0.7, 0.3])
    inside, most, some, outside = (set(texts(tmp_path / f"out/{arm}/part-00.jsonl"))
                                   for arm in ("inside", "kept-0.7", "kept-0.3", "outside"))
    assert outside < some < most < inside
    rest = len(inside) - len(outside)
    assert 0.5 < (len(most) - len(outside)) / rest < 0.9
    assert 0.1 < (len(some) - len(outside)) / rest < 0.5


def test_another_seed_takes_others_and_the_same_the_same(sources, pool, tmp_path):
    found = [sources.taken([str(pool)], ["law"], 700, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0] != found[2]


@pytest.mark.parametrize("name,why", [("lawn", "has 0 characters"), ("law", "twice --characters")])
def test_a_source_that_is_too_small_is_one_sentence(sources, pool, tmp_path, name, why):
    with pytest.raises(UserError, match=why):
        sources.divide([str(pool)], [name], 2000, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
