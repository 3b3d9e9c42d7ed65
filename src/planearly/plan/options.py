"""What each method could do: within the budgets or not and why, with how many tokens, at what cost.

Rules of thumb decide what is worth it, each with its ground; docs/planning.md tells them in prose.
:mod:`planearly.plan.recommend` chooses among the methods.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from planearly import keys
from planearly.cost import model
from planearly.cost.devices import Device
from planearly.cost.model import MethodCost, Setting, Work
from planearly.errors import UserError
from planearly.model import flops
from planearly.model.transformer import Shape
from planearly.plan import sizes
from planearly.plan.law import Law
from planearly.units import short

CHECKPOINT = "open-checkpoint"
METHODS = (*model.METHODS, CHECKPOINT)

MOST_PASSES = 4
"""Passes over the generic corpus that are about as good as new text (Muennighoff et al. 2023)."""
LEAST_TOKENS = 10
"""Tokens of pretraining per parameter below which a method is not worth it: half of the
compute-optimal 20 (Hoffmann et al. 2022). At 17 the paper's large model already led its table; a
projected network lost to the plain model at 1 and won at 10 in our trials."""
LEAST_TOKENS_TAUGHT = 5
"""The same for a distilled student, which learns more from each token."""
LEAST_SHARE = 0.1
"""Share of the generic pretraining's tokens that importance sampling needs per domain: the paper's
equal-cost table loses about 3% of perplexity per halving of tokens, and importance sampling gains
10 to 15% at equal tokens."""
CLUSTERS = (1024, 256, 64, 16, 4)
"""Numbers of clusters that are planned with."""


@dataclass(frozen=True)
class OpenModel:
    """A model that exists already."""

    name: str
    """Its folder, or what it is called."""
    params: int
    context: int | None = None
    """Most tokens that it reads, where known."""


@dataclass(frozen=True)
class PlanInput:
    """What the user has and wants. Hours are device-hours; None means no limit was stated."""

    device: Device
    limit: int | None = None
    """Parameters admitted at inference."""
    generic_tokens: int = 0
    spec_tokens: int = 1_000_000
    """Tokens of one domain's specialization set."""
    domains: int = 1
    domains_later: int = 0
    devices: int = 1
    generic_hours: float | None = None
    specialization_hours: float | None = None
    """Per domain."""
    price: float | None = None
    currency: str = "USD"
    quantization: str = "bf16"
    checkpoint: OpenModel | None = None
    teacher: OpenModel | None = None
    entropy: float | None = None
    """Of the domain's cluster histogram, in nats, with ``clusters`` clusters."""
    clusters: int | None = None
    windows: int | None = None
    """Windows of the specialization set; None: its tokens over the context."""
    laws: dict[str, Law] = field(default_factory=dict)
    """Fitted loss laws by method."""

    @property
    def total_domains(self) -> int:
        return self.domains + self.domains_later


@dataclass(frozen=True)
class Row:
    """One method in the plan."""

    method: str
    feasible: bool
    why: str
    """What speaks against it, or what it is."""
    pretrain_tokens: float
    cost: MethodCost
    total: Work
    """Over all domains."""
    inference_bytes: float
    perplexity: dict[str, Any] | None
    """From a fitted law: ``perplexity``, ``ci95``, ``extrapolation``; None: unknown."""
    perplexity_note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(given: PlanInput) -> None:
    """Refuse an input that cannot be.

    Raises:
        UserError: what it is.
    """
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise UserError(what)

    need(given.domains + given.domains_later >= 1, "--domains: plan for at least one domain")
    need(given.domains >= 0 and given.domains_later >= 0, "--domains: it cannot be negative")
    need(given.devices >= 1, "--devices: at least one device is needed")
    need(given.spec_tokens >= 1, "--spec-tokens: a specialization set needs at least one token")
    need(given.generic_tokens >= 0, "--generic-tokens: it cannot be negative")
    need(given.limit is None or given.limit > 0, "--inference-params: it must be positive")
    for flag, hours in (("--generic-hours", given.generic_hours),
                        ("--specialization-hours", given.specialization_hours)):
        need(hours is None or (hours >= 0 and math.isfinite(hours)),
             f"{flag}: give a finite number of hours that is not negative")
    need((given.entropy is None) == (given.clusters is None),
         "--entropy goes with --clusters: give both or neither")
    if given.entropy is not None and given.clusters is not None:
        need(given.clusters >= 2, "--clusters: a histogram needs at least two")
        need(0 <= given.entropy <= math.log(given.clusters) + 1e-6,
             f"--entropy: {given.clusters} clusters have at most "
             f"{math.log(given.clusters):.2f} nats, not {given.entropy:g}")


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
    projected = sizes.projected_for(small, _memory(given))
    return Setting(
        small=small, large=large, device=given.device,
        projected=projected or keys.Projected(experts=16, rank=12, matrices=["up", "down"]),
        spec_tokens=given.spec_tokens, teacher_exists=given.teacher is not None, price=given.price,
    )


