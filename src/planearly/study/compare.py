"""Which cells of a study may be held against each other, and by how much they differ.

A cell is a method at one set of values of everything that the grid varies. Two cells are compared
only over the domains that both have, on the same documents. Intervals treat documents as the
independent units and domains as given: they say what other documents of these domains would give,
not other domains, and nothing of other seeds (:mod:`planearly.study.seeds`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from planearly.config import look_up
from planearly.evaluate import perplexity

Row = Mapping[str, Any]
When = Literal["after", "before", "routed"]

BUDGET = "pretrain_tokens"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        changes: settings that differ from the recipe's own values, by dotted key.
        when: after or before fine-tuning, or before it with each window of the test text through
            its own cluster's expert.
    """

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    when: When = "after"

    def at(self, **changes: Any) -> Arm:
        """The same arm with further changes (keys without a dot)."""
        return Arm(self.method, {**self.changes, **changes}, self.when)


Terms = Sequence[tuple[float, Arm]]
"""A contrast: arms with coefficients; (1, a), (-1, b) is a minus b, below 0 where a is better."""


@dataclass(frozen=True)
class Difference:
    """A contrast of arms in nats per token, averaged over domains, with its 95% interval over
    documents, at one seed."""

    nats: float
    low: float
    high: float
    domains: list[str]

    @property
    def interval(self) -> list[float]:
        return [self.low, self.high]


class Cells:
    """The finished cells of a study.

    Attributes:
        base: the recipe's own value of every key that the grid varies.
        domains: all of the study's, in its order.
        methods: those with rows, in order of appearance.
    """

    def __init__(self, study: Mapping[str, Any]) -> None:
        self.study = study
        self._own: dict[str, Any] = {}
        self.all_rows: list[Row] = list(study.get("rows", ()))
        keys = dict.fromkeys(key for row in self.all_rows for key in row["settings"])
        self.base = {key: self.own(key) for key in keys}
        self.domains = list(dict.fromkeys([*study.get("domains", ()),
                                           *(row["domain"] for row in self.all_rows)]))
        self._by_method: dict[str, list[Row]] = {}
        for row in self.all_rows:
            self._by_method.setdefault(row["method"], []).append(row)
        self.methods = list(self._by_method)
        self._found: dict[str, dict[str, Row]] = {}
        self._budgets: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self.memo: dict[Any, Any] = {}
        """What others have worked out of these cells."""

    def own(self, key: str) -> Any:
        """The recipe's value of a dotted key; None where it has none."""
        if key not in self._own:
            self._own[key] = look_up(self.study.get("recipe", {}), key)
        return self._own[key]

    def main(self, method: str, key: str) -> Any:
        """The value of a key at which a method enters the main comparison: the recipe's own, or
        the method's own number of pretraining tokens (``study.main``)."""
        if key == BUDGET:
            return (self.own("study.main") or {}).get(method, self.own(key))
        return self.own(key)

    def budgets(self, method: str, other: str = "slm") -> list[tuple[int, int]]:
        """The pretraining budgets at which two methods are compared, of the first and of the
        other, ascending: those of ``study.equal_compute``, and equal tokens that both were run
        with."""
        if (method, other) not in self._budgets:
            named = self.own("study.equal_compute") or []
            listed = [(one[method], one[other]) for one in named if {method, other} <= one.keys()]
            alike = [(value, value) for value in self.values(Arm(method), BUDGET)]
            self._budgets[method, other] = sorted({
                (mine, theirs) for mine, theirs in [*listed, *alike]
                if self.rows(Arm(method, {BUDGET: mine}))
                and self.rows(Arm(other, {BUDGET: theirs}))})
        return self._budgets[method, other]

    def beside(self, method: str, budget: int, other: str = "slm") -> int:
        """The budget of another method that is held against a method's: see :meth:`budgets`."""
        paired = [theirs for mine, theirs in self.budgets(method, other) if mine == budget]
        return next((theirs for theirs in paired if theirs != budget), budget)

    def settings(self, arm: Arm) -> dict[str, Any]:
        """The arm's value of every key that the grid varies."""
        return {key: arm.changes.get(key, self.main(arm.method, key)) for key in self.base}

    def rows(self, arm: Arm) -> dict[str, Row]:
        """The arm's rows by domain; only those with documents to compare."""
        if any(key not in self.base and value != self.own(key)
               for key, value in arm.changes.items()):
            return {}
        wanted = self.settings(arm)
        known = f"{arm.method} {arm.when} {wanted}"
        if known not in self._found:
            found: dict[str, Row] = {}
            for row in self._by_method.get(arm.method, ()):
                if len(row["tokens"]) > 1 and row.get(f"nll_{arm.when}") is not None and (
                        all(row["settings"].get(key) == wanted[key] for key in wanted)):
                    found.setdefault(row["domain"], row)
            self._found[known] = {d: found[d] for d in self.domains if d in found}
        return self._found[known]

    def same(self, a: Arm, b: Arm) -> bool:
        """Whether two arms are one cell."""
        return (a.method, a.when) == (b.method, b.when) and self.settings(a) == self.settings(b)

    def values(self, arm: Arm, key: str) -> list[Any]:
        """Values of ``key`` at which the arm has rows, ascending, null last."""
        if key not in self.base:
            return [self.own(key)] if self.rows(arm) else []
        return [value for value in self.values_of(key)
                if self.rows(Arm(arm.method, {**arm.changes, key: value}, arm.when))]

    def values_of(self, key: str) -> list[Any]:
        """All values of ``key`` in the study, ascending, null last."""
        if key not in self.base:
            return [self.own(key)]
        return ascending(row["settings"].get(key) for row in self.all_rows)

    def seeds(self) -> list[int]:
        """Seeds of the study beside the recipe's own."""
        found = {row["settings"].get("seed") for row in self.all_rows}
        return sorted(found - {None, self.base.get("seed")})

    def entropy(self, domain: str, k: int | None, what: str = "entropy") -> float | None:
        """Entropy in nats (or ``largest_share``) of a domain's histogram over k clusters."""
        return self.study.get("entropies", {}).get(domain, {}).get(str(k), {}).get(what)


