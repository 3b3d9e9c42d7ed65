"""What the rows of the paper's tables are of that are no averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from planearly import methods
from planearly.report.form import number
from planearly.report.table import Column
from planearly.studies.paper import published
from planearly.studies.paper.rows import papers, single_rule
from planearly.study.compare import BUDGET, Arm, Cells, When, difference, macro, mean_cost
from planearly.study.spec import DOMAIN, Rows, facts_of, has_experts, mean, ordered, over


def parameters(cells: Cells) -> Rows:
    """Parameters, trained and deployed, each once."""
    found: Rows = []
    for row in cells.all_rows:
        line = {"method": row["method"],
                "experts": row.get("k") if has_experts(row["method"]) else None,
                "params": row["params"], "inference_params": row["inference_params"],
                "non_embedding_params": row.get("non_embedding_params"),
                "inference_flops": row.get("inference_flops_per_token")}
        if line not in found:
            found.append(line)
    return sorted(found, key=lambda line: (cells.methods.index(line["method"]),
                                           line["experts"] or 0))


def ratios(cells: Cells) -> Rows:
    """Pretraining tokens per parameter and per token of the domain, beside the paper's."""
    lines = []
    for method in papers(cells):
        if method not in published.SCALE:
            continue
        deployed, trained, rate, hours = published.SCALE[method]
        theirs = [spent / rate * 1e9 for spent in hours]
        k = published.CLUSTERS.get(method)
        for budget in cells.values(Arm(method), BUDGET):
            rows = list(cells.rows(Arm(method, {BUDGET: budget})).values())
            if not rows or not budget:
                continue
            own = mean(rows, "spec_tokens")
            small = next(iter(cells.rows(Arm("slm")).values()), None)
            windows = budget / cells.own("context") if cells.own("context") else None
            lines.append({
                "method": method, "budget": budget,
                "times": rows[0]["params"] / small["params"] if small else None,
                "papers_times": trained / published.SCALE["slm"][1],
                "cluster": windows / rows[0]["k"] if k and windows and rows[0].get("k") else None,
                "papers_cluster": _span(theirs, k * published.CONTEXT) if k else None,
                "deployed": budget / rows[0]["inference_params"],
                "papers_deployed": _span(theirs, deployed),
                "trained": budget / rows[0]["params"], "papers_trained": _span(theirs, trained),
                "own": budget / own if own else None,
                "papers_own": _span(theirs, published.SETS[0])})
    return lines


def _span(tokens: Sequence[float], per: float) -> str:
    """The least and the most of some tokens, divided."""
    return " to ".join(dict.fromkeys(number(of / per) for of in (min(tokens), max(tokens))))


def throughput(cells: Cells) -> Rows:
    """Device-hours and FLOPs per token of pretraining and specialization."""
    lines = []
    for method in ordered(cells, lambda method: not method.source and not method.taught):
        rows = list(cells.rows(Arm(method)).values())
        if not rows:
            continue
        line: dict[str, Any] = {"method": method,
                                "inference_flops": rows[0].get("inference_flops_per_token")}
        for part, used in (("generic_cost", rows[:1]), ("specialization_cost", rows)):
            tokens, flops, hours = (sum(row[part][what] for row in used)
                                    for what in ("tokens", "flops", "device_hours"))
            line[f"{part}_hours"] = hours / tokens * 1e9 if tokens else None
            line[f"{part}_flops"] = flops / tokens if tokens else None
        lines.append(line)
    return lines


def spent(cells: Cells, chosen: Callable[[methods.Method], bool] = lambda method: True) -> Rows:
    """What the paper's methods took by set size, on average over the domains that were run."""
    found = []
    for method in ordered(cells, lambda method: not method.source and chosen(method)):
        for size in cells.values(Arm(method), "spec_tokens"):
            rows = list(cells.rows(arm := Arm(method, {"spec_tokens": size})).values())
            steps = mean([row.get("finetuning") or {} for row in rows], "steps")
            found.append({**facts_of(cells, arm, rows), "steps": steps})
    return found


def finetuning(cells: Cells) -> Rows:
    """The same of the methods whose cost per domain is mostly fine-tuning."""
    return spent(cells, lambda method: not method.needs_domain and not method.taught)


def clusters_of(what: str) -> Callable[[Cells], Rows]:
    """A number of every domain's cluster histogram, by number of clusters."""
    def rows(cells: Cells) -> Rows:
        theirs = published.BY_CLUSTERS.get(what, {})
        found = {domain: {f"k{k}": cells.entropy(domain, k, what) for k in _ks(cells)}
                 for domain in cells.study.get("entropies") or {}}
        return [{"domain": domain, **ours,
                 **{f"papers{k}": theirs.get(domain, {}).get(k) for k in _papers_ks(cells, what)}}
                for domain, ours in found.items() if any(v is not None for v in ours.values())]
    return rows


def by_clusters(what: str, kind: Any) -> Callable[[Cells], list[Column]]:
    return lambda cells: [DOMAIN, *(Column(f"k{k}", f"k = {k}", kind) for k in _ks(cells)),
                          *(Column(f"papers{k}", f"the paper's, {k}", kind)
                            for k in _papers_ks(cells, what))]


def _ks(cells: Cells) -> list[int]:
    return sorted({int(k) for by_k in (cells.study.get("entropies") or {}).values() for k in by_k})


