"""The study's page: one self-contained HTML file, with its figures also as files beside it.

The page shows what it is given: a study that is not finished yet gives a shorter page. Text is
escaped, figures are inline, nothing is fetched from anywhere.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from planearly.config import look_up
from planearly.files import atomic_write
from planearly.report import form
from planearly.report.form import number, percent, si
from planearly.report.page import METHODS, label, macro
from planearly.study import figures
from planearly.study.compare import BUDGET
from planearly.study.costs import TOTAL_COST
from planearly.study.table import Table
from planearly.study.verdict import VERDICT, Claim, Verdict

VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "cannot be judged")
_TALL = 25
"""Rows from which a table scrolls in its own box."""


def write(study: Mapping[str, Any], tables: Sequence[Table], claims: Sequence[Claim],
          folder: Path) -> Path:
    """Write ``index.html`` in ``folder``, and every figure as ``figures/NAME.png`` and ``.svg``.

    Args:
        study: what ``study.json`` holds.
        tables: of :mod:`planearly.study.tables`.
        claims: the paper's, judged.

    Returns:
        The page.
    """
    drawn = {}
    for table in tables:
        canvas = figures.draw(table)
        if canvas is not None:
            canvas.save(folder / "figures" / table.name)
            drawn[table.name] = canvas.svg
    environment = form.environment(Path(__file__).parent)
    environment.filters["label"] = label
    recipe = study.get("recipe") or {}
    rows = study.get("rows", ())
    page = environment.get_template("page.html.j2").render(
        study=study, claims=claims, names={table.name for table in tables},
        summary=summary(study, tables, claims), facts=facts(study), varied=_varied(study),
        rule=VERDICT,
        methods=[METHODS[m] for m in dict.fromkeys(row["method"] for row in rows)
                 if m in METHODS],
        tables=[{"table": table, "figure": drawn.get(table.name), "tall": len(table.rows) > _TALL,
                 "rows": [cells(table, row) for row in table.rows]} for table in tables],
        absent=[{**cell, "changes": changes(cell.get("settings", {}), recipe), "state": state}
                for state in ("skipped", "pending") for cell in study.get(state, ())],
        recipe=yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)
        if recipe else None,
    )
    out = folder / "index.html"
    with atomic_write(out, "w") as handle:
        handle.write(page)
    return out


def summary(study: Mapping[str, Any], tables: Sequence[Table], claims: Sequence[Claim],
            ) -> list[str]:
    """What came out, in sentences for somebody who reads nothing else."""
    rows, pending = study.get("rows", ()), len(study.get("pending", ()))
    sentences = []
    if claims:
        sentences.append(_counted([claim for claim in claims if not claim.ours],
                                  "the paper's claims, each at every budget that it hangs on"))
    if own := [claim for claim in claims if claim.ours]:
        sentences.append(_counted(own, "claims of our own"))
    averages = macro(_own(rows, study.get("recipe") or {}))
    if len(averages) > 1:
        domains = len({row["domain"] for row in rows})
        sentences.append(
            f"Perplexity after fine-tuning, macro-averaged over {domains} domains, at the study's "
            f"main settings (lower is better): {_ranked(averages)}. What differs by more than "
            "chance is in the claims below.")
    sentences += worth(tables)
    if pending:
        sentences.append(
            f"The study is not finished: {pending} of its "
            f"{len(rows) + len(study.get('skipped', ())) + pending} cells are not made yet.")
    return sentences


def _counted(claims: Sequence[Claim], of: str) -> str:
    counted = Counter(claim.verdict for claim in claims)
    missing = sum(claim.missing for claim in claims if claim.verdict == VERDICTS[2])
    return (f"Of {of} ({len(claims)} verdicts), {counted[VERDICTS[0]]} came out as it says, "
            f"{counted[VERDICTS[1]]} did not, and {counted[VERDICTS[2]]} cannot be judged"
            + (f" ({missing} for want of cells)" if missing else "") + ".").replace(
                "it says", "they say")


def worth(tables: Sequence[Table]) -> list[str]:
    """For each number of domains of Figure 6, the best small models that no cheaper one equals."""
    sentences = []
    for table in tables:
        if not table.name.startswith(TOTAL_COST):
            continue
        best, over = math.inf, ""
        front = []
        rows = [row for row in table.rows if row.get("drawn", True) and row.get("after")
                and not row["method"].startswith("llm")]
        for row in sorted(rows, key=lambda row: (row["total_flops"], row["after"])):
            if row["after"] < best:
                best, over = row["after"], row["over"]
                front.append(f"{label(row['method'])} ({si(row['budget'])}) {number(best)} for "
                             f"{form.flops(row['total_flops'])}")
        if front:
            what = table.title.removeprefix("Total cost for ")
            sentences.append(f"For {what}, the best small models that no cheaper one equals "
                             f"(tokens of pretraining, perplexity over {over}, FLOPs in all): "
                             f"{'; '.join(front[-3:])}.")
    return sentences


def _ranked(averages: Mapping[str, Mapping[str, float]]) -> str:
    """Small models from the best to the worst, then the large ones."""
    order = sorted(averages, key=lambda method: averages[method]["ppl_after"])
    said = [", ".join(f"{label(m)} {number(averages[m]['ppl_after'])}" for m in order
                      if m.startswith("llm") == large) for large in (False, True)]
    return "; of the large model: ".join(part for part in said if part)


def facts(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compared, and what it took, as names and values."""
    rows = study.get("rows", ())
    if not rows:
        return []
    in_all, recipe = cost(study), study.get("recipe") or {}
    devices = {str(row["cost"]["device"]) for row in rows if row["cost"].get("device")}
    found = [
        ("Domains", str(len({row["domain"] for row in rows}))),
        ("Methods", str(len({row["method"] for row in rows}))),
        ("Cells finished", str(len(rows))),
        ("Seeds", _numbered([row["seed"] for row in rows if "seed" in row])),
        ("Generic corpus", ", ".join(map(str, recipe.get("generic") or ())) or "–"),
        ("Specialization tokens", _range(rows, "spec_tokens")),
        ("Pretraining tokens", _range(rows, "pretrain_tokens")),
        ("Parameters deployed", _range(rows, "inference_params")),
        ("Test tokens a domain", _range(rows, "test_tokens")),
        ("Tokens, in all", si(in_all.get("tokens"))),
        ("FLOPs, in all", form.flops(in_all.get("flops"))),
        ("Device time, in all", form.hours(in_all.get("device_hours"))),
        ("Device", ", ".join(sorted(devices))),
    ]
    if in_all.get("money") is not None:
        found.insert(-1, ("Money, in all", number(in_all["money"])))
    return [(name, value) for name, value in found if value != "–"]


