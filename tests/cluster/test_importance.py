"""Cluster weights: the paper's ratio, the cap on repetition, and where the overflow goes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly.cluster.importance import explain, facts, weigh
from planearly.data.sample import Sampler
from planearly.errors import UserError


def test_without_a_binding_cap_the_weights_are_the_domain_histogram():
    p = np.array([0.5, 0.3, 0.2])
    rows = np.array([100, 300, 600])
    found = weigh(p, rows, 100, 16)
    np.testing.assert_allclose(found.weights, p, rtol=1e-12)
    np.testing.assert_allclose(found.importance, p / (rows / 1000))
    assert found.overflow == 0 and sum(found.moved) == 0
    np.testing.assert_allclose(found.epochs, p * 100 / rows)
    assert found.divergence == pytest.approx((p * np.log(p / (rows / 1000))).sum())
    # Kish: (sum of the rows' weights)^2 / sum of their squares
    per_row = np.repeat(p / rows, rows)
    assert found.effective_rows == pytest.approx(per_row.sum() ** 2 / (per_row**2).sum())


def test_a_domain_like_the_generic_corpus_changes_nothing():
    rows = np.array([10, 0, 30, 60])
    found = weigh(rows / 100, rows, 50, 4)
    np.testing.assert_allclose(found.weights, rows / 100, rtol=1e-12)
    assert found.effective_rows == pytest.approx(100)
    assert found.divergence == pytest.approx(0, abs=1e-12)


def test_overflow_goes_to_siblings_in_proportion_to_the_domain_first():
    p = np.array([0.6, 0.1, 0.05, 0.25])
    rows = np.array([10, 100, 100, 1000])
    found = weigh(p, rows, 100, 2, parent=np.array([0, 0, 0, 1]))
    # cluster 0 holds 20 draws of 100; its 0.4 too many go to 1 and 2 as 2:1, none to 3
    np.testing.assert_allclose(found.weights, [0.2, 0.1 + 0.4 * 2 / 3, 0.05 + 0.4 / 3, 0.25])
    np.testing.assert_allclose(found.moved, [0.4, 0], atol=1e-12)
    assert found.overflow == pytest.approx(0.4)
    assert found.epochs_before[0] == pytest.approx(6) and found.epochs[0] == pytest.approx(2)


def test_a_full_family_passes_on_and_unvisited_siblings_help_by_their_rows():
    p = np.array([0.9, 0.0, 0.1, 0.0])
    rows = np.array([10, 5, 500, 500])
    found = weigh(p, rows, 100, 2, parent=np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(found.weights, [0.2, 0.1, 0.7, 0])
    np.testing.assert_allclose(found.moved, [0.1, 0.6])


def test_without_a_tree_the_nearest_clusters_take_the_overflow():
    rng = np.random.default_rng(0)
    topic = rng.standard_normal((4, 16))
    centroids = np.repeat(topic, 8, axis=0) + 0.05 * rng.standard_normal((32, 16))
    centroids = (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32)
    p = np.full(32, 0.2 / 31)
    p[3] = 0.8
    found = weigh(p, np.full(32, 100), 500, 1, centroids=centroids)
    gained = found.weights - p
    assert gained[:8].sum() - gained[3] == pytest.approx(0.6, abs=1e-9)
    np.testing.assert_allclose(gained[8:], 0, atol=1e-12)


def test_clusters_without_rows_are_never_drawn():
    found = weigh(np.array([0.5, 0.5]), np.array([0, 50]), 100, 16)
    assert found.weights.tolist() == [0, 1] and found.importance[0] == 0
    assert found.overflow == pytest.approx(0.5)


def test_a_corpus_too_small_for_the_cap_is_one_sentence_with_what_it_can_supply():
    with pytest.raises(UserError, match=r"supply 16,000 tokens at 4 epochs .* the 25,600 asked"):
        weigh(np.array([0.5, 0.5]), np.array([10, 30]), 256, 4, context=100)
    with pytest.raises(UserError, match="no rows"):
        weigh(np.array([1.0]), np.array([0]), 10, 4)


def test_the_cap_holds_exactly_for_the_sampler_however_small_the_cluster():
    rng = np.random.default_rng(5)
    rows = rng.integers(1, 200, 64)
    p = rng.dirichlet(np.full(64, 0.1))
    draws = int(8 * rows.sum())
    counts = lambda w: Sampler(rows, w, 7).counts(draws)  # noqa: E731
    found = weigh(p, rows, draws, 16, realised=counts)
    assert (counts(found.weights) <= 16 * rows).all()
    assert np.array_equal(found.expected, counts(found.weights))
    tight = counts(found.weights)[found.epochs_before > 16] / (16 * rows[found.epochs_before > 16])
    assert np.median(tight) > 0.98  # and is used, not merely kept


def test_sentences_and_facts_tell_the_same():
    rows = np.array([10, 100, 1000])
    found = weigh(np.array([0.6, 0.2, 0.2]), rows, 400, 8)
    text = explain(found, warn_epochs=4)
    assert len(text) == 4
    assert "effective rows of 1.11k" in text[0] and f"{found.divergence:.2f} nats" in text[0]
    assert "cluster, 0," in text[1] and "8.0 epochs" in text[1]
    assert "without the cap of 8 epochs it would be 24.0" in text[2]
    assert "0% of these to kindred clusters" in text[2]
    family = weigh(np.array([0.6, 0.2, 0.2]), rows, 400, 8, parent=np.array([0, 0, 1]))
    assert "100% of these to kindred clusters" in explain(family)[2]
    assert text[3].startswith("warning: 1 clusters")
    told = facts(found)
    assert told["hottest_epochs"] == pytest.approx(8)
    assert told["clusters"]["weights"] == found.weights.tolist()
    assert len(explain(weigh(rows / 1110, rows, 100, 8))) == 2


@examples(150)
@given(
    k=st.integers(1, 24), seed=st.integers(0, 2**16), cap=st.sampled_from([1, 2.5, 16]),
    load=st.floats(0.01, 1.2), tree=st.booleans(), exact=st.booleans(),
)
def test_mass_is_kept_and_the_cap_holds_or_is_refused(k, seed, cap, load, tree, exact):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 60, k) * rng.integers(0, 2, k) + (np.arange(k) == 0)
    p = rng.dirichlet(np.full(k, 0.2))
    supply = int(np.floor(cap * rows).sum())
    draws = max(int(load * supply), 1)
    parent = rng.integers(0, 4, k) if tree else None
    realised = (lambda w: Sampler(rows, w, seed).counts(draws)) if exact else None
    try:
        found = weigh(p, rows, draws, cap, parent=parent, realised=realised)
    except UserError:
        # refused only where it cannot be: with exact counts the last rows may not fit either
        assert draws > supply or (exact and draws > supply - k * (draws.bit_length() + 2))
        return
    assert draws <= supply
    assert (found.weights >= 0).all() and found.weights.sum() == pytest.approx(1, abs=1e-12)
    assert (found.weights[rows == 0] == 0).all()
    if exact:
        assert (realised(found.weights) <= np.floor(cap * rows)).all()
    else:
        assert (found.weights * draws <= np.floor(cap * rows) * (1 + 1e-9)).all()
        assert found.overflow == pytest.approx(sum(found.moved), abs=1e-9)
        room = p * draws <= np.floor(cap * rows)
        assert (found.weights[room] >= p[room] - 1e-12).all()  # only full clusters lose
    assert found.effective_rows <= rows.sum() + 1e-6


def test_the_cap_is_lowered_by_what_the_sampler_drew_too_much():
    """A sampler that always rounds one row up needs one correction, by exactly that row."""
    rows, draws, asked = np.array([10, 1000]), 100, []

    def one_more(weights: np.ndarray) -> np.ndarray:
        asked.append(weights.copy())
        return weights * draws + np.array([1, -1])

    found = weigh(np.array([0.9, 0.1]), rows, draws, 2, realised=one_more)
    assert len(asked) == 2
    np.testing.assert_allclose(asked[0], [0.20, 0.80])
    np.testing.assert_allclose(found.weights, [0.19, 0.81])
    np.testing.assert_allclose(found.expected, [20, 80])


def test_families_of_families_hold_eight_and_end_with_all():
    """Without a tree 100 clusters make 13 families, these 2, and these one."""
    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((100, 8)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    found = weigh(np.full(100, 1.0), np.full(100, 10), 100, 1, centroids=centroids)
    assert len(found.moved) == 3
    tree = weigh(np.full(100, 1.0), np.full(100, 10), 100, 1, centroids=centroids,
                 parent=np.arange(100) // 10)
    assert len(tree.moved) == 3  # ten of the tree, two, one
