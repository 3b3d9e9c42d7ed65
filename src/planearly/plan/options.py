"""What each method could do: within the budgets or not and why, with how many tokens, at what cost.

Rules of thumb decide what is worth it, each with its ground; docs/planning.md tells them in prose.
:mod:`planearly.plan.recommend` chooses among the methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from planearly import keys, methods
from planearly.cost import model
from planearly.cost.model import MethodCost, Setting, Traffic, Work
from planearly.errors import UserError
from planearly.methods import Method
from planearly.model import flops, memory
from planearly.model.transformer import Shape
from planearly.plan import sizes
from planearly.plan.inputs import PlanInput
from planearly.plan.law import LINE, REACH, Law, line
from planearly.units import prefixed, short

CHECKPOINT = "open-checkpoint"
ADAPTED = Method(CHECKPOINT, "open checkpoint", "open model, pretrained on for a while on generic "
                 "text resampled to look like the domain, then fine-tuned on its documents",
                 draws="importance")
"""Costs as a plain model of its size that is adapted once per domain; no method of its own."""

MOST_PASSES = 4
"""Passes over the generic corpus that are about as good as new text (Muennighoff et al. 2023)."""
LEAST_TOKENS = 10
"""Tokens of pretraining per parameter below which a method is not worth it: half of the
compute-optimal 20 (Hoffmann et al. 2022). At 17 the paper's large model already led its table; a
projected network of 0.7M parameters lost to the plain model at 1 and won at 10 in our trials, one
of 0.1M is level with it up to 331 (docs/experiments.md)."""
LEAST_TOKENS_TAUGHT = 5
"""The same for a distilled student, which learns more from each token."""
LEAST_SHARE = 0.1
"""Share of the generic pretraining's tokens that importance sampling needs per domain: the paper's
equal-cost table loses about 3% of perplexity per halving of tokens, and importance sampling gains
10 to 15% at equal tokens."""
EQUAL_QUALITY = {"projected": (130 / 2.2) / (650 / 3.6), "mixture": 130 / 650, None: 130 / 530}
"""Share of the tokens of a pretraining for all domains, by its bank, after which one on text drawn
by the domain is at least as good: the paper's importance sampling took 130 GPU-hours (its Table 3)
at 2.2 per 1B tokens (Table 2), and led (Figure 4) projected networks of 650 hours at 3.6, mixtures
of 650 at 2.2 and plain models of 530."""
CLUSTERS = (1024, 256, 64, 16, 4)
"""Numbers of clusters that are planned with."""


@dataclass(frozen=True)
class Row:
    """One method in the plan."""

    method: str
    feasible: bool
    why: str
    """What speaks against it, or what it is."""
    pretrain_tokens: float
    cost: MethodCost
    finetune_tokens: float
    """Of one fine-tuning, its teacher's not included."""
    total: Work
    """Over all domains."""
    inference_bytes: float
    train_bytes_per_device: float
    """At ``microbatch_tokens``, which the run takes; where not one row fits, what it would need."""
    microbatch_tokens: int
    traffic: Traffic | None
    """Of a step between several devices."""
    equal_quality: dict[str, Any] | None
    """Of one that pretrains per domain without a budget for that: ``with`` (the method whose
    quality its tokens are to match), ``share`` (of that one's tokens), ``ground``, and whether that
    is ``known`` to be so."""
    perplexity: dict[str, Any] | None
    """From a fitted law: ``perplexity``, ``ci95``, ``extrapolation``; None: unknown."""
    perplexity_note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows_of(given: PlanInput, setting: Setting) -> list[Row]:
    """Every method of the table, and an open checkpoint: those that pretrain for all domains first
    looked at, so that the others' tokens can match their quality."""
    shared = {row.name: row_of(given, setting, row) for row in methods.TABLE.values()
              if not row.per_domain}
    reference = _reference(shared)
    own = {row.name: row_of(given, setting, row, reference)
           for row in [*methods.TABLE.values(), ADAPTED] if row.per_domain}
    return [{**shared, **own}[name] for name in [*methods.TABLE, CHECKPOINT]]