def _affordable(given: PlanInput, limit: int) -> Shape:
    """The largest shape within the limit that corpus and hours train compute-optimally, and not
    below the paper's large one."""
    params = limit
    while params > sizes.PAPER_LARGE:
        shape = sizes.shape_for(params)
        least = 2 * LEAST_TOKENS * flops.parameters(shape)
        seconds = given.device.seconds(least * flops.training(shape), shape.d_model)
        hours = math.inf if given.generic_hours is None else given.generic_hours
        if seconds / 3600 <= hours and least <= MOST_PASSES * given.generic_tokens:
            return shape
        params = round(params * 0.9)
    return sizes.shape_for(sizes.PAPER_LARGE)


def _memory(given: PlanInput) -> float | None:
    return None if given.device.memory is None else 0.9 * given.device.memory * given.devices


def _checkpoint_shape(given: PlanInput, setting: Setting) -> Shape:
    if given.checkpoint is None:
        return setting.small
    return sizes.shape_for(given.checkpoint.params)


# One method ---------------------------------------------------------------------------------------

def row_of(given: PlanInput, setting: Setting, method: str) -> Row:
    """One method in the plan."""
    kind = method
    if method == CHECKPOINT:  # costs as a plain model of its size that is adapted once per domain
        setting, kind = replace(setting, small=_checkpoint_shape(given, setting)), "slm-is"
    elif method == "slm-d" and given.teacher is not None:
        teacher = sizes.shape_for(given.teacher.params)
        setting = replace(setting, large=replace(
            teacher, vocab_size=setting.small.vocab_size, context=setting.small.context))
    usual = model.finetuning(setting, kind)
    tokens, least, hours = _pretraining(given, setting, method, kind, usual)
    finetune_tokens, cut = _finetuning(given, setting, kind, usual)
    costs = model.cost(setting, kind, tokens, finetune_tokens)
    if method == CHECKPOINT:
        costs = replace(costs, method=method)
    obstacle = _obstacle(given, setting, method, costs, tokens, least, hours, cut)
    shape = setting.large if method in model.LARGE else setting.small
    perplexity, note = _perplexity(given, method, flops.parameters(shape), tokens)
    return Row(method, obstacle is None, obstacle or _what(method, setting, tokens), tokens, costs,
               costs.total(given.total_domains),
               model.inference_memory(shape, sizes.bits(given.quantization)), perplexity, note)


def _pretraining(given: PlanInput, setting: Setting, method: str, kind: str,
                 finetuning: Work) -> tuple[float, float, float]:
    """Tokens that corpus and budget afford, least that are worth it, and the hours of the least."""
    if method == "slm-nopt":
        return 0.0, 0.0, 0.0
    per_token = model.generic_token_cost(setting, kind).device_hours
    if method == "slm-d" and given.teacher is None:
        per_token += model.generic_token_cost(setting, "llm").device_hours
    params = flops.parameters(setting.large if method in model.LARGE else setting.small)
    per_parameter = LEAST_TOKENS_TAUGHT if method == "slm-d" and given.teacher else LEAST_TOKENS
    least = float(params * per_parameter * (setting.experts if method == "slm-mix" else 1))
    budget = given.generic_hours
    if kind == "slm-is":
        budget = given.specialization_hours
        if budget is not None:
            budget = max(budget - finetuning.device_hours, 0.0)
    corpus = float(given.generic_tokens)
    tokens = corpus if budget is None else min(budget / per_token, MOST_PASSES * corpus)
    if method == CHECKPOINT:  # adapting needs no more than training afresh would
        least, tokens = 0.0, min(tokens, 2.0 * LEAST_TOKENS * params)
    if kind == "slm-is" and method != CHECKPOINT:
        plain = model.generic_token_cost(setting, "slm").device_hours
        generic = corpus if given.generic_hours is None \
            else min(given.generic_hours / plain, MOST_PASSES * corpus)
        least = max(least, LEAST_SHARE * generic)
    return tokens, least, least * per_token


