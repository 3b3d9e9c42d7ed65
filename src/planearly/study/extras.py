"""Tables beyond the paper: selectors, blends, slices of the bank, mixing, replay, optimisers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from planearly.study import build
from planearly.study.build import METHOD, Line, macro_table, sweep
from planearly.study.compare import BUDGET, Arm, Cells, difference, macro, mean_cost
from planearly.study.table import Axis, Column, Figure, Table

SELECTORS = ("slm", "slm-dsir", "slm-knn", "slm-top", "slm-is")
"""Ways to choose generic text for a domain, the first taking it as it is."""
CLUSTERED = ("slm-top", "slm-is")
EMBEDDED = ("slm-knn", *CLUSTERED)
EMBEDDER, POOL = "cluster.embedder", "data.max_tokens"


def selectors(cells: Cells) -> list[Table]:
    """Selectors of generic text at equal tokens, by clusters and embedder."""
    if len([method for method in SELECTORS if method in cells.methods]) < 2:
        return []
    pools = cells.values_of(POOL)
    lines = []
    for pool, method in product(pools, SELECTORS):
        at = Arm(method, {POOL: pool})
        for name in cells.values(at, EMBEDDER) if method in EMBEDDED else [cells.own(EMBEDDER)]:
            of = Arm(method, {**at.changes, EMBEDDER: name})
            for k in cells.values(of, "importance.k") if method in CLUSTERED else [
                    cells.own("importance.k")]:
                lines.append(Line({
                    "method": method, "embedder": str(name) if method in EMBEDDED else None,
                    "setting": build.shown(k, "importance.k") if method in CLUSTERED else None,
                    "pool": f"of {build.shown(pool, POOL)}" if pool else None,
                }, Arm(method, {**of.changes, "importance.k": k}), Arm("slm", {POOL: pool})))
    for line in lines:
        line.further["bar"] = ", ".join(
            str(value) for key, value in line.labels.items()
            if value is not None and (key != "pool" or len(pools) > 1)
            and (key != "embedder" or value != cells.own(EMBEDDER)))
    return macro_table(
        cells, lines, [METHOD, Column("embedder", "embedder", "text"),
                       Column("setting", "clusters", "text"),
                       *([Column("pool", "generic tokens", "text")] if len(pools) > 1 else [])],
        name="extra-selectors", title="Selectors of generic text at equal tokens", paper="",
        before=True, note="The same number of pretraining tokens for each, drawn from what the "
        "selector takes of the generic corpus. The baseline is slm, which takes it as it is, of as "
        "many generic tokens.",
        figure=Figure("bars", Axis("bar", "selector"), build.AFTER_AXIS, "method", "after_ci"))


def slices(cells: Cells) -> list[Table]:
    """The projected network by slices of its bank and budget, experts chosen and blended."""
    rank = "projected.rank"
    rules = [rule for rule in (single_rule(cells, "slm-pn"), "blend") if rule]
    lines = [Line({"method": "slm-pn", "setting": h, "rule": rule},
                  Arm("slm-pn", {BUDGET: budget, rank: h, "expert": rule}),
                  Arm("slm", {BUDGET: budget}),
                  {"series": f"h = {h}, {rule}"})
             for rule in rules for h in cells.values_of(rank) for budget in cells.values_of(BUDGET)]
    if len({line.labels["setting"] for line in lines if cells.rows(line.arm)}) < 2:
        return []
    return macro_table(
        cells, lines, [METHOD, build.BUDGET, Column("setting", "slices h"),
                       Column("rule", "expert", "text")],
        name="extra-slices", title="Slices of the projected network's bank", paper="",
        before=True, extra=build.GENERIC, note="h slices are combined into each expert's matrices: "
        "many hold more and need more tokens. The baseline is slm at the same budget.",
        figure=Figure("lines", Axis("budget", "tokens of pretraining", True),
                      Axis("after", build.AFTER_AXIS.label, True), "series", "after_ci"))


def single_rule(cells: Cells, method: str) -> str | None:
    """The rule that picks one expert: the recipe's own, or else the first that was run."""
    rules = cells.values(Arm(method), "expert")
    wanted = [cells.own("expert"), "lowest-loss", "most-frequent", "best-tuned"]
    return next((rule for rule in wanted if rule in rules and rule != "blend"), None)


