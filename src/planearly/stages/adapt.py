"""Adaptation: the last part of a pretraining, made for every domain on text that looks like it.

Between the paper's two ends, all pretraining before the domain is known (SLM, SLM-pn) and all of it
after (SLM-is), lies this: one plain pretraining at a constant rate, and from its whole state one
decay per domain. The first part is paid once, C(N) = (1 - a) P + N a P with ``adapt.share`` a.
Branching off the stable phase is what warm-up-stable-decay is made for (Hu et al. 2024); the rows
after the branch are those of cluster importance sampling (paper, section 3), of a selector, or
those with which plain pretraining would go on, as ``adapt.draws`` says. Where the first part is a
projected network's, the domain's expert goes on as a dense model, with the optimiser's state of
what it shares with the network. Why: docs/decisions.md, "Adaptation branches off the plateau".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from planearly import keys, methods, parallel, tensors
from planearly.data.streams import Later, MixedStream, Stream
from planearly.errors import UserError
from planearly.methods import Method
from planearly.model import flops
from planearly.stages import checkpoint, corpus, training
from planearly.stages.folder import Run
from planearly.stages.pretrain import (
    Network,
    begin_at,
    begun_in,
    dense,
    epochs,
    per_token,
    stream_of,
)
from planearly.train import loop, optim, state
from planearly.train.steps import adapted_steps, planned_steps, rows_per_step

if TYPE_CHECKING:
    from planearly.stages.trained import Drawn


def check(recipe: keys.Recipe, row: Method) -> None:
    """Refuse shares that cannot be.

    Raises:
        UserError: the first part would reach into the decay of the learning rate, or is to train
            experts and has no step; or the rows of adaptation are all taken by the domain's own
            text and replay, or generic twice.
    """
    adapt, optimizer = recipe.adapt, optim.resolve(recipe.pretrain.optimizer, planned_steps(recipe))
    if optimizer.schedule == "cosine":
        raise UserError("recipe key 'pretrain.optimizer.schedule' is cosine, which has no part at "
                        "a constant rate to adapt from: choose wsd")
    if adapt.share is not None and optimizer.schedule == "wsd" and (
            adapt.share < optimizer.decay_share):
        raise UserError(f"recipe key 'adapt.share' is {adapt.share:g}, less than the "
                        f"{optimizer.decay_share:g} in which the rate decays "
                        "('pretrain.optimizer.decay_share'): adaptation begins before the decay")
    if adapt.share is None and optimizer.schedule != "wsd":
        raise UserError("recipe key 'adapt.share' is null, which takes the decay of the schedule "
                        f"wsd, and 'pretrain.optimizer.schedule' is {optimizer.schedule}: give a "
                        "share")
    if row.bank and not adapted_steps(recipe)[0]:
        raise UserError(f"'adapt.share' and 'pretrain_tokens' leave {row.name} no step before it "
                        "adapts, to train its experts in: give a smaller share or more tokens")
    if adapt.specialization_share + adapt.replay_share >= 1:
        raise UserError("recipe keys 'adapt.specialization_share' and 'adapt.replay_share' come to "
                        f"{adapt.specialization_share + adapt.replay_share:g}, which leaves no row "
                        "to text that looks like the domain: lower one of them, or set "
                        f"'adapt.draws' to {methods.GENERIC}")
    if adapt.draws == methods.GENERIC and adapt.replay_share:
        raise UserError(f"recipe key 'adapt.replay_share' is {adapt.replay_share:g}, and "
                        f"'adapt.draws={methods.GENERIC}' draws the generic corpus as it is already"
                        ": leave one of them out")


def unread(recipe: keys.Recipe, names: Iterable[str]) -> str:
    """A warning where ``pretrain.specialization_share`` asks methods that adapt for the domain's
    own text, which they have by a key of their own; "" where there is none to give."""
    share, own = recipe.pretrain.specialization_share, recipe.adapt.specialization_share
    names = [name for name in names if methods.find(name).adapts]
    if not share or own or not names:
        return ""
    return (f"warning: recipe key 'pretrain.specialization_share' is {share:g}, which "
            f"{' and '.join(names)} do{'es' * (len(names) == 1)} not read: set "
            "'adapt.specialization_share' for the domain's own text in the part that adapts")


def rows_drawn(recipe: keys.Recipe) -> int:
    """Rows of adaptation that are drawn by ``adapt.draws``."""
    _, after = adapted_steps(recipe)
    return round(after * rows_per_step(recipe.pretrain.step_tokens, recipe.context)
                 * shares_of(recipe)[0])


def shares_of(recipe: keys.Recipe) -> list[float]:
    """Of the rows of adaptation: drawn by ``adapt.draws``, the domain's own text, plain replay."""
    own, replay = recipe.adapt.specialization_share, recipe.adapt.replay_share
    return [1 - own - replay, own, replay]


def adapting(recipe: keys.Recipe, pretraining: str) -> Method | None:
    """A method of the recipe or its study that adapts from a plateau of this pretraining."""
    named = {*recipe.methods, *(name for block in recipe.study.grid for name in block.methods)}
    rows = [methods.find(name) for name in sorted(named & methods.TABLE.keys())]
    return next((row for row in rows if row.adapts and row.base == pretraining), None)


