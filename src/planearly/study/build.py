"""What most tables of a study are made of: lines of macro averages over the same domains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planearly.study import compare
from planearly.study.compare import (
    Arm,
    Cells,
    Row,
    blocks,
    difference,
    macro,
    mean_cost,
    mean_log,
    shared,
)
from planearly.study.table import Axis, Column, Figure, Table
from planearly.units import short

PAPER = ("slm", "slm-nopt", "slm-d", "slm-is", "slm-mix", "slm-pn", "llm", "llm-lora")
"""The paper's methods, in the order of its tables."""
EXPERTS = ("slm-pn", "slm-mix")
"""Those with experts to choose or blend."""

METHOD = Column("method", "method", "text")
SET = Column("set", "specialization set", "tokens")
SETTING = Column("setting", "setting", "text")
COST = [Column("tokens", "training tokens, one domain", "tokens"),
        Column("flops", "training FLOPs, one domain", "flops"),
        Column("hours", "device-hours, one domain", "hours")]
BEFORE = [Column("before", "perplexity before fine-tuning", "perplexity"),
          Column("before_ci", "95% interval", "interval")]
AFTER = [Column("after", "perplexity after fine-tuning", "perplexity"),
         Column("after_ci", "95% interval", "interval")]
PAIRED = [Column("difference", "nats per token, against the baseline", "nats"),
          Column("difference_ci", "95% interval", "interval")]
BUDGET = Column("budget", "pretraining tokens", "tokens")
OVER = Column("over", "averaged over", "text")
GENERIC = [Column("generic", "generic perplexity", "perplexity"),
           Column("generic_ci", "95% interval", "interval")]
AFTER_AXIS = Axis("after", "perplexity after fine-tuning")


@dataclass(frozen=True)
class Line:
    """A row of a table: what is said of it, its cell, and the cell it is compared with."""

    labels: dict[str, Any]
    arm: Arm
    against: Arm | None = None
    further: dict[str, Any] = field(default_factory=dict)


def macro_table(
    cells: Cells, lines: Iterable[Line], labels: Sequence[Column], *, name: str, title: str,
    paper: str, note: str, figure: Figure | None = None, before: bool = False,
    extra: Sequence[Column] = (), least: int = 2, apart: bool = False,
) -> list[Table]:
    """A table of macro averages; rows that are averaged over the same domains stand together.

    The figure shows the domains that the most rows have: averages over others cannot be held
    against them.

    Args:
        before: with the perplexity before fine-tuning.
        extra: further columns of :func:`facts_of`.
        least: rows below which there is nothing to see.
        apart: rows are held against their own baselines alone, each over all domains of both.

    Returns:
        the table; an empty list if too few lines have rows.
    """
    found = [line for line in lines if cells.rows(line.arm)]
    if len(found) < least:
        return []
    parts = blocks(cells, [line.arm for line in found])
    drawn = max(parts, key=lambda part: len(part[1]))
    if apart:
        parts = [(shared(cells, [arm for arm in (line.arm, line.against) if arm]), [line.arm])
                 for line in found]
    rows = [row_of(cells, line, domains) | {"drawn": domains == drawn[0]}
            for domains, arms in sorted(parts, key=lambda part: -len(part[0]))
            for line in found if line.arm in arms and domains]
    compared = any(row["difference"] is not None for row in rows)
    columns = [*labels, *([OVER] if len(parts) > 1 else []), *(BEFORE if before else []), *AFTER,
               *(PAIRED if compared else []), *extra, *COST]
    return [Table(name, title, paper, " ".join(filter(None, [
        note, coverage(cells, [domains for domains, _ in parts]),
        f"The figure is over {over(cells, drawn[0])}." if figure and len(parts) > 1 else "",
        "Below 0, a difference is in the row's favour." if compared else ""])),
        columns, rows, figure)]


def row_of(cells: Cells, line: Line, domains: Sequence[str]) -> dict[str, Any]:
    """Everything about a line over ``domains``, which its arm has."""
    rows = [cells.rows(line.arm)[domain] for domain in domains]
    after, before = macro(rows), macro(rows, "before")
    paired = None
    if line.against and not cells.same(line.against, line.arm):
        paired = difference(cells, line.arm, line.against, domains)
        if paired and len(paired.domains) < len(domains):
            paired = None
    return {
        **facts_of(cells, line.arm, rows), **line.further, **line.labels,
        "over": over(cells, domains),
        "before": before["perplexity"] if before else None,
        "before_ci": before["ci95"] if before else None,
        "after": after["perplexity"] if after else None,
        "after_ci": after["ci95"] if after else None,
        "difference": paired.nats if paired else None,
        "difference_ci": paired.interval if paired else None,
    }


