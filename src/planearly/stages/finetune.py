"""Fine-tuning on a domain: limits, replay of generic text, adapters, early stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from planearly import keys, parallel, tensors
from planearly.data.streams import MixedStream, RowStream, Stream
from planearly.model import flops, lora, outside, starts
from planearly.model.projected import Projected
from planearly.progress import say
from planearly.stages import clusters, corpus, training
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train import loop, optim, vector
from planearly.train.objective import NextToken, Objective
from planearly.train.steps import finetune_limits, own_rows, rows_per_step
from planearly.train.trainable import Dense, Trainable


@dataclass(frozen=True)
class Replay:
    """Generic rows beside the domain's own in fine-tuning, and their share of each step.

    ``by`` is the stage that the weights come from, where they are a domain's.
    """

    rows: Path
    weights: np.ndarray
    share: float
    by: Path | None = None


def replayed(run: Run, name: str) -> Replay | None:
    """The recipe's ``finetune.replay_share`` of rows of the generic corpus, as it is or resampled
    to look like a domain."""
    settings = run.recipe.finetune
    if not settings.replay_share:
        return None
    if settings.replay_draws == "importance":
        return resampled(run, name, settings.replay_share)
    packed = clusters.rows(run, clusters.finest(run))
    return Replay(packed, clusters.generic_weights(packed), settings.replay_share)


def resampled(run: Run, name: str, share: float) -> Replay:
    """Rows of the generic corpus, drawn by a domain's cluster weights."""
    weights = clusters.importance_weights(run, name)
    return Replay(clusters.rows(run, facts(weights)["k"]), training.weights_of(weights), share,
                  weights)


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning on a domain, ready to start."""

    own: RowStream
    stream: Stream
    steps: int
    tokens: int
    """Of the specialization set."""
    rate_factor: float
    """Of pretraining's learning rate."""
    continued: bool = False
    """Whether the model began as a checkpoint, before it was trained here at all."""
    scaled: bool = True
    """Whether ``finetune.lr_scale`` or the set's size have a say in ``rate_factor``."""

    def rates(self, recipe: keys.Recipe, width: int, steps: int | None = None,
              times: float = 1.0) -> optim.Settings:
        """Of a model of this width, for other ``steps`` or so many ``times`` the rate."""
        return optim.resolve_finetuning(
            recipe.finetune, recipe.pretrain.optimizer, steps or self.steps, width,
            self.continued, self.rate_factor, times)

    def rate_keys(self, recipe: keys.Recipe, width: int) -> dict[str, float]:
        """Recipe keys to which the rates are proportional, and what they come to."""
        tune, own = recipe.finetune, recipe.finetune.optimizer
        given = own.lr is not None or own.embedding_lr is not None
        if self.scaled and (tune.lr_scale is not None or not given):
            return {"finetune.lr_scale": self.rate_factor}
        return optim.rate_keys("finetune", own, self.rates(recipe, width))


def tuning(run: Run, name: str, replay: Replay | None = None, scratch: bool = False,
           large: bool = False) -> Tuning:
    """Rows, steps and rate for the domain's training text, with ``replay`` mixed in.

    Args:
        scratch: whether the model has fresh weights.
        large: whether it is the large one.
    """
    finetune = run.recipe.finetune
    share = replay.share if replay else 0.0
    own, epoch_rows = training.domain_stream(run, name)
    stream: Stream = own
    if replay:
        generic = training.generic_stream(run, replay.rows, replay.weights)
        stream = MixedStream([own, generic], [1 - share, share], run.recipe.seed)
    _, used = corpus.specialization_windows(run, name)
    tokens = int(own.dataset.windows["length"][used].sum())
    batch_rows = rows_per_step(finetune.step_tokens, run.recipe.context)
    continued = not scratch and starts.folder(run.recipe, large) is not None
    steps, factor = finetune_limits(
        finetune, tokens, epoch_rows, own_rows(batch_rows, share), scratch, continued)
    return Tuning(own, stream, steps, tokens, factor, continued, not scratch)


def in_numbers(run: Run, large: bool, tokens: int) -> dict[str, Any]:
    """The recipe's section ``finetune`` for a run elsewhere that does not know what the model began
    as: with the rates that it comes to here in place of shares of pretraining's.

    Args:
        tokens: of the specialization set.
    """
    recipe, tune = run.recipe, run.recipe.finetune
    continued = starts.folder(recipe, large) is not None
    _, factor = finetune_limits(tune, tokens, 1, rows_per_step(tune.step_tokens, recipe.context),
                                continued=continued)
    rates = optim.resolve_finetuning(
        tune, recipe.pretrain.optimizer, 1, outside.width_of(training.shape_of(run, large)),
        continued, factor)
    values = asdict(tune)
    values["optimizer"] |= {"lr": rates.lr, "embedding_lr": rates.embedding_lr}
    return values | {"lr_scale": None}


