"""A bank's products on a GPU, in Triton.

The products of a projected network's bank (:mod:`planearly.model.projected`) are of a few rows
with millions of columns each: moving these through memory takes longer than computing with them,
and the device's library, which has no tile as narrow, takes twice as long as that.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 64
"""Rows of a tile: most experts of a step, and most slices."""
_PROGRAMS = 8
"""Of :func:`inner`, for each multiprocessor; each leaves a sum to be added up."""


@triton.jit
def _combine(left, right, result, n, h, size,
             N: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    row, inside = tl.arange(0, N)[:, None], tl.arange(0, H)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = columns < size
    a = tl.load(left + row * h + inside[None, :],
                mask=(row < n) & (inside[None, :] < h), other=0.0)
    b = tl.load(right + inside[:, None].to(tl.int64) * size + columns,
                mask=(inside[:, None] < h) & there, other=0.0)
    tl.store(result + row.to(tl.int64) * size + columns,
             tl.dot(a, b, input_precision="tf32x3"), mask=(row < n) & there)


@triton.jit
def _inner(left, right, sums, n, h, size,
           N: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    row, other = tl.arange(0, N)[:, None], tl.arange(0, H)[:, None]
    total = tl.zeros((N, H), dtype=tl.float32)
    for start in range(tl.program_id(0) * COLUMNS, size, tl.num_programs(0) * COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        there = columns < size
        a = tl.load(left + row.to(tl.int64) * size + columns, mask=(row < n) & there, other=0.0)
        b = tl.load(right + other.to(tl.int64) * size + columns, mask=(other < h) & there,
                    other=0.0)
        total += tl.dot(a, tl.trans(b), input_precision="tf32x3")
    tl.store(sums + tl.program_id(0) * N * H + row * H + tl.arange(0, H)[None, :], total)


@functools.cache
def work(device: torch.device) -> bool:
    """Whether Triton works here: it needs a C compiler, and not every GPU holds the largest tile.
    """
    if device.type != "cuda":
        return False
    ones = torch.ones(MOST, MOST, device=device)
    try:
        return bool((combine(ones, ones) == MOST).all() and (inner(ones, ones) == MOST).all())
    except Exception:  # of many kinds, by what is missing; there is another way to the products
        return False


def combine(left: Tensor, right: Tensor) -> Tensor:
    """[n, h] times [h, size]."""
    (n, h), size = left.shape, right.shape[1]
    rows, inside = _tile(n), _tile(h)
    columns = 128 if rows <= 32 else 64
    result = right.new_empty(n, size)
    _combine[(triton.cdiv(size, columns),)](
        left.contiguous(), right.contiguous(), result, n, h, size,
        N=rows, H=inside, COLUMNS=columns, num_warps=4)
    return result


def inner(left: Tensor, right: Tensor) -> Tensor:
    """[n, size] times [h, size] transposed: [n, h]."""
    (n, size), h = left.shape, len(right)
    rows, others = _tile(n), _tile(h)
    columns = 64
    programs = min(_PROGRAMS * _processors(right.device), triton.cdiv(size, columns))
    sums = right.new_empty(programs, rows, others)
    _inner[(programs,)](
        left.contiguous(), right.contiguous(), sums, n, h, size,
        N=rows, H=others, COLUMNS=columns, num_warps=4, num_stages=4)
    return sums.sum(0)[:n, :h]


def _tile(rows: int) -> int:
    """A power of two, from 16, the matrix unit's least."""
    return max(triton.next_power_of_2(rows), 16)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # in Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
