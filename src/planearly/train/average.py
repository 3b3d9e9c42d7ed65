"""The average of a model's weights along its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from planearly.sharding import part


class Average:
    """Polynomial-decay averaging (Shamir and Zhang 2013, arXiv 1212.1824).

    After step t, which led to the weights w_t, the average is

        m_t = m_{t-1} + (w_t - m_{t-1}) / (1 + share (t - 1)),    m_1 = w_1.

    Step s counts in m_t in proportion to about s^(1 / share - 1): the average has a time constant
    of that share of the steps so far, whenever it is looked at, and the weights that training began
    with do not count. Share 1 is the mean of all steps, share 0 would be the last one alone.

    Attributes:
        tensors: the averages by the parameters' names, divided among processes as these are.
    """

    def __init__(self, module: nn.Module, share: float) -> None:
        self.share = share
        self._trained = {name: parameter for name, parameter in module.named_parameters()
                         if parameter.requires_grad}
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights that step ``step``, counted from 1, led to."""
        torch._foreach_lerp_([part(mean) for mean in self.tensors.values()],
                             [part(parameter) for parameter in self._trained.values()],
                             1 / (1 + self.share * (step - 1)))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the averages, bit for bit."""
        for name, parameter in self._trained.items():
            own, mean = part(parameter), part(self.tensors[name])
            kept = own.clone()
            own.copy_(mean)
            mean.copy_(kept)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts the module has the averages as its weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
