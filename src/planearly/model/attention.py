"""Causal attention, grouped-query too: torch's fused kernels, or written out where that is faster.

On CPUs with matrix units for bfloat16, torch's kernel is slower at contexts of a few hundred tokens
than the products that it is made of, in its backward pass above all. Written out it is batched
products around one masked softmax, whose probabilities are kept for the way back; they grow with
the square of the context, so longer ones keep the kernel. In float32 the kernel is as fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 512
"""Longest context at which attention in bfloat16 on a CPU is written out."""


def written_out_pays(bf16: bool, context: int) -> bool:
    """Whether attention is written out on a CPU."""
    return bf16 and context <= SHORT


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position attends to itself and those before it, scores over sqrt(head_dim).

    Args:
        q: [rows, heads, time, head_dim].
        k, v: [rows, kv_heads, time, head_dim]; each is read by heads / kv_heads query heads.

    Returns:
        [rows, heads, time, head_dim]
    """
    if q.device.type == "cpu" and written_out_pays(q.dtype == torch.bfloat16, q.shape[2]):
        return written_out(q, k, v)
    if q.shape[1] != k.shape[1]:  # repeated: not every fused kernel has groups
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`causal` as batched products around one masked softmax."""
    rows, heads, time, width = q.shape
    group = heads // k.shape[1]
    # query heads of a group stand one below the other: no key or value is repeated
    y: Tensor = _WrittenOut.apply(
        q.reshape(-1, group * time, width), k.reshape(-1, time, width),
        v.reshape(-1, time, width))
    return y.view(rows, heads, time, width)


class _WrittenOut(torch.autograd.Function):
    """q [n, group * time, width], k and v [n, time, width]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale, time = q.shape[-1] ** -0.5, k.shape[1]
        scores = torch.bmm(q, k.mT).view(len(k), -1, time, time)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        ahead = torch.ones(time, time, dtype=torch.bool, device=q.device).triu(1)
        p = torch.softmax(scores.masked_fill(ahead, -torch.inf), -1).to(q.dtype)
        p = p.view(len(k), -1, time)
        y = torch.bmm(p, v)
        ctx.save_for_backward(q, k, v, p, y)
        return y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, p, y = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        by_v = torch.bmm(p.mT, slope)
        by_p = torch.bmm(slope, v.mT)
        # what the softmax's gradient subtracts, sum of p x by_p, from the narrower matrices
        mean = (slope.to(wide) * y.to(wide)).sum(-1, keepdim=True)
        by_scores = (p.to(wide) * (by_p.to(wide) - mean) * q.shape[-1] ** -0.5).to(q.dtype)
        return torch.bmm(by_scores, k), torch.bmm(by_scores.mT, q), by_v
