"""The formula against what torch allocates in real steps of the training loop."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples import examples
from planearly import keys, sharding
from planearly.data.streams import Batch
from planearly.files import read_json, write_json
from planearly.model import lora, memory, parts
from planearly.model.memory import Job
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic, distill, muon, optim, update
from planearly.train.average import Average
from planearly.train.objective import NextToken, Objective
from planearly.train.trainable import Dense, Trainable
from small_processes import together

SMALL = Shape(layers=3, d_model=128, heads=2, d_ff=352, vocab_size=512, context=64)
BANK = keys.Projected(experts=8, rank=6, embedding=6)


class Peak(TorchDispatchMode):
    """Bytes of all storages that operations return and that still live; the most there were."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.most = 0
        self.alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        for module in modules:
            for parameter in module.parameters():
                self.count(parameter)

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.alive.values())  # some change in size

    def count(self, tensor: torch.Tensor) -> None:
        storage = sharding.part(tensor).untyped_storage()
        self.alive[storage._cdata] = storage

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        self.most = max(self.most, self.now)
        return result


def settled(mode: Peak) -> int:
    """Bytes that live once gloo's threads have let go of the tensors of calls that are done: a
    thread may do so after whom it woke has gone on."""
    found, same = mode.now, 0
    while same < 20:
        time.sleep(0.01)
        now = mode.now
        found, same = now, same + 1 if now == found else 0
    return found


def peaks(job: Job, rows: int, batch_rows: int = 32) -> tuple[int, int]:
    """Bytes at the peak of the passes and of the update, of a second step on this CPU."""
    model = Transformer(job.shape)
    if job.adapter_rank:
        lora.add_adapters(model, keys.Lora(rank=job.adapter_rank), 0)
    made: Trainable = Projected(job.shape, job.projected) if job.projected \
        else Dense(model)
    settings = keys.Pretrain(precision="bf16" if job.bf16 else "fp32",
                             optimizer=keys.Optimizer(preset=job.preset))  # type: ignore[arg-type]
    teacher = Transformer(job.teacher or job.shape).requires_grad_(False)

    live = distill.Live(teacher, job.shape.vocab_size, 1.0, 1.0)
    taught = distill.Distillation(live, keys.Distill())
    objective: Objective = taught if job.teacher else NextToken()
    rate = optim.resolve(settings.optimizer, 100)
    if job.sharded:
        made.divide(job.bf16)
    optimizers, mean = optim.build(made.module, rate), None
    random = np.random.default_rng(0)
    groups = job.projected.at_once if job.projected else 1
    if isinstance(made, Projected) and groups < made.count:
        made.train_on(torch.rand(groups, made.count))
    with Peak(made.module, *([teacher] if job.teacher else [])) as mode:
        if job.averaged:
            mean = Average(made.module, 0.5)
        for step in (1, 2):
            tokens = torch.from_numpy(
                random.integers(0, job.shape.vocab_size, (batch_rows, job.shape.context + 1)))
            batch = Batch(tokens[:, :-1], tokens[:, 1:], random.integers(0, groups, batch_rows))
            mode.most = mode.now
            _, counted = update.accumulate(
                made, batch, rows, objective,
                arithmetic.autocast(settings.precision, torch.device("cpu")), torch.device("cpu"))
            passes = mode.most
            mode.most = settled(mode) if job.sharded else mode.now
            update.apply(made.module, optimizers, counted, rate.clip)
            if mean:
                mean.add(step)
    return passes, mode.most


DEEP = replace(SMALL, layers=6)
DIVIDED = [
    (Job(DEEP, sharded=True), 4), (Job(DEEP, "adamw", bf16=False, sharded=True), 1),
    (Job(replace(SMALL, tie_embeddings=False, vocab_size=4096), "adamw", sharded=True), 1),
    (Job(SMALL, projected=BANK, sharded=True), 4),
]


def _divided(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=4)
    muon.parallel.bf16_is_fast = lambda device: True
    for number, (job, rows) in enumerate(DIVIDED):
        job = replace(job, device="cpu", processes=4)
        found = peaks(job, rows, 32 if job.projected else 2 * rows)
        write_json(Path(folder) / f"{number}-{rank}.json", found)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_divided_step_takes_what_the_formula_says(tmp_path: Path) -> None:
    together(4, _divided, str(tmp_path))
    for number, (job, rows) in enumerate(DIVIDED):
        job = replace(job, device="cpu", processes=4)
        passes, update = map(max, zip(*(
            read_json(tmp_path / f"{number}-{rank}.json") for rank in range(4)), strict=True))
        assert memory.passes_bytes(job, rows * 64) == pytest.approx(passes, rel=0.15)
        assert memory.update_bytes(job) == pytest.approx(update, rel=0.15)


