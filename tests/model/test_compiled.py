"""What is compiled once for all experts of a projected network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from planearly import keys
from planearly.model import grouped
from planearly.model.projected import Projected
from small_banks import GATED, SETTINGS, Made


def test_compiled_body_is_not_compiled_again_for_every_cluster() -> None:
    torch._dynamo.reset()
    model = Projected(replace(GATED, layers=1), SETTINGS)
    counter = CompileCounterWithBackend("aot_eager")
    loss_of = torch.compile(lambda i, t: model.body.loss(i, t), backend=counter)
    batch = Made(5).batch(0, 30)
    for sizes in ([2] * 5, [2, 3, 4, 5, 6]):  # one graph, and one for every other number of rows
        model.begin(np.arange(5))
        for group, size in enumerate(sizes):
            part = batch.take(np.arange(size))
            model.select(np.array([group] * size))
            loss_of(part.inputs, part.targets).backward()
        model.end()
        assert counter.frame_count == 1 + (sizes[1] == 3)
    assert model.experts.grad is not None and torch.all(model.experts.grad.abs().sum(1) > 0)


@pytest.mark.parametrize("product", ["by_row", "by_group"])  # of CPUs, of GPUs
def test_compiled_body_is_not_compiled_again_for_every_number_of_clusters(
        product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "by_row", getattr(grouped, product))
    torch._dynamo.reset()
    model = Projected(replace(GATED, layers=1),
                      keys.Projected(experts=6, rank=3, embedding=4))
    counter = CompileCounterWithBackend("aot_eager")
    loss_of = torch.compile(lambda i, t: model.body.loss(i, t), backend=counter)
    part = Made(6).batch(0, 6)
    for clusters in (3, 4, 5, 2, 6):  # one graph, and one for every other number
        groups = np.minimum(np.arange(6), clusters - 1)
        model.begin(groups)
        model.select(groups)
        loss_of(part.inputs, part.targets).backward()
        model.end()
        assert counter.frame_count == 1 + (clusters != 3)
