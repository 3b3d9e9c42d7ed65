"""Tables and figures of the ways to spend a budget."""

from __future__ import annotations

from collections.abc import Sequence

from planearly.report import form
from planearly.report.form import number, si
from planearly.report.table import Axis, Column, Figure, Table
from planearly.studies.paper.published import DOMAINS
from planearly.studies.split.claims import pairs
from planearly.studies.split.rows import by_total, ways
from planearly.study.compare import Cells, difference
from planearly.study.spec import (
    AFTER,
    AFTER_AXIS,
    BUDGETS,
    DOMAIN,
    GENERIC_COST,
    METHOD,
    OWN_COST,
    PAIRED,
    Averages,
    Listing,
    Rows,
    alone,
)

SETTING = Column("setting", "settings", "text")
TOTAL = "split-total"


def total_cost(n: int) -> Averages:
    plural = "domain" if n == 1 else "domains"
    return Averages(
        f"{TOTAL}-{n:02d}", f"What a budget buys for {n} {plural}", "",
        f"C(N) at N = {n}: what is paid once for all domains, and N times what is paid for each, "
        "fine-tuning included. From the cheapest on, the front has each way that is told to be "
        "better, over documents and seeds, than the last one on it. The paper's scenarios are slm "
        "and slm-pn (before) and slm-is (after).",
        lambda cells: alone(ways(cells)), (), Figure(
            "lines", Axis("total_flops", f"FLOPs for {n} {plural}", True),
            Axis("after", AFTER_AXIS.label, True), "series", "after_ci"),
        columns=[METHOD, SETTING, BUDGETS, *AFTER, Column("front", "on the front", "text"),
                 Column("total_tokens", "tokens", "tokens"),
                 Column("total_flops", "FLOPs", "flops"),
                 Column("total_hours", "device-hours", "hours")], then=by_total(n))


def per_domain(cells: Cells) -> Rows:
    """Each pair of ways on each domain, wide domains last."""
    known = [int(each) for by_k in (cells.study.get("entropies") or {}).values() for each in by_k]
    finest = max(known, default=None)
    rows = [{"pair": words, "domain": domain, "difference": found.nats,
             "difference_ci": found.interval, "entropy": cells.entropy(domain, finest)}
            for words, a, b in pairs(cells) for domain in cells.rows(a)
            if (found := difference(cells, a, b, [domain]))]
    return sorted(rows, key=lambda row: (row["pair"], row["entropy"] or 0.0))


TABLES: list[Averages | Listing] = [
    *(total_cost(n) for n in DOMAINS),
    Averages(
        "split-ways", "Every way, before and after fine-tuning", "",
        "At the recipe's own seed. The baseline is slm with as many tokens of pretraining per "
        "domain.", ways, [METHOD, SETTING, BUDGETS], before=True, extra=[*GENERIC_COST, *OWN_COST]),
    Listing(
        "split-domains", "Every domain", "",
        "Nats per token on the same documents, at the recipe's own seed; below 0 the first named "
        "is better. With the domain's own text they are slm-adapt less slm-is, and blends are of "
        "slm-pn. Entropy is of the domain's histogram over the finest clusters: the larger, the "
        "wider.",
        [Column("pair", "pair", "text"), DOMAIN, Column("entropy", "entropy", "nats"), *PAIRED],
        per_domain, Figure("points", Axis("entropy", "entropy of the domain, nats"),
                           Axis("difference", "nats per token"), "pair", "difference_ci")),
]


def cheapest(tables: Sequence[Table]) -> list[str]:
    """For each number of domains, the ways that are better than cheaper ones."""
    said = []
    for table in tables:
        front = [row for row in table.rows if row.get("front")] if (
            table.name.startswith(TOTAL)) else []
        if front:
            said.append(f"{table.title}: " + "; ".join(
                f"{row['series']} ({si(row['budget'])} tokens) {number(row['after'])} for "
                f"{form.flops(row['total_flops'])} FLOPs" for row in front[-4:])
                + f" (perplexity over {front[0]['over']}; each better than the one before "
                "by more than chance).")
    return said
