"""Optimisers: presets, each a list of torch optimisers with their peak learning rates.

``paper``: Adam, 1e-4, clipping at 5.0, 1,000 warm-up steps (paper, section 4), then the inverse
square root schedule; one rate and no decay, unless a recipe sets others. ``modern``: Muon (Jordan
et al. 2024) for the hidden matrices and for the slices of a projected network's bank, AdamW for
embeddings and norms, warm-up-stable-decay. ``adamw``: AdamW for all of them, otherwise as
``modern``.

Rates are defined here alone, per kind of parameter, at the width 256 where they were chosen, and go
to other widths by a rule (:data:`RULES`):

- AdamW on a hidden matrix moves each of its numbers by about the rate, all in one direction, so its
  effect on what it multiplies grows with the width: the rate falls as 1 / width (Yang et al. 2022,
  muP, table 3);
- Muon's update has all singular values 0.2 sqrt(width) by its own scaling to AdamW's root mean
  square, so the same effect asks for 1 / sqrt(width) (Yang, Simon and Bernstein 2023: an update's
  spectral norm should not depend on the width);
- embeddings, which are the output matrix as well, and the coefficients of a projected network:
  1 / sqrt(width), between an input table's constant and an output matrix's 1 / width (nanochat's
  rule);
- the paper's 1e-4 is for both its widths.

Below 256 they stay: the same rates served widths of 96 to 256 (docs/results/nano). A model that
begins as a checkpoint has been trained at falling rates to a minimum, which fresh weights' rates
would throw it out of; it is continued at a share of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from planearly import keys, sharding
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


BASE_WIDTH = 256
"""Width at which the presets' rates hold."""


@dataclass(frozen=True)
class Rule:
    """How a preset's rates go to other widths and to models that are trained already."""

    hidden: float
    """Rate of hidden matrices by width: this power of width / 256, above 256."""
    other: float
    """The same of embeddings, norms and coefficients."""
    continued: float
    """Share of the rates for a model that begins as a checkpoint."""


RULES = {
    "paper": Rule(0.0, 0.0, 1 / 3),
    "adamw": Rule(-1.0, -0.5, 1 / 30),
    "modern": Rule(-0.5, -0.5, 1 / 30),
}
"""A thirtieth brings hidden matrices of width 1,024 and 2,048 to 2.5e-5 and 1.3e-5 under AdamW, and
to 1.7e-4 and 1.2e-4 under Muon, where continued pretraining is customarily done; what it loses is
in docs/experiments.md. Why: docs/decisions.md, "A checkpoint is continued at a thirtieth"."""


SMALL_SET_FACTOR = {"paper": 1 / 3, "adamw": 0.15, "modern": 0.15}
"""Fine-tuning's rates as a share of pretraining's on a set of 1M tokens or fewer, by preset: the
paper's, and what was best at rates a hundred times higher (docs/experiments.md). Larger sets take
three times that, as in the paper."""


def preset_rates(optimizer: keys.Optimizer, width: int | None = None,
                 continued: bool = False) -> Settings:
    """A preset at a width (None: 256): what a recipe gets that sets no rate."""
    preset, rule = PRESETS[optimizer.preset], RULES[optimizer.preset]
    wider = max((width or BASE_WIDTH) / BASE_WIDTH, 1.0)
    share = rule.continued if continued else 1.0
    return replace(preset, lr=preset.lr * wider**rule.hidden * share,
                   embedding_lr=preset.embedding_lr * wider**rule.other * share)


