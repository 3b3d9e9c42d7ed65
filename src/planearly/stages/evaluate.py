"""From models to what a person holds: evaluation, exported folders, results.json."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from planearly import methods, parallel, tensors
from planearly.cost import ledger
from planearly.data import limit
from planearly.errors import UserError
from planearly.evaluate import perplexity
from planearly.export.folder import export
from planearly.files import read_array, read_json, write_array, write_json
from planearly.model import flops
from planearly.stages import checkpoint, corpus, training
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.stages.noted import RESULTS
from planearly.stages.trained import Trained
from planearly.train import loop


def evaluate(run: Run, stage: str, model_stage: Path, name: str) -> Path:
    """Perplexity of a model on a domain's test split and on held-out generic text.

    ``test-nll.npy`` and ``test-tokens.npy`` hold the sums per document, for paired comparisons.
    """
    inputs = {"model": model_stage, "domain": corpus.domain(run, name)}
    if run.recipe.reads_generic:
        inputs["kept"] = corpus.kept(run)
    settings = {"eval_tokens": run.recipe.data.eval_tokens, "seed": run.recipe.seed}

    def build(folder: Path) -> dict[str, Any]:
        model = training.load_model(model_stage).to(parallel.device())
        forward = perplexity.forward_of(model)
        sets = {"test": corpus.held_out(run, name, "test")}
        if corpus.has_generic_test(run):
            sets["generic"] = corpus.generic_test(run)
        found = {}
        for label, (dataset, windows) in sets.items():
            nll, tokens = perplexity.document_nll(
                forward, dataset, windows, f"evaluating on {name if label == 'test' else label}"
            )
            write_array(folder / f"{label}-nll.npy", nll)
            write_array(folder / f"{label}-tokens.npy", tokens)
            found[label] = perplexity.summary(nll, tokens, limit.text_bytes(dataset, windows))
        return found

    return run.stage(f"evaluate/{stage}", settings, inputs, build)


def units(stage: Path, label: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Summed nll and tokens per document of an evaluation."""
    return read_array(stage / f"{label}-nll.npy"), read_array(stage / f"{label}-tokens.npy")


def evaluations(run: Run, trained: Trained) -> tuple[Path | None, Path]:
    """Evaluations before and after fine-tuning."""
    before = None
    if trained.base is not None:
        stage = f"{trained.before}.{trained.domain}.before"
        before = evaluate(run, stage, trained.base, trained.domain)
    return before, evaluate(run, trained.name, trained.tuned, trained.domain)


def total_cost(stages: list[Path]) -> dict[str, Any]:
    """Ledger entries of stages added up, as results.json has them."""
    found = ledger.counted_once([{"manifest": facts(path), "entry": facts(path)["cost"],
                                  "folder": str(path)} for path in stages])
    return {"tokens": found["tokens"], "flops": found["flops"],
            "device_hours": found["device_hours"], "saving_hours": found["saving_hours"],
            "device": ", ".join(found["devices"]) or "none", "money": found.get("money")}


def pretrain_tokens(trained: Trained) -> int:
    """Tokens of pretraining that this run spent on a model."""
    stages = map(facts, [*trained.generic, *trained.own])
    return sum(each["cost"]["tokens"] for each in stages if each["stage"].startswith("pretrain/"))


def row(run: Run, trained: Trained, model: Path | None = None) -> dict[str, Any]:
    """One row of results.json; with the place of the exported ``model``, if it is."""
    before, after = evaluations(run, trained)
    tuned, made = facts(after), facts(trained.tuned)
    shape = training.shape_made(trained.tuned)
    value = facts(before) if before else None
    whole = trained.routed()
    generic = (facts(whole) if whole else value or {}).get("generic", {})
    return {
        "method": trained.method, "domain": trained.domain, "seed": run.recipe.seed,
        "spec_tokens": made.get("spec_tokens"),
        "pretrain_tokens": pretrain_tokens(trained),
        "params": trained.params or flops.parameters(shape),
        "inference_params": flops.parameters(shape),
        "non_embedding_params": flops.non_embedding(shape),
        "inference_flops_per_token": flops.forward(shape),
        "generic_ppl": generic.get("perplexity"),
        "generic_ppl_ci": generic.get("ci95"),
        "generic_ppl_routed": whole is not None,
        "generic_ppl_after": tuned["generic"]["perplexity"] if "generic" in tuned else None,
        "ppl_before": value["test"]["perplexity"] if value else None,
        "ppl_before_ci": value["test"]["ci95"] if value else None,
        "ppl_after": tuned["test"]["perplexity"],
        "ppl_after_ci": tuned["test"]["ci95"],
        "bpb_after": tuned["test"]["bits_per_byte"],
        "test_tokens": tuned["test"]["tokens"],
        "best_step": training.outcome_of(trained.tuned)["best_step"],
        "cost": total_cost([*trained.generic, *trained.own]),
        "generic_cost": total_cost(trained.generic),
        "specialization_cost": total_cost(trained.own),
        **({"model": os.path.relpath(model / "export", run.out)} if model else {}),
        **trained.notes,
    }


