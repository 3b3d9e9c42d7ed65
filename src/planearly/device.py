"""The processor that tensors live on, and whether bfloat16 is fast there."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


def best_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware, on a GPU or through AMX or AVX-512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
