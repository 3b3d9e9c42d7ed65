"""From how many domains on a projected network costs less than importance sampling (Figure 6).

C(N) of slm-is is N times what it costs for one domain, that of slm-pn one pretraining and N
fine-tunings; they meet at N = generic cost of slm-pn / (cost of slm-is less fine-tuning of slm-pn,
for one domain). What slm-is costs depends on how good it has to be. With several budgets of slm-is
the tokens at which it is as good as a network are interpolated: the difference in nats per token,
slm-pn less slm-is, is taken as linear in the logarithm of slm-is's tokens between two budgets, its
cost as linear in them; the interval is where the bounds of the difference, over documents and
seeds, pass zero. With one budget the cheapest network that is not worse stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planearly.cost.model import crossing
from planearly.studies.paper import published
from planearly.study import seeds
from planearly.study.compare import BUDGET, Arm, Cells, difference, macro, shared
from planearly.study.spec import Rows, facts_of, shown
from planearly.study.verdict import NEEDED, Claim, at, named, said, sizes_of, unjudged, versus

TEXT = ("C(N) crosses over: for the same perplexity SLM-is costs less for few domains, SLM-pn for "
        "many.")
UNITS = {"flops": "FLOPs", "hours": "device-hours"}

Bounded = tuple[float, float | None, float | None]
"""A number and its interval, of which an end may be beyond what was measured: None."""


@dataclass(frozen=True)
class Meeting:
    """Where slm-is is as good as a network, and where C(N) of the two meet then.

    Attributes:
        tokens: of slm-is's pretraining.
        domains: by unit of :data:`UNITS`, the number N at which they cost the same.
        over: domains that both are averaged over.
        seeds: least number of them behind a budget of slm-is on either side of ``tokens``.
    """

    network: Arm
    tokens: Bounded
    domains: dict[str, Bounded]
    over: list[str]
    seeds: int


def networks(cells: Cells, sampled: Arm) -> list[Arm]:
    """slm-pn at each budget, its experts chosen or blended, from the cheapest on."""
    rules: list[dict[str, Any]] = [{}] + [{"expert": "blend"}] * (cells.own("expert") != "blend")
    tried = [Arm("slm-pn", {**sampled.changes, BUDGET: budget, **rule})
             for budget in cells.values_of(BUDGET) for rule in rules]
    return [network for network in tried if shared(cells, [sampled, network])]


def meeting(cells: Cells, network: Arm, size: Any) -> Meeting | None:
    """Where slm-is is as good as the network; None where no two of its budgets lie around that, or
    the network never costs less."""
    sampled = Arm("slm-is", {"spec_tokens": size})
    budgets = [budget for budget in cells.values(sampled, BUDGET) if isinstance(budget, int)]
    arms = [Arm("slm-is", {**sampled.changes, BUDGET: budget}) for budget in budgets]
    domains = shared(cells, [network, *arms])
    found = [seeds.difference(cells, network, arm, domains) for arm in arms if domains]
    known = [each for each in found if each]
    if len(known) < max(len(arms), 2):
        return None
    logs = np.log(budgets)
    best = passing(logs, [each.nats for each in known])
    if best is None:
        return None
    ends = [passing(logs, bound) for bound in ([each.high for each in known],
                                               [each.low for each in known])]
    sides = [facts_of(cells, arm, [cells.rows(arm)[domain] for domain in domains])
             for arm in (network, *arms)]
    own, theirs = sides[0], sides[1:]

    def domains_at(log: float | None, unit: str) -> float | None:
        if log is None:
            return None
        each = np.interp(np.exp(log), budgets, [side[f"own_{unit}"] for side in theirs])
        return crossing(0.0, float(each), own[f"generic_{unit}"], own[f"own_{unit}"])

    counts = {}
    for unit in UNITS:
        if (count := domains_at(best, unit)) is None:
            return None
        counts[unit] = (count, domains_at(ends[1], unit), domains_at(ends[0], unit))
    around = int(np.searchsorted(logs, best))
    low, high = (None if end is None else float(np.exp(end)) for end in ends)
    return Meeting(network, (float(np.exp(best)), low, high), counts, domains,
                   min(each.seeds for each in known[max(around - 1, 0):around + 1]))


def passing(places: Sequence[float] | np.ndarray, values: Sequence[float]) -> float | None:
    """The first place at which values, linear between those given, are zero on their way up; None:
    they are not."""
    for (a, low), (b, high) in zip(zip(places, values, strict=True),
                                   zip(places[1:], values[1:], strict=True), strict=False):
        if low <= 0 <= high and low < high:
            return float(a + (b - a) * -low / (high - low))
    return None


def meetings(cells: Cells) -> Rows:
    """Of every network at every set size: how good slm-is has to be, and where C(N) meet then."""
    rows = []
    for size in cells.values_of("spec_tokens"):
        for network in networks(cells, Arm("slm-is", {"spec_tokens": size})):
            if found := meeting(cells, network, size):
                facts = facts_of(cells, network, [cells.rows(network)[d] for d in found.over])
                rows.append({
                    "budget": network.changes[BUDGET], "set": facts["set"],
                    "expert": rule_of(cells, network), "domains": len(found.over),
                    **{key: value for key, each in (("tokens", found.tokens),
                                                    *found.domains.items())
                       for key, value in ((key, each[0]), (f"{key}_ci", list(each[1:])))}})
    return rows


def crossings(cells: Cells) -> Rows:
    """The number of domains at which slm-is and slm-pn cost the same, by budget of slm-pn."""
    rows = []
    for size in cells.values_of("spec_tokens"):
        sampled = Arm("slm-is", {"spec_tokens": size})
        for network in networks(cells, sampled):
            if row := crossing_of(cells, sampled, network):
                rows.append({**row, "budget": network.changes[BUDGET],
                             "expert": rule_of(cells, network)})
    return rows


def rule_of(cells: Cells, network: Arm) -> str:
    """How a network's expert is chosen."""
    return str(network.changes.get("expert", cells.own("expert")))


