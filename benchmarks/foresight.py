"""What sequences of one, two and three tokens foresee of drawing the corpus for a domain.

    python benchmarks/foresight.py RECIPE --out runs/mine [--json FILE] [key=value ...]

For every domain and every method of the recipe that draws the corpus for it (without training a
model first), the nats per token by which models of what is drawn foretell the domain's validation
text better than models of the corpus as it is; and, of importance sampling, the leave-one-out gain
of the domain's histogram in nats per window. A line each, and a list of them in FILE, to which what
is there already is kept. ``planearly weigh`` tells the trigrams alone. docs/experiments.md holds
what came of it beside what trainings gained (docs/results/foresight.json).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planearly import config, methods
from planearly.errors import UserError
from planearly.evaluate import perplexity
from planearly.files import read_json, write_json
from planearly.stages import corpus, foresight, trained
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train.steps import generic_rows

ORDERS = {"unigrams": 1, "bigrams": 2, "trigrams": 3}


def foreseen(run: Run, study: str) -> Iterator[dict[str, Any]]:
    """One row for each domain and method."""
    rows = [methods.of(run.recipe, name) for name in run.recipe.methods]
    for row in rows:
        if row.draws in (None, methods.GENERIC) or row.scored:
            continue
        for domain in corpus.texts(run):
            drawn = trained.DRAWS[str(row.draws)](run, domain)
            own, whole, tokens = foresight.models(
                run, drawn.rows, drawn.weights, generic_rows(run.recipe))
            text = corpus.held_out(run, domain, "valid")
            found: dict[str, Any] = {"study": study, "method": row.name, "domain": domain,
                                     "seed": run.recipe.seed, **drawn.notes, "tokens": tokens}
            for name, order in ORDERS.items():
                (ours, sizes), (theirs, _) = (
                    model.score(*text, order).units() for model in (own, whole))
                pair = perplexity.paired(theirs, ours, sizes)
                found[name] = {"gain": pair["difference"], "ci95": pair["ci95"]}
            if "weights" in drawn.inputs:
                made = facts(drawn.inputs["weights"])
                found["histogram"] = made["gain"][str(made["k"])]
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="key=value")
    asked = parser.parse_intermixed_args()
    try:
        recipe = config.load(asked.recipe, asked.settings)
        trained.check(recipe)
        kept = read_json(asked.json) if asked.json and asked.json.exists() else []
        if not isinstance(kept, list):
            raise UserError(f"{asked.json} holds no list of rows: name another file")
        with Run(asked.out, recipe).opened() as run:
            for row in foreseen(run, recipe.name):
                print(json.dumps(row))
                kept.append(row)
    except UserError as error:
        parser.error(str(error))
    if asked.json:
        write_json(asked.json, kept)


if __name__ == "__main__":
    main()
