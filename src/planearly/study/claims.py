"""The paper's claims, held against a study: reproduced, not reproduced, or not to be judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "not reproduced", "cannot be judged"]


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
    """

    text: str
    verdict: Verdict
    evidence: str
    table: str
