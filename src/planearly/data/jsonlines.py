"""JSON lines: the values of a file, line by line; or of one that is JSON as a whole.

A part of a file has the lines that begin in it (:class:`planearly.data.documents.Part`), numbered
as in the whole file.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from planearly import keys
from planearly.data import hub
from planearly.data.documents import Part, Problems, Unit
from planearly.data.formats import DAMAGE, damaged, open_unit
from planearly.errors import UserError

_MOST_WHOLE = 1 << 27  # bytes of a file that is read as one JSON value
_LONGEST = 640
"""Digits that Python reads as a whole number whatever limit is set."""


def _integer(digits: str) -> int | float:
    """A whole number of JSON; one that is longer than Python reads is as good as infinite."""
    return int(digits) if len(digits) < _LONGEST else float(digits)


_JSON = json.JSONDecoder(parse_int=_integer)
_TWICE = object()
"""In place of an object that has the field of the text twice."""


def records(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[tuple[int, Any]]:
    """(line, value) of each JSON line; or, if the first line is no object, of a file that is JSON
    as a whole. Lines that are not valid JSON are set aside.

    Raises:
        UserError: the file is damaged, or one JSON list that is too large to be read at once.
    """
    field = settings.text_field
    twice, named = f"field '{field}' stands in it twice", json.dumps(field).encode()
    begun = unit.part is not None
    for number, line in _byte_lines(unit, problems):
        line = line.strip().removeprefix(codecs.BOM_UTF8)
        if not line:
            continue
        why, record = "", None
        try:
            record = _JSON.decode(line.decode())
        except UnicodeDecodeError:
            why = "not valid UTF-8"
        except (ValueError, RecursionError) as error:
            why = f"broken JSON{_brief(error)}"
        if not begun and (why or (isinstance(record, list) and ".json" in _suffixes(unit))):
            whole = _whole(unit, field)
            if whole is not None:
                for number, value in whole:
                    if value is _TWICE:
                        problems.set_aside(unit.path, number, twice)
                    else:
                        yield number, value
                return
        begun = True
        if not why and line.count(named) > 1 and _twice(line, field):
            why = twice
        if why:
            problems.set_aside(unit.path, number, why)
        else:
            yield number, record


def _suffixes(unit: Unit) -> list[str]:
    return [suffix.lower() for suffix in Path(unit.path).suffixes]


def _byte_lines(unit: Unit, problems: Problems) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered, in UTF-8 (or in what bytes there are)."""
    number = 0
    with open_unit(unit) as handle:
        try:
            if unit.part is not None:
                for number, line in _part_lines(handle, unit.part):
                    yield number, line
                return
            head = handle.peek(hub.BUFFER)  # type: ignore[attr-defined]
            encoding = json.detect_encoding(head)
            if encoding.startswith("utf-8") and (b"\n" in head or b"\r" not in head):
                for number, line in enumerate(handle, 1):
                    yield number, line
                return
            if encoding.endswith(("le", "be")):
                problems.guess(unit.path, encoding)
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            for number, text in enumerate(io.TextIOWrapper(handle, encoding, errors), 1):
                yield number, text.encode("utf-8", "surrogateescape")
        except DAMAGE as error:
            raise damaged(unit, error, f"line {number}") from error


def _part_lines(handle: IO[bytes], part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a part, numbered as in the whole file."""
    number, place = part.line, part.start
    if place and not part.stored:  # the line that reaches into the part is another's
        handle.seek(place - 1)
        rest = handle.readline()
        number, place = number + (rest != b"\n"), place - 1 + len(rest)
    while place < part.stop and (line := handle.readline()):
        number, place = number + 1, place + len(line)
        yield number, line


def is_lines(unit: Unit) -> bool:
    """Whether a file surely is JSON lines in UTF-8, of which parts can be read."""
    with open_unit(unit) as handle:
        try:
            head = handle.peek(hub.BUFFER)  # type: ignore[attr-defined]
            if not json.detect_encoding(head).startswith("utf-8") or b"\n" not in head:
                return False
            lines = (line.strip().removeprefix(codecs.BOM_UTF8) for line in handle)
            return isinstance(_JSON.decode(next(filter(None, lines), b"0").decode()), dict)
        except (*DAMAGE, ValueError, RecursionError):  # told when it is read
            return False


def line_blocks(unit: Unit, n_bytes: int) -> Iterator[list[bytes]]:
    """The lines of a file, about ``n_bytes`` at a time.

    Raises:
        UserError: the file is damaged.
    """
    number = 0
    with open_unit(unit) as handle:
        try:
            while block := handle.readlines(n_bytes):
                number += len(block)
                yield block
        except DAMAGE as error:
            raise damaged(unit, error, f"line {number}") from error


def line_ends(unit: Unit, start: int, stop: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    """(bytes, ends of lines among them) of the bytes [start, stop) of a file, some at a time."""
    with open_unit(unit, stop) as handle:
        handle.seek(start)
        while start < stop and (data := handle.read(min(n_bytes, stop - start))):
            start += len(data)
            yield len(data), data.count(b"\n")


def _twice(line: bytes | str, field: str) -> bool:
    """Whether the object of a line has a field twice, of which one would be lost."""
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs
        return dict(pairs)

    json.loads(line, object_pairs_hook=keep, parse_int=_integer)
    return sum(key == field for key, _ in outermost) > 1


def _whole(unit: Unit, field: str) -> list[tuple[int, Any]] | None:
    """(line, value) of a file that is one JSON list, or values over several lines; :data:`_TWICE`
    for one that has ``field`` twice.

    None if it is neither.

    Raises:
        UserError: it is a list, and too large to be read at once.
    """
    with open_unit(unit) as handle:
        try:
            data = handle.read(_MOST_WHOLE + 1)
        except DAMAGE as error:
            raise damaged(unit, error) from error
    if len(data) > _MOST_WHOLE:
        if data.lstrip()[:1] == b"[":
            raise UserError(f"{unit.path} is one JSON list of more than {_MOST_WHOLE >> 20} MB; "
                            "write one object per line (.jsonl)")
        return None
    found: list[tuple[int, Any]] = []
    try:
        text = data.decode(json.detect_encoding(data)).removeprefix("\ufeff")
        place, line, named = 0, 1, json.dumps(field)

        def skip(signs: str) -> str:
            """Go on to the next sign that is no space, and over it if it is one of ``signs``."""
            nonlocal place, line
            while place < len(text) and text[place] in " \t\r\n":
                line += text[place] == "\n"
                place += 1
            sign = text[place:place + 1]
            place += bool(sign) and sign in signs
            return sign

        listed = skip("[") == "["
        while skip("") not in ("", "]"):
            value, end = _JSON.raw_decode(text, place)
            if text.count(named, place, end) > 1 and _twice(text[place:end], field):
                value = _TWICE
            found.append((line, value))
            line += text.count("\n", place, end)
            place = end
            if listed and skip(",") not in (",", "]"):
                return None
        closed = skip("]") == "]" if listed else True
        return found if closed and not skip("") else None
    except (ValueError, RecursionError):
        return None


def _brief(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f" at column {error.colno}: {error.msg.lower().removesuffix(' at')}"
    return f": {error}"
