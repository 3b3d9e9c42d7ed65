"""Which trainings the cells of a grid share, and which of its pretrainings begin as longer ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planearly import methods
from planearly.keys import Recipe
from planearly.study.grid import Cell
from planearly.train import steps

_LATER = ("finetune.", "expert", "projected.tune_vector")
"""Beginnings of the keys that come after a pretraining, unless it begins as a chosen expert."""
_ELSEWHERE = ("lora.", "distill.")
"""Beginnings of the keys that no pretraining depends on, but for :data:`_TEACHERS`."""
_TEACHERS = "distill.teacher_tokens"
"""What a teacher's pretraining depends on."""


def generic(method: str) -> list[str]:
    """Names of a method's pretrainings on the generic corpus as it is, a teacher's among them.

    Those of the other methods draw by weights that follow from the budget, so theirs of two budgets
    have no step in common.
    """
    row = methods.TABLE.get(method)
    if row is None or not row.pretrains or row.needs_domain:
        return []
    return [row.pretraining(), *([methods.teacher().pretraining()] if row.taught else [])]


def pretraining_depends(name: str, key: str, draws: str | None = None) -> bool:
    """Whether the pretraining of a method, its teacher's included, depends on a recipe key.

    Args:
        name: of the method, or of the pretraining that methods share or adapt from.
        draws: what the recipe says of how methods adapt, ``adapt.draws``; None: nothing.
    """
    base = name.removesuffix(methods.PLATEAU)
    row = methods.TABLE.get(base)
    if row is None:
        return True
    if base != name and key == "adapt.share":
        return True
    if row.taught and (key == _TEACHERS or pretraining_depends(methods.teacher().name, key)):
        return True
    row = methods.drawing(row, draws)
    ways = {row.draws, row.adapts} - {None, methods.GENERIC}
    only = {"importance.": row.weighs, "selection.": bool(ways - {"importance", "top"}),
            "projected.": row.bank == "projected", "mixture.": row.bank == "mixture",
            "adapt.": row.adapts is not None, "large.": row.large, "expert": row.experts,
            "spec_tokens": row.needs_domain, "pretrain.specialization_": row.per_domain,
            "cluster.embedder": row.needs_domain or row.experts}
    # adapting an expert comes after choosing it, which may take a fine-tuning; scoring, after one
    tuned = (row.bank and row.adapts) or row.scored
    later = _ELSEWHERE if tuned else (*_ELSEWHERE, *_LATER)
    return row.pretrains and not key.startswith(later) and all(
        of for start, of in only.items() if key.startswith(start))


def depends(name: str, key: str, draws: str | None = None) -> bool:
    """Whether a method depends on a recipe key anywhere, fine-tuning included; arguments as of
    :func:`pretraining_depends`."""
    row = methods.TABLE.get(name)
    if row is None or pretraining_depends(name, key, draws):
        return True
    only = {"finetune.": True, "spec_tokens": True, "lora.": row.tune == "lora",
            "model.": not row.pretrains,
            "distill.": row.taught, "expert": row.experts,
            "projected.tune_vector": row.bank == "projected"}
    return any(of for start, of in only.items() if key.startswith(start))


def identity(stage: str, cell: Cell) -> dict[str, Any]:
    """A training's name, ``pretrain/slm`` say, and the values of the grid that it depends on."""
    kind, _, rest = stage.partition("/")
    of = cell.variant.recipe
    draws = of.adapt.draws if of else None
    # slices and steps may be chosen by the tokens, as the grid does not tell
    settings = {**({"projected.rank": of.projected.rank,
                    "pretrain.batch_tokens": of.pretrain.batch_tokens} if of else {}),
                **cell.settings}
    name = rest.partition(".")[0]
    if of:
        settings["pretrain_tokens"] = _tokens(name, cell.method, of)
    if (row := methods.TABLE.get(name)) and not row.taught:
        settings.pop(_TEACHERS, None)
    return {"stage": stage, **{
        key: value for key, value in settings.items()
        if kind != "pretrain" or pretraining_depends(name, key, draws)}}


def teacher_tokens(name: str, method: str, of: Recipe) -> int | None:
    """Tokens of the pretraining of this name that a method needs, where they are not the recipe's:
    those of its teacher."""
    row = methods.TABLE.get(method)
    return of.distill.teacher_tokens if (
        row and row.taught and name == methods.teacher().pretraining()) else None


def _tokens(name: str, method: str, of: Recipe) -> int:
    return teacher_tokens(name, method, of) or of.pretrain_tokens


class Pretrainings:
    """Which pretrainings of a grid's cells begin as longer ones, or as what others adapt from."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._alike: dict[str, list[Cell]] = {}
        self._plateaus: set[str] = set()
        for cell in cells:
            row = methods.TABLE.get(cell.method)
            if row is None or cell.variant.recipe is None:
                continue
            for name in generic(cell.method):
                self._alike.setdefault(_but_tokens(name, cell), []).append(cell)
            if row.adapts:
                self._plateaus.add(_plateau(row, cell))

    def longer(self, name: str, cell: Cell) -> list[Cell]:
        """Cells with a pretraining that ``cell``'s of this name may branch off, the longest
        first."""
        own = cell.variant.recipe
        assert own is not None
        tokens = _tokens(name, cell.method, own)
        found = [(longer, other) for longer, other in self._others(name, cell)
                 if _shared(name, own, tokens, longer)]
        return [other for _, other in sorted(found, key=lambda one: one[0], reverse=True)]

    def begun(self, stage: str, cell: Cell) -> float:
        """Share of a training's tokens that it takes over from a longer one, or from the plateau
        that another method adapts from."""
        kind, _, name = stage.partition("/")
        own = cell.variant.recipe
        if kind != "pretrain" or own is None:
            return 0.0
        tokens = _tokens(name, cell.method, own)
        shares = [_shared(name, own, tokens, longer)
                  for longer in {longer for longer, _ in self._others(name, cell)}]
        if any(_plateau(row, cell) in self._plateaus for row in methods.TABLE.values()
               if row.adapts and row.base == name):
            shares.append(steps.adapted_steps(own)[0] / steps.planned_steps(own))
        return max(shares, default=0.0)

    def _others(self, name: str, cell: Cell) -> list[tuple[int, Cell]]:
        """The tokens of the cells' pretrainings that are as this one but for them."""
        return [(_tokens(name, other.method, other.variant.recipe), other)
                for other in self._alike.get(_but_tokens(name, cell), []) if other.variant.recipe]


def _but_tokens(name: str, cell: Cell) -> str:
    """What a pretraining depends on beside its own number of tokens."""
    return str({**identity(f"pretrain/{name}", cell), "pretrain_tokens": None})


def _plateau(row: methods.Method, cell: Cell) -> str:
    """What a pretraining depends on that a method adapts from."""
    return str(identity(f"pretrain/{row.plateau}", cell))


def _shared(name: str, recipe: Recipe, shorter: int, longer: int) -> float:
    """Share of its steps that a pretraining of so many tokens has in common with a longer one."""
    row = methods.TABLE.get(name)
    part = 1 / recipe.mixture.experts if row and row.bank == "mixture" else 1.0  # of one expert
    own = steps.planned_steps(recipe, part, shorter)
    return steps.branching_step(
        recipe.pretrain.optimizer, steps.planned_steps(recipe, part, longer), own) / own
