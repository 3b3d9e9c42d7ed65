"""Gradients of several processes: summed while the last pass runs, whatever fails or is missing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from planearly import keys, parallel, tensors
from planearly.model import memory
from planearly.model.transformer import Transformer
from planearly.stages import training as stages
from planearly.train import arithmetic, loop, update
from planearly.train import reducer as reducer_module
from planearly.train.objective import NextToken
from planearly.train.reducer import Reducer
from planearly.train.trainable import Dense
from small_processes import together
from small_trainings import SHAPE, Words, killed_after_steps, settings

CPU = torch.device("cpu")
ROWS = {0: (0, 5), 1: (5, 8)}
"""Of a step: five of the first process, in two passes, and three of the second, in one."""
STEPS = 6
BF16 = settings(gradients="bf16", optimizer=keys.Optimizer(preset="adamw"))


def small_buckets() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(reducer_module, "_SENT", 2000))
    stack.enter_context(mock.patch.object(parallel, "BUCKET", 6000))
    return stack


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(rank: int, reducer: Any = None, model: Transformer | None = None) -> dict[str, Tensor]:
    """Gradients of a step's rows of one process, or if there is a reducer of all."""
    model = model or Transformer(SHAPE, seed=1)
    how = arithmetic.Arithmetic(bf16=False, rows=3)
    made = reducer(model) if reducer else None
    sent: list[int] = []
    finish = Reducer.finish

    def finishing(self: Reducer, counted: float) -> float:
        sent.append(self._sent)
        return finish(self, counted)

    with mock.patch.object(Reducer, "finish", finishing):
        update.fitting(Dense(model), Words().batch(*ROWS[rank]), how, NextToken(), CPU, "t",
                       reducer=made)
    found = gradients(model)
    if made:
        found["sent early"] = torch.tensor([sent[0], len(made.buckets)])
        made.close()
    return found


def early(model: nn.Module, bf16: bool = False) -> Reducer:
    return Reducer(reversed(list(model.parameters())), bf16, early=True)


def short_of_memory(rank: int) -> dict[str, Tensor]:
    """The same where the first process lacks memory in the middle of its last pass."""
    model, times = Transformer(SHAPE, seed=1), []

    def lack(gradient: Tensor) -> None:
        times.append(len(gradient))
        if rank == 0 and len(times) == 2:
            raise torch.OutOfMemoryError

    model.blocks[0].ffn.up.weight.register_hook(lack)
    found = step(rank, early, model)
    assert len(times) == (7 if rank == 0 else 1)  # two passes, and five of one row
    return found


