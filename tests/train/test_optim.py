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


def test_a_projected_networks_rates_are_relative_to_a_plain_layers():
    model = Projected(SHAPE, keys.Projected(experts=3, rank=4, embedding=4, bank_lr=2.0,
                                            coefficient_lr=3.0))
    settings = optim.resolve(keys.Optimizer(lr=1e-3, embedding_lr=1e-4), 100)
    rates = {id(p): group["peak_lr"] for optimizer in optim.build(model, settings)
             for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 1e-3 if parameter.dim() == 2 else 1e-4
        if name.endswith(".slices"):
            expected = 2e-3
        elif name == "experts" or name.endswith(".mixing"):
            expected = 3e-4
        elif name == "body.embed.weight":
            expected = 1e-4
        assert rates[id(parameter)] == pytest.approx(expected), name


def test_the_papers_optimiser_is_one_adam_without_decay():
    model = Transformer(SHAPE)
    (adam,) = optim.build(model, optim.resolve(keys.Optimizer(preset="paper"), 100_000))
    assert type(adam) is torch.optim.Adam
    for group in adam.param_groups:
        assert group["betas"] == (0.9, 0.999)
        assert (group["peak_lr"], group["weight_decay"]) == (1e-4, 0.0)
    assert sum(len(group["params"]) for group in adam.param_groups) == len(
        list(model.parameters()))


def test_what_a_recipe_sets_beside_the_papers_preset_holds():
    model = Transformer(SHAPE)
    asked = keys.Optimizer(preset="paper", weight_decay=0.5, embedding_lr=0.003)
    settings = optim.resolve(asked, 100)
    (adam,) = optim.build(model, settings)
    groups = {id(p): group for group in adam.param_groups for p in group["params"]}
    matrix, table = model.blocks[0].attn.o.weight, model.embed.weight
    assert [(groups[id(p)]["peak_lr"], groups[id(p)]["weight_decay"]) for p in (matrix, table)] == [
        (1e-4, 0.5), (0.003, 0.0)]
    before = matrix.detach().clone(), table.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()  # decoupled: of the weights themselves, whatever the gradient
    torch.testing.assert_close(matrix, before[0] * (1 - 0.5 * 1e-4))
    assert torch.equal(table, before[1])


@pytest.mark.parametrize("lr", [None, 2e-4])
def test_the_papers_preset_alone_trains_as_it_did(lr):
    """One rate, to the last bit, and updates of the Adam that older versions had."""
    asked = keys.Optimizer(preset="paper", lr=lr, weight_decay=0.0)
    settings = optim.resolve(asked, 100)
    assert settings.lr == settings.embedding_lr == (lr or 1e-4)
    ours, theirs = Transformer(SHAPE, 1), Transformer(SHAPE, 1)
    (adam,) = optim.build(ours, settings)
    plain = torch.optim.Adam(theirs.parameters(), lr=settings.lr, betas=(0.9, 0.999), fused=True)
    for seed in range(3):
        for model in (ours, theirs):
            draw = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        adam.step()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(),
                                                 strict=True))
    assert optim.deviations(asked, 1024, False) == {}


def test_what_is_set_beside_the_papers_preset_is_in_the_fingerprint():
    """Older versions passed over it."""
    paper = keys.Optimizer(preset="paper", weight_decay=0.5, embedding_lr=0.003)
    found = {"other_share": pytest.approx(30), "decay": 0.5}
    assert optim.deviations(paper, 256, False) == found
    assert optim.deviations(keys.Optimizer(weight_decay=0.5, embedding_lr=0.003), 256, False) == {}
    plain = keys.Optimizer(preset="paper")
    inherits, sets = keys.Finetune(optimizer=plain), keys.Finetune(optimizer=paper, lr_scale=1.0)
    assert optim.finetuning_deviations(inherits, paper, 256, False) == {
        "embedding_lr": 0.003, "other_share": pytest.approx(30)}
    assert optim.finetuning_deviations(sets, plain, 256, False) == found
    assert "decay" not in optim.finetuning_deviations(sets, plain, 256, False, decays=False)
    assert optim.finetuning_deviations(inherits, plain, 256, False) == {}


@pytest.mark.parametrize(("steps", "warmup"), [(5, 1), (10, 1), (200, 20), (499, 49), (10_000, 50)])
def test_warm_up_is_a_tenth_of_a_short_run(steps, warmup):
    assert optim.resolve(keys.Optimizer(), steps).warmup_steps == warmup
    assert optim.resolve(keys.Optimizer(warmup_steps=7), steps).warmup_steps == min(7, warmup)


@pytest.mark.parametrize(("preset", "share"), [("paper", 1 / 3), ("adamw", 1 / 30),
                                               ("modern", 1 / 30)])
def test_a_checkpoint_goes_on_at_a_share_of_the_rates(preset, share):
    fresh, going_on = (optim.resolve(keys.Optimizer(preset=preset), 100, 512, continued)
                       for continued in (False, True))
    assert going_on.lr == pytest.approx(share * fresh.lr)
    assert going_on.embedding_lr == pytest.approx(share * fresh.embedding_lr)


def test_rates_are_written_as_shares_of_each_groups_peak():
    model = Transformer(SHAPE)
    model.norm.weight.lr_scale = 0.5
    settings = optim.resolve(keys.Optimizer(preset="adamw", lr=2e-3, embedding_lr=1e-3,
                                            warmup_steps=10), 1_000)
    (adamw,) = made = optim.build(model, settings)
    assert optim.set_rates(made, settings, 4, 1_000) == pytest.approx(0.5)
    rates = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(model.norm.weight)] == pytest.approx(0.25e-3)
    assert rates[id(model.embed.weight)] == pytest.approx(0.5e-3)
    assert rates[id(model.blocks[0].attn.o.weight)] == pytest.approx(1e-3)
    assert {group["betas"] for group in adamw.param_groups} == {(0.9, 0.95)}


def test_a_wide_models_rates_are_in_its_fingerprint():
    assert optim.deviations(keys.Optimizer(), 1024, False) == {"lr": pytest.approx(5e-3)}
    adamw = keys.Optimizer(preset="adamw")
    assert optim.deviations(adamw, 1024, False) == {
        "lr": pytest.approx(3e-3 / 4), "embedding_share": pytest.approx(2.0)}
    assert optim.deviations(keys.Optimizer(lr=1e-3, embedding_lr=1e-3), 1024, True) == {}
