"""What another seed does to a difference between methods, and intervals that hold it.

A comparison at one seed is of one training each. Its domains share the pretrainings, so what a seed
does to one of them it does to the others, and averaging over domains does not take it away. The
estimate from m seeds is the mean of their differences (where further seeds have fewer domains, the
own seed's difference, moved by what they move it on the domains that they have), and its variance

    V = s^2 / m + sum over seeds and domains of a^2 v,

s^2 being the variance of one seed's difference, v that of a domain's difference over documents, a
its coefficient in the estimate. The interval is Student's, with Welch and Satterthwaite's degrees
of freedom V^2 / ((s^2/m)^2/f + sum of (a^2 v)^2/n).

s^2 is estimated for the pair of methods: the variance between seeds of the difference averaged over
the domains in question, or those of them that the other seeds have (fewer vary more), on average
over the pretrainings that were made at several seeds. Those of other budgets are no independent
ones: they branch off the same stable phase, and the same seed orders their text. So n of them at m
seeds know a variance with f = (m - 1) n / (1 + (n - 1) r^2) degrees of freedom, r being
:data:`ALIKE` (of the squares of two normal variables correlated by r, the correlation is r^2).
Fine-tunings that share a pretraining count as one. s^2 holds what documents add, so it is rather
too large than too small. Few seeds know little of a variance, and by chance may know of none; so
s^2 is moderated (Smyth 2004) by what all pairs of the study have in common, which counts for four
further seeds: the mean of their variances, with the degrees of freedom of all methods but one, and
for two more the spread of another study. Where pairs vary by more different amounts than chance
would make them, they have less in common, and it counts for less (:func:`_uneven`). Where the pair
of methods has no second seed, that alone stands in. A contrast of more than two methods has half of
a pair's variance for every square of a coefficient.

Fine-tunings of one pretraining (another choice of the expert, replay, adapters, a larger set)
differ by what comes after it alone: what a seed does to the pretraining it does to both. Such
contrasts vary less than others (:func:`tuned`), and are moderated by what they have in common with
each other. Why: docs/decisions.md, "A verdict needs two seeds".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy import optimize, special

from planearly import methods
from planearly.report import sentences
from planearly.study import compare, sharing
from planearly.study.compare import BUDGET, Arm, Cells, Difference, Terms

OTHERS = 2.0
"""Pairs of trainings that the spread of another study counts for."""
COMMON = 4.0
"""Most pairs that what all pairs of the study have in common counts for."""
ALIKE = 0.7
"""Correlation of what a seed does to a pair of methods at two pretraining budgets: the mean over
the pairs of docs/results/split (0.73) and of docs/results/regime (0.68)."""
ENOUGH = 10
"""Pairs of methods with several seeds from which it is asked how alike their variances are."""
LEAST = 1e-6
"""Least variance that is told from none, of 0.001 nats per token."""


@dataclass(frozen=True)
class Spread:
    """Standard deviation over seeds of one difference, in nats per token.

    Attributes:
        freedom: its degrees of freedom.
        repeated: of them, those that these methods' own further seeds give; 0: other pairs of the
            study alone tell it, or none.
    """

    deviation: float
    freedom: float
    repeated: float


@dataclass(frozen=True)
class Elsewhere:
    """A contrast at another seed, over the domains that this seed has.

    Attributes:
        nats: at the other seed.
        here: at the recipe's own, over the same domains.
    """

    nats: float
    here: float
    domains: list[str]


@dataclass(frozen=True)
class Estimate:
    """A contrast over all seeds that have it.

    Attributes:
        own: at the recipe's own seed, with the interval over documents.
        others: at further seeds.
        nats, low, high: over all seeds, with the interval over documents and seeds.
    """

    own: Difference
    others: list[Elsewhere]
    nats: float
    low: float
    high: float
    spread: Spread

    @property
    def seeds(self) -> int:
        return 1 + len(self.others)

    @property
    def domains(self) -> list[str]:
        return self.own.domains

    def side(self, margin: float = 0.0) -> int:
        """-1 or 1: the interval lies below or above the margin; 0: it holds it."""
        return sentences.side(self.low, self.high, margin)


def difference(cells: Cells, a: Arm, b: Arm, within: Iterable[str] | None = None,
               ) -> Estimate | None:
    """a minus b in nats per token; see :func:`estimate`."""
    return estimate(cells, [(1.0, a), (-1.0, b)], within)


def estimate(cells: Cells, terms: Terms, within: Iterable[str] | None = None,
             weights: Mapping[str, float] | None = None) -> Estimate | None:
    """A contrast with what seeds and documents may do to it; arguments as of
    :func:`planearly.study.compare.contrast`."""
    own = compare.contrast(cells, terms, within, weights)
    if own is None:
        return None
    share = weights or dict.fromkeys(own.domains, 1 / len(own.domains))
    others, theirs = [], []
    for seed in cells.seeds() if all("seed" not in arm.changes for _, arm in terms) else ():
        there = at_seed(terms, seed)
        found = compare.shared(cells, [arm for _, arm in there], own.domains)
        if not found or (weights and len(found) < len(weights)):
            continue
        of = share if len(found) == len(share) else dict.fromkeys(found, 1 / len(found))
        parts = compare.per_domain(cells, there, found)
        here = compare.per_domain(cells, terms, found)
        others.append(Elsewhere(sum(of[d] * parts[d][0] for d in found),
                                sum(of[d] * here[d][0] for d in found), found))
        theirs.append((of, parts))
    many = 1 + len(others)
    nats = own.nats + sum(other.nats - other.here for other in others) / many
    known = spread(cells, terms, own.domains)
    variances = [(known.deviation**2 / many, known.freedom)]
    coefficients = {domain: share[domain] - sum(of.get(domain, 0.0) for of, _ in theirs) / many
                    for domain in own.domains}
    for of, parts in [(coefficients, compare.per_domain(cells, terms, own.domains)),
                      *(({d: value / many for d, value in of.items()}, parts)
                        for of, parts in theirs)]:
        variances += [((of[domain] * error) ** 2, freedom)
                      for domain, (_, error, freedom) in parts.items()]
    return Estimate(own, others, nats, *compare.combined(nats, variances), known)


def at_seed(terms: Terms, seed: int) -> list[tuple[float, Arm]]:
    return [(coefficient, arm.at(seed=seed)) for coefficient, arm in terms]


def spread(cells: Cells, terms: Terms, domains: Sequence[str]) -> Spread:
    """The spread over seeds of a contrast of these methods, averaged over domains, as far as the
    study tells it."""
    alike = tuned(cells, terms)
    kind = json.dumps([alike, _kind(cells, terms), domains], default=str)
    if ("spread", kind) not in cells.memo:
        pairs = sum(c**2 for c, _ in terms) / 2
        common = _common(cells, domains, alike)
        cells.memo["spread", kind] = moderated(
            repeated(cells, terms, domains),
            Spread(common.deviation * pairs**0.5, common.freedom, 0))
    return cells.memo["spread", kind]


def moderated(own: tuple[float, float], prior: Spread) -> Spread:
    """A spread from a variance between seeds with its degrees of freedom (0: unknown), and a prior
    one."""
    square, known = own
    freedom = min(prior.freedom, COMMON)
    total = freedom * prior.deviation**2 + known * square
    return Spread(float((total / (freedom + known)) ** 0.5), freedom + known, known)


def tuned(cells: Cells, terms: Terms) -> bool:
    """Whether a contrast is of fine-tunings of the same pretrainings: the coefficients of each
    pretraining's add up to none, and none was made twice (in another folder, say, from which rows
    were gathered).

    One that was made twice took other durations, of what is paid before the domain is known, and
    gave the documents other likelihoods before fine-tuning. A bank's are those of the expert that
    was chosen after it, so only the duration tells of a bank.
    """
    totals: dict[str, float] = {}
    made: dict[tuple[str, Any, str], set[Any]] = {}
    for coefficient, arm in terms:
        name = f"{arm.when} {_pretraining(cells, arm)}"
        totals[name] = totals.get(name, 0.0) + coefficient
        method = methods.TABLE.get(arm.method)
        chosen = method is not None and method.bank and not method.adapts
        for seed in [cells.own("seed"), *cells.seeds()]:
            for domain, row in cells.rows(arm.at(seed=seed)).items():
                made.setdefault((name, seed, ""), set()).add(row["generic_cost"]["device_hours"])
                if not chosen and (before := row.get("nll_before")) is not None:
                    made.setdefault((name, seed, domain), set()).add(tuple(before))
    return all(abs(total) < 1e-9 for total in totals.values()) and all(
        len(different) < 2 for different in made.values())


def _pretraining(cells: Cells, arm: Arm) -> str:
    """A name for what an arm was fine-tuned from: its pretraining with the settings that this
    depends on; without a pretraining, the arm."""
    settings = cells.settings(arm)
    row = methods.TABLE.get(arm.method)
    if row is None or not row.pretrains:
        return json.dumps([arm.method, settings], sort_keys=True, default=str)
    draws = _draws(cells, settings)
    teacher = methods.teacher().pretraining() if row.taught else None
    return json.dumps([row.pretraining(), teacher, {
        key: value for key, value in settings.items()
        if sharing.pretraining_depends(arm.method, key, draws)}], sort_keys=True, default=str)


def _kind(cells: Cells, terms: Terms) -> list[list[Any]]:
    """What is held against each other, at whatever other settings."""
    return [[c, arm.method, arm.when, _apart(cells, terms, arm)] for c, arm in terms]


def _common(cells: Cells, domains: Sequence[str], alike: bool) -> Spread:
    """The spread over seeds that the pairs of the study have in common on domains.

    Args:
        alike: the pairs of fine-tunings of one pretraining; else those of methods.
    """
    kind = ("common", alike, *domains)
    if kind not in cells.memo:
        pairs, freedom = _tunings(cells) if alike else _methods(cells)
        squares = [own for terms in pairs if (own := repeated(cells, terms, domains))[1]]
        again = max(freedom, 1.0) if squares else 0.0
        mean = sum(f * s for s, f in squares) / max(sum(f for _, f in squares), 1.0)
        other = sentences.TUNING_SPREAD if alike else sentences.SEED_SPREAD
        deviation = ((OTHERS * other**2 + again * mean) / (OTHERS + again)) ** 0.5
        cells.memo[kind] = _uneven(squares, other) or Spread(float(deviation), OTHERS + again, 0)
    return cells.memo[kind]


def _methods(cells: Cells) -> tuple[list[Terms], float]:
    """The pairs of methods, and the degrees of freedom that they have together: of the
    pretrainings made at several seeds of all methods but one, which any other is compared with."""
    made: dict[str, dict[str, set[Any]]] = {}
    for row in cells.all_rows:
        draws = _draws(cells, row["settings"])
        own = {key: value for key, value in row["settings"].items()
               if key != "seed" and sharing.pretraining_depends(row["method"], key, draws)}
        made.setdefault(row["method"], {}).setdefault(
            json.dumps(own, sort_keys=True, default=str), set()).add(
                row["settings"].get("seed", cells.own("seed")))
    further = [_freedom(max(map(len, of.values())), sum(len(seeds) > 1 for seeds in of.values()))
               for of in made.values()]
    return ([[(1.0, Arm(a)), (-1.0, Arm(b))] for a, b in combinations(cells.methods, 2)],
            sum(further) - max(further, default=0.0))


def _tunings(cells: Cells) -> tuple[list[Terms], float]:
    """The pairs of fine-tunings of one pretraining that another seed has as well, at whatever other
    settings, and the degrees of freedom that they have together: of each pretraining, as often as
    it was made, all fine-tunings but one; those of other budgets are counted once."""
    further = set(cells.seeds())
    found: dict[str, dict[str, Arm]] = {}
    for row in cells.all_rows:
        if row["settings"].get("seed") not in further:
            continue
        draws = _draws(cells, row["settings"])
        arm = Arm(row["method"], {key: value for key, value in row["settings"].items()
                                  if key != "seed" and sharing.depends(row["method"], key, draws)})
        if cells.rows(arm):
            found.setdefault(_pretraining(cells, arm), {}).setdefault(
                json.dumps([arm.method, cells.settings(arm)], sort_keys=True, default=str), arm)
    pairs: dict[str, Terms] = {}
    freedom: dict[str, float] = {}
    for name, arms in found.items():
        groups: list[list[Arm]] = []  # one that was made twice is two
        for arm in arms.values():
            group = next((group for group in groups if all(
                tuned(cells, [(1.0, other), (-1.0, arm)]) for other in group)), None)
            if group is None:
                groups.append(group := [])
            group.append(arm)
        for group in groups:
            for a, b in combinations(group, 2):
                terms: Terms = [(1.0, a), (-1.0, b)]
                pairs.setdefault(json.dumps(_kind(cells, terms), default=str), terms)
        of = json.loads(name)[0]
        freedom[of] = max(freedom.get(of, 0.0), float(len(arms) - len(groups)))
    return list(pairs.values()), sum(freedom.values())


def _uneven(squares: Sequence[tuple[float, float]], other: float) -> Spread | None:
    """What pairs have in common that vary by different amounts, as where a mixture that starves
    moves ten times as much with the seed as the others: by the mean and the variance of the
    logarithms of their variances (Smyth 2004, section 6.2), so that the unruly do not speak for
    all, and for fewer pairs the less alike they are. None: they are as alike as chance makes
    them, or too few to tell.

    Args:
        squares: variances with their degrees of freedom.
        other: the spread of another study, in nats per token.
    """
    if len(squares) < ENOUGH:
        return None
    known = [*squares, *[(other**2, 1)] * int(OTHERS)]
    half = np.array([f for _, f in known]) / 2
    logs = (np.log([max(square, LEAST) for square, _ in known])
            - special.digamma(half) + np.log(half))
    excess = float(np.var(logs, ddof=1) - np.mean(special.polygamma(1, half)))
    if excess <= special.polygamma(1, COMMON / 2):
        return None
    at = optimize.brentq(lambda x: special.polygamma(1, x) - excess, 1e-3, COMMON / 2)
    square = np.exp(np.mean(logs) + special.digamma(at) - np.log(at))
    return Spread(float(square ** 0.5), 2 * at, 0)


def _freedom(seeds: int, settings: int) -> float:
    """Degrees of freedom of the variance between seeds that so many pretrainings know."""
    return (seeds - 1) * settings / (1 + (settings - 1) * ALIKE**2) if settings else 0.0


def _draws(cells: Cells, settings: Mapping[str, Any]) -> str | None:
    """How methods adapt at settings of the grid."""
    return settings.get("adapt.draws", cells.own("adapt.draws"))


def repeated(cells: Cells, terms: Terms, domains: Sequence[str]) -> tuple[float, float]:
    """The variance between seeds of this contrast of methods, wherever the study repeats it.

    Returns:
        the mean over sets of pretrainings that were made at several seeds of the variance between
        seeds of the difference, averaged over those of ``domains`` that have the same seeds, and
        over the fine-tunings that share the pretrainings; and its degrees of freedom, 0 if there
        are none.
    """
    groups: dict[str, list[float]] = {}
    many = 1
    for name, at in _contexts(cells, terms):
        per_domain: dict[str, dict[int, float]] = {}
        for seed in [cells.own("seed"), *cells.seeds()]:
            there = at_seed(at, seed)
            found = compare.shared(cells, [arm for _, arm in there], domains)
            for domain, (mean, _, _) in compare.per_domain(cells, there, found).items():
                per_domain.setdefault(domain, {})[seed] = mean
        alike: dict[tuple[int, ...], list[list[float]]] = {}
        for of in per_domain.values():
            alike.setdefault(tuple(of), []).append(list(of.values()))
        for seeds, values in alike.items():
            if len(seeds) > 1:
                groups.setdefault(name, []).append(float(np.var(np.mean(values, axis=0), ddof=1)))
                many = max(many, len(seeds))
    square = np.mean([np.mean(of) for of in groups.values()]) if groups else 0.0
    return float(square), _freedom(many, len(groups))


def _contexts(cells: Cells, terms: Terms) -> Iterator[tuple[str, list[tuple[float, Arm]]]]:
    """The contrast at all settings at which one of its methods has a further seed, each once,
    with what names its pretrainings."""
    names = {arm.method for _, arm in terms}
    further, seen = cells.seeds(), set()
    for row in cells.all_rows:
        if row["method"] not in names or row["settings"].get("seed") not in further:
            continue
        at = []
        for coefficient, arm in terms:
            draws = _draws(cells, row["settings"])
            changes = {key: value for key, value in row["settings"].items()
                       if key != "seed" and sharing.depends(arm.method, key, draws)}
            if BUDGET in changes:
                changes[BUDGET] = _budget(cells, row, arm.method)
            at.append((coefficient, Arm(
                arm.method, {**changes, **_apart(cells, terms, arm)}, arm.when)))
        whole = json.dumps([cells.settings(arm) for _, arm in at], default=str)
        if whole not in seen:
            seen.add(whole)
            yield json.dumps([{key: value for key, value in given.items()
                               if sharing.pretraining_depends(name, key, _draws(cells, given))}
                              for name, given in ((arm.method, cells.settings(arm))
                                                  for _, arm in at)], default=str), at


def _budget(cells: Cells, row: compare.Row, method: str) -> Any:
    """The pretraining budget of a method that a row's is held against; its main one where the two
    have no budgets that are, and against the main one of the row's method, if no other is."""
    budget = row["settings"][BUDGET]
    if method == row["method"]:
        return budget
    held = {mine for mine, _ in cells.budgets(row["method"], method)}
    if not held or (budget not in held and budget == cells.main(row["method"], BUDGET)):
        return cells.main(method, BUDGET)
    return cells.beside(row["method"], budget, method)


def _apart(cells: Cells, terms: Terms, arm: Arm) -> dict[str, Any]:
    """The settings that tell an arm from another of the contrast's of the same method."""
    mine = cells.settings(arm)
    others = [cells.settings(other) for _, other in terms if other.method == arm.method]
    return {key: value for key, value in mine.items()
            if any(other[key] != value for other in others)}
