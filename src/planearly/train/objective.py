"""What a training step minimises: a function of model and batch that returns a sum over targets.

Next-token cross-entropy is :meth:`Transformer.loss` itself; objectives that need more (a teacher's
distribution) are other functions of the same form, and the loop knows no difference.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from planearly.model.outside import AnyModel, AnyShape


class Objective(Protocol):
    """Loss of one microbatch, summed over its real targets: a scalar Tensor in nats.

    Args of a call: the dense model; inputs int64 [rows, time]; targets int64 [rows, time].
    """

    flops_per_token: float
    """FLOPs spent per token beside the model's own forward and backward pass."""
    flops_before: float
    """FLOPs spent once, before the first step."""
    seconds_before: float
    teacher_shape: AnyShape | None
    """Of a model that answers at every step, where its FLOPs are counted; None: the model's own."""
    teacher_width: int | None
    """Of the model whose FLOPs these are, whenever it answers; None: unknown, or there is none."""

    def __call__(self, model: AnyModel, inputs: Tensor, targets: Tensor) -> Tensor: ...


class NextToken:
    """Cross-entropy of the next token."""

    flops_per_token = flops_before = seconds_before = 0.0
    teacher_shape: AnyShape | None = None
    teacher_width: int | None = None

    def __call__(self, model: AnyModel, inputs: Tensor, targets: Tensor) -> Tensor:
        return model.loss(inputs, targets)
