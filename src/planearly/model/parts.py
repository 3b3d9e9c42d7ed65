"""Losses over large vocabularies: output matrix and loss a few rows at a time.

A model that can be divided so has ``hidden`` (final states of token ids), ``logits`` (of such
states) and ``head_parameters`` (what ``logits`` is made of).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from planearly.model.loss import IGNORE

LOGITS = 1 << 25
"""Most logits of one matrix: 128 MB in float32; a few such matrices are alive at once."""

Place = tuple[slice, Tensor]
"""Some rows of a microbatch, and bool [rows, time]: which of their targets are real."""
Part = Callable[[Tensor, Tensor, Place], Tensor]
"""Summed loss of logits [n, vocabulary] and their real targets [n], which stand at a place."""


def rows_at_once(time_steps: int, vocab_size: int) -> int:
    """How many rows of logits are made together."""
    return max(LOGITS // (time_steps * vocab_size), 1)


def summed(model: Any, hidden: Tensor, targets: Tensor, part: Part) -> Tensor:
    """A loss summed over the real targets of all rows, at least in float32.

    Args:
        hidden: the model's final states [rows, time, width].
        targets: int64 [rows, time]; -100 is none.
    """
    result: Tensor = _ByRows.apply(hidden, targets, model, part, torch.is_grad_enabled(),
                                   *model.head_parameters)
    return result


class _ByRows(torch.autograd.Function):
    """The gradients are taken on the way forward, part by part.

    So no logits are kept for the way back, and neither logits nor loss is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, model: Any, part: Part, slopes: bool,
                *parameters: Tensor) -> Tensor:
        trained = [p for p in parameters if slopes and p.requires_grad]
        hidden_slope = torch.zeros_like(hidden) if slopes else hidden
        parameter_slopes = [torch.zeros_like(p) for p in trained]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows = rows_at_once(targets.shape[1], model.shape.vocab_size)
        for start in range(0, len(targets), rows):
            place = slice(start, start + rows)
            real = targets[place] != IGNORE
            states = hidden[place][real].detach().requires_grad_(slopes)
            with torch.set_grad_enabled(slopes):
                value = part(model.logits(states), targets[place][real], (place, real))
            if slopes:
                first, *others = torch.autograd.grad(value, [states, *trained])
                hidden_slope[place][real] = first.to(hidden.dtype)
                for slope, more in zip(parameter_slopes, others, strict=True):
                    slope += more
            total = total + value.detach()
        ctx.save_for_backward(hidden_slope, *parameter_slopes)
        ctx.trained = [slopes and p.requires_grad for p in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        hidden_slope, *slopes = ctx.saved_tensors
        (scale,) = given
        left = iter(slopes)
        return (hidden_slope * scale.to(hidden_slope.dtype), None, None, None, None,
                *(_scaled(next(left), scale) if trained else None for trained in ctx.trained))


def _scaled(slope: Tensor, scale: Tensor) -> Tensor:
    return slope * scale.to(slope.dtype)
