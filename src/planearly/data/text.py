"""Pure functions on a document's text: cutting it, and recognising it again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import regex

PARAGRAPH_CHARACTERS = 200
"""A shorter paragraph says too little about where it came from to be looked for elsewhere."""

_BLANK_LINES = re.compile(r"\n\s*\n")
_UNSPACED = regex.compile(r"[\p{Line_Break=SA}\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}]")


def pieces(text: str, size: int) -> Iterator[str]:
    """Consecutive pieces of at most ``size`` characters that join to ``text`` again.

    A piece ends, if it can, before a blank line, else before a line end, else before a space, in
    the second half of its span; and never inside a run of whitespace if that can be helped.
    """
    start = 0
    while len(text) - start > size:
        stop, half = start + size, start + size // 2
        for mark in ("\n\n", "\n", " "):
            cut = text.rfind(mark, half, stop)
            while cut > half and text[cut - 1].isspace():
                cut -= 1
            if cut > half:
                stop = cut
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def text_hash(text: str) -> int:
    """64 bits that texts share when they differ in whitespace only (BLAKE2b)."""
    return fingerprint(text)[0]


def fingerprint(text: str) -> tuple[int, list[int]]:
    """:func:`text_hash`, and the same hash of each long paragraph.

    Paragraphs are the blocks between blank lines and, where a block has several lines, its long
    lines as well (some texts put a paragraph on a line, others wrap their lines). They are looked
    for within stretches of a million characters, so that memory stays small.
    """
    whole = blake2b(digest_size=8)
    paragraphs: list[int] = []
    open_gap = False  # whitespace since the last word
    begun = False
    for piece in pieces(text, 1 << 20):
        for number, block in enumerate(_BLANK_LINES.split(piece)):
            words = " ".join(block.split())
            if not words:
                open_gap = open_gap or bool(block) or number > 0
                continue
            encoded = words.encode()
            if begun and (open_gap or number > 0 or block[0].isspace()):
                whole.update(b" ")
            whole.update(encoded)
            begun, open_gap = True, block[-1].isspace()
            if len(words) >= PARAGRAPH_CHARACTERS:
                paragraphs.append(_hash(encoded))
                if "\n" in block.strip():
                    for line in block.split("\n"):
                        if len(line) >= PARAGRAPH_CHARACTERS:
                            words = " ".join(line.split())
                            if len(words) >= PARAGRAPH_CHARACTERS:
                                paragraphs.append(_hash(words.encode()))
    return int.from_bytes(whole.digest(), "little"), paragraphs


def sections(text: str, least: int) -> list[int]:
    """Ends of the paragraphs of a text or, if there are fewer than ``least``, of its lines."""
    ends: list[int] = []
    begin, stop = len(text) - len(text.lstrip()), len(text.rstrip())
    for pattern in (_BLANK_LINES, re.compile(r"\n\s*")):
        ends = [m.end() for m in pattern.finditer(text, begin, stop)]
        ends.append(len(text))
        if len(ends) >= least:
            break
    return ends


def found_words(pattern: Any, text: str) -> list[str]:
    """Matches of a pattern in a text, divided into words where a script writes no spaces.

    Thai, Lao, Khmer, Burmese, Chinese and Japanese are divided as Unicode's UAX 29 asks, by the
    dictionaries of ICU.
    """
    found = pattern.findall(text)
    if text.isascii() or not _UNSPACED.search(text):
        return found
    from icu4py.breakers import WordBreaker  # 42 MB, for these scripts alone

    return [word for match in found
            for word in (WordBreaker(match, "en") if _UNSPACED.search(match) else (match,))]


def _hash(encoded: bytes) -> int:
    return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "little")
