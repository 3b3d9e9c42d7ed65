"""A linear layer whose rows have different weights.

Rows come sorted by group. Only the products of this layer see the groups: everything around them
(attention, embeddings, the loss) runs over all rows at once, in one compiled graph of fixed shape
however the rows divide among groups.

Two ways to the same products. On a CPU, one batched product in which every row meets a copy of its
group's matrix: a row's tokens pay for the copy, and many small products called one by one do not
keep two cores busy. On a GPU reading and writing copies would cost more than they spare, so there
it is one product per group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ByRow(torch.autograd.Function):
    """x [rows, time, in] times matrix ``groups[row]`` of weight [n, out, in] transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, groups)
        return torch.bmm(x, weight.to(x.dtype).index_select(0, groups).mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, groups = ctx.saved_tensors
        by_x = torch.bmm(gradient, weight.to(x.dtype).index_select(0, groups))
        # summed over a group's rows by a product: index_add is compiled to atomic additions
        member = torch.arange(weight.shape[0])[:, None] == groups
        by_row = torch.bmm(gradient.mT, x).to(weight.dtype).flatten(1)
        return by_x, (member.to(weight.dtype) @ by_row).view_as(weight), None


@torch.library.custom_op("planearly::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    """As :class:`_ByRow`, of whose products it makes one per group.

    Args:
        x: [rows, time, in], sorted by group.
        weight: [n, out, in].
        groups: int64 [rows] on the CPU.

    Returns:
        [rows, time, out]
    """
    result = x.new_empty(*x.shape[:2], weight.shape[1])
    each = torch.bincount(groups, minlength=len(weight)).tolist()
    for rows, matrix, out in zip(x.split(each), weight.mT.unbind(), result.split(each),
                                 strict=True):
        torch.mm(rows.flatten(0, 1), matrix, out=out.flatten(0, 1))
    return result


@torch.library.custom_op("planearly::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, groups: Tensor, n: int) -> Tensor:
    """For each group, y transposed times x: [n, out, in]."""
    result = x.new_empty(n, y.shape[2], x.shape[2])
    each = torch.bincount(groups, minlength=n).tolist()
    for left, right, out in zip(y.split(each), x.split(each), result.unbind(), strict=True):
        torch.mm(left.flatten(0, 1).T, right.flatten(0, 1), out=out)
    return result


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[1])


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, groups: Tensor, n: int) -> Tensor:
    return x.new_empty(n, y.shape[2], x.shape[2])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, groups = ctx.saved_tensors
    gradient = gradient.contiguous()
    # weight.shape[0]: len() would fix the number of groups in a compiled graph
    return (grouped_linear(gradient, weight.mT, groups),
            grouped_outer(gradient, x, groups, weight.shape[0]), None)


grouped_linear.register_autograd(_backward, setup_context=_keep)


def by_row(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    """:class:`_ByRow` as a function."""
    product: Tensor = _ByRow.apply(x, weight, groups)
    return product


def by_group(x: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    """The same by :func:`grouped_linear`, of any layout and precision."""
    return grouped_linear(x.contiguous(), weight.to(x.dtype), groups)


class GroupedLinear(nn.Module):
    """``nn.Linear`` without bias; its weight is set from outside.

    [out, in], or [n, out, in] for n groups.
    """

    weight: Tensor | None = None
    groups: Tensor | None = None
    """int64 [rows] on the CPU, ascending: the group of each row of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        weight, groups = self.weight, self.groups
        assert weight is not None
        if groups is None:
            return F.linear(x, weight)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return (by_row if kind == "cpu" else by_group)(x, weight, groups)
