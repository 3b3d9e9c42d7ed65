"""Optimisers: presets, each a list of torch optimisers with their peak learning rates.

``paper``: Adam, 1e-4, clipping at 5.0, 1,000 warm-up steps (paper, section 4), then the inverse
square root schedule. ``modern``: Muon (Jordan et al. 2024) for the hidden matrices and for the
slices of a projected network's bank, AdamW for embeddings and norms, warm-up-stable-decay.
``adamw``: AdamW for all of them, otherwise as ``modern``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from planearly import keys
from planearly.train import schedule
from planearly.train.muon import Muon


@dataclass(frozen=True)
class Settings:
    """A preset with the recipe's overrides applied: nothing left open."""

    preset: str
    lr: float
    embedding_lr: float
    weight_decay: float
    clip: float
    warmup_steps: int
    schedule: str
    decay_share: float

    def scaled(self, factor: float) -> Settings:
        return replace(self, lr=self.lr * factor, embedding_lr=self.embedding_lr * factor)


PRESETS = {
    "paper": Settings("paper", 1e-4, 1e-4, 0.0, 5.0, 1000, "inverse-sqrt", 0.0),
    "adamw": Settings("adamw", 3e-3, 3e-3, 0.1, 1.0, 50, "wsd", 0.3),
    "modern": Settings("modern", 1e-2, 5e-3, 0.1, 1.0, 50, "wsd", 0.3),
}


def resolve(optimizer: keys.Optimizer, steps: int) -> Settings:
    """The preset named, with every key that the recipe sets; warm-up at most a tenth of a run."""
    preset = PRESETS[optimizer.preset]
    values = {
        name: value
        for name in ("lr", "embedding_lr", "weight_decay", "clip", "warmup_steps", "schedule")
        if (value := getattr(optimizer, name)) is not None
    }
    if "lr" in values and "embedding_lr" not in values:
        values["embedding_lr"] = preset.embedding_lr * values["lr"] / preset.lr
    settings = replace(preset, decay_share=optimizer.decay_share, **values)
    return replace(settings, warmup_steps=min(settings.warmup_steps, max(steps // 10, 1)))


def build(module: nn.Module, settings: Settings) -> list[Optimizer]:
    """Optimisers of all trainable parameters of ``module``.

    A parameter may carry ``lr_scale`` (its rate relative to the others') and ``elementwise`` (never
    Muon: not a matrix that acts on activations). The peak rate of a group is kept in its
    ``peak_lr``; :func:`set_rates` writes the current one.
    """
    hidden: dict[float, list[nn.Parameter]] = {}
    other: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = float(getattr(parameter, "lr_scale", 1.0))
        matrix = parameter.dim() >= 2 and not getattr(parameter, "elementwise", False)
        table = name.endswith(("embed.weight", "head.weight"))
        use = hidden if matrix and not table and settings.preset == "modern" else other
        use.setdefault(scale, []).append(parameter)

    def groups(of: dict[float, list[nn.Parameter]], lr: float) -> list[dict[str, object]]:
        return [{"params": p, "lr": lr * s, "peak_lr": lr * s} for s, p in sorted(of.items())]

    if settings.preset == "paper":
        return [torch.optim.Adam(groups(other, settings.lr), betas=(0.9, 0.999), fused=True)]
    made: list[Optimizer] = []
    if hidden:
        made.append(Muon(groups(hidden, settings.lr), settings.lr, settings.weight_decay))
    if other:
        made.append(torch.optim.AdamW(
            groups(other, settings.embedding_lr), betas=(0.9, 0.95), fused=True,
            weight_decay=settings.weight_decay if settings.preset == "adamw" else 0.0,
        ))
    return made


def set_rates(optimizers: list[Optimizer], settings: Settings, step: int, steps: int) -> float:
    """Write the rates of update ``step``; returns the factor of the peak."""
    factor = schedule.factor(
        settings.schedule, step, steps, settings.warmup_steps, settings.decay_share
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return factor
