"""The study's ``README.md``: what came out, for a reader of the repository that keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planearly.files import atomic_write
from planearly.study.page import changes, facts, summary
from planearly.study.table import Table
from planearly.study.verdict import VERDICT, Claim


def write(study: Mapping[str, Any], tables: Sequence[Table], claims: Sequence[Claim],
          folder: Path) -> Path:
    """Write ``README.md`` in ``folder``, beside the page, the tables and the figures."""
    lines = [f"# {_plain(study['name'])}", "",
             *(f"{_plain(sentence)}\n" for sentence in summary(study, tables, claims)),
             "[The page](index.html) has all figures and tables, sortable; it is one file. "
             "`study.json` has every cell, with the likelihood of every test document.", "",
             "| | |", "|---|---|",
             *(f"| {_plain(name)} | {_plain(value)} |" for name, value in facts(study)), "",
             "Made by `planearly study RECIPE`, with the recipe in `study.json`.", "",
             "## The claims", "",
             f"{VERDICT} Differences are in nats per token, paired by document; below 0 the first "
             "is better.", "",
             "| claim | verdict | numbers |", "|---|---|---|",
             *(f"| {_plain(c.text)}{' (ours)' if c.ours else ''} | **{c.verdict}** "
               f"| {_plain(c.evidence)} |" for c in claims),
             "", "## Figures and tables", ""]
    for table in tables:
        source = f" ({table.paper} of the paper)" if table.paper else ""
        lines += [f"### {_plain(table.title)}{source}", "", _plain(table.note), "",
                  f"Data: [tables/{table.name}.csv](tables/{table.name}.csv)", ""]
        if (folder / "figures" / f"{table.name}.svg").exists():
            lines += [f"![{_plain(table.title)}](figures/{table.name}.svg)", ""]
    absent = [(cell, state) for state in ("skipped", "pending") for cell in study[state]]
    if absent:
        lines += ["## Cells that are not in it", "", "| method | domain | settings | why |",
                  "|---|---|---|---|"]
        for cell, state in absent:
            settings = changes(cell["settings"], study["recipe"]) or "main"
            why = cell.get("reason", "not made yet") if state == "skipped" else "not made yet"
            lines.append(f"| {cell['method']} | {_plain(cell['domain'])} | {_plain(settings)} "
                         f"| {_plain(why)} |")
        lines.append("")
    out = folder / "README.md"
    with atomic_write(out, "w") as handle:
        handle.write("\n".join(lines))
    return out


def _plain(text: Any) -> str:
    """Text that is neither a table's border nor HTML."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