def method_of(name: str) -> Method:
    """The row of the table of methods, or the open checkpoint's."""
    return ADAPTED if name == CHECKPOINT else methods.find(name)


def setting_of(given: PlanInput) -> Setting:
    """Shapes: the small model at the limit and the large one at the paper's ratio above it; or,
    where the limit admits the paper's large model, a large one within it and the small one below.
    """
    limit = sizes.PAPER_LARGE if given.limit is None else given.limit
    if limit >= sizes.PAPER_LARGE:
        large = _affordable(given, limit)
        small = sizes.shape_for(round(flops.parameters(large) / sizes.RATIO * 1.02))
    else:
        small = sizes.shape_for(limit)
        large = sizes.shape_for(round(limit * sizes.RATIO))
    large = replace(large, vocab_size=small.vocab_size, context=small.context)
    setting = Setting(
        small=small, large=large, device=given.device, devices=given.devices,
        projected=keys.Projected(experts=16, rank=12, matrices=["up", "down"]),
        spec_tokens=given.spec_tokens, teacher_exists=given.teacher is not None, price=given.price,
    )
    return replace(setting, projected=network(given, setting)[0])


def network(given: PlanInput, setting: Setting) -> tuple[keys.Projected, str]:
    """The projected network for a plan's small model, and why it has so many slices: by the tokens
    that corpus and budgets afford the largest one that its devices hold."""
    def fitting(tokens_per_parameter: float) -> keys.Projected:
        return sizes.projected_for(setting.small, given.device, given.devices,
                                   tokens_per_parameter) or setting.projected

    row = next(row for row in methods.TABLE.values() if row.bank == "projected")
    largest = replace(setting, projected=fitting(math.inf), expert=given.expert(row))
    afforded = _afforded(given, largest, row, model.finetuning(largest, row))
    each = afforded.tokens / flops.parameters(setting.small)
    made = fitting(each)
    return made, f"{made.experts} experts and {sizes.slices(made.experts, each)[1]}"


def _affordable(given: PlanInput, limit: int) -> Shape:
    """The largest shape within the limit that the devices hold in training and that corpus and
    hours train compute-optimally, and not below the paper's large one."""
    params = limit
    while params > sizes.PAPER_LARGE:
        shape = sizes.shape_for(params)
        least = 2 * LEAST_TOKENS * flops.parameters(shape)
        seconds = given.device.seconds(least * flops.training(shape), shape.d_model)
        hours = math.inf if given.generic_hours is None else given.generic_hours
        if (seconds / 3600 <= hours and least <= MOST_PASSES * given.generic_tokens
                and fits(given, shape)):
            return shape
        params = round(params * 0.9)
    return sizes.shape_for(sizes.PAPER_LARGE)


def fits(given: PlanInput, shape: Shape) -> bool:
    """Whether the devices can train a plain model of this shape, a row at a time."""
    return memory.fits(given.device.memory, model.job_on(given.device, given.devices, shape))


def _checkpoint_shape(given: PlanInput, setting: Setting) -> Shape:
    if given.checkpoint is None:
        return setting.small
    return sizes.shape_for(given.checkpoint.params)


# One method ---------------------------------------------------------------------------------------

def row_of(given: PlanInput, setting: Setting, method: Method,
           reference: Row | None = None, most: float = math.inf) -> Row:
    """One method in the plan.

    Args:
        reference: the row whose quality it is to match, if it pretrains per domain.
        most: tokens of pretraining, whatever more is afforded, if they are worth it.
    """
    setting = replace(setting, expert=given.expert(method))
    if method is ADAPTED:
        setting = replace(setting, small=_checkpoint_shape(given, setting))
    elif method.taught and given.teacher is not None:
        teacher = sizes.shape_for(given.teacher.params)
        setting = replace(setting, large=replace(
            teacher, vocab_size=setting.small.vocab_size, context=setting.small.context))
    usual = model.finetuning(setting, method)
    equal = None
    if (method.per_domain and method is not ADAPTED and reference is not None
            and given.specialization_hours is None):
        most, equal = matching(given, setting, method, reference)
    afforded = _afforded(given, setting, method, usual, most)
    tokens = afforded.tokens
    finetune_tokens, cut = _finetuning(given, setting, method, usual)
    costs = model.cost(setting, method, tokens, finetune_tokens)
    obstacle = _obstacle(given, setting, method, costs, afforded, cut)
    shape = setting.shape(method)
    perplexity, note = _perplexity(given, method.name, flops.parameters(shape), tokens,
                                   1 - setting.own_share(method))
    return Row(method.name, obstacle is None,
               obstacle or _what(method, setting, tokens, costs.sharded), tokens, costs,
               finetune_tokens, costs.total(given.total_domains),
               model.inference_memory(shape, sizes.bits(given.quantization)), costs.train_bytes,
               costs.microbatch_tokens,
               model.traffic(setting, method, tokens, costs.microbatch_tokens), equal, perplexity,
               note)


