"""Recipe files for `planearly run` from a plan, one per method."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from planearly import config, keys, methods
from planearly.cost.model import Setting
from planearly.files import atomic_write, check_place
from planearly.methods import GENERIC, Method
from planearly.model.transformer import Shape
from planearly.plan.options import ADAPTED, CHECKPOINT, Row, method_of
from planearly.plan.recommend import Plan
from planearly.plan.split import LEAST_SHARE

_PLANNED = "planned by `planearly plan`"
_PLACES = {"generic": ["PATH/TO/GENERIC"], "domains": ["PATH/TO/YOUR/DOCUMENTS"]}


def recipe(plan: Plan, row: Row, generic: list[str], domains: list[str]) -> str:
    """The recipe of one method, as YAML with a comment that says what it is for.

    Args:
        generic: paths of the generic corpus; a placeholder if empty.
        domains: paths of the specialization sets; a placeholder if empty.
    """
    setting, method = plan.setting, row.method
    of = method_of(method)
    # warm-up and schedule of the nearer size; rates follow from the width
    base = config.load("slm-126m" if setting.small.context >= 1024 else "nano")
    values: dict[str, Any] = {
        "name": f"planned-{method}",
        "generic": generic or _PLACES["generic"],
        "domains": domains or _PLACES["domains"],
        "methods": [method],
        "context": setting.small.context,
        "pretrain_tokens": max(round(row.pretrain_tokens), 1),
        "spec_tokens": plan.given.spec_tokens,
        "tokenizer": {"vocab_size": setting.small.vocab_size},
        "cluster": {"k": sorted({plan.clusters, setting.experts, setting.projected.experts})},
        "importance": {"k": plan.clusters},
        "model": _model(setting.small),
        "large": _model(setting.large),
        "projected": {"experts": setting.projected.experts, "rank": setting.projected.slices,
                      "matrices": setting.projected.matrices},
        "mixture": {"experts": setting.experts},
        "expert": plan.given.expert(of),
        "pretrain": {"batch_tokens": setting.step(row.pretrain_tokens),
                     "optimizer": _optimizer(base.pretrain)},
        "finetune": {**_limits(setting, of, row.finetune_tokens),
                     "optimizer": _optimizer(base.finetune)},
    }
    if plan.given.price is not None:
        values["cost"] = {"price_per_hour": plan.given.price, "currency": plan.given.currency}
    if of.taught and plan.given.teacher is not None:
        values["distill"] = {"teacher": plan.given.teacher.name}
    share = round(1 - row.cost.generic.tokens / max(row.pretrain_tokens, 1), 4)
    if of.adapts and share > LEAST_SHARE:
        values["adapt"] = {"share": share}
    if of.scored and plan.given.generic_tokens > row.pretrain_tokens:  # as many as are paid for
        values["selection"] = {
            "candidates": max(round(row.pretrain_tokens / plan.given.generic_tokens, 6), 1e-6)}
    if method == CHECKPOINT:
        _begin(values, plan, row)
    chosen = "recommended: " + plan.reason if method == plan.recommended else row.why
    head = f"# {method}, {_PLANNED} for {setting.device.label}; {chosen}\n"
    return head + yaml.safe_dump(values, sort_keys=False, width=100)


def write(plan: Plan, folder: Path, generic: list[str], domains: list[str]) -> list[Path]:
    """Write the recipe of every feasible method.

    Raises:
        UserError: a recipe of that name is none of a plan.
    """
    written = {folder / f"{row.method}.yaml": row for row in plan.rows if row.feasible}
    for path in written:
        check_place(path, "a recipe of a plan",
                    lambda there: _PLANNED.encode() in there.read_bytes().partition(b"\n")[0])
    for path, row in written.items():
        with atomic_write(path, "w") as handle:
            handle.write(recipe(plan, row, generic, domains))
    return [*written]


def _begin(values: dict[str, Any], plan: Plan, row: Row) -> None:
    """Make a recipe one that starts from the plan's checkpoint, whose shape and tokenizer it takes:
    pretraining on resampled text where there is any, else fine-tuning alone."""
    assert plan.given.checkpoint is not None
    given = plan.given.checkpoint
    for key in ("model", "large", "tokenizer", "projected", "mixture", "expert"):
        del values[key]
    continued = row.pretrain_tokens >= 1
    values |= {"start": given.name, "methods": [_as(ADAPTED.draws if continued else GENERIC)],
               "pretrain_tokens": round(row.pretrain_tokens),
               "context": min(values["context"], given.context or values["context"])}
    if continued:
        values["cluster"] = {"k": [plan.clusters]}
        return
    for key in ("cluster", "importance", "pretrain"):
        del values[key]
    if plan.given.generic_tokens == 0:
        values["generic"] = []


def _as(draws: str | None) -> str:
    """The method that trains a plain small model so."""
    return next(name for name in methods.paper() if replace(
        methods.TABLE[name], name="", label="", sentence="") == methods.Method(
            "", "", "", draws=draws))


def _model(shape: Shape) -> dict[str, Any]:
    return {"layers": shape.layers, "d_model": shape.d_model, "heads": shape.heads,
            "d_ff": shape.d_ff, "ffn": shape.ffn, "tie_embeddings": shape.tie_embeddings}


def _limits(setting: Setting, of: Method, tokens: float) -> dict[str, Any]:
    """The keys of ``finetune`` for a fine-tuning on so many tokens."""
    batch = setting.tuning_step(of.size)
    if of.tune == "lora":  # whose steps are a multiple of these
        tokens /= setting.lora.step_factor
    found: dict[str, Any] = {"batch_tokens": batch,
                             "max_steps": max(math.ceil(tokens / batch - 1e-6), 1)}
    passes = math.ceil(tokens / setting.spec_tokens - 1e-6)
    return found | ({"max_epochs": passes} if passes > keys.Finetune().max_epochs else {})


def _optimizer(train: keys.Train) -> dict[str, Any]:
    return {key: value for key, value in asdict(train.optimizer).items() if value is not None}

