"""A plan in a folder: plan.json, plan.html and one recipe per method that is within the budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from planearly.files import atomic_write, write_json
from planearly.plan import recipes, show
from planearly.plan.recommend import Plan

_PAGE = Markup(
    "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' "
    "content='width=device-width'><title>Plan</title><style>body{{font-family:"
    "sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}table{{border-collapse:"
    "collapse;display:block;overflow-x:auto}}td,th{{padding:.3em .6em;text-align:"
    "left;border-bottom:1px solid #ddd}}svg{{max-width:40em}}</style>{}</html>")


def content(plan: Plan, generic: list[str], domains: list[str]) -> dict[str, Any]:
    """The plan as plain values, as in plan.json and on ``--json``.

    Args:
        generic: paths of the generic corpus for the recipes; placeholders if empty.
        domains: paths of the specialization sets, likewise.
    """
    return {**plan.to_dict(),
            "recipes": {row.method: recipes.recipe(plan, row, generic, domains)
                        for row in plan.rows if row.feasible}}


def write(out: Path, plan: Plan, generic: list[str], domains: list[str]) -> None:
    """Write the folder; arguments as :func:`content`."""
    recipes.write(plan, out, generic, domains)
    write_json(out / "plan.json", content(plan, generic, domains))
    with atomic_write(out / "plan.html", "w") as handle:
        handle.write(_PAGE.format(show.section(plan)))
