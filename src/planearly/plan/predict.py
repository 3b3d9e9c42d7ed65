"""What a recipe will cost, stage by stage, before anything of it runs.

The stages are those that `planearly run` makes, with its own rules for steps; fine-tuning counts
as much as its limits allow, and early stopping usually ends it sooner. What methods share is paid
once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from planearly import keys, methods
from planearly.cost import devices, model
from planearly.cost.devices import Device
from planearly.cost.model import Setting, Work
from planearly.data import corpora, excerpts, pydocs, subset
from planearly.data.domains import domain_names as folders_of
from planearly.data.domains import name_of
from planearly.errors import UserError
from planearly.methods import Method
from planearly.model import flops, outside, starts
from planearly.model.transformer import Shape
from planearly.plan import sizes
from planearly.train.steps import (
    adapted_steps,
    finetune_limits,
    own_rows,
    planned_rows,
    rows_per_step,
    taught_share,
)


def predict(recipe: keys.Recipe, device: Device) -> dict[str, Any]:
    """Parameters of both shapes, and the work of every training stage and in all.

    Returns:
        ``slices`` (why a projected network has so many, where the recipe leaves them open; "": it
        does not, or has no such network), ``params`` (small, large, projected), ``stages`` (list of
        ``stage``, ``begun`` (the share that it takes over from another of them), ``tokens``,
        ``flops``, ``device_hours``, ``money``), ``total`` (the same sums, what is shared once),
        ``device``, a ``note`` on its hours ("": none), and of the corpora by name ``corpora``
        (list of ``corpus``, ``tokens``, ``licence``, and ``downloads``, bytes).

    Raises:
        UserError: the size of the specialization sets is not in the recipe.
    """
    why, recipe = sizes.why_slices(recipe), sizes.settled(recipe)
    setting = _setting(recipe, device)
    domains = domain_names(recipe)
    own = planned_rows(recipe) * recipe.context if recipe.pretrain_tokens else 0
    outside = _teacher(recipe)
    stages: dict[str, Work] = {}
    begun: dict[str, float] = {}
    for name in recipe.methods:
        row = methods.of(recipe, name)
        teacher = methods.teacher() if row.taught and outside is None else None
        scorer = methods.find("slm") if row.scored else None
        for each in filter(None, (row, teacher, scorer)):
            tokens, mark = own, ""
            if each is teacher:
                tokens = planned_rows(recipe, recipe.distill.teacher_tokens) * recipe.context
                beside = tokens != own and any(methods.find(other).base == teacher.base
                                               for other in recipe.methods if other != name)
                mark = " (teacher)" if beside else ""  # another of its name has other tokens
            if each.pretrains and tokens:
                stages |= {stage + mark: work for stage, work in _pretraining(
                    setting, each, domains, tokens).items()}
                if each.adapts:
                    begun[f"pretrain/{each.base}"] = 1 - setting.own_share(each)
            one = _finetuning_tokens(recipe, setting, each, _replayed(recipe, each))
            if each.scored and tokens:
                stages |= dict.fromkeys(
                    ["losses/slm", *(f"losses/slm.{domain}" for domain in domains)],
                    model.scoring(setting, each, tokens))
            for domain in domains:
                if each.bank:
                    stages[f"expert/{each.name}.{domain}"] = _expert(recipe, setting, each)
                stages[f"specialize/{each.name}.{domain}{mark}"] = (
                    model.distilled(replace(setting, large=outside or setting.large), one,
                                    setting.spec_tokens if recipe.distill.top_k else None)
                    if each.taught else model.finetuning(setting, each, one))
    total = sum((work * (1 - begun.get(name, 0.0)) for name, work in stages.items()),
                model.work(setting, 0.0, 0.0, setting.small))
    return {
        "device": device.label, "note": note(recipe, device), "slices": why,
        "params": {"small": flops.parameters(setting.small),
                   "large": flops.parameters(setting.large),
                   "projected": flops.projected_parameters(setting.small, recipe.projected)},
        "stages": [{"stage": name, "begun": begun.get(name, 0.0), **vars(work)}
                   for name, work in stages.items()],
        "total": vars(total),
        "corpora": _corpora(recipe),
    }


def _corpora(recipe: keys.Recipe) -> list[dict[str, Any]]:
    """What the corpora by name hold, and what is downloaded of them."""
    found = {name: corpus for name, corpus in corpora.TABLE.items()
             if name in recipe.generic and not Path(name).exists()}
    text = sum(corpus.text for corpus in found.values())
    read = text * subset.read_share(text, recipe.data.max_tokens)
    if not (recipe.tokenizer.path or recipe.start or recipe.large_start):
        read += min(excerpts.READ_AHEAD * recipe.tokenizer.sample_bytes, text)
    return [{"corpus": name, "tokens": corpus.tokens, "licence": corpus.licence,
             "downloads": corpus.download * read / text} for name, corpus in found.items()]


def _pretraining(setting: Setting, row: Method, domains: list[str],
                 tokens: int) -> dict[str, Work]:
    """A method's pretraining stages: shared by all domains, one for each, or a part of both."""
    whole = model.pretraining(setting, row, tokens)
    if not row.needs_domain:
        return {f"pretrain/{row.pretraining()}": whole}
    share = setting.own_share(row)
    own = model.own_pretraining(setting, row, tokens) * share
    shared = {f"pretrain/{row.plateau}": whole * (1 - share)} if share < 1 else {}
    return shared | {f"pretrain/{row.pretraining(domain)}": own for domain in domains}


