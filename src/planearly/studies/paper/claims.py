"""The paper's claims, and some of ours, each judged by a study (see ``study.verdict``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from planearly import methods
from planearly.studies.paper import published
from planearly.studies.paper.rows import crossing_of, single_rule
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

FAR = 0.1
"""Nats per token that "far worse" has to exceed: a tenth of the perplexity."""
CLOSE = 0.035
"""Nats per token that "close" must stay below: the paper's 0.5 of a perplexity of 14."""
EQUAL_COST = 0.8
"""Share of a method's FLOPs from which on another one has about the same cost."""
STARVED = 1.0
"""Pretraining tokens per parameter below which an expert of a mixture has hardly begun."""
SEVERAL_TIMES = 2.5
"""How much dearer than SLM-is an SLM has to be; in the paper about 4 (530 and 130 GPU-hours)."""


def essential(cells: Cells) -> list[Claim]:
    """Fine-tuning is essential, and lifts a small model above a large one without it."""
    tests, beyond = [], []
    for method in ("slm", "slm-mix", "slm-pn", "llm"):
        for size in sizes_of(cells, method)[:1]:
            arm = Arm(method, {"spec_tokens": size})
            tests.append(versus(cells, arm, replace(arm, when="before"), where=at(size)))
    for size in sizes_of(cells, "slm", "llm")[:1]:
        changes = {"spec_tokens": size}
        beyond.append(versus(cells, Arm("slm", changes), Arm("llm", changes, "before"),
                             where=at(size)))
    table = "table-04-baselines"
    found = [
        judged(cells, "Fine-tuning is essential for every generically pretrained model (by more "
               f"than {FAR:g} nats per token).", -1,
               tests or [("slm before and after fine-tuning", None)], table, -FAR),
        judged(cells, "A small model that was fine-tuned beats the large one that was not.", -1,
               beyond or [("slm against llm before fine-tuning", None)], table),
    ]
    return [replace(claim, paper=theirs) for claim, theirs in zip(
        found, (published.tuned(), published.beyond()), strict=True)]


def no_pretraining(cells: Cells) -> list[Claim]:
    """No pretraining is far worse."""
    tests = [versus(cells, Arm("slm-nopt", {"spec_tokens": size}),
                    Arm("slm", {"spec_tokens": size}), where=at(size))
             for size in sizes_of(cells, "slm-nopt", "slm")]
    claim = judged(cells, "Training on the specialization set alone is far worse (by more than "
                   f"{FAR:g} nats per token).", 1, tests or [("slm-nopt against slm", None)],
                   "table-04-baselines", FAR)
    return [replace(claim, paper=published.unpretrained())]


def best_small(cells: Cells) -> list[Claim]:
    """SLM-is at the small set size: among small models, against a dearer SLM, against the LLM."""
    table = "table-04-baselines"
    size = next(iter(sizes_of(cells, "slm-is")), None)
    tokens = {cells.main(method, BUDGET) for method in ("slm-is", "slm", "slm-pn", "slm-mix")
              if method in cells.methods}
    equally = "at equal pretraining tokens" if len(tokens) < 2 else (
        f"with {shown(cells.main('slm-is', BUDGET), BUDGET)} pretraining tokens against "
        f"{shown(min(tokens - {cells.main('slm-is', BUDGET)}), BUDGET)} and more of the others")
    text = f"SLM-is is the best small model at the small set size, {equally}."
    if not sizes_of(cells, "slm-is"):
        nothing = [("slm-is against the other small models", None)]
        return [judged(cells, text, -1, nothing, table)]
    ours = Arm("slm-is", {"spec_tokens": size})
    left = [why for method in ("slm-mix",) if (why := starved(cells, Arm(method)))]
    others = [method for method in ("slm", "slm-mix", "slm-pn", "slm-d", "slm-nopt")
              if (method in ("slm", "slm-mix", "slm-pn") or method in cells.methods)
              and not (method == "slm-mix" and left)]
    found = [judged(
        cells, text, -1, [versus(cells, ours, Arm(other, ours.changes), where=at(size))
                          for other in others], table,
        reason=" ".join(["slm-is pays these tokens for every domain.", *left]))]
    dearer = [(arm, share) for budget in cells.values(Arm("slm", ours.changes), BUDGET)
              if (share := flops_of(cells, arm := Arm("slm", {**ours.changes, BUDGET: budget}),
                                    ours)) and share >= SEVERAL_TIMES]
    words = f"slm at {SEVERAL_TIMES:g} times the cost of slm-is or more"
    found.append(judged(
        cells, "SLM-is beats an SLM that costs several times as much for one domain.", -1,
        [versus(cells, ours, dearer[0][0], where=at(size))] if dearer else [(words, None)],
        "table-08-budgets", reason=f"That slm takes {dearer[0][1]:.1f} times the FLOPs; the "
        "paper's about 4 times the GPU-hours." if dearer else ""))
    ks = [k for k in cells.values(ours, "importance.k") if isinstance(k, int)]
    finest = ours.at(**{"importance.k": ks[-1]}) if ks else ours
    found.append(judged(
        cells, "SLM-is beats even the large model at the small set size.", -1,
        [versus(cells, finest, Arm("llm", ours.changes), where=at(size))],
        "figure-10-importance-k" if len(ks) > 1 else table,
        reason=f"At its largest number of clusters, {ks[-1]}." if len(ks) > 1 else ""))
    return [replace(claim, paper=published.sampled()) for claim in found]


