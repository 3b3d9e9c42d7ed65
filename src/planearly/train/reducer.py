"""Gradients of several processes, summed once a step."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from planearly import parallel

_SENT = 1 << 23
"""Elements that are summed in one collective call, but for larger parameters."""


class Reducer:
    """Sums gradients over the processes, in buckets that travel while the last backward pass runs.

    As the reducer of torch's DistributedDataParallel (Li et al. 2020), but that a step may begin
    again where a process lacks memory. A bucket is sent once a step, as soon as it is complete, in
    the same order by all processes; so the one that begins again sends what it has not sent yet,
    and the others do not notice.

    In bfloat16 every process's gradient and every sum on the way is rounded to 8 bits: of N
    processes' gradients g the sum is off by at most N sum |g| / 256. What a process adds up over
    its own passes, and what it keeps of the sum, is in the gradients' own type.
    """

    def __init__(self, parameters: Iterable[Tensor], bf16: bool = False,
                 early: bool = False) -> None:
        """
        Args:
            parameters: whole ones that are trained, in the order in which backward passes come to
                them.
            bf16: gradients travel in bfloat16; else in their own type.
            early: buckets are sent in the last pass (not where passes call the other processes).
        """
        self.bf16 = bf16
        self.buckets: list[list[Tensor]] = []
        size = 0
        for parameter in parameters:
            size += parameter.numel()
            if not self.buckets or size > _SENT or parameter.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                size = parameter.numel()
            self.buckets[-1].append(parameter)
        self._place = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self._hooks = [p.register_post_accumulate_grad_hook(self._came)
                       for p in (self._place if early else ())]
        self._begin()

    def _begin(self) -> None:
        self._sent = 0
        self._travelling: collections.deque[tuple[int, Tensor, Callable[[], Any]]] = (
            collections.deque())
        self._kept: dict[Tensor, Tensor] = {}
        self._unused: set[Tensor] = set()
        self._arm(False)

    def _arm(self, last: bool) -> None:
        self._last, self._lacking = last, [len(bucket) for bucket in self.buckets]

    def last_pass(self) -> None:
        """Gradients are complete after the next pass."""
        self._arm(True)

    def again(self) -> None:
        """The step begins again, in other passes."""
        while self._travelling:
            self._arrive()
        for bucket in self.buckets[:self._sent]:
            for parameter in bucket:
                if parameter.grad is not None:
                    self._kept[parameter], parameter.grad = parameter.grad, None
        self._arm(False)

    def finish(self, counted: float) -> float:
        """Put the sums into the parameters' ``grad``, and return that of ``counted``.

        A gradient that some processes do not have is zero there; one that none has stays None.
        """
        while self._sent < len(self.buckets):
            self._send()
        # after the buckets, and so at the same place among the calls of all
        counted, *used = parallel.sum_scalars(
            counted, *(float(p not in self._unused) for p in self._place))
        while self._travelling:
            self._arrive()
        for parameter, gradient in self._kept.items():
            parameter.grad = gradient
        for parameter, by in zip(self._place, used, strict=True):
            if not by:
                parameter.grad = None
        self._begin()
        return counted

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _came(self, parameter: Tensor) -> None:
        """A backward pass has added to a parameter's gradient."""
        if parameter in self._kept:
            parameter.grad = None
        elif self._last:
            self._lacking[self._place[parameter]] -= 1
            while self._sent < len(self.buckets) and not self._lacking[self._sent]:
                self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self.buckets[self._sent]
        size = sum(p.numel() for p in bucket)
        while self._travelling and (
                size + sum(flat.numel() for _, flat, _ in self._travelling) > parallel.BUCKET):
            self._arrive()
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                self._unused.add(parameter)
        flat = bucket[0].new_empty(size, dtype=torch.bfloat16 if self.bf16 else None)
        torch._foreach_copy_(_parts(flat, bucket), _gradients(bucket))
        self._travelling.append((self._sent, flat, parallel.summing(flat)))
        self._sent += 1

    @torch.no_grad()
    def _arrive(self) -> None:
        number, flat, wait = self._travelling.popleft()
        wait()
        bucket = self.buckets[number]
        torch._foreach_copy_(_gradients(bucket), _parts(flat, bucket))


def _gradients(bucket: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in bucket if p.grad is not None]


def _parts(flat: Tensor, bucket: Sequence[Tensor]) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in bucket]), bucket,
                                               strict=True)]
