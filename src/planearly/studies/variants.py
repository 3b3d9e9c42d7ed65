"""A recipe against variants of itself: what a change does, for whoever asks it of text of their
own. The paper's tables stand beside it; its claims are not asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planearly.report import sentences
from planearly.report.form import number
from planearly.report.table import Axis, Column, Figure, Table
from planearly.studies import paper
from planearly.studies.paper.rows import variants
from planearly.study import seeds
from planearly.study.compare import Arm, Cells, mean_cost
from planearly.study.spec import (
    BUDGETS,
    METHOD,
    OVER,
    PAIRED,
    SET,
    Listing,
    Rows,
    Suite,
    facts_of,
    over,
)

NAME = "variants"


def over_seeds(cells: Cells) -> Rows:
    """Every variant against the recipe's own settings, over all seeds and domains that have both;
    the most ahead first."""
    found: dict[str, dict[str, Any]] = {}
    for line in variants(cells):
        assert line.against
        ours, theirs = (Arm(arm.method, {key: value for key, value in arm.changes.items()
                                         if key != "seed"}) for arm in (line.arm, line.against))
        difference = seeds.difference(cells, ours, theirs)
        if difference is None:
            continue
        rows = [[cells.rows(arm)[domain] for domain in difference.domains]
                for arm in (ours, theirs)]
        spent = [mean_cost(each)["flops"] for each in rows]
        each = [difference.own.nats, *(other.nats for other in difference.others)]
        found[str((ours.method, ours.changes))] = facts_of(cells, ours, rows[0]) | line.labels | {
            "difference": difference.nats, "difference_ci": [difference.low, difference.high],
            "seeds": ", ".join(f"{nats:+.3f}" for nats in each), "many": len(each),
            "over": over(cells, difference.domains), "times": spent[0] / spent[1]}
    return sorted(found.values(), key=lambda row: row["difference"])


def told(tables: Sequence[Table]) -> list[str]:
    """Which variants are ahead and behind by more than chance, of those with two seeds."""
    rows = [row for table in tables if table.name == NAME for row in table.rows]
    judged = [row for row in rows if row["many"] > 1]
    said = []
    for side, words in ((-1, "better"), (1, "worse")):
        there = [f"{row['method']} with {row['setting']} {row['difference']:+.3f} "
                 f"{sentences.bounds(*row['difference_ci'])} ({number(row['times'])} times the "
                 "FLOPs)" for row in judged if sentences.side(*row["difference_ci"]) == side]
        if there:
            said.append(f"{words.capitalize()} than the recipe's own settings by more than chance, "
                        f"in nats per token: {'; '.join(there)}.")
    level = sum(sentences.side(*row["difference_ci"]) == 0 for row in judged)
    if rows:
        said.append(f"Of {len(rows)} variants, {level} cannot be told from the recipe's own "
                    f"settings, and {len(rows) - len(judged)} are of one seed, which does not say.")
    return said


TABLES = [
    Listing(
        NAME, "Every variant against the recipe's own settings, over seeds", "",
        "The same method, pretraining tokens and set size with the recipe's own settings is the "
        "baseline; differences are paired by document and averaged over domains, their intervals "
        "are of 95% over documents and over what another training would give. Of one seed, what a "
        "seed does is taken from the study's other seeds, or another study's. Below 0, the variant "
        "is better.",
        [METHOD, Column("setting", "settings", "text"), BUDGETS, SET, OVER, *PAIRED,
         Column("seeds", "at each seed", "text"),
         Column("times", "FLOPs for one domain, times the baseline's")], over_seeds,
        Figure("points", Axis("times", "FLOPs for one domain, times the baseline's"),
               Axis("difference", PAIRED[0].label), "setting", "difference_ci")),
    *paper.SUITE.tables]

SUITE = Suite(TABLES, (), told)
