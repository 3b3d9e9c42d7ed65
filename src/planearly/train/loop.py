"""The training loop: the only one.

Pretraining, fine-tuning, distillation and projected networks differ in the stream of batches, the
objective and the model handed in; what happens to them is here, top to bottom: take the rows of a
step, sum the loss over microbatches, divide by the global number of real targets, clip, update,
and now and then log, validate, save. A run that was killed continues from its last checkpoint and
ends with the weights that an uninterrupted one ends with.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planearly import company, keys, parallel, sharding, tensors
from planearly.data.streams import Stream, prefetch
from planearly.errors import UserError
from planearly.files import read_object, write_json
from planearly.model import memory
from planearly.model.outside import AnyModel
from planearly.progress import progress, say
from planearly.train import arithmetic, optim, state, update
from planearly.train.arithmetic import Compiler
from planearly.train.average import Average
from planearly.train.metrics import Metrics
from planearly.train.objective import NextToken, Objective
from planearly.train.reducer import Reducer
from planearly.train.steps import rows_per_step
from planearly.train.trainable import Trainable
from planearly.units import short

CHECKPOINT, BEST, FINAL, OUTCOME = (
    "checkpoint.safetensors", "best.safetensors", "final.safetensors", "outcome.json"
)


@dataclass
class Outcome:
    """What a training run came to; kept in ``outcome.json``."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of the device (:func:`planearly.company.device_time`), without those of writing
    checkpoints."""
    clock_seconds: float = 0.0
    """The same on the clock: more where others had the device too."""
    saving_seconds: float = 0.0
    """Of the device."""
    loss: float | None = None
    """Mean over the steps since the last line of metrics but one, nats per token."""
    best_step: int = 0
    best_validation: float | None = None
    first_validation: float | None = None
    stopped: str = ""
    optimizer: dict[str, Any] = field(default_factory=dict)
    arithmetic: dict[str, Any] = field(default_factory=dict)
    """Fields of :class:`planearly.train.arithmetic.Arithmetic`."""


@dataclass
class Since:
    """Sums since the last line of metrics."""

    loss: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    """Those of the training on the clock, at that line."""


def outcome_in(folder: Path) -> dict[str, Any]:
    """The fields of the :class:`Outcome` of the training that is done in a folder.

    Raises:
        Damaged: its file holds something else.
    """
    return read_object(folder / OUTCOME, "steps", "tokens", "seconds", "best_step")


def branch_file(folder: Path, step: int) -> Path:
    """Where a run keeps its state after a step that another run branches off at."""
    return folder / f"branch-{step}.safetensors"


def train(
    model: Trainable,
    stream: Stream,
    steps: int,
    settings: keys.Train,
    folder: Path,
    *,
    name: str,
    optimizer: optim.Settings | None = None,
    rate_keys: Mapping[str, float] | None = None,
    objective: Objective | None = None,
    validate: Callable[[AnyModel], float] | None = None,
    validate_steps: int | None = None,
    patience: int | None = None,
    average: float = 0.0,
    branches: Collection[int] = (),
    narrow: Callable[[memory.Job, int], bool] | None = None,
) -> Outcome:
    """Train for ``steps`` optimiser steps of ``settings.batch_tokens`` tokens, or stop early.

    Args:
        stream: answers for any range of rows; step t takes rows [t R, (t + 1) R).
        folder: gets ``metrics.jsonl``, the checkpoint, the best and the final weights, and
            ``outcome.json``; what an interrupted call left there is continued.
        rate_keys: recipe keys to which the rates of ``optimizer`` are proportional, and what they
            come to; None: those of :func:`planearly.train.optim.rate_keys`.
        validate: mean nats per token on held-out text, called every ``validate_steps``.
        patience: validations without improvement after which training stops, and the weights of
            the best validation become the final ones; None trains to the end and keeps the last.
        average: what is validated and kept are the weights' averages over this share of the steps
            so far (:class:`planearly.train.average.Average`); 0: the weights themselves.
        branches: steps after which the whole state is also kept as :func:`branch_file`, for
            another run to go on from.
        narrow: whether it pays that gradients of this job travel between machines in bfloat16, in
            steps of so many tokens on each device; asked where the recipe leaves it open.

    Returns:
        The outcome; ``final.safetensors`` holds the weights, and ``model`` has them too (its part
        of them, where processes divide it).

    Raises:
        UserError: the loss is no longer finite; a step has fewer rows than there are processes; or
            the model is to be divided among them and cannot be.
    """
    final, outcome_path = folder / FINAL, folder / OUTCOME
    device = parallel.device()
    saved = folder / CHECKPOINT
    lefts = (saved, folder / BEST, folder / arithmetic.KEPT)
    if parallel.first_process(outcome_path.exists())[0]:
        tensors.set_weights(model.module.to(device), tensors.load_tensors(final)[0], final)
        if parallel.rank() == 0:
            _remove(lefts)  # by a run that was killed when it was done
        return Outcome(**outcome_in(folder))
    if device.type == "cpu":
        arithmetic.tune_allocator()
    rate = optimizer or optim.resolve(settings.optimizer, steps)
    lowered = rate_keys or optim.rate_keys(settings.section_name, settings.optimizer, rate)
    rows = rows_per_step(settings.step_tokens, stream.context)
    parallel.check_rows(rows)
    goal = objective or NextToken()
    teacher = (goal.teacher_shape or model.body.shape) if goal.flops_per_token else None
    job = arithmetic.job_of(model.module, model.body, rate.preset, teacher, device, average > 0)
    divided = parallel.world() > 1 and arithmetic.divides(
        settings, job, device, model.undivided, name)
    resumed = bool(parallel.first_process(saved.exists())[0])
    note = tensors.note(saved) if resumed else {}
    how = arithmetic.settle(settings, stream.context, device, folder, note.get("arithmetic"),
                            replace(job, sharded=divided), narrow)
    together = divided and model.divide(how.bf16)
    if divided:
        sharding.move(model.module, device)
        say(f"{name}: {parallel.world()} processes divide weights and optimiser state")
    else:
        model.module.to(device)
    optimizers = optim.build(model.module, rate)
    optim.compute(optimizers, bool(how.fast_bf16))
    mean = Average(model.module, average) if average else None
    averages = mean.tensors if mean else {}
    outcome, since = Outcome(optimizer=asdict(rate)), Since()
    bad = 0
    if resumed:
        state.load_training(saved, model.module, optimizers, averages)
        told = note["outcome"]
        # older ones do not tell those on the clock
        outcome, bad = Outcome(**{"clock_seconds": told["seconds"], **told}), note["bad"]
        since = Since(**note["since"])  # tokens are all processes', so is the loss that was kept
        if parallel.rank() > 0:
            since.loss = 0.0
        say(f"{name}: continues after step {outcome.steps} of {steps}")
    else:
        _check_start(model.module, name)
    parallel.barrier()
    reducer = None
    if parallel.world() > 1:
        # passes come to the body's parameters, last layers first; the others' gradients come after
        order = dict.fromkeys([*reversed(list(model.body.parameters())),
                               *model.module.parameters()])
        reducer = Reducer(
            [p for p in order if p.requires_grad and not sharding.divided(p)],
            how.bf16_gradients, early=not divided)

    compiler = Compiler(model.body, how, folder, name, steps, device,
                        f"{type(model).__name__} {type(goal).__name__} {rows}")
    every = validate_steps or settings.validate_steps or max(steps // 10, 1)
    metrics = None
    if parallel.rank() == 0:  # of a run that kept no checkpoint no line counts
        metrics = Metrics(folder / "metrics.jsonl", outcome.steps if resumed else -1)

    def ranges() -> Iterator[tuple[int, int]]:
        for step in range(outcome.steps, steps):
            yield parallel.share(step * rows, (step + 1) * rows)

    saving = saved_on_clock = 0.0
    writes = divided or parallel.rank() == 0  # what is divided comes from all of them

    def save(path: Path) -> None:
        nonlocal saving, saved_on_clock
        began, had = time.monotonic(), company.device_time()
        (loss,) = parallel.sum_scalars(since.loss)
        finite(loss)  # a state that has diverged is not kept
        if writes:
            note = {"outcome": asdict(outcome), "bad": bad, "arithmetic": how.to_dict(),
                    "since": asdict(Since(loss, since.tokens, since.seconds))}
            state.save_training(path, model.module, optimizers, note, averages)
        parallel.barrier()
        saving = time.monotonic() - began
        saved_on_clock += saving
        outcome.saving_seconds += company.device_time() - had

    def finite(value: float) -> float:
        if not math.isfinite(value):
            raise _diverged(name, outcome.steps, lowered)
        return value

    def validation() -> None:
        with mean.in_place() if mean and outcome.steps else contextlib.nullcontext():
            validate_weights()

    def validate_weights() -> None:
        nonlocal bad
        assert validate is not None
        with arithmetic.uncompiled(model.body), how.validating(device, cached=not divided):
            own = validate(model.body)
        sharding.release(model.body)
        # one value for all processes: they must agree on when to stop
        value = finite(parallel.sum_scalars(own)[0] / parallel.world())
        if outcome.first_validation is None:
            outcome.first_validation = value
        record(validation=value)
        if outcome.best_validation is None or value < outcome.best_validation:
            outcome.best_validation, outcome.best_step, bad = value, outcome.steps, 0
            if patience is not None and writes:
                tensors.save_tensors(folder / BEST, tensors.weights(model.module), {})
        else:
            bad += 1

    def impatient() -> bool:
        return patience is not None and bad >= patience

    def record(**values: float) -> None:
        if metrics is not None:
            metrics.write({"step": outcome.steps, "tokens": outcome.tokens, **values})

    def take_loss() -> None:
        """Read the loss of the steps since it was last read back from the device."""
        since.loss += pending.item()
        pending.zero_()

    def mean_loss() -> float:
        """Of all processes' steps since the last line of metrics."""
        (summed,) = parallel.sum_scalars(since.loss)
        return finite(summed / since.tokens)

    def look_at_clock() -> None:
        outcome.seconds = before.seconds + company.device_time() - had - (
            outcome.saving_seconds - before.saving_seconds)
        outcome.clock_seconds = before.clock_seconds + time.monotonic() - clock - saved_on_clock

    before, had, clock = replace(outcome), company.device_time(), time.monotonic()
    last_save = clock
    pending = torch.zeros((), device=device, dtype=torch.float64)
    total = steps * rows * stream.context
    if validate is not None and patience is not None and outcome.steps == 0:
        validation()
    with progress(name, total, "tokens", outcome.steps * rows * stream.context) as meter:
        for batch in prefetch(stream, ranges()):
            if impatient():
                break
            if compiler.before(outcome.steps):
                meter.advance(0, "compiling")
            timed = compiler.due(outcome.steps + 1)
            if timed:
                take_loss()  # what is queued on the device is not of this step
            began = time.monotonic()
            if together:  # as many passes as the others
                batch = batch.filled(-(-rows // parallel.world()))
            step_loss, counted = update.fitting(model, batch, how, goal, device, name, divided,
                                         folder if together else None, reducer,
                                         settings.section_name)
            factor = optim.set_rates(optimizers, rate, outcome.steps, steps)
            norm = update.apply(model.module, optimizers, counted, rate.clip)
            outcome.steps += 1
            if mean:
                mean.add(outcome.steps)
            outcome.tokens += int(counted)
            pending += step_loss
            since.tokens += counted
            if timed:
                take_loss()  # waits for the device
                compiler.after(outcome.steps, time.monotonic() - began)
            last = outcome.steps == steps
            log = outcome.steps % settings.log_steps == 0 or last
            due = not last and _time_to_save(last_save, settings.checkpoint_seconds, saving)
            branches_off = outcome.steps in branches
            if log or due or branches_off:  # else nothing is read back: the host runs ahead
                take_loss()
                look_at_clock()
            if log:
                outcome.loss = mean_loss()
                record(loss=outcome.loss, norm=finite(float(norm)), lr_factor=factor,
                       seconds=outcome.seconds,
                       tokens_per_second=since.tokens / (outcome.clock_seconds - since.seconds))
                since = Since(seconds=outcome.clock_seconds)
            meter.advance(rows * stream.context,
                          "" if outcome.loss is None else f"loss {outcome.loss:.3f}")
            if validate is not None and (outcome.steps % every == 0 or last):
                validation()
            if branches_off:
                save(branch_file(folder, outcome.steps))
            if due:
                save(saved)
                last_save = time.monotonic()

    look_at_clock()
    outcome.arithmetic = how.to_dict()
    outcome.stopped = "early" if impatient() else "end"
    if since.tokens:  # stopped between two lines of metrics
        take_loss()
        outcome.loss = mean_loss()
    if patience is not None:
        parallel.barrier()
        best = folder / BEST
        tensors.set_weights(model.module, tensors.load_tensors(best)[0], best)
        parallel.barrier()  # all have read it before the first removes it
    elif mean:
        mean.swap()
    arithmetic.release(model.body)
    if reducer:
        reducer.close()
    if writes:
        tensors.save_tensors(final, tensors.weights(model.module), {})
    if parallel.rank() == 0:
        assert metrics is not None
        metrics.close()
        write_json(outcome_path, asdict(outcome))
        _remove(lefts)
    parallel.barrier()
    say(f"{name}: {short(outcome.tokens)} tokens, loss {outcome.loss or 0:.4f}"
        + (f", best validation {outcome.best_validation:.4f} at step {outcome.best_step}"
           if outcome.best_validation is not None else ""))
    return outcome


def _remove(files: Collection[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


@torch.no_grad()
def _check_start(module: nn.Module, name: str) -> None:
    """Refuse weights that no training could mend.

    Raises:
        UserError: some are not finite.
    """
    parameters = dict(module.named_parameters())
    whole = torch.stack([torch.isfinite(sharding.part(p)).all()
                         for p in parameters.values()]).tolist()
    for parameter, good in zip(parameters, whole, strict=True):
        if not good:
            raise UserError(f"{name}: the weights it begins with are not finite ('{parameter}'): "
                            "make the checkpoint or training that they come from again")


def _diverged(name: str, step: int, rate_keys: Mapping[str, float]) -> UserError:
    lower = " and ".join(f"'{key}' from {value:.3g} to {value / 3:.2g}"
                         for key, value in rate_keys.items())
    return UserError(f"{name}: the loss is not finite at step {step}: lower recipe key"
                     f"{'s' * (len(rate_keys) > 1)} {lower} or less and start again")


def _time_to_save(last: float, seconds: float, saving: float) -> bool:
    """Whether a checkpoint is due; the first process decides for all.

    Every so many seconds, but so rarely that writing, which takes ``saving`` seconds, stays under
    a fiftieth of the time (docs/decisions.md, "Saving under a fiftieth of the time"); with 0
    seconds after every step.
    """
    interval = max(seconds, 50 * saving) if seconds else 0.0
    due = time.monotonic() - last >= interval
    if parallel.world() > 1:
        due = parallel.first_process(due)[0] > 0
    return due or bool(os.environ.get("PLANEARLY_CHECKPOINT_EVERY_STEP"))