def cost(study: Mapping[str, Any]) -> dict[str, float | None]:
    """Tokens, FLOPs, device-hours and money of the whole study.

    Its own ``cost`` if it has one; otherwise the sum over the cells, in which trainings of the
    very same cost are one that the cells share: an upper bound.
    """
    keys = ("tokens", "flops", "device_hours", "money")
    if study.get("cost"):
        return {key: study["cost"].get(key) for key in keys}
    parts = {json.dumps([row["method"], part, row[part]], sort_keys=True): row[part]
             for row in study.get("rows", ())
             for part in ("generic_cost", "specialization_cost") if row.get(part)}
    sums: dict[str, float | None] = {}
    for key in keys:
        known = [part[key] for part in parts.values() if part.get(key) is not None]
        sums[key] = sum(known) if known else None
    return sums


def _numbered(values: Sequence[int]) -> str:
    """How many different ones there are, and which."""
    found = sorted(set(values))
    return f"{len(found)} ({', '.join(map(str, found))})" if found else "–"


def _range(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = sorted({row[key] for row in rows if row.get(key)})
    if not values:
        return "–"
    low, high = si(values[0]), si(values[-1])
    return low if low == high else f"{low} to {high}"


def _varied(study: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Every key of which there is more than the main value: it, and the others."""
    recipe = study.get("recipe") or {}
    seen: dict[str, list[Any]] = {}
    for row in study.get("rows", ()):
        for key, value in row.get("settings", {}).items():
            values = seen.setdefault(key, [])
            if value not in values:
                values.append(value)
    return [(key, _said(main), ", ".join(_said(value) for value in values if value != main))
            for key, values in seen.items() if values != [main := look_up(recipe, key)]]


def _own(rows: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows at the settings of the main comparison."""
    main = look_up(recipe, "study.main") or {}
    return [row for row in rows if row.get("ppl_after") and not changes(
        row.get("settings", {}), {**recipe, BUDGET: main.get(row["method"], recipe.get(BUDGET))})]


def changes(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The settings that are not the recipe's own, in words."""
    return ", ".join(f"{key} = {_said(value)}" for key, value in settings.items()
                     if value != look_up(recipe, key))


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return si(value)
    return str(value)


def _plain(value: Any) -> Any:
    """As JSON would hold it."""
    return json.loads(json.dumps(value, default=str))


def cells(table: Table, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of a row: ``text`` to show, ``sort`` to sort by (None: last), the
    column's ``kind``."""
    found: list[dict[str, Any]] = []
    unit = "number"
    for column in table.columns:
        value = row.get(column.key)
        if column.kind != "interval":
            unit = column.kind
        missing = value is None or (isinstance(value, float) and not math.isfinite(value))
        text, sort = "–", None
        if value is not None and not missing:
            text = label(value) if column.key == "method" else _written(column.kind, unit, value)
            sort = value[0] if column.kind == "interval" else value
        found.append({"text": text, "sort": sort, "kind": column.kind})
    return found


def _written(kind: str, unit: str, value: Any) -> str:
    if kind == "interval":
        return f"[{', '.join('–' if v is None else _written(unit, unit, v) for v in value)}]"
    if kind == "text":
        return str(value)
    if kind == "nats":
        return f"{value:.3f}"
    if kind == "number" and isinstance(value, int):
        return f"{value:,}"
    return {"tokens": si, "flops": form.flops, "hours": form.hours, "percent": percent}.get(
        kind, number)(value)
