"""The paper's tables and figures, from a study's rows; those without data are left out.

Names follow the paper's numbers. :mod:`planearly.study.extras` adds what the paper has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planearly.study import build, compare, costs, extras
from planearly.study.build import (
    BUDGET,
    COST,
    GENERIC,
    METHOD,
    SET,
    Line,
    alone,
    by_budget,
    by_size,
    macro_table,
    methods,
    smallest,
    sweep,
)
from planearly.study.compare import Arm, Cells, Row, When, difference, macro
from planearly.study.table import Axis, Column, Figure, Table, write

__all__ = ["tables", "write"]


def tables(study: Mapping[str, Any]) -> list[Table]:
    """All tables that the study has the rows for, the paper's first."""
    cells = Cells(study)
    return [table for make in (*MAKERS, *extras.MAKERS) for table in make(cells)]


# Quality by specialization size and pretraining budget ------------------------------------------

def baselines(cells: Cells) -> list[Table]:
    """Table 4: before and after fine-tuning by set size."""
    return macro_table(
        cells, by_size(cells, methods(cells)), [METHOD, SET], before=True,
        name="table-04-baselines", title="Before and after fine-tuning, by set size",
        paper="Table 4", note="All methods at the recipe's own pretraining budget; the baseline "
        "of each row is slm at the same set size.")


def larger_sets(cells: Cells) -> list[Table]:
    """Figure 5: perplexity by the size of the specialization set."""
    chosen = [m for m in methods(cells) if len(cells.values(Arm(m), "spec_tokens")) > 1]
    return macro_table(
        cells, by_size(cells, chosen), [METHOD, SET], name="figure-05-set-size",
        title="Larger specialization sets", paper="Figure 5",
        note="After fine-tuning, at the recipe's own pretraining budget; the baseline is slm at "
        "the same set size.",
        figure=Figure("lines", Axis("set", "tokens of the specialization set", True),
                      build.AFTER_AXIS, "method", "after_ci"))


def several_budgets(cells: Cells) -> list[Line]:
    """Lines of :func:`build.by_budget`, if a method was run at more than one budget."""
    lines = by_budget(cells)
    return lines if len({line.arm.changes[compare.BUDGET] for line in lines}) > 1 else []


def budgets(cells: Cells) -> list[Table]:
    """Table 8: by pretraining budget."""
    return macro_table(
        cells, several_budgets(cells), [METHOD, BUDGET, SET], before=True, extra=GENERIC,
        name="table-08-budgets", title="By pretraining budget", paper="Table 8",
        note="The paper compares at equal device-hours; here the budget is in tokens, with FLOPs "
        "and device-hours beside it. The baseline is slm at the same budget and set size.")


def generic_perplexity(cells: Cells) -> list[Table]:
    """Figure 3: perplexity on held-out generic text by budget."""
    lines = [line for line in smallest(cells, several_budgets(cells))
             if line.labels["method"] in ("slm", "slm-mix", "slm-pn", "llm")]
    made = macro_table(
        cells, alone(lines), [METHOD, BUDGET], name="figure-03-generic", extra=GENERIC,
        title="Generic perplexity by pretraining cost", paper="Figure 3",
        note="On held-out generic text, before fine-tuning, each window through its own cluster's "
        "expert where there are experts.",
        figure=Figure("lines", Axis("generic_flops", "FLOPs of generic pretraining", True),
                      Axis("generic", "generic perplexity", True), "method", "generic_ci"))
    columns = [METHOD, BUDGET, *GENERIC, Column("generic_tokens", "generic tokens", "tokens"),
               Column("generic_flops", "generic FLOPs", "flops"),
               Column("generic_hours", "generic device-hours", "hours")]
    return [Table(t.name, t.title, t.paper, t.note, columns, t.rows, t.figure) for t in made
            if any(row["generic"] is not None for row in t.rows)]


