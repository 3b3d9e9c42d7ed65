"""Which trainings the cells of a grid share, and which of its pretrainings begin as longer ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planearly.keys import Recipe
from planearly.plan import predict
from planearly.study.grid import Cell
from planearly.train import steps

GENERIC = {"slm": ("slm",), "slm-d": ("slm", "llm"), "llm": ("llm",), "llm-lora": ("llm",),
           "slm-pn": ("slm-pn",), "slm-mix": ("slm-mix",)}
"""Pretrainings of a method on the generic corpus as it is. Those of the other methods draw by
weights that follow from the budget, so theirs of two budgets have no step in common."""
_LATER = ("finetune.", "lora.", "distill.", "expert", "projected.tune_vector")
"""Beginnings of the keys that a pretraining does not depend on."""
_OF_METHOD = {"importance.": ("slm-is", "slm-top"), "selection.": ("slm-dsir", "slm-knn"),
              "projected.": ("slm-pn",), "mixture.": ("slm-mix",), "large.": ("llm",),
              "spec_tokens": predict.SELECTORS, "cluster.embedder": (*predict.SELECTORS, "slm-pn",
                                                                     "slm-mix"),
              "pretrain.specialization_share": predict.SELECTORS}
"""Beginnings of the keys that only some pretrainings depend on."""


def identity(stage: str, cell: Cell) -> dict[str, Any]:
    """A training's name, ``pretrain/slm`` say, and the values of the grid that it depends on."""
    kind, _, rest = stage.partition("/")
    method = rest.partition(".")[0]

    def matters(key: str) -> bool:
        if kind != "pretrain":
            return True
        if key.startswith(_LATER):
            return False
        return all(method in of for start, of in _OF_METHOD.items() if key.startswith(start))

    return {"stage": stage, **{key: value for key, value in cell.settings.items() if matters(key)}}


def longer(name: str, cell: Cell, cells: Iterable[Cell]) -> list[Cell]:
    """Cells with a pretraining that ``cell``'s of this name may branch off, the longest first."""
    def alike(of: Cell) -> dict[str, Any]:
        return {**identity(f"pretrain/{name}", of), "pretrain_tokens": None}

    own, wanted = cell.variant.recipe, alike(cell)
    assert own is not None
    found = [(other.variant.recipe.pretrain_tokens, other) for other in cells
             if other.variant.recipe and name in GENERIC.get(other.method, ())
             and alike(other) == wanted and _shared(name, own, other.variant.recipe)]
    return [other for _, other in sorted(found, key=lambda one: one[0], reverse=True)]


def begun(stage: str, cell: Cell, cells: Iterable[Cell]) -> float:
    """Share of a training's tokens that it takes over from a longer one among ``cells``."""
    kind, _, name = stage.partition("/")
    own = cell.variant.recipe
    if kind != "pretrain" or own is None:
        return 0.0
    return max((_shared(name, own, other.variant.recipe) for other in longer(name, cell, cells)
                if other.variant.recipe), default=0.0)


def _shared(name: str, shorter: Recipe, longer: Recipe) -> float:
    """Share of its steps that the shorter pretraining has in common with the longer."""
    part = 1 / shorter.mixture.experts if name == "slm-mix" else 1.0  # of a middling expert
    own = steps.planned_steps(shorter, part)
    return steps.branching_step(
        shorter.pretrain.optimizer, steps.planned_steps(longer, part), own) / own
