"""Selectors against their definitions, written out plainly."""

import functools
import math
import re
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import files, keys
from planearly.cluster import embed, neighbours, select
from planearly.cluster.select import Hasher
from planearly.data.pack import pack_rows
from planearly.data.text import found_words
from planearly.engine.local import Local
from planearly.stages import selection

SEA = "The ship, a sail and the wave; the anchor!"
FARM = "The cow and the plough. A field of wheat?"


def buckets(hasher: Hasher, text: str) -> Counter:
    grams, _ = hasher([text])
    return Counter(grams.tolist())


def test_features_are_lower_case_words_and_pairs_of_them():
    hasher = Hasher(1 << 40)
    words = ["the", "ship", ",", "a", "sail"]
    found = buckets(hasher, "The ship, a SAIL")
    assert sum(found.values()) == 5 + 4
    one = {w: buckets(hasher, w) for w in words}
    assert all(len(c) == 1 for c in one.values()) and len({*map(str, one.values())}) == 5
    pairs = [buckets(hasher, f"{a} {b}") - one[a] - one[b]
             for a, b in pairwise(words)]
    assert found == sum(one.values(), Counter()) + sum(pairs, Counter())
    assert buckets(hasher, "a sail") != buckets(hasher, "sail a")  # a pair has an order


@pytest.mark.parametrize("text, words", [
    ("हिन्दी में", ["हिन्दी", "में"]), ("naïve cafe\u0301", ["naïve", "cafe\u0301"]),
    ("ශ්\u200dරී ලංකා", ["ශ්\u200dරී", "ලංකා"]), ("می\u200cخواهم", ["می\u200cخواهم"]),
    ("x² ½", ["x²", "½"]), ("นักเรียนอ่านหนังสือที่ดี", ["นักเรียน", "อ่าน", "หนังสือ", "ที่", "ดี"]),
    ("ພາສາລາວ", ["ພາສາ", "ລາວ"]), ("ភាសា\u200bខ្មែរ", ["ភាសា", "ខ្មែរ"]),
    ("我们在iPhone手机", ["我们", "在", "iphone", "手机"]),
    ("ラーメンを食べる", ["ラーメン", "を", "食べる"])])
def test_words_of_other_scripts_are_words(text, words):
    hasher = Hasher(1 << 40)
    singles = sum((buckets(hasher, "") + Counter([int(select.mix(np.array(
        [hasher._hash(word)], np.uint64))[0] % np.uint64(1 << 40))]) for word in words), Counter())
    assert singles <= buckets(hasher, text)
    assert buckets(hasher, text).total() == 2 * len(words) - 1


CHARACTERS = ["นั", "ก", "เ", "รี", "ย", "น", "ที่", "ດີ", "ມື້", "ភា", "ខ្", "မြ", "န်", "हि", "न्", "दी",
              "中", "文", "カ\u3099", "ラ", "ー", "a", "e\u0301", " ", "-", "'", "。", "7"]


@examples(200)
@given(st.lists(st.sampled_from(CHARACTERS)))
def test_no_word_begins_inside_a_character_and_nothing_is_lost(characters):
    text = "".join(characters)
    words = found_words(select._WORDS, text)
    assert "".join(words) == "".join(text.split())
    if " " not in text:
        starts = {0, *np.cumsum([len(word) for word in words]).tolist()}
        assert starts <= {0, *np.cumsum([len(one) for one in characters]).tolist()}


def test_no_pair_crosses_two_texts_and_empty_texts_have_none():
    hasher = Hasher()
    grams, text = hasher(["ship sail", "", "cow field", "wheat"])
    assert np.bincount(text, minlength=4).tolist() == [3, 0, 3, 1]
    for i, alone in enumerate(["ship sail", "", "cow field", "wheat"]):
        assert Counter(grams[text == i].tolist()) == buckets(Hasher(), alone)


def test_features_do_not_depend_on_what_came_before():
    one, other = Hasher(), Hasher()
    other([FARM, "something else"])
    assert buckets(one, SEA) == buckets(other, SEA)


