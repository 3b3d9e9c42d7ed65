"""Specifications of a study's tables and figures, and the one function that makes them of cells.

A specification is data: names, words, columns, a figure, and what its rows are of. ``Averages``
are of lines, each an arm and what it is compared with, averaged over the same domains; a
``Listing`` is of anything else. :mod:`planearly.studies` holds specifications; this module knows no
method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planearly import methods
from planearly.evaluate import perplexity
from planearly.report import sentences
from planearly.report.table import Axis, Column, Figure, Table
from planearly.study.compare import (
    BUDGET,
    Arm,
    Cells,
    Row,
    blocks,
    difference,
    macro,
    mean_cost,
    shared,
)
from planearly.units import short

METHOD = Column("method", "method", "text")
SET = Column("set", "specialization set", "tokens")
BUDGETS = Column("budget", "pretraining tokens", "tokens")
DOMAIN = Column("domain", "domain", "text")
OVER = Column("over", "averaged over", "text")


def costs(prefix: str = "", of: str = "training {}, one domain") -> tuple[Column, ...]:
    """Columns of tokens, FLOPs and device-hours of one of a row's costs."""
    return tuple(Column(prefix + key, of.format(words), key) for key, words in (  # type: ignore[arg-type]
        ("tokens", "tokens"), ("flops", "FLOPs"), ("hours", "device-hours")))


def with_interval(key: str, label: str, kind: Any = "perplexity") -> tuple[Column, Column]:
    return Column(key, label, kind), Column(f"{key}_ci", "95% interval", "interval")


COST = (Column("tokens", "training tokens, one domain", "tokens"),
        Column("flops", "training FLOPs, one domain", "flops"),
        Column("hours", "device-hours, one domain", "hours"))
GENERIC_COST = costs("generic_", "generic {}")
OWN_COST = costs("own_", "{} per domain")
BEFORE = with_interval("before", "perplexity before fine-tuning")
AFTER = with_interval("after", "perplexity after fine-tuning")
PAIRED = with_interval("difference", "nats per token, against the baseline", "nats")
GENERIC = (*with_interval("generic", "generic perplexity"),
           Column("routed", "generic text goes through", "text"))
AFTER_AXIS = Axis("after", AFTER[0].label)
SETS_AXIS = Axis("set", "tokens of the specialization set", True)


@dataclass(frozen=True)
class Line:
    """A row of averages: what is said of it, its cell, and the cell it is compared with."""

    labels: dict[str, Any]
    arm: Arm
    against: Arm | None = None
    further: dict[str, Any] = field(default_factory=dict)


Lines = Callable[[Cells], list[Line]]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Averages:
    """A table of macro averages; rows that are averaged over the same domains stand together.

    The figure, and what is said of the table, are over one set of domains, that with the largest
    product of domains and squared number of rows (as :func:`planearly.study.compare.blocks`):
    averages over others cannot be held against them.

    Attributes:
        labels: columns before the averages.
        before: with the perplexity before fine-tuning.
        extra: further columns of :func:`facts_of`.
        least: lines below which there is nothing to see.
        apart: rows are held against their own baselines alone, each over all domains of both.
        columns: instead of all these.
        then: makes other rows of the cells and the averages, or none; each average has its
            ``arm``.
    """

    name: str
    title: str
    paper: str
    note: str
    lines: Lines
    labels: Callable[[Cells], Sequence[Column]] | Sequence[Column]
    figure: Figure | None = None
    before: bool = False
    extra: Sequence[Column] = ()
    least: int = 2
    apart: bool = False
    columns: Sequence[Column] = ()
    then: Callable[[Cells, Rows], Rows] = lambda cells, rows: rows

    def table(self, cells: Cells) -> Table | None:
        found = [line for line in self.lines(cells) if cells.rows(line.arm)]
        if len(found) < self.least:
            return None
        parts = blocks(cells, [line.arm for line in found])
        drawn = max(parts, key=lambda part: len(part[0]) * len(part[1]) ** 2)[0]
        if self.apart:
            parts = [(shared(cells, [arm for arm in (line.arm, line.against) if arm]), [line.arm])
                     for line in found]
        averages = [average(cells, line, domains) | {"drawn": domains == drawn, "arm": line.arm}
                    for domains, arms in sorted(parts, key=lambda part: -len(part[0]))
                    for line in found if line.arm in arms and domains]
        compared = any(row["difference"] is not None for row in averages)
        many = len(parts) > 1
        labels = self.labels(cells) if callable(self.labels) else self.labels
        columns = self.columns or [
            *labels, *([OVER] if many else []), *(BEFORE if self.before else []), *AFTER,
            *(PAIRED if compared else []), *self.extra, *COST]
        rows = [{key: value for key, value in row.items() if key != "arm"}
                for row in self.then(cells, averages)]
        note = " ".join(filter(None, [
            words(self.note, cells), coverage(cells, [domains for domains, _ in parts]),
            f"The figure is over {over(cells, drawn)}." if self.figure and many else "",
            "Below 0, a difference is in the row's favour." if compared else ""]))
        return Table(self.name, self.title, self.paper, note, list(columns), rows,
                     self.figure) if rows else None


