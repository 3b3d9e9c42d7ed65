"""A wrong use of the command, told in one sentence with the nearest right use."""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
import select
import sys
from pathlib import Path
from typing import Any

import typer
import typer.core

from planearly import config, keys, storage
from planearly.errors import UserError

WINDOWS = os.name == "nt"
USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""What the parser of the command line raises; some versions of typer bring click inside."""


class Verbs(typer.core.TyperGroup):
    """The verbs; an unknown one is an error that names the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise UserError(self._unknown(args[0]))
        return super().resolve_command(ctx, args)

    def _unknown(self, word: str) -> str:
        verbs = [name for name, command in self.commands.items() if not command.hidden]
        near = difflib.get_close_matches(word, verbs, 1, 0.5)
        if near:
            return f"there is no verb '{word}'; did you mean: planearly {near[0]}"
        if config.is_recipe(word):
            return f"'{word}' is a recipe and no verb; did you mean: planearly run {word}"
        return f"there is no verb '{word}'; the verbs are {', '.join(verbs)}"


def given(context: typer.Context, *but: str) -> list[str]:
    """The options that the command line names, but for those of these names."""
    return [one.opts[-1] for one in context.command.params
            if one.name and one.name not in but
            and getattr(context.get_parameter_source(one.name), "name", "") == "COMMANDLINE"]


def sentence(error: Any, words: list[str], root: Any) -> str:
    """One sentence for a :data:`USAGE_ERROR`: what is wrong, and how the verb is used.

    Args:
        words: of the command line.
        root: the whole command.
    """
    context = error.ctx
    command = context.command if context else root.commands.get(words[0] if words else "", root)
    verb = "planearly" if command is root else f"planearly {command.name}"
    usage = f"usage: {' '.join([verb, *_arguments(command)])}; more: {verb} --help"
    parameter = getattr(error, "param", None)
    if parameter is not None:
        name = parameter.name.upper() if _argument(parameter) else parameter.opts[-1]
        if not getattr(error, "message", ""):
            return f"{verb} needs {name}, {parameter.help or 'an argument'}; {usage}"
        kind = next((f"give {kind}" for word, kind in _KINDS.items() if word in error.message), "")
        return f"{name}: {kind or _plain(error.message)}; {usage}"
    wrong = getattr(error, "option_name", None)
    known = [name for one in command.params if not getattr(one, "hidden", False)
             and not _argument(one) for name in (*one.opts, *one.secondary_opts)]
    keyed = any(one.name in ("settings", "files") for one in command.params)
    if wrong is None or wrong in known:
        return f"{_plain(error.format_message())}; {usage}"
    return f"{verb} has no option '{wrong}'; {_instead(wrong, verb, known, keyed)}"


_KINDS = {"integer": "a whole number", "number": "a number", "float": "a number"}
"""What a parameter takes, by a word of what the parser says of it."""


def _argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _arguments(command: Any) -> list[str]:
    if hasattr(command, "commands"):
        return ["VERB", "..."]
    return [(one.name.upper() if one.required else f"[{one.name.upper()}]")
            + ("..." if one.nargs < 0 else "") for one in command.params if _argument(one)]


def _instead(wrong: str, verb: str, known: list[str], keyed: bool) -> str:
    """The nearest right option or, of a verb that takes recipe keys, key."""
    keys = list(config.places())
    sections = {place.partition(".")[0] for place in keys}
    word = wrong.lstrip("-").replace("-", "_")
    options = [one.removeprefix("--") for one in known]
    possible = [*options, *keys, *sections] if keyed else options
    near = difflib.get_close_matches(word, possible, 1, 0.5)
    if near and f"--{near[0]}" in known:
        return f"did you mean '--{near[0]}'?"
    if near and keyed:
        return f"recipe keys are written without dashes: {near[0]}=VALUE"
    return (f"it has {', '.join(known)}" if known else f"see: {verb} --help") + (
        "" if wrong.startswith("--") else "; a text that begins with a dash goes after '--'")


def names_documents(word: str) -> bool:
    """Whether a word with a "=" names documents: it is no recipe key, and they are there."""
    place = os.path.expanduser(word)
    key = word.partition("=")[0].partition(".")[0] in keys.Recipe.__dataclass_fields__
    return word.startswith("hf://") or storage.is_url(word) or (
        not key and (os.path.exists(place) or bool(glob.glob(place, recursive=True))))


def is_folder(place: str) -> bool:
    """Whether a word that may be a recipe is a model's or a bundle's folder, or the URL of one."""
    return storage.is_url(place) or Path(place).is_dir()


def run_folder(place: Path | str | None) -> Path | str | None:
    """A run folder of this machine, or the URL of one."""
    return place if isinstance(place, str) and storage.is_url(place) else local(place)


def local(place: Path | str | None) -> Path | None:
    """A place to write to, if it is one of this machine.

    Raises:
        UserError: it is an address, as of an object store; a folder ``s3:`` would be made.
    """
    if place is None:
        return None
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(place)):
        raise UserError(f"cannot write to {scheme[1]}://: give a folder of this machine, and copy "
                        "what it then holds")
    return Path(place)


def _plain(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def recipes(incomplete: str) -> list[str]:
    """Recipes by name that begin so, for the shell's completion."""
    return [name for name in config.names() if name.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """Recipe keys that begin so, for the shell's completion."""
    return [f"{place}=" for place in config.places() if place.startswith(incomplete)]


def nobody_reads(error: OSError) -> bool:
    """Whether a write failed because standard output or error leads nowhere (``| head``).

    Both then lead to the null device, so that the interpreter's last flush is quiet.
    """
    if error.errno != errno.EPIPE:
        return False
    closed = [stream for stream in (sys.stdout, sys.stderr) if _closed(stream)]
    for stream in closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    return bool(closed)


def _closed(stream: Any) -> bool:
    try:
        watched = select.poll()
        watched.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in watched.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def supported() -> None:
    """Refuse a system that planearly does not run on.

    Raises:
        UserError: Windows, whose Python has no POSIX file locks.
    """
    if WINDOWS:
        raise UserError("planearly does not run on Windows itself, which lacks the file locks that "
                        "guard a run folder: use it in WSL 2 or in a Linux container")
