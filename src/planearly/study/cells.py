"""The cells of a study: made, looked up when they are finished, and why some fail.

A cell is made by the stages that ``planearly run`` has, in the same folder, so what cells share is
made once, what is finished is never made again, and an interrupted stage goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planearly.engine.work import PAUSE, TRIES, passes
from planearly.errors import UserError
from planearly.files import atomic_write, read_object, write_json
from planearly.keys import Recipe
from planearly.progress import say
from planearly.stages import clusters, corpus, trained, training
from planearly.stages.claims import Busy
from planearly.stages.evaluate import evaluations, row, units
from planearly.stages.folder import Missing, Run
from planearly.study import grid, sharing
from planearly.study.grid import Cell, Variant

FAILED = ".failed"
"""Folder of the notes of why cells failed since the study was started."""
SETTLED = ".settled"
"""Folder of a note for each cell that any worker has gone through since the study was started."""
_STAGES = "stages"


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
        note = self.out / FAILED / _STAGES / f"{name.replace('/', '--')}-{folder.name[-8:]}.json"
        if self.build and (reason := reason_in(note)) is not None:
            raise UserError(reason)
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


def reason_in(note: Path) -> str | None:
    """Why something failed, as it was noted; None: it did not, or the note is damaged."""
    with contextlib.suppress(UserError):
        return str(read_object(note, "reason")["reason"])
    return None


def told(error: Exception, out: Path, name: str) -> str:
    """A sentence for a failure; the traceback of an unforeseen one is kept beside the notes."""
    if isinstance(error, UserError):
        return str(error)
    log = Path(FAILED) / f"{name}.log"
    with atomic_write(out / log, "w") as handle:
        handle.write("".join(traceback.format_exception(error)))
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (traceback: {log} in the study's folder)"


def check_domains(run: Run) -> None:
    """Refuse domains without texts.

    Raises:
        UserError: one is given by its histogram.
    """
    if given := list(corpus.histograms(run)):
        raise UserError(f"the domain '{given[0]}' is given by its histogram, and a study "
                        "fine-tunes and evaluates on its texts: give its documents, or leave it "
                        "out")


class Study:
    """The cells of a recipe in a run folder."""

    def __init__(self, recipe: Recipe, out: Path, *, wait: bool = True, build: bool = True) -> None:
        self.recipe, self.out, self.wait, self.build = recipe, out, wait, build
        # of what all cells need: worth waiting for
        self.base = Run(out, recipe, build=build, earlier=not build)
        self.domains = list(corpus.needed_domains(self.base, "a study"))
        check_domains(self.base)
        self.cells = grid.cells(recipe, self.domains)
        self.pretrainings = sharing.Pretrainings(self.cells)
        self._runs: dict[str, Run] = {}
        self._finished: dict[str, Run] = {}

    def make_common(self) -> None:
        """Make what all cells need."""
        corpus.kept(self.base)
        clusters.clusters(self.base)

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

    def make(self, cell: Cell) -> Path:
        """Train and evaluate one cell.

        Returns:
            The stage of its fine-tuned model.

        Raises:
            UserError: it is impossible.
            Busy: another worker makes something that it needs.
        """
        run = self.check(cell)
        self.make_longer(cell)
        made = trained.specialize(run, cell.method, cell.domain)
        evaluations(run, made)
        made.routed()
        made.routed(cell.domain)
        return made.tuned

    def make_longer(self, cell: Cell) -> None:
        """Make the longest pretrainings of the grid that those of ``cell`` may branch off.

        Only before its own are finished. Where one fails, which is told with its own cell, the
        next longest takes its place, or none.

        Raises:
            Busy: another worker makes one of them.
        """
        chains = [(name, found) for name in sharing.generic(cell.method)
                  if (found := self.pretrainings.longer(name, cell))]
        if not chains or self._is_pretrained(cell):
            return
        for name, chain in chains:
            for longer in chain:
                try:
                    run = self.check(longer)
                    trained.pretrained(run, name, longer.domain, sharing.teacher_tokens(
                        name, longer.method, run.recipe))
                    break
                except Busy:
                    raise
                except Exception:
                    continue

    def _is_pretrained(self, cell: Cell) -> bool:
        assert cell.variant.recipe is not None
        key = grid.key_of(cell.variant)
        finished = self._finished.setdefault(
            key, Run(self.out, cell.variant.recipe, build=False))
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
        try:
            routed = made.routed(cell.domain)
        except Missing:  # as an older version finished it
            routed = None
        curve = [(r["tokens"], r["validation"]) for r in training.metrics_of(made.tuned)
                 if "validation" in r]
        outcome = training.outcome_of(made.tuned)
        return {
            **row(run, made), "settings": cell.settings,
            "nll_after": nll.tolist(), "tokens": tokens.tolist(),
            "nll_before": units(before)[0].tolist() if before else None,
            "nll_routed": units(routed)[0].tolist() if routed else None,
            "finetuning": {"best_step": outcome["best_step"], "steps": outcome["steps"],
                           "validation": curve},
        }

    def stages_made(self) -> int:
        """How many stages of its cells and of what they share were made here."""
        return len(self.base.made) + sum(len(run.made) for run in self._runs.values())

    def failed(self, cell: Cell) -> Path:
        """The note of why a cell failed."""
        return self.out / FAILED / f"{cell.id}.json"

    def settle(self, cell: Cell, when: float) -> None:
        """Note for all workers when a cell's model was finished, in seconds since the epoch; 0:
        never, it failed."""
        note = self.out / SETTLED / cell.id
        note.parent.mkdir(exist_ok=True)
        note.touch()
        os.utime(note, (when, when))

    def settled(self) -> dict[str, float]:
        """When the models of the cells with a note were finished, by the cells' ids."""
        folder = self.out / SETTLED
        return {note.name: note.stat().st_mtime for note in folder.iterdir()
                } if folder.exists() else {}


def models(recipe: Recipe, out: Path) -> list[tuple[Recipe, str, str]] | None:
    """Recipe, method and domain of every possible cell; None where the domains are not known."""
    try:
        cells = Study(recipe, out, build=False).cells
    except Missing:
        return None
    return [(replace(of, methods=[cell.method]), cell.method, cell.domain)
            for cell in cells if (of := cell.variant.recipe)]
