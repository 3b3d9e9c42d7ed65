"""Documents of one input file, streamed: JSON lines, Parquet, text and Markdown files, and shards
of Hugging Face datasets.

Reading never holds more than a document (or a batch of Parquet rows) in memory. A record that
cannot be used is set aside with its file and line; work goes on until more than
``data.max_bad_share`` of the records are unusable.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planearly import keys
from planearly.data import hub, jsonlines, parquet
from planearly.data.documents import ANOTHER_FIELD, Document, Problems, Unit
from planearly.data.formats import DAMAGE, damaged, open_unit
from planearly.errors import printable

HISTOGRAM = "histogram"
"""What a file says to be under "planearly" that :mod:`planearly.cluster.shared` writes."""

_MOST_NAME = 200  # characters of a source's name
_CONTROLS = bytes(b for b in range(32) if chr(b) not in "\t\n\v\f\r\x1b")
_MOST_CONTROLS = 0.05  # share of control characters in a text
_STRAY_CONTROLS = 3  # of a record, however short, are no sign of binary data


def read_documents(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[Document]:
    """The documents of one input file, in order, without those that cannot be used.

    Raises:
        UserError: the file is damaged, cannot be read or is another than when it was listed; or
            too large a share of its records is bad.
    """
    for file, line, record in _records(unit, settings, problems):
        why = _objection(record, settings.text_field)
        text = "" if why else record[settings.text_field]
        n_bytes = 0
        if not why:
            try:
                if isinstance(text, bytes):
                    text, guessed = _decoded(text)
                    if guessed:
                        problems.guess(file, guessed)
                data = text.encode()
                n_bytes = len(data)
                controls = n_bytes - len(data.translate(None, _CONTROLS))
                if controls > max(_STRAY_CONTROLS, _MOST_CONTROLS * len(text)):
                    why = "the text holds control characters, as binary data does"
            except UnicodeEncodeError:
                why = "the text holds half of a surrogate pair, which is not valid Unicode"
            except UnicodeError as error:
                why = error.args[-1] if type(error) is UnicodeError else "not valid UTF-8"
        if why:
            problems.set_aside(file, line, why)
            continue
        if not text or text.isspace():
            problems.skip(file, line, "the text is empty")
            continue
        problems.good += 1
        if unit.keep is not None:
            text = unit.keep.take(text)
            if not text:
                problems.left_out += 1
                continue
            n_bytes = len(text.encode())
        source = _inside(record, unit.source_field or settings.source_field)
        named = isinstance(source, str) and source != ""
        yield Document(text, printable(source[:_MOST_NAME] if named else _source(unit)), file, line,
                       n_bytes)


def _objection(record: Any, text_field: str) -> str:
    """Why a record holds no usable text; empty if it does."""
    if not isinstance(record, dict):
        return f"a JSON {_type_name(record)}, not an object with a field '{text_field}'"
    if text_field not in record:
        if record.get("planearly") == HISTOGRAM:
            return ("a domain's histogram, not documents: a recipe takes the file itself, unpacked "
                    "and ending in .json, as a domain")
        has = ", ".join(itertools.islice(record, 8)) or "no fields"
        return f"no field '{text_field}' (it has {has}); {ANOTHER_FIELD}"
    if not isinstance(record[text_field], str | bytes):
        return f"field '{text_field}' holds a {_type_name(record[text_field])}, not text"
    return ""


def _inside(record: Any, name: str) -> Any:
    """A record's field, or ``a.b``: what its field ``a`` holds under ``b``; None: no such."""
    if not isinstance(record, dict) or name in record:
        return record.get(name) if isinstance(record, dict) else None
    outer, _, inner = name.partition(".")
    return _inside(record.get(outer), inner) if inner else None


def _type_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null",
             int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _source(unit: Unit) -> str:
    """Records count under their file's or dataset's name, text files under their folder's."""
    if unit.kind == "hub":
        return hub.name_of(unit.path)
    path = Path(unit.path)
    return path.absolute().parent.name if unit.kind == "text" else path.name.split(".")[0]


def _records(unit: Unit, settings: keys.Data,
             problems: Problems) -> Iterator[tuple[str, int, Any]]:
    """(file, line, record) of everything in a unit that could be parsed."""
    if unit.kind == "hub":
        columns = [settings.text_field, unit.source_field or settings.source_field]
        for line, record in enumerate(hub.records(unit, columns), 1):
            yield unit.path, line, record
        return
    if unit.size == 0:
        return problems.skip(unit.path, 0, "the file is empty")
    read = {"parquet": parquet.records, "text": _text, "lines": jsonlines.records}[unit.kind]
    told = problems.bad
    line = 0
    for line, record in read(unit, settings, problems):
        yield unit.path, line, record
    if not line and problems.bad == told and unit.part is None:
        problems.skip(unit.path, 0, "the file holds no records")
    return None


def _text(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[tuple[int, Any]]:
    """A whole text file as one record."""
    with open_unit(unit) as handle:
        try:
            data = handle.read()
        except DAMAGE as error:
            raise damaged(unit, error) from error
    try:
        text, guessed = _decoded(data)
    except UnicodeError as error:
        line = data.count(b"\n", 0, getattr(error, "start", 0)) + 1
        why = error.args[-1] if type(error) is UnicodeError else "not valid UTF-8"
        return problems.set_aside(unit.path, line, f"{why}; the file is left out")
    if guessed:
        problems.guess(unit.path, guessed)
    text = text.replace("\r\n", "\n")
    yield 1, {settings.text_field: text if "\n" in text else text.replace("\r", "\n")}
    return None


def _decoded(data: bytes) -> tuple[str, str]:
    """Text in UTF-8, UTF-16 or UTF-32; and the encoding where the data do not say it.

    Raises:
        UnicodeError: it is in none of them.
    """
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                           (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding), ""
    controls = len(data) - len(data.translate(None, _CONTROLS))
    if controls <= _MOST_CONTROLS * len(data):
        return data.decode("utf-8-sig"), ""
    for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        try:
            text = data.decode(encoding)
        except UnicodeError:
            continue
        words = sum(text.count(sign) for sign in " \n\t")
        strange = sum(not sign.isprintable() for sign in text[:hub.BUFFER] if sign not in "\r\n\t")
        if words >= 0.01 * len(text) and strange <= _MOST_CONTROLS * len(text[:hub.BUFFER]):
            return text, encoding
    raise UnicodeError("it holds control characters, as binary data does")
