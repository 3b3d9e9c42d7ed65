"""Finding held-out text in a training set."""

from __future__ import annotations

import json

import numpy as np
import pytest

from planearly import keys
from planearly.data import overlap
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.inputs import resolve
from planearly.data.text import fingerprint, pieces, text_hash
from planearly.engine.local import Local


def paragraph(seed: int, characters: int = 300) -> str:
    words = np.random.default_rng(seed).integers(0, 10**6, characters // 6)
    return " ".join(f"w{word}" for word in words)[:characters]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tk.train([paragraph(i) for i in range(20)], keys.Tokenizer(vocab_size=300))
    tk.save(made, folder)
    return folder


@pytest.fixture
def overlapping(tmp_path):
    """The mask and the report of a training set."""
    return lambda train, held_out: overlap.held_out_overlap(train, held_out,
                                                            tmp_path / "parts")[:2]


@pytest.fixture
def dataset(tmp_path, tokenizer):
    def make(name: str, texts: list[str]) -> TokenDataset:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenize_corpus(resolve([str(path)]), tokenizer, 16, keys.Data(), tmp_path / name)
        return TokenDataset(tmp_path / name)
    return make


def test_equal_documents_and_long_paragraphs_are_found(dataset, overlapping):
    valid = dataset("valid", ["short but whole", f"{paragraph(1)}\n\n{paragraph(2)}"])
    test = dataset("test", [f"{paragraph(3)}\n{paragraph(4)}"])  # a paragraph a line
    train = dataset("train", [
        "nothing in common",
        "short  but\nwhole",                                        # equal up to whitespace
        f"before\n\n{paragraph(2).replace(' ', chr(10), 3)}\n\nafter",   # wrapped elsewhere
        f"before {paragraph(1)[:150]}",                             # too little of it
        f"x\n{paragraph(4)}\ny",                                    # a line of a block
        paragraph(9),
    ])
    mask, report = overlapping(train, [valid, test])
    assert mask.tolist() == [False, True, True, False, True, False]
    assert (report["documents"], report["equal"], report["by_paragraph"]) == (3, 1, 2)
    hit = mask[train.windows["document"]]
    assert report["windows"] == hit.sum()
    assert report["tokens"] == train.windows["length"][hit].sum()
    first = report["examples"][0]
    assert first["training"].endswith("train.jsonl line 2")
    assert first["held_out"].endswith("valid.jsonl line 1") and first["why"] == "equal"
    places = {(e["training"].split(" ")[-1], e["held_out"].split("/")[-1])
              for e in report["examples"]}
    assert places == {("2", "valid.jsonl line 1"), ("3", "valid.jsonl line 2"),
                      ("5", "test.jsonl line 1")}


def test_a_paragraph_copied_often_in_training_alone_is_no_boilerplate(dataset, overlapping):
    held_out = dataset("held", [f"mine\n\n{paragraph(5)}", *(paragraph(i) for i in range(10, 15))])
    train = dataset("train", [f"text {i}\n\n{paragraph(5)}" for i in range(40)])
    mask, report = overlapping(train, [held_out])
    assert mask.all() and report["boilerplate"] == 0 and report["by_paragraph"] == 40


@pytest.mark.parametrize("held_out, with_footer, counts", [
    (6, 2, True), (6, 3, False), (4, 1, True), (4, 2, False), (2, 2, False)])
def test_what_is_common_among_the_held_out_documents_is(dataset, overlapping, held_out,
                                                        with_footer, counts):
    footer = paragraph(5)
    texts = [f"held {i}" + f"\n\n{footer}" * (i < with_footer) for i in range(held_out)]
    valid, test = dataset("valid", texts[::2]), dataset("test", texts[1::2])
    train = dataset("train", [f"text {i}\n\n{footer}" for i in range(3)])
    mask, report = overlapping(train, [valid, test])
    assert mask.tolist() == [counts] * 3 and report["boilerplate"] == int(not counts)


def test_a_paragraph_repeated_in_one_document_is_one_occurrence(dataset, overlapping):
    once, often = f"mine\n\n{paragraph(5)}", "\n\n".join([paragraph(5)] * 30)
    for held_out, train in ((once, often), (often, once)):
        train, held_out = dataset("train", [train]), dataset("held", [held_out])
        assert overlapping(train, [held_out])[0].tolist() == [True]


def test_nothing_in_common(dataset, overlapping):
    train = dataset("train", [paragraph(1), paragraph(2)])
    mask, report = overlapping(train, [dataset("held", [paragraph(3)])])
    assert not mask.any() and report["examples"] == [] and report["tokens"] == 0
    assert not overlapping(train, [])[0].any()


def test_documents_of_other_sets_are_found_whole_and_apart(dataset, tmp_path):
    first = dataset("first", [paragraph(1), f"{paragraph(2)}\n\nmore"])
    second = dataset("second", [paragraph(3), paragraph(1)])
    generic = dataset("generic", [paragraph(2), paragraph(1) + "\n", paragraph(3), paragraph(4)])
    held_out = dataset("held", [paragraph(4)])
    mask, report, others = overlap.held_out_overlap(generic, [held_out], tmp_path / "parts",
                                                    None, [first, second])
    assert mask.tolist() == [False, False, False, True] and report["equal"] == 1
    assert [found.tolist() for found in others] == [[1], [1, 2]]
    assert not (tmp_path / "parts").exists()


def test_ranges_and_workers_find_the_same(dataset, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    train = dataset("train", ["\n\n".join(paragraph(i) for i in rng.integers(0, 90, 2))
                              for _ in range(60)])
    held_out = dataset("held", ["\n\n".join(paragraph(i) for i in rng.integers(0, 90, 2))
                                for _ in range(12)] + ["one\n\n" + paragraph(3)])
    whole = overlap.held_out_overlap(train, [held_out], tmp_path / "parts", Local(1), [held_out])
    assert whole[1]["documents"] > 3
    monkeypatch.setattr(overlap, "_SHARD", 7)
    monkeypatch.setattr(overlap, "_CHUNK", 3)
    monkeypatch.setattr(overlap, "_SMALL", 0)
    parts = overlap.held_out_overlap(train, [held_out], tmp_path / "parts", Local(2), [held_out])
    assert whole[0].tolist() == parts[0].tolist() and whole[1] == parts[1]
    assert whole[2][0].tolist() == parts[2][0].tolist()


@pytest.mark.parametrize("size", [3, 50, 1 << 20])
def test_hash_ignores_whitespace_and_nothing_else(monkeypatch, size):
    real = pieces
    monkeypatch.setattr("planearly.data.text.pieces", lambda text, _: real(text, size))
    same = ["a b c", " a\n\nb c ", "a\tb\u3000c\n", "a   \n \n\n  b\n\n\nc"]
    assert len({text_hash(text) for text in same}) == 1
    other = ["a bc", "abc", "a b c d", "A b c", "a b"]
    assert len({text_hash(text) for text in [*same, *other]}) == 1 + len(other)


def test_long_texts_hash_as_if_in_one_piece():
    text = "\n\n".join(paragraph(i) for i in range(50))
    long = text * 100  # 1.5 million characters
    assert text_hash(long) == text_hash(" ".join(long.split()))
    unbroken = "x" * 2_500_000
    assert text_hash(unbroken) != text_hash(unbroken[:-1])
    assert text_hash(unbroken) == text_hash(f" {unbroken}\n")
    assert len(fingerprint(text)[1]) == 50
