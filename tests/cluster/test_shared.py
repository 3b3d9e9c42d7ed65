"""A histogram as a file: read whole or refused in a sentence, and what noise on it hides and costs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planearly.cluster import shared
from planearly.cluster.histogram import divergence, smooth, smooth_counts
from planearly.errors import UserError

GOOD = shared.Shared({"name": "static", "digest": "e" * 64}, 7, {
    2: shared.Level("c" * 64, np.array([1.5, 0.1 + 0.2]), 2.5, 0.25),
    3: shared.Level("d" * 64, np.array([0.0, 1.0, 2.0]))})


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    place = tmp_path / "law.json"
    for made in (GOOD, shared.Shared(GOOD.embedder, 7, {
            3: shared.Level("d" * 64, np.array([-4.0, 1.0, 2.0]))}, 1.0, 2.0)):
        made.save(place)
        assert shared.is_shared(place)
        found = shared.load(place)
        assert (found.embedder, found.documents, found.epsilon, found.noise) == (
            made.embedder, made.documents, made.epsilon, made.noise)
        for k, level in made.levels.items():
            assert found.levels[k].counts.tobytes() == level.counts.tobytes()
            assert (found.levels[k].tau, found.levels[k].gain, found.levels[k].clusters) == (
                level.tau, level.gain, level.clusters)
    place.write_text('{"text": "a document"}')
    assert not shared.is_shared(place) and not shared.is_shared(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_that_another_tool_wrote_again_is_one(encoding: str, tmp_path: Path) -> None:
    place = tmp_path / "law.json"
    counts = np.arange(3000.0)  # more than the end of a file
    shared.Shared(GOOD.embedder, 7, {3000: shared.Level("c" * 64, counts)}).save(place)
    place.write_text("\r\n" + json.dumps(json.loads(place.read_text()), sort_keys=True, indent=1),
                     encoding)
    assert shared.is_shared(place) and (shared.load(place).levels[3000].counts == counts).all()
    place.write_text(json.dumps({"text": place.read_text(encoding)}), encoding)
    assert not shared.is_shared(place)


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a JSON object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) \
        if isinstance(value, list) else ()
    return [where, *(place for key, each in inner for place in places(each, (*where, key)))]


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**400), st.floats(),
    st.text(max_size=3), st.just([]), st.just({}), st.lists(st.floats(), max_size=3))


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), noise=st.booleans())
def test_whatever_stands_in_a_file_is_read_or_refused_in_a_sentence(
        data: st.DataObject, noise: bool, tmp_path: Path) -> None:
    made = shared.Shared(GOOD.embedder, 7, GOOD.levels, 1.0, 2.0) if noise else GOOD
    place = tmp_path / f"{noise}.json"
    if not place.with_suffix(".good").exists():
        made.save(place.with_suffix(".good"))
    content = json.loads(place.with_suffix(".good").read_text())
    where = data.draw(st.sampled_from(places(content)))
    odd = data.draw(ODD)
    if where:
        inner = content
        for key in where[:-1]:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[where[-1]] = odd
        else:
            del inner[where[-1]]
    else:
        content = odd
    place.write_text(json.dumps(content))
    try:
        found = shared.load(place)
    except UserError as error:
        assert "\n" not in str(error) and str(place) in str(error)
        return
    for k, level in found.levels.items():  # what is read can be weighed by
        generic = np.arange(1.0, k + 1)
        p = found.smoothed(k, generic).p
        assert len(level.counts) == k and np.isfinite(p).all() and (p >= 0).all()
        assert p.sum() == pytest.approx(1)


@pytest.mark.parametrize(("change", "says"), [
    ({"levels": {"2": {"clusters": "c", "counts": [1.0]}}}, "one count for each cluster"),
    ({"levels": {"2": {"clusters": "c", "counts": [1.0, math.nan]}}}, "no number, or negative"),
    ({"levels": {"2": {"clusters": "c", "counts": [1.0, -1.0]}}}, "no number, or negative"),
    ({"levels": {"2": {"clusters": "c", "counts": [0, 0]}}}, "counts nothing"),
    ({"levels": {"02": {"clusters": "c", "counts": [0, 1]}}}, "no number of clusters"),
    ({"levels": {"1": {"clusters": "c", "counts": [1], "tau": -1}}}, "tau of level 1"),
    ({"documents": 0}, "number of documents"), ({"documents": True}, "number of documents"),
    ({"noise": {"epsilon": 0, "scale": 1}}, "no positive epsilon"),
    ({"format": 2}, "its format is 2"),
    ({"embedder": {"name": "x"}}, "does not name the embedder")])
def test_bad_values_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    place = tmp_path / "law.json"
    GOOD.save(place)
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(UserError, match=says):
        shared.load(place)
    place.write_text(place.read_text()[:100])
    with pytest.raises(UserError, match="is not valid JSON"):
        shared.load(place)


# Noise -------------------------------------------------------------------------------------------

WINDOWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 16), st.integers(0, 4)), min_size=1,
                   max_size=30)


def counted(windows: list[tuple[int, int, int]]) -> np.ndarray:
    groups, tokens, documents = (np.array(each, np.int64) for each in zip(*windows, strict=True))
    return shared.bounded(groups, tokens, documents, 4, 16)


@settings(max_examples=200, deadline=None)
@given(windows=WINDOWS, other=WINDOWS)
def test_replacing_a_document_changes_the_counts_by_two_windows_at_most(
        windows: list[tuple[int, int, int]], other: list[tuple[int, int, int]]) -> None:
    changed = [w for w in windows if w[2] != 0] + [(group, n, 0) for group, n, _ in other]
    assert np.abs(counted(windows) - counted(changed)).sum() <= 2 * shared.MOST_WINDOWS * 16
    short = [w for w in windows if sum(n for _, n, d in windows if d == w[2]) <= 16]
    if short:  # what is within the bound counts as it is
        assert counted(short).sum() == sum(n for _, n, _ in short)


def test_the_noise_is_that_of_its_scale_and_of_whole_tokens() -> None:
    random = np.random.default_rng(0)
    drawn = shared.noisy(np.zeros(400_000, np.int64), 0.5, 16, random)
    scale = shared.scale(0.5, 16)
    assert scale == 2 * 16 / 0.5 and drawn.dtype == np.int64
    for times in (1, 2):  # P(|x| >= t) of the two-sided geometric distribution, exactly
        t, a = int(times * scale), math.exp(-1 / scale)
        assert (np.abs(drawn) >= t).mean() == pytest.approx(2 * a**t / (1 + a), rel=0.02)
    assert not np.array_equal(shared.noisy(np.zeros(50, np.int64), 0.5, 16),
                              shared.noisy(np.zeros(50, np.int64), 0.5, 16))


def test_noise_costs_less_the_more_documents_there_are_and_the_larger_epsilon() -> None:
    random = np.random.default_rng(0)
    generic = random.dirichlet(np.ones(64))
    p = random.dirichlet(np.full(64, 0.1))

    def cost(documents: int, epsilon: float) -> float:
        groups = random.choice(64, documents, p=p)
        tokens = np.full(documents, 16)
        exact = smooth(groups, tokens / 16, generic, documents=np.arange(documents)).p
        found = []
        for _ in range(10):
            counts = shared.noisy(shared.bounded(groups, tokens, np.arange(documents), 64, 16),
                                  epsilon, 16, random) / 16
            noise = shared.scale(epsilon, 16) / 16
            found.append(divergence(
                exact, smooth_counts(counts, generic, documents, noise=noise).p))
        return float(np.mean(found))

    few, many, hidden = cost(300, 1), cost(10_000, 1), cost(10_000, 0.01)
    worst = divergence(p, generic)
    assert many < 0.05 < few < worst and many < hidden < 1.2 * worst


def test_without_documents_the_prior_is_near_the_one_they_give() -> None:
    """Where each document lies in one cluster and they are of one length, it is that one."""
    random = np.random.default_rng(0)
    generic, p = random.dirichlet(np.ones(16)), random.dirichlet(np.full(16, 0.5))
    groups = random.choice(16, 200, p=p)
    exact = smooth(groups, np.ones(200), generic, documents=np.arange(200))
    counts = np.bincount(groups, minlength=16).astype(np.float64)
    found = smooth_counts(counts, generic, 200)
    assert found.tau == pytest.approx(exact.tau) and found.gain == pytest.approx(exact.gain)
    np.testing.assert_allclose(found.p, exact.p, rtol=1e-5)
    assert smooth_counts(counts, generic, 200, tau=exact.tau).p.tobytes() == exact.p.tobytes()


@pytest.mark.parametrize("tau", [None, 0.0, 1.0, 50.0, "owner"])
def test_what_a_histogram_is_worth_is_of_the_prior_that_it_is_smoothed_by(
        tau: float | str | None) -> None:
    """The number of clusters is chosen by it: without a prior, 64 of 60 windows are too many."""
    random = np.random.default_rng(3)
    fine, documents = random.dirichlet(np.ones(64)), np.arange(60)
    groups = random.choice(64, 60, p=random.dirichlet(np.full(64, 0.3)))
    asked = 7.5 if tau == "owner" else tau
    levels, texts, generic = {}, {}, {}
    for k in (4, 64):
        generic[k], own = fine.reshape(k, -1).sum(1), groups * k // 64
        found = smooth(own, np.ones(60), generic[k], documents=documents,
                       tau=7.5 if tau == "owner" else None)
        counts = np.bincount(own, minlength=k).astype(np.float64)
        levels[k] = shared.Level("c", counts, found.tau, found.gain)
        texts[k] = smooth(own, np.ones(60), generic[k], documents=documents, tau=asked)
    made = shared.Shared(GOOD.embedder, 60, levels)
    ours = {k: made.smoothed(k, generic[k], asked) for k in levels}
    for k in levels:
        assert (ours[k].p == texts[k].p).all() and ours[k].tau == texts[k].tau
        assert ours[k].gain == pytest.approx(texts[k].gain, rel=1e-6)
        assert ours[k].gain == texts[k].gain or tau not in (None, "owner")
    assert max(ours, key=lambda k: ours[k].gain) == (4 if tau == 0 else 64)
