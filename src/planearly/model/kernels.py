"""A bank's products on a GPU, in Triton.

The products of a projected network's bank (:mod:`planearly.model.projected`) are of some tens of
rows with millions of columns each, so they take as long as memory takes to move these. cuBLAS has
no tile so narrow and takes about twice as long: docs/benchmarks.md, "On a GPU", has both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
"""Most rows of either factor: each tile holds all of them."""
_PROGRAMS = 8
"""Of :func:`inner`, for each multiprocessor; each leaves a sum to be added up."""


@triton.jit
def _combine(left, right, result, n, h, size,
             N: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    rows, terms = tl.arange(0, N)[:, None], tl.arange(0, H)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    valid = columns < size
    a = tl.load(left + rows * h + terms[None, :],
                mask=(rows < n) & (terms[None, :] < h), other=0.0)
    b = tl.load(right + terms[:, None].to(tl.int64) * size + columns,
                mask=(terms[:, None] < h) & valid, other=0.0)
    tl.store(result + rows.to(tl.int64) * size + columns,
             tl.dot(a, b, input_precision="tf32x3"), mask=(rows < n) & valid)


@triton.jit
def _inner(left, right, sums, n, h, size,
           N: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    left_rows, right_rows = tl.arange(0, N)[:, None], tl.arange(0, H)[:, None]
    total = tl.zeros((N, H), dtype=tl.float32)
    for start in range(tl.program_id(0) * COLUMNS, size, tl.num_programs(0) * COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        valid = columns < size
        a = tl.load(left + left_rows.to(tl.int64) * size + columns,
                    mask=(left_rows < n) & valid, other=0.0)
        b = tl.load(right + right_rows.to(tl.int64) * size + columns,
                    mask=(right_rows < h) & valid, other=0.0)
        total += tl.dot(a, tl.trans(b), input_precision="tf32x3")
    tl.store(sums + tl.program_id(0) * N * H + left_rows * H + tl.arange(0, H)[None, :], total)


def check(device: torch.device) -> None:
    """Try both products in their largest tiles; waits for the device.

    Triton needs a C compiler, and not every GPU has the shared memory of these tiles.

    Raises:
        torch.OutOfMemoryError: the device's memory is full.
        Exception: Triton does not work here; of many kinds, by what is missing.
    """
    ones = torch.ones(MAX_ROWS, MAX_ROWS, device=device)
    for product in (combine, inner):
        if not (product(ones, ones) == MAX_ROWS).all():
            raise ArithmeticError("its products are wrong")


def combine(left: Tensor, right: Tensor) -> Tensor:
    """Linear combinations [n, size] of rows: ``left @ right``, as float32.

    Each product is three of TF32 (Ootomo and Yokota 2022), with relative errors of about 1e-7
    against float64. Autograd does not see it: the result requires no gradient.

    Args:
        left: float32 [n, h] on a GPU, n and h at most ``MAX_ROWS``.
        right: float32 [h, size] there; copied if it is not contiguous.
    """
    (n, h), size = left.shape, right.shape[1]
    rows, terms = _tile(n), _tile(h)
    columns = 128 if rows <= 32 else 64
    result = right.new_empty(n, size)
    _combine[(triton.cdiv(size, columns),)](
        left.contiguous(), right.contiguous(), result, n, h, size,
        N=rows, H=terms, COLUMNS=columns, num_warps=4)
    return result


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products [n, h] of rows: ``left @ right.T``, as float32.

    As :func:`combine`, with relative errors of about 3e-7. The sums are added in an order that the
    number of the GPU's multiprocessors sets: the same bits on every card of one model, not on
    others.

    Args:
        left: float32 [n, size] on a GPU, n at most ``MAX_ROWS``; copied if it is not contiguous.
        right: float32 [h, size] there, likewise.
    """
    (n, size), h = left.shape, len(right)
    left_rows, right_rows = _tile(n), _tile(h)
    columns = 64
    programs = min(_PROGRAMS * _multiprocessors(right.device), triton.cdiv(size, columns))
    sums = right.new_empty(programs, left_rows, right_rows)
    _inner[(programs,)](
        left.contiguous(), right.contiguous(), sums, n, h, size,
        N=left_rows, H=right_rows, COLUMNS=columns, num_warps=4, num_stages=4)
    return sums.sum(0)[:n, :h]


def _tile(rows: int) -> int:
    """A power of two, from 16, the matrix unit's least."""
    return max(triton.next_power_of_2(rows), 16)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # in Triton's interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