def crossing_of(cells: Cells, sampled: Arm, network: Arm) -> dict[str, Any] | None:
    """Where C(N) of slm-is and slm-pn meet; None where they have no domain in common."""
    found = difference(cells, network, sampled)
    if not found:
        return None
    sides = [facts_of(cells, arm, [cells.rows(arm)[d] for d in found.domains])
             for arm in (sampled, network)]
    return {"set": sides[0]["set"], "domains": len(found.domains), "difference": found.nats,
            "difference_ci": found.interval,
            **{what: crossing(*(side[f"{part}_{what}"] for side in sides
                                for part in ("generic", "own")))
               for what in ("tokens", "flops", "hours")}}


def crosses(cells: Cells) -> list[Claim]:
    """C(N) of SLM-is and SLM-pn crosses over, at equal quality."""
    return [replace(_crosses(cells), paper=published.CROSSING)]


def _crosses(cells: Cells) -> Claim:
    sizes = sizes_of(cells, "slm-is", "slm-pn")[:1]
    if not sizes:
        return unjudged(TEXT, "Rows are missing for: slm-is and slm-pn at one set size.",
                        "figure-06-crossing", True)
    sampled = Arm("slm-is", {"spec_tokens": sizes[0]})
    candidates = networks(cells, sampled)
    met = [found for network in candidates if (found := meeting(cells, network, sizes[0]))]
    return (_at_equal_quality(cells, met, sizes[0]) if met
            else _not_worse(cells, sampled, candidates))


def _at_equal_quality(cells: Cells, met: Sequence[Meeting], size: Any) -> Claim:
    """The verdict by the best network of those that slm-is is as good as at some budget."""
    def perplexity(found: Meeting) -> float:
        value = macro([cells.rows(found.network)[domain] for domain in found.over])
        return float(value["perplexity"]) if value else np.inf

    best = min(met, key=perplexity)
    table = "figure-06-equal-quality"
    name = named(best.network, Arm("slm-is", {"spec_tokens": size}))
    evidence = (f"{at(size)}slm-is is as good as {name}, {perplexity(best):.2f}, with "
                f"{bounded(best.tokens, tokens=True)} tokens. The curves meet "
                + ", ".join(f"in {words} at {bounded(best.domains[unit])} domains"
                            for unit, words in UNITS.items())
                + f", over {len(best.over)} of {len(cells.domains)} domains.")
    if best.seeds < NEEDED:
        return unjudged(TEXT, f"{evidence} Not judged: one seed.", table, one_seed=True)
    lows = [low for _, low, _ in best.domains.values()]
    highs = [high for _, _, high in best.domains.values()]
    if all(low is not None and low > 1 for low in lows):
        return Claim(TEXT, "reproduced", evidence, table)
    if all(high is not None and high < 1 for high in highs):
        return Claim(TEXT, "not reproduced", evidence, table)
    return unjudged(TEXT, f"{evidence} Cannot be told: an interval includes 1 domain.", table)


def bounded(value: Bounded, tokens: bool = False) -> str:
    """``6.1M [5.2M, 7.4M]``, ``3.4 [2.9, beyond the budgets tried]``."""
    def written(number: float | None) -> str:
        if number is None:
            return "beyond the budgets tried"
        return shown(round(number), BUDGET) if tokens else f"{number:.1f}"

    return f"{written(value[0])} [{written(value[1])}, {written(value[2])}]"


def _not_worse(cells: Cells, sampled: Arm, candidates: Sequence[Arm]) -> Claim:
    """The verdict by the cheapest network that is not worse; costs have no interval."""
    table, found = "figure-06-crossing", None
    for network in candidates:
        found = versus(cells, network, sampled, where=at(sampled.changes["spec_tokens"]))
        meet = crossing_of(cells, sampled, network)
        if not found[1] or not meet or found[1].nats > 0:
            continue
        counts = {words: meet[unit] for unit, words in UNITS.items()}
        past_one = {count is not None and count >= 1 for count in counts.values()}
        evidence = (f"The cheapest of slm-pn that is not worse: {found[0]}: "
                    f"{said(cells, found[1])}. The curves meet " + ", ".join(
                        f"in {words} {'never' if count is None else f'at {count:.1f} domains'}"
                        for words, count in counts.items()) + ".")
        if len(past_one) > 1 or found[1].seeds < NEEDED:
            why = "They disagree." if len(past_one) > 1 else "Not judged: one seed."
            return unjudged(TEXT, f"{evidence} {why}", table, one_seed=found[1].seeds < NEEDED)
        return Claim(TEXT, "reproduced" if past_one == {True} else "not reproduced", evidence,
                     table)
    seen = f" The dearest: {found[0]}: {said(cells, found[1])}." if found and found[1] else ""
    return unjudged(TEXT, f"No budget of slm-pn is as good as slm-is.{seen}", table)
