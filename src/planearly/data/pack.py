"""Rows: windows of one group (cluster) laid side by side so that few positions stay empty.

Documents end anywhere, so a document's last window is short. Training on it alone would waste the
rest of the row; packing it with windows of *another* cluster would send them through the wrong
expert (and let the sampler draw what it did not choose). So short windows share a row with short
windows of their own group only. A full window is a row by itself.

Packing is best fit by decreasing length: each window goes where the least room is left over, and
opens a new row where nothing fits. It wastes fewer positions than best fit in random order (a mean
length of a third of the row: 3.6% against 6.1% at 50 windows a group, 0.2% against 0.9% at 1,000).
Why after clustering and not before: docs/decisions.md, "Packing after clustering".

A corpus is packed in two passes over shards: each range of windows is put in order of groups, then
some groups after others gather their windows from all ranges and are packed. Memory is that of a
range, or of the largest group.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planearly import files
from planearly.data.dataset import TokenDataset
from planearly.engine.work import Advance, Executor, Shard, Work, shard_function

_RANGE = 1 << 19  # windows put in order, or packed, at once
_SMALL = 4e6  # windows that one process packs in seconds
_GROUPED = np.dtype([("window", "<u4"), ("length", "<u4"), ("kept", "<u4")])
"""A window's number in its range, its targets, and how many windows kept there come before."""


@dataclass(frozen=True)
class Rows:
    """Which windows share a row, and which rows belong to a group.

    Attributes:
        group_offsets: int64 [n_groups + 1]; group g's rows are ``group_offsets[g]`` up to
            ``group_offsets[g + 1]``.
        row_offsets: int64 [n_rows + 1]; row r's windows are ``windows`` at ``row_offsets[r]`` up to
            ``row_offsets[r + 1]``.
        windows: int64 [n], window numbers in row order.
        fill: share of all rows' positions that hold a target.
    """

    group_offsets: np.ndarray
    row_offsets: np.ndarray
    windows: np.ndarray
    fill: float

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, row: int) -> np.ndarray:
        """The window numbers of one row."""
        return self.windows[self.row_offsets[row]:self.row_offsets[row + 1]]

    def save(self, folder: Path) -> None:
        """Write the arrays as ``.npy`` files, and ``rows.json`` last."""
        for name in ("group_offsets", "row_offsets", "windows"):
            files.write_array(folder / f"{name}.npy", getattr(self, name))
        files.write_json(folder / "rows.json", {"rows": len(self), "fill": self.fill})

    @classmethod
    def load(cls, folder: Path) -> Rows:
        """Read what :meth:`save` wrote; the arrays are memory-mapped."""
        meta = files.read_object(folder / "rows.json", "fill")
        group_offsets, row_offsets, windows = (
            files.read_array(folder / f"{name}.npy")
            for name in ("group_offsets", "row_offsets", "windows"))
        return cls(group_offsets, row_offsets, windows, meta["fill"])


def pack_rows(lengths: np.ndarray, groups: np.ndarray, n_groups: int, context: int,
              seed: int) -> Rows:
    """Pack windows into rows of ``context`` positions, each of one group.

    Args:
        lengths: [n] targets of each window, 1 to ``context``.
        groups: [n] group of each window, 0 to ``n_groups - 1``; -1 leaves the window out.
        n_groups: how many groups there are; a group may be empty.
        context: positions of a row.
        seed: of the order among windows of equal length and of the order inside a row (so that
            long windows do not always come first).

    Returns:
        The rows; the same arguments give the same rows.
    """
    lengths, groups = np.asarray(lengths, np.int64), np.asarray(groups, np.int64)
    kept = np.flatnonzero(groups >= 0)
    length, group = lengths[kept], groups[kept]
    if len(kept) and not (length.min() >= 1 and length.max() <= context):
        raise ValueError(f"window lengths must be between 1 and the context, {context}")
    if len(kept) and group.max() >= n_groups:
        raise ValueError(f"group {group.max()} is not among the {n_groups} groups")

    tie = np.random.default_rng(seed).permutation(len(kept))
    return _packed(kept, length, group, tie, n_groups, context)


