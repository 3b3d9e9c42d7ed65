"""The paper's claims, and some of ours, each judged by a study (see ``study.verdict``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from planearly.studies.paper import published
from planearly.studies.paper.crossing import crosses
from planearly.studies.paper.experts import (
    best_number,
    choice,
    experts_help,
    large_or_network,
    levels,
    own_clusters,
    starved,
    wide_domains,
)
from planearly.studies.paper.rows import TEACHERS
from planearly.study.compare import BUDGET, Arm, Cells, shared
from planearly.study.seeds import difference, estimate
from planearly.study.spec import shown
from planearly.study.verdict import (
    NEEDED,
    Claim,
    Test,
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
TUNED = "table-04-baselines"
SEVERAL_TIMES = 2.5
"""How much dearer than SLM-is an SLM has to be; in the paper about 4 (530 and 130 GPU-hours)."""


def essential(cells: Cells) -> list[Claim]:
    """Fine-tuning is essential."""
    tests = []
    for method in ("slm", "slm-mix", "slm-pn", "llm"):
        for size in sizes_of(cells, method)[:1]:
            arm = Arm(method, {"spec_tokens": size})
            tests.append(versus(cells, arm, replace(arm, when="before"), where=at(size)))
    claim = judged(cells, "Fine-tuning is essential for every generically pretrained model (by "
                   f"more than {FAR:g} nats per token).", -1,
                   tests or [("slm before and after fine-tuning", None)], TUNED, -FAR)
    return [replace(claim, paper=published.tuned())]


def small_tuned_beats_large(cells: Cells) -> list[Claim]:
    """Fine-tuning lifts a small model above a large one without it, at every budget of both."""
    text = "A small model that was fine-tuned beats the large one that was not"
    found = []
    for level in levels(cells, "llm"):
        tests = []
        for size in sizes_of(cells, Arm("llm", level.mine), Arm("slm", level.slms))[:1]:
            changes = {"spec_tokens": size}
            tests.append(versus(cells, Arm("slm", {**level.slms, **changes}),
                                Arm("llm", {**level.mine, **changes}, "before"), where=at(size)))
        when = f", the large one{level.when[1:]}" if level.when else ""
        claim = judged(cells, f"{text}{when}.", -1,
                       tests or [("slm against llm before fine-tuning", None)], TUNED)
        found.append(replace(claim, paper=published.beyond(), setting=when))
    why = less_pretrained(cells)
    return [replace(claim, why=why) for claim in found]


def less_pretrained(cells: Cells) -> str:
    """Whether one fine-tuned small model is ahead of the large one, not fine-tuned, where that was
    pretrained less; "" where it is not, or is everywhere."""
    tests = [versus(cells, Arm("slm"), Arm("llm", {BUDGET: budget}, "before"))
             for budget in cells.values(Arm("llm"), BUDGET) if isinstance(budget, int)]
    told = [(what, found) for what, found in tests if found and found.seeds >= NEEDED]
    if not told or told[0][1].side() >= 0 or told[-1][1].side() <= 0:
        return ""
    return ("It depends on how much the large model was pretrained, the small one being the same: "
            + "; ".join(f"{what}: {said(cells, found, False)}" for what, found in told) + ".")


def more_text(cells: Cells) -> list[Claim]:
    """More specialization text helps every model."""
    tests = [versus(cells, Arm(method, {"spec_tokens": large}), Arm(method, {"spec_tokens": small}))
             for method in ("slm", "slm-mix", "slm-pn", "slm-is", "llm")
             for small, large in pairwise(sizes_of(cells, method))]
    claim = judged(cells, "More specialization text makes every model better.", -1,
                   tests or [("a method at two set sizes", None)], "figure-05-set-size")
    return [replace(claim, paper=published.more_text())]


def no_pretraining(cells: Cells) -> list[Claim]:
    """No pretraining is far worse, and less so the more text there is."""
    sizes = sizes_of(cells, "slm-nopt", "slm")
    text = ("Training on the specialization set alone is far worse (by more than "
            f"{FAR:g} nats per token)")
    found = []
    for size in sizes or [None]:
        setting = f", {at(size)[:-2]}" if len(sizes) > 1 else ""
        changes = {"spec_tokens": size} if size else {}
        test = versus(cells, Arm("slm-nopt", changes), Arm("slm", changes)) if size else (
            "slm-nopt against slm", None)
        found.append(replace(judged(cells, f"{text}{setting}.", 1, [test], TUNED, FAR),
                             setting=setting))
    behind = [[(1.0, Arm("slm-nopt", {"spec_tokens": size})),
               (-1.0, Arm("slm", {"spec_tokens": size}))] for size in sizes]
    falls = estimate(cells, [*behind[-1], *((-c, arm) for c, arm in behind[0])]) \
        if len(sizes) > 1 else None
    words = (f"difference at {shown(sizes[-1], 'spec_tokens')} less that {at(sizes[0])[:-2]}"
             if len(sizes) > 1 else "slm-nopt against slm at two set sizes")
    less = judged(cells, "The more specialization text, the less pretraining is worth.", -1,
                  [(words, falls)], "figure-05-set-size")
    return [replace(one, paper=published.unpretrained()) for one in (*found, less)]


def best_small(cells: Cells) -> list[Claim]:
    """SLM-is at the small set size: among small models, against a dearer SLM, against the LLM."""
    size = next(iter(sizes_of(cells, "slm-is")), None)
    tokens = {cells.main(method, BUDGET) for method in ("slm-is", "slm", "slm-pn", "slm-mix",
                                                        "slm-d") if method in cells.methods}
    equally = "at equal pretraining tokens" if len(tokens) < 2 else (
        f"with {shown(cells.main('slm-is', BUDGET), BUDGET)} pretraining tokens against "
        f"{shown(min(tokens - {cells.main('slm-is', BUDGET)}), BUDGET)} and more of the others")
    text = f"SLM-is is the best small model at the small set size, {equally}."
    if not sizes_of(cells, "slm-is"):
        nothing = [("slm-is against the other small models", None)]
        return [judged(cells, text, -1, nothing, TUNED)]
    ours = Arm("slm-is", {"spec_tokens": size})
    left = [why for method in ("slm-mix",) if (why := starved(cells, Arm(method)))]
    others = [method for method in ("slm", "slm-mix", "slm-pn", "slm-d", "slm-nopt")
              if (method in ("slm", "slm-mix", "slm-pn") or method in cells.methods)
              and not (method == "slm-mix" and left)]
    found = [judged(
        cells, text, -1, [versus(cells, ours, Arm(other, ours.changes), where=at(size))
                          for other in others], TUNED,
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
    found.append(replace(judged(
        cells, "SLM-is beats even the large model at the small set size.", -1,
        [versus(cells, finest, Arm("llm", ours.changes), where=at(size))],
        "figure-10-importance-k" if len(ks) > 1 else TUNED,
        reason=f"At its largest number of clusters, {ks[-1]}." if len(ks) > 1 else ""),
        why=parameters_pay(cells)))
    return [replace(claim, paper=published.sampled()) for claim in found]


def parameters_pay(cells: Cells) -> str:
    """Whether the large model's lead over importance sampling is larger yet between models that are
    smaller, as far as smaller ones of the same recipe tell; "" where they do not.

    The study's own small model is the large one then, with the large one's pretraining tokens.
    """
    large = Arm("slm", {BUDGET: cells.main("llm", BUDGET)})
    own = min((row["inference_params"] for row in cells.rows(Arm("slm-is")).values()), default=0)
    smaller = min((row for row in cells.all_rows if row["method"] == "slm-is"
                   and row["inference_params"] < own),
                  key=lambda row: row["inference_params"], default=None)
    if smaller is None:
        return ""
    small = Arm("slm-is", {key: value for key, value in smaller["settings"].items()
                           if key.startswith("model.")})
    there = versus(cells, small, large)
    here = versus(cells, Arm("slm-is"), Arm("llm"), there[1].domains if there[1] else None)
    more = estimate(cells, [(1.0, small), (-1.0, large), (-1.0, Arm("slm-is")),
                            (1.0, Arm("llm"))])
    if not (there[1] and here[1] and more) or more.seeds < NEEDED or more.side() <= 0:
        return ""
    return ("Parameters pay more between smaller models. With "
            f"{short(smaller['inference_params'])} parameters against {short(own)}, {there[0]}: "
            f"{said(cells, there[1])}. That is {said(cells, more, False)} further behind than "
            f"{here[0]} here. The paper's have 126M and 771M.")


def flops_of(cells: Cells, arm: Arm, other: Arm) -> float | None:
    """FLOPs of an arm for one domain, times those of another, over the domains of both."""
    domains = shared(cells, [arm, other])
    spent = [sum(cells.rows(each)[d]["cost"]["flops"] for d in domains) for each in (arm, other)]
    return spent[0] / spent[1] if domains and spent[1] else None


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
    claim = replace(claim, paper=published.FINER)
    if turned and claim.verdict != "not reproduced":
        back = "; ".join(f"{what}: {said(cells, found)}" for what, found in turned if found)
        return [replace(claim, verdict="not reproduced", one_seed=False, evidence=
                        f"It does not grow all the way: {back}. From end to end, "
                        f"{claim.evidence}")]
    return [claim]


def distillation(cells: Cells) -> list[Claim]:
    """Distillation gains at equal tokens; that does not pay for the teacher."""
    return [*taught(cells), replace(unpaid(cells), paper=published.TAUGHT)]


def taught(cells: Cells) -> list[Claim]:
    """A student against SLM with as many tokens, the teacher's not counted."""
    text = "Distillation makes a small model better at equal tokens of its own"
    tests: dict[int, Test] = {
        mine: versus(cells, Arm("slm-d", {BUDGET: mine}), Arm("slm", {BUDGET: mine}))
        for mine, theirs in cells.budgets("slm-d") if mine == theirs}
    if not tests:
        return [unjudged(f"{text}.", "Rows are missing for: slm-d against slm at equal tokens.",
                         "table-08-budgets", True)]
    settings = {budget: f", {shown(budget, BUDGET)}" if len(tests) > 1 else "" for budget in tests}
    tokens = cells.own(TEACHERS)
    reason = f"The teacher's pretraining: {shown(tokens, TEACHERS)} tokens." if tokens else ""
    return [replace(judged(cells, f"{text}{settings[budget]}.", -1, [test], "table-08-budgets",
                           reason=reason),
                    setting=settings[budget]) for budget, test in tests.items()]


