"""A linear layer whose rows have different weights: one matrix product per group of rows.

Rows come sorted by group. The products are those of one group at a time, but everything around
them (attention, embeddings, the loss) runs over all rows at once, in one compiled graph of fixed
shape however the rows divide among groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("planearly::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """Rows of each group times its matrix transposed.

    Args:
        x: [rows, in], sorted by group.
        weight: [n, out, in].
        sizes: int64 [n] on the CPU, rows of each group; they sum to ``rows``.

    Returns:
        [rows, out]
    """
    result = x.new_empty(x.shape[0], weight.shape[1])
    each = sizes.tolist()
    for rows, matrix, out in zip(x.split(each), weight.mT.unbind(), result.split(each),
                                 strict=True):
        torch.mm(rows, matrix, out=out)
    return result


@torch.library.custom_op("planearly::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    """For each group, y transposed times x: [n, out, in] of [rows, out] and [rows, in]."""
    result = x.new_empty(len(sizes), y.shape[1], x.shape[1])
    each = sizes.tolist()
    for left, right, out in zip(y.T.split(each, 1), x.split(each), result.unbind(), strict=True):
        torch.mm(left, right, out=out)
    return result


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, sizes: Tensor) -> Tensor:
    return x.new_empty(sizes.shape[0], y.shape[1], x.shape[1])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor):
    x, weight, sizes = ctx.saved_tensors
    return (grouped_linear(gradient, weight.mT, sizes),
            grouped_outer(gradient, x, sizes), None)


grouped_linear.register_autograd(_backward, setup_context=_keep)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("planearly::grouped_linear", _device, torch.bfloat16)


class GroupedLinear(nn.Module):
    """``nn.Linear`` without bias, whose weight is lent: [out, in], or [n, out, in] for n groups."""

    weight: Tensor | None = None
    sizes: Tensor | None = None
    """int64 [n] on the CPU: rows of the batch (not tokens) of each group, which come sorted."""

    def forward(self, x: Tensor) -> Tensor:
        weight, sizes = self.weight, self.sizes
        assert weight is not None
        if sizes is None:
            return F.linear(x, weight)
        rows, time, width = x.shape
        flat = grouped_linear(x.reshape(rows * time, width), weight, sizes * time)
        return flat.view(rows, time, -1)
