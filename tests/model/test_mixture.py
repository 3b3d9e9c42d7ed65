"""Mixtures, and projected networks beside independent models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from planearly import keys
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected, by_group
from planearly.model.transformer import Transformer
from planearly.train import loop
from small_banks import GATED, TRAIN, Made, nll


class Together(Mixture):
    """Independent models trained on one stream of rows, the reference for a projected network.

    A step's gradients are divided by the targets of all of them: to Adam, which does not care for
    their scale, each model trains on its own share of the batch.
    """

    selected = 0

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def body(self) -> Transformer:
        return self.model(self.selected)

    def microbatches(self, groups: np.ndarray, rows: int) -> list[np.ndarray]:
        return by_group(groups, rows)

    def begin(self, groups: np.ndarray) -> None:
        pass

    def select(self, groups: np.ndarray) -> None:
        self.selected = int(groups[0])

    def end(self) -> None:
        for parameter in self.parameters():  # a model without rows has zeros, as its slices do
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def test_mixture_is_the_special_case(tmp_path: Path) -> None:
    """h = k, E = M = identity, nothing shared: k independent models."""
    k = 3
    mixture = Together(GATED, k)
    names = [n for n, _ in Transformer(GATED).named_parameters()]
    pn = Projected(GATED, keys.Projected(experts=k, rank=k, embedding=k), names=names)
    with torch.no_grad():
        for number, model in enumerate(mixture.models):
            for name, parameter in model.named_parameters():
                parameter += 0.01 * torch.randn(parameter.shape,
                                                generator=torch.Generator().manual_seed(number))
                pn.bank(name).slices[number] = parameter
        pn.experts.copy_(torch.eye(k)).requires_grad_(False)
        for name in names:
            pn.bank(name).mixing.copy_(torch.eye(k)).requires_grad_(False)
    assert not list(pn.body.parameters())
    settings = keys.Train(**{**TRAIN.__dict__, "optimizer": keys.Optimizer(preset="paper")})
    loop.train(mixture, Made(k), 5, settings, tmp_path / "mix", name="mix")
    loop.train(pn, Made(k), 5, settings, tmp_path / "pn", name="pn")
    for expert in range(k):
        ours, theirs = pn.materialise(expert), mixture.materialise(expert)
        for name in names:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_the_reference_trains_each_model_as_if_alone() -> None:
    mixture = Together(GATED, 3).double()
    batch = Made(3).batch(0, 12)
    mixture.begin(batch.groups)
    for rows in mixture.microbatches(batch.groups, 2):
        part = batch.take(rows)
        mixture.select(part.groups)
        nll(mixture.body, part.inputs, part.targets).backward()
    mixture.end()
    for group in range(3):
        alone = Transformer(GATED).double()
        part = batch.take(np.flatnonzero(batch.groups == group))
        nll(alone, part.inputs, part.targets).backward()
        for (name, p), q in zip(alone.named_parameters(), mixture.model(group).parameters(),
                                strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_mixture_average() -> None:
    mixture = Mixture(GATED, 2)
    with torch.no_grad():
        mixture.model(1).embed.weight += 1.0
    blend = mixture.materialise(mixture.blend(torch.tensor([3.0, 1.0])))
    torch.testing.assert_close(blend["embed.weight"], mixture.model(0).embed.weight + 0.25)
