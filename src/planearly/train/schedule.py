"""Learning-rate schedules: a factor of the peak rate as a function of the step."""

from __future__ import annotations

import math


def factor(kind: str, step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Share of the peak learning rate used for update ``step`` (0-based) of ``steps``.

    All warm up linearly over ``warmup`` steps. Then ``wsd`` (warm-up, stable, decay; Hu et al.
    2024) holds and falls linearly to zero over the last ``decay_share`` of the steps;
    ``inverse-sqrt`` falls as sqrt(warmup / step) (Vaswani et al. 2017); ``cosine`` falls to a
    tenth; ``constant`` holds.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "inverse-sqrt":
        return math.sqrt(max(warmup, 1) / (step + 1))
    if kind == "cosine":
        progress = (step - warmup) / max(steps - warmup, 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if kind == "wsd":
        return min(1.0, max(0.0, (steps - step) / _decay(steps, decay_share)))
    raise ValueError(f"no schedule '{kind}'")


def stable(kind: str, steps: int, decay_share: float) -> int:
    """Updates of a run of ``steps`` that a longer one of the same warm-up makes at the same rates.

    So a shorter run may branch off a longer one there, as warm-up-stable-decay is made for.
    """
    if kind == "wsd":
        return max(steps - _decay(steps, decay_share), 0)
    return 0 if kind == "cosine" else steps


def _decay(steps: int, decay_share: float) -> int:
    return max(round(steps * decay_share), 1)
