"""What the rows of the paper's tables are of: lines of averages, and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, product
from typing import Any

from planearly import methods
from planearly.methods import label
from planearly.report.form import flops, number
from planearly.report.table import Column
from planearly.studies.paper import published
from planearly.study import seeds
from planearly.study.compare import BUDGET, Arm, Cells, Row, When, difference, macro, mean_cost
from planearly.study.spec import (
    DOMAIN,
    Line,
    Lines,
    Rows,
    alone,
    facts_of,
    has_experts,
    mean,
    ordered,
    over,
    shown,
    sweep,
)

EMBEDDER, POOL, RANK = "cluster.embedder", "data.max_tokens", "projected.rank"

def papers(cells: Cells) -> list[str]:
    """The paper's methods that the study has."""
    return ordered(cells, lambda method: not method.source)


# Lines of averages --------------------------------------------------------------------------------

def by_size(cells: Cells, chosen: Sequence[str], against: str = "slm") -> list[Line]:
    """Methods at each specialization size, against one of them at that size."""
    return [Line({"method": method}, Arm(method, {"spec_tokens": size}),
                 Arm(against, {"spec_tokens": size}))
            for method in chosen for size in cells.values(Arm(method), "spec_tokens")]


def others(cells: Cells) -> list[Line]:
    """Methods that the paper has not, and that are no selectors of generic text."""
    return by_size(cells, ordered(
        cells, lambda method: bool(method.source) and not method.per_domain))


def larger_sets(cells: Cells) -> list[Line]:
    """Methods that have several specialization sizes, at each."""
    return by_size(cells, [method for method in papers(cells)
                           if len(cells.values(Arm(method), "spec_tokens")) > 1])


def adapted(cells: Cells) -> list[Line]:
    """The large model and its adapters, by set size."""
    return by_size(cells, ("llm", "llm-lora"), "llm") if "llm-lora" in cells.methods else []


def by_budget(cells: Cells) -> list[Line]:
    """Methods at each pretraining budget and set size, blends of experts among them."""
    lines = []
    for size in cells.values_of("spec_tokens"):
        for method in papers(cells):
            blend = {"expert": "blend"} if cells.own("expert") != "blend" else None
            for rule in ({}, blend) if has_experts(method) and blend else ({},):
                for budget in cells.values(Arm(method, {"spec_tokens": size, **rule}), BUDGET):
                    plain = Arm("slm", {"spec_tokens": size,
                                        BUDGET: cells.beside(method, budget)})
                    lines.append(Line({"method": f"{method}, blend" if rule else method},
                                      Arm(method, {**plain.changes, BUDGET: budget, **rule}),
                                      plain))
    return lines


def several_budgets(cells: Cells) -> list[Line]:
    """The same, if a method was run at more than one budget."""
    lines = by_budget(cells)
    return lines if len({line.arm.changes[BUDGET] for line in lines}) > 1 else []


def smallest(lines: Lines) -> Lines:
    """The lines at the smallest set size that any has, held against nothing."""
    def chosen(cells: Cells) -> list[Line]:
        found = lines(cells)
        sizes = [size for size in cells.values_of("spec_tokens")
                 if any(line.arm.changes["spec_tokens"] == size for line in found)]
        return alone(line for line in found if line.arm.changes["spec_tokens"] in sizes[:1])
    return chosen


def generic_models(cells: Cells) -> list[Line]:
    """What is pretrained once for all domains, each once: small, large, and experts."""
    return [line for line in smallest(several_budgets)(cells)
            if (row := methods.TABLE[line.arm.method]).pretrains and not row.needs_domain
            and row.pretraining() == line.labels["method"]]


def expert_choices(cells: Cells) -> list[Line]:
    """Methods with experts, by their number and the rule that chooses."""
    lines = []
    for method in ordered(cells, lambda method: method.experts):
        key = f"{methods.TABLE[method].bank}.experts"
        for many in cells.values_of(key):
            rules = cells.values(Arm(method, {key: many}), "expert")
            lines += [Line({"method": method, "experts": many, "setting": rule},
                           Arm(method, {key: many, "expert": rule}), Arm(method, {key: many}))
                      for rule in rules if len(rules) > 1]
    return lines


def along(method: str, key: str) -> Lines:
    """One method along one setting, against slm."""
    return lambda cells: sweep(cells, [method], key, Arm("slm"))


def numbers_of_experts(cells: Cells) -> list[Line]:
    """The projected network at each number of experts and of slices that was run, against slm."""
    return [replace(line, further={**line.further, "series": f"h = {line.labels['beside']}"})
            for line in sweep(cells, ["slm-pn"], "projected.experts", Arm("slm"), RANK)]