@dataclass(frozen=True)
class Listing:
    """A table whose rows are no averages of arms.

    Attributes:
        rows: by the keys of the columns; none leave the table out.
    """

    name: str
    title: str
    paper: str
    note: str
    columns: Callable[[Cells], Sequence[Column]] | Sequence[Column]
    rows: Callable[[Cells], Rows]
    figure: Figure | None = None

    def table(self, cells: Cells) -> Table | None:
        rows = self.rows(cells)
        columns = self.columns(cells) if callable(self.columns) else self.columns
        return Table(self.name, self.title, self.paper, words(self.note, cells), list(columns),
                     rows, self.figure) if rows else None


def tables(cells: Cells, specifications: Iterable[Averages | Listing]) -> list[Table]:
    """The tables that the study has the rows for, in the order of their specifications.

    Numbers have twelve digits: those beyond differ with the order in which floats are added up, and
    so with the version of Python.
    """
    return [replace(made, rows=_rounded(made.rows)) for one in specifications
            if (made := one.table(cells))]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return type(value)(map(_rounded, value)) if isinstance(value, list | tuple) else value


def words(note: str, cells: Cells) -> str:
    """A note with the study's devices, and the recipe's own values of keys, in it: ``{devices}``,
    ``{pretrain.optimizer.preset}``."""
    return re.sub(r"{([\w.]+)}", lambda found: devices(cells) if found[1] == "devices"
                  else shown(cells.own(found[1]), found[1]), note)


def average(cells: Cells, line: Line, domains: Sequence[str]) -> dict[str, Any]:
    """Everything about a line over ``domains``, which its arm has."""
    rows = [cells.rows(line.arm)[domain] for domain in domains]
    paired = None
    if line.against and not cells.same(line.against, line.arm):
        paired = difference(cells, line.arm, line.against, domains)
        if paired and len(paired.domains) < len(domains):
            paired = None
    found = facts_of(cells, line.arm, rows) | line.further | line.labels
    found |= {"over": over(cells, domains), "difference": paired.nats if paired else None,
              "difference_ci": paired.interval if paired else None}
    for when in ("before", "after"):
        value = macro(rows, when) or {}
        found |= {when: value.get("perplexity"), f"{when}_ci": value.get("ci95")}
    return found


