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

from planearly import keys, methods
from planearly.cost.devices import Device
from planearly.methods import Method
from planearly.model import flops, memory
from planearly.model.memory import Job
from planearly.model.traffic import sent_bytes
from planearly.model.transformer import Shape
from planearly.train.steps import FINETUNE_STEPS

STEP_TOKENS = {"small": 8_192, "large": 16_384}
"""Tokens of a fine-tuning step that the paper's Table 3 and its step limits imply."""
DISTILLED_FACTOR = 15
"""Times the plain student's fine-tuning tokens that the paper's SLM-d used (its Table 3)."""
EXPERT_CHOICE_TOKENS = 131_072
"""Most tokens of the domain that every expert is scored on before fine-tuning."""
LEAST_BATCH_TOKENS, BATCH_TOKENS = 2_048, 262_144
"""Fewest and most tokens of a pretraining step, unless a recipe says otherwise."""
_STEPS = 2_000
"""Fewest steps of a pretraining whose step is above the fewest tokens."""


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
    batch_tokens: int | None = None
    """Tokens of a pretraining step; None: by each pretraining's own tokens. A projected network is
    projected once a step, and a GPU makes no step shorter than launching it takes."""
    finetune_batch_tokens: int | None = None
    """Tokens of a fine-tuning step; None: by the model's size."""
    devices: int = 1
    """They divide a step's rows; each holds the whole model and its state where it can."""
    expert: str = "lowest-loss"
    """How a bank's expert is chosen, as the recipe key says."""
    candidate_tokens: float | None = None
    """Tokens of generic text that a method chooses among by their losses; None: as many as
    pretraining has."""
    adapt_share: float = 0.3
    """Share of pretraining that a method which adapts makes for every domain."""
    preset: str = "modern"
    """Optimiser of pretraining."""
    finetune_preset: str = "modern"

    def shape(self, row: Method) -> Shape:
        """Of the model that a method deploys."""
        return self.large if row.large else self.small

    def own_share(self, row: Method) -> float:
        """Share of a method's pretraining that is paid for every domain anew."""
        return 1.0 if row.per_domain else self.adapt_share if row.adapts else 0.0

    def count(self, row: Method) -> int:
        """Experts of a method with a bank."""
        return self.projected.experts if row.bank == "projected" else self.experts

    def step(self, pretrain_tokens: float) -> int:
        """Tokens of a step of a pretraining on so many: of the setting, or at least a row for
        every device."""
        return self.batch_tokens or max(step_tokens(pretrain_tokens, self.small.context),
                                        self.devices * self.small.context)

    def steps(self) -> list[tuple[float, int]]:
        """The fewest tokens of pretraining that take a step, and the tokens of that step, for
        every step that :meth:`step` may give, both increasing."""
        least = self.step(0)
        doubled = [2**power for power in range(BATCH_TOKENS.bit_length())]
        return [(0.0, least), *((float(_STEPS * step), step) for step in doubled
                                if self.batch_tokens is None and step > least)]

    def tuning_step(self, size: str) -> int:
        """Tokens of a fine-tuning step of a model of this size, likewise."""
        return self.finetune_batch_tokens or max(STEP_TOKENS[size],
                                                 self.devices * self.small.context)


@dataclass(frozen=True)
class MethodCost:
    """One method's costs."""

    method: str
    generic: Work
    specialization: Work
    inference_params: int
    inference_flops: int
    """FLOPs per token of the deployed model, over full windows."""
    train_bytes: float
    """Most bytes that training needs on each device, at ``microbatch_tokens``."""
    microbatch_tokens: int
    """Of pretraining (of fine-tuning, where nothing is pretrained); 0 where some stage cannot run
    one row in the device's memory, and ``train_bytes`` is what that row would need."""
    sharded: bool = False
    """Whether some training has its weights and optimiser state divided over the devices."""

    def total(self, domains: int) -> Work:
        """C(N) = C_generic + N x C_specialization (paper, section 4.2)."""
        return self.generic + self.specialization * domains

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Time and memory --------------------------------------------------------------------------------

def work(setting: Setting, tokens: float, flops_per_token: float, shape: Shape,
         step_tokens: float | None = None, extra_flops: float = 0.0,
         extra_seconds: float = 0.0) -> Work:
    """The work of ``tokens`` at this many operations each, at the width's utilisation.

    ``extra_flops`` and ``extra_seconds`` are those of the whole, of what does not run as a model's
    matrix products do.

    Args:
        step_tokens: of a training step; None: nothing is trained.
    """
    seconds = setting.device.seconds(tokens * flops_per_token, shape.d_model)
    if step_tokens:
        seconds = max(seconds, setting.device.least_seconds(tokens / step_tokens, shape.layers))
    hours = (seconds + extra_seconds) / 3600
    money = None if setting.price is None else hours * setting.price
    return Work(tokens, tokens * flops_per_token + extra_flops, hours, money)