def flops_of(cells: Cells, arm: Arm, other: Arm) -> float | None:
    """FLOPs of an arm for one domain, times those of another, over the domains of both."""
    domains = shared(cells, [arm, other])
    spent = [sum(cells.rows(each)[d]["cost"]["flops"] for d in domains) for each in (arm, other)]
    return spent[0] / spent[1] if domains and spent[1] else None


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


def grows_with_k(cells: Cells) -> list[Claim]:
    """The advantage of SLM-is grows with k, at equal tokens."""
    text = "The advantage of SLM-is grows with the number of clusters k, at equal tokens."
    table = "figure-10-importance-k"
    ks = [k for k in cells.values(Arm("slm-is"), "importance.k") if isinstance(k, int)]
    arms = [Arm("slm-is", {"importance.k": k}) for k in ks]
    domains = shared(cells, arms) if arms else []
    if len(ks) < 2 or not domains:
        return [unjudged(text, "Rows are missing for: slm-is at two or more k on one domain.",
                         table, True)]
    ends = versus(cells, arms[-1], arms[0], domains)
    steps = [versus(cells, b, a, domains) for a, b in pairwise(arms)]
    gains = [difference(cells, arm, Arm("slm"), domains) for arm in arms]
    reason = "Against slm at k = " + ", ".join(
        f"{k}: {gain.nats:+.3f}" for k, gain in zip(ks, gains, strict=True) if gain) + "."
    claim = judged(cells, text, -1, [ends], table, reason=reason if all(gains) else "")
    turned = [step for step in steps
              if step[1] and step[1].side() > 0 and step[1].seeds >= NEEDED]
    if turned and claim.verdict != "not reproduced":
        back = "; ".join(f"{what}: {said(cells, found)}" for what, found in turned if found)
        return [Claim(text, "not reproduced",
                      f"It does not grow all the way: {back}. From end to end, {claim.evidence}",
                      table)]
    return [claim]


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
    """PN and mix beat SLM on the small set; the advantage erodes with more data."""
    found = []
    for method, name in (("slm-pn", "SLM-pn"), ("slm-mix", "SLM-mix")):
        for level in levels(cells, method):
            sizes = sizes_of(cells, Arm(method, level.mine), Arm("slm", level.slms))
            for rule, who in (({}, name), ({"expert": "blend"}, f"{name}, its experts blended,")):
                if rule and not cells.rows(Arm(method, {**level.mine, **rule})):
                    continue
                text = f"{who} beats SLM after fine-tuning on the small set{level.when}."
                if why := starved(cells, Arm(method, level.mine)):
                    found.append(unjudged(text, why, "table-08-budgets"))
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
                found.append(replace(claim, ours=bool(rule), paper="" if rule else
                                     published.against(method, "slm")))
        found.append(erodes(cells, method, name))
    return found


def erodes(cells: Cells, method: str, name: str) -> Claim:
    """The advantage at the largest set less that at the smallest, on the same documents.

    At the largest budget that has two set sizes: there is most to erode.
    """
    text = f"The advantage of {name} over SLM erodes with more specialization data"
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
    if first[1] is None or first[1].side() >= 0:
        seen = f" {first[0]}: {said(cells, first[1])}." if first[1] else ""
        return unjudged(text, "No advantage on the small set can be told, which could erode."
                        + seen, table, one_seed=first[1] is not None and first[1].seeds < NEEDED)
    words = f"difference at {shown(sizes[-1], 'spec_tokens')} less that {at(sizes[0])[:-2]}"
    claim = judged(cells, text, 1, [(words, change)], table,
                   reason=f"{first[0]}: {said(cells, first[1])}.")
    return replace(claim, paper=published.eroded(method))


