"""A claim's verdict: reproduced, not reproduced, or not to be judged.

A verdict needs the 95% interval of the paired difference, over the documents of the domains that
every side has, to leave out zero (or the margin that the claim names), every further seed to
agree, and, where there is none, a difference larger than seeds commonly make. Anything less cannot
be judged, and the evidence says why. Intervals are each of 95%: among many claims, a wrong verdict
by chance is to be expected now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from planearly.study.build import over, shown
from planearly.study.compare import Arm, Cells, Difference, difference, macro, shared

Verdict = Literal["reproduced", "not reproduced", "cannot be judged"]

ONE_SEED = 0.02
"""Nats per token below which a difference between trainings of one seed each says nothing."""
VERDICT = ("A verdict needs the 95% interval of a paired difference to leave out zero, or the "
           "margin named, further seeds to agree, and without further seeds a difference of at "
           f"least {ONE_SEED:g} nats per token.")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: the claim.
        verdict: an interval that leaves out zero in the claim's favour, one that leaves it out
            against it, or neither.
        evidence: one or two sentences with the numbers, their intervals and the domains behind
            them; what is missing where it cannot be judged.
        table: name of the :class:`~planearly.study.table.Table` that shows it; "" where none does.
        missing: it could not be judged for want of rows.
        ours: the paper does not make it.
    """

    text: str
    verdict: Verdict
    evidence: str
    table: str
    missing: bool = False
    ours: bool = False


Test = tuple[str, Difference | None]
"""What was compared, in words, and by how much it differs; None where rows are missing."""


def judged(cells: Cells, text: str, sign: int, tests: Sequence[Test], table: str,
           margin: float = 0.0, reason: str = "") -> Claim:
    """The verdict on a claim that holds where every difference lies on one side of ``margin``.

    Args:
        sign: -1 or 1, the side of the margin that the claim is about.
        reason: added to the evidence.
    """
    known = [found for _, found in tests if found]
    missing = [what for what, found in tests if not found]
    sides = [0 if small(found, margin) else sign * moved(found, -margin).side for found in known]
    verdict: Verdict = "cannot be judged"
    if any(side < 0 for side in sides):
        verdict = "not reproduced"
    elif known and not missing and all(side > 0 for side in sides):
        verdict = "reproduced"
    alike = len({tuple(found.domains) for found in known}) == 1
    evidence = "; ".join(f"{what}: {said(cells, found, not alike)}"
                         for what, found in tests if found)
    if alike:
        evidence += f", over {over(cells, known[0].domains)}"
    said_all = [evidence + "." if evidence else "", reason]
    if missing:
        said_all.append(f"Rows are missing for: {'; '.join(missing)}.")
    if verdict == "cannot be judged":
        said_all += untold([found for found, side in zip(known, sides, strict=True) if side == 0],
                           margin)
    return Claim(text, verdict, " ".join(filter(None, said_all)), table, bool(missing))


def small(found: Difference, margin: float = 0.0) -> bool:
    """Whether one seed may have made it: near the margin, and no other seed was run."""
    return not found.seeds and abs(found.nats - margin) < ONE_SEED


def untold(found: Sequence[Difference], margin: float) -> list[str]:
    """Why these differences decide nothing."""
    told = [moved(each, -margin) for each in found]
    reasons = {
        f"an interval includes {margin:g}": any(e.low <= 0 <= e.high for e in told),
        "the seeds disagree": any(not e.low <= 0 <= e.high and not small(e) for e in told),
        f"one seed each does not carry a difference below {ONE_SEED:g}":
            any(not e.low <= 0 <= e.high and small(e) for e in told)}
    said_all = [reason for reason, holds in reasons.items() if holds]
    return [f"Not told apart at this size: {'; '.join(said_all)}."] if said_all else []


def unjudged(text: str, reason: str, table: str, missing: bool = False) -> Claim:
    return Claim(text, "cannot be judged", reason, table, missing)


def moved(found: Difference, by: float) -> Difference:
    """The difference with ``by`` added."""
    return replace(found, nats=found.nats + by, low=found.low + by, high=found.high + by,
                   seeds=[replace(seed, nats=seed.nats + by, here=seed.here + by)
                          for seed in found.seeds])


def said(cells: Cells, found: Difference, where: bool = True) -> str:
    """A difference in words, and the domains that it is over."""
    seeds = ", ".join(
        f"{seed.nats:+.3f}" + ("" if seed.domains == found.domains else
                               f" where this one has {seed.here:+.3f}, over "
                               f"{over(cells, seed.domains)}") for seed in found.seeds)
    return (f"{found.nats:+.3f} nats per token [{found.low:+.3f}, {found.high:+.3f}]"
            + (f" (another seed: {seeds})" if seeds else "")
            + (f" over {over(cells, found.domains)}" if where else ""))


def versus(cells: Cells, a: Arm, b: Arm, within: Sequence[str] | None = None,
           where: str = "") -> Test:
    """a minus b: in words, with both perplexities, and as a difference."""
    found = difference(cells, a, b, within)
    values = []
    for arm in (a, b):
        rows = [cells.rows(arm)[domain] for domain in found.domains] if found else []
        value = macro(rows, arm.when)
        values.append(f" {value['perplexity']:.2f}" if value else "")
    names = [named(arm, other) for arm, other in ((a, b), (b, a))]
    return f"{where}{names[0]}{values[0]} against {names[1]}{values[1]}", found


def named(arm: Arm, other: Arm) -> str:
    """The arm's method, and what tells it from the other."""
    told = [f"{key} {shown(value, key)}" for key, value in arm.changes.items()
            if other.changes.get(key, arm) != value]
    if arm.when != other.when:
        told.append(f"{arm.when} fine-tuning")
    return arm.method + (f" ({', '.join(told)})" if told else "")


def sizes_of(cells: Cells, *methods: str, **changes: Any) -> list[Any]:
    """Set sizes at which all the methods have a domain in common, ascending.

    Args:
        changes: settings of all of them that differ from the recipe's own.
    """
    return [size for size in cells.values_of("spec_tokens") if shared(
        cells, [Arm(method, {**changes, "spec_tokens": size}) for method in methods])]


def at(size: Any) -> str:
    """``at 50k: ``."""
    return f"at {shown(size, 'spec_tokens')}: "
