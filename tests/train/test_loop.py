"""The loop: microbatches and processes change nothing."""

import contextlib
import itertools
import json
import math
import shutil
import types

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from planearly import company, keys, tensors
from planearly.data.dataset import IGNORE
from planearly.errors import UserError
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic, loop, metrics, optim, schedule, update
from planearly.train.objective import NextToken
from planearly.train.trainable import Dense
from small_processes import together
from small_trainings import SHAPE, Killed, Words, killed_after_steps, run, run_apart, same, settings


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
    with pytest.raises(UserError, match=rf"step \d+: .*'{key}\.optimizer\.lr' from 1e\+30 to "):
        run(tmp_path, train=train)


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


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    for count, folder in ((1, "one"), (2, "two")):
        together(count, run_apart, tmp_path / folder, 8, count)
    # Adam: Muon orthogonalises in bfloat16, which magnifies the order of additions
    one, two = (tensors.load_tensors(tmp_path / f / loop.FINAL)[0] for f in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-4, atol=2e-5)
    lines = [[r["loss"] for r in metrics.read(tmp_path / f / "metrics.jsonl")]
             for f in ("one", "two")]
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


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
    for module in (loop, company):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=tick))


def test_seconds_are_the_devices(tmp_path, lagging):
    run(tmp_path, 6)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [round(line["seconds"]) for line in lines] == [300, 600]


def test_seconds_of_a_shared_device_are_a_part_of_those_on_the_clock(tmp_path, lagging,
                                                                     monkeypatch):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    sharing = [4]
    monkeypatch.setattr(company, "size", lambda: sharing[0])
    killed_after_steps(3, lambda: run(tmp_path, 6))
    sharing[0] = 1  # the others have ended
    made, _ = run(tmp_path, 6)
    assert round(made.seconds) == 300 // 4 + 300 and round(made.clock_seconds) == 600
    lines = metrics.read(tmp_path / "metrics.jsonl")
    rates = [line["tokens_per_second"] for line in lines]
    counted = [int((Words().batch(first, first + 24).targets != IGNORE).sum()) for first in (0, 24)]
    assert rates == pytest.approx([each / 300 for each in counted], rel=0.001)  # on the clock


def test_the_step_measured_before_compiling_is_one_step(tmp_path, monkeypatch, lagging):
    took = []
    monkeypatch.setattr(arithmetic.Compiler, "after", lambda self, done, seconds: (
        took.append(seconds), setattr(self.arithmetic, "decided", True)))
    run(tmp_path, 6, train=settings(compile="auto"))
    assert [round(seconds) for seconds in took] == [100]


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
