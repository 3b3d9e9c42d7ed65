"""Corpora of the hub by name, for ``generic: [c4]``: where each lies and what it holds.

A file or folder of that name in the current folder goes first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Corpus:
    """A corpus of English text.

    Attributes:
        entry: as ``generic`` takes it.
        tokens: as its authors count them.
        text: bytes of it, about.
        download: bytes of its files, about.
        licence: of the collection, by its card.
        source_field: names a record's source, if one does.
    """

    entry: str
    tokens: float
    text: float
    download: float
    licence: str
    source_field: str = ""


TABLE = {
    "c4": Corpus("hf://allenai/c4/en:train", 156e9, 829e9, 327e9, "ODC-BY"),
    "fineweb": Corpus("hf://HuggingFaceFW/fineweb/sample-10BT:train", 10e9, 47e9, 28e9, "ODC-BY"),
    "fineweb-edu": Corpus("hf://HuggingFaceFW/fineweb-edu/sample-10BT:train", 10e9, 48e9, 28e9,
                          "ODC-BY"),
    "dclm": Corpus("hf://mlfoundations/dclm-baseline-1.0:train", 4e12, 18e12, 7e12, "CC-BY-4.0"),
    "pile": Corpus("hf://monology/pile-uncopyrighted:train", 200e9, 685e9, 335e9,
                   "that of each part", "meta.pile_set_name"),
}
