"""Token datasets: documents as windows of tokens, in memory-mapped files.

A document of n tokens is the stream ``BEGIN t1 .. tn EOT``, of which BEGIN is EOT too unless the
tokenizer says otherwise. Its n + 1 targets are cut into
consecutive windows of at most ``context`` targets that do not overlap; a window's inputs are the
same span one token earlier. So every token, and the final EOT, is predicted exactly once, and a
window's first input is BEGIN or the last token of the window before it. A model that was trained
with a BEGIN of its own reads nothing right without it (Gemma): there every window is shown with it
first. Generic and specialization
text are cut alike.

A dataset is a folder::

    tokens-00000.bin ...  little-endian uint16 (uint32 above 65,536 entries), streams back to back
    windows.npy           WINDOW [n_windows], by document
    documents.npy         DOCUMENT [n_documents], in reading order
    paragraphs.npy        PARAGRAPH [n], the hashes of long paragraphs (see overlap.py)
    dataset.json          context, tokenizer, counts, sources, files, what was set aside
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planearly import files
from planearly.data.shards import shard_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE = -100
"""Target of a position that holds no token: it never counts in a loss."""

WINDOW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("document", "<u8")])
"""Shard number, index of the first input in it, number of targets, document number."""

DOCUMENT = np.dtype([("source", "<u4"), ("bytes", "<u8"), ("hash", "<u8"), ("unit", "<u4"),
                     ("line", "<u8")])
"""Index into the sources, UTF-8 bytes of the text, hash of it with whitespace collapsed, index
into the files, line (or row) in the file."""


_CHUNK = 1 << 20  # windows


class TokenDataset:
    """A finished token dataset, read through memory maps.

    Attributes:
        windows: WINDOW [n_windows].
        documents: DOCUMENT [n_documents].
        meta: what ``dataset.json`` holds.
        context: most targets of a window.

    Raises:
        UserError: the folder does not hold a finished dataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.meta: dict[str, Any] = files.read_object(self.path / "dataset.json", "context")
        self.context: int = self.meta["context"]
        self.windows = files.read_array(self.path / "windows.npy")
        self.documents = files.read_array(self.path / "documents.npy")
        self._shards: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def paragraphs(self) -> np.ndarray:
        """PARAGRAPH [n], by document."""
        return files.read_array(self.path / "paragraphs.npy")

    def place(self, document: int) -> str:
        """File and line of a document, for people."""
        record = self.documents[document]
        return f"{self.meta['files'][record['unit']]} line {record['line']}"

    def windows_of(self, documents: np.ndarray) -> np.ndarray:
        """The windows of documents, int64 [n], in their order; found without reading the others."""
        of = self.windows["document"]
        documents = documents.astype(np.uint64)
        first = np.searchsorted(of, documents)
        counts = np.searchsorted(of, documents, side="right") - first
        return np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)

    def windows_without(self, excluded: np.ndarray) -> np.ndarray:
        """The windows of all documents but the excluded ones, bool [n_documents]: int64 [n]."""
        return np.concatenate([np.empty(0, np.int64), *(
            start + np.flatnonzero(~excluded[
                self.windows["document"][start:start + _CHUNK].astype(np.int64)])
            for start in range(0, len(self), _CHUNK))])

    def rows(self, row_windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [R, context]: row r holds the windows ``row_windows[r]``.

        Positions that no window fills have input 0 and target :data:`IGNORE`.
        """
        counts = np.array([len(windows) for windows in row_windows], np.int64)
        record = self.windows[np.concatenate([*row_windows, np.empty(0, np.int64)]).astype(int)]
        length = record["length"].astype(np.int64)
        ends = np.cumsum(length)
        row = np.repeat(np.arange(len(counts)), counts)
        row_start = np.concatenate([[0], ends])[np.cumsum(counts) - counts]
        place = ends - length - row_start[row]  # of a window's first position in its row
        if len(place) and (place + length).max() > self.context:
            raise ValueError(f"a row holds more than {self.context} targets")
        inputs = np.zeros((len(counts), self.context), np.int64)
        targets = np.full((len(counts), self.context), IGNORE, np.int64)
        for shard in np.unique(record["shard"]):
            mine = np.flatnonzero(record["shard"] == shard)
            n = length[mine]
            step = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            source = np.repeat(record["offset"][mine].astype(np.int64), n) + step
            target = np.repeat(row[mine] * self.context + place[mine], n) + step
            tokens = self._shard(int(shard))
            inputs.ravel()[target] = tokens[source]
            targets.ravel()[target] = tokens[source + 1]
        begin = self.meta.get("begin", self.meta["eot"])
        if begin != self.meta["eot"]:
            inputs.ravel()[row * self.context + place] = begin
        return inputs, targets

    def tokens(self, window: int) -> np.ndarray:
        """A window's first input and its targets: [length + 1] token ids."""
        record = self.windows[window]
        start = int(record["offset"])
        return self._shard(int(record["shard"]))[start:start + int(record["length"]) + 1]

    def text(self, window: int, tokenizer: Tokenizer) -> str:
        """The text of a window's targets; a character cut by its border shows as U+FFFD."""
        return self.texts([window], tokenizer)[0]

    def texts(self, windows: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[str]:
        """:meth:`text` of many windows at once."""
        eot = self.meta["eot"]
        targets = (self.tokens(int(window))[1:] for window in windows)
        return tokenizer.decode_batch(
            [t[t != eot].tolist() for t in targets], skip_special_tokens=False
        )

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._shards:
            mapped = np.memmap(self.path / shard_name(shard), self.meta["dtype"], "r")
            self._shards[shard] = np.asarray(mapped)
        return self._shards[shard]


def cut_windows(shard: int, offset: np.ndarray, tokens: np.ndarray, context: int,
                first_document: int) -> np.ndarray:
    """WINDOW records of documents whose streams begin at ``offset`` and have ``tokens`` targets."""
    tokens = tokens.astype(np.int64)
    counts = -(-tokens // context)
    document = np.repeat(np.arange(len(tokens)), counts)
    done = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * context
    windows = np.empty(len(document), WINDOW)
    windows["shard"] = shard
    windows["offset"] = offset.astype(np.int64)[document] + done
    windows["length"] = np.minimum(context, tokens[document] - done)
    windows["document"] = first_document + document
    return windows