def _finetuning(given: PlanInput, setting: Setting, kind: str,
                usual: Work) -> tuple[float | None, bool]:
    """Tokens to fine-tune on (None: as many as usual), and whether not one pass is affordable."""
    budget = given.specialization_hours
    if budget is None:
        return None, False
    fixed, own = Work(), usual
    if kind == "slm-d":
        fixed = model.finetuning(setting, "llm")
        own = usual + fixed * -1.0
    elif kind in ("slm-pn", "slm-mix"):
        fixed = model.expert_choice(setting, kind)
    if fixed.device_hours + own.device_hours <= budget:
        return None, False
    tokens = own.tokens * max(budget - fixed.device_hours, 0.0) / own.device_hours
    return tokens, tokens < given.spec_tokens


def _obstacle(given: PlanInput, setting: Setting, method: str, costs: MethodCost, tokens: float,
              least: float, hours: float, cut: bool) -> str | None:
    """Why the method is out of the question, or None."""
    if method == CHECKPOINT and given.checkpoint is None:
        return "no open checkpoint was named (--checkpoint)"
    params = given.checkpoint.params if method == CHECKPOINT and given.checkpoint \
        else costs.inference_params
    if given.limit is not None and params > given.limit:
        return (f"{short(params)} parameters at inference exceed the limit of "
                f"{short(given.limit)}")
    if method == "slm-d" and given.teacher is None:
        return ("no teacher exists, and training one costs more than its student gains "
                "(paper, Table 3 and section 5)")
    memory = _memory(given)
    if memory is not None and costs.train_memory > memory:
        return (f"training needs {short(costs.train_memory)}B of memory; {given.devices} "
                f"{given.device.name} hold {short(memory)}B for it")
    if cut:
        return (f"{given.specialization_hours:g} device-hours per domain are not enough for one "
                "pass over the specialization set")
    if method in ("slm-nopt", CHECKPOINT):
        return None
    if given.generic_tokens == 0:
        return "there is no generic corpus to pretrain on"
    per_domain = method == "slm-is"
    budget = given.specialization_hours if per_domain else given.generic_hours
    if method == "slm-is":
        windows = given.windows or math.ceil(given.spec_tokens / setting.small.context)
        if windows < CLUSTERS[-1]:
            return f"{windows} windows are too few to estimate a cluster histogram from"
    if tokens < least and (budget is None or MOST_PASSES * given.generic_tokens < least):
        return (f"{short(given.generic_tokens)} tokens of generic text are too few: "
                f"{short(least / MOST_PASSES)} are needed, read {MOST_PASSES} times")
    if tokens < least:
        which = "per domain" if per_domain else "before the domain is known"
        return (f"{budget:g} device-hours {which} pretrain on {short(tokens)} tokens; at least "
                f"{short(least)} are needed, {hours:.3g} device-hours")
    return None


def _what(method: str, setting: Setting, tokens: float) -> str:
    small = setting.projected
    return {
        "llm": "the large model, fine-tuned",
        "llm-lora": f"the large model with adapters of rank {setting.lora.rank}: within 0.5 "
                    "perplexity of full fine-tuning in the paper",
        "slm": "the small model, fine-tuned",
        "slm-nopt": "no pretraining: far worse in the paper (227 against 18 at 1M tokens)",
        "slm-is": "pretrained per domain on generic text resampled to look like it",
        "slm-pn": f"one projected network of {small.experts} experts; one becomes the model",
        "slm-mix": f"{setting.experts} independent small models; one is fine-tuned",
        "slm-d": "the small model, taught by the existing teacher",
        CHECKPOINT: "the open model, pretrained on" + (
            f" for {short(tokens)} resampled tokens, then fine-tuned" if tokens >= 1
            else " nothing more, fine-tuned"),
    }[method]


def _perplexity(given: PlanInput, method: str, params: int,
                tokens: float) -> tuple[dict[str, Any] | None, str]:
    law = given.laws.get(method)
    if law is None:
        return None, "unknown: no law was fitted to runs of your own (--results)"
    try:
        found = asdict(law.predict(params, tokens, given.spec_tokens))
        return found, f"predicted for {method} by {law.describe()}"
    except UserError as outside:
        return None, f"unknown for {method}: {outside}"
