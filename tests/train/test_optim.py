"""Which optimiser, rate and decay a parameter has."""

import pytest
import torch

from planearly import keys
from planearly.model.projected import Projected
from planearly.model.transformer import Transformer
from planearly.train import optim
from small_trainings import SHAPE


@pytest.mark.parametrize("preset", ["modern", "adamw"])
@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_only_matrices_that_act_decay(preset, kind):
    """With no gradient but zero, decay alone moves a parameter."""
    model = Transformer(SHAPE) if kind == "plain" else Projected(
        SHAPE, keys.Projected(experts=3, rank=4, embedding=4))
    settings = optim.resolve(keys.Optimizer(preset=preset, weight_decay=0.5), 100)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optim.build(model, settings):
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before
                     if name.endswith(("qkv.weight", "attn.o.weight", "gate.weight", "up.weight",
                                       "down.weight", ".slices"))}


def test_matrices_and_tables_have_their_own_rates_under_adamw():
    model = Transformer(SHAPE)
    settings = optim.resolve(keys.Optimizer(preset="adamw", lr=1e-3, embedding_lr=1e-4), 100)
    (adamw,) = optim.build(model, settings)
    rates = {id(p): group["peak_lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(model.blocks[0].attn.o.weight)] == 1e-3
    assert rates[id(model.embed.weight)] == rates[id(model.norm.weight)] == 1e-4
