"""Several processes that divide a model train it as one does, and go on from each other."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from planearly import keys, parallel, sharding, tensors
from planearly.data.dataset import IGNORE
from planearly.errors import UserError
from planearly.files import read_json, write_json
from planearly.model import lora, memory, outside
from planearly.model.projected import Projected
from planearly.model.transformer import Transformer
from planearly.stages import training as stages
from planearly.train import arithmetic, loop, metrics, muon, optim, update
from planearly.train.objective import NextToken
from planearly.train.trainable import Dense, Trainable
from planearly.train.vector import Vector
from small_outside import outside_folder
from small_processes import together
from small_trainings import SHAPE, Words, killed_after_steps

STEPS = 6
TRAIN = keys.Train(batch_tokens=10 * 16, microbatch_tokens=2 * 16, log_steps=2, compile="no",
                   precision="fp32", shard="yes", optimizer=keys.Optimizer(clip=0.05))
LARGE = replace(SHAPE, d_ff=9, tie_embeddings=False)
"""Its matrices do not divide by four: one process of four has no row of some."""
BANK = keys.Projected(experts=3, rank=3, embedding=4, bank_lr=2.0)


def of_others() -> Trainable:
    folder = Path(os.environ["OTHERS"])
    return Dense(outside.read(folder, SHAPE.context))


MODELS = {
    "slm": lambda: Dense(Transformer(SHAPE, seed=1)),
    "llm": lambda: Dense(Transformer(LARGE, seed=1)),
    "slm-pn": lambda: Projected(SHAPE, BANK, seed=1),
    "open": of_others,
}


def trained(name: str, folder: Path, **changed: Any) -> loop.Outcome:
    """Train one of the models in float64, in which the order of additions does not show."""
    model = MODELS[name]()
    model.module.double()
    more: dict[str, Any] = {}
    if name == "llm":
        more = {"patience": 9, "validate_steps": 2, "validate": validate, "average": 0.4}
        changed["optimizer"] = replace(TRAIN.optimizer, preset="adamw")
    return loop.train(model, Words(), STEPS, replace(TRAIN, **changed), folder, name=name, **more)


@torch.no_grad()
def validate(model: Any) -> float:
    batch = Words().batch(1000, 1004)
    return model.loss(batch.inputs, batch.targets).item()


def nearest(matrices: torch.Tensor, bf16: bool | None = None) -> torch.Tensor:
    """Muon's update without its rounding, which would magnify the order of additions."""
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    return left @ right


def work(rank: int, processes: int, folder: str, stop: int | None) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/{processes}-meet",
                                             rank=rank, world_size=processes)
    built = optim.build
    for name in MODELS:
        made: list[Any] = []
        where = Path(folder) / name
        with (mock.patch.object(optim, "build", lambda *a, m=made: m.extend(built(*a)) or m),
              mock.patch.object(muon, "orthogonalise", nearest)):
            if stop:
                killed_after_steps(stop, lambda n=name, w=where: trained(n, w))
            else:
                trained(name, where)
        held = sum(sharding.part(value).nbytes for each in made for state in each.state.values()
                   for value in state.values())
        write_json(Path(folder) / f"{name}-{rank}-of-{processes}.json", held)
    if processes > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_that_divide_a_model_are_one_and_go_on_from_each_other(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    monkeypatch.setenv("OTHERS", str(outside_folder(tmp_path / "open", "llama-3.2")))
    alone, turns = tmp_path / "alone", tmp_path / "turns"
    for folder in (alone, turns):
        folder.mkdir()
    work(0, 1, str(alone), None)
    for processes, stop in ((4, 3), (2, 2)):
        together(processes, work, processes, str(turns), stop)
    work(0, 1, str(turns), None)
    for name, make in MODELS.items():
        found, expected = (tensors.load_tensors(of / name / loop.FINAL)[0] for of in (turns, alone))
        fresh = tensors.weights(make().module)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7, msg=(
                lambda text, place=f"{name} {key}": f"{place}: {text}"))
            assert not torch.equal(tensor.to(fresh[key]), fresh[key])
        lines, again = (metrics.read(of / name / "metrics.jsonl") for of in (alone, turns))
        for one, two in zip(lines, again, strict=True):
            for value in {"loss", "norm", "validation"} & one.keys():
                assert two[value] == pytest.approx(one[value], rel=1e-6)
        whole = read_json(alone / f"{name}-0-of-1.json")
        held = [read_json(turns / f"{name}-{rank}-of-4.json") for rank in range(4)]
        assert max(held) < (0.6 if name == "slm-pn" else 0.35) * whole, name


