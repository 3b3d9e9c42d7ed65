"""Text to token ids, fast: most of a text is words that were seen before.

`tokenizers` spends its time on finding words and allocating for each of them. With the
pre-tokenizer of :mod:`planearly.data.tokenizer` (single digits, then GPT-2's pattern) there are
places in a text at which no token ever crosses, recognisable from the characters beside them. Cut
there, a text becomes chunks (mostly `` word``) whose ids are looked up in a table; only chunks not
met before go to `tokenizers`. The ids are the same, several times as fast on one core. Any other
tokenizer is called directly.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from planearly.data.tokenizer import id_type, pre_tokenizer, vocab_size
from planearly.errors import UserError

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
# BERT's words end at spaces and ASCII punctuation, whatever the normalizer makes of the rest; it
# drops control characters, so that a word may go on after one.
_END = r" \t\n\r!-/:-@\[-`{-~"
_BERT_CHUNK = re.compile(rf"[A-Za-z0-9]++(?=[{_END}]|\Z)|[!-/:-@\[-`{{-~]|[^ \t\n\r]+")


class _Splitting(NamedTuple):
    """How texts are cut into chunks that are encoded on their own.

    Attributes:
        chunk: matches every chunk.
        separator: of chunks that are encoded as one text; its ``sign`` is always one token.
        sign: what no chunk that shares a text with others contains.
    """

    chunk: re.Pattern[str]
    separator: str
    sign: str = "0"


_OURS, _BERT = _Splitting(_CHUNK, "0"), _Splitting(_BERT_CHUNK, " 0 ")
_TABLE_CHUNKS, _TABLE_TOKENS = 300_000, 4_000_000  # then the table is started afresh
_JOINED = 1 << 16


class Encoder:
    """Encodes texts with one tokenizer; remembers chunks between calls.

    Attributes:
        dtype: of the ids.
        unknown: UTF-8 bytes, of all texts so far, that the tokenizer has no token for: it put its
            unknown token there, or nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = id_type(vocab_size(tokenizer))
        self.unknown = 0
        self._splitting = _splitting(tokenizer)
        self._count_unknown = _counter_of_unknown(tokenizer)
        self._reset()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one after the other, and int64 [n] how many each has.

        Raises:
            UserError: the tokenizer has neither tokens for a text nor an unknown token.
        """
        if not self._splitting:
            try:
                encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            except Exception as error:
                if type(error) is not Exception:  # the Rust side's are bare
                    raise
                raise UserError(f"the tokenizer cannot encode this text ({error}): take another, "
                                "or train one (tokenizer.path=null)") from error
            parts = [np.array(e.ids, self.dtype) for e in encoded]
            return self._counted(texts, np.concatenate([np.empty(0, self.dtype), *parts]),
                                 np.array([len(p) for p in parts], np.int64))
        per_text = list(map(self._splitting.chunk.findall, texts))
        chunks = [chunk for found in per_text for chunk in found]
        numbers = np.fromiter(map(self._table.__getitem__, chunks), np.int64, len(chunks))
        self._learn(self._splitting)
        counts = self._counts[numbers]
        starts = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        ids = self._ids[np.repeat(self._starts[numbers], counts) + within]
        ends = starts[np.cumsum([len(found) for found in per_text], dtype=np.int64)]
        if len(self._table) > _TABLE_CHUNKS or len(self._ids) > _TABLE_TOKENS:
            self._reset()
        return self._counted(texts, ids, np.diff(ends, prepend=0))

    def _counted(self, texts: Sequence[str], ids: np.ndarray,
                 counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._count_unknown:
            parts = np.split(ids, np.cumsum(counts)[:-1]) if len(counts) else []
            self.unknown += sum(map(self._count_unknown, texts, parts))
        return ids, counts

    def _reset(self) -> None:
        self._table = _Table()
        self._ids = np.empty(0, self.dtype)
        self._starts = self._counts = np.empty(0, np.int64)

    def _learn(self, splitting: _Splitting) -> None:
        """Encode the new chunks, many in one text with a separator between them."""
        new, self._table.new = self._table.new, []
        if not new:
            return
        alone = [i for i, chunk in enumerate(new) if splitting.sign in chunk]
        shared = [i for i, chunk in enumerate(new) if splitting.sign not in chunk]
        groups: list[list[str]] = []
        room = 0
        for i in shared:
            if room <= 0:
                groups.append([])
                room = _JOINED
            groups[-1].append(new[i])
            room -= len(new[i]) + 1
        texts = [*map(splitting.separator.join, groups), *(new[i] for i in alone)]
        separator = self.tokenizer.encode(splitting.sign, add_special_tokens=False).ids[0]
        counts, parts = [], [self._ids]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for number, one in enumerate(encoded):
            ids = np.array(one.ids, self.dtype)
            if number < len(groups):
                gaps = np.flatnonzero(ids == separator)
                counts.append(np.diff(gaps, prepend=-1, append=len(ids)) - 1)
                ids = np.delete(ids, gaps)
            else:
                counts.append(np.array([len(ids)]))
            parts.append(ids)
        in_order = np.argsort(np.array(shared + alone))
        found = np.concatenate(counts)
        start = len(self._ids) + np.cumsum(found) - found
        self._ids = np.concatenate(parts)
        self._counts = np.concatenate([self._counts, found[in_order]])
        self._starts = np.concatenate([self._starts, start[in_order]])


def _counter_of_unknown(tokenizer: Tokenizer) -> Callable[[str, np.ndarray], int] | None:
    """A function of a text and its ids: the bytes of it that no token stands for; None: none."""
    spec = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    model = spec["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    fallback = model.get("byte_fallback") and all(f"<0x{b:02X}>" in vocabulary for b in range(256))
    if fallback:
        return None
    if unknown in vocabulary:
        def by_token(text: str, ids: np.ndarray) -> int:
            if vocabulary[unknown] not in ids:
                return 0
            encoded = tokenizer.encode(text, add_special_tokens=False)
            return sum(len(text[start:stop].encode()) for id, (start, stop)
                       in zip(encoded.ids, encoded.offsets, strict=True)
                       if id == vocabulary[unknown])
        return by_token
    if '"ByteLevel"' in json.dumps([spec["pre_tokenizer"], spec["normalizer"]]):
        known = bytes(b for b, sign in _byte_signs().items() if sign in vocabulary)
        if len(known) == 256:
            return None
        return lambda text, ids: len(text.encode().translate(None, known))
    known_signs = dict.fromkeys(map(ord, {sign for token in vocabulary for sign in token}))

    @functools.cache
    def normal(sign: str) -> str:
        return str(tokenizer.normalizer.normalize_str(sign))

    def by_sign(text: str, ids: np.ndarray) -> int:
        deleted = 0
        if tokenizer.normalizer is not None:
            gone = {sign for sign in set(text) if not (sign.isspace() or normal(sign))}
            deleted = sum(text.count(sign) * len(sign.encode()) for sign in gone)
            text = tokenizer.normalizer.normalize_str(text)
        return deleted + len("".join(text.translate(known_signs).split()).encode())

    return by_sign


def _byte_signs() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class _Table(dict[str, int]):
    """Numbers chunks as they are first asked for, and lists the new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, chunk: str) -> int:
        self[chunk] = number = len(self)
        self.new.append(chunk)
        return number


def _splitting(tokenizer: Tokenizer) -> _Splitting | None:
    """How the tokenizer splits texts, where that lets chunks be encoded on their own."""
    spec = json.loads(tokenizer.to_str())
    if (not tokenizer.encode_special_tokens
            or not all(token["special"] for token in spec["added_tokens"])
            or tokenizer.encode("0", add_special_tokens=False).tokens != ["0"]):
        return None
    kinds = [(spec[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    if kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]:
        return _BERT
    ours = Tokenizer(tokenizer.model)
    ours.pre_tokenizer = pre_tokenizer()
    same = spec["pre_tokenizer"] == json.loads(ours.to_str())["pre_tokenizer"]
    return _OURS if same and spec["normalizer"] is None else None