def _papers_ks(cells: Cells, what: str) -> list[int]:
    """The study's numbers of clusters that the paper has too, where it has a domain of its."""
    domains = {*(cells.study.get("entropies") or {})} - {"generic"}
    theirs = published.BY_CLUSTERS.get(what, {})
    return [k for k in _ks(cells) if any(k in theirs.get(domain, {}) for domain in domains)]


def test_texts(cells: Cells) -> Rows:
    """What the test text of every domain is made of."""
    found = {row["domain"]: row["tokens"] for row in reversed(cells.all_rows)}
    return [{"domain": domain, "documents": len(found[domain]), "tokens": sum(found[domain]),
             "largest": max(found[domain]) / sum(found[domain])}
            for domain in cells.domains if domain in found]


def every_domain(when: When) -> Callable[[Cells], Rows]:
    """Every method on every domain, at the recipe's own settings."""
    def rows(cells: Cells) -> Rows:
        return [_on_domain(cells, Arm(method, when=when), domain) for domain in cells.domains
                for method in papers(cells)
                if domain in cells.rows(Arm(method, when=when))]
    return rows


def _on_domain(cells: Cells, arm: Arm, domain: str) -> dict[str, Any]:
    row = cells.rows(arm)[domain]
    value = macro([row], arm.when) or {}
    paired = None if arm.method == "slm" else difference(
        cells, arm, Arm("slm", when=arm.when), [domain])
    return {"domain": domain, "method": arm.method, "ppl": value.get("perplexity"),
            "ppl_ci": value.get("ci95"), "difference": paired.nats if paired else None,
            "difference_ci": paired.interval if paired else None, **_cost([row])}


def _cost(rows: Sequence[Any]) -> dict[str, float]:
    cost = mean_cost(rows)
    return {"tokens": cost["tokens"], "flops": cost["flops"], "hours": cost["device_hours"]}


def blends(cells: Cells) -> Rows:
    """The blend against the chosen single expert, and both against slm, by domain entropy."""
    rows = []
    for method in ordered(cells, lambda method: method.experts):
        if not (rule := single_rule(cells, method)):
            continue
        blend, single = Arm(method, {"expert": "blend"}), Arm(method, {"expert": rule})
        for domain, row in cells.rows(blend).items():
            against = {key: difference(cells, a, b, [domain]) for key, a, b in (
                ("difference", blend, single), ("blend_slm", blend, Arm("slm")),
                ("single_slm", single, Arm("slm")))}
            value = macro([row]) or {}
            rows.append({
                "method": method, "domain": domain, "rule": rule,
                "entropy": cells.entropy(domain, row.get("k")),
                "after": value.get("perplexity"), "after_ci": value.get("ci95"),
                **{key: each.nats if each else None for key, each in against.items()},
                **{f"{key}_ci": each.interval if each else None for key, each in against.items()},
                **_cost([row])})
    return sorted(rows, key=lambda row: (row["method"], row["entropy"] or 0.0))


def routed(cells: Cells) -> Rows:
    """A domain's test text before fine-tuning, each window through its own cluster's expert,
    against slm and against the domain's one expert."""
    rows = []
    for method in ordered(cells, lambda method: method.experts):
        own, one = Arm(method, when="routed"), Arm(method, when="before")
        for domain, row in cells.rows(own).items():
            value = macro([row], "routed") or {}
            against = {key: difference(cells, a, b, [domain]) for key, a, b in (
                ("one_slm", one, Arm("slm", when="before")), ("difference", own, one),
                ("routed_slm", own, Arm("slm", when="before")))}
            rows.append({
                "method": method, "domain": domain, "share": row.get("expert_share"),
                "before": value.get("perplexity"), "before_ci": value.get("ci95"),
                **{key: each.nats if each else None for key, each in against.items()},
                **{f"{key}_ci": each.interval if each else None for key, each in against.items()}})
    return rows


def foreseen(cells: Cells) -> Rows:
    """What trigrams foresee of every domain, beside each method's difference from slm."""
    rows = []
    resampled = cells.rows(Arm("slm-is"))
    for method in ordered(cells, lambda method: method.needs_domain or method.experts):
        own = methods.TABLE[method].needs_domain
        for domain, row in cells.rows(arm := Arm(method)).items():
            known = (row if own else resampled.get(domain, {})).get("foresight")
            found = difference(cells, arm, Arm("slm"), [domain])
            if known and found:
                rows.append({"method": method, "domain": domain,
                             "foreseen": known["gain"], "foreseen_ci": known["ci95"],
                             "difference": found.nats, "difference_ci": found.interval})
    return rows


def over_seeds(cells: Cells) -> Rows:
    """How far a method, and its difference from slm, move with the seed."""
    rows = []
    for method in cells.methods:
        values = cells.values(Arm(method), "seed")
        per_seed = [cells.rows(Arm(method, {"seed": seed})) for seed in values]
        domains = [d for d in cells.domains if all(d in found for found in per_seed)]
        found = [macro([rows_of[d] for d in domains]) for rows_of in per_seed]
        known = [each["perplexity"] for each in found if each]
        if len(known) < 2:
            continue
        nats = [each.nats for seed in values if method != "slm" and (each := difference(
            cells, Arm(method, {"seed": seed}), Arm("slm", {"seed": seed}), domains))]
        rows.append({
            "method": method, "seeds": ", ".join(str(seed) for seed in values),
            "domains": over(cells, domains), "lowest": min(known), "highest": max(known),
            "low": min(nats, default=None), "high": max(nats, default=None),
            **_cost([rows_of[d] for rows_of in per_seed for d in domains])})
    return rows
