"""How many optimiser steps a training takes, and where two of them part.

Pretraining and fine-tuning (:mod:`planearly.stages`), their forecasts (:mod:`planearly.plan`,
:mod:`planearly.study`) and the cost model count steps by these functions alone.
"""

from __future__ import annotations

import math

from planearly import keys
from planearly.train import optim, schedule

FINETUNE_STEPS = {1_000_000: 2_000, 8_000_000: 4_000, 64_000_000: 30_000}
"""Most steps of fine-tuning by tokens of the specialization set (paper, section 4)."""
_REACH = {1_000_000: 2.8e6, 8_000_000: 22.6e6}
"""Sets of up to so many tokens go with this size: the nearest in ratio."""


def rows_per_step(batch_tokens: int, context: int) -> int:
    """Rows of ``context`` tokens in an optimiser step: at least one."""
    return max(batch_tokens // context, 1)


def planned_steps(recipe: keys.Recipe, share: float = 1.0, tokens: int | None = None) -> int:
    """Steps of pretraining.

    Args:
        share: of the recipe's pretraining that is meant, such as one expert's of a mixture.
        tokens: of pretraining (default: the recipe's).
    """
    per_step = rows_per_step(recipe.pretrain.step_tokens, recipe.context) * recipe.context
    return max(round(max((tokens or recipe.pretrain_tokens) // per_step, 1) * share), 1)


def planned_rows(recipe: keys.Recipe, tokens: int | None = None) -> int:
    """Rows that pretraining draws; arguments as of :func:`planned_steps`."""
    per_step = rows_per_step(recipe.pretrain.step_tokens, recipe.context)
    return planned_steps(recipe, tokens=tokens) * per_step


def generic_rows(recipe: keys.Recipe) -> int:
    """Rows that a pretraining for one domain draws of the generic corpus: all but those of the
    domain's own text."""
    return rows_but_own(recipe, planned_steps(recipe))


def rows_but_own(recipe: keys.Recipe, steps: int) -> int:
    """As :func:`generic_rows`, of a pretraining of so many steps."""
    per_step = rows_per_step(recipe.pretrain.step_tokens, recipe.context)
    before = onset(recipe.pretrain, steps) * per_step
    return before + round((steps * per_step - before) * (1 - recipe.pretrain.specialization_share))


def onset(pretrain: keys.Pretrain, steps: int) -> int:
    """Steps of a pretraining for one domain before the first with rows of the domain's own text."""
    return round(steps * pretrain.specialization_after) if pretrain.specialization_share else 0


def adapted_steps(recipe: keys.Recipe) -> tuple[int, int]:
    """Steps of pretraining before a method adapts to a domain, and those in which it does."""
    steps = planned_steps(recipe)
    rate = optim.resolve(recipe.pretrain.optimizer, steps)
    if recipe.adapt.share is None:
        before = schedule.stable(rate.schedule, steps, rate.decay_share)
    else:
        before = steps - round(steps * recipe.adapt.share)
    return before, steps - before


def branching_step(optimizer: keys.Optimizer, longer: int, shorter: int) -> int:
    """Step at which a run of ``shorter`` steps parts from one of ``longer``; 0: they share none.

    The last step is always the shorter one's own: there it tells its loss.
    """
    rate, other = optim.resolve(optimizer, longer), optim.resolve(optimizer, shorter)
    if shorter >= longer or rate != other:
        return 0
    return min(schedule.stable(other.schedule, shorter, other.decay_share), shorter - 1)


def taught_share(recipe: keys.Recipe) -> float:
    """Share of generic rows where a student is taught on such text: ``finetune.replay_share``, or
    half."""
    return recipe.finetune.replay_share or 0.5


def own_rows(batch_rows: int, replayed: float) -> int:
    """Rows of a fine-tuning step that are the domain's own, ``replayed`` being the share of generic
    ones."""
    return max(round(batch_rows * (1 - replayed)), 1)


def finetune_limits(finetune: keys.Finetune, tokens: int, epoch_rows: int,
                    batch_rows: int, scratch: bool = False,
                    continued: bool = False) -> tuple[int, float]:
    """Most steps and the learning rate's factor for a specialization set.

    The paper's settings (its section 4): at 1M tokens a third of the rate and under 2k steps, at
    8M the base rate and at most 4k steps, at 64M 30k steps; sizes between go with the nearest in
    ratio. ``finetune.max_epochs`` bounds the steps of small sets. Training from ``scratch`` has the
    base rate, and passes of its own. The factor is 1 too where fine-tuning's section sets ``lr``
    and no ``lr_scale``, and where the model began as a checkpoint, whose rates are low already; of
    an ``embedding_lr`` that it sets, :func:`planearly.train.optim.resolve_finetuning` knows.

    Args:
        tokens: of the set.
        epoch_rows: rows that hold it once.
        batch_rows: of them in a step.
    """
    size = next((size for size, reach in _REACH.items() if tokens < reach), 64_000_000)
    limit = finetune.max_steps or FINETUNE_STEPS[size]
    factor = finetune.lr_scale
    if factor is None:
        small = optim.SMALL_SET_FACTOR[finetune.optimizer.preset]
        factor = small if size == 1_000_000 else 3 * small
        if continued or finetune.optimizer.lr is not None:
            factor = 1.0
    passes = finetune.scratch_epochs if scratch else finetune.max_epochs
    by_epochs = math.ceil(passes * epoch_rows / batch_rows)
    return max(min(limit, by_epochs), 1), 1.0 if scratch else factor
