"""What each method costs, before and after the domain is known.

Time is FLOPs / (rate x utilisation), :mod:`planearly.cost.devices`; FLOPs are exact,
:mod:`planearly.model.flops`. The paper keeps four quantities apart (its section 4.2, Tables 2 and
3): the generic cost, paid once; the specialization cost, paid per domain; the inference cost; and
the size of the specialization set. Over N domains, C(N) = C_generic + N x C_specialization.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from planearly import keys
from planearly.cost.devices import Device
from planearly.model import flops
from planearly.model.transformer import Shape
from planearly.train.steps import FINETUNE_STEPS

METHODS = ("llm", "llm-lora", "slm", "slm-nopt", "slm-is", "slm-pn", "slm-mix", "slm-d")
LARGE = ("llm", "llm-lora")
CLUSTERED = ("slm-is", "slm-pn", "slm-mix")

STEP_TOKENS = {"small": 8_192, "large": 16_384}
"""Tokens of a fine-tuning step that the paper's Table 3 and its step limits imply."""
DISTILLED_FACTOR = 15
"""Times the plain student's fine-tuning tokens that the paper's SLM-d used (its Table 3)."""
EXPERT_CHOICE_TOKENS = 131_072
"""Most tokens of the domain that every expert is scored on before fine-tuning."""
BATCH_TOKENS = 262_144
"""Tokens of a pretraining step, unless a recipe says otherwise."""


@dataclass(frozen=True)
class Work:
    """An amount of work: tokens trained on, FLOPs, device-hours, money if there is a price."""

    tokens: float = 0.0
    flops: float = 0.0
    device_hours: float = 0.0
    money: float | None = None

    def __add__(self, other: Work) -> Work:
        money = None if self.money is None or other.money is None else self.money + other.money
        return Work(self.tokens + other.tokens, self.flops + other.flops,
                    self.device_hours + other.device_hours, money)

    def __mul__(self, times: float) -> Work:
        return Work(self.tokens * times, self.flops * times, self.device_hours * times,
                    None if self.money is None else self.money * times)


@dataclass(frozen=True)
class Setting:
    """Everything that costs depend on, beside the method and the tokens."""

    small: Shape
    large: Shape
    device: Device
    projected: keys.Projected
    experts: int = 16
    """Independent models of the hard mixture."""
    lora: keys.Lora = field(default_factory=keys.Lora)
    spec_tokens: int = 1_000_000
    teacher_exists: bool = False
    price: float | None = None
    """Money per device-hour."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens of a pretraining step, where the projection of a projected network is paid."""
    distil_pretraining: bool = False
    """Whether the student of slm-d also learns from the teacher on the generic corpus, as the
    paper's cost of 1,850 hours implies; ours starts from the plain small model."""


@dataclass(frozen=True)
class MethodCost:
    """One method's costs."""

    method: str
    generic: Work
    specialization: Work
    inference_params: int
    inference_flops: int
    """FLOPs per token of the deployed model, over full windows."""
    train_memory: float
    """Bytes at the largest stage, on one device."""

    def total(self, domains: int) -> Work:
        """C(N) = C_generic + N x C_specialization (paper, section 4.2)."""
        return self.generic + self.specialization * domains

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Time and memory --------------------------------------------------------------------------------

def work(setting: Setting, tokens: float, flops_per_token: float, d_model: int,
         extra_flops: float = 0.0, extra_seconds: float = 0.0) -> Work:
    """The work of ``tokens`` at this many operations each, at the width's utilisation.

    ``extra_flops`` and ``extra_seconds`` are those of the whole, of what does not run as a model's
    matrix products do.
    """
    hours = (setting.device.seconds(tokens * flops_per_token, d_model) + extra_seconds) / 3600
    money = None if setting.price is None else hours * setting.price
    return Work(tokens, tokens * flops_per_token + extra_flops, hours, money)


