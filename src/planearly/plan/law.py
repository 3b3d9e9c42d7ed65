"""A loss law, fitted on the user's own small runs: what would ten times the budget bring?

    L(N, D, S) = E + A / N^a + B / D^b + C / S^c

with L the nats per token after fine-tuning, N the parameters of the deployed model, D the tokens of
pretraining and S those of the specialization set (the form of Hoffmann et al. 2022, section 3.3,
with a term for the set). A quantity that the runs did not vary has no term: it is part of E, and
the law does not hold for another value of it. The fit is robust (soft L1 on the log of the loss)
and its intervals come from refits on resampled residuals.

Methods that differ only in how much of their pretraining is plain generic text, paid before the
domain is known, and how much looks like the domain, paid for each, have one law together,

    L(N, D, g, S) = E + A / N^a + B / D^b + G g^c + C / S^d

with D the tokens of both kinds and g the share of generic ones: the more of either, the better the
model, and what generic text leaves wrong, G, goes the faster the sooner text like the domain's
follows (c above 1). It is the form of the D-CPT law (Que et al. 2024, arXiv 2406.01375) with the
other end of its mixture ratio. Counting a token of one kind as so many of the other would not do:
in our first trials 8.4M generic tokens and then 3.6M adapted ones had four fifths of what 12M
adapted ones gain over 12M generic ones, while 3.6M adapted ones alone were behind both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from planearly import methods
from planearly.config import look_up
from planearly.errors import UserError
from planearly.methods import GENERIC
from planearly.units import short

AXES = {"params": "inference_params", "pretrain_tokens": "pretrain_tokens",
        "spec_tokens": "spec_tokens"}
"""The law's axes and the fields of ``results.json`` rows that hold them."""
SHARE = "generic_share"
"""The axis g of a law of several methods, with which the loss grows; none of a single method's."""
LINE = "line"
"""The key of that law among those of single methods."""
REACH = 10.0
"""Times the smallest and the largest value seen, on each axis, within which the law speaks."""
_ROBUST = 0.01
"""Residual of the log loss beyond which a run counts as an outlier."""
_EXPONENTS = (0.1, 0.3, 0.7)
_MOST_EXPONENT = 2.0
_SHARE_EXPONENTS = (1.0, 3.0, 9.0)
_MOST_SHARE_EXPONENT = 30.0


@dataclass(frozen=True)
class Prediction:
    """Perplexity and mean nats per token, with a 95% interval."""

    perplexity: float
    ci95: tuple[float, float]
    nll_per_token: float
    extrapolation: float
    """Largest factor by which an axis lies beyond what was seen (1: inside)."""