def _packed(window: np.ndarray, length: np.ndarray, group: np.ndarray, tie: np.ndarray,
            n_groups: int, context: int) -> Rows:
    """:func:`pack_rows` of windows whose order among equals, ``tie``, is known."""
    order = np.lexsort((tie, -length, group))
    window, length, group, tie = window[order], length[order], group[order], tie[order]

    full = length == context
    n_full = np.bincount(group[full], minlength=n_groups)
    local = np.empty(len(window), np.int64)  # row of a window, counted within its group
    first_full = np.cumsum(n_full) - n_full
    local[full] = np.arange(full.sum()) - first_full[group[full]]
    short_rows, n_short = _best_fit(length[~full], group[~full], n_groups, context)
    local[~full] = n_full[group[~full]] + short_rows

    group_offsets = np.zeros(n_groups + 1, np.int64)
    np.cumsum(n_full + n_short, out=group_offsets[1:])
    row = group_offsets[group] + local
    in_rows = np.lexsort((tie, row))
    row_offsets = np.zeros(group_offsets[-1] + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=group_offsets[-1]), out=row_offsets[1:])
    return Rows(group_offsets, row_offsets, window[in_rows],
                _fill(int(length.sum()), int(group_offsets[-1]), context))


def _fill(targets: int, rows: int, context: int) -> float:
    return targets / (rows * context) if rows else 1.0


# Corpora ----------------------------------------------------------------------------------------

def pack_corpus(dataset: TokenDataset, groups: Path, excluded: Path, n_groups: int, seed: int,
                folder: Path, executor: Executor) -> Rows:
    """Write :func:`pack_rows` of a dataset's windows to ``folder``, as :meth:`Rows.save` does.

    Args:
        groups: ``.npy`` file [n_windows], the group of each window; -1 leaves it out.
        excluded: ``.npy`` file, bool [n_documents]: documents whose windows are left out.

    Raises:
        UserError: a full disk.
    """
    parts = folder / "parts"
    item = {"dataset": str(dataset.path), "groups": str(groups), "excluded": str(excluded),
            "parts": str(parts), "n_groups": n_groups, "context": dataset.context}
    made = [dataset.meta["key"], *map(files.file_digest, (groups, excluded)), n_groups, seed]
    ranges = []
    for number, start in enumerate(range(0, len(dataset), _RANGE)):
        stop = min(start + _RANGE, len(dataset))
        ranges.append(Shard(
            f"{number} (windows {start} to {stop})", stop - start,
            {**item, "number": number, "start": start, "stop": stop},
            parts / f"range-{number:05d}.json", files.digest([*made, start, stop]),
            (_windows(parts, number), _borders(parts, number))))
    counts = executor.map(Work("putting windows in groups", "windows", group_range, ranges,
                               small=_SMALL))
    kept = [counted["kept"] for counted in counts]
    _write_ties(parts / "ties.npy", sum(kept), seed)
    sizes = sum((np.diff(files.read_array(_borders(parts, number))) for number in
                 range(len(ranges))), np.zeros(n_groups, np.int64))
    made.append(_RANGE)
    shards = []
    for number, (first, stop) in enumerate(_bundles(sizes)):
        to = [parts / f"{name}-{number:05d}.npy" for name in ("counts", "rows", "windows")]
        shards.append(Shard(
            f"{number} (groups {first} to {stop})", int(sizes[first:stop].sum()),
            {**item, "first": first, "stop": stop, "kept": kept, "rows": _RANGE,
             "to": list(map(str, to))},
            parts / f"packed-{number:05d}.json", files.digest([*made, first, stop]), tuple(to)))
    packed = executor.map(Work("packing rows", "windows", pack_groups, shards, small=_SMALL))
    rows = sum(counted["rows"] for counted in packed)
    offsets = np.cumsum([0, *(n for shard in shards for n in files.read_array(shard.made[0]))])
    files.write_array(folder / "group_offsets.npy", offsets.astype(np.int64))
    files.write_chunks(folder / "row_offsets.npy", np.dtype("<i8"), (rows + 1,), _sums(
        files.read_array(shard.made[1]) for shard in shards))
    files.write_chunks(folder / "windows.npy", np.dtype("<i8"), (sum(kept),), (
        files.read_array(shard.made[2]) for shard in shards))
    fill = _fill(sum(counted["targets"] for counted in packed), rows, dataset.context)
    files.write_json(folder / "rows.json", {"rows": rows, "fill": fill})
    shutil.rmtree(parts, ignore_errors=True)
    return Rows.load(folder)


def _windows(parts: Path, number: int) -> Path:
    return parts / f"grouped-{number:05d}.npy"


def _borders(parts: Path, number: int) -> Path:
    return parts / f"borders-{number:05d}.npy"


