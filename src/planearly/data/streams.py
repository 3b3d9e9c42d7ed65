"""Batches: from places of the training sequence to token ids.

A *stream* answers ``batch(start, stop)`` with the rows at those places of its sequence, whoever
asks and in whatever order: it has no state. Training over several processes is each asking for
its own share of the places.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from planearly.data.dataset import IGNORE, TokenDataset
from planearly.data.pack import Rows
from planearly.data.sample import BlendSampler, Draws, Interleave


@dataclass
class Batch:
    """Rows of one step.

    inputs, targets: int64 [rows, context]; groups: int64 [rows]; target ``IGNORE`` is padding.
    """

    inputs: Tensor
    targets: Tensor
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, rows: np.ndarray) -> Batch:
        index = torch.from_numpy(np.ascontiguousarray(rows))
        return Batch(self.inputs[index], self.targets[index], self.groups[rows])

    def filled(self, rows: int) -> Batch:
        """As many rows, with some at the end that have no targets."""
        more = self.take(np.minimum(np.arange(rows), len(self) - 1))
        more.targets[len(self):] = IGNORE
        return more


class Stream(Protocol):
    context: int

    def batch(self, start: int, stop: int) -> Batch: ...


class RowStream:
    """Rows of one token dataset, as a sampler draws them."""

    def __init__(self, dataset: TokenDataset, rows: Rows, sampler: Draws) -> None:
        self.dataset, self.rows, self.sampler = dataset, rows, sampler
        self.context = dataset.context

    def batch(self, start: int, stop: int) -> Batch:
        groups, within = self.sampler.draw(start, stop)
        row = self.rows.group_offsets[groups] + within
        begin, end = self.rows.row_offsets[row], self.rows.row_offsets[row + 1]
        windows = [self.rows.windows[a:b] for a, b in zip(begin, end, strict=True)]
        inputs, targets = self.dataset.rows(windows)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), groups)


class BlendStream(RowStream):
    """Rows whose group is the histogram that they were drawn by."""

    sampler: BlendSampler

    def batch(self, start: int, stop: int) -> Batch:
        return replace(super().batch(start, stop), groups=self.sampler.histogram(start, stop))


class MixedStream:
    """Several streams in given shares: replay, or domain text mixed into pretraining.

    Groups of the first stream keep their numbers; rows of the others have group -1.
    """

    def __init__(self, streams: Sequence[Stream], shares: Sequence[float], seed: int) -> None:
        self.streams = streams
        self.interleave = Interleave(np.asarray(shares), seed)
        self.context = streams[0].context

    def batch(self, start: int, stop: int) -> Batch:
        choice, rank = self.interleave.draw(start, stop)
        parts, order = [], []
        for number, stream in enumerate(self.streams):
            mine = np.flatnonzero(choice == number)
            if len(mine):
                part = stream.batch(int(rank[mine].min()), int(rank[mine].max()) + 1)
                if number:
                    part.groups = np.full(len(part), -1)
                parts.append(part.take(rank[mine] - rank[mine].min()))
                order.append(mine)
        back = np.argsort(np.concatenate(order))
        return _joined(parts).take(back)


class Later:
    """A stream whose first row stands at place ``start`` of the training; before 0, it begins with
    a later one of its rows."""

    def __init__(self, stream: Stream, start: int) -> None:
        self.stream, self.start, self.context = stream, start, stream.context

    def batch(self, start: int, stop: int) -> Batch:
        return self.stream.batch(start - self.start, stop - self.start)


class Followed:
    """A stream that another one takes over from at place ``at`` of the training."""

    def __init__(self, first: Stream, then: Stream, at: int) -> None:
        self.first, self.then, self.at, self.context = first, then, at, first.context

    def batch(self, start: int, stop: int) -> Batch:
        if stop <= self.at:
            return self.first.batch(start, stop)
        if start >= self.at:
            return self.then.batch(start, stop)
        parts = self.first.batch(start, self.at), self.then.batch(self.at, stop)
        return _joined(parts)


def _joined(parts: Sequence[Batch]) -> Batch:
    return Batch(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]),
                 np.concatenate([p.groups for p in parts]))


def prefetch(stream: Stream, ranges: Iterator[tuple[int, int]], ahead: int = 2) -> Iterator[Batch]:
    """Batches of the ranges in order, read by a thread a few steps ahead of the training."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for start, end in ranges:
                if stop.is_set():
                    return
                put(stream.batch(start, end))
            put(None)
        except BaseException as error:  # handed to the training thread, which raises it
            put(error)

    thread = threading.Thread(target=read, name="loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
