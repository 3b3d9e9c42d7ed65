"""The methods of the comparison, each in terms of the stages (paper, section 3).

What methods share (a pretraining, a clustering) is a stage of one name, so it is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from planearly.errors import UserError
from planearly.run import Run, facts, once
from planearly.stages import groups, training
from planearly.stages.results import Trained


@dataclass(frozen=True)
class Method:
    """How a method gets to a model for a domain."""

    pretrain: Callable[[Run, str], Path | None]
    """Folder of the pretrained model; None where nothing is pretrained."""
    specialize: Callable[[Run, str], Trained]
    """Pretrains if that is not done yet, and fine-tunes."""
    weighs: bool = False
    """Whether it draws the generic corpus by the domain's cluster weights."""


@once
def pretrained_slm(run: Run, domain: str = "") -> Path:
    """A small model on the generic corpus as it is; the same for every domain."""
    packed = groups.rows(run, groups.finest(run))
    return training.pretrain(run, "slm", packed, groups.generic_weights(packed))


def slm(run: Run, domain: str) -> Trained:
    """Generic pretraining, fine-tuning."""
    base = pretrained_slm(run)
    tuned = training.specialize(run, f"slm.{domain}", domain, base)
    return Trained("slm", domain, base, tuned, [base], [tuned])


@once
def pretrained_is(run: Run, domain: str) -> Path:
    """A small model on the generic corpus resampled to look like the domain."""
    weights = groups.importance_weights(run, domain)
    return training.pretrain(
        run, f"slm-is.{domain}", groups.rows(run, facts(weights)["k"]),
        training.weights_of(weights), inputs={"weights": weights}, mixed_with=domain,
    )


def slm_is(run: Run, domain: str) -> Trained:
    """Cluster importance sampling, fine-tuning."""
    base = pretrained_is(run, domain)
    tuned = training.specialize(run, f"slm-is.{domain}", domain, base)
    k = facts(groups.importance_weights(run, domain))["k"]
    return Trained("slm-is", domain, base, tuned, [], [base, tuned], notes={"k": k})


METHODS: dict[str, Method] = {
    "slm": Method(pretrained_slm, slm),
    "slm-is": Method(pretrained_is, slm_is, weighs=True),
}


def check_methods(names: list[str]) -> None:
    """Refuse a method that does not exist, before anything runs."""
    for name in names:
        if name not in METHODS:
            raise UserError(f"recipe key 'methods' names '{name}'; known are {', '.join(METHODS)}")
