"""LoRA: low-rank adapters on every matrix of every block (Hu et al. 2021; the paper's section 4).

The package `peft` puts them into our model in place, so the one loop trains them: everything else
is frozen. What is kept is the dense model with the adapters merged in, which no later stage can
tell from a fully fine-tuned one.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from planearly import keys
from planearly.errors import UserError
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


def check(settings: keys.Lora, d_model: int, d_ff: int) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        UserError: the rank exceeds a side of an adapted matrix, or `peft` is not installed.
    """
    if settings.rank < 1:
        raise UserError(f"recipe key 'lora.rank' is {settings.rank}; it must be at least 1")
    if settings.rank > min(d_model, d_ff):
        side = f"attention matrices are {d_model} x {d_model}" if d_model <= d_ff else (
            f"feed-forward matrices are {d_model} x {d_ff}")
        raise UserError(f"recipe key 'lora.rank' is {settings.rank}, more than the large model's "
                        f"{side}: choose at most {min(d_model, d_ff)}")
    if importlib.util.find_spec("peft") is None:
        raise UserError("the method llm-lora needs the package peft: pip install peft, or leave "
                        "the method out")


def add_adapters(model: Transformer, settings: keys.Lora, seed: int) -> list[str]:
    """Put adapters into a model, in place; only they are trainable afterwards.

    They start as a function of ``seed`` alone, and start at no effect. They go with the optimiser
    of embeddings: they are two thin factors, whose product acts, not matrices that act themselves.

    Returns:
        The adapted matrices.
    """
    peft: Any = importlib.import_module("peft")
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv = Separate(module.qkv, module.widths)  # type: ignore[assignment]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapters = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=_MATRICES)
        peft.inject_adapter_in_model(adapters, model, adapter_name=_ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.elementwise = True  # type: ignore[attr-defined]
    return sorted(_layers(model))


def merged(model: Transformer) -> dict[str, Tensor]:
    """Parameters of the dense model that the adapted one computes, under the dense names."""
    state = {name.replace(".base_layer", ""): parameter.detach()
             for name, parameter in model.named_parameters() if ".lora_" not in name}
    for name, layer in _layers(model).items():
        delta = layer.get_delta_weight(_ADAPTER).detach()
        state[f"{name}.weight"] = state[f"{name}.weight"] + delta
    for i in range(model.shape.layers):
        place = f"blocks.{i}.attn.qkv"
        parts = [state.pop(f"{place}.{name}.weight") for name in _QKV]
        state[f"{place}.weight"] = torch.cat(parts)
    return state


def _layers(model: Transformer) -> dict[str, Any]:
    kind = importlib.import_module("peft.tuners.lora").LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}
