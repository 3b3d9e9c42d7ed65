"""Trigram models of tokens: how like some text is to other text, counted in seconds.

Text that a model is trained on teaches it the more of a domain, the better already the counts of
its short sequences predict the domain's. So the cross-entropy of a domain's text under trigram
models of two ways to draw a corpus says, before anything is trained, what a model gains by one over
the other. It is the criterion of Moore and Lewis 2010 (*Intelligent selection of language model
training data*) for whole ways of drawing; Xie et al. 2023 (arXiv 2302.03169, section 5) found that
such a number of hashed n-grams follows the accuracy of trained models.
"""

from __future__ import annotations

import numpy as np

from planearly.data.dataset import IGNORE, TokenDataset
from planearly.evaluate.perplexity import Scores

_MOST_VOCABULARY = (1 << 21) - 2
"""Three tokens, or the mark of none, fit in one int64."""
_ROWS = 256  # scored at once


class Trigrams:
    """A trigram model by interpolated absolute discounting (Ney, Essen and Kneser 1994).

    With c(h, t) how often token t followed the history h, n(h) the different tokens that did, and
    the lower order's probability P' (below the unigrams 1 / vocabulary),

        P(t | h) = (max(c(h, t) - D, 0) + D n(h) P'(t)) / c(h),    P(t | h) = P'(t) if c(h) = 0,

    D = (a + 1) / (a + 2 b + 2) for an order of whose sequences a occur once and b twice: the
    authors' estimate, kept above 0 where none does, so that no token is impossible. A window's
    first token follows its first input alone; where that is also what the window before it in the
    row ended with, that window's last token but one as well.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, vocabulary: int) -> None:
        """
        Args:
            inputs, targets: rows of text, int [rows, time]; targets may be
                :data:`planearly.data.dataset.IGNORE`.
            vocabulary: entries of the tokenizer.

        Raises:
            ValueError: more entries than can be counted.
        """
        if vocabulary > _MOST_VOCABULARY:
            raise ValueError(f"a vocabulary of {vocabulary} entries is too large to be counted")
        self.vocabulary = vocabulary
        self._orders = [_Counts(*both) for both in self._sequences(inputs, targets)]

    def nats(self, inputs: np.ndarray, targets: np.ndarray, order: int = 3) -> np.ndarray:
        """-ln P of every target but those ignored, float64 [n], row by row.

        Args:
            order: tokens of the longest sequence that counts.
        """
        likelihood: np.ndarray = np.array(1 / self.vocabulary)
        for counts, both in zip(self._orders[:order], self._sequences(inputs, targets),
                                strict=False):
            likelihood = counts.interpolated(*both, likelihood)
        return -np.log(likelihood)

    def score(self, dataset: TokenDataset, windows: np.ndarray, order: int = 3) -> Scores:
        """As :func:`planearly.evaluate.perplexity.evaluate`, of this model."""
        chosen, rows = dataset.windows[windows], side_by_side(dataset, windows)
        parts = [self.nats(*dataset.rows(rows[start:start + _ROWS]), order)
                 for start in range(0, len(rows), _ROWS)]
        return Scores(np.concatenate([np.empty(0), *parts]).astype(np.float32),
                      chosen["length"].astype(np.int64), chosen["document"].astype(np.int64))

    def _sequences(self, inputs: np.ndarray,
                   targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each order the histories and the sequences that end with a target, int64 [n] each, a
        number for each."""
        inputs, targets = (np.asarray(array, np.int64) for array in (inputs, targets))
        none, base = self.vocabulary, self.vocabulary + 1
        before = np.full_like(inputs, none)
        goes_on = targets[:, :-1] == inputs[:, 1:]  # else a window begins here
        before[:, 1:] = np.where(goes_on, inputs[:, :-1], none)
        told = targets != IGNORE
        last = inputs[told]
        return [(history, history * base + targets[told])
                for history in (np.zeros_like(last), last, before[told] * base + last)]


def side_by_side(dataset: TokenDataset, windows: np.ndarray) -> list[np.ndarray]:
    """Windows, int [n], in rows of at most a context's targets, in their order."""
    rows, first, filled = [], 0, 0
    for at, length in enumerate(dataset.windows["length"][windows].tolist()):
        if filled + length > dataset.context:
            rows.append(windows[first:at])
            first, filled = at, 0
        filled += length
    return [*rows, windows[first:]] if len(windows) else []


class _Counts:
    """How often the sequences of one order, and their histories, occur."""

    def __init__(self, history: np.ndarray, sequence: np.ndarray) -> None:
        self._sequences, first, counts = np.unique(sequence, return_index=True,
                                                   return_counts=True)
        self._counts = counts.astype(np.float64)
        self._histories, of = np.unique(history[first], return_inverse=True)
        self._followed = np.bincount(of, minlength=len(self._histories)).astype(np.float64)
        self._occur = np.bincount(of, self._counts, len(self._histories))
        once, twice = ((counts == times).sum() for times in (1, 2))
        self._discount = float((once + 1) / (once + 2 * twice + 2))

    def interpolated(self, history: np.ndarray, sequence: np.ndarray,
                     lower: np.ndarray) -> np.ndarray:
        """Probabilities [n] of the last token of each sequence, by those of the lower order."""
        occurs = _found(self._histories, history, self._occur)
        left = self._discount * _found(self._histories, history, self._followed) * lower
        taken = np.maximum(_found(self._sequences, sequence, self._counts) - self._discount, 0)
        known = occurs > 0
        return np.where(known, (taken + left) / np.where(known, occurs, 1), lower)


def _found(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [n] by ascending keys, 0 where a key is not there."""
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)
