"""``planearly study``: every cell of a grid, in one run folder, by one process or several.

A cell is made by the stages that ``planearly run`` has, in the same folder, so what cells share is
made once, what is finished is never made again, and an interrupted stage goes on where it was.
Several workers (one per GPU, with ``engine=shared`` those of any number of processes on any number
of machines, with ``engine=ray`` actors of a cluster) go through the same list: a stage that another
one makes is passed over for the time being.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planearly import keys, processes
from planearly.cluster import histogram
from planearly.config import look_up
from planearly.cost import devices, ledger
from planearly.data.dataset import TokenDataset
from planearly.engine.work import PAUSE, TRIES, Advance, passes, shard_function
from planearly.errors import UserError
from planearly.files import atomic_write, read_array, read_json, replacing, write_json
from planearly.keys import Recipe
from planearly.progress import say
from planearly.stages import claims, clusters, corpus, trained, training
from planearly.stages.claims import Busy
from planearly.stages.evaluate import evaluations, row, units
from planearly.stages.folder import Missing, Run, joined
from planearly.study import grid, sharing
from planearly.study import view as views
from planearly.study.grid import Cell, Variant
from planearly.study.spec import Suite
from planearly.train import arithmetic
from planearly.units import duration

_FAILED = ".failed"
_STAGES = "stages"
_PAUSE = 2.0
"""Seconds before a worker looks again whether another one has finished a stage."""


class StudyRun(Run):
    """A run that does not try again what failed since this start, whichever worker tried it; but
    where the machine was the cause, three times."""

    def stage(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, Path],
        build: Callable[[Path], dict[str, Any] | None], **more: Any,
    ) -> Path:
        """As of any run.

        Raises:
            UserError: the stage failed, now or before.
        """
        folder = self.folder(name, settings, inputs, more.get("version", 1))
        note = self.out / _FAILED / _STAGES / f"{name.replace('/', '--')}-{folder.name[-8:]}.json"
        if self.build and note.exists():
            raise UserError(read_json(note)["reason"])
        tries = 1
        while True:
            try:
                return super().stage(name, settings, inputs, build, **more)
            except (Busy, Missing):
                raise
            except Exception as error:
                reason = told(error, self.out, note.stem)
                if not passes(error) or tries == TRIES:
                    write_json(note, {"reason": reason})
                    raise UserError(reason) from error
            say(f"{name} failed, as {reason}: it is tried again")
            time.sleep(PAUSE)
            tries += 1


def told(error: Exception, out: Path, name: str) -> str:
    """A sentence for a failure; the traceback of an unforeseen one is kept beside the notes."""
    if isinstance(error, UserError):
        return str(error)
    log = Path(_FAILED) / f"{name}.log"
    with atomic_write(out / log, "w") as handle:
        handle.write("".join(traceback.format_exception(error)))
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (traceback: {log} in the study's folder)"


class Study:
    """The cells of a recipe in a run folder."""

    def __init__(self, recipe: Recipe, out: Path, *, wait: bool = True, build: bool = True) -> None:
        self.recipe, self.out, self.wait, self.build = recipe, out, wait, build
        # what all cells need: worth waiting for
        self.base = Run(out, recipe, build=build, earlier=not build)
        self.domains = list(corpus.needed_domains(self.base, "a study"))
        self.cells = grid.cells(recipe, self.domains)
        self._runs: dict[str, Run] = {}

    def run_of(self, variant: Variant) -> Run:
        """The run of a variant; what it has looked up is remembered."""
        assert variant.recipe is not None
        key = grid.key_of(variant)
        if key not in self._runs:
            self._runs[key] = StudyRun(self.out, variant.recipe, wait=self.wait,
                                       build=self.build, earlier=not self.build)
        return self._runs[key]

    def check(self, cell: Cell) -> Run:
        """The run of a cell.

        Raises:
            UserError: the cell is impossible.
        """
        if cell.variant.recipe is None:
            raise UserError(cell.variant.reason)
        run = self.run_of(cell.variant)
        run.recipe = replace(run.recipe, methods=[cell.method])
        trained.check(run.recipe)
        trained.check_tokens(run)
        return run

    def make(self, cell: Cell) -> None:
        """Train and evaluate one cell.

        Raises:
            UserError: it is impossible.
            Busy: another worker makes something that it needs.
        """
        run = self.check(cell)
        self.make_longer(cell)
        made = trained.specialize(run, cell.method, cell.domain)
        evaluations(run, made)
        made.routed()

    def make_longer(self, cell: Cell) -> None:
        """Make the longest pretrainings of the grid that those of ``cell`` may branch off.

        Only before its own are finished. Where one fails, which is told with its own cell, the
        next longest takes its place, or none.

        Raises:
            Busy: another worker makes one of them.
        """
        chains = [found for name in sharing.generic(cell.method)
                  if (found := sharing.longer(name, cell, self.cells))]
        if not chains or self._is_pretrained(cell):
            return
        for chain in chains:
            for longer in chain:
                try:
                    trained.pretrain(self.check(longer), longer.method, longer.domain)
                    break
                except Busy:
                    raise
                except Exception:
                    continue

    def _is_pretrained(self, cell: Cell) -> bool:
        assert cell.variant.recipe is not None
        finished = Run(self.out, cell.variant.recipe, build=False)
        try:
            trained.pretrain(finished, cell.method, cell.domain)
        except Missing:
            return False
        return True

    def row(self, cell: Cell) -> dict[str, Any]:
        """A finished cell's row, with the likelihoods of its test documents.

        Raises:
            Missing: it is not finished.
            UserError: it is impossible.
        """
        run = self.check(cell)
        made = trained.specialize(run, cell.method, cell.domain)
        before, after = evaluations(run, made)
        nll, tokens = units(after)
        curve = [(r["tokens"], r["validation"]) for r in training.metrics_of(made.tuned)
                 if "validation" in r]
        outcome = training.outcome_of(made.tuned)
        return {
            **row(run, made), "settings": cell.settings,
            "nll_after": nll.tolist(), "tokens": tokens.tolist(),
            "nll_before": units(before)[0].tolist() if before else None,
            "finetuning": {"best_step": outcome["best_step"], "steps": outcome["steps"],
                           "validation": curve},
        }

    def failed(self, cell: Cell) -> Path:
        """The note of why a cell failed."""
        return self.out / _FAILED / f"{cell.id}.json"


def models(recipe: Recipe, out: Path) -> list[tuple[Recipe, str, str]] | None:
    """Recipe, method and domain of every possible cell; None where the domains are not known."""
    try:
        cells = Study(recipe, out, build=False).cells
    except Missing:
        return None
    return [(replace(of, methods=[cell.method]), cell.method, cell.domain)
            for cell in cells if (of := cell.variant.recipe)]


def study(recipe: Recipe, out: Path, suite: Suite, workers: int | None = None,
          only_report: bool = False) -> Path:
    """Make every cell of the recipe's grid, then tables, figures and the page.

    Args:
        suite: the tables and claims.
        workers: processes that share the work, one per GPU (default: one for each that there is;
            of a Ray cluster without GPUs one for each machine).
        only_report: make nothing; show what is finished.

    Returns:
        The page.

    Raises:
        UserError: the grid is wrong; or, told after the page is written, a worker stopped or cells
            failed that are not impossible.
    """
    grid.check(recipe)  # before the folder is touched
    if only_report:
        return report(recipe, out, suite)[0]
    corpus.check(recipe)
    with Run(out, recipe).opened() as this:
        if this.first:
            shutil.rmtree(out / _FAILED, ignore_errors=True)  # another start, another try
        many = workers or max(torch.cuda.device_count(), 1)
        stopped = None
        if this.executor.spreads:
            stopped = spread_on_cluster(this, workers)
        elif many > 1:
            if status := spread(recipe, out, many):
                stopped = f"a worker of the study stopped with status {status}"
        else:
            work(Study(recipe, out, wait=not this.executor.shares))
        try:
            page, failed = report(recipe, out, suite)
        finally:
            if stopped:
                raise UserError(f"{stopped}; the same command goes on from what is finished")
        if failed:
            many, first = len(failed), failed[0]
            raise UserError(f"{many} cell{'s' * (many > 1)} failed, {first['method']} on "
                            f"{first['domain']} as: {first['reason']}; {page} has the others, and "
                            "the same command tries again")
        return page


def report(recipe: Recipe, out: Path, suite: Suite) -> tuple[Path, list[dict[str, Any]]]:
    """Tables, figures and the page of what is finished, also while others work in the folder.

    Returns:
        The page, and what it says of the cells that failed.

    Raises:
        UserError: there is nothing to tell the domains from.
    """
    say("gathering what is finished")
    try:
        finished = Study(recipe, out, build=False)
    except Missing as stage:
        raise UserError(f"nothing of the study is finished in {out} (its stage '{stage}' is "
                        "missing): run it without --report") from None
    return conclude(finished, suite)


def work(this: Study) -> None:
    """Make the cells one after the other; come back to those that wait for another worker."""
    corpus.kept(this.base)
    clusters.clusters(this.base)
    began, made, total = time.monotonic(), 0, len(this.cells)
    settled = claims.in_turns([partial(_settle, this, cell) for cell in this.cells],
                              lambda busy: this.base.pause(_PAUSE))
    for many, (number, new) in enumerate(settled, 1):
        if new:
            made += 1
            spent = time.monotonic() - began
            say(f"cell {many} of {total}: {this.cells[number].name}; {duration(spent)} so far, "
                f"about {duration(spent / made * (total - many))} left")


def _settle(this: Study, cell: Cell) -> bool:
    """Make a cell, or tell and note why it failed; whether there was something to make.

    Raises:
        Busy: another worker makes something that it needs.
    """
    before = _stages_made(this)
    try:
        this.make(cell)
    except Busy:
        raise
    except Exception as error:
        reason = told(error, this.out, cell.id)
        say(f"cell left out: {cell.name}: {reason}")
        write_json(this.failed(cell), {"reason": reason})
        return False
    this.failed(cell).unlink(missing_ok=True)
    return _stages_made(this) > before


def _stages_made(this: Study) -> int:
    return len(this.base.made) + sum(len(run.made) for run in this._runs.values())


@shard_function
def make_cells(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Make cells as one of the workers of a cluster."""
    with joined(item) as (recipe, out):
        work(Study(recipe, out, wait=False))
    return {}


