"""Large files in parts, so that one of them keeps every worker busy.

JSON lines are read in ranges of bytes, whose lines are counted first, and Parquet files in row
groups. A packed file of lines can be read from its beginning only: it is read once and its lines
are written to files that can be read apart. A document's line is that of the whole file, and the
documents and their order are those of the file read at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from planearly import files
from planearly.data.documents import Part, Unit, group_bytes
from planearly.data.jsonlines import is_lines, line_blocks, line_ends
from planearly.data.parquet import row_groups
from planearly.engine.work import Advance, Executor, Shard, Work, shard_function

_LARGE = 1.5  # times what is read at once
_BLOCK = 1 << 22  # bytes
_FEW = 2_000.0  # megabytes whose lines are counted in seconds


def divided(units: list[Unit], folder: Path, executor: Executor,
            unpack: bool = True) -> list[tuple[int, Unit]]:
    """Units with their numbers, large ones in parts of about :func:`group_bytes`.

    Args:
        folder: for the lines of packed files.
        unpack: divide these too; for work that is little beside reading them it does not pay.
    """
    size = group_bytes(units)
    large = {i: unit for i, unit in enumerate(units) if unit.text_bytes > _LARGE * size}
    lines = {i: unit for i, unit in large.items() if unit.kind == "lines" and is_lines(unit)}
    plain = {i: unit for i, unit in lines.items() if unit.text_bytes == unit.size}
    packed = {i: unit for i, unit in lines.items() if unpack and i not in plain}
    parts = {i: list(_of_groups(unit, size)) for i, unit in large.items() if unit.kind == "parquet"}
    parts |= _of_bytes(plain, size, folder, executor) if plain else {}
    parts |= _of_packed(packed, size, folder, executor) if packed else {}
    return [(i, each) for i, unit in enumerate(units)
            for each in ([replace(unit, part=part) for part in parts.get(i, [])] or [unit])]


def _of_groups(unit: Unit, size: float) -> Iterator[Part]:
    groups = row_groups(unit)
    share = unit.text_bytes / max(sum(n_bytes for _, n_bytes in groups), 1)
    first = row = rows = 0
    held = 0.0
    for i, (here, n_bytes) in enumerate(groups, 1):
        rows, held = rows + here, held + share * n_bytes
        if held >= size or i == len(groups):
            yield Part(first, i, row, held)
            first, row, rows, held = i, row + rows, 0, 0.0


def _of_bytes(units: dict[int, Unit], size: float, folder: Path,
              executor: Executor) -> dict[int, list[Part]]:
    ranges = []
    for i, unit in units.items():
        many = round(unit.size / size)
        borders = [unit.size * k // many for k in range(many + 1)]
        ranges += [(i, start, stop) for start, stop in pairwise(borders)]
    counts = executor.map(Work("counting lines", "MB", count_lines, [
        _shard(units[i], folder / f"{i}-{start}.json", (stop - start) / 1e6, start=start, stop=stop)
        for i, start, stop in ranges], small=_FEW))
    found: dict[int, list[Part]] = {i: [] for i in units}
    line = dict.fromkeys(units, 0)
    for (i, start, stop), counted in zip(ranges, counts, strict=True):
        found[i].append(Part(start, stop, line[i], stop - start))
        line[i] += counted["lines"]
    return found


def _of_packed(units: dict[int, Unit], size: float, folder: Path,
               executor: Executor) -> dict[int, list[Part]]:
    counts = executor.map(Work("unpacking large files", "MB", unpack, [
        _shard(unit, folder / f"{i}.json", unit.text_bytes / 1e6, size=size,
               out=str(folder / str(i))) for i, unit in units.items()]))
    return {i: [Part(**part) for part in counted["parts"]]
            for i, counted in zip(units, counts, strict=True)}


def _shard(unit: Unit, marker: Path, megabytes: float, **more: Any) -> Shard:
    made = {name: value for name, value in more.items() if name != "out"}
    return Shard(unit.path, megabytes, {"unit": unit.to_json(), **more}, marker,
                 files.digest([unit.identity, made]))


@shard_function
def count_lines(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Count the ends of lines in a range of bytes."""
    lines = 0
    for n_bytes, ends in line_ends(Unit.from_json(item["unit"]), item["start"], item["stop"],
                                   _BLOCK):
        lines += ends
        advance(n_bytes / 1e6)
    return {"lines": lines}


@shard_function
def unpack(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Write the lines of a packed file to several, packed in frames of some lines."""
    import pyarrow as pa

    parts: list[dict[str, Any]] = []
    line = place = 0
    blocks = line_blocks(Unit.from_json(item["unit"]), _BLOCK)
    block = next(blocks, None)
    while block is not None:
        stored, lines, held = Path(item["out"]) / f"{len(parts):05d}.zst", 0, 0
        with files.atomic_write(stored) as handle:
            while block is not None and held < item["size"]:
                data = b"".join(block)
                handle.write(pa.compress(data, "zstd", asbytes=True))
                lines, held = lines + len(block), held + len(data)
                advance(len(data) / 1e6)
                block = next(blocks, None)
        parts.append(asdict(Part(place, place + held, line, held, str(stored))))
        line, place = line + lines, place + held
    return {"parts": parts}
