"""The loop: resumed equals uninterrupted, microbatches and processes change nothing."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from planearly import keys, tensors
from planearly.data.dataset import IGNORE
from planearly.data.streams import MixedStream, prefetch
from planearly.errors import UserError
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic, loop, metrics, muon, optim, schedule, update
from planearly.train.objective import NextToken
from planearly.train.trainable import Dense
from small_trainings import SHAPE, Killed, Words, killed_after_steps, run, same, settings


def test_loss_is_the_sum_over_real_targets():
    model = Transformer(SHAPE, seed=0).double()
    batch = Words().batch(0, 4)
    logits = model(batch.inputs)
    expected = sum(
        -F.log_softmax(logits[r, t], 0)[batch.targets[r, t]]
        for r in range(4) for t in range(SHAPE.context) if batch.targets[r, t] != IGNORE
    )
    loss = model.loss(batch.inputs, batch.targets).item()
    assert loss == pytest.approx(expected.item(), rel=1e-5)  # summed in float32


@pytest.mark.parametrize("preset", ["modern", "paper"])
def test_same_seed_same_weights_and_training_learns(tmp_path, preset):
    train = settings(optimizer=keys.Optimizer(preset=preset, lr=3e-3))
    first, one = run(tmp_path / "a", 30, train)
    _, two = run(tmp_path / "b", 30, train)
    assert same(one, two)
    lines = [r["loss"] for r in metrics.read(tmp_path / "a" / "metrics.jsonl")]
    assert lines[-1] < lines[0]
    assert first.tokens == sum(int((Words().batch(0, 240).targets != IGNORE).sum()) for _ in [0])




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


def test_a_finished_training_is_not_done_again(tmp_path):
    outcome, weights = run(tmp_path)
    before = (tmp_path / loop.FINAL).stat().st_mtime_ns
    again, same_weights = run(tmp_path)
    assert again == outcome
    assert (tmp_path / loop.FINAL).stat().st_mtime_ns == before
    assert same(weights, same_weights)


def test_microbatches_change_only_the_order_of_additions():
    batch = Words().batch(0, 8)
    gradients = []
    for rows in (8, 3, 1):
        model = Transformer(SHAPE, seed=2).double()
        counted = update.accumulate(
            Dense(model), batch, rows, NextToken(), contextlib.nullcontext(),
            torch.device("cpu"))[1]
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert counted == (batch.targets != IGNORE).sum()
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            # the loss itself is float32: the tolerance is that of its rounding
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_update_divides_by_targets_and_clips():
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[30.0, 40.0, 0.0]])
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    start = model.weight.detach().clone()
    norm = update.apply(model, [sgd], counted=10.0, clip=1.0)
    assert norm.item() == pytest.approx(5.0)
    moved = (start - model.weight.detach())[0]
    torch.testing.assert_close(moved, torch.tensor([0.6, 0.8, 0.0]), rtol=1e-5, atol=1e-6)


def test_early_stopping_keeps_the_best_weights(tmp_path):
    values = iter([5.0, 4.0, 3.0, 3.5, 3.6, 9.9, 9.9])
    seen = []

    def validate(model):
        seen.append([p.detach().clone() for p in model.parameters()])
        return next(values)

    outcome, weights = run(tmp_path, 100, validate=validate, validate_steps=2, patience=2)
    assert (outcome.stopped, outcome.best_step, outcome.steps) == ("early", 4, 8)
    assert outcome.first_validation == 5.0 and outcome.best_validation == 3.0
    best = dict(zip([n for n, _ in Transformer(SHAPE).named_parameters()], seen[2], strict=True))
    assert same(weights, best)


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


def test_a_checkpoint_of_another_shape_is_one_sentence(tmp_path):
    run(tmp_path, 2)
    other = Transformer(Shape(2, 32, 2, 64, 50, 16))
    with pytest.raises(UserError, match=r"ffn\.gate\.weight.*shape"):
        state, _ = tensors.load_tensors(tmp_path / loop.FINAL)
        tensors.set_weights(other, state, tmp_path / loop.FINAL)
    (tmp_path / "x.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"not a readable checkpoint.*: delete its folder"):
        tensors.load_tensors(tmp_path / "x.safetensors")


def test_checkpoints_are_the_bytes_of_the_formats_library(tmp_path):
    draw = torch.Generator().manual_seed(0)
    values = {"b": torch.randn(3, 5, generator=draw).mT, "a é": torch.tensor(7.0),
               "half": torch.randn(3, generator=draw).bfloat16(), "none": torch.empty(0, 2),
               "z": torch.randn(2, generator=draw).double()}
    tensors.save_tensors(tmp_path / "x", values, {"step": 3, "name": "a \"b\" é"})
    note = {"note": json.dumps({"step": 3, "name": "a \"b\" é"})}
    library = safetensors.torch.save({n: t.contiguous() for n, t in values.items()}, note)
    assert (tmp_path / "x").read_bytes() == library


@pytest.mark.parametrize(("kind", "key"), [(keys.Pretrain, "pretrain"),
                                           (keys.Finetune, "finetune")])
def test_a_run_that_diverges_is_one_sentence(tmp_path, kind, key):
    train = kind(batch_tokens=8 * 16, log_steps=1, compile="no", precision="fp32",
                 optimizer=keys.Optimizer(preset="paper", lr=1e30, clip=1e30))
    with pytest.raises(UserError, match=rf"step \d+: .*'{key}\.optimizer\.lr', which is 1e\+30"):
        run(tmp_path, train=train)


def test_mixed_stream_holds_its_share_and_seeks():
    mixed = MixedStream([Words(), Words()], [0.75, 0.25], seed=4)
    whole = mixed.batch(0, 64)
    parts = [mixed.batch(a, a + 8) for a in range(0, 64, 8)]
    assert torch.equal(whole.inputs, torch.cat([p.inputs for p in parts]))
    assert abs((whole.groups == -1).sum() - 16) <= 1


def test_prefetch_hands_errors_to_the_reader():
    class Broken(Words):
        def batch(self, start, stop):
            if start >= 8:
                raise RuntimeError("the disk went away")
            return super().batch(start, stop)

    batches = prefetch(Broken(), iter([(0, 8), (8, 16)]))
    assert len(next(batches)) == 8
    with pytest.raises(RuntimeError, match="went away"):
        next(batches)


@pytest.mark.parametrize("kind", ["wsd", "inverse-sqrt", "cosine", "constant"])
def test_schedules_warm_up_and_do_not_rise_after(kind):
    factors = [schedule.factor(kind, step, 100, 10, 0.3) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(b <= a for a, b in itertools.pairwise(factors[10:]))
    assert kind != "wsd" or (factors[69] == 1.0 and factors[99] == pytest.approx(1 / 30))
    assert kind != "inverse-sqrt" or factors[39] == pytest.approx(math.sqrt(10 / 40))


def test_presets_and_their_overrides():
    paper = optim.resolve(keys.Optimizer(preset="paper"), 100_000)
    assert (paper.lr, paper.clip, paper.warmup_steps) == (1e-4, 5.0, 1000)
    assert optim.resolve(keys.Optimizer(preset="paper"), 500).warmup_steps == 50
    assert optim.resolve(keys.Optimizer(preset="paper", lr=3e-4, clip=1.0), 10).clip == 1.0


WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
import small_trainings as t
from planearly import parallel
parallel.start()
t.run(Path(sys.argv[1]), int(sys.argv[2]), t.settings(
    log_steps=1, checkpoint_seconds=0.0, optimizer=t.keys.Optimizer(preset="paper", lr=1e-3)),
    average=0.5)
"""


