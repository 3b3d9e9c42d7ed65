"""A tokenizer of some words, and a folder for a corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from planearly import keys
from planearly.data import tokenizer as tk
from small_datasets import prose


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tk.save(tk.train([prose(i) for i in range(50)], keys.Tokenizer(vocab_size=320)), folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"