def test_dsir_is_its_published_definition(monkeypatch):
    """Log weight: sum over n-grams of ln p_domain - ln p_generic (Xie et al. 2023, section 3)."""
    rng = np.random.default_rng(0)
    vocabulary = re.findall(r"\w+", (SEA + FARM).lower())
    texts = [" ".join(rng.choice(vocabulary, rng.integers(0, 12))) for _ in range(30)]
    own = [" ".join(rng.choice(vocabulary[:8], 9)) for _ in range(5)]
    hasher = Hasher()
    counts = [buckets(hasher, t) for t in texts]
    candidates = np.array([i for i in range(30) if i % 7])

    def frequency(bags):
        total = sum(bags, Counter())
        return {b: n / sum(total.values()) for b, n in total.items()}

    p = frequency([buckets(hasher, t) for t in own])
    q = frequency([counts[i] for i in candidates])
    weight = {i: sum(n * (math.log(p.get(b, 0) + 1e-8) - math.log(q.get(b, 0) + 1e-8))
                     for b, n in counts[i].items()) for i in candidates.tolist()}
    noise = np.random.default_rng(3).gumbel(size=len(candidates))
    score = {i: w + g for (i, w), g in zip(weight.items(), noise, strict=True)}
    expected = sorted(score, key=lambda i: -score[i])[:10]
    monkeypatch.setattr(select, "BLOCK", 4)  # blocks change nothing
    found = select.dsir(lambda ids: [texts[i] for i in ids], candidates,
                        lambda ids: [own[i] for i in ids], np.arange(5), np.ones(30), 10, seed=3)
    assert found.tolist() == expected


def test_gumbel_top_k_resamples_without_replacement():
    """The first window taken has the probabilities of the importance weights."""
    texts = ["ship", "cow"]
    firsts = Counter(
        int(select.dsir(lambda ids: [texts[i] for i in ids], np.arange(2),
                        lambda ids: ["ship ship ship cow"] * len(ids), np.arange(1), np.ones(2), 1,
                        seed)[0]) for seed in range(2000))
    # the domain has unigrams ship .75, cow .25 among 7 n-grams; the generic corpus .5 each
    ratio = (3 / 7) / (1 / 7)
    assert firsts[0] / 2000 == pytest.approx(ratio / (1 + ratio), abs=4 * (0.19 / 2000) ** 0.5)


@examples(40)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), m=st.integers(1, 6),
       share=st.floats(0.05, 1.0))
def test_neighbours_come_rank_by_rank(seed, n, m, share):
    rng = np.random.default_rng(seed)
    points, own = (x / np.linalg.norm(x, axis=1, keepdims=True)
                   for x in (rng.normal(size=(n, 5)), rng.normal(size=(m, 5))))
    points, own = points.astype(np.float32), own.astype(np.float32)
    size = rng.uniform(0.1, 1.0, n)
    candidates = np.flatnonzero(rng.random(n) < 0.8)
    if not len(candidates):
        return
    need = share * size[candidates].sum()
    cosine = own @ points[candidates].T
    ranked = np.argsort(-cosine, 1)
    expected, filled, last = [], 0.0, 0
    for rank in range(len(candidates)):
        pairs = sorted((-cosine[j, ranked[j, rank]], ranked[j, rank]) for j in range(m))
        for _, i in pairs:
            window = int(candidates[i])
            if window not in expected and filled < need:
                expected.append(window)
                filled += size[window]
                last = rank + 1
    found, ranks = select.neighbours(candidates, own, size, need,
                                     functools.partial(select.nearest, points))
    assert found.tolist() == expected
    assert ranks == last


def test_neighbours_over_blocks_are_the_same(monkeypatch):
    rng = np.random.default_rng(1)
    points, own = rng.normal(size=(50, 6)), rng.normal(size=(4, 6))
    arguments = (np.arange(3, 50), own, np.ones(50), 17.0,
                 functools.partial(select.nearest, points))
    whole = select.neighbours(*arguments)
    monkeypatch.setattr(select, "BLOCK", 8)
    parts = select.neighbours(*arguments)
    assert whole[0].tolist() == parts[0].tolist() and whole[1] == parts[1]


def test_neighbours_over_shards_are_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    points, own = rng.normal(size=(90, 6)).astype("f2"), rng.normal(size=(4, 6)).astype("f2")
    for i in range(3):
        files.write_array(embed._part(tmp_path / "blocks", i), points[40 * i:40 * i + 40])
    files.write_json(tmp_path / "blocks" / "embeddings.json",
                     {"windows": 90, "rows": 40, "dim": 6})
    candidates = np.flatnonzero(rng.random(90) < 0.8)
    whole = select.nearest(points, candidates, own, 11)
    expected = np.argsort(-(own.astype(float) @ points[candidates].T.astype(float)), 1)[:, :11]
    assert whole[0].tolist() == expected.tolist()
    monkeypatch.setattr(neighbours, "_SMALL", 0)
    for rows, workers in ((10, 1), (16, 2), (1000, 1)):
        monkeypatch.setattr(neighbours, "_ROWS", rows)
        found = neighbours.nearest_windows(tmp_path / "blocks", candidates, own, 11,
                                           tmp_path / "parts", Local(workers))
        assert found[0].tolist() == whole[0].tolist() and found[0].dtype == np.int64
        assert found[1].tolist() == whole[1].tolist()
    assert not (tmp_path / "parts").exists()


