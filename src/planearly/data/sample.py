"""The sampler: which window row comes at which place of the training sequence.

A pure function of (seed, sequence number, group weights), with no state. Position s of the sequence
is mapped to a point x(s) of [0, 1) by the van der Corput sequence in base 2, digitally shifted by
the seed; the unit interval is divided among the groups by their weights, and the group whose part
holds x(s) is drawn. Any 2^q aligned consecutive points form a regular grid, so that

* how often a group was drawn before position s has a closed form, which is what makes drawing
  *without replacement* inside a group seekable; and
* realised frequencies differ from the weights by O(log s / s) instead of the O(1 / sqrt(s)) of
  independent draws: every batch is a stratified sample.

Why: docs/decisions.md, "The sampler is a low-discrepancy sequence".

Inside a group, rows come in a pseudo-random order that is a Feistel permutation keyed by (seed,
group, epoch): each row once per epoch, another order in every epoch, any position in O(1) memory.

References: van der Corput 1935; Black and Rogaway 2002 (permutations of arbitrary domains by a
Feistel network with cycle walking); importance sampling over clusters is section 3 of the paper.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

_ONE = 1 << 64


def mix(*values: int | np.ndarray) -> np.ndarray:
    """Hash integers (or broadcastable arrays of them) to uint64, one counter-based draw each.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained over the values.
    """
    state = np.asarray(0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            word = np.asarray(value).astype(np.uint64)
            state = (state ^ word) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Place of ``index`` under the permutation of range(size) that ``key`` names, elementwise.

    Args:
        index: int64 [n], each in [0, size).
        size: int64 [n].
        key: uint64 [n].

    Returns:
        int64 [n], in [0, size).
    """
    bits = np.array([int(s - 1).bit_length() for s in size], dtype=np.uint64)
    half = np.maximum((bits + np.uint64(1)) // np.uint64(2), np.uint64(1))
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = index.astype(np.uint64)
    bound = size.astype(np.uint64)
    pending = np.arange(len(index))
    while len(pending):
        h, m, k = half[pending], mask[pending], key[pending]
        left, right = value[pending] >> h, value[pending] & m
        for r in range(6):
            left, right = right, left ^ (mix(k, right, r) & m)
        value[pending] = (left << h) | right
        pending = pending[value[pending] >= bound[pending]]  # walk the cycle back into range
    return value.astype(np.int64)


def _reverse(value: np.ndarray) -> np.ndarray:
    """The 64 bits of each uint64 in reverse order: van der Corput's radical inverse times 2^64."""
    for shift, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333),
                        (4, 0x0F0F0F0F0F0F0F0F), (8, 0x00FF00FF00FF00FF),
                        (16, 0x0000FFFF0000FFFF)):
        s, m = np.uint64(shift), np.uint64(mask)
        value = ((value >> s) & m) | ((value & m) << s)
    return (value >> np.uint64(32)) | (value << np.uint64(32))


class Interleave:
    """Divides the sequence 0, 1, 2, ... among groups in proportion to their weights."""

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        weights = np.asarray(weights, dtype=np.float64)
        if not (len(weights) and np.all(weights >= 0) and weights.sum() > 0):
            raise ValueError("weights must be non-negative and not all zero")
        self.weights = weights / weights.sum()
        # 53 bits of a float64 are enough: the last group's end is 2^64 whatever the rounding.
        ends = np.minimum(np.cumsum(self.weights), 1.0)
        last = int(np.flatnonzero(self.weights)[-1])
        self._inner = np.array(
            [min(int(e * (1 << 53)) << 11, _ONE - 1) for e in ends[:last]], dtype=np.uint64
        )
        self._shift = mix(seed, 0x5EED)

    def __len__(self) -> int:
        return len(self.weights)

    def counts(self, position: int) -> np.ndarray:
        """How often each group occurs among the first ``position`` places, int64 [groups]."""
        below = np.zeros(len(self._inner), dtype=np.int64)
        done = 0
        for q in reversed(range(position.bit_length())):
            if not position >> q & 1:
                continue
            # Places done .. done + 2^q - 1 are the grid {low + g 2^(64-q)}, g = 0 .. 2^q - 1.
            point = _reverse(np.asarray(done, dtype=np.uint64)) ^ self._shift
            spacing = np.uint64(64 - q)
            low = point if q == 0 else point & ((np.uint64(1) << spacing) - np.uint64(1))
            above = self._inner > low
            gap = self._inner[above] - low - np.uint64(1)
            below[above] += 1 if q == 0 else (gap >> spacing).astype(np.int64) + 1
            done += 1 << q
        ends = np.concatenate((below, [position]))
        counts = np.diff(ends, prepend=0)
        return np.concatenate((counts, np.zeros(len(self) - len(counts), dtype=np.int64)))

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Group of each place in [start, stop), and its rank among that group's places.

        Returns:
            groups int64 [n], ranks int64 [n]; the ranks of a group are consecutive.
        """
        place = np.arange(start, stop, dtype=np.uint64)
        groups = np.searchsorted(self._inner, _reverse(place) ^ self._shift, side="right")
        order = np.argsort(groups, kind="stable")
        ordered = groups[order]
        first = np.searchsorted(ordered, ordered, side="left")
        ranks = np.empty(len(groups), dtype=np.int64)
        ranks[order] = np.arange(len(groups)) - first
        return groups.astype(np.int64), ranks + self.counts(start)[groups]


class Draws(Protocol):
    """A sequence of rows, without state."""

    rows_per_group: np.ndarray

    def counts(self, position: int) -> np.ndarray:
        """Rows drawn of each group before ``position``, int64 [groups]."""

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups int64 [n] and rows within their group int64 [n] of places [start, stop)."""