def _reference(shared: dict[str, Row]) -> Row | None:
    """The method whose quality those that pretrain per domain are to match: a projected network
    where there is one, else a mixture, else a plain small model."""
    for bank in ("projected", "mixture", None):
        for name, row in shared.items():
            method = methods.find(name)
            if (row.feasible and method.bank == bank and method.pretrains and not method.large
                    and not method.taught and not method.adapts):
                return row
    return None


def matching(given: PlanInput, setting: Setting, method: Method,
             reference: Row) -> tuple[float, dict[str, Any]]:
    """Tokens after which a pretraining on text drawn by the domain is as good as the reference's,
    and why: by laws fitted to the user's own runs where they speak, else by the paper."""
    other_row = methods.find(reference.method)
    share = EQUAL_QUALITY.get(other_row.bank, EQUAL_QUALITY[None])
    ground = (f"in the paper that share of {reference.method}'s tokens or less was enough to be at "
              "least as good")
    known = method.draws == "importance" and not other_row.source and (
        other_row.bank in EQUAL_QUALITY and other_row.tune == "full")
    if not known:
        ground = "as importance sampling takes; nothing is known of the quality there"
    found = None
    own, other = given.laws.get(method.name), given.laws.get(reference.method)
    if own is not None and other is not None:
        params = flops.parameters(setting.small)
        try:
            found = _same_loss(own, params, given.spec_tokens, other.predict(
                params, reference.pretrain_tokens, given.spec_tokens).nll_per_token)
        except UserError:
            found = None
        if found is not None:
            share = found / reference.pretrain_tokens
            ground = "the laws fitted to your own runs predict the same loss there"
    return share * reference.pretrain_tokens, {
        "with": reference.method, "share": share, "ground": ground,
        "known": known or found is not None}


def _same_loss(law: Law, params: int, spec_tokens: int, nll: float) -> float | None:
    """Tokens of pretraining at which a law predicts this loss; None where it speaks of none."""
    if "pretrain_tokens" not in law.axes:
        return None
    low, high = law.seen["pretrain_tokens"]
    low, high = low / REACH, high * REACH

    def loss(tokens: float) -> float:
        return law.predict(params, tokens, spec_tokens).nll_per_token

    if not loss(high) <= nll <= loss(low):
        return None
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if loss(middle) > nll else (low, middle)
    return high


@dataclass(frozen=True)
class _Pretraining:
    """What corpus and budgets afford a method to pretrain on."""

    tokens: float = 0.0
    least: float = 0.0
    """Tokens below which it is not worth it."""
    budget: float | None = None
    """The hours that stop it first; None: the corpus does."""
    which: str = ""
    """What that budget is for."""
    needed: float = 0.0
    """Hours of that budget that the least tokens take."""


def _afforded(given: PlanInput, setting: Setting, method: Method, usual: Work,
              most: float = math.inf) -> _Pretraining:
    """What is afforded at the step that so many tokens take: the smaller the step, the more often
    a projected network is projected and a GPU's kernels are launched, and the fewer tokens the
    hours buy. Never more than ``most`` that are worth it."""
    if not method.pretrains:
        return _Pretraining()
    least = _least(given, setting, method)
    each = _per_token(given, replace(setting, batch_tokens=setting.step(least)), method)
    needed = _Hours(each.before * least, each.own * least)

    def at(step: Setting) -> _Pretraining:
        return _pretraining(given, step, method, usual, needed, least, most)

    return at(_at_its_step(setting, lambda step: at(step).tokens))