def test_more_neighbours_than_there_are_is_all_of_them():
    points = np.eye(6, dtype=np.float32)
    found, ranks = select.neighbours(np.array([4, 1, 5]), points[:2], np.ones(6), 99.0,
                                     functools.partial(select.nearest, points))
    assert sorted(found.tolist()) == [1, 4, 5] and ranks == 3


def test_a_linear_head_is_the_regression_that_weighs_both_sets_alike():
    rng = np.random.default_rng(0)
    own, others = rng.normal(0.4, 1, (12, 4)), rng.normal(0, 1, (50, 4)).astype("f2")
    w = torch.tensor(select.separating(own, others, penalty=0.7), requires_grad=True)

    def loss(b):
        margins = torch.tensor(own) @ w + b, -(torch.tensor(others.astype(float)) @ w + b)
        means = [torch.log1p(torch.exp(-margin)).mean() for margin in margins]
        return 0.35 * (w @ w) + 62 / 2 * (means[0] + means[1])

    with torch.no_grad():
        bias = min(np.linspace(-3, 3, 60_001)[::100], key=lambda b: loss(float(b)).item())
        bias = min(np.linspace(bias - 0.02, bias + 0.02, 401), key=lambda b: loss(float(b)).item())
    loss(float(bias)).backward()
    assert w.grad.abs().max() < 0.02 < w.detach().norm()


def test_a_linear_head_takes_what_looks_like_the_domain(monkeypatch):
    rng = np.random.default_rng(1)
    domain = rng.random(90) < 0.3
    points, own = rng.normal(0, 0.3, (90, 6)).astype("f2"), rng.normal(0, 0.3, (20, 6)).astype("f2")
    points[domain, 0] += 1
    own[:, 0] += 1
    candidates, size = np.flatnonzero(rng.random(90) < 0.8), np.full(90, 0.5)
    told = []
    found = select.linear(points, candidates, own, size, 8.0, 0, told.append)
    assert len(found) == 16 and set(found) < set(candidates) and sum(told) == len(candidates)
    assert domain[found].mean() > 0.9 > 2 * domain[candidates].mean()
    score = points[candidates].astype(float) @ select.separating(own, points[candidates])
    assert found.tolist() == candidates[np.argsort(-score, kind="stable")][:16].tolist()
    monkeypatch.setattr(select, "BLOCK", 7)
    assert select.linear(points, candidates, own, size, 8.0, 0).tolist() == found.tolist()
    monkeypatch.setattr(select, "_FIT_WINDOWS", 15)
    fewer = [select.linear(points, candidates, own, size, 8.0, seed).tolist() for seed in (0, 0, 1)]
    assert fewer[0] == fewer[1] and domain[fewer[2]].mean() > 0.8


def test_enough_stops_at_the_window_that_fills_it():
    size = np.array([0.5, 1.0, 0.25, 1.0])
    assert select.enough(np.array([3, 0, 1, 2]), size, 1.5).tolist() == [3, 0]
    assert select.enough(np.array([3, 0, 1, 2]), size, 1.6).tolist() == [3, 0, 1]
    assert select.enough(np.array([3, 0]), size, 99).tolist() == [3, 0]


def test_most_frequent_counts_windows_by_what_they_fill():
    assert select.most_frequent(np.array([1, 1, 2]), np.array([0.2, 0.2, 1.0]), 4) == 2


def test_a_selection_packs_like_any_grouping():
    made = select.chosen(5, np.array([3, 1]))
    rows = pack_rows(np.array([4, 8, 4, 2, 8]), made.groups, len(made.weights), 8, seed=0)
    assert sorted(rows.windows.tolist()) == [1, 3]


@pytest.mark.parametrize(("planned", "available", "rows"), [
    (400, 10_000, 100),  # four passes over what is selected
    (400, 120, 60),  # at most half of the corpus
    (400, 40, 25),  # but no more than sixteen passes
    (400, 20, 20),  # all there is
])
def test_how_much_is_selected(monkeypatch, planned, available, rows):
    monkeypatch.setattr(selection, "generic_rows", lambda recipe: planned)
    run = SimpleNamespace(recipe=keys.Recipe())
    assert selection.needed(run, available) == rows
