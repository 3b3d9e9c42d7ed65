"""From weights of groups to models: pretraining and fine-tuning, through the one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from planearly import keys, parallel, tensors
from planearly.cost import ledger
from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows, pack_rows
from planearly.data.streams import MixedStream, RowStream, Stream
from planearly.evaluate.perplexity import mean_nll
from planearly.files import atomic_write, read_array, read_json, write_json
from planearly.model import flops, lora, starts
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.parallel import bf16_is_fast
from planearly.progress import say
from planearly.stages import checkpoint, clusters, corpus
from planearly.stages.folder import Run, facts, once
from planearly.train import loop, optim, vector
from planearly.train.objective import NextToken, Objective
from planearly.train.steps import branching_step, finetune_limits, planned_steps, rows_per_step

BEGUN = "begun.json"
Validate = Callable[[Transformer], float]


def shape_of(run: Run, large: bool = False) -> Shape:
    """Shape of the small (or large) model: of the checkpoint that it starts from, or of the recipe
    with the run's real vocabulary."""
    recipe = run.recipe
    if found := starts.shape(recipe, large):
        return found
    entries = facts(corpus.tokenizer_folder(run))["vocab_size"]
    return Shape.of(recipe.large if large else recipe.model, entries, recipe.context)


def generic_stream(run: Run, packed: Path, weights: np.ndarray) -> RowStream:
    """Rows of the generic corpus by group weights."""
    return RowStream(
        TokenDataset(corpus.generic(run)), Rows.load(packed), weights, clusters.sampler_seed(run)
    )


def domain_stream(run: Run, name: str) -> tuple[RowStream, int]:
    """Rows of the domain's own training text, and how many of them are one epoch."""
    dataset, used = corpus.specialization_windows(run, name)
    member = np.full(len(dataset), -1)
    member[used] = 0
    packed = pack_rows(dataset.windows["length"], member, 1, dataset.context, run.recipe.seed)
    return RowStream(dataset, packed, np.ones(1), run.recipe.seed * 2 + 2), len(packed)


def validator(run: Run, name: str) -> Validate:
    """Mean nats per token on the domain's valid split, as validation sees it."""
    dataset, windows = corpus.held_out(run, name, "valid")

    def validate(model: Transformer) -> float:
        return mean_nll(model, dataset, windows, bf16=bf16_is_fast(parallel.device()))

    return validate


def pretrain(
    run: Run, stage: str, packed: Path, weights: np.ndarray, *, large: bool = False,
    inputs: dict[str, Path] | None = None, mixed_with: str | None = None,
    network: Callable[[], loop.Trainable] | None = None, flops_per_step: float = 0.0,
    settings: dict[str, Any] | None = None, share_of_steps: float = 1.0,
) -> Path:
    """Pretrain a model on generic rows drawn by ``weights``; folder with the weights.

    It begins as the recipe's checkpoint, if there is one.

    Args:
        mixed_with: a domain whose own text takes ``pretrain.specialization_share`` of the rows.
        network: makes another model than the dense one, of ``flops_per_step`` beside its tokens'.
        settings: what else the result depends on.
        share_of_steps: of the recipe's pretraining.
    """
    recipe = run.recipe
    shape = shape_of(run, large)
    share = recipe.pretrain.specialization_share if mixed_with else 0.0
    batch_rows = rows_per_step(recipe.pretrain.batch_tokens, recipe.context)
    steps = planned_steps(recipe, share_of_steps)
    values: dict[str, Any] = {
        "shape": shape.to_dict(), "train": train_settings(recipe.pretrain), "steps": steps,
        "seed": recipe.seed, "specialization_share": share, **(settings or {}),
    }
    if share and mixed_with:
        values["spec_tokens"] = recipe.spec_tokens
        inputs = {**(inputs or {}), "domain": corpus.domain(run, mixed_with)}
    origin = checkpoint.checkpoint(run, large)
    if origin:
        inputs = {**(inputs or {}), "start": origin}
    inputs = {"rows": packed, **(inputs or {})}
    others = {planned_steps(recipe, share_of_steps, tokens)
              for tokens in recipe.pretrain.branch_tokens}

    def build(folder: Path) -> dict[str, Any]:
        for longer in sorted(n for n in others if n > steps):
            sibling = run.folder(f"pretrain/{stage}", {**values, "steps": longer}, inputs)
            branch_off(recipe.pretrain.optimizer, sibling, longer, folder, steps)
        begun = read_json(folder / BEGUN) if (folder / BEGUN).exists() else None
        branches = {branching_step(recipe.pretrain.optimizer, steps, n) for n in others}
        model = network() if network else loop.Dense(
            load_model(origin) if origin else Transformer(shape, recipe.seed))
        generic = generic_stream(run, packed, weights)
        stream: Stream = generic
        if share and mixed_with:
            own, _ = domain_stream(run, mixed_with)
            stream = MixedStream([generic, own], [1 - share, share], recipe.seed)
        outcome = loop.train(model, stream, steps, recipe.pretrain, folder, name=stage,
                             branches=branches - {0})
        drawn = generic.sampler.counts(round(steps * batch_rows * (1 - share)))
        per_token = flops.training(shape) + flops_per_step * steps / outcome.tokens
        return {
            "shape": shape.to_dict(), "outcome": asdict(outcome), "large": large,
            "cost": book(run, stage, outcome, per_token), **({"begun": begun} if begun else {}),
            "epochs": epochs(drawn, generic.sampler.rows_per_group),
        }

    return run.stage(f"pretrain/{stage}", values, inputs, build, every_rank=True)


