"""Claims about what has experts, SLM-pn and SLM-mix, at every budget that it was run with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planearly import methods
from planearly.plan import sizes
from planearly.studies.paper import published
from planearly.studies.paper.rows import RANK, single_rule
from planearly.study.compare import BUDGET, Arm, Cells, shared
from planearly.study.seeds import difference, estimate
from planearly.study.spec import shown
from planearly.study.verdict import (
    NEEDED,
    Claim,
    at,
    judged,
    said,
    sizes_of,
    unjudged,
    versus,
)
from planearly.units import short

STARVED = 1.0
"""Pretraining tokens per parameter below which an expert of a mixture has hardly begun."""
EVENLY = 0.1
"""By how much a budget may differ from what one of a mixture's experts sees on average."""
WIDE = 2 / 9
"""Share of a study's domains that count as wide: the paper names two of its nine."""


def starved(cells: Cells, arm: Arm) -> str:
    """A sentence on a mixture whose experts saw too few tokens to say anything; "" otherwise."""
    row = next(iter(cells.rows(arm).values()), None)
    if not row or arm.method != "slm-mix" or not row.get("k"):
        return ""
    each = row["pretrain_tokens"] / row["k"]
    if each >= STARVED * row["inference_params"]:
        return ""
    return (f"The mixture is left out: {row['k']} experts of {short(row['inference_params'])} "
            f"parameters saw {short(each)} tokens each, and have hardly begun.")


@dataclass(frozen=True)
class Level:
    """Budgets of a method and of slm that are held against each other.

    Attributes:
        mine, slms: what changes of either's settings.
        when: how to say them, after a claim; "" where there is one alone.
    """

    mine: dict[str, Any]
    slms: dict[str, Any]
    when: str = ""


def levels(cells: Cells, method: str) -> list[Level]:
    """The budgets at which a method is held against slm, ascending.

    The main ones alone where there are no others: what a method gains may hang on the budget.
    """
    pairs = cells.budgets(method)
    if len(pairs) < 2:
        return [Level({}, {})]
    return [Level({BUDGET: mine}, {BUDGET: slms}, f", with {shown(mine, BUDGET)} tokens of "
                  "pretraining" + (f" against {shown(slms, BUDGET)}" if slms != mine else ""))
            for mine, slms in pairs]


def is_own(cells: Cells, method: str, level: Level) -> bool:
    """Whether it is the level of the main comparison."""
    return all(level_of.get(BUDGET, cells.main(name, BUDGET)) == cells.main(name, BUDGET)
               for name, level_of in ((method, level.mine), ("slm", level.slms)))


def experts_help(cells: Cells) -> list[Claim]:
    """PN and mix beat SLM on the small set; what they differ by erodes with more data."""
    found = []
    for method, name in (("slm-pn", "SLM-pn"), ("slm-mix", "SLM-mix")):
        for level in levels(cells, method):
            sizes = sizes_of(cells, Arm(method, level.mine), Arm("slm", level.slms))
            for rule, who in (({}, name), ({"expert": "blend"}, f"{name}, its experts blended,")):
                if rule and not cells.rows(Arm(method, {**level.mine, **rule})):
                    continue
                text = f"{who} beats SLM after fine-tuning on the small set{level.when}."
                if why := starved(cells, Arm(method, level.mine)):
                    found.append(replace(unjudged(text, why, "table-08-budgets"),
                                         ours=bool(rule), setting=level.when))
                    continue
                tests = [versus(cells, Arm(method, {**level.mine, **rule, "spec_tokens": size}),
                                Arm("slm", {**level.slms, "spec_tokens": size}), where=at(size))
                         for size in sizes[:1]]
                alike = level.mine == level.slms
                claim = judged(
                    cells, text, -1, tests or [(f"{method} against slm", None)],
                    "table-08-budgets", reason="Tokens are those of all experts together."
                    if not alike else
                    "At the same pretraining tokens, those of all experts together.")
                found.append(replace(
                    claim, ours=bool(rule), setting=level.when, why=tokens_lacked(cells, method),
                    paper="" if rule else published.against(method, "slm")))
        found.append(erodes(cells, method, name))
    return found


