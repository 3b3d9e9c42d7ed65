"""Histograms, their smoothing, and the leave-one-out choice of the prior."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly.cluster.histogram import histogram, smooth, summary


def test_counts_are_window_equivalents_and_excluded_windows_do_not_count():
    counts = histogram(np.array([0, 2, 2, -1]), np.array([1.0, 0.25, 0.5, 1.0]), 4)
    assert counts.tolist() == [1.0, 0.0, 0.75, 0.0]


def test_summary_of_known_histograms():
    even = summary(np.full(8, 3.0))
    assert even["entropy"] == pytest.approx(math.log(8), rel=1e-12)
    assert even["relative_entropy"] == pytest.approx(1, rel=1e-12)
    assert (even["largest_share"], even["empty"]) == (0.125, 0)
    assert even["effective"] == pytest.approx(8)
    skew = summary(np.array([0.0, 3.0, 1.0, 0.0]))
    assert skew["entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert (skew["largest"], skew["largest_share"], skew["empty"]) == (1, 0.75, 2)
    assert summary(np.zeros(3))["entropy"] == 0 and summary(np.ones(1))["relative_entropy"] == 1
    assert f"{summary(np.array([0.0, 2.0]))['entropy']:.2f}" == "0.00"  # and not -0.00


def brute_force_gain(groups, size, g, tau, documents):
    """Leave each document out, smooth the rest, score the document."""
    total = 0.0
    for document in np.unique(documents):
        out = documents == document
        n = np.bincount(groups[~out], size[~out], len(g))
        p = (n + tau * g) / (n.sum() + tau)
        total += (size[out] * np.log(p[groups[out]] / g[groups[out]])).sum()
    return total / size.sum()


@pytest.mark.parametrize("whole_documents", [False, True])
def test_gain_is_the_leave_one_out_likelihood_and_tau_is_its_best(whole_documents):
    rng = np.random.default_rng(0)
    g = rng.dirichlet(np.ones(12))
    groups = rng.choice(12, 60, p=rng.dirichlet(np.full(12, 0.5)))
    size = rng.uniform(0.1, 1, 60)
    documents = rng.integers(0, 15, 60) if whole_documents else np.arange(60)
    best = smooth(groups, size, g, documents=documents if whole_documents else None)
    assert best.gain == pytest.approx(brute_force_gain(groups, size, g, best.tau, documents))
    for tau in np.geomspace(1, 1e5, 80):
        assert brute_force_gain(groups, size, g, tau, documents) <= best.gain + 1e-9
    counts = np.bincount(groups, size, 12)
    np.testing.assert_allclose(best.p, (counts + best.tau * g) / (counts.sum() + best.tau))


def test_a_set_like_the_generic_corpus_is_smoothed_away_and_a_peculiar_one_is_not():
    rng = np.random.default_rng(1)
    g = rng.dirichlet(np.ones(64))
    like = smooth(rng.choice(64, 300, p=g), np.ones(300), g)
    assert np.abs(like.p - g).max() < 0.02 and like.tau > 300
    odd = smooth(rng.choice(4, 2000), np.ones(2000), g)
    assert odd.p[:4].sum() > 0.98 and odd.gain > 1


def test_leaving_out_documents_trusts_windows_of_one_document_less():
    documents = np.repeat(np.arange(10), 20)  # every document in a cluster of its own
    windows = smooth(documents, np.ones(200), np.full(32, 1 / 32))
    whole = smooth(documents, np.ones(200), np.full(32, 1 / 32), documents=documents)
    assert whole.tau > 100 * windows.tau and whole.gain < windows.gain


def test_the_gain_finds_the_number_of_clusters_that_tells_most():
    rng = np.random.default_rng(3)
    fine_g = rng.dirichlet(np.ones(256))
    coarse_of = np.arange(256) // 16
    coarse_g = np.bincount(coarse_of, fine_g)
    fine_p = rng.dirichlet(np.full(256, 0.05))
    gain = {}
    for n in (10, 5000):
        groups = rng.choice(256, n, p=fine_p)
        gain[n] = (smooth(groups, np.ones(n), fine_g).gain,
                   smooth(coarse_of[groups], np.ones(n), coarse_g).gain)
    assert gain[5000][0] > gain[5000][1]  # many windows: the fine clustering says more
    truth = float((fine_p * np.log(np.maximum(fine_p, 1e-300) / fine_g)).sum())
    assert gain[5000][0] == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("groups", [[], [3], [1, 4, 6], [5, 5, 5]])
def test_tiny_sets_behave(groups):
    g = np.random.default_rng(4).dirichlet(np.ones(8))
    found = smooth(np.array(groups, dtype=np.int32), np.ones(len(groups)), g)
    assert found.p.sum() == pytest.approx(1) and np.isfinite(found.gain)
    if len(set(groups)) == len(groups):  # nothing vouches for anything: the generic histogram
        assert found.gain <= 0 or math.isclose(found.gain, 0, abs_tol=1e-9)
        np.testing.assert_allclose(found.p, g, atol=1e-3)
    else:  # three alike: believed, but not made a certainty
        assert 0.7 < found.p[5] < 0.9 and found.p.min() > 0


def test_a_cluster_without_generic_text_gives_finite_answers():
    found = smooth(np.array([0, 1, 1, 2]), np.ones(4), np.array([5.0, 5.0, 0.0]))
    assert np.isfinite(found.gain) and np.isfinite(found.p).all()


def test_raw_frequencies_are_tau_zero():
    found = smooth(np.array([0, 1, 1, 1]), np.ones(4), np.ones(4), tau=0)
    assert found.p.tolist() == [0.25, 0.75, 0, 0] and np.isfinite(found.gain)


@examples(60)
@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 2**16))
def test_smoothing_lies_between_the_set_and_the_generic_corpus(k, n, seed):
    rng = np.random.default_rng(seed)
    g = rng.dirichlet(np.ones(k))
    groups, size = rng.integers(0, k, n), rng.uniform(0.01, 1, n)
    found = smooth(groups, size, g * 1000)
    raw = np.bincount(groups, size, k) / max(size.sum(), 1e-9) if n else g
    low, high = np.minimum(raw, g), np.maximum(raw, g)
    assert found.p.sum() == pytest.approx(1)
    assert (found.p >= low - 1e-9).all() and (found.p <= high + 1e-9).all()
    assert found.gain >= math.log1p(-1e-4) and found.tau >= 1  # 1e-4: the largest tau is finite


def test_relative_entropy_is_the_share_of_the_largest_possible():
    assert summary(np.ones(8))["relative_entropy"] == pytest.approx(1)
    assert summary(np.array([5.0, 0]))["relative_entropy"] == 0
    skewed = summary(np.array([3.0, 1, 0, 0]))
    assert skewed["relative_entropy"] == pytest.approx(skewed["entropy"] / math.log(4))
    assert summary(np.array([7.0]))["relative_entropy"] == 1


@examples(40)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 60))
def test_no_prior_on_a_dense_grid_is_better_than_the_one_chosen(seed, k, n):
    rng = np.random.default_rng(seed)
    groups = rng.choice(k, n, p=rng.dirichlet(np.full(k, 0.5)))
    size = rng.uniform(0.2, 1, n)
    generic = rng.dirichlet(np.full(k, 1.0))
    found = smooth(groups, size, generic)
    grid = np.geomspace(1, 1e4 * max(size.sum(), 1), 400)
    gains = [smooth(groups, size, generic, tau=tau).gain for tau in grid]
    assert found.gain >= max(gains) - 1e-6 or (max(gains) <= 0 and found.gain <= 0)
    # the gain falls off on both sides of a peak inside the grid
    best = int(np.argmax(gains))
    if 0 < best < len(grid) - 1 and gains[best] > 1e-3:
        assert grid[max(best - 2, 0)] <= found.tau <= grid[min(best + 2, len(grid) - 1)]


def test_gain_of_a_single_document_and_of_a_cluster_without_generic_text():
    one = smooth(np.array([0, 1, 1]), np.ones(3), np.array([0.5, 0.5]), tau=2.0,
                 documents=np.zeros(3))
    assert one.gain == pytest.approx(0)  # nothing is left to predict it from but the prior
    groups, size, generic, tau = np.array([0, 0, 1, 1]), np.ones(4), np.array([1.0, 0.0]), 3.0
    floor = 0.5 / 4  # half a window of the set's four
    known = [np.log((1 + tau) / (3 + tau))] * 2
    absent = [np.log((1 + tau * floor) / ((3 + tau) * floor))] * 2
    found = smooth(groups, size, generic, tau=tau)
    assert found.gain == pytest.approx(np.mean(known + absent))


def test_without_any_generic_text_the_prior_is_even():
    found = smooth(np.array([0, 0, 2]), np.ones(3), np.zeros(4), tau=2.0)
    np.testing.assert_allclose(found.p, np.array([2.5, 0.5, 1.5, 0.5]) / 5)
