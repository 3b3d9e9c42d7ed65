"""Documents in: JSON lines, Parquet, text and Markdown files, and Hugging Face datasets, streamed.

Reading never holds more than a document (or a batch of Parquet rows) in memory. A record that
cannot be used is set aside with its file and line; work goes on until more than
``data.max_bad_share`` of the records are unusable.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Literal

from planearly import keys
from planearly.data.text import sections, text_hash
from planearly.errors import UserError
from planearly.progress import say

Kind = Literal["lines", "parquet", "text", "hub"]

_KINDS: dict[str, Kind] = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines",
                           ".parquet": "parquet", ".txt": "text", ".md": "text"}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
KNOWN = ".jsonl, .json, .parquet, .txt or .md (all but Parquet also as .gz or .zst)"

_TOLERATED = 2  # this many bad records never stop the work: one slip in a set of twenty is 5%
_EXAMPLES = 100
_BUFFER = 1 << 17  # bytes


@dataclass(frozen=True)
class HashRange:
    """A split by document: the ones whose seeded hash is in [low, high)."""

    seed: int
    low: int
    high: int

    def take(self, text: str) -> str:
        return text if self.low <= split_hash(text, self.seed) < self.high else ""


@dataclass(frozen=True)
class Section:
    """A split inside a document: one of consecutive sections, cut between paragraphs or lines.

    ``splits`` are all sections in order, the first of them being what is left for training;
    each of the others takes ``held_out`` of the paragraphs, and at least one.
    """

    split: str
    splits: tuple[str, ...]
    held_out: float

    def take(self, text: str) -> str:
        ends = sections(text, len(self.splits))
        if len(ends) < len(self.splits):
            return text if self.split == self.splits[0] else ""
        others = len(self.splits) - 1
        held = min(max(1, round(self.held_out * len(ends))), (len(ends) - 1) // others)
        last = len(ends) - 1
        borders = [0, *(ends[last - held * (others - i)] for i in range(others + 1))]
        here = self.splits.index(self.split)
        return text[borders[here]:borders[here + 1]].strip()


@dataclass(frozen=True)
class Unit:
    """One input file, or one shard of a Hugging Face dataset; possibly only a split of it."""

    path: str
    kind: Kind
    size: int = 0
    modified: int = 0
    shard: tuple[int, int] = (0, 1)
    keep: HashRange | Section | None = None


@dataclass(frozen=True)
class Document:
    """A text, the source it is counted under, and where it stands (line or row, from 1)."""

    text: str
    source: str
    file: str
    line: int
    n_bytes: int


@dataclass
class Problems:
    """Counts what was read and what was set aside, with the first hundred examples."""

    max_share: float
    good: int = 0
    bad: int = 0
    empty: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def set_aside(self, file: str, line: int, why: str) -> None:
        """Count a record that cannot be used.

        Raises:
            UserError: more than ``max_share`` of at least 1,000 records are bad.
        """
        self.bad += 1
        self._note(file, line, why)
        if self.good + self.bad >= 1_000:
            self.check()

    def skip(self, file: str, line: int, why: str) -> None:
        """Note a record or file without any text: left out, but not an error."""
        self.empty += 1
        self._note(file, line, why)

    def check(self) -> None:
        """Stop if too large a share was bad; called once more when everything was read."""
        total = self.good + self.bad
        if self.bad > max(_TOLERATED, self.max_share * total):
            raise UserError(
                f"{self.bad} of {total} records could not be read, more than data.max_bad_share "
                f"({self.max_share:.2%}); the first: {self.first()}"
            )

    def first(self) -> str:
        """The first example as a clause, or nothing."""
        if not self.examples:
            return ""
        example = self.examples[0]
        return f"{example['file']} line {example['line']}: {example['why']}"

    def add(self, counted: dict[str, Any]) -> None:
        """Add what another one counted (its :meth:`to_dict`)."""
        self.good += counted["good"]
        self.bad += counted["bad"]
        self.empty += counted["empty"]
        self.examples += counted["examples"][:_EXAMPLES - len(self.examples)]

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["max_share"]
        return values

    def tell(self) -> None:
        """One line for the user if anything was set aside."""
        if self.bad:
            say(f"set aside {self.bad} of {self.good + self.bad} records, the first: "
                f"{self.first()}")

    def _note(self, file: str, line: int, why: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"file": file, "line": line, "why": why})


def split_hash(text: str, seed: int) -> int:
    """64 bits of (seed, text with whitespace collapsed): what splits by document go by."""
    key = text_hash(text).to_bytes(8, "little") + str(seed).encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def kind_of(path: Path) -> Kind | None:
    """How a file is read, by its name; None if it is not."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _CODECS:
        suffixes.pop()
        return _KINDS.get(suffixes[-1]) if suffixes and suffixes[-1] != ".parquet" else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def resolve(paths: list[str]) -> list[Unit]:
    """The input files behind files, folders, globs and ``hf://NAME[/CONFIG][:SPLIT]`` names.

    Folders are searched to the bottom, sorted; hidden files, files of other kinds and a README
    beside JSON lines or Parquet are passed over. A file named twice is read once.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    if not paths:
        raise UserError("no documents are named: give files, folders, globs or hf://NAME")
    units: dict[str, Unit] = {}
    for entry in paths:
        if entry.startswith("hf://"):
            from planearly.data import hub
            units.update((f"{entry}#{u.shard[0]}", u) for u in hub.resolve(entry))
            continue
        for path in _files(entry):
            units.setdefault(os.path.realpath(path), file_unit(path))
    return list(units.values())


def file_unit(path: Path) -> Unit:
    kind, status = kind_of(path), path.stat()
    assert kind is not None
    return Unit(str(path), kind, status.st_size, status.st_mtime_ns)


def _files(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(f"{entry}: cannot tell its format by its name; it should be {KNOWN}")
        return [path]
    if path.is_dir():
        found = folder_files(path)
    elif glob.has_magic(entry):
        found = []
        for match in sorted(Path(m) for m in glob.glob(str(path), recursive=True)):
            found += folder_files(match) if match.is_dir() else [match] * bool(kind_of(match))
    else:
        raise UserError(f"{entry} does not exist")
    if not found:
        raise UserError(f"{entry} holds no documents: no file there is {KNOWN}")
    return found


def folder_files(folder: Path) -> list[Path]:
    """The document files of a folder, to the bottom, sorted."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = [Path(parent, name) for name in names
                if not name.startswith(".") and kind_of(Path(name))]
        if any(kind_of(path) != "text" for path in here):
            here = [path for path in here if not path.name.lower().startswith("readme.")]
        found += here
    return sorted(found)


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
        from planearly.data import hub
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
