"""From a row of the table of methods to a model for a domain.

A method is carried out by the columns of its row (:mod:`planearly.methods`): what it draws of the
generic corpus (:data:`DRAWS`), what it pretrains on that (a dense model, or the experts of
:data:`planearly.stages.experts.BANKS`) and how that is fine-tuned (:data:`TUNES`). What methods
share (a clustering, a pretraining) is a stage of one name, so it is made once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from planearly import methods
from planearly.cost import ledger
from planearly.errors import UserError
from planearly.keys import Recipe
from planearly.methods import Method
from planearly.model import flops, lora, starts
from planearly.model.transformer import Shape
from planearly.stages import (
    adapt,
    bundled,
    checkpoint,
    clusters,
    corpus,
    distill,
    experts,
    finetune,
    foresight,
    selection,
    training,
)
from planearly.stages import pretrain as pretraining
from planearly.stages.folder import Missing, Run, once
from planearly.stages.manifest import facts
from planearly.train import track
from planearly.train.steps import generic_rows


@dataclass
class Trained:
    """One method on one domain: its stages, and which of them are paid per domain.

    Attributes:
        base: the model before fine-tuning; None where there is none (slm-nopt).
        expert: the domain's expert of a bank, as it was chosen.
        tuned: the model after fine-tuning.
        stages: those with a cost that it is made of, its teacher's too.
        before: what the evaluation of ``base`` is called; methods that fine-tune the same
            pretraining share it.
        routed: makes the evaluation of the generic model where it is more than ``base``, on generic
            text or on a domain's test text, or None.
        params: trained parameters of the generic model (a projected network's are more than its
            deployed model's).
        notes: further fields of the row in results.json.
    """

    method: str
    domain: str
    base: Path | None
    tuned: Path
    stages: list[Path]
    before: str
    expert: Path | None = None
    params: int | None = None
    routed: Callable[..., Path | None] = lambda domain="": None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}.{self.domain}"

    @property
    def generic(self) -> list[Path]:
        """Stages that are paid once, before the domain is known."""
        return [stage for stage in self.stages if ledger.paid_once(facts(stage))]

    @property
    def own(self) -> list[Path]:
        """Stages that are paid for this domain alone."""
        return [stage for stage in self.stages if not ledger.paid_once(facts(stage))]


@dataclass(frozen=True)
class Drawn:
    """Generic text for a pretraining: rows in groups, and the groups' weights.

    Attributes:
        rows: stage that packed the rows.
        weights: float64 [groups], not normalised.
        inputs: stages beside ``rows`` that the weights come from.
        paid: stages with a cost that were made to choose.
        notes: for the method's row in results.json.
    """

    rows: Path
    weights: np.ndarray
    inputs: Mapping[str, Path] = field(default_factory=dict)
    paid: Sequence[Path] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


Draw = Callable[..., Drawn]
"""Of (run, domain, rows=None): what a pretraining draws, or the last so many rows of it."""


# What is drawn ----------------------------------------------------------------------------------

def as_it_is(run: Run, domain: str, drawn: int | None = None) -> Drawn:
    """Every row of the generic corpus alike."""
    packed = clusters.rows(run, clusters.finest(run))
    return Drawn(packed, clusters.generic_weights(packed))


def by_importance(run: Run, domain: str, drawn: int | None = None) -> Drawn:
    """The generic corpus resampled to look like the domain, cluster by cluster."""
    weights = clusters.importance_weights(run, domain, drawn=drawn)
    k = facts(weights)["k"]
    return Drawn(clusters.rows(run, k), training.weights_of(weights), {"weights": weights},
                 notes={"k": k})


def by_selector(draws: str) -> Draw:
    """The part of the generic corpus that a selector takes for the domain."""

    def draw(run: Run, domain: str, drawn: int | None = None) -> Drawn:
        made = selection.selection(run, draws, domain, drawn=drawn)
        found = facts(made)
        return Drawn(made, training.weights_of(made), notes={
            key: found[key] for key in ("k", "cluster", "ranks") if key in found})

    return draw


@once
def by_losses(run: Run, domain: str, drawn: int | None = None) -> Drawn:
    """The part of the generic corpus whose loss falls most when the plain small model is fine-tuned
    on the domain."""
    plain = specialize(run, "slm", domain)
    assert plain.base is not None
    made = selection.selection(run, "color", domain, plain.base, plain.tuned, drawn=drawn)
    scored = [selection.losses(run, model) for model in (plain.base, plain.tuned)]
    return Drawn(made, training.weights_of(made), paid=[*plain.stages, *scored])


DRAWS: dict[str, Draw] = {
    methods.GENERIC: as_it_is, "importance": by_importance,
    **{name: by_selector(name) for name in selection.SELECTORS}, "color": by_losses,
}
"""By the table's columns ``draws`` and ``adapts`` and the recipe key ``adapt.draws``: from a run, a
domain and a number of rows (None: all of pretraining's) to what is pretrained on."""


# How it is fine-tuned ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Start:
    """What fine-tuning begins with: the method, the domain, the model and who teaches it.

    ``model`` is a finished training stage, or None for fresh weights. ``teacher`` is the fine-tuned
    teacher where the run trains one.
    """

    row: Method
    domain: str
    model: Path | None
    teacher: Path | None = None


def tune_all(run: Run, start: Start) -> Path:
    """All weights."""
    return finetune.specialize(
        run, start.row.name, start.domain, start.model, large=start.row.large)


def tune_adapters(run: Run, start: Start) -> Path:
    """Low-rank adapters, merged into the weights."""
    return finetune.specialize(run, start.row.name, start.domain, start.model,
                               large=start.row.large, adapters=run.recipe.lora)


def tune_taught(run: Run, start: Start) -> Path:
    """All weights, on the domain's text and on the teacher's distribution."""
    assert start.model is not None
    return distill.specialize(run, start.row.name, start.domain, start.model, start.teacher)


TUNES: dict[str, Callable[[Run, Start], Path]] = {
    "full": tune_all, "lora": tune_adapters, "distill": tune_taught}
"""By the table's column ``tune``: makes the stage of the fine-tuned model."""


# Methods ----------------------------------------------------------------------------------------

def pretrain(run: Run, method: str, domain: str = "") -> Path | None:
    """Pretrain all that a method needs before it is fine-tuned, its teacher too.

    Args:
        domain: may be empty for methods whose pretraining is the same for every domain.

    Returns:
        Folder of the pretrained model or experts; None where nothing is pretrained.
    """
    if (teacher := _teacher(run, method)) is not None:
        pretrained(run, teacher.name, domain, run.recipe.distill.teacher_tokens)
    return pretrained(run, method, domain, None)


@once
def pretrained(run: Run, method: str, domain: str = "", tokens: int | None = None) -> Path | None:
    """The method's own pretraining, of so many ``tokens`` (None: the recipe's); as
    :func:`pretrain`.

    Without tokens of pretraining it is the checkpoint that the recipe starts from.
    """
    row = methods.of(run.recipe, method)
    if row.draws is None:
        return None
    if row.bank and not row.adapts:
        return experts.pretrained(run, method)
    begun = checkpoint.checkpoint(run, row.large)
    if begun and not run.recipe.pretrain_tokens:
        return begun
    drawn = DRAWS[row.draws](run, domain)
    if row.adapts:
        return _adapted(run, row, domain, drawn)
    return pretraining.pretrain(
        run, row.pretraining(), drawn.rows, drawn.weights, large=row.large, inputs=drawn.inputs,
        domain=domain if row.per_domain else None,
        begins=None if row.per_domain or tokens else _shared_with(run, row, drawn), tokens=tokens)


def weigh(run: Run, row: Method, domain: str) -> Path | None:
    """Choose the generic text that a method draws for a domain, if it does, and say what that means
    before anything is trained; of a bundle without generic text nothing.

    Returns:
        Stage that tells what the choice is worth (:mod:`planearly.stages.foresight`); None where
        nothing is chosen, or by trained models, or the domain has no text.
    """
    draws, recipe, has_text = row.adapts or row.draws, run.recipe, domain in corpus.texts(run)
    if draws in (None, methods.GENERIC) or row.scored or not recipe.reads_generic or not (
            has_text or draws == "importance"):
        return None
    if not (rows := adapt.rows_drawn(recipe) if row.adapts else generic_rows(recipe)):
        return None
    drawn = DRAWS[draws](run, domain, rows if row.adapts else None)
    if not has_text:
        return None
    return foresight.gain(run, draws, domain, drawn.rows, drawn.weights, rows, drawn.inputs)


def _adapted(run: Run, row: Method, domain: str, drawn: Drawn) -> Path | None:
    """The adapted model; without a domain, or steps to adapt in, what it begins from."""
    shared = _plateau(run, row, drawn)
    expert = experts.chosen(run, row.name, domain) if row.bank and domain else None
    own = _own(run, row, domain)
    return adapt.adapt(run, row, domain, shared, own, drawn, expert) if own else expert or shared


def _own(run: Run, row: Method, domain: str) -> Drawn | None:
    """What a method draws for a domain alone; None: nothing."""
    if not domain or not row.needs_domain:
        return None
    if not row.adapts:
        return DRAWS[str(row.draws)](run, domain)
    rows = adapt.rows_drawn(run.recipe)
    return DRAWS[row.adapts](run, domain, rows) if rows else None


def _plateau(run: Run, row: Method, drawn: Drawn) -> Path | None:
    """What a method that adapts begins from, for every domain."""
    if row.bank:
        return experts.pretrained(run, row.name)
    return checkpoint.bundled(run) if run.recipe.bundle \
        else adapt.plateau(run, row, drawn.rows, drawn.weights)


def _shared_with(run: Run, row: Method, drawn: Drawn) -> Path | None:
    """The plateau that a plain pretraining passes over, where another method adapts from it."""
    adapting = adapt.adapting(run.recipe, row.pretraining())
    return _plateau(run, adapting, drawn) if adapting else None


def specialize(run: Run, method: str, domain: str, tokens: int | None = None) -> Trained:
    """Fine-tune on a domain, after what that needs: pretraining, of so many ``tokens`` (None: the
    recipe's), expert, teacher."""
    row, worth = methods.of(run.recipe, method), None
    with contextlib.suppress(Missing):  # an older version finished the rest without it
        worth = weigh(run, row, domain)
    base, expert = pretrained(run, method, domain, tokens), None
    stages: list[Path] = []
    if row.bank:
        expert = experts.chosen(run, method, domain)
        stages += [*experts.paid(run, method), expert]
        base = base if row.adapts else expert
    elif row.adapts and row.draws:
        shared = _plateau(run, row, DRAWS[row.draws](run, domain))
        stages += [shared] if shared else []
    stages += [base] if base and base not in stages else []
    pretrainings = [stage for stage in stages if facts(stage)["stage"].startswith("pretrain/")]
    drawn = _own(run, row, domain) if base else None
    stages += [stage for stage in drawn.paid if stage not in stages] if drawn else []
    teacher = _teacher(run, method)
    taught = specialize(run, teacher.name, domain, run.recipe.distill.teacher_tokens) \
        if teacher else None
    if taught:
        stages += taught.stages
    start = Start(row, domain, base, taught.tuned if taught else None)
    tuned = TUNES[row.tune](run, start)
    return Trained(
        method, domain, base, tuned, [*stages, tuned], before=row.pretraining(),
        params=experts.parameters(run, method, expert) if expert else None,
        routed=lambda domain="": experts.routed(run, method, domain)
        if expert and not row.adapts else None,
        expert=expert, notes=_notes(run, row, base, expert, pretrainings, drawn, worth))


def _teacher(run: Run, method: str) -> Method | None:
    """The method that trains the teacher; None where none is needed or it comes from outside."""
    taught = methods.find(method).taught and not run.recipe.distill.teacher
    return methods.teacher() if taught else None


def _notes(run: Run, row: Method, base: Path | None, expert: Path | None,
           pretrainings: list[Path], drawn: Drawn | None, worth: Path | None) -> dict[str, Any]:
    """Fields of results.json that only some methods have."""
    found: dict[str, Any] = {}
    if expert:
        choice = facts(expert)["choice"]
        found |= {"expert": choice["rule"], "expert_number": choice["expert"],
                  "expert_share": choice["share"], "k": experts.count(run.recipe, row.name)}
    elif drawn:
        found |= drawn.notes
    if drawn and row != methods.find(row.name):
        found["draws"] = row.adapts
    if worth:
        found["foresight"] = {key: facts(worth)[key] for key in ("gain", "ci95", "tokens")}
    if row.tune == "lora":
        shape = training.shape_made(base) if base else training.shape_of(run, row.large)
        found["adapter_params"] = flops.lora_parameters(shape, run.recipe.lora.rank)
    if (row.taught or row.scored) and base is not None:
        # those of teacher and scorer are in the cost; the deployed model was pretrained on these
        found["pretrain_tokens"] = sum(facts(each)["cost"]["tokens"] for each in pretrainings)
    return found


# Checks -----------------------------------------------------------------------------------------

def check(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        UserError: an unknown method, one whose row cannot be carried out, or settings of a method
            that cannot work.
    """
    for name in recipe.methods:
        if name not in methods.TABLE:
            raise UserError(f"recipe key 'methods' names '{name}'; known are "
                            f"{', '.join(methods.TABLE)}")
    rows = [methods.of(recipe, name) for name in recipe.methods]
    for row in rows:
        _check_row(row)
        if row.adapts:
            adapt.check(recipe, row)
    track.check(recipe.track)
    starts.check(recipe)
    bundled.check(recipe)
    for row in rows:
        if row.bank:
            experts.check(recipe, row.name)
        if row.tune == "lora":
            fresh = Shape.of(getattr(recipe, row.key), recipe.tokenizer.vocab_size, recipe.context)
            lora.check(recipe.lora, starts.shape(recipe, row.large) or fresh, row.name)
        if row.taught:
            distill.check(recipe)


def _check_row(row: Method) -> None:
    """Refuse a row of the table that no function here carries out."""
    for column, value, known in (("draws", row.draws, DRAWS), ("adapts", row.adapts, DRAWS),
                                 ("bank", row.bank, experts.BANKS), ("tune", row.tune, TUNES)):
        if value is not None and value not in known:
            raise UserError(f"the method '{row.name}' has '{value}' in the column '{column}' of "
                            f"the table of methods, and known are {', '.join(known)}: write the "
                            "function that carries it out")
    if row.bank and row.draws != methods.GENERIC:
        raise UserError(f"the method '{row.name}' pretrains experts on '{row.draws}' text, and "
                        f"experts are pretrained on the generic corpus alone: give it "
                        f"draws='{methods.GENERIC}', or no bank")
    if row.adapts and (row.draws != methods.GENERIC or row.bank == "mixture"):
        raise UserError(f"the method '{row.name}' adapts to a domain from what is no plain "
                        f"pretraining: give it draws='{methods.GENERIC}' and no mixture, whose "
                        "experts are at their last steps at different times")
    if row.taught and not row.pretrains:
        raise UserError(f"the method '{row.name}' distils into a model without pretraining: give "
                        f"it draws='{methods.GENERIC}'")


def check_tokens(run: Run) -> None:
    """As :func:`check`, for what is known only with the run's tokenizer."""
    checkpoint.check_vocabulary(run.recipe, corpus.tokenizer_of(run))
    for name in run.recipe.methods:
        if methods.find(name).taught:
            distill.check_vocabulary(run)
