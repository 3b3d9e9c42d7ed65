"""Documents of one input file, streamed: JSON lines, Parquet, text and Markdown files, and shards
of Hugging Face datasets.

Reading never holds more than a document (or a batch of Parquet rows) in memory. A record that
cannot be used is set aside with its file and line; work goes on until more than
``data.max_bad_share`` of the records are unusable.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from planearly import keys
from planearly.data import hub
from planearly.data.documents import Document, Kind, Problems, Unit
from planearly.errors import UserError

_KINDS: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines",
                           ".parquet": "parquet", ".txt": "text", ".md": "text"}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = ".jsonl, .json, .parquet, .txt or .md (all but Parquet also as .gz or .zst)"

_BUFFER = 1 << 17  # bytes


def kind_of(path: Path) -> Kind | None:
    """How a file is read, by its name; None if it is not."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _CODECS:
        suffixes.pop()
        return _KINDS.get(suffixes[-1]) if suffixes and suffixes[-1] != ".parquet" else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def read_documents(unit: Unit, settings: keys.Data, problems: Problems) -> Iterator[Document]:
    """The documents of one input file, in order, without those that cannot be used.

    Raises:
        UserError: the file is damaged, or too large a share of its records is bad.
    """
    for file, line, record in _records(unit, settings, problems):
        why = _objection(record, settings.text_field)
        text = "" if why else record[settings.text_field]
        n_bytes = 0
        if not why:
            try:
                n_bytes = len(text) if text.isascii() else len(text.encode())
            except UnicodeEncodeError:
                why = "the text holds half of a surrogate pair, which is not valid Unicode"
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
                continue
            n_bytes = len(text.encode())
        source = record.get(settings.source_field)
        yield Document(text, source if isinstance(source, str) and source else _source(unit),
                       file, line, n_bytes)


def _objection(record: Any, text_field: str) -> str:
    """Why a record holds no usable text; empty if it does."""
    if not isinstance(record, dict):
        return f"a JSON {_json_type(record)}, not an object with a field '{text_field}'"
    if text_field not in record:
        has = ", ".join(itertools.islice(record, 8)) or "no fields"
        return f"no field '{text_field}' (it has {has}); data.text_field names another"
    if not isinstance(record[text_field], str):
        return f"field '{text_field}' holds a {_json_type(record[text_field])}, not text"
    return ""


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _source(unit: Unit) -> str:
    """Records count under their file's name, text files under their folder's."""
    path = Path(unit.path)
    return path.absolute().parent.name if unit.kind == "text" else path.name.split(".")[0]


def _records(unit: Unit, settings: keys.Data,
             problems: Problems) -> Iterator[tuple[str, int, Any]]:
    """(file, line, record) of everything in a unit that could be parsed."""
    if unit.kind == "hub":
        columns = [settings.text_field, settings.source_field]
        for line, record in enumerate(hub.records(unit, columns), 1):
            yield unit.path, line, record
    elif unit.size == 0:
        problems.skip(unit.path, 0, "the file is empty")
    elif unit.kind == "parquet":
        yield from _parquet(unit, settings, problems)
    elif unit.kind == "text":
        with _open(unit.path) as handle:
            try:
                data = handle.read()
            except OSError as error:
                raise UserError(f"{unit.path} is damaged ({error})") from error
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            problems.set_aside(unit.path, line, "not valid UTF-8; the file is left out")
            return
        yield unit.path, 1, {settings.text_field: text}
    else:
        yield from _lines(unit, problems)


def _lines(unit: Unit, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    number = 0
    with _open(unit.path) as handle:
        while True:
            try:
                line = handle.readline()
            except OSError as error:
                raise UserError(f"{unit.path} is damaged after line {number} ({error})") from error
            if not line:
                return
            number += 1
            if number == 1 and ".json" in Path(unit.path).suffixes and line[:1] == b"[":
                raise UserError(f"{unit.path} is one JSON list; write one object per line (.jsonl)")
            line = line.strip()
            if not line:
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                problems.set_aside(unit.path, number, "not valid UTF-8")
            except (ValueError, RecursionError) as error:
                problems.set_aside(unit.path, number, f"broken JSON{_brief(error)}")
            else:
                yield unit.path, number, record


def _brief(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f" at column {error.colno}: {error.msg.lower().removesuffix(' at')}"
    return f": {error}"


def _open(path: str) -> IO[bytes]:
    codec = _CODECS.get(Path(path).suffix.lower())
    if codec is None:
        return open(path, "rb", buffering=_BUFFER)
    import pyarrow as pa
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), codec), _BUFFER)


def _parquet(unit: Unit, settings: keys.Data,
             problems: Problems) -> Iterator[tuple[str, int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(unit.path) as table:
            names = table.schema_arrow.names
            if settings.text_field not in names:
                raise UserError(
                    f"{unit.path} has no column '{settings.text_field}' (it has "
                    f"{', '.join(names[:8])}); data.text_field names another"
                )
            columns = [n for n in dict.fromkeys((settings.text_field, settings.source_field))
                       if n in names]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for i in range(batch.num_rows):
                    row += 1
                    try:
                        record = {name: batch.column(name)[i].as_py() for name in columns}
                    except UnicodeDecodeError:
                        problems.set_aside(unit.path, row, "not valid UTF-8")
                        continue
                    yield unit.path, row, record
    except (pa.ArrowException, OSError) as error:
        brief = str(error).splitlines()[0]
        raise UserError(f"{unit.path} is damaged after row {row} ({brief})") from error
