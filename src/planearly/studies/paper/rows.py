"""What the rows of the paper's tables are of that are averages: their lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, product

from planearly import methods
from planearly.methods import label
from planearly.report.form import flops, number
from planearly.study import seeds
from planearly.study.compare import BUDGET, Arm, Cells, Row
from planearly.study.spec import (
    Line,
    Lines,
    Rows,
    alone,
    has_experts,
    ordered,
    shown,
    sweep,
)

EMBEDDER, POOL, RANK = "cluster.embedder", "data.max_tokens", "projected.rank"
TEACHERS = "distill.teacher_tokens"


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


def single_rule(cells: Cells, method: str) -> str | None:
    """The rule that picks one expert: the recipe's own, or else the first that was run."""
    rules = cells.values(Arm(method), "expert")
    wanted = [cells.own("expert"), "lowest-loss", "most-frequent", "best-tuned"]
    return next((rule for rule in wanted if rule in rules and rule != "blend"), None)


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


def teachers(cells: Cells) -> list[Line]:
    """Students at each of their budgets under teachers of each, against slm at the student's; none
    where no student had two teachers."""
    found = {budget: cells.values(Arm("slm-d", {BUDGET: budget}), TEACHERS)
             for budget in cells.values_of(BUDGET)}
    if max(map(len, found.values()), default=0) < 2:
        return []
    return [Line({"method": "slm-d", "teacher": tokens or budget},
                 Arm("slm-d", {BUDGET: budget, TEACHERS: tokens}), Arm("slm", {BUDGET: budget}),
                 {"series": f"student of {shown(budget, BUDGET)}"})
            for budget, given in found.items() for tokens in given]


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


# Rows made of averages ----------------------------------------------------------------------------

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
                             for what in ("tokens", "flops", "hours")}, "front": ""}
                  for row in rows]
        last: Row | None = None
        for row in sorted((row for row in costed if row["drawn"] and row["after"] is not None),
                          key=lambda row: (row["total_flops"], row["after"])):
            if not methods.TABLE[_plain(row["method"])].large and (
                    last is None or worse(cells, last, row)):
                row["front"], last = "yes", row
        return costed
    return then