def launch(tmp_path: Path, folder: str, processes: int, steps: int = 8) -> subprocess.Popen:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent.parent)))
    command = [sys.executable, str(script), str(tmp_path / folder), str(steps)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                        "--master_port", str(29500 + os.getpid() % 1000)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    for folder, processes in (("one", 1), ("two", 2)):
        process = launch(tmp_path, folder, processes)
        assert process.wait(timeout=900) == 0, process.stderr.read().decode()[-2000:]
    # Adam: Muon orthogonalises in bfloat16, which magnifies the order of additions
    one, two = (tensors.load_tensors(tmp_path / f / loop.FINAL)[0] for f in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-4, atol=2e-5)
    lines = [[r["loss"] for r in metrics.read(tmp_path / f / "metrics.jsonl")]
             for f in ("one", "two")]
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


@pytest.mark.slow
def test_sigkill_at_any_moment_ends_with_the_same_weights(tmp_path):
    assert launch(tmp_path, "whole", 1, 400).wait(timeout=900) == 0
    expected = tensors.load_tensors(tmp_path / "whole" / loop.FINAL)[0]
    wait = 0.0
    kills = 0
    for _ in range(12):
        process = launch(tmp_path, "cut", 1, 400)
        lines = tmp_path / "cut" / "metrics.jsonl"
        size = lines.stat().st_size if lines.exists() else 0
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            if lines.exists() and lines.stat().st_size > size + 15_000:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        wait = (wait + 0.013) % 0.05
        if process.wait() == 0:
            break
    assert kills >= 1, "it was never killed"
    weights = tensors.load_tensors(tmp_path / "cut" / loop.FINAL)[0]
    assert same(expected, weights)
    steps = [r["step"] for r in metrics.read(tmp_path / "cut" / "metrics.jsonl")]
    assert steps == list(range(1, 401))
    assert json.loads((tmp_path / "cut" / loop.OUTCOME).read_text())["steps"] == 400


@pytest.fixture
def lagging(monkeypatch):
    """A clock by which every step takes a device 100 s, which the host waits for only where it
    reads something back."""
    now, queued = [0.0], [0]
    accumulate, item = update.accumulate, torch.Tensor.item

    def enqueue(*args):
        queued[0] += 1
        return accumulate(*args)

    def wait(tensor):
        now[0] += 100.0 * queued[0]
        queued[0] = 0
        return item(tensor)

    def tick():
        now[0] += 0.001
        return now[0]

    monkeypatch.setattr(update, "accumulate", enqueue)
    monkeypatch.setattr(torch.Tensor, "item", wait)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=tick))