def blends(cells: Cells) -> list[Table]:
    """The blend against the chosen single expert, and both against slm, by domain entropy."""
    rows = []
    for method in build.EXPERTS:
        if not (rule := single_rule(cells, method)):
            continue
        blend, single = Arm(method, {"expert": "blend"}), Arm(method, {"expert": rule})
        for domain, row in cells.rows(blend).items():
            against = {key: difference(cells, a, b, [domain]) for key, a, b in (
                ("difference", blend, single), ("blend_slm", blend, Arm("slm")),
                ("single_slm", single, Arm("slm")))}
            cost = mean_cost([row])
            value = macro([row]) or {}
            rows.append({
                "method": method, "domain": domain, "rule": rule,
                "entropy": cells.entropy(domain, row.get("k")),
                "after": value.get("perplexity"), "after_ci": value.get("ci95"),
                **{key: each.nats if each else None for key, each in against.items()},
                **{f"{key}_ci": each.interval if each else None for key, each in against.items()},
                "tokens": cost["tokens"], "flops": cost["flops"], "hours": cost["device_hours"]})
    rows.sort(key=lambda row: (row["method"], row["entropy"] or 0.0))
    return [Table(
        "extra-blend", "Blended experts by width of the domain", "",
        "Each domain's blend of experts against the single expert of the rule named, and both "
        "against slm, in nats per token on the same documents; below 0, the first is better. "
        "Domains are ordered from narrow to wide by the entropy of their cluster histogram.",
        [METHOD, Column("domain", "domain", "text"), Column("entropy", "entropy", "nats"),
         Column("rule", "single expert", "text"),
         Column("after", "perplexity of the blend", "perplexity"),
         Column("after_ci", "95% interval", "interval"),
         Column("difference", "blend less single", "nats"),
         Column("difference_ci", "95% interval", "interval"),
         Column("single_slm", "single less slm", "nats"),
         Column("single_slm_ci", "95% interval", "interval"),
         Column("blend_slm", "blend less slm", "nats"),
         Column("blend_slm_ci", "95% interval", "interval"), *build.COST],
        rows, Figure("points", Axis("entropy", "entropy of the domain, nats"),
                     Axis("difference", "blend less single expert, nats per token"), "method",
                     "difference_ci"))] if rows else []


def compared(name: str, title: str, key: str, label: str, note: str, share: bool = False,
             generic: bool = False) -> Callable[[Cells], list[Table]]:
    """A table of one setting for every method that varies it, against the recipe's own value.

    Args:
        share: the setting is a number, to be drawn along an axis.
        generic: with the perplexity on generic text after fine-tuning.
    """
    def make(cells: Cells) -> list[Table]:
        lines = sweep(cells, cells.methods, key)
        if not share:
            figure = Figure("bars", Axis("method", "method"), build.AFTER_AXIS, "setting",
                            "after_ci")
        else:
            figure = Figure("lines", Axis("x", label), build.AFTER_AXIS, "method", "after_ci")
        kept = [Column("generic_after", "generic perplexity after fine-tuning", "perplexity")]
        return macro_table(
            cells, lines, [METHOD, Column("setting", label, "text")], name=name, title=title,
            paper="", before=True, extra=kept if generic else (), figure=figure,
            note=f"{note} The baseline is the same method at the recipe's own value, "
            f"{build.shown(cells.own(key), key)}.")
    return make


AXES = ("spec_tokens", BUDGET, "seed")
"""What a variant has in common with what it is compared with."""