def _at_its_step(setting: Setting, afforded: Callable[[Setting], float]) -> Setting:
    """The setting at the largest step that the tokens which are afforded at it take."""
    for _, step in reversed(setting.steps()):
        at = replace(setting, batch_tokens=step)
        if setting.step(afforded(at)) >= step:
            break
    return at


@dataclass(frozen=True)
class _Hours:
    """Device-hours of pretraining before the domain is known, and per domain."""

    before: float
    own: float


def _per_token(given: PlanInput, setting: Setting, method: Method) -> _Hours:
    """Of a token at the setting's step."""
    per_token = model.pretraining(setting, method, 1.0).device_hours
    own_per_token = model.own_pretraining(setting, method, 1.0).device_hours
    if method.taught and given.teacher is None:
        per_token += model.pretraining(setting, methods.teacher(), 1.0).device_hours
    own = setting.own_share(method)
    before, own_per_token = per_token * (1 - own), own_per_token * own
    if method.scored:  # with a model as large, and by it
        scored = model.scoring(setting, method, 1.0).device_hours
        before, own_per_token = per_token + scored, own_per_token + scored
    return _Hours(before, own_per_token)


def _least(given: PlanInput, setting: Setting, method: Method) -> float:
    """Tokens of pretraining below which a method is not worth it."""
    if method is ADAPTED:  # adapting needs no more than training afresh would
        return 0.0
    params = flops.parameters(setting.shape(method))
    per_parameter = LEAST_TOKENS_TAUGHT if method.taught and given.teacher else LEAST_TOKENS
    least = float(params * per_parameter * (setting.experts if method.bank == "mixture" else 1))
    if not method.per_domain:
        return least
    generic = float(given.generic_tokens)
    if (hours := given.generic_hours) is not None:
        def bought(at: Setting) -> float:
            return min(hours / model.own_pretraining(at, method, 1.0).device_hours,
                       MOST_PASSES * float(given.generic_tokens))

        generic = bought(_at_its_step(setting, bought))
    return max(least, LEAST_SHARE * generic)


def _pretraining(given: PlanInput, setting: Setting, method: Method, finetuning: Work,
                 needed: _Hours, least: float, most: float) -> _Pretraining:
    """Tokens that corpus and budgets afford at the setting's step, and what stops it.

    Args:
        needed: by the ``least`` tokens that are worth it.
        most: as of :func:`_afforded`.
    """
    per_token = _per_token(given, setting, method)
    after = finetuning + model.expert_choice(setting, method)
    if method.scored:
        after = after + model.finetuning(setting, "slm")
    corpus = float(given.generic_tokens)
    left = given.specialization_hours
    if left is not None:
        left = max(left - after.device_hours, 0.0)
    stops = [(budget / hours, _Pretraining(least=least, budget=stated, which=which, needed=worth))
             for budget, stated, hours, worth, which in (
                 (given.generic_hours, given.generic_hours, per_token.before, needed.before,
                  "before the domain is known"),
                 (left, given.specialization_hours, per_token.own, needed.own, "per domain"))
             if budget is not None and hours]
    # without a budget once over the corpus, and more often only where that is too little
    tokens, first = min(stops, key=lambda stop: stop[0],
                        default=(max(corpus, least), _Pretraining(least=least)))
    tokens = min(tokens, MOST_PASSES * corpus, max(most, least))
    if method is ADAPTED:
        tokens = min(tokens, 2.0 * LEAST_TOKENS * flops.parameters(setting.shape(method)))
    return replace(first, tokens=tokens)