def top_cluster(cells: Cells) -> list[Line]:
    """The most frequent cluster alone, against importance sampling at the same k."""
    pair = ("slm-is", "slm-top")
    return [Line({"method": method, "setting": shown(k, "importance.k")},
                 Arm(method, {"importance.k": k}), Arm("slm-is", {"importance.k": k}), {"x": k})
            for method in pair for k in cells.values(Arm("slm-top"), "importance.k")
            if all(name in cells.methods for name in pair)]


def selectors(cells: Cells) -> list[Line]:
    """Ways to choose generic text for a domain, the first taking it as it is, by clusters and
    embedder."""
    chosen = ["slm", *sorted(ordered(cells, lambda method: method.per_domain), key=_selects)]
    if len([method for method in chosen if method in cells.methods]) < 2:
        return []
    pools = cells.values_of(POOL)
    lines = []
    for pool, method in product(pools, chosen):
        row = methods.TABLE[method]
        at = Arm(method, {POOL: pool})
        for name in cells.values(at, EMBEDDER) if row.embedded else [cells.own(EMBEDDER)]:
            of = Arm(method, {**at.changes, EMBEDDER: name})
            for k in (cells.values(of, "importance.k") if row.weighs
                      else [cells.own("importance.k")]):
                labels = {"method": method, "embedder": str(name) if row.embedded else None,
                          "setting": shown(k, "importance.k") if row.weighs else None,
                          "pool": f"of {shown(pool, POOL)}" if pool else None}
                bar = ", ".join(
                    str(value) for key, value in labels.items() if value is not None
                    and (key != "pool" or len(pools) > 1)
                    and (key != "embedder" or value != cells.own(EMBEDDER)))
                lines.append(Line(labels, Arm(method, {**of.changes, "importance.k": k}),
                                  Arm("slm", {POOL: pool}), {"bar": bar}))
    return lines


def _selects(method: str) -> int:
    """Selectors that know no clusters first, the paper's last."""
    row = methods.TABLE[method]
    return (not row.source) * 2 + row.weighs


def slices(cells: Cells) -> list[Line]:
    """The projected network by slices of its bank and budget, experts chosen and blended."""
    rules = [rule for rule in (single_rule(cells, "slm-pn"), "blend") if rule]
    lines = [Line({"method": "slm-pn", "setting": h, "rule": rule},
                  Arm("slm-pn", {BUDGET: budget, RANK: h, "expert": rule}),
                  Arm("slm", {BUDGET: budget}), {"series": f"h = {h}, {rule}"})
             for rule in rules for h in cells.values_of(RANK) for budget in cells.values_of(BUDGET)]
    several = {line.labels["setting"] for line in lines if cells.rows(line.arm)}
    return lines if len(several) > 1 else []


AXES = ("spec_tokens", BUDGET, "seed")
"""What a variant has in common with what it is compared with."""


def variants(cells: Cells) -> list[Line]:
    """Every setting that was varied, against the method as the recipe has it."""
    lines: dict[str, Line] = {}
    for row in cells.all_rows:
        settings = row["settings"]
        kept = {key: settings[key] for key in AXES if key in settings}
        changes = {key: value for key, value in settings.items()
                   if key not in AXES and value != cells.own(key)}
        if changes:
            said = ", ".join(f"{key} {shown(value, key)}" for key, value in changes.items())
            lines.setdefault(f"{row['method']} {kept} {said}", Line(
                {"method": row["method"], "setting": said}, Arm(row["method"], settings),
                Arm(row["method"], kept), {"seed": settings.get("seed", cells.own("seed"))}))
    return list(lines.values())


def best_by_budget(cells: Cells, rows: Rows) -> Rows:
    """The best method within each limit of inference, of generic pretraining and per domain, and
    those that it cannot be told from.

    Limits of generic pretraining are 0 and what slm's budgets cost; per domain, either fine-tuning
    alone is allowed, or pretraining as well. The figure shows a best once for all successive limits
    within which it is the best.
    """
    within = [row for row in rows if row["after"] is not None and row["drawn"]]
    limits = sorted({0.0} | {row["generic_flops"] for row in within if row["method"] == "slm"})
    found: Rows = []
    for large, owned in product((False, True), (False, True)):
        best = [_best(cells, within, large, owned, limit) for limit in limits]
        for _, alike in groupby(filter(None, best), key=lambda row: (
                row["method"], row["budget"], row["level"])):
            first, *others = run = list(alike)
            span = " to ".join(flops(row["limit"]) for row in (first, *others[-1:]))
            found += [{**row, "limits": span, "drawn": row is first} for row in run]
    return found