def job_on(device: Device, devices: int, shape: Shape, **more: Any) -> Job:
    """What fixes a planned training's memory, divided among the devices where it must be; ``more``
    as of :class:`memory.Job`."""
    return memory.regime(device.memory, Job(shape, bf16=device.bf16, device=device.kind,
                                            processes=devices, **more))


def trainings(setting: Setting, row: Method, pretrain_tokens: float) -> list[tuple[Job, int]]:
    """A method's trainings, the first of them first: what fixes each one's memory, and the tokens
    of a step on one device."""
    shape = setting.shape(row)
    pretrained = setting.step(pretrain_tokens) // setting.devices
    tuned = setting.tuning_step(row.size) // setting.devices

    def job(of: Shape, **more: Any) -> Job:
        return job_on(setting.device, setting.devices, of, **more)

    found: list[tuple[Job, int]] = []
    if row.taught and not setting.teacher_exists:
        found += trainings(setting, methods.teacher(), pretrain_tokens)
    if row.pretrains and pretrain_tokens:
        bank = setting.projected if row.bank == "projected" else None
        found.append((job(shape, projected=bank, preset=setting.preset), pretrained))
        if bank and row.adapts:
            found.append((job(shape, preset=setting.preset), pretrained))
    adapters = setting.lora.rank if row.tune == "lora" else None
    found.append((job(shape, adapter_rank=adapters,
                      teacher=setting.large if row.taught else None,
                      preset=setting.finetune_preset), tuned))
    return found


def memory_of(setting: Setting, row: Method, pretrain_tokens: float) -> tuple[float, int, bool]:
    """``train_bytes``, ``microbatch_tokens`` and ``sharded`` of :class:`MethodCost`.

    The microbatch is the one that the run takes, by :func:`memory.fitting_microbatch`.
    """
    device = setting.device
    needed, first, sharded = 0.0, None, False
    for job, batch in trainings(setting, row, pretrain_tokens):
        tokens = memory.fitting_microbatch(
            device.memory, job, batch, memory.MOST_TOKENS[device.kind])
        if tokens == 0:
            return memory.training_bytes(job, job.shape.context), 0, job.sharded
        sharded |= job.sharded
        first = tokens if first is None else first
        needed = max(needed, memory.training_bytes(job, tokens))
    return needed, first or 0, sharded


NETWORK = 12.5e9
"""Bytes/s in one direction of a device's share of a network between machines: 100 Gbit/s."""
SLOW = 0.25
"""Share of a step's operations in time, from which what is sent is slow."""


@dataclass(frozen=True)
class Traffic:
    """What a step of a method's first training sends between devices.

    Attributes:
        sent: bytes that each device sends, and as many that it receives.
        computing: seconds of the step's operations.
        links, network: seconds that they take over the links of one machine (None: unknown), and at
            :data:`NETWORK`. Gradients of a step's last pass travel while it runs.
        narrow: seconds at :data:`NETWORK` where gradients travel in bfloat16.
    """

    sent: float
    computing: float
    links: float | None
    network: float
    narrow: float

    def slow(self, seconds: float) -> bool:
        """Whether devices would wait for what takes so long to send."""
        return seconds > SLOW * self.computing


def step_traffic(device: Device, job: Job, tokens: int, passes: int = 1) -> Traffic:
    """Of each of the job's devices, in steps of so many tokens on each."""
    sent, narrow = (sent_bytes(job, passes, bf16) for bf16 in (False, True))
    per_token = flops.lora_training(job.shape, job.adapter_rank) if job.adapter_rank \
        else flops.training(job.shape)
    return Traffic(sent, device.seconds(tokens * per_token, job.shape.d_model),
                   sent / device.links if device.links else None, sent / NETWORK, narrow / NETWORK)


