"""Random histograms over clusters: those of domains that nobody has named yet.

A projected network that is trained on blends is asked, once a domain is known, for the blend of its
histogram. Before that the corpus says what domains may be like: a domain is text of a kind, and so
is a document. A histogram is drawn from a Dirichlet distribution around that of a random document,
smoothed by one window's worth of the corpus's own, at a concentration between one, where single
clusters come out, and a hundred, where the document's histogram does; now and then it is the
corpus's own, which wide domains come near. Documents are drawn by their length, so the mean of all
histograms is the corpus's.
"""

from __future__ import annotations

import numpy as np

from planearly.cluster.histogram import histogram

CORPUS = 1 / 8
"""Share of the histograms that are the corpus's own."""
CONCENTRATION = (1.0, 100.0)
"""Of the Dirichlet distribution, drawn evenly on a logarithmic scale."""


def random_histograms(groups: np.ndarray, size: np.ndarray, documents: np.ndarray, k: int, n: int,
                      seed: int) -> np.ndarray:
    """Histograms float64 [n, k], each of sum one.

    Args:
        groups, size, documents: cluster, length and document of each window of the corpus.
    """
    groups, size = np.asarray(groups), np.asarray(size, np.float64)
    generic = histogram(groups, size, k)
    generic /= generic.sum()
    numbers, of = np.unique(documents, return_inverse=True)
    length = np.bincount(of, size)
    random = np.random.default_rng([seed, 0xB1E4D])
    picked, which = np.unique(random.choice(len(numbers), n, p=length / length.sum()),
                              return_inverse=True)
    row = np.full(len(numbers), -1)
    row[picked] = np.arange(len(picked))
    row = row[of]
    counts = histogram(np.where(row < 0, -1, row * k + groups), size,
                       len(picked) * k).reshape(-1, k)[which]
    mean = (counts + generic) / (counts.sum(1, keepdims=True) + 1)
    low, high = np.log(CONCENTRATION)
    drawn = random.standard_gamma(mean * np.exp(random.uniform(low, high, (n, 1))))
    drawn[random.random(n) < CORPUS] = generic
    made: np.ndarray = drawn / drawn.sum(1, keepdims=True)
    return made
