"""From weights of groups to models: pretraining and fine-tuning, through the one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from planearly import config
from planearly.data.loader import MixedStream, RowStream, Stream
from planearly.data.pack import Rows, pack_rows
from planearly.data.windows import TokenDataset
from planearly.device import bf16_is_fast
from planearly.evaluate.perplexity import mean_nll
from planearly.files import read_array, read_json
from planearly.model import flops
from planearly.model.transformer import Shape, Transformer
from planearly.plan import ledger
from planearly.progress import say
from planearly.run import Run, facts
from planearly.stages import groups, text
from planearly.train import checkpoint, loop, optim, parallel
from planearly.train.objective import Objective

Validate = Callable[[Transformer], float]


def shape_of(run: Run, large: bool = False) -> Shape:
    """Shape of the recipe's small (or large) model with the run's real vocabulary."""
    recipe = run.recipe
    entries = facts(text.tokenizer_folder(run))["vocab_size"]
    return Shape.of(recipe.large if large else recipe.model, entries, recipe.context)


def generic_stream(run: Run, packed: Path, weights: np.ndarray) -> RowStream:
    """Rows of the generic corpus by group weights."""
    return RowStream(
        TokenDataset(text.generic(run)), Rows.load(packed), weights, groups.sampler_seed(run)
    )


def domain_stream(run: Run, name: str) -> tuple[RowStream, int]:
    """Rows of the domain's own training text, and how many of them are one epoch."""
    dataset, used = text.specialization_windows(run, name)
    member = np.full(len(dataset), -1)
    member[used] = 0
    packed = pack_rows(dataset.windows["length"], member, 1, dataset.context, run.recipe.seed)
    return RowStream(dataset, packed, np.ones(1), run.recipe.seed * 2 + 2), len(packed)


def validator(run: Run, name: str) -> Validate:
    """Mean nats per token on the domain's valid split, as validation sees it."""
    dataset, windows = text.held_out(run, name, "valid")

    def validate(model: Transformer) -> float:
        return mean_nll(model, dataset, windows, bf16=bf16_is_fast(parallel.device()))

    return validate


def pretrain(
    run: Run, stage: str, packed: Path, weights: np.ndarray, *, large: bool = False,
    inputs: dict[str, Path] | None = None, mixed_with: str | None = None,
) -> Path:
    """Pretrain a dense model on generic rows drawn by ``weights``; folder with the weights.

    Args:
        mixed_with: a domain whose own text takes ``pretrain.specialization_share`` of the rows.
    """
    recipe = run.recipe
    shape = shape_of(run, large)
    share = recipe.pretrain.specialization_share if mixed_with else 0.0
    steps = groups.planned_rows(run) // max(recipe.pretrain.batch_tokens // recipe.context, 1)
    settings: dict[str, Any] = {
        "shape": shape.to_dict(), "train": train_settings(recipe.pretrain), "steps": steps,
        "seed": recipe.seed, "specialization_share": share,
    }
    if share and mixed_with:
        settings["spec_tokens"] = recipe.spec_tokens
        inputs = {**(inputs or {}), "domain": text.domain(run, mixed_with)}

    def build(folder: Path) -> dict[str, Any]:
        model = Transformer(shape, recipe.seed)
        generic = generic_stream(run, packed, weights)
        stream: Stream = generic
        if share and mixed_with:
            own, _ = domain_stream(run, mixed_with)
            stream = MixedStream([generic, own], [1 - share, share], recipe.seed)
        outcome = loop.train(loop.Dense(model), stream, steps, recipe.pretrain, folder, name=stage)
        drawn = generic.sampler.counts(round(groups.planned_rows(run) * (1 - share)))
        return {
            "shape": shape.to_dict(), "outcome": asdict(outcome), "large": large,
            "cost": book(run, stage, outcome, flops.training(shape)),
            "epochs": epochs(drawn, generic.sampler.rows_per_group),
        }

    return run.stage(f"pretrain/{stage}", settings, {"rows": packed, **(inputs or {})}, build,
                     every_rank=True)


def train_settings(train: config.Train) -> dict[str, Any]:
    """The part of the training settings that the resulting weights depend on."""
    values = asdict(train)
    for key in ("log_steps", "checkpoint_seconds", "specialization_share"):
        values.pop(key, None)
    return values


def epochs(drawn: np.ndarray, available: np.ndarray) -> dict[str, Any]:
    """How often the rows of each group were passed over."""
    passes = drawn / np.maximum(available, 1)
    return {"mean": float(drawn.sum() / available.sum()), "most": float(passes.max()),
            "rows_drawn": drawn.tolist(), "rows_available": available.tolist()}


