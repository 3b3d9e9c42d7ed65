"""What a plan would be under other limits: a table over the stops of four sliders, for its page.

Every entry is a plan that :func:`planearly.plan.recommend.recommend` made, so the page says what
``planearly plan --json`` does; what it does not have to say (shapes, recipes, notes) is left out.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from planearly import methods
from planearly.cost import model
from planearly.errors import UserError
from planearly.files import finite
from planearly.model import flops
from planearly.plan import options, show, sizes
from planearly.plan.inputs import PlanInput
from planearly.plan.options import CHECKPOINT, LEAST_TOKENS, Row
from planearly.plan.recommend import Plan, recommend
from planearly.plan.split import member
from planearly.progress import progress
from planearly.report import drawing
from planearly.units import short

LIMITS = (30_000_000, 126_000_000, 350_000_000, 771_000_000)
"""Parameters at inference, where a plan has no limit of its own to go up and down from."""
DOMAINS = (1, 2, 3, 5, 7, 15, 50)
_BUDGETS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Times a budget, or what a small model takes at 20 tokens per parameter where none is stated."""


def stops(given: PlanInput) -> dict[str, list[float | None]]:
    """The values of each slider, increasing; None: no limit."""
    def around(value: float | None, usual: float) -> list[float | None]:
        middle = usual if value is None else value
        return [*sorted({float(f"{middle * times:.2g}") if times != 1 or value is None else middle
                         for times in _BUDGETS} if middle else {0.0}), None]

    wanted = LIMITS if given.limit is None else [
        round(given.limit * times) for times in (0.25, 0.5, 1, 2, 4, 8)]
    limits: list[float | None] = []
    for limit in wanted:
        try:
            sizes.shape_for(limit)
            limits.append(limit)
        except UserError:  # below the smallest model
            continue
    setting = options.setting_of(given)
    tokens = 2.0 * LEAST_TOKENS * flops.parameters(setting.small)
    usual = model.pretraining(setting, member(0.0), tokens).device_hours
    return {"limit": [*limits, None],
            "domains": [*sorted({*map(float, DOMAINS), float(given.total_domains)})],
            "before": around(given.generic_hours, usual),
            "each": around(given.specialization_hours, usual)}


def at(given: PlanInput, values: dict[str, float | None]) -> PlanInput:
    """What a plan is made from where the sliders stand."""
    domains = values["domains"]
    assert domains is not None
    limit = values["limit"]
    return replace(given, limit=None if limit is None else round(limit), domains=round(domains),
                   domains_later=0, generic_hours=values["before"],
                   specialization_hours=values["each"])


class _Texts:
    """Texts by number, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def read(self) -> list[Any]:
        """What the texts say, where they are JSON."""
        return [json.loads(text) for text in self.numbers]


def table(given: PlanInput) -> dict[str, Any]:
    """All plans over the stops.

    Returns:
        ``sliders``: for each ``key``, ``values``, ``labels`` and ``start``, the place of what was
        asked; ``methods``, ``colours`` and ``texts``; ``plans``, the last slider fastest, each
        [method, reason, [adapt_share, generic, adapted tokens, perplexity] or null, number of its
        rows, number of its frontier]; ``rows``, each a list over methods of [feasible, why, hours
        before, hours per domain, perplexity]; ``frontiers``, each a list of [method, [[hours,
        perplexity], ...]].
    """
    values = stops(given)
    known: dict[str, list[Row]] = {}
    texts, several, frontiers = _Texts(), _Texts(), _Texts()
    drawn: dict[str, int] = {}
    plans: list[Any] = []
    names = [*methods.TABLE, CHECKPOINT]

    def row(of: Row) -> list[Any]:
        return [int(of.feasible), texts(of.why), of.cost.generic.device_hours,
                of.cost.specialization.device_hours,
                of.perplexity and of.perplexity["perplexity"]]

    places = product(*(range(len(each)) for each in values.values()))
    count = len(list(product(*values.values())))
    with progress("planning for other limits", count, "plans") as meter:
        for place in places:
            where = dict(zip(values, place, strict=True))
            asked = at(given, {key: values[key][i] for key, i in where.items()})
            alike = str([where[key] for key in values if key != "domains"])
            made = recommend(asked, known.get(alike))
            known.setdefault(alike, made.costed)
            # sizes and a network's slices depend on the budgets; every share is on its curve
            depends = str((replace(made.setting, adapt_share=0.0), asked.domains))
            if depends not in drawn:
                drawn[depends] = frontiers(_json(_frontier(made, asked.domains)))
            split = made.split.to_dict() if made.split else None
            plans.append([names.index(made.recommended), texts(made.reason), split and [
                split[key] for key in ("adapt_share", "generic_tokens", "adapted_tokens",
                                       "perplexity")],
                several(_json([row(made.row(name)) for name in names])), drawn[depends]])
            meter.advance(1)
    start = {"limit": given.limit, "domains": float(given.total_domains),
             "before": given.generic_hours, "each": given.specialization_hours}
    return {
        "sliders": [{"key": key, "values": mine, "labels": [_LABELS[key](v) for v in mine],
                     "start": mine.index(start[key])} for key, mine in values.items()],
        "methods": names, "texts": list(texts.numbers), "plans": plans,
        "rows": several.read(), "frontiers": frontiers.read(),
        "colours": [drawing.style_of(name, names)[0] for name in names]}


def _json(found: Any) -> str:
    return json.dumps(finite(found))


def _frontier(made: Plan, domains: int) -> list[Any]:
    found: dict[str, list[Any]] = {}
    for point in made.frontier([domains]):
        found.setdefault(point["method"], []).append(
            [round(point["hours"], 6), round(point["perplexity"], 3)])
    return sorted(found.items())


def _hours(value: float | None) -> str:
    return "no limit" if value is None else f"{show.number(value)} h"


_LABELS: dict[str, Callable[[float | None], str]] = {
    "limit": lambda v: "no limit" if v is None else f"{short(v)} parameters",
    "domains": lambda v: f"{v:.0f}", "before": _hours, "each": _hours}


def packed(found: dict[str, Any]) -> str:
    """A table as the page holds it: gzipped JSON in base64."""
    text = json.dumps(finite(found), separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
