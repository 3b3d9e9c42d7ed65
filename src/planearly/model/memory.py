"""How many bytes a training step needs on one device: the one formula.

The training loop chooses its microbatch by it, the planner promises by it, and
tests/model/test_memory.py holds it against what torch allocates. Where one device's memory holds
model and optimiser state, they are whole on every device (data parallelism), however many there
are; else the devices divide them (:mod:`planearly.sharding`), if they then fit.

A step has two peaks that are never there together: the passes (activations of one microbatch, the
gradients so far) and the update (all gradients, what the optimiser works with). The larger counts.

Activations are those that autograd keeps of :mod:`planearly.model.transformer` run operation by
operation, and so an upper limit for a compiled step or fused norms, which keep less. Per token of a
block of width d and feed-forward f, in bytes, under autocast to bfloat16 (in float32):

    two norms, each its input and its normed input              16 d  (24 d with the outputs)
    inputs of the query, key and value product, in bfloat16      2 d  (their norm's output)
    query, key, value as one; query and key rotated             10 d  (20 d)
    attention's output, which the output matrix reads            2 d  ( 4 d)
    input of the feed-forward, cast for each of its matrices  2 d or 4 d if gated  (norm's output)
    its inner activations: two, or if gated four              4 f or 8 f  (8 f or 16 f)
    float32 statistics: of the softmax per head, of the norms   4 heads + 8
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from planearly import keys, parallel
from planearly.model import flops, loss, parts
from planearly.model.attention import written_out_pays
from planearly.model.transformer import FFN_MATRICES, GATED, Shape

USABLE = 0.9
"""Share of a device's memory that a step may take: the rest is the driver's, the libraries' work
space, and what the allocator loses between blocks."""
MOST_TOKENS = {"cuda": 65_536, "cpu": 4_096}
"""Tokens of a microbatch above which a device is not faster, by its kind: more are never taken."""

_LOGIT = 12
"""Bytes per logit when there are most: log-probabilities, their gradient and that of the logits,
all float32 (a forward pass has bfloat16, float32 and log-probabilities: 10)."""
_DISTILLED_LOGIT = 40
"""The same with a teacher: its logits and log-probabilities, the student's, both divergences' terms
and their gradients."""
DISTILLED_LOGITS = parts.LOGITS
"""Most logits at once in :mod:`planearly.train.distill`, which takes at least one row."""
_MUON = 8
"""Bytes per number of the matrices of one size while they are orthogonalised: bfloat16 inputs,
these put together, the iterate and the next one (:mod:`planearly.train.muon`)."""


_GATHERED = 3
"""Layers of a divided model whose weights are whole on a device at once: the one that computes, the
next one, and the buffer in which that arrived. Gradients leave as activations are freed."""


@dataclass(frozen=True)
class Job:
    """What fixes a training step's memory, beside the tokens of its microbatch."""

    shape: Shape
    preset: str = "modern"
    """Optimiser: ``modern`` (Muon for hidden matrices, AdamW), ``adamw`` or ``paper`` (Adam)."""
    bf16: bool = True
    """Whether matrix products are in bfloat16, by autocast."""
    projected: keys.Projected | None = None
    """The body is the dense model of this projected network's experts."""
    adapter_rank: int | None = None
    """LoRA: adapters of this rank are trained and nothing else."""
    teacher: Shape | None = None
    """Distillation: this model's weights, in float32, and its answers are there too."""
    logit_tokens: int | None = None
    """Most positions whose logits exist at once; None: a chunk of :mod:`planearly.model.loss`."""
    averaged: bool = False
    """The average of the trained parameters is kept beside them."""
    device: Literal["cuda", "cpu"] = "cuda"
    processes: int = 1
    sharded: bool = False
    """The processes divide parameters and what goes with them: of a projected network its bank, of
    any other model all matrices, of which the tables and a few layers are gathered in the passes.
    """


def state_bytes(job: Job) -> float:
    """Parameters, their average, the optimiser's moments: what lasts from step to step."""
    hidden, other = _held(job)
    frozen = flops.parameters(job.shape) if job.adapter_rank else 0
    moments = 4.0 * hidden + 8.0 * other
    averages = 4.0 * (hidden + other) * job.averaged
    teacher = 4.0 * flops.parameters(job.teacher) if job.teacher else 0.0
    return 4.0 * (hidden + other + frozen) + moments + averages + teacher


