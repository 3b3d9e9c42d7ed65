"""One optimiser step: passes over its rows, as many at once as memory holds, and the update."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planearly import parallel, sharding
from planearly.data.dataset import IGNORE
from planearly.data.streams import Batch
from planearly.errors import UserError
from planearly.files import write_json
from planearly.progress import say
from planearly.train import arithmetic
from planearly.train.arithmetic import Arithmetic
from planearly.train.objective import Objective
from planearly.train.reducer import Reducer
from planearly.train.trainable import Trainable


def fitting(model: Trainable, batch: Batch, how: Arithmetic, goal: Objective,
            device: torch.device, name: str, divided: bool = False, together: Path | None = None,
            reducer: Reducer | None = None,
            section: str = "pretrain") -> tuple[Tensor, float]:
    """:func:`accumulate` in as many rows at once as the device's memory holds.

    Where it runs out, the step is begun again in passes of half the rows, and those after it go
    on so. Gradients exist within a step only, so nothing is lost; other processes do not notice
    (:class:`planearly.train.reducer.Reducer`), or where the model is ``divided`` do the same.

    Args:
        together: the training's folder, where a pass takes all processes. A process that is left
            without memory then leaves the others waiting: it notes how to go on, and ends.
        section: of the recipe, with the training's keys.

    Raises:
        UserError: a single row does not fit; or half as many would do, to be started again.
    """
    while True:
        try:
            return accumulate(model, batch, how.rows, goal, how.autocast(device), device,
                              divided and not together, reducer)
        except torch.OutOfMemoryError:
            rows = how.rows
        if reducer:
            reducer.again()
        model.module.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1:
            raise UserError(
                f"{name}: the device's memory does not hold one row of {batch.inputs.shape[1]} "
                "tokens: choose a smaller model or recipe key 'context', or a larger device")
        how.rows = max(min(rows, len(batch)) // 2, 1)
        if together:
            write_json(together / arithmetic.KEPT, how.to_dict())
            raise UserError(f"{name}: out of memory with {rows} rows at once: run the same command "
                            f"again, it goes on with {how.rows} from the last checkpoint "
                            "(`torchrun --max-restarts` does so by itself)")
        say(f"{name}: out of memory with {rows} rows at once, goes on with {how.rows} "
            f"(recipe key '{section}.microbatch_tokens' sets it)")


def accumulate(
    model: Trainable, batch: Batch, per_pass: int, goal: Objective,
    context: contextlib.AbstractContextManager[Any], device: torch.device, agreed: bool = False,
    reducer: Reducer | None = None,
) -> tuple[Tensor, float]:
    """Backward passes over a step's rows; gradients of the *summed* loss end up in the module.

    Args:
        per_pass: most rows of a pass.
        context: forward passes run in it (autocast).
        agreed: whether all processes are out of memory where one is.
        reducer: sums the gradients over the processes; None: there is one alone.

    Returns:
        This process's summed loss (float64 scalar on the device), and the global target count.
    """
    model.begin(batch.groups)
    loss = torch.zeros((), device=device, dtype=torch.float64)
    lacking = None
    try:
        passes = model.microbatches(batch.groups, per_pass)
        for number, rows in enumerate(passes, 1):
            part = batch.take(rows)
            model.select(part.groups)
            with context:
                value = goal(model.body, parallel.send(part.inputs, device),
                             parallel.send(part.targets, device))
            if reducer and number == len(passes):
                reducer.last_pass()
            value.backward()
            loss += value.detach()
    except torch.OutOfMemoryError as error:
        if not agreed:
            raise
        lacking = str(error)
    if agreed and parallel.sum_scalars(float(lacking is not None))[0]:
        raise torch.OutOfMemoryError(lacking or "another process is out of memory")
    model.end()
    counted = float((batch.targets != IGNORE).sum())
    return loss, reducer.finish(counted) if reducer else counted


def apply(
    module: nn.Module, optimizers: list[torch.optim.Optimizer], counted: float, clip: float
) -> Tensor:
    """One update from summed gradients: mean over targets, clipped to norm ``clip``.

    Returns:
        The gradient norm before clipping.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = sharding.norm(gradients) / counted
    # one pass over the gradients does both: the mean over targets and the clipping
    torch._foreach_mul_([sharding.part(g) for g in gradients],
                        torch.clamp(clip / (norm + 1e-6), max=1.0) / counted)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm
