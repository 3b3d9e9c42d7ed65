"""What a recipe will cost, stage by stage, before anything of it runs.

The stages are those that `planearly run` makes, with its own rules for steps; fine-tuning counts
as much as its limits allow, and early stopping usually ends it sooner. What methods share is paid
once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planearly import keys
from planearly.cost import model
from planearly.cost.devices import Device
from planearly.cost.model import Setting, Work
from planearly.data import pydocs
from planearly.errors import UserError
from planearly.model import flops, starts
from planearly.model.transformer import Shape
from planearly.train.steps import finetune_limits, planned_rows, rows_per_step

SELECTORS = ("slm-is", "slm-dsir", "slm-knn", "slm-top")
"""Methods that pretrain per domain."""


def predict(recipe: keys.Recipe, device: Device) -> dict[str, Any]:
    """Parameters of both shapes, and the work of every training stage and in all.

    Returns:
        ``params`` (small, large, projected), ``stages`` (list of ``stage``, ``tokens``, ``flops``,
        ``device_hours``, ``money``), ``total`` (the same sums) and ``device``.

    Raises:
        UserError: the size of the specialization sets is not in the recipe.
    """
    setting = _setting(recipe, device)
    domains = domain_names(recipe)
    tokens = planned_rows(recipe) * recipe.context if recipe.pretrain_tokens else 0
    stages: dict[str, Work] = {}

    def pretrained(name: str, kind: str) -> None:
        if tokens:
            stages[f"pretrain/{name}"] = model.generic_token_cost(setting, kind) * tokens

    for method in recipe.methods:
        if method in ("slm", "slm-d"):
            pretrained("slm", "slm")
        if method in (*model.LARGE, "slm-d"):
            pretrained("llm", "llm")
        if method in ("slm-pn", "slm-mix"):
            pretrained(method, method)
        for domain in domains:
            if method in SELECTORS:
                pretrained(f"{method}.{domain}", "slm")
            stages[f"specialize/{method}.{domain}"] = _finetuning(recipe, setting, method)
            if method == "slm-d":
                stages[f"specialize/llm.{domain}"] = _finetuning(recipe, setting, "llm")
    total = sum(stages.values(), model.work(setting, 0.0, 0.0, setting.small.d_model))
    return {
        "device": device.name,
        "params": {"small": flops.parameters(setting.small),
                   "large": flops.parameters(setting.large),
                   "projected": flops.projected_parameters(setting.small, recipe.projected)},
        "stages": [{"stage": name, **vars(work)} for name, work in stages.items()],
        "total": vars(total),
    }


def domain_names(recipe: keys.Recipe) -> list[str]:
    """The recipe's domains: those it names, or all folders under ``domains_root``."""
    if recipe.domains:
        return [Path(name).stem if "/" in name else name for name in recipe.domains]
    if recipe.generic == [pydocs.NAME] and recipe.domains_root is None:
        return list(pydocs.HELD_OUT[:1])  # another one where this is not installed
    root = Path(recipe.domains_root or "")
    if recipe.domains_root and root.is_dir():
        return sorted(p.name for p in root.iterdir() if p.is_dir())
    raise UserError("the recipe names no domains: give 'domains', or a 'domains_root' that exists")


def _setting(recipe: keys.Recipe, device: Device) -> Setting:
    if recipe.spec_tokens is None:
        raise UserError("give 'spec_tokens' in the recipe: without it the size of the "
                        "specialization sets is known only once they are read")
    starts.check(recipe)
    entries = recipe.tokenizer.vocab_size
    return Setting(
        small=starts.shape(recipe) or Shape.of(recipe.model, entries, recipe.context),
        large=starts.shape(recipe, large=True)
        or Shape.of(recipe.large, entries, recipe.context),
        device=device,
        projected=recipe.projected, experts=recipe.mixture.experts, lora=recipe.lora,
        spec_tokens=recipe.spec_tokens, price=recipe.cost.price_per_hour,
        batch_tokens=recipe.pretrain.batch_tokens,
    )


def _finetuning(recipe: keys.Recipe, setting: Setting, method: str) -> Work:
    """Fine-tuning to the limits of the recipe."""
    finetune = recipe.finetune
    rows = rows_per_step(finetune.batch_tokens, recipe.context)
    steps, _ = finetune_limits(finetune, setting.spec_tokens,
                               -(-setting.spec_tokens // recipe.context), rows)
    tokens = float(steps * rows * recipe.context)
    if method == "llm-lora":
        tokens *= recipe.lora.step_factor
    if method == "slm-d":
        return model.distilled(setting, tokens)
    return model.finetuning(setting, method, tokens)
