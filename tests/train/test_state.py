"""Checkpoints: the whole state, wherever and among however many it is divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from planearly import sharding, tensors
from planearly.train import state


def test_a_restored_optimiser_has_its_state_where_the_parameters_are(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.ones(3)).backward()
    adam.step()
    state.save_training(tmp_path / "x", model, [adam], {})
    elsewhere = nn.Linear(3, 1, device="meta")
    restored = torch.optim.Adam(elsewhere.parameters())
    state.load_training(tmp_path / "x", elsewhere, [restored])
    for parameter in elsewhere.parameters():
        kept = restored.state[parameter]
        assert kept.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(value.device == parameter.device for value in kept.values())


def test_the_state_of_a_part_goes_by_the_parts_own_names() -> None:
    values = {name: torch.tensor(float(i)) for i, name in enumerate([
        "body.up.weight", "optimizer/body.up.weight/step", "optimizer/body.up.weight/exp_avg",
        "optimizer/bodyguard.weight/step", "optimizer/experts/step"])}
    assert state.of_part(values, "body") == {
        "optimizer/up.weight/step": values["optimizer/body.up.weight/step"],
        "optimizer/up.weight/exp_avg": values["optimizer/body.up.weight/exp_avg"]}


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_a_divided_matrix_is_divided_and_its_step_is_not(
        fused: bool, tmp_path: Path, one_process: None) -> None:
    def made() -> tuple[nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        model.weight = sharding.divide(model.weight, 0)
        groups = [{"params": [parameter]} for parameter in model.parameters()]
        return model, torch.optim.Adam(groups, lr=0.1, fused=fused)

    def step(model: nn.Linear, adam: torch.optim.Adam) -> None:
        for parameter in model.parameters():
            gradient = torch.arange(parameter.numel(), dtype=torch.float32).sin()
            parameter.grad = sharding.as_part(gradient.view(parameter.shape), parameter)
        adam.step()

    whole, cut = made(), made()
    for one in (whole, cut):
        step(*one)
    state.save_training(tmp_path / "x", *(cut[0], [cut[1]]), {"steps": 1})
    going_on = made()
    assert state.load_training(tmp_path / "x", going_on[0], [going_on[1]]) == {"steps": 1}
    kept = going_on[1].state[going_on[0].weight]
    assert {entry for entry, value in kept.items() if sharding.divided(value)} == {
        "exp_avg", "exp_avg_sq"}
    assert not any(map(sharding.divided, going_on[1].state[going_on[0].bias].values()))
    for one in (whole, going_on):
        step(*one)
    for name, tensor in tensors.weights(whole[0]).items():
        assert torch.equal(sharding.whole(tensor),
                           sharding.whole(tensors.weights(going_on[0])[name])), name
