"""What a study's page and its README show: one view of it, written twice.

A study that is not finished yet gives a shorter view. The page is one self-contained HTML file,
with its figures also as files beside it; text is escaped, nothing is fetched from anywhere.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from planearly import methods
from planearly.config import look_up
from planearly.files import atomic_write, write_json
from planearly.report import chart, form, sentences, table
from planearly.report.form import number, si
from planearly.report.table import Table
from planearly.study.compare import Arm, Cells, macro
from planearly.study.spec import Suite, devices
from planearly.study.verdict import DEPENDS, RULE, Claim, Verdict, overall

RESULTS, PAGE, README = "study.json", "index.html", "README.md"
MADE = (PAGE, README, "tables", "figures")
"""What a study writes beside :data:`RESULTS`."""
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced", "cannot be judged")


@dataclass(frozen=True)
class View:
    """Everything that a page of a study says.

    Attributes:
        summary: what came out, for somebody who reads nothing else.
        rule: what a verdict needs.
        facts: what was compared, and what it took, as names and values.
        varied: every key of which there is more than the main value: it, and the others.
        methods: those of the rows.
        absent: cells without a row, with their ``changes`` and the ``reason``.
        recipe: as YAML; "" where it is not known.
    """

    title: str
    device: str = ""
    domains: Sequence[str] = ()
    summary: Sequence[str] = ()
    rule: str = RULE
    facts: Sequence[tuple[str, str]] = ()
    varied: Sequence[tuple[str, str, str]] = ()
    methods: Sequence[methods.Method] = ()
    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    absent: Sequence[Mapping[str, Any]] = ()
    recipe: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    """Drawn ones as SVG, by the table's name."""


def view(study: Mapping[str, Any], suite: Suite) -> View:
    """The view of what ``study.json`` holds, with the tables and claims of a suite."""
    tables, claims = suite.of(study)
    return of(study, tables, claims, suite.sentences(tables))


def of(study: Mapping[str, Any], tables: Sequence[Table], claims: Sequence[Claim],
       further: Sequence[str] = ()) -> View:
    """The view of a study with these tables and claims.

    Args:
        further: sentences of its summary.
    """
    recipe, rows = study.get("recipe") or {}, study.get("rows", ())
    absent = [{**cell, "changes": changes(cell.get("settings", {}), recipe),
               "reason": cell.get("reason", "not made yet")}
              for state in ("skipped", "pending") for cell in study.get(state, ())]
    return View(
        study["name"], study.get("device") or "", study.get("domains", ()),
        summary(study, claims, further), RULE, facts(study), _varied(study),
        methods.among(rows), claims, tables, absent,
        yaml.safe_dump(json.loads(json.dumps(recipe, default=str)), sort_keys=False,
                       allow_unicode=True) if recipe else "")


def write(study: Mapping[str, Any], this: View, folder: Path) -> Path:
    """Write ``study.json``, ``tables/``, ``figures/``, ``index.html`` and ``README.md``.

    Returns:
        The page.
    """
    for kind in ("tables", "figures"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, study)
    table.write(this.tables, folder / "tables")
    for one in this.tables:
        drawn = chart.draw(one)
        if drawn is not None:
            drawn.save(folder / "figures" / one.name)
            this.figures[one.name] = drawn.svg
    for template, name in (("study_page.html.j2", PAGE), ("readme.md.j2", README)):
        with atomic_write(folder / name, "w") as handle:
            handle.write(text(this, template))
    return folder / PAGE


def text(this: View, template: str) -> str:
    """The page, or the README, as text."""
    return form.render(Path(__file__).parent / template, sortable=True, plain=_plain,
                       **{name: getattr(this, name) for name in View.__dataclass_fields__})


def summary(study: Mapping[str, Any], claims: Sequence[Claim], further: Sequence[str],
            ) -> list[str]:
    """What came out, in sentences for somebody who reads nothing else: what to train first."""
    rows, pending = study.get("rows", ()), len(study.get("pending", ()))
    said = [*further]
    cells = Cells(study)
    arms = {name: cells.rows(Arm(name)) for name in cells.methods}
    most = {row["domain"] for row in rows}
    averages = {name: value["perplexity"] for name, found in arms.items()
                if set(found) == most and (value := macro(list(found.values())))}
    if len(averages) > 1 and len(most) > 1:
        said.append(
            f"Perplexity after fine-tuning, macro-averaged over {len(most)} domains, at the "
            f"study's main settings (lower is better): {sentences.ranked(averages)}."
            + " What differs by more than chance is in the claims below." * bool(claims))
    if papers := [claim for claim in claims if not claim.ours]:
        said.append(_counted(papers, "the paper's {} claims"))
    if own := [claim for claim in claims if claim.ours]:
        said.append(_counted(own, "{} claims of our own"))
    if pending:
        said.append(
            f"The study is not finished: {pending} of its "
            f"{len(rows) + len(study.get('skipped', ())) + pending} cells are not made yet.")
    return said


def _counted(claims: Sequence[Claim], of: str) -> str:
    """What came out of claims, each counted once whatever it was judged at."""
    verdicts = Counter(claim.verdict for claim in claims)
    by_statement: dict[str, list[Claim]] = {}
    for claim in claims:
        by_statement.setdefault(claim.statement, []).append(claim)
    outcomes = Counter(map(overall, by_statement.values()))
    open_ones = [claim for claim in claims if claim.verdict == VERDICTS[2]]
    why = [f"{many} {words}" for many, words in (
        (sum(claim.missing for claim in open_ones), "for want of cells"),
        (sum(claim.one_seed for claim in open_ones), "of one seed")) if many]
    several = "" if len(by_statement) == len(claims) else (
        f" Each budget and number of clusters counted, these are {len(claims)} verdicts: "
        f"{verdicts[VERDICTS[0]]}, {verdicts[VERDICTS[1]]} and {verdicts[VERDICTS[2]]}.")
    depends = (f"{outcomes[DEPENDS]} did at some budgets or numbers of clusters and not at others, "
               if outcomes[DEPENDS] else "")
    return (f"Of {of.format(len(by_statement))}, {outcomes[VERDICTS[0]]} came out as they say, "
            f"{outcomes[VERDICTS[1]]} did not, {depends}and {outcomes[VERDICTS[2]]} cannot be "
            f"judged.{several}"
            + (f" Of those that cannot be judged, {' and '.join(why)}." if why else ""))


def _plain(value: Any) -> str:
    """Text that is neither a Markdown table's border nor HTML."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def facts(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compared, and what it took, as names and values."""
    rows = study.get("rows", ())
    if not rows:
        return []
    in_all, recipe = cost(study), study.get("recipe") or {}
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
        ("Device", devices(Cells(study))),
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