def traffic(setting: Setting, row: Method, pretrain_tokens: float,
            microbatch_tokens: int) -> Traffic | None:
    """Of each of the setting's devices; None: there is one alone, or a step does not run."""
    if setting.devices == 1 or not microbatch_tokens:
        return None
    job, batch = trainings(setting, row, pretrain_tokens)[0]
    return step_traffic(setting.device, job, batch, max(-(-batch // microbatch_tokens), 1))


def step_tokens(pretrain_tokens: float, context: int) -> int:
    """Tokens of a pretraining's step where nobody says how many: a power of two that gives at least
    some 2,000 steps, between 2,048 and 262,144 (docs/experiments.md, "Tokens of a step")."""
    power = 2 ** int(math.log2(max(pretrain_tokens / _STEPS, 1)))
    return max(min(power, BATCH_TOKENS), LEAST_BATCH_TOKENS, context)


def inference_memory(shape: Shape, bits: float) -> float:
    """Bytes of a deployed model that continues one text: weights at ``bits`` each, and a key-value
    cache of a full context in bfloat16."""
    cache = 2 * 2 * shape.layers * shape.qkv_widths[1] * shape.context
    return flops.parameters(shape) * bits / 8 + cache


_MOVED = 0.5
"""Share of the sheet's bandwidth at which the bytes of :func:`projection_seconds` are taken to
move: fitted to the step ratios on an H200 (docs/benchmarks.md). The kernels reach 0.8 to 0.9; the
rest of what projected steps took longer is unexplained."""


@dataclass(frozen=True)
class Projecting:
    """A projected network's training, as far as what projecting adds to its steps depends on it."""

    shape: Shape
    projected: keys.Projected
    preset: str = "modern"
    """Optimiser."""
    devices: int = 1


def projection_seconds(device: Device, how: Projecting) -> float:
    """Device-seconds that the deferred projection adds to an optimiser step, by bytes and Muon's
    operations; 0 where the device's bandwidth is unknown.

    The float32 bank takes 13 passes of 4 bytes a number: it is read to make the weights and again
    for the coefficients' gradient; its gradient is written, measured and scaled (four), and AdamW
    reads and writes it and its moments (seven; Muon's fewer are charged as many). The dense
    weights of the step's experts or blends take 10: written, read in bfloat16 by the passes, their
    gradients cleared, added up and read twice. All at :data:`_MOVED` of the bandwidth.

    Each device makes its own dense weights, and reads and updates the whole bank, unless they
    divide it (:func:`memory.regime`): then each has a part. Muon's orthogonalising of every slice
    is always divided.
    """
    if device.bandwidth is None:
        return 0.0
    shape, projected = how.shape, how.projected
    weights = flops.projected_weights(shape, projected)
    divided = job_on(device, how.devices, shape, projected=projected, preset=how.preset).sharded
    bank = 13 * 4.0 * weights * projected.slices * (1 if divided else how.devices)
    dense = 10 * 4.0 * weights * projected.at_once * how.devices
    seconds = (bank + dense) / (_MOVED * device.bandwidth)
    if how.preset == "modern":
        more = weights * (projected.slices - 1)
        seconds += device.seconds(
            more * flops.orthogonalising(shape.d_model, shape.d_ff), shape.d_model)
    return seconds


def projecting_adds(device: Device, how: Projecting, steps: float, plain: float) -> float:
    """Device-seconds that projecting adds to so many steps of ``plain`` device-seconds.

    Of a calibrated device the measured ones, scaled as :func:`projection_seconds` says. One whose
    file does not tell what was measured, or no bandwidth, has a ratio alone, which is taken for
    every number of slices, of tokens a step and of devices, and for either optimiser.
    """
    if device.projection_overhead is None:
        return steps * projection_seconds(device, how)
    if (known := device.projection) is None or device.bandwidth is None:
        return plain * (device.projection_overhead - 1)
    then = Projecting(Shape(**known.shape), keys.Projected(**known.projected), known.preset)
    scale = projection_seconds(device, how) / projection_seconds(device, then)
    return steps * known.seconds * scale


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

def own_pretraining(setting: Setting, method: str | Method, tokens: float) -> Work:
    """Work of a pretraining for every domain anew: of a dense model."""
    return pretraining(setting, replace(_row(method), bank=None), tokens)


def pretraining(setting: Setting, method: str | Method, tokens: float) -> Work:
    """Work of what a method itself pretrains, its teacher not included, as one pretraining on so
    many tokens: once per domain for one that draws by the domain, else once."""
    row = _row(method)
    shape, batch = setting.shape(row), setting.step(tokens)
    plain = work(setting, tokens, flops.training(shape), shape, batch)
    if row.bank != "projected":
        return plain
    steps = tokens / batch
    extra = flops.projection_per_step(shape, setting.projected, setting.projected.at_once) * steps
    how = Projecting(shape, setting.projected, setting.preset, setting.devices)
    seconds = projecting_adds(setting.device, how, steps, plain.device_hours * 3600)
    return work(setting, tokens, flops.training(shape), shape, batch, extra, seconds)


def finetuning(setting: Setting, method: str | Method, tokens: float | None = None) -> Work:
    """Work of adapting to one domain, its teacher's included; ``tokens`` replaces the usual number.
    """
    row = _row(method)
    shape = setting.shape(row)
    usual = finetuning_tokens(setting.spec_tokens, row.size)
    if row.taught:
        student = distilled(setting, usual * DISTILLED_FACTOR if tokens is None else tokens)
        # a teacher from outside teaches as it is
        return student if setting.teacher_exists \
            else finetuning(setting, methods.teacher()) + student
    per_token = flops.training(shape)
    if row.tune == "lora":
        per_token = flops.lora_training(shape, setting.lora.rank)
        usual *= setting.lora.step_factor
    return work(setting, usual if tokens is None else tokens, per_token, shape,
                setting.tuning_step(row.size))


def expert_choice(setting: Setting, method: str | Method,
                  finetune_tokens: float | None = None) -> Work:
    """Choosing a domain's expert: forward passes of all of them over a sample of the domain
    (``lowest-loss``), a fine-tuning of each (``best-tuned``), or nothing.

    Args:
        finetune_tokens: of one fine-tuning; None: the usual number.
    """
    row = _row(method)
    if not row.bank or setting.expert in ("most-frequent", "blend"):
        return work(setting, 0.0, 0.0, setting.small)
    experts, shape = setting.count(row), setting.shape(row)
    if setting.expert == "best-tuned":
        full = replace(row, bank=None, tune="full")
        return finetuning(setting, full, finetune_tokens) * experts
    tokens = experts * min(setting.spec_tokens, EXPERT_CHOICE_TOKENS)
    return replace(work(setting, tokens, flops.forward(shape), shape), tokens=0.0)


def scoring(setting: Setting, method: str | Method, pretrain_tokens: float) -> Work:
    """A forward pass of the plain small model over the text that a method chooses among by it."""
    tokens = pretrain_tokens if setting.candidate_tokens is None else setting.candidate_tokens
    scored = work(setting, tokens * _row(method).scored, flops.forward(setting.small),
                  setting.small)
    return replace(scored, tokens=0.0)


def cost(setting: Setting, method: str | Method, pretrain_tokens: float,
         finetune_tokens: float | None = None) -> MethodCost:
    """All costs of a method that pretrains on ``pretrain_tokens`` (per domain, if it draws by it).

    For a bank the tokens are those of all experts together.
    """
    row = _row(method)
    shape = setting.shape(row)
    zero = work(setting, 0.0, 0.0, shape)
    generic = pretraining(setting, row, pretrain_tokens) if row.pretrains else zero
    specialization = finetuning(setting, row, finetune_tokens)
    if row.bank:
        specialization = specialization + expert_choice(setting, row, finetune_tokens)
    if row.taught and not setting.teacher_exists:
        generic = generic + pretraining(setting, methods.teacher(), pretrain_tokens)
    own = setting.own_share(row)
    if own:
        specialization = own_pretraining(setting, row, pretrain_tokens) * own + specialization
        generic = generic * (1 - own)
    if row.scored:  # before its fine-tuning, once for all domains, and after it
        plain = cost(setting, "slm", pretrain_tokens, finetune_tokens)
        each = scoring(setting, row, pretrain_tokens)
        generic = generic + plain.generic + each
        specialization = specialization + plain.specialization + each
    return MethodCost(row.name, generic, specialization, flops.parameters(shape),
                      flops.forward(shape), *memory_of(setting, row, pretrain_tokens))


def _row(method: str | Method) -> Method:
    return methods.find(method) if isinstance(method, str) else method


def distilled(setting: Setting, tokens: float, answered: float | None = None) -> Work:
    """Work of student steps and of the teacher's answers, each at its own width's utilisation.

    Args:
        answered: tokens that the teacher answers, where answers are stored; None: every one that
            the student is taught on.
    """
    student = work(setting, tokens, flops.training(setting.small), setting.small,
                   setting.tuning_step("small"))
    teacher = work(setting, tokens if answered is None else answered,
                   flops.forward(setting.large), setting.large)
    return replace(student + teacher, tokens=tokens)


def break_even(a: MethodCost, b: MethodCost) -> float | None:
    """Number of domains at which both cost the same device-hours; None if the curves never meet.

    Below it the method with the smaller generic cost is cheaper, above it the other.
    """
    return crossing(a.generic.device_hours, a.specialization.device_hours,
                    b.generic.device_hours, b.specialization.device_hours)


def crossing(fixed_a: float, each_a: float, fixed_b: float, each_b: float) -> float | None:
    """Number of domains at which fixed + N x each is the same for both; None if never above 0."""
    found = (fixed_b - fixed_a) / (each_a - each_b) if each_a != each_b else 0.0
    return found if found > 0 else None