@dataclass(frozen=True)
class Law:
    """A fitted law: exponents and coefficients per axis, on the axis divided by its scale."""

    axes: tuple[str, ...]
    scale: tuple[float, ...]
    floor: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]
    seen: dict[str, tuple[float, float]]
    residuals: tuple[float, ...]
    """Log of measured over fitted loss, per run, in the order given."""
    refits: tuple[tuple[float, ...], ...]
    """Parameters of the refits: floor, coefficients, exponents."""
    runs: int

    def beyond(self, params: float, pretrain_tokens: float, spec_tokens: float,
               generic_share: float = 1.0) -> float:
        """Largest factor by which an axis lies beyond what was seen; arguments as
        :meth:`predict`.

        Raises:
            UserError: a size lies further than ``REACH`` times beyond, or a share anywhere beyond.
        """
        at = {"params": params, "pretrain_tokens": pretrain_tokens, "spec_tokens": spec_tokens,
              SHARE: generic_share}
        beyond = 1.0
        for axis, (low, high) in self.seen.items():
            value = at[axis]
            if axis == SHARE:
                if not low <= value <= high:
                    raise UserError(f"the fitted law covers shares of generic tokens of {low:.0%} "
                                    f"to {high:.0%}: {value:.0%} is outside")
                continue
            factor = max(low / value, value / high, 1.0) if value > 0 else math.inf
            limit = REACH if axis in self.axes else 1.05
            if factor > limit:
                span = short(low) if low == high else f"{short(low)} to {short(high)}"
                allowed = f"at most {REACH:g} times beyond" if axis in self.axes \
                    else "no other value, since it was not varied"
                raise UserError(
                    f"the fitted law covers {axis} of {span} ({allowed}): {short(value)} is "
                    "outside, so no perplexity is predicted"
                )
            beyond = max(beyond, factor)
        return beyond

    def nll(self, params: float, pretrain_tokens: np.ndarray | float, spec_tokens: float,
            generic_share: np.ndarray | float = 1.0) -> np.ndarray:
        """Expected nats per token ``[n]`` at these sizes, also beyond what was seen."""
        return self._at(params, pretrain_tokens, spec_tokens, generic_share)[0]

    def _at(self, params: float, pretrain_tokens: np.ndarray | float, spec_tokens: float,
            generic_share: np.ndarray | float, refits: bool = False) -> list[np.ndarray]:
        at = dict(zip((*AXES, SHARE), np.broadcast_arrays(
            params, pretrain_tokens, spec_tokens, np.atleast_1d(generic_share)), strict=True))
        x = np.stack([at[axis] for axis in self.axes], 1) / np.array(self.scale)
        own = (self.floor, *self.coefficients, *self.exponents)
        return [_loss(np.array(p), x, _signs(self.axes))
                for p in (own, *(self.refits if refits else ()))]

    def predict(self, params: float, pretrain_tokens: float, spec_tokens: float,
                generic_share: float = 1.0) -> Prediction:
        """Expected perplexity at these sizes.

        Args:
            generic_share: of the tokens, those that were plain generic text; counts in a law of
                several methods alone.

        Raises:
            UserError: as :meth:`beyond`.
        """
        sizes = (params, pretrain_tokens, spec_tokens, generic_share)
        beyond = self.beyond(*sizes)
        middle, *spread = (float(each[0]) for each in self._at(*sizes, refits=True))
        low, high = np.quantile([*spread, middle], [0.025, 0.975])
        return Prediction(math.exp(middle), (math.exp(low), math.exp(high)), middle, beyond)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """The fit, its residuals and its range, in one line."""
        terms = [f"{self.floor:.3f}"] + [
            f"{c:.3f} {axis}^{e:.3f}" if axis == SHARE else
            f"{c:.3f} ({axis} / {short(s)})^-{e:.3f}" for axis, s, c, e in
            zip(self.axes, self.scale, self.coefficients, self.exponents, strict=True)]
        size = math.sqrt(float(np.mean(np.square(self.residuals))))
        return (f"nats per token = {' + '.join(terms)}; {self.runs} runs, residual "
                f"{100 * size:.2f}% (largest {100 * max(map(abs, self.residuals)):.2f}%); holds to "
                f"{REACH:g} times beyond what was run")


class TooFew(UserError):
    """There are too few runs for a law."""


NEEDED = ("it takes at least three values of each quantity that varies, and five runs where one "
          "does, seven for two, nine for three")


def fit(rows: Iterable[Mapping[str, Any]], method: str, refits: int = 100,
        seed: int = 0) -> Law:
    """Fit the law to the rows of ``results.json`` of one method, each size's loss averaged over the
    domains that most sizes share (the paper's macro average).

    Args:
        rows: with ``method``, ``domain``, ``ppl_after``, ``inference_params``,
            ``pretrain_tokens`` and ``spec_tokens``.
        refits: number of resampled fits that the intervals come from.

    Sizes within 10% of each other are one size: sets are cut at documents, and packing varies. Of a
    quantity with two values, which no curve can be drawn through, the more frequent one is taken.

    Raises:
        TooFew: too few runs, or nothing varied.
    """
    return _fit(_points((row for row in rows if row.get("method") == method), AXES),
                tuple(AXES), method, refits, seed)