def _finetuning(given: PlanInput, setting: Setting, method: Method,
                usual: Work) -> tuple[float, bool]:
    """Tokens to fine-tune on, and whether not one pass is affordable."""
    fixed, own = Work(), usual
    if method.taught and not setting.teacher_exists:
        fixed = model.finetuning(setting, methods.teacher())
        own = usual + fixed * -1.0
    elif method.bank:
        fixed = model.expert_choice(setting, method)
    elif method.scored:
        fixed = model.finetuning(setting, "slm")
    budget = given.specialization_hours
    if budget is None or fixed.device_hours + own.device_hours <= budget:
        return own.tokens, False
    tokens = own.tokens * max(budget - fixed.device_hours, 0.0) / own.device_hours
    # a recipe counts steps, and of adapters several as one
    unit = setting.tuning_step(method.size) * (
        setting.lora.step_factor if method.tune == "lora" else 1.0)
    tokens = tokens // unit * unit
    return tokens, tokens < given.spec_tokens


def _obstacle(given: PlanInput, setting: Setting, method: Method, costs: MethodCost,
              afforded: _Pretraining, cut: bool) -> str | None:
    """Why the method is out of the question, or None."""
    if method is ADAPTED and given.checkpoint is None:
        return "no open checkpoint was named (--checkpoint)"
    params = given.checkpoint.params if method is ADAPTED and given.checkpoint \
        else costs.inference_params
    if given.limit is not None and params > given.limit:
        return (f"{short(params)} parameters at inference exceed the limit of "
                f"{short(given.limit)}")
    if method.taught and given.teacher is None:
        return ("no teacher exists, and training one costs more than its student gains "
                "(paper, Table 3 and section 5)")
    if costs.microbatch_tokens == 0:
        assert given.device.memory is not None
        holds = f"though {given.devices} divide" if costs.sharded else "which holds the whole of"
        return (f"a training step of one row needs {prefixed(costs.train_bytes)}B of memory on "
                f"every device, {holds} the model and its state, and {given.device.name} has "
                f"{prefixed(memory.USABLE * given.device.memory)}B for it")
    if cut:
        return (f"{given.specialization_hours:g} device-hours per domain are not enough for one "
                "pass over the specialization set")
    if not method.pretrains or method is ADAPTED:
        return None
    if given.generic_tokens == 0:
        return "there is no generic corpus to pretrain on"
    if method.weighs:
        windows = given.windows or math.ceil(given.spec_tokens / setting.small.context)
        if windows < CLUSTERS[-1]:
            return f"{windows} windows are too few to estimate a cluster histogram from"
    least = afforded.least
    if afforded.tokens >= least:
        return None
    if afforded.budget is None or MOST_PASSES * given.generic_tokens < least:
        return (f"{short(given.generic_tokens)} tokens of generic text are too few: "
                f"{short(least / MOST_PASSES)} are needed, read {MOST_PASSES} times")
    return (f"{afforded.budget:g} device-hours {afforded.which} pretrain on "
            f"{short(afforded.tokens)} tokens; at least {short(least)} are needed, "
            f"{afforded.needed:.3g} device-hours")


def _what(method: Method, setting: Setting, tokens: float, sharded: bool) -> str:
    """What a method is, and what this plan or the paper adds to that."""
    if method is ADAPTED and tokens < 1:
        return "open model, fine-tuned on the domain's documents as it is"
    more = ""
    if method is ADAPTED:
        more = f"; {short(tokens)} tokens"
    elif method.bank:
        more = f"; {setting.count(method)} experts"
    elif method.tune == "lora":
        more = f"; of rank {setting.lora.rank}, within 0.5 perplexity of full fine-tuning in the " \
               "paper"
    elif not method.pretrains:
        more = "; far worse in the paper (perplexity 227 against 18 at 1M tokens)"
    if sharded:
        more += f"; sharded over {setting.devices} devices"
    return method.sentence + more


def _perplexity(given: PlanInput, method: str, params: int, tokens: float,
                generic_share: float) -> tuple[dict[str, Any] | None, str]:
    law = (given.laws.get(LINE) if method in line() else None) or given.laws.get(method)
    if law is None:
        return None, "unknown: no law was fitted to runs of your own (--results)"
    try:
        found = asdict(law.predict(params, tokens, given.spec_tokens, generic_share))
        return found, f"predicted for {method} by {law.describe()}"
    except UserError as outside:
        return None, f"unknown for {method}: {outside}"