def unpaid(cells: Cells) -> Claim:
    """SLM at the same cost is better than distillation."""
    text = ("Distillation's gain does not pay for the teacher: at the same cost for one domain, "
            "SLM is better.")
    table = "table-08-budgets"
    sizes = sizes_of(cells, "slm-d", "slm")[:1]
    if not sizes:
        return unjudged(text, "Rows are missing for: slm-d against slm.", table, True)
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
            return claim
    return unjudged(text, " ".join([
        *dict.fromkeys(tried), "No budget of slm settles it: it would have to be better at no more "
        "FLOPs than slm-d's, or worse at no fewer."]), table, one_seed=single)


def top_alone(cells: Cells) -> list[Claim]:
    """The top cluster alone is worse than importance sampling, at each k."""
    text = "Pretraining on the most frequent cluster alone is worse than importance sampling"
    tests = {k: versus(cells, Arm("slm-top", {"importance.k": k}),
                       Arm("slm-is", {"importance.k": k}))
             for k in cells.values(Arm("slm-top"), "importance.k")
             if cells.rows(Arm("slm-is", {"importance.k": k}))}
    found = []
    for k, test in tests.items() or [(None, ("slm-top against slm-is at one k", None))]:
        setting = f", of {shown(k, 'importance.k')} clusters" if k else ""
        found.append(replace(judged(cells, f"{text}{setting}.", 1, [test], "figure-08-top-cluster"),
                             setting=setting, paper=published.TOP))
    return found


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
    claim = judged(cells, "LoRA is close to full fine-tuning of the large model (at most "
                   f"{CLOSE:g} nats per token worse, the paper's 0.5 of a perplexity of 14).", -1,
                   tests or [("llm-lora against llm", None)], "figure-14-lora", CLOSE,
                   " ".join(reasons))
    return [replace(claim, paper=published.ADAPTERS)]


CLAIMS: list[Callable[[Cells], list[Claim]]] = [
    essential, small_tuned_beats_large, no_pretraining, more_text, best_small, grows_with_k,
    experts_help, best_number, wide_domains, choice, own_clusters, large_or_network, distillation,
    top_alone, lora_close, crosses,
]
