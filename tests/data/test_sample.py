"""The sampler: pure, exact, without replacement, close to its weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly.data.sample import BlendSampler, Interleave, Sampler, _reverse, permute

weights_of = st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3)
seeds = st.integers(0, 2**63)


@examples(80)
@given(weights_of, seeds, st.integers(0, 5000))
def test_counts_are_what_drawing_from_the_start_gives(weights, seed, position):
    interleave = Interleave(np.array(weights), seed)
    groups, ranks = interleave.draw(0, position)
    counted = np.bincount(groups, minlength=len(weights))
    assert np.array_equal(counted, interleave.counts(position))
    for group in np.unique(groups):
        assert np.array_equal(ranks[groups == group], np.arange(counted[group]))


@examples(50)
@given(weights_of, seeds, st.integers(0, 10**12), st.integers(1, 300), st.integers(1, 300))
def test_a_range_is_the_same_whoever_asks(weights, seed, start, first, second):
    interleave = Interleave(np.array(weights), seed)
    whole = interleave.draw(start, start + first + second)
    parts = interleave.draw(start, start + first), interleave.draw(start + first,
                                                                  start + first + second)
    for index in range(2):
        assert np.array_equal(whole[index], np.concatenate([p[index] for p in parts]))


@examples(60)
@given(weights_of, seeds, st.integers(1, 10**9))
def test_realised_histogram_is_within_the_discrepancy_bound(weights, seed, position):
    """Each dyadic block misses an interval's expected count by less than two points."""
    interleave = Interleave(np.array(weights), seed)
    counts = interleave.counts(position)
    assert counts.sum() == position
    bound = 2 * position.bit_count() + 1
    assert np.all(np.abs(counts - interleave.weights * position) <= bound)
    assert np.all(counts[interleave.weights == 0] == 0)


@examples(60)
@given(st.integers(1, 3000), seeds)
def test_permute_is_a_permutation(size, key):
    index = np.arange(size)
    placed = permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(placed), index)


def test_permutations_of_two_keys_differ_and_mix():
    size = 1000
    index = np.arange(size)
    one, two = (permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
                for key in (1, 2))
    assert (one == two).sum() < 15  # about one fixed coincidence is expected
    # A uniform permutation's rank correlation with the identity has deviation 1 / sqrt(size - 1).
    assert abs(np.corrcoef(one, index)[0, 1]) < 4 / np.sqrt(size - 1)


@examples(40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), seeds)
def test_nothing_repeats_inside_a_group_before_all_was_seen(sizes, seed):
    rows = np.array(sizes)
    sampler = Sampler(rows, rows.astype(float), seed)
    groups, row = sampler.draw(0, int(rows.sum() * 4))
    for group, size in enumerate(sizes):
        mine = row[groups == group]
        for epoch in range(len(mine) // size):
            seen = mine[epoch * size:(epoch + 1) * size]
            assert np.array_equal(np.sort(seen), np.arange(size))


def test_epochs_are_shuffled_anew():
    sampler = Sampler(np.array([500]), np.array([1.0]), 3)
    _, row = sampler.draw(0, 1000)
    assert (row[:500] == row[500:]).sum() < 10


def test_a_batch_is_a_stratified_sample():
    weights = np.array([0.5, 0.25, 0.125, 0.125])
    groups, _ = Sampler(np.full(4, 10_000), weights, 9).draw(64 * 7, 64 * 8)
    assert np.all(np.abs(np.bincount(groups, minlength=4) - 64 * weights) <= 1)


def test_weights_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="not all zero"):
        Interleave(np.zeros(3), 0)
    for rows in ([3], [3, 3, 3]):
        with pytest.raises(ValueError, match="one weight per group"):
            Sampler(np.array(rows), np.array([0.5, 0.5]), 0)
    with pytest.raises(ValueError, match="without rows"):
        Sampler(np.array([3, 0]), np.array([0.5, 0.5]), 0)


def test_every_seed_has_an_order_of_its_own():
    weights = np.array([0.5, 0.3, 0.2])
    orders = {Interleave(weights, seed).draw(0, 1024)[0].tobytes() for seed in range(8)}
    assert len(orders) == 8
    rows = {Sampler(np.array([50]), np.ones(1), seed).draw(0, 50)[1].tobytes() for seed in range(8)}
    assert len(rows) == 8


