"""Output matrix and cross-entropy together, some positions at a time.

The logits of a microbatch are its largest matrix by far: vocabulary over width times the hidden
states. Here they exist for a few hundred positions at once, and never twice: the gradients are
taken on the way forward, while a chunk's logits are at hand (as Wijmans et al. 2024 and
liger-kernel do on GPUs), so the way back is a multiplication.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that does not count; torch's ``ignore_index``, as in data.dataset, which
models do not import."""
_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Most logits of one chunk: 32 MB in float32 on a CPU, 1 GB on a GPU."""

Chunk = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]]


def chunk(hidden: Tensor, weight: Tensor, targets: Tensor, slopes: bool) -> tuple[Tensor, ...]:
    """Cross-entropy of a few positions, summed in float32, and its gradients.

    Args:
        hidden: [n, d]; weight: [vocabulary, d], of one type; targets: int64 [n].
        slopes: whether gradients are wanted.

    Returns:
        The sum; and, if ``slopes``, its gradients by ``hidden`` [n, d] and by the logits
        [n, vocabulary], in the type of ``hidden``.
    """
    logits = torch.mm(hidden, weight.t())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    norm = logits.logsumexp(-1)
    real = targets != IGNORE
    place = torch.where(real, targets, 0)[:, None]
    total = torch.where(real, norm - logits.gather(1, place)[:, 0], 0.0).sum()
    if not slopes:
        return (total,)
    share = (logits - norm[:, None]).exp()
    column = torch.arange(len(weight), device=logits.device)
    slope = torch.where(real[:, None], share - (column == place).to(share.dtype), 0.0)
    slope = slope.to(hidden.dtype)
    return total, torch.mm(slope, weight), slope


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, run: Chunk = chunk) -> Tensor:
    """Sum, in float32, of the cross-entropies of ``hidden @ weight.T`` in nats.

    Under autocast the products run in its type.

    Args:
        hidden: [n, d]; weight: [vocabulary, d].
        targets: int64 [n]; positions with :data:`IGNORE` do not count.
        run: :func:`chunk`, or a compiled form of it.
    """
    total: Tensor = _Chunked.apply(hidden, weight, targets, run, torch.is_grad_enabled())
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, run: Chunk,
                wanted: bool) -> Tensor:
        kind = hidden.device.type
        dtype = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind)
                 else hidden.dtype)
        by_hidden, by_weight, *_ = (wanted and needed for needed in ctx.needs_input_grad)
        slopes = by_hidden or by_weight
        matrix = weight.to(dtype)
        states = hidden.to(dtype)
        hidden_slope = torch.empty_like(states) if slopes else None
        weight_slope = torch.zeros_like(weight) if by_weight else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        with torch.autocast(kind, enabled=False):
            for part in even_parts(len(targets), chunk_tokens(len(weight), kind)):
                value, *of = run(states[part], matrix, targets[part], slopes)
                total = total + value
                if hidden_slope is not None:
                    hidden_slope[part] = of[0]
                if weight_slope is not None:
                    add_product(weight_slope, of[1].t(), states[part])
        ctx.save_for_backward(hidden_slope, weight_slope)
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden_slope, weight_slope = ctx.saved_tensors
        (slope,) = slopes
        return (None if hidden_slope is None else (hidden_slope * slope).to(ctx.hidden_dtype),
                None if weight_slope is None else weight_slope * slope, None, None, None)


def chunk_tokens(vocab_size: int, device: str) -> int:
    """Most positions whose logits exist at once, on a kind of device."""
    return max(_LOGITS.get(device, _LOGITS["cpu"]) // vocab_size, 1)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, which may be of a wider type."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += torch.mm(left, right)


def even_parts(n: int, most: int) -> list[slice]:
    """[0, n) in as few slices of at most ``most`` (at least 1) as there can be, about equal."""
    parts = -(-n // most)
    bounds = [n * i // parts for i in range(parts + 1)] if parts else [0]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