def _best(cells: Cells, rows: Rows, large: bool, owned: bool, limit: float) -> Row | None:
    """The best of the rows within limits; None where what is allowed is no more than what another
    row of the table is of."""
    allowed: dict[str, Row] = {}  # each method's best, from the best on
    for row in sorted(rows, key=lambda row: row["after"]):
        method = methods.TABLE[_plain(row["method"])]
        if row["generic_flops"] <= limit * (1 + SLACK) and (large or not method.large) and (
                owned or not method.needs_domain):
            allowed.setdefault(method.name, row)
    # what no large model is among is said of small ones
    if not any(methods.TABLE[name].large == large for name in allowed):
        return None
    best, *others = allowed.values()
    level = [row for row in others if not worse(cells, row, best)]
    said = [f"{row['method']}, {number(row['after'])}" for row in others]
    return {
        **best, "inference": "large" if large else "small", "limit": limit,
        "per_domain": "pretraining too" if owned else "fine-tuning alone",
        "panel": f"{'large' if large else 'small'} model, "
                 f"{'pretraining and fine-tuning' if owned else 'fine-tuning alone'} per domain",
        "next": said[0] if said else None,
        "level": "; ".join(f"{row['method']}, {number(row['after'])}" for row in level) or None,
        "told": f"{label(best['method'])} {number(best['after'])}" + "".join(
            f"{', level with' if row is level[0] else ','} {label(row['method'])}"
            for row in level)}


def worse(cells: Cells, row: Row, other: Row) -> bool:
    """Whether a row is told to be worse than another, over documents and seeds."""
    name = ("worse", str(row["arm"]), str(other["arm"]))
    if name not in cells.memo:
        found = seeds.difference(cells, row["arm"], other["arm"])
        cells.memo[name] = found is not None and found.side() > 0
    return bool(cells.memo[name])


SLACK = 0.1
"""By how much a cost may exceed a limit that it is said to keep."""


def _plain(label: str) -> str:
    """The method of a line that may be of its blend."""
    return label.split(",")[0]


# Other rows ---------------------------------------------------------------------------------------

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
        theirs = published.BY_CLUSTERS[what]
        return [{"domain": domain, **{f"k{k}": cells.entropy(domain, k, what) for k in _ks(cells)},
                 **{f"papers{k}": theirs.get(domain, {}).get(k) for k in _papers_ks(cells, what)}}
                for domain in cells.study.get("entropies") or {} if _ks(cells)]
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
    theirs = published.BY_CLUSTERS[what]
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


def single_rule(cells: Cells, method: str) -> str | None:
    """The rule that picks one expert: the recipe's own, or else the first that was run."""
    rules = cells.values(Arm(method), "expert")
    wanted = [cells.own("expert"), "lowest-loss", "most-frequent", "best-tuned"]
    return next((rule for rule in wanted if rule in rules and rule != "blend"), None)


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


# Rows made of averages ----------------------------------------------------------------------------

def before_and_after(cells: Cells, rows: Rows) -> Rows:
    """Each row twice, by when its perplexity is of."""
    return [{**row, "when": f"{when} fine-tuning", "ppl": row[when],
             "ppl_ci": row[f"{when}_ci"]}
            for when in ("before", "after") for row in rows if row[when] is not None]


def of_generic_text(cells: Cells, rows: Rows) -> Rows:
    """The rows, where any has a generic perplexity, with how it was taken in their names."""
    routed = {row["method"] for row in rows if row["routed"]}
    return [{**row, "series": row["method"] + (", routed" if row["method"] in routed else "")}
            for row in rows if any(other["generic"] is not None for other in rows)]


def total(n: int) -> Callable[[Cells, Rows], Rows]:
    """C(N) of every row, and whether it is on the front: of the small models from the cheapest on,
    each that is told to be better than the last one on it."""
    def then(cells: Cells, rows: Rows) -> Rows:
        costed = [{**row, **{f"total_{what}": row[f"generic_{what}"] + n * row[f"own_{what}"]
                             for what in ("tokens", "flops", "hours")}, "front": False}
                  for row in rows]
        last: Row | None = None
        for row in sorted((row for row in costed if row["drawn"] and row["after"] is not None),
                          key=lambda row: (row["total_flops"], row["after"])):
            if not methods.TABLE[_plain(row["method"])].large and (
                    last is None or worse(cells, last, row)):
                row["front"], last = True, row
        return costed
    return then
