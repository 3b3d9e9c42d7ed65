"""Resumed equals uninterrupted, whenever it was killed."""

import contextlib
import json
import shutil
import time
import types
from multiprocessing.process import BaseProcess

import pytest
import torch

from planearly import company, keys, tensors
from planearly.data.dataset import IGNORE
from planearly.model.transformer import Transformer
from planearly.train import arithmetic, loop, metrics, muon, update
from planearly.train.trainable import Dense
from small_processes import fork
from small_trainings import SHAPE, Killed, Words, killed_after_steps, run, run_apart, same, settings


@pytest.mark.parametrize("preset", ["modern", "paper"])
@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch, preset, stop_at):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    train = settings(optimizer=keys.Optimizer(preset=preset))
    whole, expected = run(tmp_path / "whole", train=train)
    killed_after_steps(stop_at, lambda: run(tmp_path / "cut", train=train))
    resumed, weights = run(tmp_path / "cut", train=train)
    assert same(expected, weights)
    assert resumed.tokens == whole.tokens
    assert resumed.loss == whole.loss
    drop = ("seconds", "tokens_per_second")
    records = [[{k: v for k, v in r.items() if k not in drop}
                for r in metrics.read(tmp_path / name / "metrics.jsonl")]
               for name in ("whole", "cut")]
    assert records[0] == records[1]


def test_early_stopping_survives_a_kill(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")

    def values_by_step():
        table = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.6, 10: 3.7}
        return table

    step = {"now": 0}

    def validate(model):
        return values_by_step()[step["now"]]

    accumulate = update.accumulate

    def counting(fail_at):
        def call(*args):
            if step["now"] == fail_at:
                raise Killed
            step["now"] += 1
            return accumulate(*args)
        return call

    monkeypatch.setattr(update, "accumulate", counting(None))
    expected = run(tmp_path / "a", 100, validate=validate, validate_steps=2, patience=3)
    step["now"] = 0
    monkeypatch.setattr(update, "accumulate", counting(7))
    with pytest.raises(Killed):
        run(tmp_path / "b", 100, validate=validate, validate_steps=2, patience=3)
    monkeypatch.setattr(update, "accumulate", counting(None))
    got = run(tmp_path / "b", 100, validate=validate, validate_steps=2, patience=3)
    assert same(expected[1], got[1])
    assert got[0].best_step == expected[0].best_step == 4


