"""Text to token ids, fast: most of a text is words that were seen before.

`tokenizers` spends its time on finding words and allocating for each of them. With the
pre-tokenizer of :mod:`planearly.data.tokenizer` (single digits, then GPT-2's pattern) there are
places in a text at which no token ever crosses, recognisable from the characters beside them. Cut
there, a text becomes chunks (mostly `` word``) whose ids are looked up in a table; only chunks not
met before go to `tokenizers`. The ids are the same, several times as fast on one core. Any other
tokenizer is called directly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

_SPACE = r" \t\n\r\f\v\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_MARK = r"!-&(-/:-@\[-`{-~"  # ASCII punctuation but the apostrophe, which may begin a contraction

# A cut is safe after an ASCII letter that no letter follows, around a digit, after punctuation
# that a letter, digit or space follows, before the last space of a run unless a number follows
# (digits are split off before words are found), and after a newline that is the whole run.
# Everything else, all that is not ASCII above all, stays together up to the next space.
_CHUNK = re.compile(
    r" ?[A-Za-z]++(?![^\x00-\x7f])"
    r"|[0-9]"
    rf"| ?[{_MARK}]++(?=[A-Za-z0-9{_SPACE}]|\Z)"
    rf"|[{_SPACE}]++(?=[0-9]|\Z)"
    rf"|[{_SPACE}]+(?=[{_SPACE}][\x00-\x08\x0e-\x1f!-/:-\x7f])"
    rf"|\n(?=[^{_SPACE}])"
    rf"|[{_SPACE}]*[^{_SPACE}]+"
)
_SEPARATOR = "0"  # a digit is always a token of its own
_TABLE_CHUNKS, _TABLE_TOKENS = 500_000, 8_000_000  # then the table is started afresh
_JOINED = 1 << 16


class Encoder:
    """Encodes texts with one tokenizer; remembers chunks between calls."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4")
        self._chunked = _splits_as_ours(tokenizer)
        self._reset()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after the other, and int64 [n] how many each has."""
        if not self._chunked:
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            parts = [np.array(e.ids, self.dtype) for e in encoded]
            return (np.concatenate([np.empty(0, self.dtype), *parts]),
                    np.array([len(p) for p in parts], np.int64))
        per_text = [_CHUNK.findall(text) for text in texts]
        chunks = [chunk for found in per_text for chunk in found]
        table = self._table
        unknown = [chunk for chunk in dict.fromkeys(chunks) if chunk not in table]
        if unknown:
            self._learn(unknown)
        numbers = np.fromiter(map(table.__getitem__, chunks), np.int64, len(chunks))
        counts = self._counts[numbers]
        starts = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        ids = self._ids[np.repeat(self._starts[numbers], counts) + within]
        ends = starts[np.cumsum([len(found) for found in per_text], dtype=np.int64)]
        if len(table) > _TABLE_CHUNKS or len(self._ids) > _TABLE_TOKENS:
            self._reset()
        return ids, np.diff(ends, prepend=0)

    def _reset(self) -> None:
        self._table: dict[str, int] = {}
        self._ids = np.empty(0, self.dtype)
        self._starts = self._counts = np.empty(0, np.int64)

    def _learn(self, chunks: list[str]) -> None:
        """Encode new chunks, many in one text with a separator between them."""
        joined: list[list[str]] = [[]]
        length = 0
        alone = []
        for chunk in chunks:
            if _SEPARATOR in chunk:
                alone.append(chunk)
                continue
            if length > _JOINED:
                joined.append([])
                length = 0
            joined[-1].append(chunk)
            length += len(chunk) + 1
        texts = [*(_SEPARATOR.join(part) for part in joined), *alone]
        encoded = [np.array(e.ids, self.dtype) for e in
                   self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        parts = []
        separator = self.tokenizer.encode(_SEPARATOR, add_special_tokens=False).ids[0]
        order = [chunk for part in joined for chunk in part] + alone
        counts = []
        for part, ids in zip(joined, encoded, strict=False):
            if part:
                is_gap = ids == separator
                gaps = np.concatenate([[-1], np.flatnonzero(is_gap), [len(ids)]])
                counts.append(np.diff(gaps) - 1)
                parts.append(ids[~is_gap])
        for ids in encoded[len(joined):]:
            counts.append(np.array([len(ids)]))
            parts.append(ids)
        base = len(self._table)
        self._table.update((chunk, base + i) for i, chunk in enumerate(order))
        self._ids = np.concatenate([self._ids, *parts])
        self._counts = np.concatenate([self._counts, *counts])
        self._starts = np.cumsum(self._counts) - self._counts


def _splits_as_ours(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer splits text as ours do, so that chunks can be encoded on their own."""
    from planearly.data.tokenizer import pre_tokenizer

    spec = json.loads(tokenizer.to_str())
    ours = Tokenizer(tokenizer.model)
    ours.pre_tokenizer = pre_tokenizer()
    return (spec["normalizer"] is None and tokenizer.encode_special_tokens
            and all(token["special"] for token in spec["added_tokens"])
            and spec["pre_tokenizer"] == json.loads(ours.to_str())["pre_tokenizer"]
            and len(tokenizer.encode(_SEPARATOR, add_special_tokens=False)) == 1)
