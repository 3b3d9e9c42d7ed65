"""Documents of one input file, streamed: JSON lines, Parquet, text and Markdown files, and shards
of Hugging Face datasets.

Reading never holds more than a document (or a batch of Parquet rows) in memory. A record that
cannot be used is set aside with its file and line; work goes on until more than
``data.max_bad_share`` of the records are unusable.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

from planearly import keys, storage
from planearly.data import hub
from planearly.data.documents import Document, Kind, Part, Problems, Unit
from planearly.errors import UserError, brief, printable
from planearly.files import reading_error

_KINDS: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines",
                           ".parquet": "parquet", ".txt": "text", ".md": "text"}
_CODECS = (".gz", ".zst")
HISTOGRAM = "histogram"
"""What a file says to be under "planearly" that :mod:`planearly.cluster.shared` writes."""
KNOWN = ".jsonl, .json, .parquet, .txt or .md (all but Parquet also as .gz or .zst)"

_MOST_WHOLE = 1 << 27  # bytes of a file that is read as one JSON value
_MOST_NAME = 200  # characters of a source's name
_MEND = "copy or download it again, or leave the file out"
_DAMAGE = (OSError, EOFError, zlib.error, UnicodeError)  # what a damaged file raises
_CONTROLS = bytes(b for b in range(32) if chr(b) not in "\t\n\v\f\r\x1b")
_MOST_CONTROLS = 0.05  # share of control characters in a text
_STRAY_CONTROLS = 3  # of a record, however short, are no sign of binary data


def kind_of(path: PurePath) -> Kind | None:
    """How a file is read, by its name; None if it is not."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _CODECS:
        suffixes.pop()
        return _KINDS.get(suffixes[-1]) if suffixes and suffixes[-1] != ".parquet" else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def bare_name(name: str) -> str:
    """A file's name without the endings that say its format."""
    for endings in (_CODECS, tuple(_KINDS)):
        if name.lower().endswith(endings):
            name = name[:name.rindex(".")]
    return name


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
        return f"no field '{text_field}' (it has {has}); data.text_field names another"
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
    read = {"parquet": _parquet, "text": _text, "lines": _lines}[unit.kind]
    told = problems.bad
    line = 0
    for line, record in read(unit, settings, problems):
        yield unit.path, line, record
    if not line and problems.bad == told and unit.part is None:
        problems.skip(unit.path, 0, "the file holds no records")
    return None


def _open(unit: Unit, until: int | None = None) -> IO[bytes]:
    """The unpacked bytes of a file that is still as it was listed.

    Args:
        until: where the bytes that are wanted of a plain file end (None: with the file or part).
    """
    file: IO[bytes]
    try:
        if unit.part is not None and unit.part.stored:
            return hub.zstd_reader(open(unit.part.stored, "rb", buffering=hub.BUFFER))
        if unit.stored:
            if unit.part is not None and unit.kind == "lines":
                until = unit.part.stop
            file = storage.reader(storage.Entry(unit.path, unit.size, unit.revision), until)
        else:
            file = open(unit.path, "rb", buffering=hub.BUFFER)  # noqa: SIM115
            status = os.fstat(file.fileno())
    except OSError as error:
        raise reading_error(error, unit.path) from error
    if not unit.stored and (status.st_size, status.st_mtime_ns) != (unit.size, unit.modified):
        file.close()
        raise UserError(f"{unit.path} has changed since it was listed: start again")
    codec = Path(unit.path).suffix.lower()
    if codec == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), hub.BUFFER)
    if codec == ".zst":
        return hub.zstd_reader(file)
    return file


