"""A claim's verdict: reproduced, not reproduced, or not to be judged.

A verdict needs two seeds of every training that it compares, and the 95% interval of the paired
difference, over documents and seeds (:mod:`planearly.study.seeds`), to leave out zero or the margin
that the claim names. Anything less cannot be judged, and the evidence says why. Intervals are each
of 95%: among many claims, a wrong verdict by chance is to be expected now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from planearly.report import sentences
from planearly.study import seeds
from planearly.study.compare import Arm, Cells, macro, shared
from planearly.study.seeds import Estimate
from planearly.study.spec import over, shown

Verdict = Literal["reproduced", "not reproduced", "cannot be judged"]
Outcome = Literal["reproduced", "not reproduced", "cannot be judged", "depends on the setting"]
DEPENDS: Outcome = "depends on the setting"

NEEDED = 2
"""Seeds of every training behind a verdict."""
WHEN = {"after": "after fine-tuning", "before": "before fine-tuning",
        "routed": "before fine-tuning, each window through its own cluster's expert"}
"""Words for when and how an arm is evaluated."""

RULE = (f"A verdict needs {NEEDED} seeds of every training that is compared, and the 95% interval "
        "of the paired difference, over documents and over seeds, to leave out zero, or the margin "
        "named. Of a comparison of one seed both intervals are told: over documents alone, and "
        f"with what a seed does to such a pair (as far as the study's own seeds tell, else "
        f"{sentences.SEED_SPREAD:g} nats per token, and {sentences.TUNING_SPREAD:g} between "
        "fine-tunings of one pretraining).")


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        text: the claim.
        verdict: an interval that leaves out zero in the claim's favour, one that leaves it out
            against it, or neither.
        evidence: one or two sentences with the numbers, their intervals and the domains behind
            them; what is missing where it cannot be judged.
        table: name of the :class:`~planearly.report.table.Table` that shows it; "" where none does.
        missing: it could not be judged for want of rows.
        one_seed: it could not be judged for want of a second seed.
        ours: the paper does not make it.
        paper: the paper's own numbers, with their place in it; "" where it gives none.
        setting: the end of ``text`` that names the setting that the verdict is of (a budget, a set
            size, a number of clusters), where a claim may have one at each; "" where none is named.
        why: what an experiment of the study says of a result against the claim; "" for nothing.
    """

    text: str
    verdict: Verdict
    evidence: str
    table: str
    missing: bool = False
    one_seed: bool = False
    ours: bool = False
    paper: str = ""
    setting: str = ""
    why: str = ""

    @property
    def statement(self) -> str:
        """The claim, whatever the setting that it is judged at."""
        return self.text.removesuffix(f"{self.setting}.") + "."

    @property
    def cause(self) -> str:
        """Why a claim of the paper is not reproduced, as far as that is known; "" of others."""
        if self.verdict != "not reproduced" or self.ours:
            return ""
        return self.why or "No cell of this study shows why."


def overall(claims: Sequence[Claim]) -> Outcome:
    """What the verdicts on one claim come to: what all say that say anything."""
    said = {claim.verdict for claim in claims} - {"cannot be judged"}
    if not said:
        return "cannot be judged"
    return said.pop() if len(said) == 1 else DEPENDS


Test = tuple[str, Estimate | None]
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
    sides = [sign * found.side(margin) if found.seeds >= NEEDED else 0 for found in known]
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
    all_said = [evidence + "." if evidence else "", reason]
    if missing:
        all_said.append(f"Rows are missing for: {'; '.join(missing)}.")
    if verdict == "cannot be judged":
        all_said += undecided([found for found, side in zip(known, sides, strict=True)
                               if side == 0], margin)
    single = verdict == "cannot be judged" and any(found.seeds < NEEDED for found in known)
    return Claim(text, verdict, " ".join(filter(None, all_said)), table, bool(missing), single)


def undecided(found: Sequence[Estimate], margin: float) -> list[str]:
    """Why these differences decide nothing."""
    told = []
    if any(each.seeds < NEEDED for each in found):
        told.append("Not judged: one seed.")
    if any(each.seeds >= NEEDED and each.side(margin) == 0 for each in found):
        told.append(f"Cannot be told apart: an interval includes {margin:g}.")
    return told


def unjudged(text: str, reason: str, table: str, missing: bool = False,
             one_seed: bool = False) -> Claim:
    return Claim(text, "cannot be judged", reason, table, missing, one_seed)


def said(cells: Cells, found: Estimate, where: bool = True) -> str:
    """A difference in words, and the domains that it is over."""
    own = found.own
    documents = sentences.bounds(own.low, own.high)
    if found.seeds == 1:
        words = (f"{own.nats:+.3f} nats per token, one seed, {documents} over documents, "
                 f"{sentences.bounds(found.low, found.high)} with what a seed does")
    else:
        others = ", ".join(
            f"{seed.nats:+.3f}" + ("" if seed.domains == own.domains else
                                   f" where this one has {seed.here:+.3f}, over "
                                   f"{over(cells, seed.domains)}") for seed in found.others)
        words = (f"{found.nats:+.3f} nats per token {sentences.bounds(found.low, found.high)} over "
                 f"{found.seeds} seeds (the first: {own.nats:+.3f} {documents} over documents; "
                 f"another: {others})")
    return words + (f" over {over(cells, found.domains)}" if where else "")


def versus(cells: Cells, a: Arm, b: Arm, within: Sequence[str] | None = None,
           where: str = "") -> Test:
    """a minus b: in words, with both perplexities at the own seed, and as a difference."""
    found = seeds.difference(cells, a, b, within)
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
        told.append(WHEN[arm.when])
    return arm.method + (f" ({', '.join(told)})" if told else "")


def sizes_of(cells: Cells, *arms: str | Arm) -> list[Any]:
    """Set sizes at which all the arms, or methods at their main settings, have a domain in common,
    ascending."""
    every = [Arm(arm) if isinstance(arm, str) else arm for arm in arms]
    return [size for size in cells.values_of("spec_tokens")
            if shared(cells, [arm.at(spec_tokens=size) for arm in every])]


def at(size: Any) -> str:
    """``at 50k: ``."""
    return f"at {shown(size, 'spec_tokens')}: "
