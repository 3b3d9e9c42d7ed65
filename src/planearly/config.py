"""Recipes from YAML files and ``key=value`` overrides, checked; and the recipe reference.

A key that :mod:`planearly.keys` does not have is an error that names the nearest one that it has.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from planearly import units, yamltext
from planearly.checks import Refused, check
from planearly.errors import UserError
from planearly.keys import Recipe


def recipes_folder() -> Path:
    """Where the recipes that come with the package lie (installed, or in a checkout)."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def load(recipe: str | Path, overrides: Sequence[str] = (),
         changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file, or a recipe of the package by name, and apply ``key=value`` overrides
    and ``changes``: keys by dotted name, or sections, with plain values.

    A recipe may start from another: ``extends: other.yaml`` (in the same folder, or one of the
    package) is read first. Relative paths of data in a recipe are relative to the current folder,
    as on a command line.

    Raises:
        UserError: no such recipe, not a mapping, an unknown key, a value of the wrong type, or one
            that cannot work; with file and line.
    """
    return override(_read(find(recipe)), overrides, changes)


def override(values: Mapping[str, Any], overrides: Sequence[str] = (),
             changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of plain values with ``key=value`` overrides, checked; as :func:`load`.

    Texts, and items of lists of texts, stay as typed: ``domains=[1.10]`` is the folder ``1.10``.
    """
    changed = copy.deepcopy(dict(values))
    for item in overrides:
        name, separator, text = item.partition("=")
        name = name.strip()
        if not separator:
            raise UserError(f"'{item}' is not of the form key=value")
        _put(changed, name, _typed(hint_of(name), text, f"the value of '{name}'"))
    for name, value in (changes or {}).items():
        held = look_up(changed, name)
        section = isinstance(value, dict) and isinstance(held, dict)
        _put(changed, name, _merge(held, value) if section else value)
    return _checked(changed)


def variant(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other values of some keys, given by dotted name; of a section that is given as
    a mapping, the keys that it does not name stay as they are.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that cannot work.
    """
    changes = dict(leaf for place, value in changes.items() for leaf in _settings(place, value))
    if any(hint_of(place) is None for place in changes):
        values = recipe.to_dict()
        for place, value in changes.items():
            _put(values, place, value)
        return _checked(values)
    for place, value in changes.items():  # the others are as they should be: grids have many
        recipe = _with(recipe, place.split("."), _convert(hint_of(place), value, place))
    try:
        check(recipe)
    except Refused as error:
        raise _located(error, "") from None
    return recipe


def _settings(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The keys that a change sets, by dotted name."""
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hint_of(place)):
        for name, inner in value.items():
            yield from _settings(f"{place}.{name}", inner)
    else:
        yield place, value


def _with(section: Any, parts: list[str], value: Any) -> Any:
    """A recipe, or a section of one, with another value at a place."""
    name, *rest = parts
    return dataclasses.replace(section, **{
        name: _with(getattr(section, name), rest, value) if rest else value})


def _checked(values: dict[str, Any]) -> Recipe:
    built = build(Recipe, values, "")
    try:
        check(built)
    except Refused as error:
        found: Any = values
        origin = ""
        for part in error.place.split("."):
            held = next((name for name in found if name == part), part) if isinstance(
                found, Mapping) else part
            origin = getattr(held, "origin", "")
            found = found.get(part) if isinstance(found, Mapping) else None
        raise _located(error, origin) from None
    return built


def _put(values: dict[str, Any], place: str, value: Any) -> None:
    """Set a key by dotted name in plain values."""
    *parents, last = place.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"'{place}' is no recipe key: '{parent}' is not a section")
    values.pop(last, None)  # its name may know a line of a file
    values[last] = value


def _typed(hint: Any, text: str, what: str) -> Any:
    """What was typed for a key with this type."""
    hint = _present(hint)
    if hint is str:
        plain = yamltext.unquoted(text.strip(), what)
        return plain if plain != text.strip() else yamltext.Scalar(plain)
    if typing.get_origin(hint) is list and typing.get_args(hint) == (str,):
        return None if text.strip() in yamltext.NULLS else yamltext.items(text, what)
    return yamltext.value(text, what)