def resolve(optimizer: keys.Optimizer, steps: int, width: int | None = None,
            continued: bool = False) -> Settings:
    """The preset named, with every key that the recipe sets; warm-up at most a tenth of a run.

    Args:
        width: of the model, for rates that the recipe does not set.
        continued: whether the model begins as a checkpoint.
    """
    preset = preset_rates(optimizer, width, continued)
    values = {
        name: value
        for name in ("lr", "embedding_lr", "weight_decay", "clip", "warmup_steps", "schedule")
        if (value := getattr(optimizer, name)) is not None
    }
    if "lr" in values and "embedding_lr" not in values:  # the paper's one rate is so exactly
        values["embedding_lr"] = values["lr"] if preset.preset == "paper" \
            else preset.embedding_lr * values["lr"] / preset.lr
    settings = replace(preset, decay_share=optimizer.decay_share, **values)
    return replace(settings, warmup_steps=min(settings.warmup_steps, max(steps // 10, 1)))


def resolve_finetuning(finetune: keys.Finetune, pretrain: keys.Optimizer, steps: int,
                       width: int | None = None, continued: bool = False,
                       factor: float = 1.0, times: float = 1.0) -> Settings:
    """As :func:`resolve`, for fine-tuning: rates that its section does not set are ``factor`` times
    those of the pretraining, where that has the same preset. An embedding rate that it sets without
    an ``lr_scale`` is taken as given.

    Args:
        factor: of :func:`planearly.train.steps.finetune_limits`.
        times: by which all rates are multiplied, those given too.
    """
    own = finetune.optimizer
    if own.lr is None and own.preset == pretrain.preset:
        own = replace(own, lr=pretrain.lr,
                      embedding_lr=own.embedding_lr or pretrain.embedding_lr)
    rates = resolve(own, steps, width, continued)
    scaled = rates.scaled(factor * times)
    if finetune.lr_scale is None and finetune.optimizer.embedding_lr is not None:
        return replace(scaled, embedding_lr=rates.embedding_lr * times)
    return scaled


def rate_keys(section: str, optimizer: keys.Optimizer, settings: Settings) -> dict[str, float]:
    """Keys of a recipe's section that set the rates of a training, and what they come to: the
    rate of embeddings follows the other unless the recipe sets it too."""
    own = {} if optimizer.embedding_lr is None else {"embedding_lr": settings.embedding_lr}
    return {f"{section}.optimizer.{key}": value
            for key, value in ({"lr": settings.lr} | own).items()}


def deviations(optimizer: keys.Optimizer, width: int, continued: bool) -> dict[str, float]:
    """How a training's rates and decay differ from those of older versions, which had one rate for
    all widths and beginnings and passed over what a recipe set beside the paper's preset; nothing
    where they do not: for the fingerprints of stages."""
    return _by_width(optimizer, width, continued) | _beside_paper(
        resolve(optimizer, 1, width, continued))


def _by_width(optimizer: keys.Optimizer, width: int, continued: bool) -> dict[str, float]:
    own, plain = preset_rates(optimizer, width, continued), PRESETS[optimizer.preset]
    found = {}
    if optimizer.lr is None and own.lr != plain.lr:
        found["lr"] = own.lr
    share = own.embedding_lr / own.lr
    if optimizer.embedding_lr is None and share != plain.embedding_lr / plain.lr:
        found["embedding_share"] = share
    return found


def _beside_paper(settings: Settings, decays: bool = True) -> dict[str, float]:
    if settings.preset != "paper":
        return {}
    found = {}
    if not math.isclose(settings.embedding_lr, settings.lr):
        found["other_share"] = settings.embedding_lr / settings.lr
    if decays and settings.weight_decay:
        found["decay"] = settings.weight_decay
    return found


def finetuning_deviations(finetune: keys.Finetune, pretrain: keys.Optimizer, width: int,
                          continued: bool, scaled: bool = True,
                          decays: bool = True) -> dict[str, float | None]:
    """As :func:`deviations`, of :func:`resolve_finetuning`.

    Args:
        scaled: whether the set's size scales the rates: not of fresh weights, nor of a vector.
        decays: whether matrices are trained to which weight decay applies.
    """
    own = finetune.optimizer
    found: dict[str, float | None] = dict(_by_width(own, width, continued))
    if own.lr is None and own.preset == pretrain.preset:  # it inherits
        if pretrain.lr is not None:
            found |= {"lr": pretrain.lr, "embedding_lr": pretrain.embedding_lr}
        elif pretrain.embedding_lr is not None and own.embedding_lr is None:
            found["embedding_lr"] = pretrain.embedding_lr
    if finetune.lr_scale is None and (own.preset != "paper" or own.lr is not None or continued):
        found["small_set_factor"] = 1.0 if own.lr is not None or continued \
            else SMALL_SET_FACTOR[own.preset]
    if finetune.lr_scale is None and own.lr is None and own.embedding_lr is not None and (
            scaled and not continued):  # older versions scaled it too
        found["embedding_factor"] = 1.0
    return found | _beside_paper(
        resolve_finetuning(finetune, pretrain, 1, width, continued), decays)


def build(module: nn.Module, settings: Settings) -> list[Optimizer]:
    """Optimisers of all trainable parameters of ``module``.

    A parameter may carry ``lr_scale`` (its rate relative to the others') and ``elementwise`` (never
    Muon: not a matrix that acts on activations). Weight decay is for the matrices that act on
    activations alone, whichever optimiser they have. The peak rate of a group is kept in its
    ``peak_lr``; :func:`set_rates` writes the current one.
    """
    Kind = tuple[float, bool]  # no group mixes what is divided among processes with what is whole
    hidden: dict[Kind, list[nn.Parameter]] = {}
    other: dict[Kind, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = float(getattr(parameter, "lr_scale", 1.0))
        matrix = parameter.dim() >= 2 and not getattr(parameter, "elementwise", False)
        table = name.endswith(("embed.weight", "head.weight"))
        use = hidden if matrix and not table else other
        use.setdefault((scale, sharding.divided(parameter)), []).append(parameter)

    def groups(of: dict[Kind, list[nn.Parameter]], lr: float,
               decay: float) -> list[dict[str, object]]:
        return [{"params": p, "lr": lr * s, "peak_lr": lr * s, "weight_decay": decay}
                for (s, _), p in sorted(of.items(), key=lambda item: item[0])]

    if settings.preset == "paper":
        every = [*groups(hidden, settings.lr, settings.weight_decay),
                 *groups(other, settings.embedding_lr, 0.0)]
        return [torch.optim.Adam(every, betas=(0.9, 0.999), fused=True,
                                 decoupled_weight_decay=True)]
    made: list[Optimizer] = []
    matrices = groups(hidden, settings.lr, settings.weight_decay)
    if settings.preset == "modern" and matrices:
        made.append(Muon(matrices, settings.lr, settings.weight_decay))
        matrices = []
    rest = [*matrices, *groups(other, settings.embedding_lr, 0.0)]
    if rest:
        made.append(torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True))
    return made


def compute(optimizers: list[Optimizer], bf16: bool) -> None:
    """Say in which precision the optimisers' matrix products are."""
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.bf16 = bf16


def set_rates(optimizers: list[Optimizer], settings: Settings, step: int, steps: int) -> float:
    """Write the rates of update ``step``; returns the factor of the peak."""
    factor = schedule.factor(
        settings.schedule, step, steps, settings.warmup_steps, settings.decay_share
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return factor