def book(run: Run, name: str, outcome: loop.Outcome, flops_per_token: float) -> dict[str, Any]:
    """The ledger entry of a training."""
    return ledger.book(
        name, outcome.tokens, outcome.tokens * flops_per_token, outcome.seconds * parallel.world(),
        price_per_hour=run.recipe.cost.price_per_hour, currency=run.recipe.cost.currency,
    )


def load_model(stage: Path) -> Transformer:
    """The dense model of a finished training stage."""
    made = facts(stage)
    model = Transformer(Shape(**made["shape"]))
    path = stage / loop.FINAL
    checkpoint.set_weights(model, checkpoint.load_tensors(path)[0], path)
    return model


def finetune_limits(finetune: config.Finetune, tokens: int, epoch_rows: int,
                    batch_rows: int) -> tuple[int, float]:
    """Most steps and the learning rate's factor for a specialization set of ``tokens``.

    The paper's settings (its section 4): at 1M tokens a third of the rate and under 2k steps, at
    8M the base rate and at most 4k steps, at 64M 30k steps; sizes between go with the nearest in
    ratio. ``finetune.max_epochs`` bounds the steps of small sets.
    """
    size = "1M" if tokens < 2.8e6 else "8M" if tokens < 22.6e6 else "64M"
    limit = finetune.max_steps or {"1M": 2_000, "8M": 4_000, "64M": 30_000}[size]
    factor = finetune.lr_scale if finetune.lr_scale is not None else {"1M": 1 / 3}.get(size, 1.0)
    by_epochs = int(np.ceil(finetune.max_epochs * epoch_rows / batch_rows))
    return max(min(limit, by_epochs), 1), factor


def specialize(
    run: Run, stage: str, name: str, start: Path | None, *, large: bool = False,
    objective: Callable[[], Objective] | None = None, inputs: dict[str, Path] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Fine-tune on a domain with early stopping on its valid split; folder with the weights.

    Args:
        start: a finished training stage; None starts from fresh weights (slm-nopt).
        objective: makes another objective than next-token cross-entropy.
        settings: what else the result depends on.
    """
    recipe = run.recipe
    finetune = recipe.finetune
    shape = Shape(**facts(start)["shape"]) if start else shape_of(run, large)
    folders = {"domain": text.domain(run, name), **({"start": start} if start else {}),
               **(inputs or {})}
    if finetune.replay_share:
        folders["rows"] = groups.rows(run, groups.finest(run))
    values = {"train": train_settings(finetune), "spec_tokens": recipe.spec_tokens,
              "eval_tokens": recipe.data.eval_tokens, "seed": recipe.seed,
              "shape": shape.to_dict(), **(settings or {})}

    def build(folder: Path) -> dict[str, Any]:
        model = load_model(start) if start else Transformer(shape, recipe.seed)
        own, epoch_rows = domain_stream(run, name)
        stream: Stream = own
        if finetune.replay_share:
            packed = folders["rows"]
            replay = generic_stream(run, packed, groups.generic_weights(packed))
            shares = [1 - finetune.replay_share, finetune.replay_share]
            stream = MixedStream([own, replay], shares, recipe.seed)
        _, used = text.specialization_windows(run, name)
        tokens = int(own.dataset.windows["length"][used].sum())
        batch_rows = max(finetune.batch_tokens // recipe.context, 1)
        own_rows = max(round(batch_rows * (1 - finetune.replay_share)), 1)
        steps, factor = finetune_limits(finetune, tokens, epoch_rows, own_rows)
        rate = optim.resolve(finetune.optimizer, steps)
        outcome = loop.train(
            loop.Dense(model), stream, steps, finetune, folder, name=stage,
            optimizer=rate.scaled(factor) if start else rate,
            objective=objective() if objective else None,
            validate=validator(run, name), patience=finetune.patience,
        )
        extra = objective().flops_per_token if objective else 0.0
        say(f"  validation {outcome.first_validation:.4f} before, {outcome.best_validation:.4f} "
            f"at step {outcome.best_step}")
        return {
            "shape": shape.to_dict(), "outcome": asdict(outcome), "spec_tokens": tokens,
            "cost": book(run, stage, outcome, flops.training(shape) + extra),
        }

    return run.stage(f"specialize/{stage}", values, folders, build, every_rank=True)


def outcome_of(stage: Path) -> dict[str, Any]:
    return read_json(stage / loop.OUTCOME)


def weights_of(stage: Path) -> np.ndarray:
    return read_array(stage / "weights.npy")