def training_memory(parameters: int, shape: Shape, microbatch_tokens: int | None = None) -> float:
    """Bytes a training step needs on one device.

    16 per parameter (float32 weight, gradient and two Adam moments), and the activations of one
    microbatch: in bfloat16 with a fused attention kernel 18 d_model and 4 d_ff (gated: 8) per layer
    and token (Korthikanti et al. 2022, table 2, less the attention scores), and 10 per logit
    (bfloat16, float32 and its gradient).
    """
    tokens = max(microbatch_tokens or 0, shape.context)
    feed_forward = (4 if shape.ffn == "swiglu" else 2) * 2 * shape.d_ff
    per_token = shape.layers * (18 * shape.d_model + feed_forward) + 10 * shape.vocab_size
    return 16.0 * parameters + tokens * per_token


def projected_memory(shape: Shape, projected: keys.Projected) -> float:
    """Bytes of a projected network's step: its own, and each expert's dense weights and gradient.
    """
    dense = flops.projected_weights(shape, projected) * projected.experts
    return training_memory(flops.projected_parameters(shape, projected), shape) + 8.0 * dense


def inference_memory(shape: Shape, bits: float = 16.0, rows: int = 1) -> float:
    """Bytes of a deployed model: weights at ``bits`` each and a bfloat16 key-value cache."""
    cache = 2 * 2 * shape.layers * shape.d_model * shape.context * rows
    return flops.parameters(shape) * bits / 8 + cache


def projection_seconds(setting: Setting, steps: float) -> float:
    """Seconds that the deferred projection adds over ``steps`` optimiser steps.

    The bank's bytes are what costs: per step the float32 bank is read to make the weights and again
    for the coefficients' gradient, its gradient is written, and the optimiser reads and writes it
    and its moments (seven passes); the dense weights of the step's experts and their gradients are
    written and read once each. A calibrated device has measured the ratio instead.
    """
    weights = flops.projected_weights(setting.small, setting.projected)
    bank = 4.0 * weights * setting.projected.rank
    dense = 4.0 * weights * setting.projected.experts
    bandwidth = setting.device.bandwidth
    return 0.0 if bandwidth is None else steps * (10 * bank + 4 * dense) / bandwidth


# Tokens -----------------------------------------------------------------------------------------

def finetuning_tokens(spec_tokens: int, size: str = "small") -> float:
    """Tokens that fine-tuning passes over at most, as the paper's settings and costs imply.

    All steps that its limits allow at 8M and 64M tokens, and half of them at 1M, where it says that
    the limit is never reached, of 8,192 tokens for the small and 16,384 for the large model
    reproduce its Table 3. Between these sizes the number of passes over the set is interpolated in
    log-log; below, it grows on to at most 30; above, it stays.
    """
    taken = {1_000_000: 0.5}
    knots = [(size, limit * taken.get(size, 1.0)) for size, limit in FINETUNE_STEPS.items()]
    logs = [(math.log(s), math.log(steps * STEP_TOKENS[size] / s)) for s, steps in knots]
    x = math.log(max(spec_tokens, 1))
    left, right = (logs[0], logs[1]) if x < logs[1][0] else (logs[1], logs[2])
    slope = (right[1] - left[1]) / (right[0] - left[0])
    passes = math.exp(left[1] + slope * (min(x, logs[2][0]) - left[0]))
    return spec_tokens * min(passes, 30.0)


# Methods ----------------------------------------------------------------------------------------

def generic_token_cost(setting: Setting, method: str) -> Work:
    """Work per token of what a method pretrains: for ``slm-is``, once per domain; else once."""
    small, large = setting.small, setting.large
    if method == "slm-d" and setting.distil_pretraining:
        return distilled(setting, 1.0)
    if method in LARGE:
        return work(setting, 1.0, flops.training(large), large.d_model)
    plain = work(setting, 1.0, flops.training(small), small.d_model)
    if method != "slm-pn":
        return plain
    steps = 1.0 / setting.batch_tokens
    extra = flops.projection_per_step(small, setting.projected, setting.projected.experts) * steps
    seconds = projection_seconds(setting, steps)
    if setting.device.projection_overhead is not None:
        seconds = plain.device_hours * 3600 * (setting.device.projection_overhead - 1)
    return work(setting, 1.0, flops.training(small), small.d_model, extra, seconds)