def ascending(values: Iterable[Any]) -> list[Any]:
    """Each once: numbers by size, texts as they come, null last."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return sorted(found, key=lambda value: (
        value is None, value if isinstance(value, int | float) else 0))


def shared(cells: Cells, arms: Sequence[Arm], within: Iterable[str] | None = None) -> list[str]:
    """The domains that all arms have, on the same documents."""
    per_arm = [cells.rows(arm) for arm in arms]
    wanted = cells.domains if within is None else list(within)
    return [domain for domain in cells.domains if domain in wanted
            and all(domain in rows for rows in per_arm)
            and all(rows[domain]["tokens"] == per_arm[0][domain]["tokens"] for rows in per_arm)]


def per_domain(cells: Cells, terms: Terms, domains: Iterable[str],
               ) -> dict[str, tuple[float, float, float]]:
    """A contrast on each of the domains, which all its arms have.

    Returns:
        the difference in nats per token, its standard error over documents, and the error's
        degrees of freedom, by domain.
    """
    per_arm = [(coefficient, arm, cells.rows(arm)) for coefficient, arm in terms]
    found = {}
    for domain in domains:
        sums = sum(coefficient * np.asarray(rows[domain][f"nll_{arm.when}"], np.float64)
                   for coefficient, arm, rows in per_arm)
        sizes = np.asarray(per_arm[0][2][domain]["tokens"], np.float64)
        found[domain] = perplexity.ratio(np.asarray(sums), sizes)
    return found


def contrast(cells: Cells, terms: Terms, within: Iterable[str] | None = None,
             weights: Mapping[str, float] | None = None) -> Difference | None:
    """Sum of arms times their coefficients, in nats per token, over domains that all arms have.

    Args:
        within: only these domains.
        weights: of the domains' differences (None: their mean).

    Returns:
        the contrast, its interval by the variance between documents within each domain
        (:func:`combined`); None where no domain has every arm, or where one of the weighted is
        missing.
    """
    arms = [arm for _, arm in terms]
    domains = shared(cells, arms, within if weights is None else weights)
    if not domains or (weights is not None and len(domains) < len(weights)):
        return None
    share = weights or dict.fromkeys(domains, 1 / len(domains))
    parts = per_domain(cells, terms, domains)
    nats = sum(share[domain] * mean for domain, (mean, _, _) in parts.items())
    low, high = combined(nats, [((share[domain] * error) ** 2, freedom)
                                for domain, (_, error, freedom) in parts.items()])
    return Difference(nats, low, high, domains)


def combined(estimate: float, variances: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The 95% interval of a sum of independent estimates.

    Args:
        variances: each one's variance, and the degrees of freedom that it was estimated with.

    Returns:
        Student's interval with the degrees of freedom of Welch and Satterthwaite,
        (sum of v)^2 / sum of (v^2 / f).
    """
    known = [(variance, freedom) for variance, freedom in variances if variance > 0]
    total = sum(variance for variance, _ in known)
    freedom = total**2 / sum(v**2 / f for v, f in known) if known else 1.0
    return perplexity.interval(estimate, total**0.5, freedom)


def difference(cells: Cells, a: Arm, b: Arm, within: Iterable[str] | None = None,
               ) -> Difference | None:
    """a minus b in nats per token, paired over documents; see :func:`contrast`."""
    return contrast(cells, [(1.0, a), (-1.0, b)], within)


def macro(rows: Sequence[Row], when: When = "after") -> dict[str, Any] | None:
    """:func:`planearly.evaluate.perplexity.macro` of rows; None where one was not evaluated."""
    if not rows or any(row.get(f"nll_{when}") is None for row in rows):
        return None
    return perplexity.macro([(np.asarray(row[f"nll_{when}"], np.float64),
                              np.asarray(row["tokens"], np.int64)) for row in rows])


def mean_cost(rows: Sequence[Row], part: str = "cost") -> dict[str, float]:
    """Mean over rows of ``tokens``, ``flops`` and ``device_hours`` of one of the row's costs."""
    return {what: sum(row[part][what] for row in rows) / len(rows)
            for what in ("tokens", "flops", "device_hours")}


def blocks(cells: Cells, arms: Sequence[Arm]) -> list[tuple[list[str], list[Arm]]]:
    """The sets of domains to average over in one table, each with the arms that have them all.

    Averages over different domains cannot be held against each other, and no arm may be lost. So
    first comes the set with the largest product of domains and squared number of arms, of what all
    arms share and of what each has, and again for the arms without it. Where two or more arms have
    more domains than that, these are averaged over the widest set once more.
    """
    having = [(arm, frozenset(found)) for arm in arms if (found := cells.rows(arm))]
    sets = list(dict.fromkeys(found for _, found in having))
    made: list[frozenset[str]] = []
    left = sets
    while left:
        best = max([frozenset.intersection(*left), *left], key=lambda wanted: (
            len(wanted) * sum(wanted <= found for _, found in having) ** 2, len(wanted)))
        made.append(best)
        left = [found for found in left if not best <= found]
    widest = max(sets, key=len, default=frozenset())
    if made and widest not in made and sum(widest <= found for _, found in having) > 1:
        made.append(widest)
    return [([domain for domain in cells.domains if domain in wanted],
             [arm for arm, found in having if wanted <= found]) for wanted in made]

