"""How to split pretraining between before and per domain, and what each total cost then buys.

The methods of :func:`planearly.plan.law.line` are one line: all tokens before the domain is known
(slm), all of them per domain (slm-is), and everything between (slm-adapt). Where the fitted law of
the line speaks, the split with the lowest expected loss is taken; else what the user's own study
found at equal tokens, where that settles it; else it is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from planearly import keys, methods
from planearly.cost import model
from planearly.cost.model import Setting
from planearly.errors import UserError
from planearly.methods import GENERIC, Method
from planearly.model import flops
from planearly.plan import law
from planearly.plan.inputs import PlanInput
from planearly.plan.options import MOST_PASSES, Row
from planearly.report.sentences import SEED_SPREAD
from planearly.units import short

LEAST_SHARE = keys.Optimizer().decay_share
"""Share of pretraining that an adapting method makes per domain at least: adaptation begins before
the learning rate decays (:mod:`planearly.stages.adapt`)."""
_SHARES = 71
"""Shares from there to 1 that are tried."""
FRONTIER = (1, 7, 50)
"""Numbers of domains whose frontier a plan shows: those of the paper's figures."""
_POINTS = 25
"""Total costs at which a curve of a frontier is drawn."""


@dataclass(frozen=True)
class Split:
    """How a model's pretraining is split.

    Attributes:
        method: of the line.
        adapt_share: share of the tokens that is paid per domain.
        tokens: of both kinds together.
        before, each: device-hours before the domain is known, and per domain, fine-tuning included.
        nll: expected nats per token.
        ground: what the choice is by.
    """

    method: str
    adapt_share: float
    tokens: float
    before: float
    each: float
    nll: float | None
    ground: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "generic_tokens": self.tokens * (1 - self.adapt_share),
                "adapted_tokens": self.tokens * self.adapt_share,
                "perplexity": None if self.nll is None else math.exp(self.nll)}


def member(share: float) -> Method:
    """The method of the line that makes this share of its pretraining per domain."""
    rows = [methods.TABLE[name] for name in law.line()]
    if 0 < share < 1:
        return next(row for row in rows if row.adapts)
    return next(row for row in rows if not row.adapts
                and (row.draws == GENERIC) == (share == 0))


def shares() -> np.ndarray:
    """Shares of pretraining per domain that a run can have, increasing."""
    return np.array([0.0, *np.linspace(LEAST_SHARE, 1.0, _SHARES)])


@dataclass(frozen=True)
class Prices:
    """Device-hours on the line.

    Attributes:
        token: of a token of pretraining, by the fewest tokens of one that takes such steps,
            increasing.
        tuning: of one fine-tuning.
    """

    token: dict[float, float]
    tuning: float

    @classmethod
    def of(cls, setting: Setting) -> Prices:
        plain = member(0.0)
        return cls({fewest: model.pretraining(replace(setting, batch_tokens=step), plain,
                                              1.0).device_hours
                    for fewest, step in setting.steps()},
                   model.finetuning(setting, plain).device_hours)

    def pretraining(self, tokens: Any) -> Any:
        """Of one on so many tokens."""
        at = np.searchsorted([*self.token], tokens, side="right") - 1
        return np.array([*self.token.values()])[at] * tokens

    def bought(self, hours: Any, most: float = math.inf) -> Any:
        """Tokens of the longest pretraining that so many hours pay, ``most`` at most."""
        found: Any = 0.0
        for fewest, token in self.token.items():
            tokens = np.minimum(np.asarray(hours) / token, most)
            found = np.where(tokens >= fewest, tokens, found)
        return found

    def total(self, domains: int, tokens: Any, share: Any) -> Any:
        """C(N) of a model of so many tokens, of which ``share`` is paid per domain."""
        return self.pretraining(tokens) * (1 - share + domains * share) + domains * self.tuning

    def once(self, hours: Any, domains: int, share: Any) -> Any:
        """What of a total cost is left for one model's pretraining."""
        spent = np.maximum(hours - domains * self.tuning, 0.0)
        return spent / (1 - share + domains * share)