def _present(hint: Any) -> Any:
    """A type without None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(hint) if one is not type(None))
    return hint


_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


@functools.lru_cache(4096)
def hint_of(place: str) -> Any:
    """The type of a key given by dotted name; None where there is no such key."""
    hint: Any = Recipe
    for part in place.split("."):
        hint = _hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


def value_of(recipe: Recipe, place: str) -> Any:
    """The value of a key given by dotted name.

    Raises:
        UserError: there is no such key.
    """
    if hint_of(place) is None:
        raise UserError(f"'{place}' is no recipe key; 'planearly recipes --reference' lists them")
    return operator.attrgetter(place)(recipe)


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
    for name, hint in _hints(kind).items():
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
    path, folder = Path(recipe), False
    with contextlib.suppress(OSError, ValueError):  # of a name that no file could have
        folder = path.is_dir()
        if path.exists() and not folder:
            return path
    name = path.name.removesuffix(".yaml")
    if name in names() and path.parent.name in ("", "recipes"):
        return recipes_folder() / f"{name}.yaml"
    if folder:
        raise UserError(f"'{recipe}' is a folder: name a recipe file")
    if "=" in str(recipe):
        raise UserError(f"'{recipe}' is a setting: name the recipe before it, as demo {recipe}")
    near = difflib.get_close_matches(name, names(), 1, 0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"there is no recipe '{recipe}'; {hint}the ones that come along are "
                    f"{', '.join(names())}")


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's values over those of the recipe that it extends."""
    values = yamltext.read(path)
    if "extends" not in values:
        return values
    origin = next(name.origin for name in values if name == "extends")  # type: ignore[attr-defined]
    base = values.pop("extends")
    if not isinstance(base, str) or not base.strip():
        raise UserError(f"{origin}: 'extends' names no recipe; write one's file name, or leave the "
                        "line out")
    place = path.parent / base
    if not place.is_file():
        if base.removesuffix(".yaml") not in names():
            raise UserError(f"{origin} extends '{base}', and there is no {place}: name "
                            "a recipe beside it, or one of the package")
        place = find(base)
    chain = (*below, path.resolve())
    if place.resolve() in chain:
        raise UserError(f"{origin} extends '{base}', which leads back to itself: leave one of "
                        "these lines out")
    return _merge(_read(place, chain), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged, other keys replaced; the order is the base's."""
    named = {name: name for name in over}
    merged = {}
    for name, value in base.items():
        inner = over.get(name, value)
        both = isinstance(value, dict) and isinstance(inner, dict)
        merged[named.get(name, name)] = _merge(value, inner) if both and name in over else inner
    return {**merged, **{name: value for name, value in over.items() if name not in base}}


def build(kind: type[Any], values: Any, where: str) -> Any:
    """Make a dataclass of type ``kind`` from a plain mapping; ``where`` is its dotted place.

    Raises:
        UserError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"'{where}' is a section: write '{where}.KEY=value'")
    hints = _hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    filled = {}
    for name, value in values.items():
        place = f"{where}.{name}" if where else str(name)
        try:
            if name not in known:
                raise UserError(_unknown(str(name), known, where))
            filled[str(name)] = _convert(hints[name], value, place)
        except UserError as error:
            raise _located(error, getattr(name, "origin", "")) from error
    return kind(**filled)


class _Located(UserError):
    """An error that says where it is already."""


def _located(error: UserError, origin: str) -> UserError:
    """The error with the place of the innermost key that it is of; a typed key has none."""
    if isinstance(error, _Located):
        return error
    return _Located(f"{origin}: {error}" if origin else str(error))


def _unknown(name: str, known: list[str], where: str) -> str:
    prefix = f"{where}." if where else ""
    shown = name if name.isprintable() else repr(name)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    elsewhere = [place for place in places() if place.rpartition(".")[2] == name]
    if name == "extends":
        hint = "it stands alone at the top of a recipe file"
    elif elsewhere:
        hint = f"did you mean '{elsewhere[0]}'?"
    elif near:
        hint = f"did you mean '{prefix}{near[0]}'?"
    else:
        hint = f"known: {', '.join(known)}"
    return f"unknown recipe key '{prefix}{shown}'; {hint}"


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, yamltext.Scalar) and value.null):
            return None
        return _convert(_present(hint), value, place)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, place)
    if origin is Literal:
        return _choice(typing.get_args(hint), value, place)
    if origin is list:
        empty = value is None or (isinstance(value, yamltext.Scalar) and value.null)
        items = list(value) if isinstance(value, list | tuple) else [] if empty else [value]
        return [_convert(typing.get_args(hint)[0], item, place) for item in items]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(place, value, "hold 'key: values'")
        inner = typing.get_args(hint)[1]
        made = {}
        for name, item in value.items():
            own = hint_of(str(name)) if inner == list[Any] else None  # of a study's values
            if own is not None and _present(own) in (str, list[str]):
                made[str(name)] = _convert(list[own], item, f"{place}.{name}")  # type: ignore
            else:
                made[str(name)] = _convert(inner, item, f"{place}.{name}")
        return made
    if hint is Any:
        return _untyped(value)
    if isinstance(value, dict | list | tuple | set):
        raise _wrong(place, value, "be " + {int: "a whole number", float: "a number", str: "text",
                                           bool: "true or false"}[hint])
    return _SCALARS[hint](value, place)


def _wrong(place: str, value: Any, rule: str) -> UserError:
    return UserError(f"{_is(place, value)}; it should {rule}")


def _is(place: str, value: Any) -> str:
    shown = " ".join(("" if value is None else str(value)).split())
    if not shown:
        return f"recipe key '{place}' is empty"
    shown = shown if shown.isprintable() else repr(shown)
    return f"recipe key '{place}' is '{shown[:100]}{'...' * (len(shown) > 100)}'"


def _choice(choices: tuple[Any, ...], value: Any, place: str) -> Any:
    truth = value.truth if isinstance(value, yamltext.Scalar) else value
    word = {True: "yes", False: "no"}[truth] if isinstance(truth, bool) else value
    if not isinstance(word, str) or str(word) not in choices:
        raise UserError(f"{_is(place, value)}; choose from {', '.join(choices)}")
    return str(word)


def _untyped(value: Any) -> Any:
    if isinstance(value, yamltext.Scalar):
        return value.value()
    if isinstance(value, Mapping):
        return {str(name): _untyped(inner) for name, inner in value.items()}
    return [_untyped(inner) for inner in value] if isinstance(value, list | tuple) else value


def _truth(value: Any, place: str) -> bool:
    truth = value.truth if isinstance(value, yamltext.Scalar) else value
    if not isinstance(truth, bool):
        raise _wrong(place, value, "be true or false")
    return truth


def _whole(value: Any, place: str) -> int:
    if value is None or isinstance(value, bool) or value == "":
        raise _wrong(place, value, "be a whole number")
    if re.fullmatch(r"\s*\d+(\s*,\s*\d+)+\s*", str(value)):
        raise _wrong(place, value, "be one number; a list is written in brackets, as [16, 64]")
    return units.count(value, f"recipe key '{place}'")


def _number(value: Any, place: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(place, value, "be a number, and finite")
    return number


def _text(value: Any, place: str) -> str:
    if value is None or value == "":
        raise _wrong(place, value, "be text; leave the key out for its default")
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    if re.search("[\0\ud800-\udc7f\udd00-\udfff]", text):  # U+DC80 on: bytes of a file's name
        raise UserError(f"recipe key '{place}' holds a character that no text has: {text!r}")
    return text


_SCALARS: dict[type, Callable[[Any, str], Any]] = {
    bool: _truth, int: _whole, float: _number, str: _text}


def reference() -> str:
    """The recipe reference, in Markdown: every key, its default, its meaning, and the words that
    it takes where it takes no others."""
    lines = ["# Recipe reference", "",
             "Generated from `planearly.config` by `planearly recipes --reference`.", ""]

    def walk(kind: type[Any], prefix: str, title: str) -> None:
        hints = _hints(kind)
        rows, sections = [], []
        for f in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[f.name]):
                sections.append((hints[f.name], f"{prefix}{f.name}.", f.metadata["meaning"]))
                continue
            default = f.default_factory() if callable(f.default_factory) else f.default
            shown = "null" if default is None else yaml.safe_dump(default, default_flow_style=True)
            shown = shown.removesuffix("\n").removesuffix("\n...")
            words = [word for hint in (hints[f.name], *typing.get_args(hints[f.name]))
                     if typing.get_origin(hint) is Literal for word in typing.get_args(hint)]
            taken = f"; one of {', '.join(f'`{word}`' for word in words)}" if words else ""
            rows.append(f"| `{prefix}{f.name}` | `{shown}` | {f.metadata['meaning']}{taken} |")
        lines.extend([f"## {title}", "", "| key | default | meaning |", "|---|---|---|",
                      *rows, ""])
        for inner, place, meaning in sections:
            walk(typing.cast(type[Any], inner), place, f"`{place[:-1]}`: {meaning}")

    walk(Recipe, "", "A recipe")
    return "\n".join(lines)
