"""The cells of a study: methods x domains x values of recipe keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from planearly import config, keys, methods
from planearly.errors import UserError
from planearly.files import digest
from planearly.keys import Recipe
from planearly.plan import sizes


@dataclass(frozen=True)
class Variant:
    """The study's recipe with the values of some keys; cells of one variant share everything."""

    changes: tuple[tuple[str, Any], ...]
    recipe: Recipe | None
    """None where it cannot work."""
    reason: str = ""
    """Why not."""


@dataclass(frozen=True)
class Cell:
    """One method on one domain with one set of values."""

    method: str
    domain: str
    variant: Variant
    settings: dict[str, Any]
    """The values of every key that the grid varies anywhere."""

    @property
    def name(self) -> str:
        changed = ", ".join(f"{key}={value}" for key, value in self.variant.changes)
        return f"{self.method} on {self.domain}" + (f" ({changed})" if changed else "")

    @property
    def id(self) -> str:
        return f"{self.method}.{self.domain}-{digest(self.settings)[:8]}"


def check(recipe: Recipe) -> None:
    """Refuse what is no grid, whatever the domains.

    Raises:
        UserError: there is none, a block without methods or with one that there is not, or that
            varies what is no setting or gives it no values; or ``study.main`` or
            ``study.equal_compute`` names a method that the grid lacks.
    """
    if not recipe.study.grid:
        raise UserError("the recipe has no 'study.grid': list blocks of 'methods', 'domains' and "
                        "'over' in it, as in the recipe study-smoke")
    for number, block in enumerate(recipe.study.grid):
        _check_block(recipe, block, _place(number))
    listed = {method for block in recipe.study.grid for method in block.methods}
    for key, named in (("main", recipe.study.main),
                       *(("equal_compute", one) for one in recipe.study.equal_compute)):
        for method in sorted(named.keys() - listed):
            raise UserError(f"recipe key 'study.{key}' names '{method}', which no block of "
                            "'study.grid' has: list it there, or leave it out")


def _place(number: int) -> str:
    return f"recipe key 'study.grid' (block {number + 1})"


def _check_block(recipe: Recipe, block: keys.Block, place: str) -> None:
    if not block.methods:
        raise UserError(f"{place} names no methods: list some, as in 'methods: [slm, slm-is]'")
    _known(block.methods, list(methods.TABLE), f"{place} names the method")
    for key, values in block.over.items():
        config.value_of(recipe, key)  # a misspelt key is no impossible cell
        if key not in config.places() or key.startswith("study.") or key in _NO_SETTINGS:
            raise UserError(f"{place} varies '{key}' under 'over', which is no setting of one "
                            "cell: name a key of numbers or words, as pretrain_tokens or "
                            "model.layers; methods and domains have lists of their own")
        if not values:
            raise UserError(f"{place} gives '{key}' no values: list some, or leave the key out")


_NO_SETTINGS = ("name", "methods", "domains", "engine", "processes", "track", "bundle")
"""Recipe keys that say nothing of one cell alone."""


def _known(names: list[str], known: list[str], what: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.3)
            raise UserError(f"{what} '{name}'; " + (f"did you mean '{near[0]}'?" if near
                                                    else f"known are {', '.join(known)}"))


def cells(recipe: Recipe, domains: list[str]) -> list[Cell]:
    """The cells of ``recipe.study.grid`` in its order, each once.

    Args:
        domains: names of the domains that the recipe has.

    Raises:
        UserError: no grid, an unknown domain or method, or a key that no recipe has.
    """
    check(recipe)
    blocks = [(number, part) for number, block in enumerate(recipe.study.grid)
              for part in _at_main_budgets(recipe, block)]
    keys = list(dict.fromkeys(key for _, block in blocks for key in block.over))
    found: dict[str, Cell] = {}
    for number, block in blocks:
        _known(block.domains, domains, f"{_place(number)} names the domain")
        for variant in variants(recipe, block):
            of = variant.recipe or recipe
            settings = {key: config.value_of(of, key) for key in keys} | (
                {} if variant.recipe else dict(variant.changes))
            for method, domain in product(block.methods, block.domains or domains):
                cell = Cell(method, domain, variant, settings)
                found.setdefault(cell.id, cell)
    made = [(methods.TABLE[cell.method], cell.variant.recipe) for cell in found.values()
            if cell.variant.recipe]
    budgets = sorted({of.pretrain_tokens for _, of in made} | {
        of.distill.teacher_tokens for row, of in made if row.taught and of.distill.teacher_tokens})
    return [replace(cell, variant=_among(cell.variant, budgets)) for cell in found.values()]


def _among(variant: Variant, budgets: list[int]) -> Variant:
    """The variant, its pretraining told which others may share its stable phase."""
    if variant.recipe is None:
        return variant
    pretrain = replace(variant.recipe.pretrain, branch_tokens=budgets)
    return replace(variant, recipe=replace(variant.recipe, pretrain=pretrain))


def _at_main_budgets(recipe: Recipe, block: keys.Block) -> list[keys.Block]:
    """The block, divided by its methods' tokens of pretraining where the study names such."""
    main = recipe.study.main
    if "pretrain_tokens" in block.over or not main.keys() & set(block.methods):
        return [block]
    parts: dict[int, list[str]] = {}
    for method in block.methods:
        parts.setdefault(main.get(method, recipe.pretrain_tokens), []).append(method)
    return [keys.Block(named, block.domains, {**block.over, "pretrain_tokens": [tokens]})
            for tokens, named in parts.items()]


def variants(recipe: Recipe, block: keys.Block) -> Iterator[Variant]:
    """The recipes of a block; keys with their own recipe's value are no change."""
    for values in product(*block.over.values()):
        changes = dict(zip(block.over, values, strict=True))
        try:
            made = sizes.settled(config.variant(recipe, changes))
        except UserError as error:
            yield Variant(tuple(changes.items()), None, str(error))
            continue
        real = {key: config.value_of(made, key) for key in changes}
        yield Variant(tuple((key, value) for key, value in real.items()
                            if value != config.value_of(recipe, key)), made)


def key_of(variant: Variant) -> str:
    """What tells variants apart."""
    return json.dumps(variant.changes, sort_keys=True, default=str)
