"""What a study will hold and cost, before anything of it runs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from planearly import config
from planearly.cost import devices
from planearly.errors import UserError
from planearly.keys import Recipe
from planearly.plan import predict
from planearly.progress import PlainTable, progress, say
from planearly.stages import corpus, trained
from planearly.stages.folder import Run
from planearly.study import grid, sharing
from planearly.study.cells import check_domains
from planearly.study.grid import Cell
from planearly.units import duration, prefixed, short


def forecast(recipe: Recipe, device: str = "here", workers: int | None = None) -> dict[str, Any]:
    """The cells of a study, and the work of every training that they need, each counted once.

    Of a pretraining that branches off a longer one the steps of its own are counted, as in the
    ledger's total.

    Args:
        device: what it runs on; of this machine (``here``) all GPUs are used.
        workers: as of ``planearly study`` on this machine.

    Returns:
        ``cells`` (their number), ``impossible`` (list of ``cell`` and ``reason``), ``stages``
        (number of trainings), ``params`` (sizes of each kind of model, ascending), ``slices`` (why
        projected networks have so many, where the recipe leaves them open), and ``methods``: name
        to ``cells``, ``tokens``, ``flops``, ``device_hours`` and ``money``; ``total``, their sum;
        ``device``, a ``note`` on its hours ("": none), ``workers``, and the ``hours`` that they
        take on this machine (None: on another).

    Raises:
        UserError: no grid, no generic corpus, a domain without texts, or unknown sizes of the
            domains.
    """
    gpus = max(torch.cuda.device_count(), 1)
    many = workers or gpus
    here = device.lower() == "here" and recipe.engine != "ray"
    each = -(-many // gpus) if here else 1

    @functools.cache
    def on(precision: str) -> devices.Device:
        return devices.find_or_nearest(device, devices.in_bf16(precision), each)

    known, notes, precisions = on(recipe.pretrain.precision), dict[str, None](), set[str]()
    cells = grid.cells(recipe, predict.domain_names(recipe))
    corpus.check_named(recipe)
    # where the domains are does not hang on the corpus, which may be still to make
    check_domains(Run(Path(), replace(recipe, generic=[]), build=False))
    impossible: list[dict[str, str]] = []
    stages: list[tuple[Cell, dict[str, Any]]] = []
    seen: set[str] = set()
    possible = []
    counts: dict[str, int] = {}
    params: dict[str, set[int]] = {}
    slices: dict[str, None] = {}
    with progress("forecast", len(cells), "cells") as meter:
        for cell in cells:
            meter.advance(1)
            made = cell.variant.recipe
            try:
                if made is None:
                    raise UserError(cell.variant.reason)
                made = replace(made, methods=[cell.method], domains=[cell.domain])
                trained.check(made)
            except UserError as error:
                impossible.append({"cell": cell.name, "reason": str(error)})
                continue
            possible.append(cell)
            counts[cell.method] = counts.get(cell.method, 0) + 1
            if recipe.projected.rank is None and "projected.rank" not in dict(cell.variant.changes):
                made = config.variant(made, {"projected.rank": None})  # for the reason
            precisions.add(made.pretrain.precision)
            found = predict.predict(made, on(made.pretrain.precision))
            notes |= {found["note"]: None} if found["note"] else {}
            slices |= {found["slices"]: None} if found["slices"] else {}
            for name, size in found["params"].items():
                params.setdefault(name, set()).add(size)
            stages += [(cell, work) for work in _new(found["stages"], cell, seen)]
    methods: dict[str, Any] = {
        name: {"cells": n, "tokens": 0.0, "flops": 0.0, "device_hours": 0.0, "money": None}
        for name, n in counts.items()}
    total: dict[str, Any] = {"tokens": 0.0, "flops": 0.0, "device_hours": 0.0, "money": None}
    pretrainings = sharing.Pretrainings(possible)
    for cell, work in stages:
        own = 1 - pretrainings.begun(work["stage"], cell)
        for sums in (methods[cell.method], total):
            for key in ("tokens", "flops", "device_hours", "money"):
                if work[key] is not None:
                    sums[key] = (sums[key] or 0.0) + own * work[key]
    used = [on(precision) for precision in precisions]
    if each > 1 and any(one.sharing == 1 for one in used):
        notes[f"hours are of one worker at a time: `planearly calibrate` with this recipe and "
              f"--workers {each} measures {each} side by side"] = None
    return {"name": recipe.name, "device": known.label, "note": "; ".join(notes),
            "cells": len(cells),
            "workers": many,
            "hours": total["device_hours"] * (
                each / many if known.sharing == each else 1 / min(many, gpus)) if here else None,
            "impossible": impossible, "stages": len(stages),
            "params": {name: sorted(sizes) for name, sizes in params.items()},
            "slices": list(slices),
            "methods": methods, "total": total}


def added(cells: Sequence[Cell]) -> list[float]:
    """Work that each cell adds to that of the cells before it: FLOPs of its trainings, 0 where it
    is impossible; or 1 for every cell, where the sizes of the specialization sets are not known."""
    shared, known = sharing.Pretrainings(cells), devices.find_or_nearest()
    seen: set[str] = set()

    def of(cell: Cell) -> float:
        if cell.variant.recipe is None:
            return 0.0
        made = replace(cell.variant.recipe, methods=[cell.method], domains=[cell.domain])
        return sum((1 - shared.begun(work["stage"], cell)) * work["flops"]
                   for work in _new(predict.predict(made, known)["stages"], cell, seen))

    try:
        return [of(cell) for cell in cells]
    except UserError:
        return [1.0] * len(cells)


def _new(stages: Iterable[dict[str, Any]], cell: Cell, seen: set[str]) -> list[dict[str, Any]]:
    """The trainings of a cell that are not among those ``seen``, which they join."""
    found = {str(sharing.identity(work["stage"], cell)): work for work in stages}
    new = [work for name, work in found.items() if name not in seen]
    seen.update(found)
    return new


def show(found: dict[str, Any]) -> None:
    """The forecast on standard output."""
    table = PlainTable("method", "cells", "tokens", "FLOPs", "device time", "money",
                       title=escape(f"{found['name']} on {found['device']}"))
    for name, sums in [*found["methods"].items(), ("all", found["total"])]:
        table.add_row(
            name, str(sums.get("cells", found["cells"])), short(sums["tokens"]),
            prefixed(sums["flops"]), duration(sums["device_hours"] * 3600),
            "-" if sums["money"] is None else f"{sums['money']:.2f}")
    Console(width=None if Console().is_terminal else 120).print(table)
    sizes = ", ".join(f"{name} {' to '.join(short(n) for n in (*each[:1], *each[1:][-1:]))}"
                      for name, each in found["params"].items())
    say(f"{found['cells']} cells, {found['stages']} trainings; parameters: {sizes}")
    for why in found["slices"]:
        say(f"projected network: {why}")
    if found["hours"] is not None and found["workers"] > 1:
        say(f"{found['workers']} workers here: about {duration(found['hours'] * 3600)}")
    if found["note"]:
        say(found["note"])
    for one in found["impossible"]:
        say(f"impossible: {one['cell']}: {one['reason']}")