def wide_domains(cells: Cells) -> list[Claim]:
    """Mix and PN lose their advantage on wide domains, unless blended."""
    found = []
    for method, name in (("slm-pn", "SLM-pn"), ("slm-mix", "SLM-mix")):
        rule = single_rule(cells, method)
        for level in levels(cells, method):
            when, plain = level.when, Arm("slm", level.slms)
            single = Arm(method, {**level.mine, "expert": rule})
            wide, narrow = by_width(cells, single, shared(cells, [single, plain]))
            if not wide and not is_own(cells, method, level):
                continue
            if why := starved(cells, single):
                found.append(unjudged(f"{name} loses its advantage on wide domains{when}.", why,
                                      "table-08-budgets"))
                continue
            found.append(loses(cells, f"{name} loses its advantage on wide domains{when}.",
                               single, plain, wide, narrow))
            blend = Arm(method, {**level.mine, "expert": "blend"})
            tests = [versus(cells, blend, plain, wide)] if wide else [
                (f"{method}, blended, against slm on wide domains", None)]
            beside = difference(cells, blend, single, wide) if wide else None
            claim = judged(
                cells, f"Blending the experts gives {name} an advantage on wide domains{when}.",
                -1, tests, "figure-13-domains-after" if when else "extra-blend",
                reason=f"The blend against the single expert ({rule}): {said(cells, beside)}."
                if beside else "")
            found.append(replace(claim, ours=True))
    return found


def loses(cells: Cells, text: str, single: Arm, plain: Arm, wide: Sequence[str],
          narrow: Sequence[str]) -> Claim:
    """An advantage on the narrow domains, less of it and none to be seen on the wide ones."""
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
    few = any(each is not None and each.seeds < NEEDED for each in has.values())
    if not has["narrow"] or not has["wide"] or has["narrow"].side() >= 0:
        return unjudged(text, "No advantage on the narrow domains can be told, to be lost. "
                        + evidence, table, one_seed=few)
    if has["wide"].side() < 0 and has["wide"].seeds >= NEEDED:
        return Claim(text, "not reproduced", f"It keeps an advantage. {evidence}", table)
    return judged(cells, text, 1, [("wide less narrow", change)], table, reason=evidence)


def by_width(cells: Cells, arm: Arm, domains: Sequence[str]) -> tuple[list[str], list[str]]:
    """The third of the domains with the largest entropy at the arm's clusters, and the others."""
    rows = cells.rows(arm)
    entropy = {d: e for d in domains if (e := cells.entropy(d, rows[d].get("k"))) is not None}
    if len(entropy) < 3:
        return [], []
    ordered = sorted(entropy, key=lambda domain: -entropy[domain])
    many = round(len(ordered) / 3)
    return ordered[:many], ordered[many:]


def choice(cells: Cells) -> list[Claim]:
    """An expert chosen by its loss is better than that of the most frequent cluster."""
    found = []
    for method, name in (("slm-mix", "SLM-mix"), ("slm-pn", "SLM-pn")):
        key, rules = f"{methods.TABLE[method].bank}.experts", ("lowest-loss", "most-frequent")
        arms = [[Arm(method, {key: many, "expert": rule}) for rule in rules]
                for many in cells.values_of(key)]
        tests = [versus(cells, *pair) for pair in arms if shared(cells, pair)]
        claim = judged(
            cells, f"{name}'s expert is better chosen by its loss than by the most frequent "
            "cluster.", -1, tests[-1:] or [(f"{method} by both rules", None)],
            "table-05-experts")
        found.append(replace(claim, paper=published.chosen() if method == "slm-mix" else ""))
    return found


