"""What a corpus is read as: input files, the documents in them, and what could not be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from planearly.data.text import sections, text_hash
from planearly.errors import UserError, printable
from planearly.progress import say
from planearly.storage import is_url

Kind = Literal["lines", "parquet", "text", "hub"]

ANOTHER_FIELD = "data.text_field (of evaluate: --text-field) names another"

_TOLERATED = 2  # this many bad records never stop the work: one slip in a set of twenty is 5%
_EXAMPLES = 100
_PACKED = 3.5  # bytes of text in a byte of .gz, .zst or .parquet, about
_GROUP = 64 << 20  # bytes of text
_UNKNOWN = 5e8  # bytes of text in a shard of the hub that does not say its size


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


def keep_to_json(keep: HashRange | Section | None) -> dict[str, Any] | None:
    """A split of a unit as :func:`keep_from_json` reads it."""
    return None if keep is None else {"kind": type(keep).__name__, **asdict(keep)}


def keep_from_json(values: dict[str, Any] | None) -> HashRange | Section | None:
    """A split of a unit, equal to the one that was written."""
    if values is None:
        return None
    if values["kind"] == "HashRange":
        return HashRange(values["seed"], values["low"], values["high"])
    return Section(values["split"], tuple(values["splits"]), values["held_out"])


@dataclass(frozen=True)
class Part:
    """A part of a file: lines that begin in the bytes [start, stop) of its text, or the row groups
    [start, stop) of a Parquet file.

    Attributes:
        line: lines (rows) that end before ``start``.
        n_bytes: of text, about.
        stored: file that holds the part's lines, packed; empty where they are read in place.
    """

    start: int
    stop: int
    line: int
    n_bytes: float
    stored: str = ""


@dataclass(frozen=True)
class Unit:
    """One input file, of this machine or of a store, or one shard of a Hugging Face dataset;
    possibly only a split of it.
    """

    path: str
    kind: Kind
    size: int = 0
    modified: int = 0
    shard: tuple[int, int] = (0, 1)
    keep: HashRange | Section | None = None
    revision: str = ""  # of a dataset on the hub: its commit; of a store's file: its version
    source_field: str = ""  # that names a record's source; empty: the recipe's
    part: Part | None = None  # None: all of it

    @property
    def stored(self) -> bool:
        """Whether it is a file of a store, which ``path`` is the URL of."""
        return self.kind != "hub" and is_url(self.path)

    @property
    def identity(self) -> dict[str, Any]:
        """What the unit's documents depend on, as plain values."""
        values = asdict(self)
        if self.part is None:
            del values["part"]
        else:
            del values["part"]["stored"]
        return values

    def to_json(self) -> dict[str, Any]:
        """The unit as :meth:`from_json` reads it."""
        return asdict(self) | {"keep": keep_to_json(self.keep)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Unit:
        """A unit, equal to the one that was written."""
        first, shards = values["shard"]
        return cls(**values | {"shard": (first, shards), "keep": keep_from_json(values["keep"]),
                               "part": Part(**values["part"]) if values["part"] else None})

    @property
    def text_bytes(self) -> float:
        """About how much text it holds: a guess, if it is packed or its size is not known."""
        if self.part is not None:
            return self.part.n_bytes
        if self.kind == "hub":
            return self.size or _UNKNOWN
        return unpacked(self.path, self.size)


def unpacked(path: str, size: int) -> float:
    """About how many bytes of text a file of ``size`` bytes holds, by its name."""
    return size * (_PACKED if path.lower().endswith((".gz", ".zst", ".parquet")) else 1.0)


def group_bytes(units: Sequence[Unit]) -> float:
    """Bytes of text that are read at once: 64 MB, or a 1,024th of all units, if that is more."""
    return max(_GROUP, sum(unit.text_bytes for unit in units) / 1024)


def grouped(units: Sequence[Unit]) -> list[list[tuple[int, Unit]]]:
    """Units with their numbers, in groups of :func:`group_bytes` of text; a shard of the hub is a
    group.
    """
    target = group_bytes(units)
    groups: list[list[tuple[int, Unit]]] = []
    held = target + 1.0
    for numbered in enumerate(units):
        size = numbered[1].text_bytes if numbered[1].kind != "hub" else target
        if held + size > target:
            groups.append([])
            held = 0.0
        groups[-1].append(numbered)
        held += size
    return groups


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
    """Counts what was read and what was set aside, with the first hundred examples.

    Of the ``good`` documents, ``left_out`` belong to another split or to no subset.
    """

    max_share: float
    good: int = 0
    bad: int = 0
    empty: int = 0
    left_out: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    guessed: dict[str, str] = field(default_factory=dict)  # file: its encoding, the first hundred

    def guess(self, file: str, encoding: str) -> None:
        """Note that a file does not say its encoding and was read as ``encoding``."""
        if len(self.guessed) < _EXAMPLES:
            self.guessed[printable(file)] = encoding

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
                f"{self.bad} of {total} records could not be read, more than {self.max_share:.2%} "
                f"(of a recipe: data.max_bad_share); the first: {self.first()}"
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
        self.left_out += counted["left_out"]
        self.examples += counted["examples"][:_EXAMPLES - len(self.examples)]
        self.guessed |= counted["guessed"]

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["max_share"]
        return values

    def tell(self) -> None:
        """A line for the user if anything was set aside, and if an encoding was guessed."""
        if self.guessed:
            file, encoding = next(iter(self.guessed.items()))
            more = f" and {len(self.guessed) - 1} more" if len(self.guessed) > 1 else ""
            say(f"{file}{more} is taken to be in {encoding.upper()}, which it does not say")
        if self.bad:
            say(f"set aside {self.bad} of {self.good + self.bad} records, the first: "
                f"{self.first()}")

    def _note(self, file: str, line: int, why: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"file": printable(file), "line": line, "why": printable(why)})


def split_hash(text: str, seed: int) -> int:
    """64 bits of (seed, text with whitespace collapsed): what splits by document go by."""
    key = text_hash(text).to_bytes(8, "little") + str(seed).encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
