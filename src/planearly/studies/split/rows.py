"""The ways to spend a budget that a study has, and what each costs for a number of domains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from planearly.studies.paper.rows import total
from planearly.study.compare import BUDGET, Arm, Cells, mean_cost
from planearly.study.spec import Line, Rows, shown

ADAPT, BLENDS, MIXED = "adapt.specialization_share", "projected.blends", (
    "pretrain.specialization_share")
SHORT = {ADAPT: "own text", MIXED: "own text", BLENDS: "blends"}
NEAR = 1.1
"""Factor up to which two costs are equal."""


def ways(cells: Cells) -> list[Line]:
    """Every method at every setting of the grid, at the recipe's own seed."""
    lines: dict[str, Line] = {}
    for row in cells.all_rows:
        settings = {key: value for key, value in row["settings"].items() if key != "seed"}
        changes = {key: value for key, value in settings.items()
                   if key != BUDGET and value != cells.own(key)}
        said = ", ".join(f"{SHORT.get(key, key)} {_value(key, value)}"
                         for key, value in changes.items())
        name = ", ".join(filter(None, [row["method"], said]))
        lines.setdefault(f"{name} {settings.get(BUDGET)}", Line(
            {"method": row["method"], "setting": said, "series": name},
            Arm(row["method"], settings), Arm("slm", {BUDGET: settings[BUDGET]})
            if BUDGET in settings else Arm("slm")))
    return list(lines.values())


def _value(key: str, value: Any) -> str:
    return f"{value:.0%}" if key in (ADAPT, MIXED) else shown(value, key)


def cost(cells: Cells, arm: Arm, domains: int) -> float:
    """C(N) of an arm in FLOPs: generic once, N times the mean of a domain."""
    rows = list(cells.rows(arm).values())
    once, each = (mean_cost(rows, part)["flops"] for part in ("generic_cost",
                                                              "specialization_cost"))
    return once + domains * each


def as_dear(cells: Cells, method: str, as_arm: Arm, domains: int) -> Arm | None:
    """The budget of a method whose C(N) is nearest another arm's; None where none is about it."""
    wanted = cost(cells, as_arm, domains)
    found = {arm_cost: arm for budget in cells.values(Arm(method), BUDGET)
             if (arm_cost := cost(cells, arm := Arm(method, {BUDGET: budget}), domains))}
    if not found or not wanted:
        return None
    nearest = min(found, key=lambda each: abs(math.log(each / wanted)))
    return found[nearest] if abs(math.log(nearest / wanted)) <= math.log(NEAR) else None


def by_total(n: int) -> Callable[[Cells, Rows], Rows]:
    """Rows with their C(N) and whether they are on the front, cheapest first."""
    return lambda cells, rows: sorted(
        total(n)(cells, rows), key=lambda row: (row["total_flops"], row["after"]))