def domain_perplexity(cells: Cells) -> list[Table]:
    """Figure 4: domain perplexity by budget, before and after fine-tuning."""
    made = macro_table(
        cells, alone(smallest(cells, several_budgets(cells))), [METHOD, BUDGET, SET],
        name="figure-04-budget", title="Domain perplexity by cost, before and after fine-tuning",
        paper="Figure 4", note="At the smallest specialization set. The cost is of the generic "
        "pretraining and one domain, fine-tuning included, before it too.")
    series = []
    for table in made:
        rows = [{**row, "series": f"{row['method']}, {when} fine-tuning", "ppl": row[when],
                 "ppl_ci": row[f"{when}_ci"]}
                for when in ("before", "after") for row in table.rows if row[when] is not None]
        columns = [METHOD, BUDGET, SET, Column("series", "when", "text"),
                   Column("ppl", "perplexity", "perplexity"),
                   Column("ppl_ci", "95% interval", "interval"), *COST]
        series.append(Table(
            table.name, table.title, table.paper, table.note, columns, rows,
            Figure("lines", Axis("flops", "training FLOPs, one domain", True),
                   Axis("ppl", "perplexity", True), "series", "ppl_ci")))
    return series


# Experts and clusters ---------------------------------------------------------------------------

def expert_choice(cells: Cells) -> list[Table]:
    """Table 5: how the expert is chosen."""
    lines = []
    for method, key in (("slm-pn", "projected.experts"), ("slm-mix", "mixture.experts")):
        for many in cells.values_of(key):
            rules = cells.values(Arm(method, {key: many}), "expert")
            lines += [Line({"method": method, "experts": many, "setting": rule},
                           Arm(method, {key: many, "expert": rule}), Arm(method, {key: many}))
                      for rule in rules if len(rules) > 1]
    return macro_table(
        cells, lines, [METHOD, Column("experts", "experts"), Column("setting", "expert", "text")],
        name="table-05-experts", title="Choice of the expert", paper="Table 5", before=True,
        extra=[Column("expert_share", "share of the domain in its cluster", "percent")],
        note=f"'blend' is not in the paper. The baseline is the recipe's own rule, "
        f"'{cells.own('expert')}'. best-tuned pays for fine-tuning every expert.")


def cluster_tables(cells: Cells) -> list[Table]:
    """Tables 9 and 10: share of the largest cluster, and entropy, by number of clusters."""
    found = cells.study.get("entropies") or {}
    made = []
    for number, what, title, kind in (
            ("09", "largest_share", "Share of a domain in its most frequent cluster", "percent"),
            ("10", "entropy", "Entropy of the cluster histogram, nats", "nats")):
        ks = sorted({int(k) for by_k in found.values() for k in by_k})
        rows = [{"domain": domain,
                 **{f"k{k}": cells.entropy(domain, k, what) for k in ks}} for domain in found]
        if rows and ks:
            columns = [Column("domain", "domain", "text"),
                       *(Column(f"k{k}", f"k = {k}", kind) for k in ks)]  # type: ignore[arg-type]
            made.append(Table(
                f"table-{number}-clusters", title, f"Table {int(number)}",
                "Of the specialization sets and of the generic corpus, by number of clusters. "
                "A wide domain spreads over many clusters: small share, large entropy.",
                columns, rows))
    return made


def test_sets(cells: Cells) -> list[Table]:
    """What the test text of every domain is made of: intervals rest on its documents."""
    rows = []
    for domain in cells.domains:
        row = next((row for row in cells.all_rows if row["domain"] == domain), None)
        if row:
            sizes = row["tokens"]
            rows.append({"domain": domain, "documents": len(sizes), "tokens": sum(sizes),
                         "largest": max(sizes) / sum(sizes)})
    return [Table(
        "extra-test-sets", "Test text of every domain", "",
        "Intervals treat documents as the independent units: with few of them, or one that holds "
        "much of the text, they are wide. At the recipe's own seed.",
        [Column("domain", "domain", "text"), Column("documents", "documents"),
         Column("tokens", "tokens", "tokens"),
         Column("largest", "share of the longest document", "percent")], rows)] if rows else []


def swept(name: str, title: str, paper: str, method: str, key: str, label: str, note: str,
          beside: str | None = None) -> Callable[[Cells], list[Table]]:
    """A figure of one method along one setting, against slm."""
    def make(cells: Cells) -> list[Table]:
        lines = sweep(cells, [method], key, Arm("slm"), beside)
        return macro_table(
            cells, lines, [METHOD, Column("setting", label, "text")], name=name, title=title,
            paper=paper, before=True, note=f"{note} The baseline is slm at the same tokens.",
            figure=Figure("lines", Axis("x", label, True), build.AFTER_AXIS, "method", "after_ci"))
    return make