def _text(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[tuple[int, Any]]:
    """A whole text file as one record."""
    with _open(unit) as handle:
        try:
            data = handle.read()
        except _DAMAGE as error:
            raise UserError(f"{unit.path} is damaged ({error}): {_MEND}") from error
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


def _lines(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[tuple[int, Any]]:
    """JSON lines; or, if the first line is no object, a file that is JSON as a whole."""
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
    with _open(unit) as handle:
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
        except _DAMAGE as error:
            raise _damaged(unit, number, error) from error


def _damaged(unit: Unit, line: int, error: Exception) -> UserError:
    return UserError(f"{unit.path} is damaged after line {line} ({error}): {_MEND}")


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
    with _open(unit) as handle:
        try:
            head = handle.peek(hub.BUFFER)  # type: ignore[attr-defined]
            if not json.detect_encoding(head).startswith("utf-8") or b"\n" not in head:
                return False
            lines = (line.strip().removeprefix(codecs.BOM_UTF8) for line in handle)
            return isinstance(_JSON.decode(next(filter(None, lines), b"0").decode()), dict)
        except (*_DAMAGE, ValueError, RecursionError):  # told when it is read
            return False


def line_blocks(unit: Unit, n_bytes: int) -> Iterator[list[bytes]]:
    """The lines of a file, about ``n_bytes`` at a time.

    Raises:
        UserError: the file is damaged.
    """
    number = 0
    with _open(unit) as handle:
        try:
            while block := handle.readlines(n_bytes):
                number += len(block)
                yield block
        except _DAMAGE as error:
            raise _damaged(unit, number, error) from error


def line_ends(unit: Unit, start: int, stop: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    """(bytes, ends of lines among them) of the bytes [start, stop) of a file, some at a time."""
    with _open(unit, stop) as handle:
        handle.seek(start)
        while start < stop and (data := handle.read(min(n_bytes, stop - start))):
            start += len(data)
            yield len(data), data.count(b"\n")


def row_groups(unit: Unit) -> list[tuple[int, int]]:
    """(rows, bytes) of the row groups of a Parquet file; none of one that is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(unit) as handle, pq.ParquetFile(handle) as table:
            found = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in found]
    except (pa.ArrowException, *_DAMAGE):  # told when it is read
        return []


def _integer(digits: str) -> int | float:
    """A whole number of JSON; one that is longer than Python reads is as good as infinite."""
    return int(digits) if len(digits) < _LONGEST else float(digits)


_LONGEST = 640
"""Digits that Python reads as a whole number whatever limit is set."""
_JSON = json.JSONDecoder(parse_int=_integer)


_TWICE = object()
"""In place of an object that has the field of the text twice."""


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
    with _open(unit) as handle:
        try:
            data = handle.read(_MOST_WHOLE + 1)
        except _DAMAGE as error:
            raise UserError(f"{unit.path} is damaged ({error}): {_MEND}") from error
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


def _parquet(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = unit.part.line if unit.part else 0
    groups = range(unit.part.start, unit.part.stop) if unit.part else None
    try:
        with _open(unit) as handle, pq.ParquetFile(handle) as table:
            columns = _columns(unit, table.schema_arrow, settings)
            for batch in table.iter_batches(256, groups, columns):
                for i in range(batch.num_rows):
                    row += 1
                    try:
                        record = {name: batch.column(name)[i].as_py() for name in columns}
                    except UnicodeDecodeError:
                        problems.set_aside(unit.path, row, "not valid UTF-8")
                        continue
                    yield row, record
    except (pa.ArrowException, *_DAMAGE) as error:
        raise UserError(f"{unit.path} is damaged after row {row} ({brief(error)}): "
                        f"{_MEND}") from error


def _columns(unit: Unit, schema: Any, settings: keys.Data) -> list[str]:
    """The columns to read: the text, and the source if it is text as well."""
    import pyarrow as pa

    def readable(name: str) -> bool:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return any(test(kind) for test in (
            pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
            pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view,
            pa.types.is_null))

    names = schema.names
    text, source = settings.text_field, unit.source_field or settings.source_field
    if text not in names:
        raise UserError(f"{unit.path} has no column '{text}' (it has {', '.join(names[:8])}); "
                        "data.text_field names another")
    if names.count(text) > 1:
        raise UserError(f"{unit.path} has {names.count(text)} columns '{text}': rename all but one")
    if not readable(text):
        raise UserError(f"{unit.path}: column '{text}' holds {schema.field(text).type}, not text; "
                        "data.text_field names another")
    if source not in names:
        source = source.partition(".")[0]
        also = names.count(source) == 1 and pa.types.is_struct(schema.field(source).type)
    else:
        also = source != text and names.count(source) == 1 and readable(source)
    return [text, source] if also else [text]