def plateau(run: Run, row: Method, packed: Path, weights: np.ndarray,
            network: Network | None = None) -> Path | None:
    """The first part: plain pretraining at a constant rate, with its whole state kept.

    Its rows and rates are those of the method without adaptation, step by step. None where all
    steps are adaptation.

    Args:
        packed: stage of the rows that are drawn by ``weights``.
        network: in place of the dense model.
    """
    recipe = run.recipe
    before, _ = adapted_steps(recipe)
    steps = planned_steps(recipe)
    if not before:
        return None
    name = row.plateau
    shape = training.shape_of(run, row.large)
    origin = checkpoint.checkpoint(run, row.large)
    values = {"shape": shape.to_dict(), "train": training.train_settings(recipe.pretrain),
              "steps": before, "of": steps, "seed": recipe.seed,
              **(network.settings if network else {}),
              **training.rate_settings(recipe, shape, origin)}
    inputs = {"rows": packed, **(network.inputs if network else {}),
              **({"start": origin} if origin else {})}

    def build(folder: Path) -> dict[str, Any]:
        rate = training.rates(recipe, steps, shape, origin)
        if rate.schedule == "wsd":  # as it is before the decay
            rate = replace(rate, schedule="constant")
        model = network.make() if network else dense(run, shape, origin)
        stream = stream_of(run, packed, weights, network)
        outcome = loop.train(model, stream, before, recipe.pretrain, folder, name=name,
                             optimizer=rate, branches={before}, narrow=training.narrow)
        rows = rows_per_step(recipe.pretrain.step_tokens, recipe.context)
        return {"method": name, "domain": None, "shape": shape.to_dict(), "large": row.large,
                "cost": training.book(run, name, outcome, per_token(shape, network, outcome)),
                "epochs": epochs(stream.sampler.counts(before * rows),
                                 stream.sampler.rows_per_group)}

    return run.stage(f"pretrain/{name}", values, inputs, build, every_rank=True,
                     same=training.same_settings(values, recipe.pretrain),
                     fits=training.as_precise(recipe.pretrain))


def adapt(run: Run, row: Method, domain: str, base: Path | None,
          drawn: Drawn, generic: Drawn, expert: Path | None = None) -> Path:
    """The last part, on rows drawn for the domain, from where the first left off.

    Args:
        base: finished stage of :func:`plateau`; None where the first part has no step.
        drawn: what all rows but the domain's own and replay are drawn from, by ``row.adapts``.
        generic: what ``adapt.replay_share`` of the rows are drawn from.
        expert: finished stage with the domain's expert of ``base`` as a dense model.
    """
    recipe = run.recipe
    before, after = adapted_steps(recipe)
    steps = before + after
    rows = rows_per_step(recipe.pretrain.step_tokens, recipe.context)
    stage = f"{row.name}.{domain}"
    shape = training.shape_of(run, row.large)
    origin = checkpoint.checkpoint(run, row.large)
    shares, own_rows = shares_of(recipe), rows_drawn(recipe)
    # rows of the corpus as it is are those that the first part would go on with
    seen = before * rows if row.adapts == methods.GENERIC else 0
    values: dict[str, Any] = {
        "shape": shape.to_dict(), "train": training.train_settings(recipe.pretrain),
        "steps": [before, after], "seed": recipe.seed, "shares": shares,
        **training.rate_settings(recipe, shape, origin)}
    inputs = {"rows": drawn.rows, **drawn.inputs, **({"plateau": base} if base else {}),
              **({"expert": expert} if expert else {}), **({"start": origin} if origin else {})}
    if shares[1]:
        values["spec_tokens"] = recipe.spec_tokens
        inputs["domain"] = corpus.domain(run, domain)
    if shares[2]:
        inputs["replay"] = generic.rows

    def build(folder: Path) -> dict[str, Any]:
        if base:
            begin_at(base, before, folder, _materialised(expert) if expert else None)
        begun = begun_in(folder) if base else dict.fromkeys(
            ("tokens", "device_hours", "clock_hours", "saving_hours"), 0)
        own = training.generic_stream(run, drawn.rows, drawn.weights)
        streams: list[Stream] = [Later(own, -seen)]
        if shares[1]:
            text, held = training.domain_stream(run, domain)
            streams.append(text)
            training.tell_own_passes("adapt.specialization_share", shares[1],
                                     shares[1] * (steps - before) * rows, held)
        if shares[2]:
            streams.append(training.generic_stream(run, generic.rows, generic.weights))
        used = [share for share in shares if share]
        stream = MixedStream(streams, used, recipe.seed) if len(streams) > 1 else streams[0]
        model = dense(run, shape, None if base else origin)
        outcome = loop.train(model, Later(stream, before * rows), steps, recipe.pretrain, folder,
                             name=stage, optimizer=training.rates(recipe, steps, shape, origin),
                             narrow=training.narrow)
        paid = replace(
            outcome, tokens=outcome.tokens - int(begun["tokens"]),
            seconds=outcome.seconds - begun["device_hours"] * 3600 / parallel.world(),
            clock_seconds=outcome.clock_seconds - begun["clock_hours"] * 3600,
            saving_seconds=outcome.saving_seconds
            - begun["saving_hours"] * 3600 / parallel.world())
        counts = own.sampler.counts(seen + own_rows) - own.sampler.counts(seen)
        return {"method": row.name, "domain": domain, "shape": shape.to_dict(), "large": row.large,
                "cost": training.book(run, stage, paid, flops.training(shape)),
                "epochs": epochs(counts, own.sampler.rows_per_group)}

    return run.stage(f"pretrain/{stage}", values, inputs, build, every_rank=True,
                     same=training.same_settings(values, recipe.pretrain),
                     fits=training.as_precise(recipe.pretrain))


def _materialised(expert: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """From a projected network's state to that of an expert of it as a dense model: what they share
    keeps its moments, and the materialised matrices, which never had any, begin without."""
    weights = tensors.load_tensors(expert / loop.FINAL)[0]
    return lambda network: {**weights, **state.of_part(network, "body")}
