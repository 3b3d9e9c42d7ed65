"""Models from outside as stages: the checkpoints that ``start`` and ``large_start`` name, and the
model of a bundle.

Their files' digests are in the fingerprints of all that is made from them. In a run each is a
finished pretraining that cost nothing.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from planearly import methods, parallel, tensors
from planearly.cost import ledger
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.evaluate.perplexity import mean_nll
from planearly.export import bundle as bundles
from planearly.export.folder import COMPANIONS
from planearly.keys import Recipe
from planearly.model import outside, starts
from planearly.progress import say
from planearly.stages import corpus, training
from planearly.stages.folder import Run, once
from planearly.stages.manifest import facts
from planearly.train import loop, state

_SAMPLE = 8_192
"""Tokens that a checkpoint is tried on before it is trained."""
_NO_BETTER = 0.98
"""Of the loss of chance: above, a model knows nothing of a text."""


def card_front(recipe: Recipe, begun: str | None) -> dict[str, Any]:
    """Front matter of a model's card: what the recipe says, and the hub's name of the checkpoint
    that it began as, if it did."""
    front = {key: value for key, value in asdict(recipe.card).items() if value}
    if begun and (name := starts.hub_name(begun)):
        front.setdefault("base_model", name.partition("@")[0])
    return front


def check_vocabulary(recipe: Recipe, tokens: tokenizer.Opened) -> None:
    """Refuse a tokenizer that a checkpoint was not trained with.

    Args:
        tokens: the run's.

    Raises:
        UserError: it has other entries than a checkpoint was trained with.
    """
    for place, model in starts.folders(recipe):
        if differs := tokenizer.other_vocabulary(tokens.tokenizer, model):
            raise UserError(
                f"recipe key '{place}': the checkpoint in {model} has another vocabulary "
                f"({differs}): leave 'tokenizer.path' out, and do not mix checkpoints of two "
                "vocabularies")
        entries = outside.shape_in(model, recipe.context).vocab_size
        if tokens.vocab_size > entries:
            raise UserError(f"recipe key '{place}': the tokenizer in {model} has more entries than "
                            f"its model, {entries}: copy the model's folder again, whole, or set "
                            "'tokenizer.path'")


@once
def checkpoint(run: Run, large: bool = False) -> Path | None:
    """The recipe's checkpoint as a finished pretraining, in float32."""
    source = starts.folder(run.recipe, large)
    if source is None:
        return None
    files = [source / "config.json", *sorted(source.glob("*.safetensors*"))]
    place = "large-start" if large else "start"
    settings = {"files": run.file_digests(files), "context": run.recipe.context}

    def build(out: Path) -> dict[str, Any]:
        found, weights = outside.weights_in(source, run.recipe.context)
        tensors.save_tensors(out / loop.FINAL, weights, {})
        return {"method": place, "domain": None, "shape": found.to_dict(),
                "cost": ledger.book(place, 0, 0, 0)}

    return run.stage(f"pretrain/{place}", settings, {}, build)


@once
def bundled(run: Run) -> Path:
    """The model of the recipe's bundle as if it had been pretrained in this run: experts, or the
    first part of a method that adapts with its whole state."""
    source = corpus.bundle(run)
    info = facts(source)
    row, brought = methods.find(info["kind"]), source / "bundle"

    def build(folder: Path) -> dict[str, Any]:
        if row.adapts:
            whole = loop.branch_file(folder, info["step"])
            shutil.copyfile(brought / bundles.STATE, whole)
            shutil.copyfile(brought / bundles.METRICS, folder / bundles.METRICS)
            tensors.save_tensors(folder / loop.FINAL,
                                 state.weights_of(tensors.load_tensors(whole)[0]), {})
        else:
            shutil.copyfile(brought / bundles.WEIGHTS, folder / loop.FINAL)
        return {"method": row.plateau if row.adapts else row.name, "domain": None,
                "shape": info["shape"], "cost": ledger.book("bundle", 0, 0, 0)}

    return run.stage(f"pretrain/{row.plateau if row.adapts else row.name}", {}, {"bundle": source},
                     build)


@once
def companions(run: Run, large: bool = False) -> Path | None:
    """What lies beside the checkpoint's weights and goes on to what is made of it: the files of its
    tokenizer, chat template and generation settings, in ``files/``."""
    source = starts.folder(run.recipe, large)
    if source is None:
        return None
    found = [source / name for name in COMPANIONS if (source / name).is_file()]

    def build(out: Path) -> None:
        (out / "files").mkdir(parents=True, exist_ok=True)
        for path in found:
            shutil.copyfile(path, out / "files" / path.name)

    settings = {"names": [path.name for path in found], "files": run.file_digests(found)}
    return run.stage("large-start-files" if large else "start-files", settings, {}, build)


def tell_beginning(run: Run, name: str) -> None:
    """Say what the recipe's checkpoints make of held-out text before anything is trained.

    Args:
        name: a domain; empty: of the generic corpus.
    """
    if not name and not corpus.has_generic_test(run):
        return
    for large in (False, True):
        if (origin := checkpoint(run, large)) is None:
            continue
        found = facts(_beginning(run, origin, name))
        loss, chance = found["nll_per_token"], found["chance"]
        where = f"the checkpoint of '{'large_start' if large else 'start'}'"
        say(f"{where} begins at {loss:.3f} nats per token of "
            f"{name or 'the generic corpus'} (chance: {chance:.3f})")
        if loss > _NO_BETTER * chance:
            say(f"  {where} knows no more of this text than chance: either it is of another "
                "language, or its weights or its tokenizer are not those that it was trained with")


def _beginning(run: Run, origin: Path, name: str) -> Path:
    def build(folder: Path) -> dict[str, Any]:
        dataset, windows = (corpus.held_out(run, name, "valid") if name
                            else corpus.generic_test(run))
        ends = np.cumsum(dataset.windows["length"][windows].astype(np.int64))
        some = windows[:int(np.searchsorted(ends, _SAMPLE)) + 1]
        model = training.load_model(origin).to(parallel.device())
        return {"nll_per_token": mean_nll(model, dataset, some),
                "chance": math.log(model.shape.vocab_size)}

    inputs = {"model": origin, **({"domain": corpus.domain(run, name)} if name
                                  else {"kept": corpus.kept(run)})}
    settings = {"seed": run.recipe.seed, "valid_tokens": run.recipe.data.valid_tokens}
    return run.stage(f"evaluate/{origin.name.rpartition('-')[0]}.{name or 'generic'}", settings,
                     inputs, build)
