"""Muon: momentum, orthogonalised, for matrices that act on activations (Jordan et al. 2024).

torch has one for matrices; this one takes stacks of them too, [..., out, in], each orthogonalised
by itself: the slices of a projected network's bank. Matrices of one size are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix of each of ``matrices`` [n, rows, columns].

    Newton-Schulz iterations of a quintic in bfloat16, which bring singular values to between 0.7
    and 1.2 (Jordan et al. 2024).
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    The update's root mean square is 0.2, as AdamW's commonly is, so that rates compare (Liu et al.
    2025).
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.1,
                 momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            momentum = group["momentum"]
            sizes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                ahead = parameter.grad.lerp(average, momentum)
                sizes.setdefault(parameter.shape[-2:], []).append((parameter, ahead))
            for size, found in sizes.items():
                stacks = [ahead.reshape(-1, *size) for _, ahead in found]
                updates = orthogonalise(torch.cat(stacks)).split([len(s) for s in stacks])
                rate = group["lr"] * 0.2 * math.sqrt(max(size))
                for (parameter, _), update in zip(found, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-rate)
