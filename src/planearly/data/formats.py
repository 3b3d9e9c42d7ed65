"""The formats of input files: which one a file is of, by its name; and its bytes, unpacked."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from pathlib import Path, PurePath
from typing import IO

from planearly import storage
from planearly.data import hub
from planearly.data.documents import Kind, Unit
from planearly.errors import UserError
from planearly.files import reading_error

_KINDS: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines",
                           ".parquet": "parquet", ".txt": "text", ".md": "text"}
_CODECS = (".gz", ".zst")
KNOWN = ".jsonl, .json, .parquet, .txt or .md (all but Parquet also as .gz or .zst)"
DAMAGE = (OSError, EOFError, zlib.error, UnicodeError)
"""What reading a damaged file raises."""
_RECORDS = re.compile(rb'PAR1|(\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*(\[\s*)?\{\s*["}]')
"""How Parquet and JSON records begin, and prose does not."""
_BEGINNING = 1 << 12  # bytes


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


def open_unit(unit: Unit, until: int | None = None) -> IO[bytes]:
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


def reads_otherwise(unit: Unit) -> bool:
    """Whether a text's bytes would be records under another name, and so other documents."""
    if unit.kind != "text":
        return False
    try:
        with open_unit(unit) as handle:
            data = handle.read(_BEGINNING)
    except DAMAGE:  # told by whoever needs the text
        return False
    return _RECORDS.match(data.replace(b"\0", b"")) is not None  # zeros: of UTF-16 and UTF-32


def damaged(unit: Unit, error: object, after: str = "") -> UserError:
    """One sentence for a file that cannot be read to its end.

    Args:
        after: how far it could be, as ``line 3``; empty: not at all.
    """
    where = f" after {after}" if after else ""
    return UserError(f"{unit.path} is damaged{where} ({error}): copy or download it again, or "
                     "leave the file out")
