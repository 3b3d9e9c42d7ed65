"""Distillation: who teaches, whether it can, and the distilled student (paper, section 3)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from planearly import parallel, storage
from planearly.data import tokenizer
from planearly.data.streams import RowStream
from planearly.errors import UserError
from planearly.files import expanded
from planearly.keys import Recipe
from planearly.model import flops, hf, outside, starts
from planearly.stages import corpus, finetune, training
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train import arithmetic
from planearly.train.distill import Distillation, Live, Stored, store
from planearly.train.steps import taught_share


def check(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        UserError: stored answers to rows without end, a teacher that is there already and is to be
            pretrained, or no model folder where it should be.
    """
    settings = recipe.distill
    if settings.top_k is not None and (
            settings.on == "importance" or recipe.finetune.replay_share):
        raise UserError("recipe key 'distill.top_k' stores answers to the specialization set only: "
                        "set it to null to distil on generic text too")
    if settings.teacher:
        if settings.teacher_tokens is not None:
            raise UserError("recipe key 'distill.teacher_tokens' is for a teacher that the run "
                            "pretrains, and 'distill.teacher' names one: leave one of them out")
        folder = starts.located(str(settings.teacher))
        starts.check_folder("distill.teacher", folder, recipe.context)
        path = recipe.tokenizer.path
        if path and (storage.is_url(path) or expanded(path).exists()):
            same_vocabulary(tokenizer.take(path)[0], folder)


def check_vocabulary(run: Run) -> None:
    """As :func:`check`, for what is known only with the run's tokenizer.

    Raises:
        UserError: the teacher has other tokens than the student.
    """
    if run.recipe.distill.teacher:
        folder = starts.located(str(run.recipe.distill.teacher))
        same_vocabulary(corpus.tokenizer_of(run).tokenizer, folder)


def same_vocabulary(ours: Any, folder: Path) -> None:
    """Compare the ids of all tokens.

    Args:
        ours: the student's tokenizer.
        folder: the teacher's model folder.
    """
    if differs := tokenizer.other_vocabulary(ours, folder):
        raise UserError(
            f"the teacher in {folder} has another vocabulary ({differs}): set "
            f"'tokenizer.path={folder}', or choose a teacher with the run's tokenizer"
        )


def live_teacher(run: Run, stage: Path | None) -> Live:
    """The model of a finished training stage, or the Hugging Face folder of the recipe."""
    temperature = run.recipe.distill.temperature
    entries = facts(corpus.tokenizer_folder(run))["vocab_size"]
    if stage:
        ours = training.load_model(stage).to(parallel.device()).requires_grad_(False)
        return Live(ours, entries, temperature, flops.forward(ours.shape), ours.shape)
    folder = starts.located(str(run.recipe.distill.teacher))
    theirs, _ = hf.load(folder)
    theirs.to(parallel.device()).requires_grad_(False)
    shape = outside.shape_in(folder, run.recipe.context)
    return Live(lambda inputs: theirs(input_ids=inputs).logits, entries, temperature,
                flops.forward(shape), shape)


def specialize(run: Run, method: str, name: str, base: Path, teacher: Path | None) -> Path:
    """Fine-tune the student ``base`` on a domain, taught by ``teacher`` (None: the recipe's).

    Early stopping is on the loss on data. With ``distill.on=importance`` a part of each step's rows
    (``finetune.replay_share``, or half) comes from the generic corpus, drawn by the domain's
    cluster weights.
    """
    settings = run.recipe.distill
    values: dict[str, Any] = {"distill": {  # the teacher is an input
        **{key: value for key, value in asdict(settings).items() if key != "teacher_tokens"},
        "teacher": None}}
    inputs: dict[str, Path] = {}
    if teacher:
        inputs["teacher"] = teacher
    else:
        folder = starts.located(str(settings.teacher))
        parts = sorted([folder / "config.json", *folder.glob("*.safetensors")])
        values["teacher"] = run.file_digests(parts)
    replay = None
    if settings.on == "importance":
        replay = finetune.resampled(run, name, taught_share(run.recipe))

    def objective(folder: Path, own: RowStream) -> Distillation:
        entries = facts(corpus.tokenizer_folder(run))["vocab_size"]
        live = live_teacher(run, teacher)
        if settings.top_k is None:
            return Distillation(live, settings, entries)
        device, precision = parallel.device(), run.recipe.finetune.precision
        if parallel.rank() == 0:
            store(live, own, settings.top_k, folder / "teacher",
                  lambda: arithmetic.autocast(precision, device), device)
        parallel.barrier()
        return Distillation(Stored(folder / "teacher"), settings, entries)

    return finetune.specialize(run, method, name, base, objective=objective, replay=replay,
                               inputs=inputs, settings=values)
