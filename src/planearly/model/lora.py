"""LoRA: low-rank adapters on every matrix of every block (Hu et al. 2021; the paper's section 4).

The package `peft` puts them into our model in place, so the one loop trains them: everything else
is frozen. What is kept is the dense model with the adapters merged in, which no later stage can
tell from a fully fine-tuned one.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planearly import keys
from planearly.errors import UserError
from planearly.model import flops, outside
from planearly.model.outside import AnyShape, Configured, Outside
from planearly.model.transformer import Attention, Transformer

_ADAPTER = "default"
_QKV = ("q", "k", "v")
_MATRICES = [*_QKV, "o", "gate", "up", "down"]


class Separate(nn.Module):
    """Query, key and value matrices apart, as in the exported model: each gets its adapter."""

    def __init__(self, qkv: nn.Linear, widths: tuple[int, int, int]) -> None:
        super().__init__()
        for name, weight in zip(_QKV, qkv.weight.detach().split(widths), strict=True):
            linear = nn.Linear(qkv.in_features, len(weight), bias=False, device="meta")
            linear.weight = nn.Parameter(weight.clone())
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(x) for name in _QKV], -1)


def check(settings: keys.Lora, shape: AnyShape, method: str) -> None:
    """Refuse what cannot work, before anything runs.

    Args:
        method: the one that is to tune a model of this shape.

    Raises:
        UserError: the rank exceeds a side of an adapted matrix, or `peft` is not installed.
    """
    if isinstance(shape, Configured):
        with outside.without_weights(shape) as model:
            sides = {f"'{name}'": found for name, found in outside.matrices(model).items()}
    else:
        sides = {"attention": (shape.d_model, shape.d_model),
                 "feed-forward": (shape.d_model, shape.d_ff)}
    what, (rows, columns) = min(sides.items(), key=lambda side: min(side[1]))
    if settings.rank > min(rows, columns):
        raise UserError(f"recipe key 'lora.rank' is {settings.rank}, more than the "
                        f"{what} matrices of {method} allow, which are {rows} x {columns}: "
                        f"choose at most {min(rows, columns)}")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"the method {method} needs the package peft: pip install peft, or "
                        "leave the method out")


def add_adapters(model: Transformer | Outside, settings: keys.Lora, seed: int) -> list[str]:
    """Put adapters into a model, in place; only they are trainable afterwards.

    They start as a function of ``seed`` alone, and start at no effect. They go with the optimiser
    of embeddings: they are two thin factors, whose product acts, not matrices that act themselves.

    Returns:
        The adapted matrices: in a model of others, all but embeddings and output matrix.
    """
    peft: Any = importlib.import_module("peft")
    inner, matrices = _adapted(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv = Separate(module.qkv, module.widths)  # type: ignore[assignment]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matrices that are stored the other way round
        torch.manual_seed(seed)
        adapters = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=matrices)
        peft.inject_adapter_in_model(adapters, inner, adapter_name=_ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.elementwise = True  # type: ignore[attr-defined]
    return sorted(_layers(inner))


def merged(model: Transformer | Outside) -> dict[str, Tensor]:
    """Parameters of the dense model that the adapted one computes, under the dense names."""
    state = {name.replace(".base_layer", ""): parameter.detach()
             for name, parameter in model.named_parameters() if ".lora_" not in name}
    for name, layer in _layers(_adapted(model)[0]).items():
        delta = layer.get_delta_weight(_ADAPTER).detach()
        state[f"{name}.weight"] = state[f"{name}.weight"] + delta
    for name, module in model.named_modules():
        if isinstance(module, Separate):
            parts = [state.pop(f"{name}.{part}.weight") for part in _QKV]
            state[f"{name}.weight"] = torch.cat(parts)
    return state


def _adapted(model: Transformer | Outside) -> tuple[nn.Module, list[str] | str]:
    """The module that gets adapters, and the names of its matrices as `peft` takes them."""
    return (model.theirs, "all-linear") if isinstance(model, Outside) else (model, _MATRICES)


def _layers(model: nn.Module) -> dict[str, Any]:
    kind = importlib.import_module("peft.tuners.lora").LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


class _Counted(nn.Module):
    """A matrix layer with an adapter beside it: the products that `peft`'s makes."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (nn.Parameter(torch.zeros(*size)) for size in (
            (rank, inputs), (outputs, rank)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


@functools.lru_cache(maxsize=16)
def _counts(shape: Configured, rank: int) -> tuple[int, int]:
    """Parameters of the adapters of a model of others, and operations per token of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    with outside.without_weights(shape) as model:
        model.requires_grad_(False)
        for name, sides in outside.matrices(model).items():
            base = model.theirs.get_submodule(name)
            model.theirs.set_submodule(name, _Counted(base, *sides, rank))
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.zeros(1, shape.context, dtype=torch.int64)).sum().backward()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, round(counter.get_total_flops() / shape.context)


@flops.lora_parameters.register
def _parameters(shape: Configured, rank: int) -> int:
    return _counts(shape, rank)[0]


@flops.lora_training.register
def _training(shape: Configured, rank: int) -> int:
    return _counts(shape, rank)[1]