def facts_of(cells: Cells, arm: Arm, rows: Sequence[Row]) -> dict[str, Any]:
    """What the cells know of an arm beside its perplexity: sizes, costs, generic perplexity."""
    cost, generic, own = (mean_cost(rows, part)
                          for part in ("cost", "generic_cost", "specialization_cost"))
    intervals = [row.get("generic_ppl_ci") for row in rows]  # one, where one model serves all
    return {
        "method": arm.method, "set": mean(rows, "spec_tokens"),
        "budget": arm.changes.get(compare.BUDGET, cells.main(arm.method, compare.BUDGET)),
        "domains": len(rows),
        "generic": mean_log([row.get("generic_ppl") for row in rows]),
        "generic_ci": intervals[0] if all(ci == intervals[0] for ci in intervals) else None,
        "generic_after": mean_log([row.get("generic_ppl_after") for row in rows]),
        "expert_share": mean(rows, "expert_share"), "best_step": mean(rows, "best_step"),
        "tokens": cost["tokens"], "flops": cost["flops"], "hours": cost["device_hours"],
        "generic_tokens": generic["tokens"], "generic_flops": generic["flops"],
        "generic_hours": generic["device_hours"],
        "own_tokens": own["tokens"], "own_flops": own["flops"], "own_hours": own["device_hours"],
    }


def mean(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a field of the rows; None where one lacks it."""
    values = [row.get(key) for row in rows]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def sweep(cells: Cells, methods: Iterable[str], key: str, against: Arm | None = None,
          beside: str | None = None) -> list[Line]:
    """Lines of methods at each value of one setting, others being those of the main comparison.

    A method with a single value is left out. ``against`` None compares with the method at its main
    value; otherwise with ``against``, at its main settings too.

    Args:
        beside: a setting that may change along with ``key``.
    """
    lines = []
    for method in methods:
        arms = {}
        for value in cells.values_of(key):
            others = cells.values_of(beside) if beside and beside in cells.base else []
            tried = [Arm(method, {key: value}),
                     *(Arm(method, {key: value, str(beside): other}) for other in others)]
            if found := [arm for arm in tried if cells.rows(arm)]:
                arms[value] = found[0]
        for value, arm in arms.items() if len(arms) > 1 else ():
            lines.append(Line({"method": method, "setting": shown(value, key)}, arm,
                              against or Arm(method, {key: cells.main(method, key)}),
                              {"x": value}))
    return lines


def methods(cells: Cells) -> list[str]:
    """The paper's methods that the study has, in the paper's order."""
    return [method for method in PAPER if method in cells.methods]


def by_size(cells: Cells, chosen: list[str]) -> list[Line]:
    """Methods at each specialization size, against slm at that size."""
    return [Line({"method": method}, Arm(method, {"spec_tokens": size}),
                 Arm("slm", {"spec_tokens": size}))
            for method in chosen for size in cells.values(Arm(method), "spec_tokens")]


def by_budget(cells: Cells) -> list[Line]:
    """Methods at each pretraining budget and set size, blends of experts among them."""
    lines = []
    for size in cells.values_of("spec_tokens"):
        for method in methods(cells):
            blend = {"expert": "blend"} if cells.own("expert") != "blend" else None
            for rule in ({}, blend) if method in EXPERTS and blend else ({},):
                for budget in cells.values(Arm(method, {"spec_tokens": size, **rule}),
                                           compare.BUDGET):
                    changes = {"spec_tokens": size, compare.BUDGET: budget}
                    lines.append(Line({"method": f"{method}, blend" if rule else method},
                                      Arm(method, {**changes, **rule}), Arm("slm", changes)))
    return lines


def smallest(cells: Cells, lines: list[Line]) -> list[Line]:
    """The lines at the smallest set size that any has."""
    sizes = [size for size in cells.values_of("spec_tokens")
             if any(line.arm.changes["spec_tokens"] == size for line in lines)]
    return [line for line in lines if line.arm.changes["spec_tokens"] in sizes[:1]]


def alone(lines: list[Line]) -> list[Line]:
    """The lines without what they are compared with."""
    return [replace(line, against=None) for line in lines]


def shown(value: Any, key: str) -> str:
    """A setting as people read it."""
    if value is None:
        return {"spec_tokens": "all", "importance.k": "chosen"}.get(key, "default")
    if isinstance(value, int) and not isinstance(value, bool) and key.endswith("tokens"):
        return short(value)
    return str(value)


def coverage(cells: Cells, parts: Sequence[Sequence[str]]) -> str:
    """Which domains averages are over, and what their intervals mean."""
    which = over(cells, parts[0]) if len(parts) == 1 else (
        "the domains named in each row, which not all rows have")
    return f"Macro averages over {which}; intervals are 95%, over documents of these domains."


def over(cells: Cells, domains: Sequence[str]) -> str:
    """``all 9 domains`` or ``2 of 9 domains (arxiv, freelaw)``."""
    if len(domains) == len(cells.domains) > 1:
        return f"all {len(domains)} domains"
    return f"{len(domains)} of {len(cells.domains)} domains ({', '.join(domains)})"