def variants(cells: Cells) -> list[Table]:
    """Every setting that was varied, against the method as the recipe has it."""
    lines: dict[str, Line] = {}
    for row in cells.all_rows:
        settings = row["settings"]
        kept = {key: settings[key] for key in AXES if key in settings}
        changes = {key: value for key, value in settings.items()
                   if key not in AXES and value != cells.own(key)}
        if changes:
            words = ", ".join(f"{key} {build.shown(value, key)}" for key, value in changes.items())
            lines.setdefault(f"{row['method']} {kept} {words}", Line(
                {"method": row["method"], "setting": words}, Arm(row["method"], settings),
                Arm(row["method"], kept), {"seed": settings.get("seed", cells.own("seed"))}))
    return macro_table(
        cells, lines.values(), [METHOD, Column("setting", "settings", "text"), build.BUDGET,
                                build.SET, Column("seed", "seed")],
        name="extra-variants", title="Every variant against the method as the recipe has it",
        paper="", least=1, apart=True, note="The baseline is the same method with none of these "
        "settings changed, at the same pretraining tokens, set size and seed.")


def seeds(cells: Cells) -> list[Table]:
    """How far a method, and its difference from slm, move with the seed."""
    rows = []
    for method in cells.methods:
        values = cells.values(Arm(method), "seed")
        if len(values) < 2:
            continue
        per_seed = [cells.rows(Arm(method, {"seed": seed})) for seed in values]
        domains = [d for d in cells.domains if all(d in found for found in per_seed)]
        found = [macro([rows_of[d] for d in domains]) for rows_of in per_seed]
        known = [each for each in found if each]
        if len(known) < 2:
            continue
        against = [difference(cells, Arm(method, {"seed": seed}), Arm("slm", {"seed": seed}),
                              domains) for seed in values] if method != "slm" else []
        nats = [each.nats for each in against if each]
        cost = mean_cost([rows_of[d] for rows_of in per_seed for d in domains])
        rows.append({
            "method": method, "seeds": ", ".join(str(seed) for seed in values),
            "domains": build.over(cells, domains),
            "lowest": min(each["perplexity"] for each in known),
            "highest": max(each["perplexity"] for each in known),
            "low": min(nats, default=None), "high": max(nats, default=None),
            "tokens": cost["tokens"], "flops": cost["flops"], "hours": cost["device_hours"]})
    return [Table(
        "extra-seeds", "Spread over seeds", "",
        "The same settings at several seeds, which draw the test documents, the specialization "
        "set, the sampler's order and the weights: perplexities of two seeds are of different "
        "text. The difference from slm is of the same seed and the same documents; how far it "
        "moves is what a seed does to a comparison.",
        [METHOD, Column("seeds", "seeds", "text"), Column("domains", "averaged over", "text"),
         Column("lowest", "lowest perplexity", "perplexity"),
         Column("highest", "highest perplexity", "perplexity"),
         Column("low", "lowest difference from slm, nats per token", "nats"),
         Column("high", "highest difference", "nats"), *build.COST],
        rows)] if rows else []


MAKERS: list[Callable[[Cells], list[Table]]] = [
    selectors, blends, slices,
    compared("extra-mixed", "Specialization text mixed into pretraining",
             "pretrain.specialization_share", "share of pretraining tokens",
             "Part of the pretraining tokens is drawn from the domain's own text.", share=True),
    compared("extra-replay", "Generic text replayed while fine-tuning", "finetune.replay_share",
             "share of fine-tuning tokens",
             "Replay should keep what the model knew of generic text.", share=True, generic=True),
    compared("extra-optimizer", "Optimisers", "pretrain.optimizer.preset", "optimiser",
             "'modern' is Muon and AdamW with a decay. 'paper' is the paper's Adam at 1e-4 without "
             "one, made for runs of a million steps: one of few steps hardly gets anywhere with "
             "it, so its row says how little such a rate does here, not that the paper erred."),
    variants, seeds,
]