def exported(run: Run, trained: Trained) -> Path:
    """The specialized model as a Hugging Face folder, under ``export/`` of the stage."""
    before, after = evaluations(run, trained)
    tokens = corpus.tokenizer_folder(run)
    method = methods.of(run.recipe, trained.method)
    companions = checkpoint.companions(run, method.large)
    begun = getattr(run.recipe, method.start) if trained.base else None
    front = checkpoint.card_front(run.recipe, begun)

    def build(folder: Path) -> None:
        made = facts(trained.tuned)
        state, _ = tensors.load_tensors(trained.tuned / loop.FINAL)
        card = {
            "method": trained.method, "draws": method.adapts, "domain": trained.domain,
            "start": begun, "bundle": bool(run.recipe.bundle),
            "teacher": run.recipe.distill.teacher if method.taught else None,
            "best_step": training.outcome_of(trained.tuned)["best_step"],
            "data": {"generic": run.recipe.generic, "spec_tokens": made.get("spec_tokens"),
                     "pretrain_tokens": None if run.recipe.bundle else trained.notes.get(
                         "pretrain_tokens", pretrain_tokens(trained))},
            "front": front,
            "before": facts(before)["test"] if before else None,
            "after": facts(after)["test"],
            "cost": total_cost([*trained.generic, *trained.own]),
            "recipe": run.recipe.name, "seed": run.recipe.seed,
        }
        export(state, training.shape_made(trained.tuned), tokens, folder / "export", card,
               companions=companions / "files" if companions else None)

    inputs = {"model": trained.tuned, "after": after, "tokenizer": tokens,
              **({"companions": companions} if companions else {})}
    return run.stage(f"model/{trained.name}", {"card": front} if front else {}, inputs, build,
                     version=3 if companions else 2)


def comparisons(run: Run, all_trained: list[Trained]) -> list[dict[str, Any]]:
    """Every pair of methods on every domain: difference of nats per token on the same documents."""
    found = []
    for i, one in enumerate(all_trained):
        for other in all_trained[i + 1:]:
            if one.domain == other.domain:
                a, tokens = units(evaluations(run, one)[1])
                b, _ = units(evaluations(run, other)[1])
                found.append({"domain": one.domain, "a": other.method, "b": one.method,
                              **perplexity.paired(b, a, tokens)})
    return found


def macro(run: Run, all_trained: list[Trained]) -> list[dict[str, Any]]:
    """Macro-averaged perplexity (paper, section 4) of each method that has every domain."""
    domains = {t.domain for t in all_trained}
    found = []
    for method in dict.fromkeys(t.method for t in all_trained):
        mine = [t for t in all_trained if t.method == method]
        if {t.domain for t in mine} != domains:
            continue
        pairs = [evaluations(run, t) for t in mine]
        entry: dict[str, Any] = {
            "method": method, "domains": len(mine),
            "after": perplexity.macro([units(after) for _, after in pairs]),
        }
        if all(before for before, _ in pairs):
            entry["before"] = perplexity.macro([units(b) for b, _ in pairs if b])
        found.append(entry)
    return found


def _of_recipe(path: Path, recipe: object) -> bool:
    """Whether a ``results.json`` is of these settings; one that cannot be read is not."""
    try:
        old = read_json(path)
    except UserError:
        return False
    return isinstance(old, dict) and old.get("recipe") == recipe


def results_of(run: Run, all_trained: list[Trained]) -> dict[str, Any]:
    """What ``results.json`` holds."""
    return {
        "recipe": run.recipe.to_dict(),
        "rows": [row(run, trained, exported(run, trained)) for trained in all_trained],
        "macro": macro(run, all_trained),
        "comparisons": comparisons(run, all_trained),
    }


def write_results(run: Run, all_trained: list[Trained]) -> dict[str, Any]:
    """``results.json``; an older one of other settings is kept under ``earlier/``."""
    results = results_of(run, all_trained)
    path = run.out / RESULTS
    if parallel.rank() == 0:
        if path.exists() and not _of_recipe(path, results["recipe"]):
            earlier = run.out / "earlier"
            earlier.mkdir(exist_ok=True)
            number = len(list(earlier.glob("results-*.json")))
            shutil.copyfile(path, earlier / f"results-{number:03d}.json")
        write_json(path, results)
    return results