def best_number(cells: Cells) -> list[Claim]:
    """32 experts are the projected network's best trade-off: better than 16, which 64 add less to;
    with the paper's slices for each number, and, which is ours, with as many for all."""
    few, best, many = sizes.PAPER_SLICES
    text = (f"{best} experts are SLM-pn's best trade-off: better than {few}, and {many} add less "
            "than that")
    table, found = "figure-07-pn-experts", []
    theirs = ", with h = {}, {} and {}".format(*sizes.PAPER_SLICES.values())
    ladders = {theirs: sizes.PAPER_SLICES} | {
        f", with h = {h}": dict.fromkeys(sizes.PAPER_SLICES, h)
        for h in cells.values_of(RANK) if h}
    for setting, slices in ladders.items():
        arms = [Arm("slm-pn", {"projected.experts": n, RANK: h}) for n, h in slices.items()]
        if domains := shared(cells, arms):
            lower, own, upper = arms
            bend = estimate(cells, [(2.0, own), (-1.0, lower), (-1.0, upper)], domains)
            what, further = versus(cells, upper, own, domains)
            claim = judged(
                cells, f"{text}{setting}.", -1,
                [versus(cells, own, lower, domains),
                 (f"({best} less {few}) less ({many} less {best})", bend)],
                table, reason=f"{what}: {said(cells, further)}." if further else "")
            ours = setting != theirs
            found.append(replace(claim, setting=setting, ours=ours,
                                 paper="" if ours else published.TRADED))
    return found or [replace(unjudged(
        f"{text}.", f"Rows are missing for: slm-pn with {few}, {best} and {many} experts on one "
        "domain.", table, True), paper=published.TRADED)]


def tokens_lacked(cells: Cells, method: str) -> str:
    """Whether a mixture is behind because its experts divide the tokens: ahead of SLM with as many
    tokens as one of them sees, which loses more by having no more; "" where that is not shown."""
    own = {name: cells.main(name, BUDGET) for name in ("slm-mix", "slm")}
    k = cells.own("mixture.experts")
    if method != "slm-mix" or not all(own.values()):
        return ""
    for budget in cells.values(Arm("slm"), BUDGET):
        if abs(budget * k / own["slm-mix"] - 1) > EVENLY:
            continue
        few = Arm("slm", {BUDGET: budget})
        gained, lost = versus(cells, Arm("slm-mix"), few), versus(cells, few, Arm("slm"))
        if not all(each and each.seeds >= NEEDED and each.side() == sign
                   for (_, each), sign in ((gained, -1), (lost, 1))):
            continue
        told = [f"{what}: {said(cells, each)}" for what, each in (gained, lost) if each]
        shares = [(ours, published.SHARES[domain][1]) for domain in cells.rows(few)
                  if (ours := cells.entropy(domain, k, "largest_share")) is not None
                  and domain in published.SHARES and k == published.CLUSTERS[method]]
        held = "" if not shares else (
            " A domain's most frequent cluster has {:.0%} of it here, and {:.0%} in the paper "
            "(Table 9), on average.".format(*np.mean(shares, axis=0)))
        return (f"Too few tokens for an expert, as {shown(own['slm-mix'], BUDGET)} for all show: "
                f"its own are of more use than as many of all text, {told[0]}; but having no more "
                f"costs more than that, {told[1]}.{held}")
    return ""


