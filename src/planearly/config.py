"""Recipes from YAML files and ``key=value`` overrides, checked; and the recipe reference.

A key that :mod:`planearly.keys` does not have is an error that names the nearest one that it has.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from planearly import units
from planearly.errors import UserError
from planearly.keys import Recipe


def recipes_folder() -> Path:
    """Where the recipes that come with the package lie (installed, or in a checkout)."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a recipe of the package by name, and apply ``key=value`` overrides.

    A recipe may start from another: ``extends: other.yaml`` (in the same folder) is read first.
    Relative paths of data in a recipe are relative to the current folder, as on a command line.

    Raises:
        UserError: no such recipe; not a mapping; an unknown key; a value of the wrong type.
    """
    return override(_read(find(recipe)), overrides)


def override(values: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of plain values with ``key=value`` overrides, checked; as :func:`load`."""
    for item in overrides:
        name, separator, text = item.partition("=")
        if not separator:
            raise UserError(f"'{item}' is not of the form key=value")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise UserError(f"the value of '{name}' is not valid YAML: {text}") from error
        target = values
        *parents, last = name.strip().split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"'{name}': '{parent}' is not a section")
        target[last] = value
    built = build(Recipe, values, "")
    check(built)
    return built


def variant(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other values of some keys, given by dotted name.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that cannot work.
    """
    values = recipe.to_dict()
    for place, value in changes.items():
        *parents, last = place.split(".")
        target = values
        for parent in parents:
            target = target.get(parent)  # type: ignore[assignment]
            if not isinstance(target, dict):
                raise UserError(f"'{place}' is no recipe key: there is no section '{parent}'")
        target[last] = value
    built = build(Recipe, values, "")
    check(built)
    return built


def value_of(recipe: Recipe, place: str) -> Any:
    """The value of a key given by dotted name.

    Raises:
        UserError: there is no such key.
    """
    found: Any = recipe
    for part in place.split("."):
        if not hasattr(found, part):
            raise UserError(f"'{place}' is no recipe key; 'planearly recipes --reference' lists "
                            "them")
        found = getattr(found, part)
    return found


def look_up(values: Mapping[str, Any], place: str) -> Any:
    """The same of a recipe as plain values; None where there is no such key."""
    found: Any = values
    for part in place.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe as plain values, by dotted name, with its value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def places(kind: type[Any] = Recipe, where: str = "") -> Iterator[str]:
    """Every key that a recipe may hold, by dotted name."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from places(typing.cast(type[Any], hint), f"{where}{name}.")
        else:
            yield f"{where}{name}"


def is_recipe(word: str) -> bool:
    """Whether :func:`find` finds it."""
    try:
        find(word)
    except (UserError, OSError):
        return False
    return True


def find(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by the name of one that comes with the package.

    Raises:
        UserError: there is none.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = recipes_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    if "=" in str(recipe):
        raise UserError(f"'{recipe}' is a setting: name the recipe before it, as demo {recipe}")
    near = difflib.get_close_matches(str(recipe), names(), 1, 0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"there is no recipe '{recipe}'; {hint}the ones that come along are "
                    f"{', '.join(names())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold 'key: value' lines")
    base = values.pop("extends", None)
    return _merge(_read(path.parent / base), values) if base else values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merge(merged[name], value)
        else:
            merged[name] = value
    return merged


def build(kind: type[Any], values: Any, where: str) -> Any:
    """Make a dataclass of type ``kind`` from a plain mapping; ``where`` is its dotted place.

    Raises:
        UserError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"'{where}' is a section: write '{where}.KEY=value'")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    filled = {}
    for name, value in values.items():
        place = f"{where}.{name}" if where else str(name)
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.5)
            prefix = f"{where}." if where else ""
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(names)}"
            raise UserError(f"unknown recipe key '{place}'; {hint}")
        filled[name] = _convert(hints[name], value, place)
    return kind(**filled)


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _convert(next(a for a in typing.get_args(hint) if a is not type(None)), value, place)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, place)
    if origin is Literal:
        choices = typing.get_args(hint)
        value = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        if value not in choices:
            raise UserError(f"recipe key '{place}' is '{value}'; choose from {', '.join(choices)}")
        return value
    if origin is list:
        items = value if isinstance(value, list) else [] if value is None else [value]
        return [_convert(typing.get_args(hint)[0], item, place) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"recipe key '{place}' is '{value}'; it should hold 'key: values'")
        inner = typing.get_args(hint)[1]
        return {str(name): _convert(inner, item, f"{place}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise UserError(f"recipe key '{place}' is '{value}'; choose true or false")
        return value
    if hint is int:
        if isinstance(value, bool) or value is None:
            raise UserError(f"recipe key '{place}' is '{value}'; it should be a whole number")
        return units.count(value, f"recipe key '{place}'")
    if hint is float:
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"recipe key '{place}' is '{value}'; it should be a number") from error
    if hint is str:
        if value is None or isinstance(value, dict | list):
            raise UserError(f"recipe key '{place}' is '{value}'; it should be text")
        return str(value)
    raise TypeError(f"no conversion for {hint}")


def check(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything runs."""
    def need(ok: bool, place: str, value: Any, rule: str) -> None:
        if not ok:
            raise UserError(f"recipe key '{place}' is {value}; it must be {rule}")

    need(8 <= recipe.context <= 1 << 20, "context", recipe.context, "between 8 and 1048576 tokens")
    size = recipe.tokenizer.vocab_size
    need(recipe.tokenizer.path is not None or 260 <= size <= 1 << 20, "tokenizer.vocab_size", size,
         "at least 260 (256 bytes and the special tokens) and at most 1048576")
    starts = recipe.start is not None or recipe.large_start is not None
    need(recipe.pretrain_tokens >= (0 if starts else 1), "pretrain_tokens", recipe.pretrain_tokens,
         "positive, or 0 to fine-tune 'start' as it is")
    need(recipe.spec_tokens is None or recipe.spec_tokens > 0, "spec_tokens", recipe.spec_tokens,
         "positive, or null for all")
    need(bool(recipe.cluster.k) and all(k >= 1 for k in recipe.cluster.k), "cluster.k",
         recipe.cluster.k, "a list of positive numbers")
    need(recipe.importance.k is None or recipe.importance.k in recipe.cluster.k, "importance.k",
         recipe.importance.k, f"one of cluster.k {recipe.cluster.k}, or null")
    need(recipe.importance.max_epochs > 0, "importance.max_epochs", recipe.importance.max_epochs,
         "positive")
    need(recipe.selection.epochs > 0, "selection.epochs", recipe.selection.epochs, "positive")
    need(0 < recipe.selection.share <= 1, "selection.share", recipe.selection.share,
         "above 0 and at most 1")
    need(0 < recipe.data.held_out < 0.5, "data.held_out", recipe.data.held_out,
         "between 0 and 0.5")
    for place, model in (("model", recipe.model), ("large", recipe.large)):
        need(model.heads > 0 and model.d_model % model.heads == 0, f"{place}.heads", model.heads,
             f"a divisor of {place}.d_model ({model.d_model})")
        need(model.d_model // max(model.heads, 1) % 2 == 0, f"{place}.d_model", model.d_model,
             "an even number per head, for rotary positions")
        need(model.kv_heads is None or (0 < model.kv_heads <= model.heads
             and model.heads % model.kv_heads == 0), f"{place}.kv_heads", model.kv_heads,
             f"a divisor of {place}.heads ({model.heads}), or null")
        need(model.layers > 0 and model.d_ff > 0, f"{place}.layers", model.layers, "positive")
    for place, train in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        need(train.batch_tokens >= recipe.context, f"{place}.batch_tokens", train.batch_tokens,
             f"at least one window of {recipe.context} tokens")
    for place, share in (("pretrain.specialization_share", recipe.pretrain.specialization_share),
                         ("finetune.replay_share", recipe.finetune.replay_share)):
        need(0 <= share < 1, place, share, "at least 0 and below 1")


def reference() -> str:
    """The recipe reference, in Markdown: every key, its type, its default and its meaning."""
    lines = ["# Recipe reference", "",
             "Generated from `planearly.config` by `planearly recipes --reference`.", ""]

    def walk(kind: type[Any], prefix: str, title: str) -> None:
        hints = typing.get_type_hints(kind)
        rows, sections = [], []
        for f in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[f.name]):
                sections.append((hints[f.name], f"{prefix}{f.name}.", f.metadata["meaning"]))
                continue
            default = f.default_factory() if callable(f.default_factory) else f.default
            shown = "null" if default is None else yaml.safe_dump(default, default_flow_style=True)
            shown = shown.removesuffix("\n").removesuffix("\n...")
            rows.append(f"| `{prefix}{f.name}` | `{shown}` | {f.metadata['meaning']} |")
        lines.extend([f"## {title}", "", "| key | default | meaning |", "|---|---|---|",
                      *rows, ""])
        for inner, place, meaning in sections:
            walk(typing.cast(type[Any], inner), place, f"`{place[:-1]}`: {meaning}")

    walk(Recipe, "", "A recipe")
    return "\n".join(lines)