def branch_off(optimizer: keys.Optimizer, longer: Path, longer_steps: int, folder: Path,
               steps: int) -> None:
    """Begin a run in ``folder`` where it parts from a longer one, if that one kept its state there.

    The rows and rates until then are the same, so the result is what a run of its own would give.
    Its cost counts the shared steps too; ``begun.json`` tells how much of it they are.
    """
    step = branching_step(optimizer, longer_steps, steps)
    kept = loop.branch_file(longer, step)
    taken = (folder / loop.CHECKPOINT).exists() or (folder / loop.OUTCOME).exists()
    parallel.barrier()
    if parallel.rank() == 0 and step and kept.exists() and not taken:
        before = tensors.load_tensors(kept)[1]["outcome"]
        write_json(folder / BEGUN, {"at_step": step, "from": longer.name,
                                    "tokens": before["tokens"],
                                    "device_hours": before["seconds"] * parallel.world() / 3600})
        for source, target in ((longer / "metrics.jsonl", folder / "metrics.jsonl"),
                               (kept, folder / loop.CHECKPOINT)):
            with atomic_write(target) as handle:
                handle.write(source.read_bytes())
    parallel.barrier()


def train_settings(train: keys.Train) -> dict[str, Any]:
    """The part of the training settings that the resulting weights depend on."""
    values = asdict(train)
    for key in ("log_steps", "checkpoint_seconds", "specialization_share", "branch_tokens"):
        values.pop(key, None)
    return values


def epochs(drawn: np.ndarray, available: np.ndarray) -> dict[str, Any]:
    """How often the rows of each group were passed over."""
    passes = drawn / np.maximum(available, 1)
    return {"mean": float(drawn.sum() / available.sum()), "most": float(passes.max()),
            "rows_drawn": drawn.tolist(), "rows_available": available.tolist()}


def book(run: Run, name: str, outcome: loop.Outcome, flops_per_token: float,
         objective: Objective | None = None) -> dict[str, Any]:
    """The ledger entry of a training, and of what its objective spent before it."""
    flops_before = objective.flops_before if objective else 0.0
    seconds = outcome.seconds * parallel.world() + (objective.seconds_before if objective else 0.0)
    return ledger.book(
        name, outcome.tokens, outcome.tokens * flops_per_token + flops_before, seconds,
        price_per_hour=run.recipe.cost.price_per_hour, currency=run.recipe.cost.currency,
    )


def load_model(stage: Path) -> Transformer:
    """The dense model of a finished training stage."""
    made = facts(stage)
    model = Transformer(Shape(**made["shape"]))
    path = stage / loop.FINAL
    tensors.set_weights(model, tensors.load_tensors(path)[0], path)
    return model


@dataclass(frozen=True)
class Replay:
    """Generic rows beside the domain's own in fine-tuning, and their share of each step."""

    rows: Path
    weights: np.ndarray
    share: float


@once
def replayed(run: Run) -> Replay | None:
    """The recipe's ``finetune.replay_share`` of rows of the generic corpus as it is."""
    if not run.recipe.finetune.replay_share:
        return None
    packed = clusters.rows(run, clusters.finest(run))
    return Replay(packed, clusters.generic_weights(packed), run.recipe.finetune.replay_share)


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning on a domain, ready to start."""

    own: RowStream
    stream: Stream
    steps: int
    tokens: int
    """Of the specialization set."""
    rate_factor: float
    """Of the learning rate of a model that was trained before."""


def tuning(run: Run, name: str, replay: Replay | None = None, scratch: bool = False) -> Tuning:
    """Rows, steps and rate for the domain's training text, with ``replay`` mixed in."""
    finetune = run.recipe.finetune
    share = replay.share if replay else 0.0
    own, epoch_rows = domain_stream(run, name)
    stream: Stream = own
    if replay:
        generic = generic_stream(run, replay.rows, replay.weights)
        stream = MixedStream([own, generic], [1 - share, share], run.recipe.seed)
    _, used = corpus.specialization_windows(run, name)
    tokens = int(own.dataset.windows["length"][used].sum())
    batch_rows = rows_per_step(finetune.batch_tokens, run.recipe.context)
    own_rows = max(round(batch_rows * (1 - share)), 1)
    steps, factor = finetune_limits(finetune, tokens, epoch_rows, own_rows, scratch)
    return Tuning(own, stream, steps, tokens, factor)