@pytest.mark.slow
def test_sigkill_at_any_moment_ends_with_the_same_weights(tmp_path):
    def launch(folder: str) -> BaseProcess:
        return fork(run_apart, 0, tmp_path / folder, 400)

    launched = launch("whole")
    launched.join(900)
    assert launched.exitcode == 0
    expected = tensors.load_tensors(tmp_path / "whole" / loop.FINAL)[0]
    wait = 0.0
    kills = 0
    for _ in range(12):
        process = launch("cut")
        lines = tmp_path / "cut" / "metrics.jsonl"
        size = lines.stat().st_size if lines.exists() else 0
        until = time.monotonic() + 300
        while process.is_alive() and time.monotonic() < until:
            if lines.exists() and lines.stat().st_size > size + 15_000:
                time.sleep(wait)
                process.kill()
                kills += 1
                break
            time.sleep(0.005)
        wait = (wait + 0.013) % 0.05
        process.join()
        if process.exitcode == 0:
            break
    assert kills >= 1, "it was never killed"
    weights = tensors.load_tensors(tmp_path / "cut" / loop.FINAL)[0]
    assert same(expected, weights)
    steps = [r["step"] for r in metrics.read(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == list(range(1, 401))
    assert json.loads((tmp_path / "cut" / loop.OUTCOME).read_text())["steps"] == 400


def killed_after(monkeypatch, module, function, when):
    whole = getattr(module, function)

    def call(*args, **more):
        made = whole(*args, **more)
        if when(*args):
            raise Killed
        return made

    monkeypatch.setattr(module, function, call)
    return lambda: monkeypatch.setattr(module, function, whole)


def test_a_resume_without_a_step_asks_alike_on_every_process(tmp_path, monkeypatch):
    """Killed right after the checkpoint of the step whose validation exhausts patience."""
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    train = settings(log_steps=1000)
    values = iter([5.0, 6.0, 7.0])
    patient = {"validate": lambda model: next(values), "validate_steps": 1, "patience": 2}
    restore = killed_after(monkeypatch, loop.state, "save_training",
                           lambda path, module, optimizers, note, averages: note["bad"] == 2)
    with pytest.raises(Killed):
        run(tmp_path / "first", train=train, **patient)
    restore()
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    told = []

    def asked(*own):
        told.append(list(own))
        return list(own)

    def answered(*own):
        answer = told.pop(0)
        assert len(answer) == len(own)
        return answer

    monkeypatch.setattr(loop.parallel, "sum_scalars", asked)
    outcome, _ = run(tmp_path / "first", train=train, **patient)
    monkeypatch.setattr(loop.parallel, "sum_scalars", answered)
    monkeypatch.setattr(loop.parallel, "rank", lambda: 1)
    again = loop.train(Dense(Transformer(SHAPE, seed=1)), Words(), 12, train, tmp_path / "second",
                       name="t", **patient)
    assert told == [] and again.loss == outcome.loss and outcome.steps == 2


def test_killed_before_the_first_checkpoint_no_line_stands_twice(tmp_path, monkeypatch):
    patient = {"validate": lambda model: 5.0, "validate_steps": 9, "patience": 2}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, update, "accumulate", lambda *args: True)
        run(tmp_path, 3, **patient)
    run(tmp_path, 3, **patient)
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [0, 3, 3]


def test_seconds_of_a_resumed_run_add_up(tmp_path, monkeypatch):
    """By a clock on which a step takes 100 s and writing its checkpoint 1,000."""
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    now = [0.0]

    def lasting(seconds, module, name):
        whole = getattr(module, name)

        def call(*args):
            now[0] += seconds
            return whole(*args)

        monkeypatch.setattr(module, name, call)

    lasting(100.0, update, "accumulate")
    lasting(1000.0, loop.state, "save_training")
    for module in (loop, company):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    killed_after_steps(3, lambda: run(tmp_path, 6))
    now[0] += 77_000.0  # until somebody starts it again
    outcome, _ = run(tmp_path, 6)
    assert outcome.seconds == 600.0
    # four saves: what the third took is in no checkpoint, and after the last step there is none
    assert outcome.saving_seconds == 4000.0
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["seconds"]) for line in lines] == [(3, 300.0), (6, 600.0)]
    counted = int((Words().batch(24, 48).targets != IGNORE).sum())
    assert lines[1]["tokens_per_second"] == counted / 300.0


def test_killed_when_it_is_done_nothing_is_left_for_good(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, loop, "write_json", lambda path, values: path.name == loop.OUTCOME)
        run(tmp_path, 3, validate=lambda model: 5.0, patience=2)
    assert (tmp_path / loop.CHECKPOINT).exists() and (tmp_path / loop.BEST).exists()
    run(tmp_path, 3, validate=lambda model: 5.0, patience=2)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", loop.FINAL, loop.OUTCOME}


def test_validation_and_muon_compute_as_before_the_kill(tmp_path, monkeypatch):
    """Whatever the machine that goes on finds fast."""
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    seen, products = [], []
    orthogonalise = muon.orthogonalise
    monkeypatch.setattr(muon, "orthogonalise", lambda matrices, bf16: (
        products.append(bf16), orthogonalise(matrices, bf16))[1])

    def validate(model):
        seen.append(torch.is_autocast_enabled(loop.parallel.device().type))
        return 5.0

    for fast in (True, False):
        monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda device, fast=fast: fast)
        with monkeypatch.context() as patch:
            if fast:
                killed_after(patch, loop.state, "save_training", lambda *args: True)
            with pytest.raises(Killed) if fast else contextlib.nullcontext():
                run(tmp_path, 3, validate=validate, validate_steps=1, patience=9)
    assert len(seen) > 2 and all(seen) and len(products) > 2 and all(products)


def test_damaged_lines_of_metrics_are_told_and_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\0\0\0\n{"step": 2\n[3]\n\xff{}\n'
                     b'{"step": 3}\n{"st')
    assert metrics.read(path) == [{"step": 1, "loss": 2.0}, {"step": 3}]
    assert "4 lines of" in capsys.readouterr().err
    log = metrics.Metrics(path, 2)
    log.write({"step": 4})
    log.close()
    assert metrics.read(path) == [{"step": 1, "loss": 2.0}, {"step": 4}]
