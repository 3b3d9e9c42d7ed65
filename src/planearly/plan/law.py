"""A loss law, fitted on the user's own small runs: what would ten times the budget bring?

    L(N, D, S) = E + A / N^a + B / D^b + C / S^c

with L the nats per token after fine-tuning, N the parameters of the deployed model, D the tokens of
pretraining and S those of the specialization set (the form of Hoffmann et al. 2022, section 3.3,
with a term for the set). A quantity that the runs did not vary has no term: it is part of E, and
the law does not hold for another value of it. The fit is robust (soft L1 on the log of the loss)
and its intervals come from refits on resampled residuals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from planearly.config import look_up
from planearly.errors import UserError
from planearly.units import short

AXES = {"params": "inference_params", "pretrain_tokens": "pretrain_tokens",
        "spec_tokens": "spec_tokens"}
"""The law's axes and the fields of ``results.json`` rows that hold them."""
REACH = 10.0
"""Times the smallest and the largest value seen, on each axis, within which the law speaks."""
_ROBUST = 0.01
"""Residual of the log loss beyond which a run counts as an outlier."""
_EXPONENTS = (0.1, 0.3, 0.7)
_MOST_EXPONENT = 2.0


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

    def predict(self, params: float, pretrain_tokens: float, spec_tokens: float) -> Prediction:
        """Expected perplexity at these sizes.

        Raises:
            UserError: a size lies further than ``REACH`` times beyond what the runs covered.
        """
        at = {"params": params, "pretrain_tokens": pretrain_tokens, "spec_tokens": spec_tokens}
        beyond = 1.0
        for axis, (low, high) in self.seen.items():
            value = at[axis]
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
        x = np.array([[at[axis] for axis in self.axes]]) / np.array(self.scale)
        n = len(self.axes)
        own = (self.floor, *self.coefficients, *self.exponents)
        middle = float(_loss(np.array(own), x, n)[0])
        spread = [float(_loss(np.array(p), x, n)[0]) for p in self.refits]
        low, high = np.quantile([*spread, middle], [0.025, 0.975])
        return Prediction(math.exp(middle), (math.exp(low), math.exp(high)), middle, beyond)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """The fit, its residuals and its range, in one line."""
        terms = [f"{self.floor:.3f}"] + [
            f"{c:.3f} ({axis} / {short(s)})^-{e:.3f}" for axis, s, c, e in
            zip(self.axes, self.scale, self.coefficients, self.exponents, strict=True)]
        size = math.sqrt(float(np.mean(np.square(self.residuals))))
        return (f"nats per token = {' + '.join(terms)}; {self.runs} runs, residual "
                f"{100 * size:.2f}% (largest {100 * max(map(abs, self.residuals)):.2f}%); holds to "
                f"{REACH:g} times beyond what was run")


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
        UserError: too few runs, or nothing varied.
    """
    points = _points(rows, method)
    for axis in AXES:
        if len({p[axis] for p in points}) == 2:
            often = Counter(p[axis] for p in points).most_common(1)[0][0]
            points = [p for p in points if p[axis] == often]
    values = {axis: [p[axis] for p in points] for axis in AXES}
    axes = tuple(axis for axis in AXES if len(set(values[axis])) >= 3)
    needed = 1 + 2 * len(axes) + 2
    if not axes or len(points) < needed:
        counts = ", ".join(f"{len(set(values[axis]))} of {axis}" for axis in AXES)
        raise UserError(
            f"the law of {method} needs at least three values of each quantity that varies and two "
            f"runs more than the law has parameters ({needed if axes else 5}): there are "
            f"{len(points)} runs with {counts}"
        )
    seen = {axis: (float(min(values[axis])), float(max(values[axis]))) for axis in AXES}
    raw = np.array([[p[axis] for axis in axes] for p in points], dtype=float)
    scale = np.exp(np.log(raw).mean(axis=0))
    x, y = raw / scale, np.array([p["nll"] for p in points])
    best = min((_solve(x, y, start) for start in _starts(x, y)), key=lambda r: r[1])[0]
    fitted = _loss(best, x, len(axes))
    residuals = np.log(y / fitted)
    random = np.random.default_rng(seed)
    # small samples understate their own residuals: scaled by the degrees of freedom
    wide = residuals * math.sqrt(len(y) / max(len(y) - len(best), 1))
    again = [_solve(x, fitted * np.exp(random.choice(wide, len(y))), best)[0]
             for _ in range(refits)]
    n = len(axes)
    return Law(axes, tuple(scale.tolist()), float(best[0]), tuple(best[1:1 + n].tolist()),
               tuple(best[1 + n:].tolist()), seen, tuple(residuals.tolist()),
               tuple(tuple(p.tolist()) for p in again), len(points))


def plain(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows of a ``results.json``; of a ``study.json`` those that vary sizes and seeds alone."""
    free = ("pretrain_tokens", "spec_tokens", "seed", "model.")
    return [row for row in results["rows"]
            if all(key.startswith(free) or value == look_up(results.get("recipe", {}), key)
                   for key, value in row.get("settings", {}).items())]


def _points(rows: Iterable[Mapping[str, Any]], method: str) -> list[dict[str, float]]:
    """Mean loss at every size, over the domains that most sizes have."""
    usable = [row for row in rows if row.get("method") == method
              and all(row.get(field) for field in AXES.values())
              and row.get("ppl_after") is not None and 1 < row["ppl_after"] < math.inf]
    nominal = {axis: _nominal(row[field] for row in usable) for axis, field in AXES.items()}
    cells: dict[tuple[float, ...], dict[str, list[float]]] = {}
    for row in usable:
        size = tuple(nominal[axis][row[field]] for axis, field in AXES.items())
        cells.setdefault(size, {}).setdefault(row["domain"], []).append(math.log(row["ppl_after"]))
    sets = {frozenset(losses) for losses in cells.values()}
    domains = max(sets, key=lambda s: (sum(s <= set(c) for c in cells.values()), len(s), sorted(s)),
                  default=frozenset())
    return [{**dict(zip(AXES, size, strict=True)),
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


def _loss(parameters: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """The law at ``x`` [points, n], for parameters (floor, n coefficients, n exponents)."""
    return parameters[0] + (parameters[1:1 + n] * x ** -parameters[1 + n:]).sum(axis=1)


def _starts(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """For each grid of exponents, the coefficients that fit best and are not negative."""
    from scipy.optimize import nnls

    starts = []
    for exponents in product(_EXPONENTS, repeat=x.shape[1]):
        design = np.concatenate([np.ones((len(y), 1)), x ** -np.array(exponents)], axis=1)
        starts.append(np.concatenate([nnls(design, y)[0], exponents]))
    return starts


def _solve(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float]:
    from scipy.optimize import least_squares

    n = x.shape[1]
    most = np.concatenate([np.full(1 + n, 10 * y.max()), np.full(n, _MOST_EXPONENT)])
    least = np.concatenate([np.zeros(1 + n), np.full(n, 1e-3)])

    def errors(p: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(_loss(p, x, n), 1e-9) / y)

    inside = np.clip(start, least + 1e-6, most - 1e-6)
    found = least_squares(errors, inside, bounds=(least, most), loss="soft_l1", f_scale=_ROBUST,
                          max_nfev=200)
    return found.x, float(found.cost)