@pytest.mark.parametrize(("job", "rows"), [
    (Job(SMALL), 16),
    (Job(SMALL, "adamw", bf16=False), 16),
    (Job(replace(SMALL, ffn="gelu", vocab_size=4096), "paper"), 8),
    (Job(replace(SMALL, heads=4, kv_heads=2, tie_embeddings=False)), 2),
    (Job(SMALL, adapter_rank=8), 16), (Job(SMALL, averaged=True), 2),
    (Job(SMALL, projected=BANK), 4),
    (Job(SMALL, projected=replace(BANK, blends=2)), 4),
    (Job(SMALL, "adamw", bf16=False, projected=BANK), 16),
])
def test_a_step_takes_what_the_formula_says(job: Job, rows: int,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    # as where bfloat16 is fast, whatever this processor is
    monkeypatch.setattr(muon.parallel, "bf16_is_fast", lambda device: True)
    job = replace(job, device="cpu")
    passes, update = peaks(job, rows)
    assert memory.passes_bytes(job, rows * 64) == pytest.approx(passes, rel=0.15)
    assert memory.update_bytes(job) == pytest.approx(update, rel=0.15)


def test_a_step_of_distillation_takes_what_the_formula_says(
        monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (memory, "DISTILLED_LOGITS"), (parts, "LOGITS"):
        monkeypatch.setattr(place[0], place[1], 1 << 20)
    student = Shape(layers=2, d_model=64, heads=2, d_ff=176, vocab_size=4096, context=64)
    job = Job(student, teacher=replace(student, d_model=128, d_ff=352), device="cpu")
    passes, _ = peaks(job, 16)
    assert memory.passes_bytes(job, 16 * 64) == pytest.approx(passes, rel=0.15)


# The microbatch -----------------------------------------------------------------------------------

PAPER = Shape(layers=7, d_model=1024, heads=8, d_ff=4096, vocab_size=32_768, context=1024,
              ffn="gelu")


@examples(100)
@given(gigabytes=st.floats(0.5, 200), context=st.sampled_from([256, 1024, 2048]),
       batch=st.integers(1, 1 << 19), chunked=st.booleans(), preset=st.sampled_from(
           ["modern", "adamw"]))
def test_the_microbatch_is_the_largest_that_fits(gigabytes: float, context: int, batch: int,
                                                 chunked: bool, preset: str) -> None:
    job = Job(replace(PAPER, context=context), preset, logit_tokens=4096 if chunked else None)
    found = memory.fitting_microbatch(gigabytes * 1e9, job, batch)
    usable = memory.USABLE * gigabytes * 1e9
    assert found % context == 0 and found <= max(min(batch, 65_536), context)
    if found:
        assert memory.training_bytes(job, found) <= usable
    if found + context <= min(batch, 65_536):
        assert memory.training_bytes(job, found + context) > usable


def test_memory_that_is_not_known_is_taken_as_enough() -> None:
    assert memory.fitting_microbatch(None, Job(PAPER), 1 << 18) == 65_536
    assert memory.fitting_microbatch(None, Job(PAPER), 1 << 18, 4096) == 4096
    assert memory.fitting_microbatch(None, Job(PAPER), 100) == 1024  # at least one row


def test_more_of_anything_takes_more() -> None:
    plain = memory.training_bytes(Job(PAPER), 8192)
    for more in (Job(replace(PAPER, layers=8)), Job(replace(PAPER, vocab_size=65_536)),
                 Job(PAPER, bf16=False),
                 Job(PAPER, projected=keys.Projected(matrices=["up", "down"]))):
        assert memory.training_bytes(more, 8192) > plain
    small, large = (Job(PAPER, teacher=replace(PAPER, layers=n)) for n in (7, 14))
    assert memory.training_bytes(small, 8192) < memory.training_bytes(large, 8192)
    assert memory.training_bytes(Job(PAPER, logit_tokens=1024), 8192) < plain
    assert memory.training_bytes(Job(PAPER, adapter_rank=8), 8192) < plain
    assert memory.update_bytes(Job(PAPER, processes=8)) >= memory.update_bytes(Job(PAPER))