def not_used_by_all(rank: int) -> dict[str, Tensor]:
    """Of three parameters one is used by the second process alone, and one by none."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in ("all", "one", "none")})
    made = early(model)
    made.last_pass()
    value = model["all"].sum() * (rank + 1)
    (value + 5 * model["one"].sum() if rank else value).backward()
    assert made.finish(rank + 1.0) == 3
    return gradients(model)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    with small_buckets():
        found = {"own": step(rank), "float32": step(rank, early),
                 "bf16": step(rank, lambda model: early(model, bf16=True)),
                 "late": step(rank, lambda model: Reducer(model.parameters())),
                 "short": short_of_memory(rank), "unused": not_used_by_all(rank)}
        where = Path(folder) / "cut"
        killed_after_steps(3, lambda: train(where))
        found["trained"] = dict(train(where).named_parameters())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train(folder: Path) -> Transformer:
    model = Transformer(SHAPE, seed=1)
    outcome = loop.train(Dense(model), Words(), STEPS, BF16, folder, name="t")
    assert outcome.arithmetic["bf16_gradients"]
    return model


@pytest.mark.slow
def test_two_processes_sum_what_each_of_them_has(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    together(2, work, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for how in ("float32", "late", "bf16", "short"):
        sent, all_of_it = one[how].pop("sent early").tolist()
        assert all_of_it > 5 and two[how].pop("sent early").tolist()[1] == all_of_it
        assert sent == 0 if how == "late" else sent > 2
        assert one[how].keys() == one["own"].keys()
        for name, found in one[how].items():
            assert torch.equal(found, two[how][name]), (how, name)
            own, other = one["own"][name], two["own"][name]
            if how == "bf16":
                assert not torch.equal(found, own + other)
                off = (found - (own + other)).abs()
                assert (off <= (own.abs() + other.abs()) * 2 / 256 * 1.01).all(), name
            elif how == "short":  # its rows were added up in other passes
                torch.testing.assert_close(found, own + other, rtol=1e-5, atol=4e-6)
            else:
                assert torch.equal(found, own + other), (how, name)
    assert one["unused"].keys() == {"all", "one"}
    for found in (one["unused"], two["unused"]):
        assert found["all"].tolist() == [3] * 3 and found["one"].tolist() == [5] * 3
    plain = tmp_path / "alone"
    fresh = dict(Transformer(SHAPE, seed=1).named_parameters())
    alone = dict(train(plain).named_parameters())
    trained, _ = tensors.load_tensors(tmp_path / "cut" / loop.FINAL)
    for name, found in one["trained"].items():
        assert torch.equal(found, two["trained"][name]) and torch.equal(found, trained[name])
        off, moved = (found - alone[name]).norm(), (alone[name] - fresh[name]).norm()
        assert 0 < off < 0.03 * moved, (name, off / moved)


def test_what_is_on_its_way_is_bounded(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = dist.all_reduce

    class Call:
        def __init__(self, flat: Tensor) -> None:
            self.size = len(flat)
            calls.append(self.size)
            assert sum(calls) <= 30 or len(calls) == 1

        def wait(self) -> None:
            calls.remove(self.size)

    monkeypatch.setattr(dist, "all_reduce", lambda tensor, async_op=False: (
        Call(tensor) if async_op else real(tensor)))
    monkeypatch.setattr(reducer_module, "_SENT", 10)
    monkeypatch.setattr(parallel, "BUCKET", 30)
    model = nn.ParameterList(
        nn.Parameter(torch.full((n,), 2.0)) for n in (4, 4, 4, 50, 9, 9, 9, 9, 1))
    made = early(model)
    assert [len(bucket) for bucket in made.buckets] == [2, 1, 1, 1, 1, 2, 1]
    made.last_pass()
    sum((p.square().sum() for p in model), torch.zeros(())).backward()
    assert calls and made.finish(3.0) == 3 and not calls
    assert all(p.grad is not None and (p.grad == 4).all() for p in model)
    made.close()
    made.last_pass()
    sum((p.square().sum() for p in model), torch.zeros(())).backward()  # nobody listens
    assert not calls and all(p.grad is not None and (p.grad == 8).all() for p in model)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_whole_gradients_are_sent_once_in_their_type_or_in_bfloat16(
        monkeypatch: pytest.MonkeyPatch, bf16: bool, passes: int) -> None:
    """Another process has 100 of everything, and begins no step again."""
    sent: list[Tensor] = []

    def summing(flat: Tensor) -> Any:
        sent.append(flat.clone())
        return lambda: flat.add_(100)

    monkeypatch.setattr(parallel, "summing", summing)
    kinds = [torch.float32] * 2 + [torch.float64] + [torch.float32] * 2
    model = nn.ParameterList(nn.Parameter(torch.zeros(3, 2, dtype=kind)) for kind in kinds)
    made = Reducer(model, bf16, early=True) if bf16 else Reducer(model, early=True)
    assert [len(bucket) for bucket in made.buckets] == [2, 1, 2]
    for again in (False, True, False):  # steps
        for number in range(1, passes + 1):
            assert not sent
            if number == passes:
                made.last_pass()
            torch.stack([i * p.sum() for i, p in enumerate(model, 1)]).sum().backward()
        if again:  # in one pass, after all is sent
            made.again()
            assert all(p.grad is None for p in model)
            made.last_pass()
            torch.stack([passes * i * p.sum() for i, p in enumerate(model, 1)]).sum().backward()
        assert made.finish(5.0) == 5
        assert [flat.dtype for flat in sent] == (
            [torch.bfloat16] * 3 if bf16 else [torch.float32, torch.float64, torch.float32])
        assert torch.cat(sent).tolist() == [
            float(passes * i) for i in range(1, 6) for _ in range(6)]
        for i, (parameter, kind) in enumerate(zip(model, kinds, strict=True), 1):
            assert parameter.grad is not None and parameter.grad.dtype == kind
            assert (parameter.grad == 100 + passes * i).all()
            parameter.grad = None
        sent.clear()


# When in bfloat16 ---------------------------------------------------------------------------------

H200 = memory.Job(SHAPE, processes=16)


@pytest.mark.parametrize(("gradients", "device", "hosts", "slow", "bf16"), [
    ("auto", "cuda", 2, True, True), ("auto", "cuda", 2, False, False),
    ("auto", "cuda", 1, True, False), ("auto", "cpu", 2, True, False),
    ("fp32", "cuda", 2, True, False), ("bf16", "cpu", 1, False, True)])
def test_gradients_travel_in_bfloat16_where_it_pays_or_is_asked_for(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients: str, device: str, hosts: int,
        slow: bool, bf16: bool) -> None:
    monkeypatch.setattr(parallel, "hosts", lambda: hosts)
    monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda device: False)
    asked = settings(gradients=gradients, microbatch_tokens=16)
    how = arithmetic.settle(asked, 16, torch.device(device), tmp_path, None, H200,
                            lambda job, tokens: slow)
    assert how.bf16_gradients == bf16
    again = arithmetic.settle(asked, 16, torch.device(device), tmp_path, how.to_dict(), H200,
                              lambda job, tokens: not slow)
    assert again.bf16_gradients == bf16  # as it began


def test_machines_are_counted_as_torchrun_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.hosts() == 1
    monkeypatch.setattr(parallel, "world", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert parallel.hosts() == 2


@pytest.mark.parametrize(("tokens", "slow"), [(16_384, True), (4_194_304, False)])
def test_the_estimate_is_that_of_plans(monkeypatch: pytest.MonkeyPatch, tokens: int,
                                       slow: bool) -> None:
    monkeypatch.setattr(stages.devices, "here", lambda: "h200")
    shape = memory.replace(SHAPE, d_model=1024, d_ff=4096, layers=7, vocab_size=32_768)
    assert stages.narrow(memory.Job(shape, processes=16), tokens) == slow


def test_stages_are_found_again_however_their_gradients_travelled(tmp_path: Path) -> None:
    auto, bf16, fp32 = (keys.Pretrain(gradients=kind)  # type: ignore[arg-type]
                        for kind in ("auto", "bf16", "fp32"))
    values = {kind.gradients: stages.train_settings(kind) for kind in (auto, bf16, fp32)}
    assert "gradients" not in values["auto"]
    for one in (auto, bf16, fp32):
        same = stages.same_settings({"train": values[one.gradients]}, one)
        assert all({"train": other} in same
                   for kind, other in values.items() if kind != one.gradients)
    for note, found in (({"bf16": True}, [True, False, True]),
                        ({"bf16_gradients": True}, [True, True, False])):
        arithmetic.keep(arithmetic.Arithmetic(**{"bf16": False, "rows": 1, **note}), tmp_path)
        assert [stages.as_precise(kind)(tmp_path) for kind in (auto, bf16, fp32)] == found