def finetune(run: Run, name: str, model: Trainable, folder: Path, label: str) -> loop.Outcome:
    """Fine-tune any model as the recipe says, with early stopping; not a stage of its own."""
    settings, plan = run.recipe.finetune, tuning(run, name)
    width = outside.width_of(model.body.shape)
    return loop.train(
        model, plan.stream, plan.steps, settings, folder, name=label,
        optimizer=plan.rates(run.recipe, width), rate_keys=plan.rate_keys(run.recipe, width),
        validate=training.validator(run, name), patience=settings.patience,
        average=settings.average,
    )


def finetune_vector(run: Run, name: str, network: Projected, start: Tensor, folder: Path,
                    label: str) -> tuple[Tensor, loop.Outcome]:
    """Train one expert vector of a projected network on the domain, everything else frozen."""
    settings, width = run.recipe.finetune, network.shape.d_model
    plan = replace(tuning(run, name), rate_factor=1.0, scaled=False)
    return vector.tune_vector(
        network, start, plan.stream, plan.steps, settings, folder, name=label,
        validate=training.validator(run, name), patience=settings.patience,
        average=settings.average,
        optimizer=plan.rates(run.recipe, width), rate_keys=plan.rate_keys(run.recipe, width),
    )


def specialize(
    run: Run, method: str, name: str, start: Path | None, *, large: bool = False,
    objective: Callable[[Path, RowStream], Objective] | None = None,
    adapters: keys.Lora | None = None, replay: Replay | None = None,
    inputs: dict[str, Path] | None = None, settings: dict[str, Any] | None = None,
) -> Path:
    """Fine-tune on a domain with early stopping on its valid split; folder with the weights.

    Args:
        name: of the domain.
        start: a finished training stage; None starts from fresh weights, at the base rate.
        objective: makes another objective than next-token cross-entropy, from the stage's folder
            and the domain's own rows.
        adapters: train these, not the model; the kept weights are the merged ones, the adapters
            lie beside them in ``adapters/``.
        replay: generic rows to mix in (default: as the recipe says; none with fresh weights).
        settings: what else the result depends on.
    """
    recipe, stage = run.recipe, f"{method}.{name}"
    tune = recipe.finetune
    shape = training.shape_made(start) if start else training.shape_of(run, large)
    replay = replay or (replayed(run, name) if start else None)
    folders = {"domain": corpus.domain(run, name), **({"start": start} if start else {}),
               **({"rows": replay.rows} if replay else {}),
               **({"weights": replay.by} if replay and replay.by else {}), **(inputs or {})}
    values = {"train": training.train_settings(tune), "spec_tokens": recipe.spec_tokens,
              "valid_tokens": recipe.data.valid_tokens, "seed": recipe.seed,
              "shape": shape.to_dict(), **({"adapters": asdict(adapters)} if adapters else {}),
              **(settings or {})}
    continued = start is not None and starts.folder(recipe, large) is not None
    width = outside.width_of(shape)
    if changed := optim.finetuning_deviations(
            tune, recipe.pretrain.optimizer, width, continued, scaled=start is not None,
            decays=adapters is None):
        values["rates"] = changed

    def build(folder: Path) -> dict[str, Any]:
        model = training.load_model(start) if start else outside.build(shape, recipe.seed)
        plan = tuning(run, name, replay, scratch=start is None, large=large)
        steps, times = plan.steps, 1.0
        place, flops_per_token = folder, flops.training(shape)
        if adapters:
            lora.add_adapters(model, adapters, recipe.seed)
            steps = max(round(steps * adapters.step_factor), 1)
            times = adapters.lr_factor
            place = folder / training.ADAPTERS
            flops_per_token = flops.lora_training(shape, adapters.rank)
        goal = objective(folder, plan.own) if objective else NextToken()
        outcome = loop.train(
            Dense(model), plan.stream, steps, tune, place, name=stage,
            optimizer=plan.rates(recipe, width, steps, times), objective=goal,
            rate_keys=plan.rate_keys(recipe, width),
            validate=training.validator(run, name), patience=tune.patience, average=tune.average,
        )
        if adapters and parallel.rank() == 0:
            tensors.save_tensors(folder / loop.FINAL, lora.merged(model), {})
        say(f"  validation {outcome.first_validation:.4f} before, {outcome.best_validation:.4f} "
            f"at step {outcome.best_step}")
        return {
            "method": method, "domain": name, "shape": shape.to_dict(), "spec_tokens": plan.tokens,
            "cost": training.book(run, stage, outcome, flops_per_token, goal),
        }

    return run.stage(f"specialize/{stage}", values, folders, build, every_rank=True,
                     same=training.same_settings(values, tune),
                     fits=training.as_precise(tune))