def test_seconds_are_the_devices(tmp_path, lagging):
    run(tmp_path, 6)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [round(line["seconds"]) for line in lines] == [300, 600]


def test_the_step_measured_before_compiling_is_one_step(tmp_path, monkeypatch, lagging):
    took = []
    monkeypatch.setattr(arithmetic.Compiler, "after", lambda self, done, seconds: (
        took.append(seconds), setattr(self.arithmetic, "decided", True)))
    run(tmp_path, 6, train=settings(compile="auto"))
    assert [round(seconds) for seconds in took] == [100]


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
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
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


def test_progress_counts_the_tokens_of_the_whole_training(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    told = []

    @contextlib.contextmanager
    def progress(name, total, unit, done):
        told.append([total, done])
        yield types.SimpleNamespace(advance=lambda amount, note="": told[-1].append(amount))

    monkeypatch.setattr(loop, "progress", progress)
    killed_after_steps(5, lambda: run(tmp_path))
    run(tmp_path)
    step = 8 * Words.context
    assert told == [[12 * step, 0, *[step] * 5], [12 * step, 5 * step, *[step] * 7]]


@pytest.mark.parametrize(("asked", "every"), [(None, 2), (7, 7)])
def test_it_validates_ten_times_unless_the_recipe_says_otherwise(tmp_path, asked, every):
    run(tmp_path, 25, settings(validate_steps=asked), validate=lambda model: 5.0)
    steps = [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")
             if "validation" in line]
    assert steps == [*range(every, 25, every), 25]


def test_a_branch_goes_on_as_the_run_that_it_left(tmp_path):
    whole, weights = run(tmp_path / "whole", branches=[5])
    assert [file.name for file in (tmp_path / "whole").glob("branch-*")] == ["branch-5.safetensors"]
    (tmp_path / "branch").mkdir()
    shutil.copy(loop.branch_file(tmp_path / "whole", 5), tmp_path / "branch" / loop.CHECKPOINT)
    branch, again = run(tmp_path / "branch")
    assert same(weights, again)
    assert (branch.steps, branch.tokens, branch.loss) == (12, whole.tokens, whole.loss)


def test_memory_for_a_teacher_is_planned_where_one_answers(tmp_path, monkeypatch):
    planned = []

    def job_of(model, body, preset, teacher, *_):
        planned.append(teacher)
        raise Killed

    monkeypatch.setattr(arithmetic, "job_of", job_of)
    large = Shape(3, 32, 2, 48, 50, 16)
    stored = types.SimpleNamespace(flops_per_token=0.0, teacher_shape=None)
    own = types.SimpleNamespace(flops_per_token=7.0, teacher_shape=None)
    other = types.SimpleNamespace(flops_per_token=7.0, teacher_shape=large)
    for objective in (None, stored, own, other):
        with pytest.raises(Killed):
            run(tmp_path, objective=objective)
    assert planned == [None, None, SHAPE, large]


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
