"""Models from outside as stages: the checkpoints that ``start`` and ``large_start`` name.

Their files' digests are in the fingerprints of all that is made from them. In a run a checkpoint is
a finished pretraining that cost nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from planearly import tensors
from planearly.cost import ledger
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.keys import Recipe
from planearly.model import hf, starts
from planearly.stages.folder import Run, once
from planearly.train import loop


def check_vocabulary(recipe: Recipe, tokens: Path) -> None:
    """The same for what is known only with the run's tokenizer.

    Args:
        tokens: folder of the tokenizer.

    Raises:
        UserError: it has other entries than a checkpoint was trained with.
    """
    ours = tokenizer.load(tokens)
    for place, model in starts.folders(recipe):
        if differs := starts.other_vocabulary(ours, model):
            raise UserError(
                f"recipe key '{place}': the checkpoint in {model} has another vocabulary "
                f"({differs}): leave 'tokenizer.path' out, and do not mix checkpoints of two "
                "vocabularies")
        entries = hf.read_shape(model).vocab_size
        if tokenizer.vocab_size(ours) > entries:
            raise UserError(f"recipe key '{place}': the tokenizer in {model} has more entries than "
                            f"its model, {entries}: they do not belong together")


@once
def checkpoint(run: Run, large: bool = False) -> Path | None:
    """The recipe's checkpoint as a finished pretraining, under our names and in float32."""
    source = starts.folder(run.recipe, large)
    if source is None:
        return None
    files = [source / "config.json", *sorted(source.glob("*.safetensors*"))]
    place = "large-start" if large else "start"
    settings = {"files": run.file_digests(files), "context": run.recipe.context}

    def build(out: Path) -> dict[str, Any]:
        found, state = hf.from_hf(source)
        tensors.save_tensors(out / loop.FINAL, state, {})
        shape = replace(found, context=run.recipe.context)
        return {"method": place, "domain": None, "shape": shape.to_dict(),
                "cost": ledger.book(place, 0, 0, 0)}

    return run.stage(f"pretrain/{place}", settings, {}, build)
