"""Models from outside as stages: the checkpoints that ``start`` and ``large_start`` name.

Their files' digests are in the fingerprints of all that is made from them. In a run a checkpoint is
a finished pretraining that cost nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from planearly import tensors
from planearly.cost import ledger
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.export.folder import COMPANIONS
from planearly.keys import Recipe
from planearly.model import outside, starts
from planearly.stages.folder import Run, once
from planearly.train import loop


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
        found, state = outside.weights_in(source, run.recipe.context)
        tensors.save_tensors(out / loop.FINAL, state, {})
        return {"method": place, "domain": None, "shape": found.to_dict(),
                "cost": ledger.book(place, 0, 0, 0)}

    return run.stage(f"pretrain/{place}", settings, {}, build)


@once
def companions(run: Run, large: bool = False) -> Path | None:
    """What lies beside the checkpoint's weights and goes on to what is made of it: the files of its
    tokenizer, chat template and generation settings, in ``files/``."""
    source = starts.folder(run.recipe, large)
    if source is None:
        return None
    found = [source / name for name in COMPANIONS if (source / name).is_file()]

    def build(out: Path) -> None:
        (out / "files").mkdir()
        for path in found:
            shutil.copyfile(path, out / "files" / path.name)

    settings = {"names": [path.name for path in found], "files": run.file_digests(found)}
    return run.stage("large-start-files" if large else "start-files", settings, {}, build)