def rows_of(groups: np.ndarray, ranks: np.ndarray, rows_per_group: np.ndarray,
            seed: int) -> np.ndarray:
    """Row within its group of each draw, by its rank among the group's: all once per epoch."""
    size = rows_per_group[groups]
    return permute(ranks % size, size, mix(seed, groups, ranks // size))


class Sampler:
    """Draws rows: groups by weight, rows of a group without replacement, reshuffled each epoch."""

    def __init__(self, rows_per_group: np.ndarray, weights: np.ndarray, seed: int) -> None:
        """
        Args:
            rows_per_group: int64 [groups].
            weights: float64 [groups], any positive scale; a group without rows must weigh 0.
        """
        self.rows_per_group = np.asarray(rows_per_group, dtype=np.int64)
        if len(self.rows_per_group) != len(weights):
            raise ValueError("one weight per group is needed")
        if np.any((self.rows_per_group == 0) & (np.asarray(weights) > 0)):
            raise ValueError("a group without rows has a positive weight")
        self.interleave = Interleave(weights, seed)
        self._seed = seed

    def counts(self, position: int) -> np.ndarray:
        """Rows drawn of each group before ``position``, int64 [groups]."""
        return self.interleave.counts(position)

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups int64 [n] and rows within their group int64 [n] of places [start, stop)."""
        groups, ranks = self.interleave.draw(start, stop)
        return groups, rows_of(groups, ranks, self.rows_per_group, self._seed)


class BlendSampler:
    """Draws the rows of a step in several parts, each by a histogram over groups of its own.

    The histograms come one after another, and again from the first after the last. Each part has
    the rows of systematic sampling (Madow 1949): with n rows and one random offset, a group of
    weight p has n p of them, rounded up or down, and n p in expectation. So how often a group was
    drawn before a place is known in closed form here too, and rows of a group are drawn without
    replacement over all parts.
    """

    def __init__(self, rows_per_group: np.ndarray, histograms: np.ndarray, step: int, parts: int,
                 seed: int) -> None:
        """
        Args:
            rows_per_group: int64 [groups]; each has some.
            histograms: float64 [n, groups] of any positive scale, n at least ``parts``, of which
                as many are used as fill whole steps.
            step: rows of a step, at least ``parts``.
        """
        self.rows_per_group = np.asarray(rows_per_group, dtype=np.int64)
        used = len(histograms) // parts * parts
        if not (1 <= parts <= step and used and np.all(self.rows_per_group > 0)):
            raise ValueError("every part needs a row, a histogram and groups with rows")
        cuts = -(-np.arange(parts + 1) * step // parts)
        size = np.tile(np.diff(cuts), used // parts)
        ends = np.cumsum(histograms[:used], axis=1, dtype=np.float64)
        offset = (mix(seed, 0xB1E4D, np.arange(used)) >> np.uint64(11)) / 2.0**53
        ends = np.floor(ends / ends[:, -1:] * size[:, None] + offset[:, None]).astype(np.int64)
        self._ends = ends  # of each group's rows in its part, which is sorted by group
        self._starts = np.concatenate(([0], np.cumsum(size)))
        each = np.diff(ends, axis=1, prepend=0)
        self._before = np.concatenate((np.zeros((1, ends.shape[1]), np.int64),
                                       np.cumsum(each, axis=0)))
        self._seed = seed

    def _place(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times that all histograms have passed, number of the present one, place in its part."""
        times, place = np.divmod(place, self._starts[-1])
        part = np.searchsorted(self._starts, place, side="right") - 1
        return times, part, place - self._starts[part]

    def histogram(self, start: int, stop: int) -> np.ndarray:
        """Number of the histogram that each place in [start, stop) is drawn by, int64 [n]."""
        return self._place(np.arange(start, stop))[1]

    def counts(self, position: int) -> np.ndarray:
        """Rows drawn of each group before ``position``, int64 [groups]."""
        times, part, place = self._place(np.asarray(position))
        here = np.diff(np.minimum(self._ends[part], place), prepend=0)
        found: np.ndarray = times * self._before[-1] + self._before[part] + here
        return found

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Groups int64 [n] and rows within their group int64 [n] of places [start, stop)."""
        times, part, place = self._place(np.arange(start, stop))
        ends = self._ends[part]
        groups = (ends <= place[:, None]).sum(axis=1)
        first = np.where(groups > 0, ends[np.arange(len(groups)), groups - 1], 0)
        ranks = times * self._before[-1, groups] + self._before[part, groups] + place - first
        return groups, rows_of(groups, ranks, self.rows_per_group, self._seed)
