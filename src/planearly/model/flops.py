"""How many parameters and how many floating-point operations: exact, from the shape alone.

Conventions. A multiplication and its addition are two operations. Matrix products only: norms,
activations, softmax, rotary positions and the optimiser are left out. The embedding look-up is
free; the output matrix counts. Attention counts as executed by a dense kernel, the full
context x context square with no discount for the causal half (the convention of PaLM and of
``torch.utils.flop_counter``; ``causal=True`` counts the half that matters). Training costs three
times the forward pass: gradients of activations and of weights cost one forward each; what a fused
attention kernel computes again in its backward pass is not counted.

Costs are per token of a full window, so tokens times cost is what a run executes when it pads
nothing.

The functions of a dense model's shape take other kinds of shapes too: whoever defines one registers
how it is counted (:mod:`planearly.model.outside`).
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from planearly import keys
from planearly.model.projected import projected_names
from planearly.model.transformer import FFN_MATRICES, Shape

Counted = Any
"""A :class:`Shape`, or another kind that is registered."""


@singledispatch
def parameters(shape: Counted) -> int:
    """All parameters of the dense model; a tied output matrix counts once."""
    tables = 1 if shape.tie_embeddings else 2
    return non_embedding(shape) + tables * shape.vocab_size * shape.d_model


@singledispatch
def non_embedding(shape: Counted) -> int:
    """Parameters without the embedding and the output matrix: blocks and norms."""
    norms = (2 * shape.layers + 1) * shape.d_model
    return shape.layers * (_attention_weights(shape) + _ffn_weights(shape)) + norms


@singledispatch
def forward(shape: Counted, causal: bool = False) -> int:
    """Operations per token of one forward pass over full windows."""
    matrices = shape.layers * (_attention_weights(shape) + _ffn_weights(shape))
    head = shape.vocab_size * shape.d_model
    return 2 * (matrices + head) + _attention_square(shape, causal)


def training(shape: Counted, causal: bool = False) -> int:
    """Operations per token of one training step: three forward passes."""
    return 3 * forward(shape, causal)


# LoRA -------------------------------------------------------------------------------------------

@singledispatch
def lora_parameters(shape: Counted, rank: int) -> int:
    """Parameters of adapters of this rank on every matrix of every block (Hu et al. 2021)."""
    return shape.layers * rank * _adapter_sides(shape)


@singledispatch
def lora_training(shape: Counted, rank: int) -> int:
    """Operations per token of one LoRA step.

    Frozen matrices need no weight gradient (two forwards instead of three); attention, which has
    no weights, and the adapters cost three. Nothing before the first block is trained, so its
    query, key and value products need no gradient of their input either.
    """
    d = shape.d_model
    frozen = shape.layers * (_attention_weights(shape) + _ffn_weights(shape)) \
        + shape.vocab_size * d
    adapters = lora_parameters(shape, rank)
    unneeded = 2 * (sum(shape.qkv_widths) * d + 3 * rank * d)
    return 2 * 2 * frozen + 3 * _attention_square(shape, False) + 3 * 2 * adapters - unneeded


# Projected networks and mixtures ----------------------------------------------------------------

def projected_weights(shape: Shape, projected: keys.Projected) -> int:
    """Numbers in the projected matrices of one expert's dense model.

    Raises:
        UserError: an unknown matrix or layer, or nothing to project.
    """
    return len(projected_names(shape, projected)) * shape.d_model * shape.d_ff


def projected_parameters(shape: Shape, projected: keys.Projected) -> int:
    """All parameters of the projected network (paper, section 3; the k x m matrix E is shared).

    Each projected matrix is replaced by a bank of ``rank`` slices of its size and an
    ``embedding`` x ``rank`` matrix M.
    """
    dense = parameters(shape) - projected_weights(shape, projected)
    bank = projected.slices * projected_weights(shape, projected)
    return dense + bank + _mixing(shape, projected) + projected.experts * projected.embedding


def projection_per_step(shape: Shape, projected: keys.Projected, groups: int) -> int:
    """Extra operations of the deferred projection per optimiser step with ``groups`` in it, of
    clusters or blends.

    One product makes the dense weights, one returns the bank's gradient and one the coefficients';
    the products with M and E are counted too.
    """
    bank = projected.slices * projected_weights(shape, projected)
    averages = 2 * 2 * groups * projected.experts * projected.embedding if projected.blends else 0
    return 3 * 2 * groups * (bank + _mixing(shape, projected)) + averages


def orthogonalising(rows: int, columns: int) -> float:
    """FLOPs of Muon per number of the matrix and step (:mod:`planearly.train.muon`).

    Five times two products of 2 r^2 c and one of 2 r^3, r the smaller side and c the larger, over
    the r c numbers.
    """
    r, c = sorted((rows, columns))
    return 5 * (4 * r * r * c + 2 * r**3) / (r * c)


def mixture_parameters(shape: Shape, experts: int) -> int:
    """All parameters of a hard mixture: independent small models."""
    return experts * parameters(shape)


def _attention_weights(shape: Shape) -> int:
    return (sum(shape.qkv_widths) + shape.d_model) * shape.d_model


def _ffn_weights(shape: Shape) -> int:
    return len(FFN_MATRICES[shape.ffn]) * shape.d_model * shape.d_ff


def _attention_square(shape: Shape, causal: bool) -> int:
    keys = (shape.context + 1) / 2 if causal else shape.context
    return round(2 * 2 * shape.layers * shape.d_model * keys)


def _adapter_sides(shape: Shape) -> int:
    """Sum of (in + out) over a block's matrices: q, k, v, o and the feed-forward's."""
    attention = 5 * shape.d_model + sum(shape.qkv_widths)
    return attention + len(FFN_MATRICES[shape.ffn]) * (shape.d_model + shape.d_ff)


def _mixing(shape: Shape, projected: keys.Projected) -> int:
    """Numbers in all matrices M."""
    return len(projected_names(shape, projected)) * projected.embedding * projected.slices