def fit_line(rows: Iterable[Mapping[str, Any]], refits: int = 100, seed: int = 0) -> Law:
    """Fit one law to the methods of :func:`line`; arguments as :func:`fit`.

    Raises:
        TooFew: too few runs.
        UserError: fewer than three shares of generic tokens, which no curve can be drawn through.
    """
    fields = {**AXES, SHARE: SHARE}
    points = _points(({**row, SHARE: generic_share(row)} for row in rows
                      if row.get("method") in line()), fields)
    name = " and ".join(line())
    if (shares := len({p[SHARE] for p in points})) < 3:
        raise UserError(f"the law of {name} together needs runs of at least three shares of "
                        f"generic tokens on the same domains, and there are {shares}: run all "
                        "three methods")
    return _fit(points, tuple(fields), name, refits, seed)


def measured(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured at every size: ``method``, the :data:`AXES` and ``nll``, over the domains
    that most methods and sizes share."""
    known = [row for row in rows if row.get("method") in methods.TABLE]
    numbers = {name: i for i, name in enumerate(methods.TABLE, 1)}
    points = _points(({**row, "number": numbers[row["method"]]} for row in known),
                     {"number": "number", **AXES}, exact="number")
    names = list(methods.TABLE)
    return [{"method": names[int(point.pop("number")) - 1], **point} for point in points]


def line() -> list[str]:
    """The methods that pretrain one small dense model on generic text, on text drawn by the
    domain's clusters, or on the one and then the other."""
    return [row.name for row in methods.TABLE.values()
            if (row.size, row.bank, row.tune) == ("small", None, "full") and row.draws
            and {row.draws, row.adapts} <= {GENERIC, "importance", None}]


def generic_share(row: Mapping[str, Any]) -> float:
    """Of the pretraining tokens behind a row of ``results.json``, those paid once for all domains.
    """
    method = methods.find(row["method"])
    if not method.adapts:
        return 0.0 if method.per_domain else 1.0
    whole = row.get("pretrain_tokens")
    return float((row.get("generic_cost") or {}).get("tokens", 0) / whole) if whole else 0.0


def _fit(points: list[dict[str, float]], fields: tuple[str, ...], name: str, refits: int,
         seed: int) -> Law:
    for axis in AXES:
        if len({p[axis] for p in points}) == 2:
            often = Counter(p[axis] for p in points).most_common(1)[0][0]
            points = [p for p in points if p[axis] == often]
    values = {axis: [p[axis] for p in points] for axis in fields}
    axes = tuple(axis for axis in fields if len(set(values[axis])) >= 3)
    needed = 1 + 2 * len(axes) + 2
    if not axes or len(points) < needed:
        counts = ", ".join(f"{len(set(values[axis]))} of {axis}" for axis in fields)
        raise TooFew(f"no law is fitted to the runs of {name} ({len(points)}, with {counts}), "
                     f"which are too few: {NEEDED}")
    seen = {axis: (float(min(values[axis])), float(max(values[axis]))) for axis in fields}
    raw = np.array([[p[axis] for axis in axes] for p in points], dtype=float)
    signs = _signs(axes)
    scale = np.array([1.0 if sign > 0 else math.exp(np.log(raw[:, i]).mean())
                      for i, sign in enumerate(signs)])
    x, y = raw / scale, np.array([p["nll"] for p in points])
    best = min((_solve(x, y, start, signs) for start in _starts(x, y, signs)),
               key=lambda r: r[1])[0]
    fitted = _loss(best, x, signs)
    residuals = np.log(y / fitted)
    random = np.random.default_rng(seed)
    # small samples understate their own residuals: scaled by the degrees of freedom
    wide = residuals * math.sqrt(len(y) / max(len(y) - len(best), 1))
    again = [_solve(x, fitted * np.exp(random.choice(wide, len(y))), best, signs)[0]
             for _ in range(refits)]
    n = len(axes)
    return Law(axes, tuple(scale.tolist()), float(best[0]), tuple(best[1:1 + n].tolist()),
               tuple(best[1 + n:].tolist()), seen, tuple(residuals.tolist()),
               tuple(tuple(p.tolist()) for p in again), len(points))


def plain(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of a ``results.json``; of a ``study.json`` those that vary sizes, seeds and the share of
    adaptation alone. Not those that adapt in another way than the method's own, nor those of a
    teacher that had tokens of its own."""
    free = ("pretrain_tokens", "spec_tokens", "seed", "model.")
    taught = look_up(results.get("recipe", {}), "distill.teacher_tokens") and {
        row.name for row in methods.TABLE.values() if row.taught}
    return [row for row in results["rows"]
            if not row.get("draws") and row.get("method") not in (taught or ()) and all(
                key.startswith(free) or (key == "adapt.share" and row.get("method") in line())
                or value == look_up(results.get("recipe", {}), key)
                for key, value in row.get("settings", {}).items())]


def _points(rows: Iterable[Mapping[str, Any]], fields: Mapping[str, str],
            exact: str = "") -> list[dict[str, float]]:
    """Mean loss at every size, over the domains that most sizes have.

    Args:
        fields: of the rows that hold each axis.
        exact: an axis whose values are one only if they are equal.
    """
    usable = [row for row in rows
              if all(row.get(field) or (axis == SHARE) for axis, field in fields.items())
              and row.get("ppl_after") is not None and 1 < row["ppl_after"] < math.inf]
    nominal = {axis: {row[field]: row[field] for row in usable} if axis == exact
               else _nominal(row[field] for row in usable) for axis, field in fields.items()}
    cells: dict[tuple[float, ...], dict[str, list[float]]] = {}
    for row in usable:
        size = tuple(nominal[axis][row[field]] for axis, field in fields.items())
        cells.setdefault(size, {}).setdefault(row["domain"], []).append(math.log(row["ppl_after"]))
    sets = {frozenset(losses) for losses in cells.values()}
    domains = max(sets, key=lambda s: (sum(s <= set(c) for c in cells.values()), len(s), sorted(s)),
                  default=frozenset())
    return [{**dict(zip(fields, size, strict=True)),
             "nll": float(np.mean([np.mean(losses[d]) for d in sorted(domains)]))}
            for size, losses in cells.items() if domains <= set(losses)]


def _nominal(sizes: Iterable[float]) -> dict[float, float]:
    """Each size to the middle one of those that go with it, within 10% of the smallest."""
    groups: list[list[float]] = []
    for size in sorted(set(sizes)):
        if groups and size <= 1.1 * groups[-1][0]:
            groups[-1].append(size)
        else:
            groups.append([size])
    return {size: group[len(group) // 2] for group in groups for size in group}


def _signs(axes: tuple[str, ...]) -> np.ndarray:
    """Of the powers of each axis."""
    return np.array([1.0 if axis == SHARE else -1.0 for axis in axes])


def _loss(parameters: np.ndarray, x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The law at ``x`` [points, n], for parameters (floor, n coefficients, n exponents)."""
    n = len(signs)
    return parameters[0] + (parameters[1:1 + n] * x ** (signs * parameters[1 + n:])).sum(axis=1)


def _starts(x: np.ndarray, y: np.ndarray, signs: np.ndarray) -> list[np.ndarray]:
    """For each grid of exponents, the coefficients that fit best and are not negative."""
    from scipy.optimize import nnls

    starts = []
    for exponents in product(*(_SHARE_EXPONENTS if sign > 0 else _EXPONENTS for sign in signs)):
        design = np.concatenate([np.ones((len(y), 1)), x ** (signs * exponents)], axis=1)
        starts.append(np.concatenate([nnls(design, y)[0], exponents]))
    return starts


def _solve(x: np.ndarray, y: np.ndarray, start: np.ndarray,
           signs: np.ndarray) -> tuple[np.ndarray, float]:
    from scipy.optimize import least_squares

    n = x.shape[1]
    most = np.concatenate([np.full(1 + n, 10 * y.max()), np.where(
        signs > 0, _MOST_SHARE_EXPONENT, _MOST_EXPONENT)])
    least = np.concatenate([np.zeros(1 + n), np.full(n, 1e-3)])

    def errors(p: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(_loss(p, x, signs), 1e-9) / y)

    inside = np.clip(start, least + 1e-6, most - 1e-6)
    found = least_squares(errors, inside, bounds=(least, most), loss="soft_l1", f_scale=_ROBUST,
                          max_nfev=200)
    return found.x, float(found.cost)
