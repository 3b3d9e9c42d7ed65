"""Workers of a cluster that make stages in a run folder, which they divide by its locks."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from planearly import config, parallel, processes
from planearly.engine.work import Function
from planearly.keys import Recipe
from planearly.progress import told_in
from planearly.stages.folder import Run


def can_spread(run: Run) -> bool:
    """Whether a cluster's workers make a run's trainings: not where torchrun's processes do."""
    return run.executor.spreads and parallel.world() == 1


def spread_trainings(run: Run, name: str, function: Function, most: int,
                     workers: int | None = None, **more: Any) -> None:
    """Have workers of the run's executor make stages in its folder, as :func:`joined` lets them.

    Args:
        name, function, most, workers: as of :meth:`planearly.engine.work.Executor.spread`.
        more: for the function's item.

    Raises:
        UserError: one of them failed, and was not to be tried again.
    """
    folder = run.out / ".workers"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run.executor.spread(name, function, {
        "out": str(run.out), "recipe": run.recipe.to_dict(), **more}, folder, most, workers)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def joined(item: Mapping[str, Any]) -> Iterator[tuple[Recipe, Path]]:
    """The recipe and the run folder that a worker works in, together with others, by the item that
    it was given (:func:`spread_trainings`)."""
    os.environ[processes.SHARING] = str(item["sharing"])
    torch.set_num_threads(max(item["cores"], 1))
    with told_in(Path(item["log"])):
        yield config.variant(config.build(Recipe, item["recipe"], ""), {
            "engine": "shared", "processes": max(item["cores"], 1)}), Path(item["out"])
