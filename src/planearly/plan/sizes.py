"""From a limit at inference to a model's shape.

The paper's family (its section 4): 7 layers, a plain feed-forward of 4 widths with GELU, heads of
128. A limit of 126M parameters gives its small model (width 1,024) and 771M its large one (2,816).
"""

from __future__ import annotations

import math
from dataclasses import replace

from planearly import keys, methods
from planearly.cost import model
from planearly.cost.devices import Device
from planearly.errors import UserError
from planearly.model import flops, memory, outside, starts
from planearly.model.transformer import Shape
from planearly.units import short

LAYERS = 7
PAPER_SMALL, PAPER_LARGE = 126_000_000, 771_000_000
RATIO = PAPER_LARGE / PAPER_SMALL

BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "q8_0": 8.5, "int8": 8.0, "q6_k": 6.5625,
        "q5_k_m": 5.7, "q4_k_m": 4.85, "q4_0": 4.5, "int4": 4.0}
"""Bits per weight; the GGUF kinds hold their block scales too (llama.cpp's quantize table)."""

DECODING_SHARE = 0.6
"""Share of the memory bandwidth that decoding reaches, one sequence at a time: an assumption."""


def shape_for(limit: int) -> Shape:
    """The largest shape of the family with at most ``limit`` parameters in total.

    Widths are multiples of 128 from 1,024 up, of 64 from 256 up and of 32 below; that is also the
    width of a head. The vocabulary is 32,768 and the context 1,024; below 30M parameters 8,192 and
    256, where a large vocabulary would be most of the model.

    Raises:
        UserError: not even a width of 64 fits.
    """
    best = None
    vocabulary, context = (32_768, 1_024) if limit >= 30_000_000 else (8_192, 256)
    for width in [*range(64, 256, 32), *range(256, 1024, 64), *range(1024, 32_769, 128)]:
        head = 128 if width >= 1024 else 64 if width >= 256 else 32
        shape = Shape(layers=LAYERS, d_model=width, heads=width // head, d_ff=4 * width,
                      vocab_size=vocabulary, context=context, ffn="gelu")
        if flops.parameters(shape) > limit:
            if best is None:
                raise UserError(
                    f"{short(limit)} parameters are below the smallest model planned here "
                    f"({short(flops.parameters(shape))}): give a larger inference limit, "
                    "checkpoint or teacher"
                )
            break
        best = shape
    assert best is not None
    return best


def bits(quantization: str) -> float:
    """Bits per weight of a kind of quantisation.

    Raises:
        UserError: an unknown kind.
    """
    known = BITS.get(quantization.lower())
    if known is None:
        raise UserError(f"unknown quantisation '{quantization}': choose from {', '.join(BITS)}")
    return known


def limit_from_bytes(size: int, quantization: str) -> int:
    """Parameters whose weights take at most ``size`` bytes (the key-value cache not included)."""
    return int(size * 8 / bits(quantization))


def limit_from_speed(tokens_per_second: float, device: Device, quantization: str) -> int:
    """Parameters that a device decodes at this speed, one sequence at a time.

    Every weight is read once per token, so the memory bandwidth decides.

    Raises:
        UserError: no speed, or the device's bandwidth is unknown.
    """
    if tokens_per_second <= 0:
        raise UserError("--inference-speed: give a positive number of tokens per second")
    if device.bandwidth is None:
        raise UserError(
            f"the memory bandwidth of {device.name} is unknown: run `planearly calibrate` on it, "
            "or give --inference-params"
        )
    per_second = device.bandwidth * DECODING_SHARE
    return int(per_second / tokens_per_second * 8 / bits(quantization))


PAPER_SLICES = {16: 12, 32: 23, 64: 46}
"""h by the number of experts: with these the paper's projected networks have its totals of 756M,
1,422M and 2,770M parameters (docs/method.md, the appendix)."""
FEW_SLICES = 4
MEASURED, PAPER = (5.5, 41.2), 220.0
"""Tokens of pretraining per parameter of the deployed model: from and to which four slices were
ahead of twelve, with one seed (docs/results/nano), and the fewest that the paper trained at."""


def slices(experts: int, tokens_per_parameter: float) -> tuple[int, str]:
    """h, the slices of a projected network's bank, by its tokens per parameter; and why.

    Four up to where they were measured, the paper's from where it begins, and between, where
    nobody has measured, those that are nearer in ratio (docs/decisions.md, "Slices of a bank").
    """
    digits = ",.0f" if tokens_per_parameter >= 100 else ".3g"
    told = f"at {tokens_per_parameter:{digits}} tokens per parameter"
    if tokens_per_parameter < math.sqrt(MEASURED[1] * PAPER):
        beyond = "" if MEASURED[0] <= tokens_per_parameter <= MEASURED[1] else \
            ", and nothing nearer to these is known"
        return FEW_SLICES, (
            f"{FEW_SLICES} slices {told}: from {MEASURED[0]:g} to {MEASURED[1]:g} they were ahead "
            "of 12 at every budget tried, by 0.03 to 0.06 nats with one seed, a lead and not a "
            f"result{beyond}")
    near = min(PAPER_SLICES, key=lambda n: abs(math.log(n / experts)))
    return PAPER_SLICES[near], (
        f"{PAPER_SLICES[near]} slices {told}: the paper's for {near} experts, which it trained at "
        f"{PAPER:g} and more and did not compare with fewer slices")


def settled(recipe: keys.Recipe) -> keys.Recipe:
    """The recipe with tokens of a pretraining step and a number of slices: its own, or those of
    :func:`planearly.cost.model.step_tokens` (but a row for every blend) and :func:`slices`."""
    pretrain, projected = recipe.pretrain, recipe.projected
    if pretrain.batch_tokens is None:
        pretrain = replace(pretrain, batch_tokens=max(
            model.step_tokens(recipe.pretrain_tokens, recipe.context),
            projected.blends * recipe.context))
    if projected.rank is None:
        projected = replace(projected, rank=chosen_slices(recipe)[0])
    return replace(recipe, pretrain=pretrain, projected=projected)


def why_slices(recipe: keys.Recipe) -> str:
    """Why a recipe's projected network has so many slices; "": it has none, or says how many."""
    left = recipe.projected.rank is None and any(
        methods.find(name).bank == "projected" for name in recipe.methods)
    return chosen_slices(recipe)[1] if left else ""


def chosen_slices(recipe: keys.Recipe) -> tuple[int, str]:
    """:func:`slices` for a recipe, by its tokens and the vocabulary that it plans."""
    shape = starts.shape(recipe) or Shape.of(
        recipe.model, recipe.tokenizer.vocab_size, recipe.context)
    return slices(recipe.projected.experts, recipe.pretrain_tokens / flops.parameters(
        outside.alike(shape)))


def projected_for(shape: Shape, device: Device, devices: int,
                  tokens_per_parameter: float) -> keys.Projected | None:
    """The projected network for this small model: 32 experts, or 16 where memory is short or
    :func:`slices` are few, as they were measured with.

    32 is the paper's best trade-off (its Figure 7).

    Returns:
        None if neither can train one row in the memory of the devices.
    """
    matrices = ["up", "down"] if shape.ffn != "swiglu" else ["gate", "up", "down"]
    for experts in (32, 16):
        rank, _ = slices(experts, tokens_per_parameter)
        if rank == FEW_SLICES:
            experts = 16
        projected = keys.Projected(experts=experts, rank=rank, matrices=matrices)
        job = model.job_on(device, devices, shape, projected=projected)
        if memory.fits(device.memory, job):
            return projected
    return None