def activation_bytes(job: Job, tokens: int) -> float:
    """What autograd keeps of a microbatch of ``tokens`` up to the final norm's output."""
    shape, d = job.shape, job.shape.d_model
    gated = shape.ffn == GATED
    inner = (4 if gated else 2) * shape.d_ff
    shared_keys = shape.kv_heads is not None
    # repeated keys and values stand in place of the rotated keys and of the stacked three
    attention = (3 if shared_keys else 5) * d + d
    # matrices that read the first norm's output, and the second's: each casts it for itself
    readers = (3 if job.adapter_rank else 1) + (2 if gated else 1)
    size = 2 if job.bf16 else 4
    # frozen norms keep no normed input
    norms = (8 if job.adapter_rank else 16) + (2 * readers if job.bf16 else 8)
    block = norms * d + size * (attention + inner) + 4 * shape.heads + 8
    if job.device == "cpu" and written_out_pays(job.bf16, shape.context):
        # probabilities, and the output, which is kept for the way back
        block += size * shape.heads * shape.context
    if job.adapter_rank:
        matrices = 4 + len(FFN_MATRICES[shape.ffn])
        block += size * matrices * job.adapter_rank + (2 * d if job.bf16 else 0)
    last = (10 if job.bf16 else 12) * d
    return float(tokens) * (shape.layers * block + last + 8)


