"""What pretraining and fine-tuning have in common: shapes, streams, settings that count, outcomes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from planearly import keys, parallel
from planearly.cost import devices, ledger
from planearly.cost import model as costs
from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows, pack_rows
from planearly.data.sample import BlendSampler, Sampler
from planearly.data.streams import BlendStream, RowStream
from planearly.errors import UserError
from planearly.evaluate.perplexity import mean_nll
from planearly.files import read_array, read_object
from planearly.model import memory, outside, starts
from planearly.model.outside import AnyModel, AnyShape
from planearly.model.transformer import Shape
from planearly.parallel import bf16_is_fast
from planearly.progress import say
from planearly.stages import clusters, corpus
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train import arithmetic, loop, metrics, optim
from planearly.train.objective import NextToken, Objective
from planearly.train.steps import rows_per_step

ADAPTERS = "adapters"
Validate = Callable[[AnyModel], float]


def shape_of(run: Run, large: bool = False) -> AnyShape:
    """Shape of the small (or large) model: of the checkpoint that it starts from, or of the recipe
    with the run's real vocabulary."""
    recipe = run.recipe
    if found := starts.shape(recipe, large):
        return found
    entries = facts(corpus.tokenizer_folder(run))["vocab_size"]
    return Shape.of(recipe.large if large else recipe.model, entries, recipe.context)


def shape_made(stage: Path) -> AnyShape:
    """Shape of a finished stage's model."""
    return outside.shape_of(facts(stage)["shape"])


def rates(recipe: keys.Recipe, steps: int, shape: AnyShape, origin: Path | None) -> optim.Settings:
    """Of a pretraining of so many steps, from fresh weights or from the checkpoint ``origin``."""
    return optim.resolve(recipe.pretrain.optimizer, steps, outside.width_of(shape),
                         origin is not None)


def rate_settings(recipe: keys.Recipe, shape: AnyShape, origin: Path | None) -> dict[str, Any]:
    """What of a pretraining's rates follows neither from the recipe's keys nor from the preset
    alone, for the stage's fingerprint."""
    found = optim.deviations(recipe.pretrain.optimizer, outside.width_of(shape),
                             origin is not None)
    return {"rates": found} if found else {}


def narrow(job: memory.Job, tokens: int) -> bool:
    """Whether gradients take long between machines, by the estimate that plans show: then they
    travel in bfloat16 where the recipe leaves it open (:func:`planearly.train.loop.train`)."""
    step = costs.step_traffic(devices.find_or_nearest(), job, tokens)
    return step.slow(step.network)


def generic_stream(run: Run, packed: Path, weights: np.ndarray) -> RowStream:
    """Rows of the generic corpus by group weights."""
    rows = Rows.load(packed)
    return RowStream(TokenDataset(corpus.generic(run)), rows, Sampler(
        np.diff(rows.group_offsets), weights, clusters.sampler_seed(run)))


def blend_stream(run: Run, packed: Path, histograms: np.ndarray) -> BlendStream:
    """Rows of the generic corpus by ``projected.blends`` histograms [n, groups] in a step."""
    rows, recipe = Rows.load(packed), run.recipe
    return BlendStream(TokenDataset(corpus.generic(run)), rows, BlendSampler(
        np.diff(rows.group_offsets), histograms,
        rows_per_step(recipe.pretrain.step_tokens, recipe.context), recipe.projected.blends,
        clusters.sampler_seed(run)))


def domain_stream(run: Run, name: str) -> tuple[RowStream, int]:
    """Rows of the domain's own training text, and how many of them are one epoch."""
    dataset, used = corpus.specialization_windows(run, name)
    member = np.full(len(dataset), -1)
    member[used] = 0
    packed = pack_rows(dataset.windows["length"], member, 1, dataset.context, run.recipe.seed)
    sampler = Sampler(np.diff(packed.group_offsets), np.ones(1), run.recipe.seed * 2 + 2)
    return RowStream(dataset, packed, sampler), len(packed)


MOST_OWN_PASSES = 16
"""Passes of a pretraining over the domain's own text up to which more of it helped; more were not
tried (docs/experiments.md, "The best model for one domain")."""


def tell_own_passes(key: str, share: float, drawn: float, held: int) -> None:
    """Warn, before it trains, of a pretraining that repeats the domain's own text often.

    Args:
        key: of the recipe, which is ``share``.
        drawn: rows of that text that are drawn, of ``held``.
    """
    if (passes := drawn / held) > MOST_OWN_PASSES:
        say(f"  warning: pretraining passes {passes:.0f} times over the domain's own text; more "
            f"than {MOST_OWN_PASSES} passes were not tried, and "
            f"{key}={share * MOST_OWN_PASSES / passes:.2g} makes as many")