def spread_on_cluster(this: Run, workers: int | None) -> str | None:
    """Let workers of the executor's cluster make the cells; why they stopped before the end."""
    whole = Study(this.recipe, this.out)
    corpus.kept(whole.base)
    clusters.clusters(whole.base)
    try:
        this.spread("cells", make_cells, len(whole.cells), workers)
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
    share = {arithmetic.SHARING: str(sharing)}
    if gpus:
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = mask.split(",") if mask else [str(gpu) for gpu in range(gpus)]
        share["CUDA_VISIBLE_DEVICES"] = names[number % gpus].strip()
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(torch.get_num_threads() // workers, 1))
    return share


def conclude(this: Study, suite: Suite) -> tuple[Path, list[dict[str, Any]]]:
    """``study.json``, the tables and the page of what is finished, and the cells that failed."""
    rows, impossible, failed, pending = [], [], [], []
    for cell in this.cells:
        entry = {"method": cell.method, "domain": cell.domain, "settings": cell.settings}
        try:
            rows.append(this.row(cell))
        except UserError as error:
            impossible.append({**entry, "reason": str(error)})
        except Missing:
            note = this.failed(cell)
            if note.exists():
                failed.append({**entry, **read_json(note)})
            else:
                pending.append(entry)
    results = {
        "name": this.recipe.name, "recipe": this.recipe.to_dict(), "device": devices.here(),
        "domains": this.domains, "rows": rows,
        "cost": ledger.add_up([this.out])["total"] if rows else None,
        "skipped": impossible + failed, "pending": pending, "entropies": dict(_entropies(this)),
    }
    say(f"{len(rows)} cells are finished, {len(impossible)} impossible, {len(failed)} failed, "
        f"{len(pending)} not made yet")
    with this.base.claimed(this.out / "report"):
        return publish(results, suite, this.out), failed


def publish(results: Mapping[str, Any], suite: Suite, out: Path) -> Path:
    """Tables, figures, page and README of what ``study.json`` holds, all of them or none."""
    made = views.view(results, suite)
    with replacing(out, ".report") as folder:
        written = views.write(results, made, folder).name
    say(f"tables: {out / 'tables'}")
    say(f"page: {out / written}")
    return out / written


def again(file: Path, out: Path, suites: Callable[[str], Suite]) -> Path:
    """The same of a study's file, whatever became of its run folder.

    Args:
        suites: by the name in its recipe.

    Raises:
        UserError: the file is not a study's.
    """
    results = read_json(file)
    if (not isinstance(results, dict) or not {"name", "recipe", "rows"} <= results.keys()
            or not isinstance(results["rows"], list)
            or not all("settings" in row for row in results["rows"])):
        raise UserError(f"{file} is not a study.json: give the file that 'planearly study' wrote")
    asked = look_up(results["recipe"], "study.suite") or keys.Study().suite  # 0.1 names none
    return publish(results, suites(asked), out)


def _entropies(this: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cluster histograms of the domains and of the generic corpus, by number of clusters."""
    try:
        clustered = clusters.clusters(this.base)
        everything = TokenDataset(corpus.generic(this.base))
    except Missing:
        return
    ks = sorted(set(this.recipe.cluster.k))

    def of(assignments: Path, dataset: TokenDataset, windows: Any) -> dict[str, Any]:
        share = dataset.windows["length"][windows].astype(float) / dataset.context
        return {str(k): histogram.summary(_counts(assignments / f"assignment-{k}.npy", windows,
                                                  share, k)) for k in ks}

    yield "generic", of(clustered, everything, slice(None))
    for name in this.domains:
        try:
            mine = clusters.domain_clusters(this.base, name)
            dataset, used = corpus.specialization_windows(this.base, name)
        except Missing:
            continue
        yield name, of(mine, dataset, used)


def _counts(assignment: Path, windows: Any, share: np.ndarray, k: int) -> np.ndarray:
    return np.bincount(read_array(assignment)[windows], share, k)
