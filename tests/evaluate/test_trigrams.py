"""Trigram models against the formula by dictionaries, and their probabilities."""

from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planearly.data.dataset import IGNORE
from planearly.evaluate.trigrams import Trigrams, side_by_side

V = 5


def rows_of(windows, context):
    """Inputs and targets as a dataset lays them out: a row of windows, each (token before it,
    targets), with padding at the end."""
    inputs = np.zeros((len(windows), context), np.int64)
    targets = np.full((len(windows), context), IGNORE, np.int64)
    for row, parts in enumerate(windows):
        at = 0
        for before, tokens in parts:
            inputs[row, at:at + len(tokens)] = [before, *tokens[:-1]]
            targets[row, at:at + len(tokens)] = tokens
            at += len(tokens)
    return inputs, targets


def naive(windows, order=3):
    """P(token | histories of 0 to order - 1 tokens), by the formula of the docstring."""
    counts = [defaultdict(Counter) for _ in range(order)]
    for parts in windows:
        for before, tokens in parts:
            seen = [None, before, *tokens]
            for i in range(2, len(seen)):
                for n in range(order):
                    counts[n][tuple(seen[i - n:i])][seen[i]] += 1

    def probability(token, history):
        p = 1 / V
        for n in range(order):
            by = counts[n]
            every = [c for counted in by.values() for c in counted.values()]
            once, twice = every.count(1), every.count(2)
            discount = (once + 1) / (once + 2 * twice + 2)
            counted = by[tuple(history[len(history) - n:])]
            if total := sum(counted.values()):
                p = (max(counted[token] - discount, 0) + discount * len(counted) * p) / total
        return p

    return probability


# no target equals what would make a new window look like the old one going on
text = st.lists(st.lists(st.tuples(st.just(0), st.lists(st.integers(1, V - 1), min_size=1,
                                                        max_size=4)), min_size=1, max_size=3),
                min_size=1, max_size=6)


@given(text, text, st.integers(1, 3))
def test_probabilities_are_those_of_the_formula(counted, other, order):
    model, probability = Trigrams(*rows_of(counted, 12), V), naive(counted, order)
    expected = [-np.log(probability(tokens[i], [None, before, *tokens][:i + 2]))
                for parts in other for before, tokens in parts for i in range(len(tokens))]
    np.testing.assert_allclose(model.nats(*rows_of(other, 12), order), expected, rtol=1e-12)


@given(text, st.integers(0, V - 1), st.integers(1, V - 1))
def test_probabilities_of_every_history_add_up_to_one(counted, one, two):
    model = Trigrams(*rows_of(counted, 12), V)
    each = [[(one, [two, token])] for token in range(V)]
    assert np.exp(-model.nats(*rows_of(each, 2))[1::2]).sum() == pytest.approx(1)


def test_no_token_is_impossible_where_each_was_counted_often():
    tokens = np.tile(np.arange(V - 1), 30)[None]
    model = Trigrams(tokens[:, :-1], tokens[:, 1:], V)
    assert 0 < model.nats(np.array([[0, 1]]), np.array([[1, V - 1]]))[1] < 20


def test_text_is_foretold_best_by_its_like():
    random = np.random.default_rng(0)

    def some(step, rows=50):
        start = random.integers(0, 100, rows)
        return (start[:, None] + step * np.arange(17)) % 100

    def both(x):
        return x[:, :-1], x[:, 1:]

    up, down = (Trigrams(*both(some(step)), 100) for step in (1, -1))
    assert up.nats(*both(some(1))).mean() < down.nats(*both(some(1))).mean() - 3


def test_rows_are_filled_in_order_as_far_as_they_hold():
    lengths = np.array([(4,), (6,), (10,), (3,), (6,), (1,), (1,), (10,)], [("length", "<u4")])
    dataset = SimpleNamespace(context=10, windows=lengths)
    rows = [row.tolist() for row in side_by_side(dataset, np.arange(8))]
    assert rows == [[0, 1], [2], [3, 4, 5], [6], [7]]
    assert [row.tolist() for row in side_by_side(dataset, np.array([2, 0]))] == [[2], [0]]


def test_a_vocabulary_that_cannot_be_counted_is_refused():
    nothing = np.zeros((1, 2), np.int64)
    with pytest.raises(ValueError, match="too large"):
        Trigrams(nothing, nothing, (1 << 21) - 1)


def test_sequences_of_the_last_entries_of_a_large_vocabulary_are_told_apart():
    most = (1 << 21) - 2
    rows = np.array([[most - 1, most - 1, most - 1], [most - 1, most - 1, most - 2]])
    model = Trigrams(rows[:1, :-1], rows[:1, 1:], most)
    like, unlike = model.nats(rows[:, :-1], rows[:, 1:]).reshape(2, 2)[:, 1]
    assert like < 2 and unlike > 10