def domain_names(recipe: keys.Recipe) -> list[str]:
    """The recipe's domains: those it names, or all folders under ``domains_root``.

    Raises:
        UserError: it names none, or there are none under the root.
    """
    if recipe.domains:
        return list(map(name_of, recipe.domains))
    if recipe.generic == [pydocs.NAME] and recipe.domains_root is None:
        return list(pydocs.HELD_OUT[:1])  # another one where this is not installed
    if recipe.domains_root:
        return list(map(name_of, folders_of(recipe.domains_root)))
    raise UserError("the recipe names no domains: give 'domains' or 'domains_root'")


def _setting(recipe: keys.Recipe, device: Device) -> Setting:
    if recipe.spec_tokens is None:
        raise UserError("give 'spec_tokens' in the recipe: without it the size of the "
                        "specialization sets is known only once they are read")
    starts.check(recipe)
    before, adapted = adapted_steps(recipe)
    entries = recipe.tokenizer.vocab_size
    return Setting(
        small=outside.alike(starts.shape(recipe)
                            or Shape.of(recipe.model, entries, recipe.context)),
        large=outside.alike(starts.shape(recipe, large=True)
                            or Shape.of(recipe.large, entries, recipe.context)),
        device=device,
        projected=recipe.projected, experts=recipe.mixture.experts, lora=recipe.lora,
        spec_tokens=recipe.spec_tokens, price=recipe.cost.price_per_hour,
        batch_tokens=_step_tokens(recipe, recipe.pretrain),
        finetune_batch_tokens=_step_tokens(recipe, recipe.finetune), expert=recipe.expert,
        candidate_tokens=_candidates(recipe), adapt_share=adapted / (before + adapted),
        preset=recipe.pretrain.optimizer.preset, finetune_preset=recipe.finetune.optimizer.preset,
    )


def _step_tokens(recipe: keys.Recipe, train: keys.Train) -> int:
    """Tokens of a step: of whole rows."""
    return rows_per_step(train.step_tokens, recipe.context) * recipe.context


def _candidates(recipe: keys.Recipe) -> float | None:
    """Tokens that a selector chooses among, where the size of the corpus is in the recipe."""
    whole = recipe.data.max_tokens or sum(each["tokens"] for each in _corpora(recipe))
    return whole * recipe.selection.candidates if whole else None


def _replayed(recipe: keys.Recipe, row: Method) -> float:
    """Share of generic rows in a method's fine-tuning."""
    if row.taught and recipe.distill.on == "importance":
        return taught_share(recipe)
    return recipe.finetune.replay_share if row.pretrains else 0.0


def _expert(recipe: keys.Recipe, setting: Setting, row: Method) -> Work:
    """Choosing a domain's expert, and training the vector that it is made of."""
    tokens = _finetuning_tokens(recipe, setting, row, replayed=0.0)
    found = model.expert_choice(setting, row, tokens)
    if recipe.projected.tune_vector and row.bank == "projected":
        found = found + model.finetuning(setting, replace(row, bank=None, tune="full"), tokens)
    return found


def _finetuning_tokens(recipe: keys.Recipe, setting: Setting, row: Method,
                       replayed: float) -> float:
    """Tokens of one fine-tuning to the limits of the recipe; ``replayed``: its share of generic
    rows."""
    finetune = recipe.finetune
    steps, _ = finetune_limits(finetune, setting.spec_tokens,
                               -(-setting.spec_tokens // recipe.context),
                               own_rows(rows_per_step(finetune.step_tokens, recipe.context),
                                        replayed),
                               scratch=not row.pretrains)
    return float(steps * _step_tokens(recipe, finetune)) * (
        recipe.lora.step_factor if row.tune == "lora" else 1.0)


def _teacher(recipe: keys.Recipe) -> Shape | None:
    """Shape of the teacher from outside, or one that costs about as much; None: there is none."""
    if not recipe.distill.teacher:
        return None
    folder = starts.located(str(recipe.distill.teacher))
    starts.check_folder("distill.teacher", folder, recipe.context)
    return outside.alike(outside.shape_in(folder, recipe.context))


def note(recipe: keys.Recipe, device: Device) -> str:
    """What to know of a device's hours; "" if nothing."""
    if device.stands_in_for is not None:
        return device.told_of_standing_in()
    return device.told_of_precision(devices.in_bf16(recipe.pretrain.precision))