# When, and when not -------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.mark.parametrize(("gigabytes", "others", "divided"), [
    (9, 0, False), (1.5, 0, True), (9, 1, True)])
def test_processes_divide_what_one_of_them_cannot_hold(
        monkeypatch: pytest.MonkeyPatch, gigabytes: float, others: int, divided: bool) -> None:
    job = memory.Job(replace(SHAPE, d_model=2048, d_ff=8192), processes=4, device="cpu")
    monkeypatch.setattr(arithmetic, "_available", lambda device: gigabytes * 1e9)
    monkeypatch.setattr(parallel, "sum_scalars", lambda own: [own + others])
    assert 1.5e9 < memory.training_bytes(job, SHAPE.context) < 9e9
    auto = replace(TRAIN, shard="auto")
    assert arithmetic.divides(auto, job, CPU, None, "t") == divided
    assert not arithmetic.divides(replace(TRAIN, shard="no"), job, CPU, None, "t")
    if not others:
        assert not arithmetic.divides(auto, job, CPU, "a model of glass", "t")


def test_what_cannot_be_divided_is_told_in_one_sentence() -> None:
    model = Transformer(SHAPE)
    network = Projected(SHAPE, BANK)
    adapted = Transformer(SHAPE)
    lora.add_adapters(adapted, keys.Lora(rank=2), 0)
    assert Dense(model).undivided is None and network.undivided is None
    for other in (Dense(adapted), Vector(network, network.vector(0))):
        with pytest.raises(UserError, match=r"t: .* is not divided among .*: leave .*"
                           r"'pretrain\.shard' at 'auto'"):
            arithmetic.divides(TRAIN, memory.Job(SHAPE), CPU, other.undivided, "t")


def test_stages_are_found_again_however_they_are_divided() -> None:
    plain, divided = (keys.Pretrain(shard=shard) for shard in ("auto", "yes"))  # type: ignore
    assert stages.train_settings(divided) == stages.train_settings(plain)
    found = [stages.same_settings({"train": stages.train_settings(of)}, of)
             for of in (plain, divided)]
    assert found[0] == found[1] and "shard" not in str(found)


# Out of memory ------------------------------------------------------------------------------------

class Narrow(NextToken):
    """Runs out of memory with more than two rows."""

    def __call__(self, model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 2:
            raise torch.OutOfMemoryError
        return super().__call__(model, inputs, targets)


def test_out_of_memory_in_a_pass_of_all_processes_is_to_be_started_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*values: float) -> list[float]:
        raise AssertionError("the others wait elsewhere: nobody would answer")

    monkeypatch.setattr(parallel, "sum_scalars", never)
    how = arithmetic.Arithmetic(bf16=False, rows=8)
    with pytest.raises(UserError, match=r"t: out of memory with 8 rows .* same .* 4 "):
        update.fitting(Dense(Transformer(SHAPE)), Words().batch(0, 8), how, Narrow(), CPU, "t",
                     divided=True, together=tmp_path)
    monkeypatch.undo()
    kept = {**how.to_dict(), "rows": 8}  # of the last checkpoint
    assert arithmetic.settle(TRAIN, 4, CPU, tmp_path, kept).rows == 4


def test_out_of_memory_on_one_process_halves_the_rows_of_all(
        monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([1.0, 0.0])
    monkeypatch.setattr(parallel, "sum_scalars", lambda own: [
        own if own > 1 else max(own, next(asked))])
    how = arithmetic.Arithmetic(bf16=False, rows=2)
    batch = Words().batch(0, 2)
    _, counted = update.fitting(Dense(Transformer(SHAPE)), batch, how, Narrow(), CPU, "t",
                              divided=True)
    assert how.rows == 1 and counted == (batch.targets != IGNORE).sum()


def test_a_batch_is_filled_with_rows_that_do_not_count() -> None:
    batch = Words().batch(1, 3)
    filled = batch.filled(3)
    assert len(filled) == 3 and torch.equal(filled.inputs[:2], batch.inputs)
    assert torch.equal(filled.targets[:2], batch.targets) and (filled.targets[2] == IGNORE).all()
    assert filled.groups.tolist() == [*batch.groups, batch.groups[-1]]
