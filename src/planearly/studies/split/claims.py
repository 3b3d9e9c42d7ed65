"""What is expected of adaptation between the paper's two scenarios, and of training on blends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planearly.studies.paper.experts import by_width
from planearly.studies.paper.published import DOMAINS
from planearly.studies.split.rows import ADAPT, BLENDS, MIXED, as_dear, cost
from planearly.study.compare import BUDGET, Arm, Cells, shared
from planearly.study.seeds import difference
from planearly.study.spec import shown
from planearly.study.verdict import Claim, judged, said, unjudged, versus

CLOSE = 0.05
"""Nats per token that adaptation may be behind importance sampling from scratch."""
EARLY = 0.02
"""The same for a projected network with few tokens, against the plain model."""
WAYS, PAIRS = "split-ways", "split-domains"


def of_text(cells: Cells) -> list[float]:
    """The shares of the domain's own text that adaptation was run with, above 0."""
    return [share for share in cells.values(Arm("slm-adapt"), ADAPT) if share]


def pairs(cells: Cells) -> list[tuple[str, Arm, Arm]]:
    """The pairs that the claims are about, at equal tokens of pretraining per domain."""
    adapted, sampled, plain = Arm("slm-adapt"), Arm("slm-is"), Arm("slm")
    found = [("slm-adapt less slm-is", adapted, sampled)]
    for share in of_text(cells):
        own = Arm("slm-adapt", {ADAPT: share})
        found += [(f"{share:.0%} own text in both", own, Arm("slm-is", {MIXED: share})),
                  (f"{share:.0%} own text in slm-adapt", own, sampled)]
    found.append(("slm-adapt less slm", adapted, plain))
    for blends in cells.values_of(BLENDS):
        words = f"{blends} blends" if blends else "slm-pn"
        found += [(f"{words} less slm, {shown(budget, BUDGET)}",
                   Arm("slm-pn", {BLENDS: blends, BUDGET: budget}), Arm("slm", {BUDGET: budget}))
                  for budget in cells.values(Arm("slm-pn", {BLENDS: blends}), BUDGET)]
    return [(words, a, b) for words, a, b in found if shared(cells, [a, b])]


def as_good(cells: Cells) -> list[Claim]:
    """Adaptation is about as good as importance sampling from scratch, at less per domain."""
    adapted, sampled = Arm("slm-adapt"), Arm("slm-is")
    spent = ""
    if shared(cells, [adapted, sampled]):
        share = cost(cells, adapted, 1) - cost(cells, adapted, 0)
        spent = (f"Per domain slm-adapt takes {share / cost(cells, sampled, 1):.0%} of its FLOPs, "
                 "fine-tuning in both.")
    claims = [judged(
        cells, f"Adapting one plain model is within {CLOSE:g} nats per token of importance "
        "sampling from scratch.", -1, [versus(cells, adapted, sampled)], WAYS, CLOSE, spent)]
    for share in of_text(cells):
        own, mixed = Arm("slm-adapt", {ADAPT: share}), Arm("slm-is", {MIXED: share})
        claims += [
            judged(cells, f"The same with {share:.0%} of the domain's text in both.", -1,
                   [versus(cells, own, mixed)], WAYS, CLOSE),
            judged(cells, f"Adapting with {share:.0%} of the domain's text is ahead of importance "
                   "sampling from scratch without it.", -1, [versus(cells, own, sampled)], WAYS)]
    return claims


def at_equal_cost(cells: Cells) -> list[Claim]:
    """Adaptation is ahead of both scenarios at equal C(N)."""
    claims = []
    for n in DOMAINS[1:]:
        for method in ("slm", "slm-is"):
            text = (f"At equal C({n}), adapting is ahead of {method}.")
            other = as_dear(cells, method, Arm("slm-adapt"), n) if cells.rows(
                Arm("slm-adapt")) else None
            table = f"split-total-{n:02d}"
            claims.append(unjudged(
                text, f"Rows are missing for: {method} at the cost of slm-adapt for {n} domains.",
                table, True) if other is None else judged(
                cells, text, -1, [versus(cells, Arm("slm-adapt"), other)], table))
    return claims


def blended(cells: Cells) -> list[Claim]:
    """A projected network trained on blends is good early, and on wide domains."""
    claims = []
    for blends in filter(None, cells.values_of(BLENDS)):
        budgets = cells.values(Arm("slm-pn", {BLENDS: blends}), BUDGET)
        for budget in budgets:
            at = {BUDGET: budget}
            arm, plain = Arm("slm-pn", {BLENDS: blends, **at}), Arm("slm", at)
            few = len(budgets) > 1 and budget == budgets[0]
            name = f"A projected network trained on blends, with {shown(budget, BUDGET)} tokens,"
            claims.append(judged(
                cells, f"{name} is " + (f"at most {EARLY:g} nats per token behind the plain model."
                                        if few else "ahead of the plain model."), -1,
                [versus(cells, arm, plain)], WAYS, EARLY if few else 0.0))
            clusters = Arm("slm-pn", {BLENDS: 0, **at})
            if shared(cells, [arm, clusters]):
                claims.append(judged(cells, f"{name} is ahead of one trained on clusters.", -1,
                                     [versus(cells, arm, clusters)], WAYS))
        if not budgets:
            continue
        wide, _ = by_width(cells, arm, shared(cells, [arm, plain]))
        claims.append(judged(
            cells, f"{name} is ahead of the plain model on the widest domains.", -1,
            [versus(cells, arm, plain, wide)], PAIRS) if wide else unjudged(
            f"{name} is ahead of the plain model on the widest domains.",
            "Rows or cluster entropies are missing.", PAIRS, True))
    return claims


def expert_adapted(cells: Cells) -> list[Claim]:
    """Adapting the blended expert of a projected network is ahead of adapting the plain model."""
    tests, beside = [], []
    for blends in cells.values(Arm("slm-pn-adapt"), BLENDS):
        arm = Arm("slm-pn-adapt", {BLENDS: blends})
        tests.append(versus(cells, arm, Arm("slm-adapt")))
        if found := difference(cells, arm, Arm("slm-pn", {BLENDS: blends})):
            beside.append(f"Against slm-pn itself with blends {blends}: {said(cells, found)}.")
    return [judged(cells, "Adapting a projected network's blend is ahead of adapting the plain "
                   "model.", -1, tests, WAYS, reason=" ".join(beside))] if tests else []


def text_helps(cells: Cells) -> list[Claim]:
    """The domain's own text helps importance sampling and adaptation."""
    return [judged(cells, f"{share:.0%} of the domain's text makes {method} better.", -1,
                   [versus(cells, Arm(method, {key: share}), Arm(method))], WAYS)
            for method, key in (("slm-adapt", ADAPT), ("slm-is", MIXED))
            for share in cells.values(Arm(method), key) if share]


def ours(claims: Callable[[Cells], list[Claim]]) -> Callable[[Cells], list[Claim]]:
    """The same claims, told to be none of the paper's."""
    return lambda cells: [replace(claim, ours=True) for claim in claims(cells)]


CLAIMS: list[Callable[[Cells], list[Claim]]] = [
    ours(each) for each in (as_good, at_equal_cost, blended, expert_adapted, text_helps)]
