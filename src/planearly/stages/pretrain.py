"""Pretraining: rows of the generic corpus, drawn by the weights of their groups, to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from planearly import parallel, tensors
from planearly.data.streams import Followed, Later, MixedStream, RowStream, Stream
from planearly.files import atomic_write, read_object, write_json
from planearly.model import flops, outside
from planearly.model.outside import AnyShape
from planearly.stages import checkpoint, corpus, training
from planearly.stages.folder import Run
from planearly.train import loop
from planearly.train.steps import (
    adapted_steps,
    branching_step,
    onset,
    planned_steps,
    rows_but_own,
    rows_per_step,
)
from planearly.train.trainable import Dense, Trainable

BEGUN = "begun.json"


@dataclass(frozen=True)
class Network:
    """What is pretrained instead of a dense model.

    Attributes:
        make: with fresh weights, or begun as the recipe's checkpoint.
        flops_per_step: beside those of its tokens.
        settings, inputs: what the result depends on beside what a dense model's does.
        stream: of its rows, in place of the one by the groups' weights.
    """

    make: Callable[[], Trainable]
    flops_per_step: float
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    stream: Callable[[], RowStream] | None = None


def pretrain(
    run: Run, name: str, packed: Path, weights: np.ndarray, *, domain: str | None = None,
    large: bool = False, inputs: Mapping[str, Path] | None = None,
    network: Network | None = None, share_of_steps: float = 1.0, begins: Path | None = None,
    tokens: int | None = None,
) -> Path:
    """Pretrain a model on generic rows drawn by ``weights``; folder with the weights.

    It begins as the recipe's checkpoint, if there is one.

    Args:
        name: of the pretraining, which methods may share.
        domain: that it is for alone, and whose own text takes ``pretrain.specialization_share`` of
            the rows, of those after ``pretrain.specialization_after`` of the steps; None: it is for
            every domain.
        network: in place of the dense model.
        share_of_steps: of the recipe's pretraining.
        begins: finished stage of the same first steps, which kept its state after them.
        tokens: of the pretraining (None: the recipe's).
    """
    recipe = run.recipe
    stage = f"{name}.{domain}" if domain else name
    shape = training.shape_of(run, large)
    share = recipe.pretrain.specialization_share if domain else 0.0
    batch_rows = rows_per_step(recipe.pretrain.step_tokens, recipe.context)
    steps = planned_steps(recipe, share_of_steps, tokens)
    begins_own = onset(recipe.pretrain, steps) if domain else 0
    values: dict[str, Any] = {
        "shape": shape.to_dict(), "train": training.train_settings(recipe.pretrain), "steps": steps,
        "seed": recipe.seed, "specialization_share": share,
        **({"specialization_after": begins_own} if begins_own else {}),
        **(network.settings if network else {}),
    }
    if share and domain:
        values["spec_tokens"] = recipe.spec_tokens
        inputs = {**(inputs or {}), "domain": corpus.domain(run, domain)}
    origin = checkpoint.checkpoint(run, large)
    values |= training.rate_settings(recipe, shape, origin)
    if origin:
        inputs = {**(inputs or {}), "start": origin}
    inputs = {"rows": packed, **(network.inputs if network else {}), **(inputs or {})}
    # what a domain draws depends on how much: pretrainings for it have no steps in common
    others = {planned_steps(recipe, share_of_steps, budget)
              for budget in ([] if domain else recipe.pretrain.branch_tokens)}

    def build(folder: Path) -> dict[str, Any]:
        for longer in sorted(n for n in others if n > steps):
            of_it = {**values, "steps": longer}
            for each in (of_it, *training.same_settings(of_it, recipe.pretrain)):
                sibling = run.folder(f"pretrain/{stage}", each, inputs)
                fits = each is of_it or training.as_precise(recipe.pretrain)(sibling)
                if not parallel.first_process(fits)[0]:  # for all: branching off is together
                    continue
                if at := branching_step(recipe.pretrain.optimizer, longer, steps):
                    begin_at(sibling, at, folder)
        if begins:
            begin_at(begins, adapted_steps(recipe)[0], folder)
        begun = begun_in(folder) if (folder / BEGUN).exists() else None
        branches = {branching_step(recipe.pretrain.optimizer, steps, n) for n in others}
        model = network.make() if network else dense(run, shape, origin)
        generic = stream_of(run, packed, weights, network)
        stream: Stream = generic
        if share and domain:
            own, held = training.domain_stream(run, domain)
            at = begins_own * batch_rows
            training.tell_own_passes("pretrain.specialization_share", share,
                                     share * (steps * batch_rows - at), held)
            mixed = MixedStream([Later(generic, -at), own], [1 - share, share], recipe.seed)
            stream = Followed(generic, Later(mixed, at), at)
        outcome = loop.train(
            model, stream, steps, recipe.pretrain, folder, name=stage, branches=branches - {0},
            optimizer=training.rates(recipe, steps, shape, origin), narrow=training.narrow)
        drawn = generic.sampler.counts(
            rows_but_own(recipe, steps) if domain else steps * batch_rows)
        return {
            "method": name, "domain": domain, "shape": shape.to_dict(), "large": large,
            "cost": training.book(run, stage, outcome, per_token(shape, network, outcome)),
            **({"begun": begun} if begun else {}),
            "epochs": epochs(drawn, generic.sampler.rows_per_group),
        }

    return run.stage(f"pretrain/{stage}", values, inputs, build, every_rank=True,
                     same=training.same_settings(values, recipe.pretrain),
                     fits=training.as_precise(recipe.pretrain))


def dense(run: Run, shape: AnyShape, origin: Path | None) -> Dense:
    """A dense model to pretrain: fresh, or the recipe's checkpoint ``origin``."""
    return Dense(training.load_model(origin) if origin
                      else outside.build(shape, run.recipe.seed))


def stream_of(run: Run, packed: Path, weights: np.ndarray, network: Network | None) -> RowStream:
    """The generic rows of a pretraining."""
    return network.stream() if network and network.stream \
        else training.generic_stream(run, packed, weights)


def per_token(shape: AnyShape, network: Network | None, outcome: loop.Outcome) -> float:
    """FLOPs of a pretraining by its tokens, what a network does once a step among them."""
    extra = network.flops_per_step * outcome.steps / outcome.tokens if network else 0.0
    return flops.training(shape) + extra


def begin_at(other: Path, step: int, folder: Path,
             become: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> None:
    """Begin the run in ``folder`` with the state that another one kept after a step, if it did.

    The rows and rates until then are the same, so the result is what a run of its own would give.
    Its cost counts the shared steps too; ``begun.json`` tells what of it is the other's. A run that
    has begun is left alone.

    Args:
        become: makes of the tensors of that state those of another model's.
    """
    kept = loop.branch_file(other, step)
    parallel.barrier()
    taken = any((folder / name).exists() for name in (loop.CHECKPOINT, loop.OUTCOME))
    if parallel.rank() == 0 and kept.exists() and not taken:
        state, note = tensors.load_tensors(kept)
        before = note["outcome"]
        write_json(folder / BEGUN, {"at_step": step, "from": other.name,
                                    "tokens": before["tokens"],
                                    "device_hours": before["seconds"] * parallel.world() / 3600,
                                    "saving_hours": before.get("saving_seconds", 0.0)
                                    * parallel.world() / 3600,
                                    "clock_hours": before.get("clock_seconds", before["seconds"])
                                    / 3600})
        with atomic_write(folder / "metrics.jsonl") as handle:
            handle.write((other / "metrics.jsonl").read_bytes())
        tensors.save_tensors(folder / loop.CHECKPOINT, become(state) if become else state, note)
    parallel.barrier()


def begun_in(folder: Path) -> dict[str, Any]:
    """What :func:`begin_at` noted in the folder of a training that begins as another one.

    Raises:
        Damaged: the note holds something else.
    """
    found = read_object(folder / BEGUN, "from", "tokens", "device_hours")
    return {"saving_hours": 0.0,  # which older ones do not tell
            "clock_hours": found["device_hours"] / parallel.world(), **found}


def epochs(drawn: np.ndarray, available: np.ndarray) -> dict[str, Any]:
    """How often the rows of each group were passed over."""
    passes = drawn / np.maximum(available, 1)
    return {"mean": float(drawn.sum() / available.sum()), "most": float(passes.max()),
            "rows_drawn": drawn.tolist(), "rows_available": available.tolist()}
