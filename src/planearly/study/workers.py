"""Who makes the cells of a study: this process, or several.

Several workers (one per GPU, with ``engine=shared`` those of any number of processes on any number
of machines, with ``engine=ray`` actors of a cluster) go through the same list: a cell that needs
what another one makes is passed over for the time being.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from planearly import processes
from planearly.engine.work import Advance, shard_function
from planearly.errors import UserError
from planearly.files import write_json
from planearly.keys import Recipe
from planearly.progress import say
from planearly.stages import claims
from planearly.stages.claims import Busy
from planearly.stages.folder import Run
from planearly.stages.manifest import MANIFEST
from planearly.stages.workers import joined, spread_trainings
from planearly.study import forecast
from planearly.study.cells import Study, told
from planearly.study.grid import Cell
from planearly.units import duration

_TELLS = 0.01
"""Share of the work that is done before the time left is told: what comes before is starting."""
_PAUSE = 2.0
"""Seconds before a worker looks again whether another one has finished a stage."""


def work(this: Study) -> None:
    """Make the cells one after the other; come back to those that wait for another worker."""
    this.make_common()
    began, amounts = time.time(), forecast.added(this.cells)
    settled = claims.in_turns([partial(_settle, this, cell) for cell in this.cells],
                              lambda busy: this.base.pause(_PAUSE))
    for number, here in settled:
        if here:
            say(_progress(this, this.cells[number], amounts, began))


def _progress(this: Study, cell: Cell, amounts: Sequence[float], began: float) -> str:
    """How far all workers are, a cell having been made."""
    ends, spent = this.settled(), time.time() - began
    done = sum(work for each, work in zip(this.cells, amounts, strict=True)
               if ends.get(each.id, 0.0) >= began)
    left = sum(work for each, work in zip(this.cells, amounts, strict=True)
               if each.id not in ends)
    rest = (f", about {duration(spent * left / done)} left" if done > _TELLS * (done + left)
            else "")
    return f"cell {len(ends)} of {len(this.cells)}: {cell.name}; {duration(spent)} so far{rest}"


def _settle(this: Study, cell: Cell) -> bool:
    """Make a cell, or tell and note why it failed.

    Returns:
        Whether there was something to make.

    Raises:
        Busy: another worker makes something that it needs.
    """
    before = this.stages_made()
    try:
        tuned = this.make(cell)
        when = (tuned / MANIFEST).stat().st_mtime
    except Busy:
        raise
    except Exception as error:
        reason = told(error, this.out, cell.id)
        say(f"cell left out: {cell.name}: {reason}")
        write_json(this.failed(cell), {"reason": reason})
        this.settle(cell, 0.0)
        return False
    this.failed(cell).unlink(missing_ok=True)
    this.settle(cell, when)
    return this.stages_made() > before


@shard_function
def make_cells(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Make cells as one of the workers of a cluster."""
    with joined(item) as (recipe, out):
        work(Study(recipe, out, wait=False))
    return {}


def spread_on_cluster(this: Run, workers: int | None) -> str | None:
    """Let workers of the executor's cluster make the cells; why they stopped before the end."""
    whole = Study(this.recipe, this.out)
    whole.make_common()
    try:
        spread_trainings(this, "cells", make_cells, len(whole.cells), workers)
    except UserError as error:
        return str(error)
    return None


def spread(recipe: Recipe, out: Path, workers: int) -> int:
    """Let several processes make the cells; the status of the worst, 0 if all went through."""
    Study(recipe, out)  # what is wrong with the grid is told once
    say(f"{workers} workers")
    given = out / "recipe.yaml"
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(workers):
            started.append(subprocess.Popen(
                [sys.executable, "-m", "planearly.cli", "study", str(given), "--out", str(out),
                 "--worker", str(os.getpid())],
                env={**os.environ, **share_of_machine(number, workers)}))
        codes = [process.wait() for process in started]
    finally:
        processes.end(started)
    return max(codes, key=abs)


def serve(recipe: Recipe, out: Path, parent: int) -> None:
    """Make cells as one of the workers of the process ``parent``, which tells how to go on."""
    processes.serve(parent)
    try:
        work(Study(recipe, out, wait=False))
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGTERM) from None


def share_of_machine(number: int, workers: int) -> dict[str, str]:
    """Environment by which a worker uses its part of the CPU's threads, and one of the GPUs, which
    it shares where there are more workers than GPUs.

    The GPUs are those that this process may use, by the names that it knows them by.
    """
    gpus = torch.cuda.device_count()
    sharing = workers if not gpus else len(range(number % gpus, workers, gpus))
    share = {processes.SHARING: str(sharing)}
    if gpus:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = mask.split(",") if mask else [str(gpu) for gpu in range(gpus)]
        share["CUDA_VISIBLE_DEVICES"] = names[number % gpus].strip()
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(torch.get_num_threads() // workers, 1))
    return share
