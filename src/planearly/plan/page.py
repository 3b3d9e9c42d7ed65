"""A plan in a folder: plan.json, plan.html and one recipe per method that is within the budgets; or
as one page, on which its limits can be moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from planearly.files import atomic_write, check_place, write_json
from planearly.plan import recipes, show, whatif
from planearly.plan.recommend import Plan
from planearly.report import chart, form
from planearly.report.table import Axis, Column, Figure, Table

_POINTS = 61
"""Numbers of domains at which a cost curve is drawn."""


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
    """Write the folder; arguments as :func:`content`.

    Raises:
        UserError: a page or a recipe there is someone else's.
    """
    check_page(out / "plan.html")
    recipes.write(plan, out, generic, domains)
    write_json(out / "plan.json", content(plan, generic, domains))
    write_page(out / "plan.html", plan)


def check_page(place: Path) -> None:
    """Refuse to write a page over what is none.

    Raises:
        UserError: as :func:`planearly.files.check_place`.
    """
    check_place(place, "a page of planearly", _is_page)


def _is_page(path: Path) -> bool:
    with open(path, "rb") as handle:
        return b'name="generator" content="planearly"' in handle.read(1000)


def write_page(place: Path, plan: Plan, limits: bool = False) -> None:
    """Write the plan as a page; with sliders over its ``limits``, if they are wanted."""
    plans = whatif.packed(whatif.table(plan.given)) if limits else None
    with atomic_write(place, "w") as handle:
        handle.write(form.render(Path(__file__).parent / "plan_page.html.j2", title="Plan",
                                 section=section(plan), plans=plans))


def section(plan: Plan) -> Markup:
    """The plan as a section of a page: recommendation, cost curves over N, table, notes."""
    against = [f"{row.method} is not feasible: {row.why}" for row in plan.rows
               if not row.feasible]
    notes = [*against, *(f"inference: {line}" for line in show.deployed(plan)),
             *show.crossings(plan), *plan.notes]
    return Markup(form.render(
        Path(__file__).parent / "section.html.j2", plan=plan, columns=show.COLUMNS, notes=notes,
        rows=[(row.why, show.cells(plan, row)) for row in plan.rows], figure=curve(plan),
        frontiers=frontiers(plan)))


def frontiers(plan: Plan) -> list[tuple[int, Markup]]:
    """Expected perplexity over the total cost, a figure for each number of domains; none where no
    law speaks."""
    rows = plan.frontier()
    found = []
    for domains in dict.fromkeys(row["domains"] for row in rows):
        drawn = chart.draw(Table(
            f"frontier-{domains}", f"expected perplexity over total cost, {domains} domains", "",
            "", [Column("method", "method", "text"), Column("hours", "device-hours", "hours"),
                 Column("perplexity", "perplexity")],
            [row for row in rows if row["domains"] == domains],
            Figure("curves", Axis("hours", "device-hours for all domains", True),
                   Axis("perplexity", "expected perplexity", True), "method")))
        if drawn:
            found.append((domains, drawn.svg))
    return found


def curve(plan: Plan) -> Markup | None:
    """C(N) of the feasible methods over the number of domains; None where all cost nothing."""
    most = max(100, 2 * plan.given.total_domains)
    rows = [{"method": row.method + (", recommended" if row.method == plan.recommended else ""),
             "domains": n, "hours": row.cost.total(n).device_hours}
            for row in plan.rows if row.feasible
            for n in (most ** (i / (_POINTS - 1)) for i in range(_POINTS))]
    drawn = chart.draw(Table(
        "plan", "device-hours over the number of domains", "", "",
        [Column("method", "method", "text"), Column("domains", "domains"),
         Column("hours", "device-hours", "hours")], rows,
        Figure("curves", Axis("domains", "domains", True), Axis("hours", "device-hours", True),
               "method")))
    return drawn.svg if drawn else None