def afforded(given: PlanInput, prices: Prices, share: np.ndarray,
             total: float) -> np.ndarray:
    """Tokens ``[n]`` that the budgets afford at each share of them per domain; where one of the two
    is not stated, at ``total`` device-hours over all domains."""
    stops = [np.full(len(share), np.inf)]  # hours of the whole pretraining
    with np.errstate(divide="ignore", invalid="ignore"):
        if given.generic_hours is not None:
            stops.append(np.where(share < 1, given.generic_hours / (1 - share), np.inf))
        if given.specialization_hours is not None:
            left = max(given.specialization_hours - prices.tuning, 0.0)
            stops.append(np.where(share > 0, left / share, np.inf))
    if given.generic_hours is None or given.specialization_hours is None:
        stops.append(prices.once(total, given.total_domains, share))
    bought: np.ndarray = prices.bought(np.min(stops, axis=0),
                                       float(MOST_PASSES * given.generic_tokens))
    return bought


def by_law(given: PlanInput, setting: Setting, total: float) -> Split:
    """The split of the lowest expected loss.

    Args:
        total: as of :func:`afforded`.

    Raises:
        UserError: there is no law of the line, or none of what the budgets afford is within its
            evidence.
    """
    fitted = given.laws.get(law.LINE)
    if fitted is None:
        raise UserError("no law is fitted to runs of your own of " + ", ".join(law.line()))
    prices, share = Prices.of(setting), shares()
    tokens = afforded(given, prices, share, total)
    params = flops.parameters(setting.small)
    inside, refused = np.zeros(len(share), bool), ""
    for i, (each, many) in enumerate(zip(share, tokens, strict=True)):
        try:
            fitted.beyond(params, float(many), given.spec_tokens, 1 - float(each))
            inside[i] = True
        except UserError as error:
            refused = refused or str(error)
    if not inside.any():
        raise UserError(refused)
    nll = np.where(inside, fitted.nll(params, np.maximum(tokens, 1), given.spec_tokens, 1 - share),
                   np.inf)
    best = int(np.argmin(nll))
    row = member(share[best])
    reach = fitted.beyond(params, float(tokens[best]), given.spec_tokens, 1 - float(share[best]))
    ground = f"the law fitted to {fitted.runs} runs of your own"
    if reach > 1.01:
        ground += f", which it extrapolates {reach:.1f} times"
    if not inside.all():
        ground += "; of the splits within its evidence"
    whole = float(prices.pretraining(tokens[best]))
    tuning = prices.tuning if given.specialization_hours is None \
        else min(prices.tuning, given.specialization_hours)
    return Split(row.name, float(share[best]), float(tokens[best]), whole * float(1 - share[best]),
                 whole * float(share[best]) + tuning, float(nll[best]), ground)


def by_study(given: PlanInput, setting: Setting,
             rows: Mapping[str, Row]) -> tuple[str, str] | None:
    """The method that the user's own runs found better than every other at equal tokens, and that
    has the most tokens here too; with what that is by.

    None where they do not settle it: by less than two trainings of one kind may differ by, or at
    sizes or tokens per parameter that are :data:`planearly.plan.law.REACH` times others.
    """
    points = _equal_tokens(given.measured)
    best = {point["method"]: point["nll"] for point in points
            if point["method"] in rows and rows[point["method"]].feasible}
    if len(best) < 2:
        return None
    name, other = sorted(best, key=best.__getitem__)[:2]
    at, tokens = points[0], rows[name].pretrain_tokens
    params = flops.parameters(setting.small)
    if best[other] - best[name] < SEED_SPREAD or any(
            tokens < 0.99 * rows[each].pretrain_tokens for each in best) or not all(
            1 / law.REACH <= ratio <= law.REACH for ratio in (
                params / at["params"], tokens / params / at["pretrain_tokens"] * at["params"])):
        return None
    told = ", ".join(f"{each} {math.exp(best[each]):.2f}"
                     for each in sorted(best, key=best.__getitem__))
    return name, (f"your own runs of {short(at['params'])} parameters at "
                  f"{short(at['pretrain_tokens'])} tokens each (perplexity: {told}), and no method "
                  "has more tokens here; no law of them was fitted")


