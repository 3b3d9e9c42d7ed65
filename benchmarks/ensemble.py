"""An ensemble of specialized models, distilled into one of them: is there something to gain?

    python benchmarks/ensemble.py RECIPE --out FOLDER --method METHOD --domains NAME,... --json \
        --member KEY=VALUE,... --member KEY=VALUE,...

The first member is the recipe as it is. Each further one has other values of keys, which its
pretraining or its fine-tuning depends on, and all have the recipe's seed, so that they have the
same text and test documents. Members that the folder has are taken from it. The student begins as
the first member's pretraining and is fine-tuned as the recipe says, half on the data and half on
the mean of the members' distributions (``distill.data_weight``, ``distill.teacher_weight``).

The last line is one JSON object: for every domain nats per token, on validation and on test
documents, of each member, of their ensemble (the mean of their distributions) and of the student.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from planearly import config, keys
from planearly.errors import UserError
from planearly.evaluate import perplexity
from planearly.model import flops
from planearly.plan import predict, sizes
from planearly.stages import corpus, finetune, trained, training
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train.distill import Distillation, Live


def mean_of(models: Sequence[Any]) -> Any:
    """Token ids -> logarithms of the mean of the models' distributions."""
    def logits(inputs: Tensor) -> Tensor:
        each = torch.stack([F.log_softmax(model(inputs).float(), -1) for model in models])
        return each.logsumexp(0) - np.log(len(models))

    return logits


def nats(run: Run, domain: str, forward: Any) -> dict[str, float]:
    """Mean over documents' tokens of a domain's validation and test text."""
    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(forward(inputs).transpose(1, 2).float(), targets, reduction="none")

    found = {}
    for split in ("valid", "test"):
        nll, tokens = perplexity.document_nll(losses, *corpus.held_out(run, domain, split))
        found[split] = float(nll.sum() / tokens.sum())
    return found


def tried(recipe: keys.Recipe, members: Sequence[dict[str, Any]], out: Path, method: str,
          domain: str) -> dict[str, Any]:
    """All of it for one domain."""
    models, stages, base = [], [], None
    for changes in ({}, *members):
        run = Run(out, sizes.settled(config.variant(recipe, changes)))
        with run.opened():
            one = trained.specialize(run, method, domain)
            stages.append(one.tuned)
            models.append(training.load_model(one.tuned).eval())
            base = base or one.base
    run = Run(out, sizes.settled(recipe))
    with run.opened():
        entries = facts(corpus.tokenizer_folder(run))["vocab_size"]
        forward = mean_of(models)
        live = Live(forward, entries, 1.0,
                    sum(flops.forward(training.shape_made(stage)) for stage in stages))
        student = finetune.specialize(
            run, "ensemble", domain, base,
            objective=lambda folder, own: Distillation(live, recipe.distill, entries),
            inputs={f"member-{n}": stage for n, stage in enumerate(stages)},
            settings={"data_weight": recipe.distill.data_weight,
                      "teacher_weight": recipe.distill.teacher_weight})
        with torch.no_grad():
            found = {"members": [nats(run, domain, model) for model in models],
                     "ensemble": nats(run, domain, forward),
                     "student": nats(run, domain, training.load_model(student).eval())}
    return {"domain": domain, **found, "seconds": facts(student)["cost"]["device_hours"] * 3600}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="slm-is")
    parser.add_argument("--domains", required=True)
    parser.add_argument("--member", action="append", default=[], help="KEY=VALUE,...")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base = config.load(args.recipe)
    members = []
    for each in args.member:
        changed = config.override(base.to_dict(), each.split(","))
        members.append({key.partition("=")[0]: config.value_of(changed, key.partition("=")[0])
                        for key in each.split(",")})
    rows = []
    names = args.domains.split(",")
    if unknown := set(names) - set(predict.domain_names(base)):
        parser.error(f"--domains names {', '.join(sorted(unknown))}, which the recipe has not")
    for domain in names:
        rows.append(tried(base, members, args.out, args.method, domain))
        row = rows[-1]
        print(f"{domain}: members "
              + ", ".join(f"{one['test']:.4f}" for one in row["members"])
              + f"; ensemble {row['ensemble']['test']:.4f}, student {row['student']['test']:.4f} "
              "nats per token", flush=True)
    if args.json:
        print(json.dumps({"recipe": base.name, "members": [{}, *members], "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"ensemble.py: {error}") from None
