"""The renderer of all pages, and how a page writes its numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2

from planearly.methods import label
from planearly.units import duration, prefixed, short


def render(template: Path, **values: Any) -> str:
    """A page, or a part of one, from a template beside its caller; ``base.html.j2`` is the frame.

    Text is escaped in what ends in ``.html.j2``.
    """
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=jinja2.select_autoescape(("html.j2",)), trim_blocks=True, lstrip_blocks=True,
    )
    made.filters.update(number=number, si=si, percent=percent, flops=flops, hours=hours,
                        label=label)
    return made.get_template(template.name).render(**values)


def number(value: float | None) -> str:
    """Two decimals, one above ten, none above a thousand."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def si(value: float | None) -> str:
    return "–" if value is None else short(value)


def percent(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.1%" if 0 < value < 0.0005 else f"{100 * value:.1f}%"


def flops(value: float | None) -> str:
    """Floating-point operations with a decimal prefix."""
    return "–" if value is None else prefixed(value)


def hours(value: float | None) -> str:
    return "–" if value is None else duration(value * 3600)