def top_cluster(cells: Cells) -> list[Table]:
    """Figure 8: only the most frequent cluster, against importance sampling at the same k."""
    lines = [Line({"method": method, "setting": build.shown(k, "importance.k")},
                  Arm(method, {"importance.k": k}), Arm("slm-is", {"importance.k": k}), {"x": k})
             for method in ("slm-is", "slm-top")
             for k in cells.values(Arm("slm-top"), "importance.k")]
    if "slm-top" not in cells.methods or "slm-is" not in cells.methods:
        return []
    return macro_table(
        cells, lines, [METHOD, Column("setting", "clusters", "text")], name="figure-08-top-cluster",
        title="The most frequent cluster alone", paper="Figure 8", before=True,
        note="slm-top pretrains on the domain's most frequent cluster alone; the baseline is "
        "slm-is at the same number of clusters and tokens.",
        figure=Figure("bars", Axis("setting", "clusters"), build.AFTER_AXIS, "method", "after_ci"))


def lora(cells: Cells) -> list[Table]:
    """Figure 14: low-rank adapters against full fine-tuning."""
    if "llm-lora" not in cells.methods:
        return []
    lines = [Line({"method": method}, Arm(method, {"spec_tokens": size}),
                  Arm("llm", {"spec_tokens": size}))
             for method in ("llm", "llm-lora")
             for size in cells.values(Arm(method), "spec_tokens")]
    return macro_table(
        cells, lines, [METHOD, SET], name="figure-14-lora", paper="Figure 14", extra=costs.OWN,
        title="LoRA against full fine-tuning of the large model", note="The baseline is llm, "
        "fine-tuned in full, at the same set size. Costs per domain are of the adaptation alone.",
        figure=Figure("lines", Axis("set", "tokens of the specialization set", True),
                      build.AFTER_AXIS, "method", "after_ci"))


# Every domain ---------------------------------------------------------------------------------

def by_domain(cells: Cells) -> list[Table]:
    """Figures 12 and 13: every domain before and after fine-tuning."""
    made = []
    steps: list[tuple[str, When]] = [("12", "before"), ("13", "after")]
    for number, when in steps:
        rows = [domain_row(cells, method, domain, row, when)
                for domain in cells.domains for method in methods(cells)
                if (row := cells.rows(Arm(method)).get(domain))
                and row.get(f"nll_{when}") is not None]
        if rows:
            made.append(Table(
                f"figure-{number}-domains-{when}", f"Every domain, {when} fine-tuning",
                f"Figure {number}", "At the recipe's own settings. The baseline is slm on the same "
                "documents; below 0, a difference is in the row's favour.",
                [Column("domain", "domain", "text"), METHOD,
                 Column("ppl", f"perplexity {when} fine-tuning", "perplexity"),
                 Column("ppl_ci", "95% interval", "interval"), *build.PAIRED, *COST],
                rows, Figure("bars", Axis("domain", "domain"), Axis("ppl", "perplexity"),
                             "method", "ppl_ci")))
    return made


def domain_row(cells: Cells, method: str, domain: str, row: Row, when: When) -> dict[str, Any]:
    """One method on one domain."""
    value = macro([row], when) or {}
    paired = None if method == "slm" else difference(
        cells, Arm(method, when=when), Arm("slm", when=when), [domain])
    return {"domain": domain, "method": method, "ppl": value.get("perplexity"),
            "ppl_ci": value.get("ci95"), "difference": paired.nats if paired else None,
            "difference_ci": paired.interval if paired else None, "tokens": row["cost"]["tokens"],
            "flops": row["cost"]["flops"], "hours": row["cost"]["device_hours"]}


MAKERS: list[Callable[[Cells], list[Table]]] = [
    costs.parameters, costs.throughput, costs.spent, baselines, expert_choice, budgets,
    cluster_tables, generic_perplexity, domain_perplexity, larger_sets, costs.total_cost,
    swept("figure-07-pn-experts", "Experts of the projected network", "Figure 7", "slm-pn",
          "projected.experts", "experts", "One expert per cluster of the generic corpus; where the "
          "study says so, more slices for more experts.", "projected.rank"),
    top_cluster, costs.finetuning,
    swept("figure-10-importance-k", "Clusters for importance sampling", "Figure 10", "slm-is",
          "importance.k", "clusters", "'chosen' is the number that predicts the domain best."),
    swept("figure-11-mix-k", "Experts of the hard mixture", "Figure 11", "slm-mix",
          "mixture.experts", "experts", "One independent small model per cluster."),
    by_domain, lora, test_sets,
]