def _bundles(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Borders of neighbouring groups that have about :data:`_RANGE` windows, or are one."""
    first = held = 0
    for group, size in enumerate(sizes.tolist()):
        if held and held + size > _RANGE:
            yield first, group
            first, held = group, 0
        held += size
    yield first, len(sizes)


def _write_ties(path: Path, n: int, seed: int) -> None:
    """Write the permutation that ``Generator.permutation(n)`` makes, int64 [n], in no memory."""
    made = files.temporary_name(path)
    files.write_chunks(made, np.dtype("<i8"), (n,), (
        np.arange(start, min(start + _RANGE, n)) for start in range(0, n, _RANGE)))
    if n:
        ties = np.load(made, mmap_mode="r+")
        np.random.default_rng(seed).shuffle(np.asarray(ties))
        ties.flush()
    os.replace(made, path)


def _sums(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """0, and the sums of what comes up to every place."""
    yield np.zeros(1, np.int64)
    last = 0
    for part in parts:
        ends = last + np.cumsum(part, dtype=np.int64)
        last = int(ends[-1]) if len(ends) else last
        yield ends


@shard_function
def group_range(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Write the windows of a range that are kept in order of groups, and where each begins."""
    here = slice(item["start"], item["stop"])
    windows = TokenDataset(Path(item["dataset"])).windows[here]
    groups = np.array(files.read_array(Path(item["groups"]))[here], np.int64)
    groups[files.read_array(Path(item["excluded"]))[windows["document"].astype(np.int64)]] = -1
    kept = np.flatnonzero(groups >= 0)
    order = np.argsort(groups[kept], kind="stable")
    found = np.empty(len(kept), _GROUPED)
    found["window"], found["kept"] = kept[order], order
    found["length"] = windows["length"][kept[order]]
    counts = np.bincount(groups[kept], minlength=item["n_groups"])
    files.write_array(_windows(Path(item["parts"]), item["number"]), found)
    files.write_array(_borders(Path(item["parts"]), item["number"]), np.cumsum([0, *counts]))
    advance(len(groups))
    return {"kept": len(kept)}


@shard_function
def pack_groups(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Pack some groups: rows of each, windows of each row, and these windows, each in a file."""
    parts, first, stop = Path(item["parts"]), item["first"], item["stop"]
    ties = files.read_array(parts / "ties.npy")
    found: list[list[np.ndarray]] = [[np.empty(0, np.int64)] * 4]
    before = 0
    for number, kept in enumerate(item["kept"]):
        borders = files.read_array(_borders(parts, number))
        mine = np.array(files.read_array(_windows(parts, number))[borders[first]:borders[stop]])
        found.append([
            mine["window"] + np.int64(number * item["rows"]), mine["length"].astype(np.int64),
            np.repeat(np.arange(stop - first), np.diff(borders[first:stop + 1])),
            ties[before + mine["kept"].astype(np.int64)]])
        before += kept
    window, length, group, tie = map(np.concatenate, zip(*found, strict=True))
    packed = _packed(window, length, group, tie, stop - first, item["context"])
    for to, array in zip(item["to"], (np.diff(packed.group_offsets), np.diff(packed.row_offsets),
                                      packed.windows), strict=True):
        files.write_array(Path(to), array)
    advance(len(window))
    return {"rows": len(packed), "targets": int(length.sum())}


def _best_fit(length: np.ndarray, group: np.ndarray, n_groups: int,
              context: int) -> tuple[np.ndarray, np.ndarray]:
    """Row (within its group) of each window, in the order given; and how many rows a group has.

    Bit s of ``free`` says that some open row has exactly s positions left, so the tightest row
    that holds a window is the lowest set bit at or above its length: one shift, whatever the
    number of open rows.
    """
    rows = np.empty(len(length), np.int64)
    counts = np.zeros(n_groups, np.int64)
    bounds = np.searchsorted(group, np.arange(n_groups + 1))
    for g in np.flatnonzero(np.diff(bounds)).tolist():
        start, stop = int(bounds[g]), int(bounds[g + 1])
        free, opened = 0, 0
        open_rows: dict[int, list[int]] = {}
        placed = []
        for size in length[start:stop].tolist():
            fits = free >> size
            if fits:
                space = size + (fits & -fits).bit_length() - 1
                stack = open_rows[space]
                row = stack.pop()
                if not stack:
                    free ^= 1 << space
            else:
                space, row = context, opened
                opened += 1
            placed.append(row)
            left = space - size
            if left:
                open_rows.setdefault(left, []).append(row)
                free |= 1 << left
        rows[start:stop] = placed
        counts[g] = opened
    return rows, counts