def validator(run: Run, name: str) -> Validate:
    """Mean nats per token on the domain's valid split; the loop says in which precision."""
    dataset, windows = corpus.held_out(run, name, "valid")

    def validate(model: AnyModel) -> float:
        return mean_nll(model, dataset, windows, bf16=None)

    return validate


_NOT_OF_THE_RESULT = ("log_steps", "checkpoint_seconds", "specialization_share",
                      "specialization_after", "branch_tokens", "microbatch_tokens", "compile",
                      "shard")
"""Keys that a stage's result does not depend on, or that it has among its settings itself."""
_OLDER = ("log_steps", "checkpoint_seconds", "specialization_share", "specialization_after",
          "branch_tokens", "shard")
"""The same in run folders of an older layout, which counted how steps are computed, too."""


_SINCE = {"average": 0.0, "gradients": "auto", "replay_draws": "generic"}
"""Keys that older versions did not have, and the values at which they change nothing."""


def train_settings(train: keys.Train) -> dict[str, Any]:
    """The part of the training settings that the resulting weights depend on.

    How a step is divided and compiled changes the order of additions, not the training: a run may
    go on with less memory. Pretraining does not stop by its validation.
    """
    values = _without(train, _NOT_OF_THE_RESULT)
    if isinstance(train, keys.Pretrain):
        del values["validate_steps"]
    return values


def same_settings(values: dict[str, Any], train: keys.Train,
                  place: str = "train") -> list[dict[str, Any]]:
    """Other settings of a stage that give the same weights as ``values`` do.

    Args:
        values: with what :func:`train_settings` gives at ``place``.
    """
    here = "bf16" if bf16_is_fast(parallel.device()) else "fp32"
    alike = {"auto", here}
    others = sorted(alike - {train.precision}) if train.precision in alike else []
    own = {key: value for key, value in values[place].items() if key != "gradients"}
    travel = [{} if kind == "auto" else {"gradients": kind} for kind in ("auto", "fp32", "bf16")
              if kind != train.gradients]
    return [*({**values, place: {**values[place], "precision": other}} for other in others),
            {**values, place: _without(train, _OLDER)},
            *({**values, place: {**own, **kind}} for kind in travel)]


def as_precise(train: keys.Train) -> Callable[[Path], bool]:
    """Whether a stage was computed in the precision that ``train`` names, and its gradients
    travelled in the one that it names, as far as that is known.

    "auto" meant what was fast where the stage was made, which may have been elsewhere.
    """
    asked = [(field, kind == "bf16", unknown) for field, kind, unknown in (
        ("bf16", train.precision, train.precision == "bf16"),
        ("bf16_gradients", train.gradients, False)) if kind != "auto"]

    def fits(stage: Path) -> bool:
        for file in (*stage.rglob(loop.OUTCOME), *stage.rglob(arithmetic.KEPT)):
            with contextlib.suppress(UserError):  # removed by who is at it, or broken
                note = read_object(file)
                note = note.get("arithmetic", note)
                if any(note.get(field, unknown) != wanted for field, wanted, unknown in asked):
                    return False
        return True

    return fits


def _without(train: keys.Train, left_out: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in asdict(train).items()
            if key not in left_out and (key not in _SINCE or value != _SINCE[key])}


def book(run: Run, name: str, outcome: loop.Outcome, flops_per_token: float,
         objective: Objective | None = None) -> dict[str, Any]:
    """The ledger entry of a training, and of what its objective spent beside and before it.

    Args:
        flops_per_token: of the model itself.
    """
    goal = objective or NextToken()
    beside = outcome.tokens * goal.flops_per_token + goal.flops_before
    return ledger.book(
        name, outcome.tokens, outcome.tokens * flops_per_token + beside,
        outcome.seconds * parallel.world() + goal.seconds_before,
        price_per_hour=run.recipe.cost.price_per_hour, currency=run.recipe.cost.currency,
        saving_seconds=outcome.saving_seconds * parallel.world(), processes=parallel.world(),
        sharing=outcome.clock_seconds / outcome.seconds / parallel.on_device()
        if outcome.seconds else 1.0,
        teacher=(beside, goal.teacher_width) if goal.teacher_width else None,
    )


def load_model(stage: Path) -> AnyModel:
    """The dense model of a finished training stage."""
    return outside.with_weights(shape_made(stage), stage / loop.FINAL)


def outcome_of(stage: Path) -> dict[str, Any]:
    """What the training of a finished stage came to, as the loop noted it."""
    return loop.outcome_in(trained_in(stage))


def metrics_of(stage: Path) -> list[dict[str, Any]]:
    """The lines of metrics of a stage; none where nothing was trained."""
    return metrics.read(trained_in(stage) / "metrics.jsonl")


def trained_in(stage: Path) -> Path:
    """Where the loop wrote in a stage's folder: adapters are trained in a folder of their own."""
    return adapters if (adapters := stage / ADAPTERS).is_dir() else stage


def weights_of(stage: Path) -> np.ndarray:
    return read_array(stage / "weights.npy")