def test_the_sequence_is_the_same_in_every_version():
    """A run that was stopped goes on with the next version: what was drawn must stay drawn."""
    groups, rows = Sampler(np.array([5, 9, 2]), np.array([0.5, 0.3, 0.2]), 7).draw(1000, 1016)
    assert groups.tolist() == [1, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 2, 0]
    assert rows.tolist() == [7, 1, 3, 2, 1, 4, 1, 0, 0, 3, 0, 0, 4, 2, 1, 4]
    _, eight = Sampler(np.array([8]), np.ones(1), 7).draw(0, 8)
    assert eight.tolist() == [3, 0, 4, 2, 5, 6, 7, 1]


@examples(50)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9))
def test_bits_are_reversed_all_sixty_four(values):
    expected = [int(f"{value:064b}"[::-1], 2) for value in values]
    assert _reverse(np.array(values, np.uint64)).tolist() == expected


def test_groups_without_weight_are_counted_as_never_drawn():
    assert Interleave(np.array([1.0, 0, 0, 0]), 3).counts(5).tolist() == [5, 0, 0, 0]
    assert Interleave(np.array([0, 0, 2.0, 0]), 3).counts(7).tolist() == [0, 0, 7, 0]


def blends(seed, groups=5, step=13, parts=4, n=9, rows=40):
    random = np.random.default_rng(seed)
    histograms = random.dirichlet(np.full(groups, 0.5), n)
    histograms[0] = np.eye(groups)[1]
    return histograms, BlendSampler(np.full(groups, rows), histograms, step, parts, seed)


@examples(50)
@given(st.integers(0, 99), st.integers(0, 500), st.integers(1, 60), st.integers(1, 60))
def test_blends_are_drawn_alike_whoever_asks(seed, start, first, second):
    _, sampler = blends(seed)
    stop = start + first + second
    groups, rows = sampler.draw(start, stop)
    parts = [sampler.draw(start, start + first), sampler.draw(start + first, stop)]
    assert np.array_equal(groups, np.concatenate([part[0] for part in parts]))
    assert np.array_equal(rows, np.concatenate([part[1] for part in parts]))
    counted = sampler.counts(stop) - sampler.counts(start)
    assert np.array_equal(np.bincount(groups, minlength=5), counted)


def test_each_blend_has_the_rows_of_its_histogram():
    """Of four in a step of 13 rows, over and over; eight of nine histograms fill whole steps."""
    histograms, sampler = blends(3)
    groups, _ = sampler.draw(0, 5 * 13)
    number = sampler.histogram(0, 5 * 13)
    assert np.array_equal(number[:26], np.repeat(np.arange(8), [4, 3, 3, 3] * 2))
    assert np.array_equal(number[26:52], number[:26])
    for blend in range(8):
        mine = groups[:26][number[:26] == blend]
        wanted = histograms[blend] * len(mine)
        counts = np.bincount(mine, minlength=5)
        assert np.all(np.abs(counts - wanted) < 1) and np.all(counts[histograms[blend] == 0] == 0)
    many = [BlendSampler(np.full(5, 40), histograms, 13, 4, seed) for seed in range(2000)]
    mean = np.mean([one.counts(4) for one in many], axis=0)
    assert np.allclose(mean, 4 * histograms[0]) and np.allclose(mean, [0, 4, 0, 0, 0])
    mean = np.mean([one.counts(7) - one.counts(4) for one in many], axis=0)
    assert np.allclose(mean, 3 * histograms[1], atol=5 * 0.5 / 2000**0.5)


def test_rows_of_blends_repeat_only_when_all_were_seen():
    _, sampler = blends(1, rows=7)
    groups, rows = sampler.draw(0, 400)
    for group in range(5):
        mine = rows[groups == group]
        for epoch in range(len(mine) // 7):
            assert sorted(mine[7 * epoch:7 * epoch + 7]) == list(range(7))


def test_blends_are_the_same_in_every_version():
    histograms = np.array([[0.5, 0.3, 0.2], [0, 1, 0], [0.1, 0.1, 0.8]])
    groups, rows = BlendSampler(np.array([5, 9, 4]), histograms, 8, 3, 7).draw(1000, 1012)
    assert groups.tolist() == [0, 0, 1, 1, 1, 1, 0, 2, 0, 0, 1, 1]
    assert rows.tolist() == [3, 4, 8, 1, 2, 3, 1, 3, 2, 0, 4, 8]


def test_blends_that_cannot_be_drawn_are_refused():
    for sizes, step, parts in (([3, 0], 4, 2), ([3, 3], 1, 2), ([3, 3], 8, 3)):
        with pytest.raises(ValueError, match="every part needs"):
            BlendSampler(np.array(sizes), np.full((2, 2), 0.5), step, parts, 0)