def large_or_network(cells: Cells) -> list[Claim]:
    """Of what is paid before the domain is known: the large model, then PN, then mix."""
    found = []
    for method, other, text in (
            ("slm-pn", "slm-mix", "SLM-pn beats SLM-mix on the small set"),
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


def distillation(cells: Cells) -> list[Claim]:
    """The gain of distillation does not pay for the teacher: SLM at the same cost is better."""
    text = ("Distillation's gain does not pay for the teacher: at the same cost for one domain, "
            "SLM is better.")
    table = "table-08-budgets"
    sizes = sizes_of(cells, "slm-d", "slm")[:1]
    if not sizes:
        return [unjudged(text, "Rows are missing for: slm-d against slm.", table, True)]
    student = Arm("slm-d", {"spec_tokens": sizes[0]})
    shares = []
    for budget in cells.values(Arm("slm", student.changes), BUDGET):
        arm = Arm("slm", {**student.changes, BUDGET: budget})
        if share := flops_of(cells, arm, student):
            shares.append((share, arm))
    cheaper = [each for each in shares if each[0] <= 1]
    about = [each for each in shares if each[0] >= EQUAL_COST]
    tried, single = [], False
    for share, arm in [*cheaper[-1:], *about[:1]]:
        claim = judged(cells, text, -1, [versus(cells, arm, student, where=at(sizes[0]))], table,
                       reason=f"That budget of slm takes {share:.0%} of slm-d's FLOPs, the "
                       "teacher's included.")
        tried.append(claim.evidence)
        single = single or claim.one_seed
        # a cheaper slm that is worse, or a dearer one that is better, settles nothing
        if (claim.verdict == "reproduced" and share <= 1) or (
                claim.verdict == "not reproduced" and share >= EQUAL_COST):
            return [claim]
    return [unjudged(text, " ".join([
        *dict.fromkeys(tried), "No budget of slm settles it: it would have to be better at no more "
        "FLOPs than slm-d's, or worse at no fewer."]), table, one_seed=single)]


def top_alone(cells: Cells) -> list[Claim]:
    """The top cluster alone is worse than importance sampling."""
    tests = [versus(cells, Arm("slm-top", {"importance.k": k}), Arm("slm-is", {"importance.k": k}),
                    where=f"k = {shown(k, 'importance.k')}: ")
             for k in cells.values(Arm("slm-top"), "importance.k")
             if cells.rows(Arm("slm-is", {"importance.k": k}))]
    return [judged(cells, "Pretraining on the most frequent cluster alone is worse than importance "
                   "sampling.", 1, tests or [("slm-top against slm-is at one k", None)],
                   "figure-08-top-cluster")]


def lora_close(cells: Cells) -> list[Claim]:
    """LoRA is close to full fine-tuning, at the better of the rates that were run."""
    tests, reasons = [], []
    for size in sizes_of(cells, "llm-lora", "llm"):
        tried = {}
        for factor in cells.values(Arm("llm-lora", {"spec_tokens": size}), "lora.lr_factor"):
            what, found = versus(
                cells, Arm("llm-lora", {"spec_tokens": size, "lora.lr_factor": factor}),
                Arm("llm", {"spec_tokens": size}), where=at(size))
            if found:
                tried[factor] = (what, found)
        if tried:
            best = min(tried, key=lambda factor: tried[factor][1].nats)
            tests.append(tried.pop(best))
            reasons += [f"{what}: {said(cells, found)}." for what, found in tried.values()]
    return [judged(cells, "LoRA is close to full fine-tuning of the large model (at most "
                   f"{CLOSE:g} nats per token worse, the paper's 0.5 of a perplexity of 14).", -1,
                   tests or [("llm-lora against llm", None)], "figure-14-lora", CLOSE,
                   " ".join(reasons))]


def crosses(cells: Cells) -> list[Claim]:
    """C(N) of SLM-is and SLM-pn crosses over, at equal quality; costs have no interval."""
    text = ("C(N) crosses over: for the same perplexity SLM-is costs less for few domains, SLM-pn "
            "for many.")
    table = "figure-06-crossing"
    sizes = sizes_of(cells, "slm-is", "slm-pn")[:1]
    if not sizes:
        return [unjudged(text, "Rows are missing for: slm-is and slm-pn at one set size.", table,
                         True)]
    sampled = Arm("slm-is", {"spec_tokens": sizes[0]})
    found = None
    for network in networks(cells, sampled):
        found = versus(cells, network, sampled, where=at(sizes[0]))
        meet = crossing_of(cells, sampled, network)
        if not found[1] or not meet or found[1].nats > 0:
            continue
        counts = {words: meet[unit] for unit, words in (("flops", "FLOPs"),
                                                        ("hours", "device-hours"))}
        past_one = {count is not None and count >= 1 for count in counts.values()}
        evidence = (f"The cheapest of slm-pn that is not worse: {found[0]}: "
                    f"{said(cells, found[1])}. The curves meet " + ", ".join(
                        f"in {words} {'never' if count is None else f'at {count:.1f} domains'}"
                        for words, count in counts.items()) + ".")
        if len(past_one) > 1 or found[1].seeds < NEEDED:
            why = "They disagree." if len(past_one) > 1 else "Not judged: one seed."
            return [unjudged(text, f"{evidence} {why}", table,
                             one_seed=found[1].seeds < NEEDED)]
        return [Claim(text, "reproduced" if past_one == {True} else "not reproduced", evidence,
                      table)]
    seen = f" The dearest: {found[0]}: {said(cells, found[1])}." if found and found[1] else ""
    return [unjudged(text, f"No budget of slm-pn is as good as slm-is.{seen}", table)]


def networks(cells: Cells, sampled: Arm) -> list[Arm]:
    """slm-pn at each budget, its experts chosen or blended, from the cheapest on."""
    return [Arm("slm-pn", {**sampled.changes, BUDGET: budget, **rule})
            for budget in cells.values_of(BUDGET) for rule in ({}, {"expert": "blend"})
            if shared(cells, [sampled, Arm("slm-pn", {**sampled.changes, BUDGET: budget,
                                                      **rule})])]


CLAIMS: list[Callable[[Cells], list[Claim]]] = [
    essential, no_pretraining, best_small, grows_with_k, experts_help, wide_domains, choice,
    large_or_network, distillation, top_alone, lora_close, crosses,
]
