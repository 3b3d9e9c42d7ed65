"""What only a GPU can show; elsewhere skipped. ``bash benchmarks/gpu.sh 1`` runs them."""

import copy

import numpy as np
import pytest
import torch

from planearly import keys, parallel, tensors
from planearly.model import grouped, projected
from planearly.model.projected import Projected
from planearly.model.transformer import Transformer
from planearly.train import arithmetic, loop, update
from planearly.train.trainable import Dense
from small_trainings import SHAPE, Words, killed_after_steps, run, same, settings

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: benchmarks/gpu.sh runs these on one")]


def gradients(model: Transformer, device: str, bf16: bool) -> tuple[float, torch.Tensor]:
    model = copy.deepcopy(model).to(device)
    batch = Words().batch(0, 8)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        value = model.loss(batch.inputs.to(device), batch.targets.to(device))
    value.backward()
    return value.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-3), (True, 3e-2)])
def test_loss_and_gradients_are_the_cpus(bf16, tolerance):
    model = Transformer(SHAPE, seed=1)
    here, there = gradients(model, "cpu", False), gradients(model, "cuda", bf16)
    assert there[0] == pytest.approx(here[0], rel=tolerance)
    assert (here[1] - there[1]).norm() < tolerance * here[1].norm()


def test_grouped_products_are_those_of_each_row():
    x = torch.randn(6, 5, 8, device="cuda", requires_grad=True)
    weight = torch.randn(3, 7, 8, device="cuda", requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    found = grouped.by_group(x, weight, groups)
    expected = torch.einsum("rti,roi->rto", x, weight[groups.cuda()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    slopes = [torch.autograd.grad(value.square().sum(), (x, weight)) for value in (found, expected)]
    for own, other in zip(*slopes, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-2)


def test_an_expert_is_the_networks():
    network = Projected(SHAPE, keys.Projected(experts=3, rank=4, embedding=4), seed=1).to("cuda")
    inputs = Words().batch(0, 6).inputs.cuda()
    network.begin(np.repeat([0, 1, 2], 2))
    network.select(np.repeat([0, 1, 2], 2))
    with torch.no_grad():
        together = network.body(inputs)
    for expert in range(3):
        dense = Transformer(SHAPE).to("cuda")
        tensors.set_weights(dense, network.materialise(expert), "expert")
        part = slice(2 * expert, 2 * expert + 2)
        with torch.no_grad():
            torch.testing.assert_close(dense(inputs[part]), together[part], rtol=1e-3, atol=1e-3)


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train = settings(precision="bf16")
        expected = run(tmp_path / "whole", train=train)[1]
        killed_after_steps(5, lambda: run(tmp_path / "cut", train=train))
        assert same(expected, run(tmp_path / "cut", train=train)[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("build", [
    lambda: Dense(Transformer(SHAPE).cuda()),
    lambda: Projected(SHAPE, keys.Projected(experts=3, rank=4, embedding=4)).cuda()])
def test_a_step_waits_for_the_device_only_where_it_logs(build):
    model = build()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = Words().batch(0, 8)
        how = arithmetic.Arithmetic(True, 4)
        rate = loop.optim.resolve(settings().optimizer, 100)
        optimizers = loop.optim.build(model.module, rate)
        _, counted = update.fitting(model, batch, how, loop.NextToken(), parallel.device(), "t")
        update.apply(model.module, optimizers, counted, rate.clip)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_projected_networks_gradients_are_the_cpus(with_kernels, monkeypatch):
    if not with_kernels:
        monkeypatch.setattr(projected, "_kernels", lambda device: None)
    network = Projected(SHAPE, keys.Projected(experts=3, rank=4, embedding=4), seed=1)
    batch, found = Words().batch(0, 6), []
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(network).to(device)
        groups = np.repeat([0, 1, 2], 2)
        here.begin(groups)
        here.select(groups)
        here.body.loss(batch.inputs.to(device), batch.targets.to(device)).backward()
        here.end()
        found.append({name: p.grad.cpu() for name, p in here.named_parameters()})
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() < 1e-3 * expected.norm(), name


def test_a_step_that_memory_does_not_hold_goes_on_in_halves():
    model, batch = Dense(Transformer(SHAPE, seed=1).cuda()), Words().batch(0, 4096)
    device = parallel.device()

    def step(rows: int) -> tuple[torch.Tensor, int]:
        how = arithmetic.Arithmetic(False, rows)
        update.fitting(model, batch, how, loop.NextToken(), device, "t")
        found = torch.cat([p.grad.flatten() for p in model.module.parameters()])
        model.module.zero_grad(set_to_none=True)
        return found, how.rows

    step(256)  # cuBLAS takes its workspace once
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected, rows = step(4096)
    assert rows == 4096
    most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        0.6 * most / torch.cuda.get_device_properties(device).total_memory)
    try:
        found, rows = step(4096)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert rows in (1024, 2048)
    assert (found - expected).norm() < 1e-4 * expected.norm()


# the last two are more columns than one round of inner's programs takes on 132 multiprocessors
@pytest.mark.parametrize(("n", "h", "size"), [
    (16, 12, 5000), (3, 46, 1536), (64, 64, 700), (16, 12, 300_001), (64, 46, 200_003)])
def test_a_banks_products_are_those_of_matrices(n, h, size):
    pytest.importorskip("triton")
    from planearly.model import kernels

    coefficients, slices, gradients = (
        torch.randn(*shape, device="cuda") for shape in ((n, h), (h, size), (n, size)))
    kernels.check(parallel.device())
    for found, left, right in (
            (kernels.combine(coefficients, slices), coefficients, slices),
            (kernels.inner(gradients, slices), gradients, slices.T),
            (kernels.combine(coefficients.T, gradients), coefficients.T, gradients)):
        torch.testing.assert_close(found.double(), left.double() @ right.double(),
                                   rtol=1e-4, atol=1e-3)