def _equal_tokens(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points of the size, tokens and set that most methods share; of two the longer runs."""
    groups: dict[tuple[float, ...], list[Mapping[str, Any]]] = {}
    for point in points:
        key = tuple(point[axis] for axis in law.AXES)
        groups.setdefault(key, []).append(point)
    return max(groups.values(), key=lambda group: (
        len({point["method"] for point in group}), group[0]["pretrain_tokens"]), default=[])


def frontier(given: PlanInput, setting: Setting,
             domains: Sequence[int] = FRONTIER) -> list[dict[str, Any]]:
    """Expected loss over total cost: per number of domains and method ``domains``, ``method``,
    ``hours`` (C(N), device-hours), ``nll``, ``perplexity``, ``tokens`` of a model and
    ``adapt_share``; for what adapts, the best share at each cost. Only where a fitted law speaks.
    """
    found: list[dict[str, Any]] = []
    params, prices = flops.parameters(setting.small), Prices.of(setting)

    def add(n: int, method: str, hours: Any, tokens: Any, nll: Any, share: Any) -> None:
        # a larger step may cost less than a smaller one of fewer tokens: who pays takes that
        least = np.minimum.accumulate([*hours[1:], np.inf][::-1])[::-1]
        kept = (np.asarray(hours) < least) & np.isfinite(nll)
        hours, tokens, nll, share = (np.asarray(of)[kept] for of in (hours, tokens, nll, share))
        found.extend({"domains": n, "method": method, "hours": float(h), "nll": float(loss),
                      "perplexity": math.exp(loss), "tokens": float(d), "adapt_share": float(a)}
                     for h, d, loss, a in zip(hours, tokens, nll, share, strict=True))

    fitted = given.laws.get(law.LINE)
    if fitted is not None and _covers(fitted, params, given.spec_tokens):
        tokens = _span(fitted)
        between = shares()[1:-1]
        for n in domains:
            for share in (0.0, 1.0):
                add(n, member(share).name, prices.total(n, tokens, share), tokens,
                    fitted.nll(params, tokens, given.spec_tokens, 1 - share),
                    np.full(len(tokens), share))
            hours = np.geomspace(prices.total(n, tokens[0], LEAST_SHARE),
                                 prices.total(n, tokens[-1], LEAST_SHARE), _POINTS)
            many = prices.bought(prices.once(hours[:, None], n, between[None, :]))
            nll = fitted.nll(params, np.maximum(many, 1).ravel(), given.spec_tokens,
                             1 - np.broadcast_to(between, many.shape).ravel()).reshape(many.shape)
            nll = np.where((many < 0.999 * tokens[0]) | (many > 1.001 * tokens[-1]), np.inf, nll)
            best = (np.arange(len(hours)), nll.argmin(1))
            add(n, member(0.5).name, hours, many[best], nll[best], between[best[1]])
    for name, own in given.laws.items():
        row = methods.TABLE.get(name)
        if row is None or not row.bank or row.adapts or not _covers(own, params, given.spec_tokens):
            continue
        tokens = _span(own)
        chosen = replace(setting, expert=given.expert(row))
        for n in domains:
            costs = [model.cost(chosen, row, float(many)).total(n) for many in tokens]
            add(n, name, [cost.device_hours for cost in costs], tokens,
                own.nll(params, tokens, given.spec_tokens), np.zeros(len(tokens)))
    return found


def _covers(fitted: law.Law, params: float, spec_tokens: float) -> bool:
    low, high = fitted.seen["pretrain_tokens"]
    try:
        fitted.beyond(params, math.sqrt(low * high), spec_tokens)
        return "pretrain_tokens" in fitted.axes
    except UserError:
        return False


def _span(fitted: law.Law) -> np.ndarray:
    """Tokens within a law's evidence, increasing."""
    low, high = fitted.seen["pretrain_tokens"]
    return np.geomspace(low / law.REACH, high * law.REACH, _POINTS) * np.array(
        [1.0001, *np.ones(_POINTS - 2), 0.9999])

