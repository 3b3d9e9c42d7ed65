"""Muon: momentum, orthogonalised, for matrices that act on activations (Jordan et al. 2024).

torch has one for matrices; this one takes stacks of them too, [..., out, in], each orthogonalised
by itself: the slices of a projected network's bank. Matrices of one size are worked on together,
and dealt to the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from planearly import parallel, sharding

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
        the others' updates. The momentum, one pass over memory, is kept whole on all of them; of
        parameters whose rows are divided among the processes every one keeps its part.
        """
        assigned = 0
        for group in self.param_groups:
            sizes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # tall ones go with wide ones; but those whose rows are divided stay as they are
                    size = parameter.shape[-2:]
                    key = size if sharding.divided(parameter) else torch.Size(sorted(size))
                    sizes.setdefault(key, []).append(parameter)
            # largest matrices first, so that the processes' work differs by at most one of them
            for size in sorted(sizes, key=lambda size: size.numel() * min(size), reverse=True):
                for some in _pieces(sizes[size], size):
                    if sharding.divided(some[0]):
                        updates = self._of_parts(group, some, size)
                    else:
                        first, parts = assigned, []
                        for parameter in some:
                            count = parameter.numel() // size.numel()
                            parts.append(parallel.deal(count, assigned))
                            assigned += count
                        own = self._ahead(group, some, parts)
                        updates = parallel.gather(orthogonalise(own, self.bf16),
                                                  assigned - first, first)
                        del own
                    self._update(group, some, size, updates)

    def _ahead(self, group: dict[str, Any], parameters: list[Tensor],
               parts: list[slice]) -> Tensor:
        """Some matrices of each parameter's Nesterov momentum, as far as this process has them, put
        together in bfloat16; where all are of one size but for their direction, the tall ones
        transposed."""
        gradients, averages = [], []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            gradients.append(sharding.part(parameter.grad))
            averages.append(sharding.part(state["momentum_buffer"]))
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])

        def matrices(of: list[Tensor]) -> list[Tensor]:
            return [each.reshape(-1, *each.shape[-2:])[part]
                    for each, part in zip(of, parts, strict=True)]

        ahead = list(torch._foreach_lerp(matrices(gradients), matrices(averages),
                                         group["momentum"]))
        if len({p.shape[-2:] for p in parameters}) > 1:
            ahead = [m.mT if m.shape[-2] > m.shape[-1] else m for m in ahead]
        count = sum(map(len, ahead))
        return torch.cat(ahead, out=ahead[0].new_empty(count, *ahead[0].shape[1:],
                                                       dtype=torch.bfloat16))

    def _of_parts(self, group: dict[str, Any], parameters: list[Tensor],
                  size: torch.Size) -> Tensor:
        """This process's rows of the updates of parameters whose rows are divided.

        The processes exchange rows of all matrices for whole matrices, and those back for rows.
        """
        rows = self._ahead(group, parameters, [slice(None)] * len(parameters))
        every = (len(rows), *size)
        own = sharding.exchanged(rows, every, had=1, gets=0)
        return sharding.exchanged(orthogonalise(own, self.bf16), every, had=0, gets=1)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], size: torch.Size,
                updates: Tensor) -> None:
        rate = group["lr"] * 0.2 * math.sqrt(max(size))
        counts = [p.numel() // size.numel() for p in parameters]
        own = [sharding.part(p) for p in parameters]
        torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(own, [
            (update if update.shape[-2:] == each.shape[-2:] else update.mT).view_as(each)
            for each, update in zip(own, updates.to(own[0].dtype).split(counts), strict=True)
        ], alpha=-rate)


def _pieces(parameters: list[Tensor], size: torch.Size) -> Iterator[list[Tensor]]:
    """Parameters whose matrices are orthogonalised together: at least one for every process, and
    for each about :data:`parallel.BUCKET` numbers."""
    enough = parallel.world() * max(parallel.BUCKET // size.numel(), 1)
    some: list[Tensor] = []
    count = 0
    for parameter in parameters:
        some.append(parameter)
        count += parameter.numel() // size.numel()
        if count >= enough:
            yield some
            some, count = [], 0
    if some:
        yield some
