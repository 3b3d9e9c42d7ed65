"""A bank's products on a GPU, in Triton.

The products of a projected network's bank (:mod:`planearly.model.projected`) are of a few rows
with millions of columns each: moving the bank through memory takes longer than computing with it.
The device's library moves it once for every product, slower than memory allows. Here the bank and
the weights' gradients are read once each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 64
"""Rows of a tile: most experts of a step, and most slices."""
_PROGRAMS = 4
"""Of :func:`returned`, for each multiprocessor; each leaves a sum to be added up."""


@triton.jit
def _project(coefficients, slices, weights, n, h, size,
             N: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    row, slice_ = tl.arange(0, N)[:, None], tl.arange(0, H)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = columns < size
    c = tl.load(coefficients + row * h + slice_[None, :],
                mask=(row < n) & (slice_[None, :] < h), other=0.0)
    t = tl.load(slices + slice_[:, None].to(tl.int64) * size + columns,
                mask=(slice_[:, None] < h) & there, other=0.0)
    tl.store(weights + row.to(tl.int64) * size + columns,
             tl.dot(c, t, input_precision="tf32x3"), mask=(row < n) & there)


@triton.jit
def _return(gradients, coefficients, slices, by_slice, sums, n, h, size,
            N: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    row, slice_ = tl.arange(0, N), tl.arange(0, H)
    across = tl.load(coefficients + row[None, :] * h + slice_[:, None],
                     mask=(row[None, :] < n) & (slice_[:, None] < h), other=0.0)
    total = tl.zeros((N, H), dtype=tl.float32)
    for start in range(tl.program_id(0) * COLUMNS, size, tl.num_programs(0) * COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        there = columns < size
        at = slice_[:, None].to(tl.int64) * size + columns
        g = tl.load(gradients + row[:, None].to(tl.int64) * size + columns,
                    mask=(row[:, None] < n) & there, other=0.0)
        t = tl.load(slices + at, mask=(slice_[:, None] < h) & there, other=0.0)
        total += tl.dot(g, tl.trans(t), input_precision="tf32x3")
        tl.store(by_slice + at, tl.dot(across, g, input_precision="tf32x3"),
                 mask=(slice_[:, None] < h) & there)
    tl.store(sums + tl.program_id(0) * N * H + row[:, None] * H + slice_[None, :], total)


def fit(coefficients: Tensor, slices: Tensor) -> bool:
    """Whether these are products for this module: [n, h] and [h, size]."""
    return (slices.device.type == "cuda" and slices.dtype == torch.float32
            and max(coefficients.shape) <= MOST)


def projected(coefficients: Tensor, slices: Tensor) -> Tensor:
    """Weights [n, size], as coefficients [n, h] times slices [h, size]."""
    (n, h), size = coefficients.shape, slices.shape[1]
    weights = slices.new_empty(n, size)
    rows, of, columns = _tile(n, h)
    _project[(triton.cdiv(size, columns),)](
        coefficients.contiguous(), slices.contiguous(), weights, n, h, size,
        N=rows, H=of, COLUMNS=columns, num_warps=_warps(of, columns))
    return weights


def returned(gradients: Tensor, coefficients: Tensor, slices: Tensor) -> tuple[Tensor, Tensor]:
    """Of :func:`projected` weights' gradients [n, size], those of the coefficients and slices."""
    (n, h), size = coefficients.shape, slices.shape[1]
    rows, of, columns = _tile(n, h)
    programs = min(_PROGRAMS * _processors(slices.device), triton.cdiv(size, columns))
    by_slice, sums = torch.empty_like(slices), slices.new_empty(programs, rows, of)
    _return[(programs,)](
        gradients.contiguous(), coefficients.contiguous(), slices.contiguous(), by_slice, sums,
        n, h, size, N=rows, H=of, COLUMNS=columns, num_warps=_warps(of, columns))
    return sums.sum(0)[:n, :h], by_slice


def _tile(n: int, h: int) -> tuple[int, int, int]:
    """Rows of a tile, its slices and its columns: powers of two, from 16, the matrix unit's least.
    """
    rows, of = (max(triton.next_power_of_2(count), 16) for count in (n, h))
    return rows, of, 256 if max(rows, of) <= 16 else 128 if max(rows, of) <= 32 else 64


def _warps(of: int, columns: int) -> int:
    return 4 if of * columns <= 4096 else 8


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # in Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