def finetuning(setting: Setting, method: str, tokens: float | None = None) -> Work:
    """Work of adapting to one domain; ``tokens`` replaces the usual number of them."""
    small, large = setting.small, setting.large
    size = "large" if method in LARGE else "small"
    usual = finetuning_tokens(setting.spec_tokens, size)
    if method == "slm-d":
        teacher = finetuning(setting, "llm")
        return teacher + distilled(setting, tokens or usual * DISTILLED_FACTOR)
    if method == "llm-lora":
        per_token = flops.lora_training(large, setting.lora.rank)
        return work(setting, tokens or usual * setting.lora.step_factor, per_token, large.d_model)
    shape = large if method in LARGE else small
    return work(setting, tokens or usual, flops.training(shape), shape.d_model)


def expert_choice(setting: Setting, method: str) -> Work:
    """Scoring every expert on the domain, forward only: the default choice, the lowest loss."""
    experts = setting.projected.experts if method == "slm-pn" else setting.experts
    tokens = experts * min(setting.spec_tokens, EXPERT_CHOICE_TOKENS)
    small = setting.small
    return replace(work(setting, tokens, flops.forward(small), small.d_model), tokens=0.0)


def cost(setting: Setting, method: str, pretrain_tokens: float,
         finetune_tokens: float | None = None) -> MethodCost:
    """All costs of a method that pretrains on ``pretrain_tokens`` (per domain for ``slm-is``).

    For ``slm-mix`` and ``slm-pn`` the tokens are those of all experts together.
    """
    small, large = setting.small, setting.large
    shape = large if method in LARGE else small
    pretraining = generic_token_cost(setting, method) * pretrain_tokens
    specialization = finetuning(setting, method, finetune_tokens)
    generic = pretraining
    zero = work(setting, 0.0, 0.0, small.d_model)
    if method == "slm-nopt":
        generic = zero
    elif method == "slm-is":
        generic, specialization = zero, pretraining + specialization
    elif method in ("slm-pn", "slm-mix"):
        specialization = specialization + expert_choice(setting, method)
    elif method == "slm-d" and not setting.teacher_exists:
        teacher = work(setting, 1.0, flops.training(large), large.d_model)
        generic = pretraining + teacher * pretrain_tokens
    return MethodCost(method, generic, specialization, flops.parameters(shape),
                      flops.forward(shape), method_memory(setting, method))


def method_memory(setting: Setting, method: str) -> float:
    """Bytes of the method's largest training step on one device."""
    small, large = setting.small, setting.large
    if method == "slm-pn":
        return projected_memory(small, setting.projected)
    if method in LARGE or (method == "slm-d" and not setting.teacher_exists):
        return training_memory(flops.parameters(large), large)
    if method == "slm-d":
        return training_memory(flops.parameters(small), small) + inference_memory(large)
    return training_memory(flops.parameters(small), small)


def distilled(setting: Setting, tokens: float) -> Work:
    """Work of student steps with a live teacher, each at its own width's utilisation."""
    student = work(setting, tokens, flops.training(setting.small), setting.small.d_model)
    teacher = work(setting, tokens, flops.forward(setting.large), setting.large.d_model)
    return replace(student + teacher, tokens=tokens)


def break_even(a: MethodCost, b: MethodCost) -> float | None:
    """Number of domains at which both cost the same device-hours; None if the curves never meet.

    Below it the method with the smaller generic cost is cheaper, above it the other.
    """
    fixed = a.generic.device_hours - b.generic.device_hours
    per_domain = b.specialization.device_hours - a.specialization.device_hours
    if fixed == 0 or per_domain == 0 or (fixed > 0) != (per_domain > 0):
        return None
    return fixed / per_domain
