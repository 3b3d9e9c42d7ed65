"""The recipe that a run folder notes: whose the folder is, and what has changed since."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from planearly import config
from planearly.errors import UserError
from planearly.export import bundle as bundles
from planearly.files import atomic_write, is_utf8
from planearly.keys import Recipe
from planearly.progress import say

RECIPE, RESULTS, PAGE = "recipe.yaml", "results.json", "report.html"
"""What a run writes in its folder beside its stages; the recipe is written first."""
_OTHERS = {"bundle.json": "a bundle", "config.json": "a model"}
"""What a folder that holds a file of that name is."""
_CHOSEN = ("name", "methods", "study", "cost", "card")
"""Sections and keys that choose what is made, or tell of it, and change nothing that is."""


def unusable(out: Path, error: OSError) -> UserError:
    return UserError(f"cannot write in {out} ({error.strerror}): choose another --out")


def check_place(out: Path) -> None:
    """Refuse a folder that holds something else, of which a run would replace files.

    Raises:
        UserError: a model, a bundle, or files of the names that a run gives its own; or the path
            is not UTF-8.
    """
    if not is_utf8(out):
        raise UserError(f"the path {out} is not UTF-8, and no model could be written in it: choose "
                        "another --out")
    try:
        there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    except OSError as error:
        raise unusable(out, error) from error
    what = next((told for name, told in _OTHERS.items() if name in there), None)
    if what is None and ".lock" not in there:  # which every run makes first
        if RECIPE in there:
            ours = (out / RECIPE).read_bytes() == _as_noted(_noted(out))
            what = None if ours else f"a file {RECIPE} that no run has noted there"
        else:
            mine = [name for name in (RESULTS, PAGE) if name in there]
            what = f"a file {mine[0]} of something else" if mine else None
    if what is not None:
        raise UserError(f"{out} holds {what}: choose another --out")


def changed(out: Path, recipe: Recipe) -> list[str]:
    """Keys in which the recipe noted in a folder differs from this one; who does the work is no
    difference. None where none is noted.

    Raises:
        UserError: what is noted there is no recipe.
    """
    if not (out / RECIPE).exists():
        return []
    now = recipe.to_dict()
    how = {name: now[name] for name in ("engine", "processes", "track")}
    # keys that planearly had not yet when it was noted are at their defaults
    return sorted(differences({**_filled(_noted(out), Recipe().to_dict()), **how}, now))


def note(out: Path, recipe: Recipe) -> None:
    """Note a recipe in a run folder, and say by which keys other things are made than by the one
    that was there.

    Raises:
        UserError: as :func:`changed`, or the folder cannot be written.
    """
    if keys := [key for key in changed(out, recipe) if key.partition(".")[0] not in _CHOSEN]:
        say(f"{out} holds a run with other settings ({', '.join(keys[:6])}"
            f"{', ...' if len(keys) > 6 else ''}): what depends on them is made anew, "
            "beside the old results, which are kept")
    with atomic_write(out / RECIPE) as handle:
        handle.write(_as_noted(recipe.to_dict()))


def recipe_file(out: Path) -> Path:
    """The file of the recipe that a folder was last run with.

    Raises:
        UserError: it is no run folder.
    """
    path = out / RECIPE
    if not path.is_file() or bundles.is_bundle(out):
        why = f"has no {RECIPE}" if not path.is_file() else "is a bundle"
        raise UserError(f"{out} is not a run folder: it {why}; give the --out of a run or a study")
    return path


def recipe_of(out: Path) -> Recipe:
    """The recipe that a folder was last run with.

    Raises:
        UserError: it is no run folder, or its recipe cannot be read.
    """
    return config.load(recipe_file(out))


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Dotted places at which two values made of mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from differences(before.get(key), now.get(key), f"{place}.{key}".strip("."))
    elif before != now:
        yield place


def _noted(out: Path) -> dict[str, Any]:
    """What ``recipe.yaml`` in the folder says."""
    path = out / RECIPE
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not the recipe of a run: remove it, or choose another "
                        "--out")
    return found


def _as_noted(values: dict[str, Any]) -> bytes:
    """A recipe as it is noted in a run folder."""
    return yaml.safe_dump(values, sort_keys=False).encode("utf-8", "backslashreplace")


def _filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The values, and defaults in place of those that are not there."""
    return {**defaults, **{
        key: _filled(value, default) if isinstance(value, dict)
        and isinstance(default := defaults.get(key), dict) else value
        for key, value in values.items()}}