def finetune(run: Run, name: str, model: loop.Trainable, folder: Path, label: str) -> loop.Outcome:
    """Fine-tune any model as the recipe says, with early stopping; not a stage of its own."""
    settings, plan = run.recipe.finetune, tuning(run, name)
    return loop.train(
        model, plan.stream, plan.steps, settings, folder, name=label,
        optimizer=optim.resolve(settings.optimizer, plan.steps).scaled(plan.rate_factor),
        validate=validator(run, name), patience=settings.patience,
    )


def finetune_vector(run: Run, name: str, network: Projected, start: Tensor, folder: Path,
                    label: str) -> tuple[Tensor, loop.Outcome]:
    """Train one expert vector of a projected network on the domain, everything else frozen."""
    settings, plan = run.recipe.finetune, tuning(run, name)
    return vector.tune_vector(
        network, start, plan.stream, plan.steps, settings, folder, name=label,
        validate=validator(run, name), patience=settings.patience,
        optimizer=optim.resolve(settings.optimizer, plan.steps),
    )


def specialize(
    run: Run, stage: str, name: str, start: Path | None, *, large: bool = False,
    objective: Callable[[Path, RowStream], Objective] | None = None,
    adapters: keys.Lora | None = None, replay: Replay | None = None,
    inputs: dict[str, Path] | None = None, settings: dict[str, Any] | None = None,
) -> Path:
    """Fine-tune on a domain with early stopping on its valid split; folder with the weights.

    Args:
        start: a finished training stage; None starts from fresh weights, at the base rate.
        objective: makes another objective than next-token cross-entropy, from the stage's folder
            and the domain's own rows.
        adapters: train these, not the model; the kept weights are the merged ones, the adapters
            lie beside them in ``adapters/``.
        replay: generic rows to mix in (default: as the recipe says; none with fresh weights).
        settings: what else the result depends on.
    """
    recipe = run.recipe
    tune = recipe.finetune
    shape = Shape(**facts(start)["shape"]) if start else shape_of(run, large)
    replay = replay or (replayed(run) if start else None)
    folders = {"domain": corpus.domain(run, name), **({"start": start} if start else {}),
               **({"rows": replay.rows} if replay else {}), **(inputs or {})}
    values = {"train": train_settings(tune), "spec_tokens": recipe.spec_tokens,
              "valid_tokens": recipe.data.valid_tokens, "seed": recipe.seed,
              "shape": shape.to_dict(), **({"adapters": asdict(adapters)} if adapters else {}),
              **(settings or {})}

    def build(folder: Path) -> dict[str, Any]:
        model = load_model(start) if start else Transformer(shape, recipe.seed)
        plan = tuning(run, name, replay, scratch=start is None)
        steps, factor = plan.steps, plan.rate_factor
        place, flops_per_token = folder, flops.training(shape)
        if adapters:
            lora.add_adapters(model, adapters, recipe.seed)
            steps = max(round(steps * adapters.step_factor), 1)
            factor *= adapters.lr_factor
            place, flops_per_token = folder / "adapters", flops.lora_training(shape, adapters.rank)
        goal = objective(folder, plan.own) if objective else NextToken()
        outcome = loop.train(
            loop.Dense(model), plan.stream, steps, tune, place, name=stage,
            optimizer=optim.resolve(tune.optimizer, steps).scaled(factor), objective=goal,
            validate=validator(run, name), patience=tune.patience,
        )
        if adapters:
            _merge(model, place, folder)
        say(f"  validation {outcome.first_validation:.4f} before, {outcome.best_validation:.4f} "
            f"at step {outcome.best_step}")
        return {
            "shape": shape.to_dict(), "outcome": asdict(outcome), "spec_tokens": plan.tokens,
            "cost": book(run, stage, outcome, flops_per_token + goal.flops_per_token, goal),
        }

    return run.stage(f"specialize/{stage}", values, folders, build, every_rank=True)


def _merge(model: Transformer, adapted: Path, folder: Path) -> None:
    """Make ``folder`` what a training of the dense model leaves, from that of its adapters."""
    if parallel.rank() > 0:
        return
    tensors.save_tensors(folder / loop.FINAL, lora.merged(model), {})
    for name in ("metrics.jsonl", loop.OUTCOME):
        with atomic_write(folder / name) as handle:
            handle.write((adapted / name).read_bytes())


def outcome_of(stage: Path) -> dict[str, Any]:
    return read_json(stage / loop.OUTCOME)


def weights_of(stage: Path) -> np.ndarray:
    return read_array(stage / "weights.npy")
