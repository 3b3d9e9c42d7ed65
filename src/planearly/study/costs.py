"""What methods cost: parameters, throughput, and C(N) (paper, section 4.2)."""

from __future__ import annotations

from typing import Any

from planearly.study import build, compare
from planearly.study.build import (
    BUDGET,
    METHOD,
    SET,
    alone,
    by_budget,
    macro_table,
    methods,
    smallest,
)
from planearly.study.compare import Arm, Cells, crossing, difference
from planearly.study.table import Axis, Column, Figure, Table

DOMAINS = (1, 7, 50)
"""Numbers of domains of the paper's Figure 6."""
TOTAL_COST = "figure-06-total-cost"
OWN = [Column("own_tokens", "tokens per domain", "tokens"),
       Column("own_flops", "FLOPs per domain", "flops"),
       Column("own_hours", "device-hours per domain", "hours")]


def parameters(cells: Cells) -> list[Table]:
    """Table 1 and 7: parameters, trained and deployed."""
    found: list[dict[str, Any]] = []
    for row in cells.all_rows:
        experts = row.get("k") if row["method"] in ("slm-pn", "slm-mix") else None
        line = {"method": row["method"], "experts": experts, "params": row["params"],
                "inference_params": row["inference_params"],
                "non_embedding_params": row.get("non_embedding_params"),
                "inference_flops": row.get("inference_flops_per_token")}
        if line not in found:
            found.append(line)
    found.sort(key=lambda line: (cells.methods.index(line["method"]), line["experts"] or 0))
    return [Table(
        "table-01-parameters", "Parameters", "Tables 1 and 7",
        "Trained are the parameters of what is pretrained before the domain is known; deployed is "
        "the specialized model.",
        [METHOD, Column("experts", "experts"), Column("params", "trained parameters"),
         Column("inference_params", "deployed parameters"),
         Column("non_embedding_params", "deployed, without embeddings"),
         Column("inference_flops", "FLOPs per token of inference", "flops")],
        found)] if found else []


def throughput(cells: Cells) -> list[Table]:
    """Table 2: device-hours per 1B tokens."""
    lines = []
    for method in methods(cells):
        rows = list(cells.rows(Arm(method)).values())
        if not rows or method == "slm-d":
            continue
        line: dict[str, Any] = {"method": method,
                                "inference_flops": rows[0].get("inference_flops_per_token")}
        for part, used in (("generic_cost", rows[:1]), ("specialization_cost", rows)):
            tokens, flops, hours = (sum(row[part][what] for row in used)
                                    for what in ("tokens", "flops", "device_hours"))
            line[f"{part}_hours"] = hours / tokens * 1e9 if tokens else None
            line[f"{part}_flops"] = flops / tokens if tokens else None
        lines.append(line)
    return [Table(
        "table-02-throughput", "Device-hours per 1B tokens", "Table 2",
        f"Measured on {devices(cells)}; reading, validation and saving are in them. The "
        "specialization of slm-pn and slm-mix holds the choice of the expert, forward passes only. "
        "slm-d is left out: its tokens are of two models. Short trainings pay for starting, "
        "validating and saving: with few tokens, hours per billion are far above a long run's.",
        [METHOD, Column("generic_cost_hours", "generic pretraining, per 1B tokens", "hours"),
         Column("generic_cost_flops", "its FLOPs per token", "flops"),
         Column("specialization_cost_hours", "specialization, per 1B tokens", "hours"),
         Column("specialization_cost_flops", "its FLOPs per token", "flops"),
         Column("inference_flops", "inference FLOPs per token", "flops")],
        lines)] if lines else []


def spent(cells: Cells) -> list[Table]:
    """Table 3: what was spent before the domain was known, and per domain by set size."""
    lines = []
    for method in methods(cells):
        for size in cells.values(Arm(method), "spec_tokens"):
            rows = list(cells.rows(arm := Arm(method, {"spec_tokens": size})).values())
            lines.append({**build.facts_of(cells, arm, rows)})
    return [Table(
        "table-03-costs", "Cost of training", "Table 3",
        f"What was spent on {devices(cells)}, where the paper gives upper limits. Generic cost is "
        "paid once for all domains; specialization is the mean of the domains that were run, their "
        "number beside it. slm-is pretrains per domain.",
        [METHOD, SET, Column("domains", "domains"),
         Column("generic_tokens", "generic tokens", "tokens"),
         Column("generic_flops", "generic FLOPs", "flops"),
         Column("generic_hours", "generic device-hours", "hours"),
         *OWN],
        lines)] if lines else []


def devices(cells: Cells) -> str:
    """The devices of the rows, or the study's."""
    found = {row["cost"].get("device") for row in cells.all_rows} - {None, "none"}
    return ", ".join(sorted(found)) or str(cells.study.get("device") or "an unknown device")