def facts_of(cells: Cells, arm: Arm, rows: Sequence[Row]) -> dict[str, Any]:
    """What the cells know of an arm beside its perplexity: sizes, costs, generic perplexity."""
    sums = {prefix: mean_cost(rows, part) for prefix, part in (
        ("", "cost"), ("generic_", "generic_cost"), ("own_", "specialization_cost"))}
    intervals = [row.get("generic_ppl_ci") for row in rows]  # one, where one model serves all
    return {
        "method": arm.method, "set": mean(rows, "spec_tokens"),
        "budget": arm.changes.get(BUDGET, cells.main(arm.method, BUDGET)),
        "domains": len(rows), "generic": mean_log(rows, "generic_ppl"),
        "generic_ci": intervals[0] if all(ci == intervals[0] for ci in intervals) else None,
        "routed": "the expert it chooses" if any(map(sentences.is_routed, rows)) else None,
        "generic_after": mean_log(rows, "generic_ppl_after"),
        "expert_share": mean(rows, "expert_share"), "best_step": mean(rows, "best_step"),
        **{prefix + short_key: spent[key] for prefix, spent in sums.items()
           for key, short_key in (("tokens", "tokens"), ("flops", "flops"),
                                  ("device_hours", "hours"))},
    }


def has_experts(method: str) -> bool:
    return method in methods.TABLE and methods.TABLE[method].experts


def ordered(cells: Cells, chosen: Callable[[methods.Method], bool]) -> list[str]:
    """The study's methods of a kind, in the order of the table of methods."""
    return [row.name for row in methods.TABLE.values()
            if row.name in cells.methods and chosen(row)]


def mean(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a field of the rows; None where one lacks it."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return sum(known) / len(known) if known and len(known) == len(rows) else None


def mean_log(rows: Sequence[Row], key: str) -> float | None:
    """Macro average of perplexities; None where a row lacks it."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return perplexity.average(known) if known and len(known) == len(rows) else None


def sweep(cells: Cells, chosen: Iterable[str], key: str, against: Arm | None = None,
          beside: str | None = None) -> list[Line]:
    """Lines of methods at each value of one setting, others being those of the main comparison.

    A method with a single value is left out. ``against`` None compares with the method at its main
    value; otherwise with ``against``, at its main settings too.

    Args:
        beside: a setting that may change along with ``key``: there is a line for each pair of
            values, and the rows' ``beside`` tells its value.
    """
    lines = []
    for method in chosen:
        arms = [(value, other, Arm(method, {key: value} | ({beside: other} if beside else {})))
                for value in cells.values_of(key)
                for other in (cells.values_of(beside) if beside else [None])]
        found = [(value, other, arm) for value, other, arm in arms if cells.rows(arm)]
        for value, other, arm in found if len({value for value, *_ in found}) > 1 else ():
            labels = {"method": method, "setting": shown(value, key)}
            if beside:
                labels["beside"] = shown(other, beside)
            lines.append(Line(labels, arm, against or Arm(method, {key: cells.main(method, key)}),
                              {"x": value}))
    return lines


def alone(lines: Iterable[Line]) -> list[Line]:
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


def devices(cells: Cells) -> str:
    """The devices of the rows, each once (a row may name several), or the study's."""
    found = {name for row in cells.all_rows
             for name in str(row["cost"].get("device") or "none").split(", ")} - {"none"}
    return ", ".join(sorted(found)) or str(cells.study.get("device") or "an unknown device")


@dataclass(frozen=True)
class Suite:
    """What a study is asked: tables, claims, and sentences for its summary.

    Attributes:
        claims: each judges one or more claims.
        sentences: of the tables made, for the summary.
    """

    tables: Sequence[Averages | Listing]
    claims: Sequence[Callable[[Cells], list[Any]]]
    sentences: Callable[[Sequence[Table]], list[str]] = lambda tables: []

    def of(self, study: Mapping[str, Any]) -> tuple[list[Table], list[Any]]:
        """The tables and the judged claims of what ``study.json`` holds."""
        cells = Cells(study)
        made = tables(cells, self.tables)
        shown_by = {table.name for table in made}
        judged = [claim for judge in self.claims for claim in judge(cells)]
        return made, [claim if claim.table in shown_by else replace(claim, table="")
                      for claim in judged]

