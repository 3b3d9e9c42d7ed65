"""What devices send each other in a step, against what the calls of a step move."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from planearly import keys
from planearly.model import traffic
from planearly.model.lora import add_adapters
from planearly.model.memory import Job
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.train import optim, update
from planearly.train.reducer import Reducer

SHAPE = Shape(layers=2, d_model=64, heads=2, d_ff=128, vocab_size=500, context=16)
BANK = keys.Projected(experts=4, rank=3)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def moved(one_process, monkeypatch):
    """Bytes that were summed, and that were gathered."""
    found = {"summed": 0, "gathered": 0}

    def spy(name, kind, of):
        real = getattr(dist, name)

        def call(*tensors, **how):
            if of(tensors).dtype != torch.float64:  # what hosts tell each other
                found[kind] += of(tensors).nbytes
            return real(*tensors, **how)

        monkeypatch.setattr(dist, name, call)

    spy("all_reduce", "summed", lambda tensors: tensors[0])
    spy("all_gather", "gathered", lambda tensors: tensors[1])
    return found


@pytest.mark.parametrize("preset", ["modern", "adamw"])
@pytest.mark.parametrize("kind", ["dense", "bank", "adapters"])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_replicated_step_sends_is_what_its_calls_move(moved, preset, kind, bf16):
    job = Job(SHAPE, preset, projected=BANK if kind == "bank" else None, processes=4,
              adapter_rank=2 if kind == "adapters" else None)
    module = Projected(SHAPE, BANK, 0) if kind == "bank" else Transformer(SHAPE, 0)
    if kind == "adapters":
        add_adapters(module, keys.Lora(rank=2), 0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizers = optim.build(module, optim.resolve(keys.Optimizer(preset=preset), 10))
    Reducer([p for p in module.parameters() if p.requires_grad], bf16).finish(1.0)
    update.apply(module, optimizers, 1.0, 1.0)
    sent = (2 * moved["summed"] + moved["gathered"]) * 3 / 4
    assert traffic.sent_bytes(job, 5, bf16) == pytest.approx(sent, rel=0.01)
    assert traffic.sent_bytes(replace(job, processes=1), 5) == 0


def test_a_divided_model_sends_its_matrices_in_every_pass():
    job = Job(SHAPE, processes=4, sharded=True, preset="adamw")
    one, three = (traffic.sent_bytes(job, passes) for passes in (1, 3))
    assert three == 3 * one  # and nothing beside
    tables = 2 * SHAPE.vocab_size * SHAPE.d_model * (SHAPE.vocab_size > 0)
    assert one > (2 * 2 + 4) * 0.75 * (sum(
        p.numel() for p in Transformer(SHAPE, 0).parameters()) - tables)
    assert traffic.sent_bytes(replace(job, bf16=False), 1) > one
    muon = traffic.sent_bytes(replace(job, preset="modern"), 1)
    assert 0 < muon - one < one
    bank = Job(SHAPE, projected=BANK, processes=4)
    assert traffic.sent_bytes(replace(bank, sharded=True), 1) == traffic.sent_bytes(
        replace(bank, sharded=True), 9)