def passes_bytes(job: Job, tokens: int) -> float:
    """State, and all that the passes of a microbatch of ``tokens`` have beside it at their peak."""
    shape, d = job.shape, job.shape.d_model
    table = shape.vocab_size * d
    size = 1 if job.bf16 else 2  # of a number, in units of bfloat16
    gradients = 4.0 * (flops.lora_parameters(shape, job.adapter_rank) if job.adapter_rank
                       else _shared(job))
    weights = flops.parameters(shape)
    copies = 2.0 * weights if job.bf16 else 0.0  # of matrices, for the products
    tables = gathered = 0.0
    if job.sharded and not job.projected:
        gradients /= job.processes
        tables = 4.0 * (weights - block_matrices(shape))
        narrow = job.bf16 and job.logit_tokens is None  # models of others are gathered in float32
        gathered = _GATHERED * (2 if narrow else 4) * block_matrices(shape) / shape.layers
        if narrow:
            copies = 2.0 * table
    slices = by_row = 0.0
    if job.projected:
        at_once = job.projected.at_once
        here = min(at_once, max(tokens // shape.context, 1))
        weights_of_one = flops.projected_weights(shape, job.projected)
        slices = 8.0 * weights_of_one * at_once
        if job.device == "cpu":  # one matrix's copies and gradients, for every row of a microbatch
            by_row = 8.0 * d * shape.d_ff * max(tokens // shape.context, 1)
        else:
            slices += (2.0 if job.bf16 else 0.0) * weights_of_one * here
            by_row = 6.0 * d * shape.d_ff * here
    chunk = job.logit_tokens or loss.chunk_tokens(shape.vocab_size, job.device)
    at_once = min(tokens, chunk)
    # beside a chunk's logits, the gradients that are taken with them
    logits = float(_LOGIT) * at_once * shape.vocab_size + 2.0 * size * tokens * d
    if job.teacher:
        least = max(DISTILLED_LOGITS, shape.context * shape.vocab_size)
        logits = float(_DISTILLED_LOGIT) * least + 4.0 * tokens * d + 4.0 * table
    # one block's gradients on the way back; the head's waits for the embedding's
    block = tokens * size * (12.0 * d + 3 * len(FFN_MATRICES[shape.ffn]) * shape.d_ff) + by_row
    head = 4.0 * table
    beside = max(activation_bytes(job, tokens) + head + max(logits, block + gathered),
                 2 * tables)  # their gradients, and these on their way to the others
    return state_bytes(job) + gradients + copies + slices + tables + beside


def update_bytes(job: Job) -> float:
    """State, all gradients, and what adding up and the optimiser work with."""
    hidden, other = _held(job)
    work = 0.0
    if hidden:
        work = (_MUON + 1) * _piece(job)
    if job.sharded:
        # gloo has no all-to-all: every process receives all rows, and puts them together
        own = _MUON + 1 + (4.0 * job.processes if job.device == "cpu" else 0.0)
        work = own * _piece(job) if hidden else 0.0
    elif job.processes > 1:
        work = max(work, 4.0 * (parallel.BUCKET + _largest(job)))
    return state_bytes(job) + 4.0 * (hidden + other) + work


def regime(memory: float | None, job: Job) -> Job:
    """The job as several processes do it: whole on each of them where a device's memory holds it,
    else divided; adapters are never."""
    alone = job.processes == 1 or job.adapter_rank or fits(memory, job)
    return job if alone else replace(job, sharded=True)


def fits(memory: float | None, job: Job) -> bool:
    """Whether a device can train with a row at a time; see :func:`fitting_microbatch`."""
    return fitting_microbatch(memory, job, job.shape.context) > 0


def training_bytes(job: Job, tokens: int) -> float:
    """Bytes of a training step on one device, with microbatches of ``tokens``."""
    return max(passes_bytes(job, tokens), update_bytes(job))


def fitting_microbatch(memory: float | None, job: Job, batch_tokens: int,
                       most_tokens: int = MOST_TOKENS["cuda"]) -> int:
    """Tokens of the largest microbatch that a device has memory for.

    Args:
        memory: bytes of the device, all of them (``USABLE`` of which are used); None: unknown, and
            taken as enough.
        batch_tokens: of an optimiser step, on this device.
        most_tokens: those that suit the device's speed, see ``MOST_TOKENS``.

    Returns:
        A multiple of the context: at least one row, and at most the batch and ``most_tokens``; 0
        where not one row fits.
    """
    context = job.shape.context
    rows = max(min(batch_tokens, most_tokens) // context, 1)
    if memory is None or training_bytes(job, rows * context) <= USABLE * memory:
        return rows * context
    fits, fails = 0, rows
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if training_bytes(job, middle * context) <= USABLE * memory:
            fits = middle
        else:
            fails = middle
    return fits * context


def trained(job: Job) -> tuple[int, int]:
    """Trained parameters that Muon takes, and all others."""
    shape = job.shape
    if job.adapter_rank:
        return 0, flops.lora_parameters(shape, job.adapter_rank)
    whole = flops.projected_parameters(shape, job.projected) if job.projected \
        else flops.parameters(shape)
    if job.preset != "modern":
        return 0, whole
    hidden = block_matrices(shape)
    if job.projected:
        hidden += (job.projected.slices - 1) * flops.projected_weights(shape, job.projected)
    return hidden, whole - hidden


def _held(job: Job) -> tuple[float, float]:
    """The same, of those that one device has."""
    hidden, other = map(float, trained(job))
    if not job.sharded:
        return hidden, other
    if not job.projected:
        return hidden / job.processes, other / job.processes
    bank = job.projected.slices * flops.projected_weights(job.shape, job.projected)
    gone = bank * (1 - 1 / job.processes)
    return (hidden - gone, other) if hidden else (hidden, other - gone)


def block_matrices(shape: Shape) -> int:
    """Numbers in the matrices of all blocks."""
    return flops.non_embedding(shape) - (2 * shape.layers + 1) * shape.d_model


def _shared(job: Job) -> int:
    """Parameters whose gradients grow during the passes: a bank's come after them."""
    whole = flops.parameters(job.shape)
    return whole - flops.projected_weights(job.shape, job.projected) if job.projected else whole


def _of_one_size(job: Job) -> float:
    """Numbers in all matrices of the size that has most, in either direction but where their rows
    are divided."""
    shape = job.shape
    d, f = shape.d_model, shape.d_ff
    down = -1 if job.sharded else 1  # of a size of its own, or of that of the others
    numbers = {d: float(d * d)}
    for key, count in ((sum(shape.qkv_widths), sum(shape.qkv_widths) * d),
                       (f, (len(FFN_MATRICES[shape.ffn]) - 1) * d * f), (down * f, d * f)):
        numbers[key] = numbers.get(key, 0.0) + count
    if job.projected:
        for matrix in job.projected.matrices:
            numbers[down * f if matrix == "down" else f] += (job.projected.slices - 1) * d * f
    return shape.layers * max(numbers.values())


def _piece(job: Job) -> float:
    """Numbers of the matrices that are orthogonalised at once: of those that divide them, by each.
    """
    many = job.processes if job.sharded else 1
    matrix = float(job.shape.d_model * max(job.shape.d_ff, sum(job.shape.qkv_widths)))
    together = min(_of_one_size(job) / many,
                   parallel.BUCKET * job.processes / many + _largest(job) / many)
    return max(together, matrix)


def _largest(job: Job) -> float:
    """Numbers in the largest parameter."""
    shape = job.shape
    bank = shape.d_model * shape.d_ff * (job.projected.slices if job.projected else 1)
    return float(max(bank, shape.vocab_size * shape.d_model))
