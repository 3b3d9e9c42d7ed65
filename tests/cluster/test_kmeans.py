"""Spherical k-means: against a plain reference, its promises, and its edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly.cluster import kmeans
from planearly.errors import UserError


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clustered(n: int, dim: int, centres: int, spread: float, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    centre = unit(rng.standard_normal((centres, dim)))
    label = rng.integers(0, centres, n)
    return unit(centre[label] + spread * rng.standard_normal((n, dim))).astype(np.float32), label


def inertia(points: np.ndarray, centroids: np.ndarray) -> float:
    return float((1 - (points @ centroids.T).max(1)).mean())


def test_finds_well_separated_clusters():
    points, label = clustered(6000, 32, 12, 0.03)
    centroids = kmeans.fit(points, 12)
    found = kmeans.assign(points, centroids)
    pairs = {(a, b) for a, b in zip(label.tolist(), found.tolist(), strict=True)}
    assert len(pairs) == 12  # a one-to-one renaming
    assert centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)


def test_no_worse_than_scikit_learn_at_equal_starts_and_iterations():
    cluster = pytest.importorskip("sklearn.cluster")
    points, _ = clustered(8000, 24, 60, 0.2)
    ours = kmeans.fit(points, 40, iterations=20, tolerance=0.0)
    theirs = cluster.KMeans(40, n_init=1, max_iter=20, random_state=0).fit(points)
    assert inertia(points, ours) <= 1.01 * inertia(points, unit(theirs.cluster_centers_))


def test_each_iteration_lowers_the_inertia():
    points, _ = clustered(3000, 16, 50, 0.3)  # few enough for float32 scores
    found = [inertia(points, kmeans.fit(points, 30, iterations=i, tolerance=-1))
             for i in (1, 2, 4, 8, 16)]
    assert all(later < earlier for earlier, later in itertools.pairwise(found))


def test_seed_decides_and_input_type_does_not():
    points, _ = clustered(5000, 24, 20, 0.2)
    half = points.astype(np.float16)
    first = kmeans.fit(half, 16, seed=3)
    assert np.array_equal(first, kmeans.fit(half.astype(np.float32), 16, seed=3))
    assert not np.array_equal(first, kmeans.fit(half, 16, seed=4))


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_assignment_is_the_nearest_by_cosine_whatever_the_block(tmp_path, block):
    points, _ = clustered(300, 8, 5, 0.5)
    scaled = (points * np.random.default_rng(1).uniform(0.5, 4, (300, 1))).astype(np.float16)
    np.save(tmp_path / "points.npy", scaled)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    centroids = kmeans.fit(mapped, 9)
    found = kmeans.assign(mapped, centroids, block)
    assert found.dtype == np.int32
    # where two centroids are all but equally near, rounding may choose either
    cosine = unit(scaled.astype(np.float64)) @ centroids.astype(np.float64).T
    np.testing.assert_allclose(cosine[np.arange(300), found], cosine.max(1), atol=1e-6)


def test_no_cluster_is_left_empty_and_duplicates_do_no_harm():
    points, _ = clustered(400, 8, 3, 0.001)
    points[:350] = points[0]
    centroids = kmeans.fit(points, 20, iterations=10)
    assert len(np.unique(kmeans.assign(points, centroids))) == 20
    same = np.repeat(points[:1], 10, axis=0)
    assert np.isfinite(kmeans.fit(same, 4)).all()


def test_as_many_clusters_as_points_gives_every_point_its_own():
    points, _ = clustered(12, 8, 12, 0.1)
    found = kmeans.assign(points, kmeans.fit(points, 12))
    assert sorted(found) == list(range(12))


@pytest.mark.parametrize("k", [0, 6])
def test_an_impossible_k_is_one_sentence(k):
    with pytest.raises(UserError, match=f"cannot make {k} clusters of 5 windows"):
        kmeans.fit(np.eye(5, dtype=np.float32), k)


def test_weights_count_as_repetitions():
    points, _ = clustered(200, 8, 6, 0.4)
    times = np.random.default_rng(0).integers(1, 5, 200)
    start = unit(np.random.default_rng(1).standard_normal((6, 8))).astype(np.float32)
    def step(x: np.ndarray, mass: np.ndarray | None) -> np.ndarray:
        t, c = torch.from_numpy(x), torch.from_numpy(start)
        near, cosine = kmeans._nearest(t, c)
        weight = None if mass is None else torch.from_numpy(mass.astype(np.float32))
        return kmeans._means(t, weight, near, cosine, c).numpy()

    np.testing.assert_allclose(
        step(points, times), step(np.repeat(points, times, axis=0), None), atol=1e-6
    )


def test_nested_levels_form_a_tree_and_keep_families_together():
    rng = np.random.default_rng(0)
    families = unit(rng.standard_normal((4, 32)))
    centroids = unit(np.repeat(families, 8, 0) + 0.05 * rng.standard_normal((32, 32)))
    counts = rng.integers(0, 50, 32).astype(float)
    middle = kmeans.nest(centroids.astype(np.float32), counts, 4)
    assert middle.dtype == np.int32
    assert all(len(set(middle[8 * f : 8 * f + 8])) == 1 for f in range(4))
    assert set(middle) == {0, 1, 2, 3}
    merged = kmeans.merge(centroids, counts, middle, 4)
    sums = [counts[middle == f] @ centroids[middle == f] for f in range(4)]
    np.testing.assert_allclose(merged, unit(np.array(sums)), atol=1e-5)


def test_large_clusters_decide_who_is_merged():
    angles = np.deg2rad([0, 40, 75])
    centroids = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    even = kmeans.nest(centroids, np.ones(3), 2)
    assert even[1] == even[2] != even[0]
    heavy = kmeans.nest(centroids, np.array([1, 100, 100]), 2)
    assert heavy[0] == heavy[1] != heavy[2]
    empty = kmeans.nest(centroids, np.array([0, 5, 5]), 2)
    assert empty[0] == empty[1] != empty[2]


@examples(25)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**16))
def test_any_shape_gives_finite_unit_centroids_and_a_full_assignment(k, n, seed):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, 5)).astype(np.float16)
    if k > n:
        with pytest.raises(UserError):
            kmeans.fit(points, k, seed=seed)
        return
    centroids = kmeans.fit(points, k, seed=seed, iterations=5)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    found = kmeans.assign(points, centroids)
    assert found.min() >= 0 and found.max() < k
    parent = kmeans.nest(centroids, np.bincount(found, minlength=k), (k + 1) // 2, seed=seed)
    assert len(parent) == k and parent.max() < (k + 1) // 2
