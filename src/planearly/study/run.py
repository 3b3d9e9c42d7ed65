"""``planearly study``: every cell of a grid, in one run folder, by one process or several.

Then what they came to: ``study.json``, tables, figures and the page, of what is finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planearly import keys, parallel
from planearly.cluster import histogram
from planearly.config import look_up
from planearly.cost import devices, ledger
from planearly.data.dataset import TokenDataset
from planearly.errors import UserError
from planearly.files import read_array, read_json, replacing
from planearly.keys import Recipe
from planearly.progress import say
from planearly.stages import adapt, clusters, corpus
from planearly.stages.folder import Missing, Run
from planearly.stages.workers import can_spread
from planearly.study import grid
from planearly.study import view as views
from planearly.study.cells import FAILED, SETTLED, Study, reason_in
from planearly.study.spec import Suite
from planearly.study.workers import spread, spread_on_cluster, work


def study(recipe: Recipe, out: Path, suite: Suite, workers: int | None = None,
          only_report: bool = False) -> Path:
    """Make every cell of the recipe's grid, then tables, figures and the page.

    Args:
        suite: the tables and claims.
        workers: processes that share the work, one per GPU (default: one for each that there is;
            of a Ray cluster without GPUs one for each machine; under ``torchrun`` its processes
            make each training together, and there are no others).
        only_report: make nothing; show what is finished.

    Returns:
        The page.

    Raises:
        UserError: the grid is wrong; or, told after the page is written, a worker stopped or cells
            failed that are not impossible.
    """
    grid.check(recipe)  # before the folder is touched
    _check_place(out)
    if only_report:
        return report(recipe, out, suite)[0]
    for told in dict.fromkeys(_unread(recipe)):
        say(told)
    corpus.check(recipe)
    with Run(out, recipe).opened() as this:
        if this.first:
            for notes in (FAILED, SETTLED):  # another start, another try
                shutil.rmtree(out / notes, ignore_errors=True)
        many = (workers or max(torch.cuda.device_count(), 1)) if parallel.world() == 1 else 1
        stopped = None
        if can_spread(this):
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
        UserError: nothing is finished.
    """
    say("gathering what is finished")
    try:
        finished = Study(recipe, out, build=False)
    except Missing as stage:
        raise UserError(f"nothing of the study is finished in {out} (its stage '{stage}' is "
                        "missing): run it without --report") from None
    return conclude(finished, suite)


def conclude(this: Study, suite: Suite) -> tuple[Path, list[dict[str, Any]]]:
    """``study.json``, the tables and the page of what is finished, and the cells that failed.

    Raises:
        UserError: no cell is finished, none has failed and none is impossible.
    """
    rows, impossible, failed, pending = [], [], [], []
    for cell in this.cells:
        entry = {"method": cell.method, "domain": cell.domain, "settings": cell.settings}
        try:
            rows.append(this.row(cell))
        except UserError as error:
            impossible.append({**entry, "reason": str(error)})
        except Missing:
            if (reason := reason_in(this.failed(cell))) is not None:
                failed.append({**entry, "reason": reason})
            else:
                pending.append(entry)
    if not (rows or impossible or failed):
        raise UserError(f"none of the study's {len(pending)} cells is finished in {this.out}: run "
                        "it without --report")
    results = {
        "name": this.recipe.name, "recipe": this.recipe.to_dict(), "device": devices.here(),
        "domains": this.domains, "rows": rows,
        "cost": ledger.add_up([this.out])["total"] if rows else None,
        "skipped": impossible + failed, "pending": pending, "entropies": dict(_entropies(this)),
    }
    say(f"{len(rows)} cells are finished, {len(impossible)} impossible, {len(failed)} failed, "
        f"{len(pending)} not made yet")
    if parallel.rank() > 0:  # the first process writes
        return this.out, failed
    with this.base.claimed(this.out / "report"):
        return publish(results, suite, this.out), failed


def publish(results: Mapping[str, Any], suite: Suite, out: Path) -> Path:
    """Tables, figures, page and README of what ``study.json`` holds, all of them or none."""
    return _written(results, views.view(results, suite), out)


def _written(results: Mapping[str, Any], made: views.View, out: Path) -> Path:
    _check_place(out)
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
    try:
        if not all("settings" in row for row in results["rows"]):
            raise KeyError("settings")
        asked = look_up(results["recipe"], "study.suite") or keys.Study().suite  # 0.1 names none
        suite = suites(asked)
        made = views.view({"name": results["name"], **results}, suite)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a study.json as 'planearly study' writes it ({error!r}): "
                        "give one that it wrote") from error
    return _written(results, made, out)


def _unread(recipe: Recipe) -> Iterator[str]:
    """What :func:`planearly.stages.adapt.unread` says of the grid's cells."""
    for block in recipe.study.grid:
        shares = {key: values for key, values in block.over.items()
                  if key.endswith(".specialization_share")}
        for variant in grid.variants(recipe, replace(block, over=shares)):
            if variant.recipe and (told := adapt.unread(variant.recipe, block.methods)):
                yield told


def _check_place(out: Path) -> None:
    """Refuse a folder with a page, say, that no study wrote, since it would be replaced."""
    for name in views.MADE if not (out / views.RESULTS).exists() else ():
        if (out / name).exists():
            raise UserError(f"{out / name} is of something else, and a study would replace it: "
                            "choose another --out")


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
        return {str(k): histogram.summary(_counts(
            assignments / f"assignment-{k}.npy", windows, share, k)) for k in ks}

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