def erodes(cells: Cells, method: str, name: str) -> Claim:
    """The difference at the largest set less that at the smallest, on the same documents.

    At the largest budget that has two set sizes. In the paper it is an advantage that erodes.
    """
    text = f"What sets {name} apart from SLM erodes with more specialization data"
    table = "figure-05-set-size"
    at_level = [(level, several) for level in levels(cells, method)
                if len(several := sizes_of(
                    cells, Arm(method, level.mine), Arm("slm", level.slms))) > 1]
    if not at_level:
        return unjudged(f"{text}.", f"Rows are missing for: {method} and slm at two set sizes.",
                        table, True)
    level, sizes = at_level[-1]
    text += f"{level.when}."
    if not is_own(cells, method, level):
        table = "table-08-budgets"
    if why := starved(cells, Arm(method, level.mine)):
        return unjudged(text, why, table)
    (mine, slms), (mine_large, slms_large) = (
        (Arm(method, level.mine).at(spec_tokens=size), Arm("slm", level.slms).at(spec_tokens=size))
        for size in (sizes[0], sizes[-1]))
    change = estimate(cells, [(1.0, mine_large), (-1.0, slms_large), (-1.0, mine), (1.0, slms)])
    first = versus(cells, mine, slms, change.domains if change else None, at(sizes[0]))
    if first[1] is None or first[1].side() == 0:
        seen = f" {first[0]}: {said(cells, first[1])}." if first[1] else ""
        return unjudged(text, "No difference on the small set can be told, which could erode."
                        + seen, table, one_seed=first[1] is not None and first[1].seeds < NEEDED)
    words = f"difference at {shown(sizes[-1], 'spec_tokens')} less that {at(sizes[0])[:-2]}"
    reason = f"{first[0]}: {said(cells, first[1])}."
    last = versus(cells, mine_large, slms_large, change.domains if change else None,
                  at(sizes[-1]))
    if last[1] and abs(last[1].nats) >= abs(first[1].nats) and \
            last[1].side() == -first[1].side():
        return unjudged(text, f"It turns into its opposite. {reason} {last[0]}: "
                        f"{said(cells, last[1])}.", table)
    claim = judged(cells, text, -first[1].side(), [(words, change)], table, reason=reason)
    return replace(claim, paper=published.eroded(method))


def wide_domains(cells: Cells) -> list[Claim]:
    """Mix and PN fare worse on wide domains, and do not beat SLM there, unless blended."""
    found = []
    for method, name in (("slm-pn", "SLM-pn"), ("slm-mix", "SLM-mix")):
        rule = single_rule(cells, method)
        for level in levels(cells, method):
            when, plain = level.when, Arm("slm", level.slms)
            single = Arm(method, {**level.mine, "expert": rule})
            wide, narrow = by_width(cells, single, shared(cells, [single, plain]))
            if not wide and not is_own(cells, method, level):
                continue
            text = (f"{name} fares worse against SLM on wide domains than on narrow ones, and does "
                    f"not beat it there{when}.")
            if why := starved(cells, single):
                found.append(replace(unjudged(text, why, "table-08-budgets"), setting=when))
                continue
            found.append(replace(worse_where_wide(cells, text, single, plain, wide, narrow),
                                 setting=when, paper=published.WIDE))
            blend = Arm(method, {**level.mine, "expert": "blend"})
            tests = [versus(cells, blend, plain, wide)] if wide else [
                (f"{method}, blended, against slm on wide domains", None)]
            beside = difference(cells, blend, single, wide) if wide else None
            claim = judged(
                cells, f"Blending the experts gives {name} an advantage on wide domains{when}.",
                -1, tests, "figure-13-domains-after" if when else "extra-blend",
                reason=f"The blend against the single expert ({rule}): {said(cells, beside)}."
                if beside else "")
            found.append(replace(claim, ours=True, setting=when))
    return found


def worse_where_wide(cells: Cells, text: str, single: Arm, plain: Arm, wide: Sequence[str],
                     narrow: Sequence[str]) -> Claim:
    """A larger difference to SLM on the wide domains, where no advantage is to be seen."""
    table = "extra-blend" if cells.rows(Arm(single.method, {"expert": "blend"})) else (
        "figure-13-domains-after")
    if not wide:
        return unjudged(text, f"Rows or cluster entropies are missing for: {single.method} and slm "
                        "on three domains.", table, True)
    has = {label: difference(cells, single, plain, domains)
           for label, domains in (("wide", wide), ("narrow", narrow))}
    change = estimate(cells, [(1.0, single), (-1.0, plain)], weights={
        **dict.fromkeys(wide, 1 / len(wide)), **dict.fromkeys(narrow, -1 / len(narrow))})
    evidence = "; ".join(f"{single.method} less slm on {label} domains: {said(cells, each)}"
                         for label, each in has.items() if each) + "."
    if has["wide"] and has["wide"].side() < 0 and has["wide"].seeds >= NEEDED:
        return Claim(text, "not reproduced", f"It has an advantage there. {evidence}", table)
    return judged(cells, text, 1, [("wide less narrow", change)], table, reason=evidence)


