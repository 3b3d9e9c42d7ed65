"""Muon: momentum, orthogonalised, for matrices that act on activations (Jordan et al. 2024).

torch has one for matrices; this one takes stacks of them too, [..., out, in], each orthogonalised
by itself: the slices of a projected network's bank. Matrices of one size are worked on together,
and divided among processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from planearly import parallel

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor, bf16: bool | None = None) -> Tensor:
    """About the nearest semi-orthogonal matrix of each of ``matrices`` [n, rows, columns].

    Newton-Schulz iterations of a quintic, which bring singular values to between 0.7 and 1.2
    (Jordan et al. 2024).

    Args:
        bf16: in bfloat16, else in float32; None: in the faster one.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    if bf16 is None:
        bf16 = parallel.bf16_is_fast(matrices.device)
    x = matrices.to(torch.bfloat16 if bf16 else torch.float32)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).bfloat16()


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    The update's root mean square is 0.2, as AdamW's commonly is, so that rates compare (Liu et al.
    2025).
    """

    bf16: bool | None = None
    """Of :func:`orthogonalise`."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.1,
                 momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients, which are the same on every process.

        Orthogonalising is the work: each process does it for its part of the matrices and receives
        the others' updates. The momentum, one pass over memory, is kept whole on all of them: so
        the first can save it alone, and training resumes at any number of processes.
        """
        assigned = 0
        for group in self.param_groups:
            momentum = group["momentum"]
            sizes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    sizes.setdefault(parameter.shape[-2:], []).append((parameter, parameter.grad))
            # largest matrices first, so that the processes' work differs by at most one of them
            for size in sorted(sizes, key=lambda size: size.numel() * min(size), reverse=True):
                first, counts, own = assigned, [], []
                for parameter, gradient in sizes[size]:
                    state = self.state[parameter]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                    matrices = gradient.reshape(-1, *size)
                    part = parallel.deal(len(matrices), assigned)
                    ahead = matrices[part].lerp(average.reshape(-1, *size)[part], momentum)
                    own.append(ahead.bfloat16())
                    counts.append(len(matrices))
                    assigned += len(matrices)
                updates = parallel.gather(orthogonalise(torch.cat(own), self.bf16),
                                          assigned - first, first)
                rate = group["lr"] * 0.2 * math.sqrt(max(size))
                for (parameter, _), update in zip(
                    sizes[size], updates.split(counts), strict=True
                ):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-rate)
