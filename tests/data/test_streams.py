"""Batches: which rows stand at a place of the training sequence, whoever asks for it."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from planearly.data.dataset import IGNORE
from planearly.data.pack import Rows
from planearly.data.sample import BlendSampler, Sampler
from planearly.data.streams import (
    Batch,
    BlendStream,
    Followed,
    Later,
    MixedStream,
    RowStream,
    prefetch,
)

CONTEXT = 4


class Numbered:
    """Row p holds the number p and 1,000 for every stream before this one; its group is p % 3."""

    context = CONTEXT

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def batch(self, start: int, stop: int) -> Batch:
        place = np.arange(start, stop)
        inputs = torch.from_numpy(1000 * self.number + place)[:, None].repeat(1, CONTEXT)
        return Batch(inputs, inputs + 1, place % 3)


class Windows:
    """A dataset of one token a window, its number."""

    context = CONTEXT

    def rows(self, windows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.zeros((len(windows), CONTEXT), np.int64)
        for row, each in zip(inputs, windows, strict=True):
            row[:len(each)] = each
        return inputs, inputs + 100


@pytest.mark.parametrize("shares", [[0.5, 0.25, 0.25], [0.75, 0.25]])
def test_each_of_mixed_streams_gives_its_rows_in_order(shares: list[float]) -> None:
    mixed = MixedStream([Numbered(i) for i in range(len(shares))], shares, seed=4)
    assert mixed.context == CONTEXT
    whole = mixed.batch(0, 64)
    first = whole.inputs[:, 0].numpy()
    for number, share in enumerate(shares):
        mine = first // 1000 == number
        assert mine.sum() == pytest.approx(64 * share, abs=1)
        assert (first[mine] % 1000 == np.arange(mine.sum())).all()
        assert (whole.groups[mine] == (-1 if number else np.arange(mine.sum()) % 3)).all()
    assert torch.equal(whole.targets, whole.inputs + 1)
    for step in (1, 3, 8):
        for start in range(0, 64 - step, step):
            part, here = mixed.batch(start, start + step), slice(start, start + step)
            assert torch.equal(part.inputs, whole.inputs[here])
            assert torch.equal(part.targets, whole.targets[here])
            assert (part.groups == whole.groups[here]).all()


@pytest.mark.parametrize("at", [0, 5, 8, 64])
def test_a_stream_that_takes_over_begins_with_its_first_row(at: int) -> None:
    stream = Followed(Numbered(0), Later(Numbered(1), at), at)
    assert stream.context == CONTEXT
    whole = stream.batch(0, 16)
    first = whole.inputs[:, 0].tolist()
    assert first == [*range(16)][:at] + [1000 + place for place in range(16 - at)]
    assert torch.equal(whole.targets, whole.inputs + 1)
    assert whole.groups.tolist() == [number % 1000 % 3 for number in first]
    for start in range(12):
        part = stream.batch(start, start + 4)
        assert part.inputs[:, 0].tolist() == first[start:start + 4]
        assert part.groups.tolist() == whole.groups[start:start + 4].tolist()


ROWS = Rows(np.array([0, 2, 5, 6]), np.array([0, 2, 3, 6, 7, 8, 10]), np.arange(10)[::-1], 1.0)
"""Six rows of one to three windows, in three groups."""


def expected(sampler: Any, start: int, stop: int) -> list[list[int]]:
    return [ROWS.row(ROWS.group_offsets[group] + row).tolist()
            for group, row in zip(*sampler.draw(start, stop), strict=True)]


def test_rows_of_a_stream_are_those_that_its_sampler_draws() -> None:
    sampler = Sampler(np.diff(ROWS.group_offsets), np.array([1.0, 2.0, 1.0]), seed=3)
    stream = RowStream(Windows(), ROWS, sampler)  # type: ignore[arg-type]
    found = stream.batch(5, 45)
    assert stream.context == CONTEXT and len(found) == 40
    for inputs, windows in zip(found.inputs.tolist(), expected(sampler, 5, 45), strict=True):
        assert inputs == windows + [0] * (CONTEXT - len(windows))
    assert torch.equal(found.targets, found.inputs + 100)
    assert (found.groups == sampler.draw(5, 45)[0]).all() and set(found.groups) == {0, 1, 2}


def test_rows_of_blends_are_counted_under_their_histogram() -> None:
    histograms = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    sampler = BlendSampler(np.diff(ROWS.group_offsets), histograms, step=8, parts=2, seed=3)
    found = BlendStream(Windows(), ROWS, sampler).batch(4, 36)  # type: ignore[arg-type]
    assert found.groups.tolist() == [place // 4 % 4 for place in range(4, 36)]
    shown = [[window for window in row if window] for row in found.inputs.tolist()]
    assert shown == [[w for w in row if w] for row in expected(sampler, 4, 36)]


@pytest.mark.parametrize("rows", [3, 4])
def test_a_batch_is_filled_with_rows_that_have_no_targets(rows: int) -> None:
    batch = Numbered().batch(5, 5 + rows)
    filled = batch.filled(6)
    assert len(filled) == 6 and torch.equal(filled.inputs[:rows], batch.inputs)
    assert torch.equal(filled.targets[:rows], batch.targets)
    assert (filled.targets[rows:] == IGNORE).all() and (batch.targets != IGNORE).all()
    assert (filled.groups[:rows] == batch.groups).all()


def test_batches_are_read_ahead_in_order_until_nobody_asks() -> None:
    ranges = [(start, start + 3) for start in range(0, 30, 3)]
    read = [batch.inputs[:, 0].tolist() for batch in prefetch(Numbered(), iter(ranges))]
    assert read == [list(range(*each)) for each in ranges]
    batches = prefetch(Numbered(), iter(ranges), ahead=1)
    read = [next(batches).inputs[:, 0].tolist()]
    time.sleep(0.25)  # the reader finds no room, and tries again
    read += [batch.inputs[:, 0].tolist() for batch in batches]
    assert read == [list(range(*each)) for each in ranges]
    batches = prefetch(Numbered(), iter(ranges))
    next(batches)
    batches.close()
    assert "loader" not in {thread.name for thread in threading.enumerate()}


def test_what_fails_ahead_is_raised_where_it_would_be_read() -> None:
    class Broken(Numbered):
        def batch(self, start: int, stop: int) -> Batch:
            if start >= 8:
                raise RuntimeError("the disk went away")
            return super().batch(start, stop)

    batches = prefetch(Broken(), iter([(0, 8), (8, 16)]))
    assert len(next(batches)) == 8
    with pytest.raises(RuntimeError, match="went away"):
        next(batches)
