"""Random histograms over clusters, around those of documents."""

import numpy as np
import pytest

from planearly.cluster.blends import random_histograms
from planearly.cluster.histogram import histogram


@pytest.fixture(scope="module")
def corpus():
    """Documents of one to eight windows, each of two clusters that belong together."""
    random = np.random.default_rng(0)
    documents = np.repeat(np.arange(300), random.integers(1, 9, 300))
    groups = (documents % 4) * 2 + random.integers(0, 2, len(documents))
    return groups, random.uniform(0.5, 1, len(documents)), documents


def test_their_mean_is_the_corpus_s_and_each_is_one(corpus):
    made = random_histograms(*corpus, 8, 4000, 3)
    share = histogram(*corpus[:2], 8)
    share /= share.sum()
    assert made.shape == (4000, 8) and np.all(made >= 0) and np.allclose(made.sum(1), 1)
    assert np.allclose(made.mean(0), share, atol=0.03)
    own = np.isclose(made, share).all(1).mean()
    assert own == pytest.approx(1 / 8, abs=0.02)


def test_a_cluster_comes_with_its_kin(corpus):
    made = random_histograms(*corpus, 8, 4000, 3)
    kin, others = (np.corrcoef(made[:, 0], made[:, c])[0, 1] for c in (1, 2))
    assert kin > 0.2 > 0 > others
    largest = made.max(1)
    assert (largest > 0.95).mean() > 0.02 and (largest < 0.5).mean() > 0.2  # narrow and wide ones


def test_they_are_a_function_of_the_seed(corpus):
    one, again, other = (random_histograms(*corpus, 8, 50, seed) for seed in (3, 3, 4))
    assert np.array_equal(one, again) and not np.allclose(one, other)
    # the labels of documents say nothing
    moved = random_histograms(corpus[0], corpus[1], corpus[2] * 5 + 2, 8, 50, 3)
    assert np.array_equal(one, moved)
