"""Rows: windows of one group (cluster) laid side by side so that few positions stay empty.

Documents end anywhere, so a document's last window is short. Training on it alone would waste the
rest of the row; packing it with windows of *another* cluster would send them through the wrong
expert (and let the sampler draw what it did not choose). So short windows share a row with short
windows of their own group only. A full window is a row by itself.

Packing is best fit by decreasing length: each window goes where the least room is left over, and
opens a new row where nothing fits. It wastes fewer positions than best fit in random order (a mean
length of a third of the row: 3.6% against 6.1% at 50 windows a group, 0.2% against 0.9% at 1,000).
Why after clustering and not before: docs/decisions.md, "Packing after clustering".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planearly import files


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
        meta = files.read_json(folder / "rows.json")
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
    order = np.lexsort((tie, -length, group))
    kept, length, group, tie = kept[order], length[order], group[order], tie[order]

    full = length == context
    n_full = np.bincount(group[full], minlength=n_groups)
    local = np.empty(len(kept), np.int64)  # row of a window, counted within its group
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
    positions = group_offsets[-1] * context
    return Rows(group_offsets, row_offsets, kept[in_rows],
                fill=float(length.sum() / positions) if positions else 1.0)


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