def by_width(cells: Cells, arm: Arm, domains: Sequence[str]) -> tuple[list[str], list[str]]:
    """The domains with the largest entropy at the arm's clusters (:data:`WIDE`), and the others."""
    rows = cells.rows(arm)
    entropy = {d: e for d in domains if (e := cells.entropy(d, rows[d].get("k"))) is not None}
    if len(entropy) < 3:
        return [], []
    ordered = sorted(entropy, key=lambda domain: -entropy[domain])
    many = max(round(WIDE * len(ordered)), 1)
    return ordered[:many], ordered[many:]


def own_clusters(cells: Cells) -> list[Claim]:
    """Before fine-tuning, every window of a domain through its own cluster's expert, as the paper's
    generic text goes: against SLM, and against the one expert that serves the domain."""
    found = []
    for method, name in (("slm-pn", "SLM-pn"), ("slm-mix", "SLM-mix")):
        routed, before = Arm(method, when="routed"), Arm("slm", when="before")
        if shared(cells, [routed, before]):
            claim = judged(
                cells, f"{name} beats SLM before fine-tuning where each window of a domain goes "
                "through its own cluster's expert.", -1, [versus(cells, routed, before)],
                "extra-routed")
            one = judged(
                cells, f"{name}'s experts, one for each window by its cluster, are better before "
                "fine-tuning than one for all of a domain.", -1,
                [versus(cells, routed, replace(routed, when="before"))], "extra-routed")
            found += [replace(claim, ours=True), replace(one, ours=True)]
    return found


def choice(cells: Cells) -> list[Claim]:
    """An expert chosen by its loss is better than that of the most frequent cluster."""
    found = []
    for method, name in (("slm-mix", "SLM-mix"), ("slm-pn", "SLM-pn")):
        key, rules = f"{methods.TABLE[method].bank}.experts", ("lowest-loss", "most-frequent")
        pairs = [(Arm(method, {key: many, "expert": rules[0]}),
                  Arm(method, {key: many, "expert": rules[1]})) for many in cells.values_of(key)]
        tests = [versus(cells, a, b) for a, b in pairs if shared(cells, [a, b])]
        claim = judged(
            cells, f"{name}'s expert is better chosen by its loss than by the most frequent "
            "cluster.", -1, tests[-1:] or [(f"{method} by both rules", None)],
            "table-05-experts")
        # the paper's Table 5 is of a mixture
        found.append(replace(claim, paper=published.chosen() if method == "slm-mix" else "",
                             ours=method != "slm-mix"))
    return found


def large_or_network(cells: Cells) -> list[Claim]:
    """Of what is paid before the domain is known: the large model, then PN, then mix."""
    found = []
    for method, other, text in (
            ("slm-pn", "slm-mix", "SLM-pn beats SLM-mix on the small set"),
            ("llm", "slm", "Where inference allows it, the large model beats SLM"),
            ("llm", "slm-pn", "Where inference allows it, the large model beats SLM-pn")):
        sizes = sizes_of(cells, method, other)[:1]
        pairs = cells.budgets(method, other) or [
            (cells.main(method, BUDGET), cells.main(other, BUDGET))]
        tests = [versus(cells, Arm(method, {BUDGET: mine, "spec_tokens": size}),
                        Arm(other, {BUDGET: theirs, "spec_tokens": size}), where=at(size))
                 for size in sizes for mine, theirs in pairs]
        left = [why for _, theirs in pairs
                if (why := starved(cells, Arm(other, {BUDGET: theirs})))]
        budgets = f", at {len(pairs)} budgets" if len(pairs) > 1 else ""
        claim = unjudged(f"{text}{budgets}.", left[0], "table-08-budgets") if left else judged(
            cells, f"{text}{budgets}.", -1, tests or [(f"{method} against {other}", None)],
            "table-08-budgets")
        found.append(replace(claim, paper=published.against(method, other)))
    return found
