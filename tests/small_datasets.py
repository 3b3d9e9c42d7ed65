"""Texts, and token datasets made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from planearly import keys
from planearly.data import documents, shards
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.inputs import resolve
from planearly.engine.local import Local

CONTEXT = 16
PROSE = "a small model reads windows of text, and learns 12 things; não é 中文 \n \n\n"
WORDS = PROSE.split(" ")


def prose(seed: int, n: int = 40) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def write(path: Path, texts, **fields) -> Path:
    records = ({"text": text, **fields} for text in texts)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def make(path: Path, tokenizer: Path, out: Path, context: int = CONTEXT, **more) -> TokenDataset:
    tokenize_corpus(resolve([str(path)]), tokenizer, context, keys.Data(), out, **more)
    return TokenDataset(out)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def make_apart(path: Path, tokenizer: Path, out: Path, processes: int = 1) -> None:
    """The same in a process of its own, in more shards; with several, a pool of its own."""
    documents._GROUP = 200_000
    if processes > 1:
        shards._POOL_MEGABYTES = 0
    make(path, tokenizer, out, executor=Local(processes))