def total_cost(cells: Cells) -> list[Table]:
    """Figure 6: C(N) = generic + N x specialization against perplexity (paper, section 4.2)."""
    lines = smallest(cells, by_budget(cells))
    made = macro_table(cells, alone(lines), [METHOD, BUDGET, SET], name="", title="", paper="",
                       note="")
    found = []
    for table in made:
        for n in DOMAINS:
            rows = [{**row, **{f"total_{what}": row[f"generic_{what}"] + n * row[f"own_{what}"]
                               for what in ("tokens", "flops", "hours")}} for row in table.rows]
            plural = "domain" if n == 1 else "domains"
            found.append(Table(
                f"{TOTAL_COST}-{n:02d}", f"Total cost for {n} {plural}", "Figure 6",
                f"C(N) at N = {n}: the generic cost once and N times the mean specialization cost "
                f"of a domain, at the smallest specialization set. {table.note.strip()}",
                [METHOD, BUDGET, SET, *build.AFTER, Column("total_tokens", "tokens", "tokens"),
                 Column("total_flops", "FLOPs", "flops"),
                 Column("total_hours", "device-hours", "hours")],
                rows, Figure("lines", Axis("total_flops", f"FLOPs for {n} {plural}", True),
                             Axis("after", build.AFTER_AXIS.label, True), "method", "after_ci")))
    return [*found, *crossings(cells)]


def crossings(cells: Cells) -> list[Table]:
    """The number of domains at which slm-is and slm-pn cost the same, by budget of slm-pn."""
    rows = []
    for size in cells.values_of("spec_tokens"):
        sampled = Arm("slm-is", {"spec_tokens": size})
        for budget in cells.values(Arm("slm-pn", sampled.changes), compare.BUDGET):
            for rule in ({}, {"expert": "blend"}):
                network = Arm("slm-pn", {**sampled.changes, compare.BUDGET: budget, **rule})
                if row := crossing_of(cells, sampled, network):
                    rows.append({**row, "budget": budget,
                                 "expert": cells.settings(network).get("expert")})
    return [Table(
        "figure-06-crossing", "From how many domains on slm-pn costs less than slm-is", "Figure 6",
        "C(N) of slm-is at its own pretraining tokens, paid for every domain, and of slm-pn at "
        "each of its budgets, over the domains that both have; none where the curves do not "
        "cross. Where the difference in perplexity (slm-pn less slm-is) is above 0, slm-pn is "
        "worse, and the crossing is arithmetic alone.",
        [BUDGET, Column("expert", "expert", "text"), SET,
         Column("domains", "domains averaged over"),
         Column("flops", "domains at equal FLOPs"), Column("hours", "domains at equal hours"),
         Column("tokens", "domains at equal tokens"),
         Column("difference", "slm-pn less slm-is, nats per token", "nats"),
         Column("difference_ci", "95% interval", "interval")], rows)] if rows else []


def crossing_of(cells: Cells, sampled: Arm, network: Arm) -> dict[str, Any] | None:
    """Where C(N) of slm-is and slm-pn meet; None where they have no domain in common."""
    found = difference(cells, network, sampled)
    if not found:
        return None
    sides = [build.facts_of(cells, arm, [cells.rows(arm)[d] for d in found.domains])
             for arm in (sampled, network)]
    return {"set": sides[0]["set"], "domains": len(found.domains), "difference": found.nats,
            "difference_ci": found.interval,
            **{what: crossing(*(side[f"{part}_{what}"] for side in sides
                                for part in ("generic", "own")))
               for what in ("tokens", "flops", "hours")}}


def finetuning(cells: Cells) -> list[Table]:
    """Figure 9: cost of fine-tuning and its best step by set size."""
    rows = []
    for method in methods(cells):
        for size in cells.values(Arm(method), "spec_tokens"):
            arm = Arm(method, {"spec_tokens": size})
            mine = list(cells.rows(arm).values())
            if method not in ("slm-is", "slm-d") and len(mine):
                steps = build.mean([row.get("finetuning") or {} for row in mine], "steps")
                rows.append({**build.facts_of(cells, arm, mine), "steps": steps})
    return [Table(
        "figure-09-finetuning", "Fine-tuning: cost and best step by set size", "Figure 9",
        "Means over the domains that were run, their number beside them. slm-is and slm-d are left "
        "out: their cost per domain is mostly not fine-tuning. That of slm-pn and slm-mix holds "
        "the choice of the expert.",
        [METHOD, SET, Column("domains", "domains"), Column("best_step", "best step"),
         Column("steps", "steps taken"), *OWN],
        rows, Figure("lines", Axis("set", "tokens of the specialization set", True),
                     Axis("own_flops", "FLOPs of fine-tuning, one domain", True), "method"),
    )] if rows else []
