"""The checkpoints that a recipe's models begin as: ``start`` and ``large_start``.

A checkpoint takes the place of fresh weights. Its folder gives the model's shape and, unless
``tokenizer.path`` is set, the tokenizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planearly import methods, storage
from planearly.errors import UserError, refused
from planearly.files import expanded
from planearly.keys import Recipe
from planearly.methods import Method
from planearly.model import outside, reading
from planearly.model.outside import AnyShape, Configured
from planearly.model.projected import check_dense_start
from planearly.progress import say

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Files of a repository that a model folder is made of: no code, nothing pickled."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def as_it_is(row: Method) -> bool:
    """Whether a method can fine-tune a checkpoint without pretraining of its own."""
    return not (row.needs_domain or row.experts or row.taught)


def folder(recipe: Recipe, large: bool = False) -> Path | None:
    """Where the small (or large) model begins; None: with fresh weights."""
    name = recipe.large_start if large else recipe.start
    return located(name) if name else None


def hub_name(name: str) -> str | None:
    """The name of a model on the hub; None: ``name`` is a folder's."""
    asked = name.removeprefix("hf://")
    if _HUB.fullmatch(asked) and (asked != name or not expanded(name).exists()):
        return asked
    return None


def located(name: str) -> Path:
    """The folder of a model: its place on this machine, or of ``organisation/model[@revision]`` of
    the hub or of a URL (:mod:`planearly.storage`) that of a copy, fetched once.

    What was fetched before is taken as it is, without asking: a run goes on with the commit that it
    began with, and without a network.

    Raises:
        UserError: the hub or store has no such model, does not give it, or cannot be reached.
    """
    hub = hub_name(name)
    return _fetched(hub) if hub else storage.local(name, WANTED)


@functools.lru_cache
def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted: dict[str, Any] = {"repo_id": repository, "revision": revision or None,
                              "allow_patterns": [*WANTED]}
    try:
        found = Path(snapshot_download(**wanted, local_files_only=True))
        reading.weight_files(found)  # raises where a fetch was interrupted
        if all((found / name).is_file() for name in ("config.json", "tokenizer.json")):
            return found
    except (OSError, ValueError, UserError):  # not here yet, or not whole: the hub is asked
        pass
    say(f"fetching the model '{repository}' from the hub")
    with refused(f"there is no folder '{name}', and no model of that name could be fetched from "
                 "the hub"):
        return Path(snapshot_download(**wanted))


def folders(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The checkpoints of a recipe, by the keys that name them."""
    for place, large in (("start", False), ("large_start", True)):
        if found := folder(recipe, large):
            yield place, found


def shape(recipe: Recipe, large: bool = False) -> AnyShape | None:
    """Shape of the checkpoint, at the recipe's context; None where there is none."""
    found = folder(recipe, large)
    return outside.shape_in(found, recipe.context) if found else None


def check_folder(place: str, model: Path, context: int) -> None:
    """Refuse a folder that cannot hold a model for a recipe.

    Args:
        place: the recipe key that names it.

    Raises:
        UserError: it lacks the configuration, the tokenizer or the weights, has quantized ones, or
            reads less text.
    """
    try:
        reach = reading.config(model).get("max_position_embeddings")
        reading.check_weights(model)
    except UserError as error:
        raise UserError(f"recipe key '{place}': {error}") from None
    if not (model / "tokenizer.json").is_file():
        raise UserError(f"recipe key '{place}': {model} has no tokenizer.json: copy the model "
                        "again, whole, or write it there by save_pretrained of transformers")
    if isinstance(reach, int) and reach < context:
        raise UserError(f"recipe key '{place}': the model in {model} reads {reach} tokens, fewer "
                        f"than 'context', {context}: set 'context={reach}' or less")


def check(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        UserError: no model folder, no causal model, or a recipe that has no use for it.
    """
    for place, model in folders(recipe):
        if recipe.bundle:
            raise UserError(f"recipe key '{place}' goes with a pretraining, and 'bundle' is one "
                            "that is done: leave one of them out")
        check_folder(place, model, recipe.context)
        outside.shape_in(model, recipe.context)
    for method in recipe.methods:
        row = methods.find(method)
        start = getattr(recipe, row.start)
        if start and row.bank and isinstance(found := shape(recipe, row.large), Configured):
            raise UserError(f"recipe key '{row.start}': {method} trains experts of planearly's own "
                            f"Llama or Arcee model, which cannot hold a '{found.kind}': leave "
                            f"{method} out, or '{row.start}'")
        if start and row.bank == "projected":
            check_dense_start(recipe.projected)
        if recipe.pretrain_tokens:
            continue
        if not as_it_is(row):
            able = [name for name, other in methods.TABLE.items() if as_it_is(other)]
            raise UserError(f"recipe key 'pretrain_tokens' is 0, but {method} has to pretrain; "
                            f"only {', '.join(able)} can fine-tune a checkpoint as it is")
        if not start:
            raise UserError(f"recipe key 'pretrain_tokens' is 0: {method} then needs '{row.start}',"
                            " the checkpoint to fine-tune")


def tokenizer_source(recipe: Recipe) -> Path | None:
    """The model folder whose tokenizer the run takes; None where a checkpoint does not say."""
    if recipe.tokenizer.path is not None:
        return None
    return folder(recipe) or folder(recipe, large=True)
