"""Embedders: parity with sentence-transformers, long texts, distillation, resumable datasets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from examples import examples
from planearly import files, keys
from planearly.cluster import embed
from planearly.data import tokenizer as tk
from planearly.data.build import tokenize_corpus
from planearly.data.dataset import TokenDataset
from planearly.data.inputs import resolve
from planearly.engine.local import Local
from planearly.errors import UserError
from planearly.files import read_json
from small_models import sentence_model

WORDS = ["the", "of", "cat", "dog", "sat", "on", "mat", "ran", "far", "##s", "##ing", ".", "un"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random BERT of 32 numbers that reads 16 word pieces, as a sentence-transformers folder."""
    return sentence_model(tmp_path_factory.mktemp("tiny"), WORDS)


def sentences(n: int, words: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[:9], max(int(rng.integers(words)), 1))) for _ in range(n)]


def test_short_texts_agree_with_sentence_transformers(tiny):
    from sentence_transformers import SentenceTransformer

    texts = sentences(50, 12)
    embedder = embed.load_embedder(str(tiny))
    ours = embedder.embed(texts)
    assert ours.dtype == np.float32 and ours.shape == (50, embedder.dim) == (50, 32)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)
    peer = SentenceTransformer(str(tiny), device="cpu").encode(texts, normalize_embeddings=True)
    assert (ours * peer).sum(1).min() > 0.999  # bfloat16 where it is fast


def test_a_folder_in_one_s_home_is_found(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    found = embed.load_embedder(f"~/{tiny.name}")
    assert found.digest == embed.load_embedder(str(tiny)).digest


def test_a_long_text_is_the_weighted_mean_of_its_parts(tiny):
    embedder = embed.load_embedder(str(tiny))
    text = " ".join(sentences(1, 12)[0].split() + ["cat dog"] * 10 + ["far ran mat"] * 5)
    pieces = text.split()
    n = len(pieces)
    parts = -(-n // 14)
    assert parts > 2
    cuts = [n * j // parts for j in range(parts + 1)]
    mean = sum(
        (b - a) * embedder.embed([" ".join(pieces[a:b])])[0]
        for a, b in zip(cuts, cuts[1:], strict=False)  # noqa: RUF007
    )
    np.testing.assert_allclose(
        embedder.embed([text])[0], mean / np.linalg.norm(mean), atol=5e-3
    )


@examples(60)
@given(st.lists(st.text(alphabet="the catdog.  \n\u00e9", max_size=120), min_size=1, max_size=5),
       st.integers(1, 12))
def test_cutting_keeps_every_character_and_fits(texts, room):
    from tokenizers import BertWordPieceTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"thecadog.", *WORDS[:4]]
    tokenizer = BertWordPieceTokenizer(
        vocab={word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    )._tokenizer
    parts, owner, weight = embed._cut(texts, tokenizer, room)
    for i, text in enumerate(texts):
        mine = np.flatnonzero(owner == i)
        assert "".join(parts[j] for j in mine) == text
        pieces = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert weight[mine].sum() == max(pieces, 1) and weight[mine].max() <= max(room, 1)
        assert len(mine) == max(-(-pieces // room), 1)


def test_the_digest_follows_weights_and_settings(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    before = embed.load_embedder(str(copy)).digest
    assert before == embed.load_embedder(str(tiny)).digest
    config = copy / "sentence_bert_config.json"
    config.write_text(json.dumps({**read_json(config), "max_seq_length": 8}), "utf-8")
    assert embed.load_embedder(str(copy)).digest != before


def test_a_model_is_read_once_while_its_files_are_as_they_were(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    read, real = [], files.file_digest

    def counted(path):
        read.append(path)
        return real(path)

    monkeypatch.setattr(files, "file_digest", counted)
    first = embed.load_embedder(str(folder)).digest
    assert read and len(read) == len(set(read))
    assert embed.load_embedder(str(folder)).digest == first and len(read) == len(set(read))
    some = folder / "config.json"
    some.write_text(some.read_text() + " ")
    again = embed.load_embedder(str(folder)).digest
    assert again != first and read.count(some) == 2 and len(read) == len(set(read)) + 1


def test_models_that_cannot_be_loaded_are_one_sentence(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no embedder 'no such/model/here'"):
        embed.load_embedder("no such/model/here")
    with pytest.raises(UserError, match="there is no embedder '~nosuch/model'"):
        embed.load_embedder("~nosuch/model")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        embed.load_embedder(str(pickled))
    short = shutil.copytree(tiny, tmp_path / "short")
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded as a sentence-transformers model"):
        embed.load_embedder(str(short)).embed(["cat"])
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": 1}', "utf-8")
    with pytest.raises(UserError, match="cannot be loaded as a sentence-transformers model"):
        embed.load_embedder(str(broken)).embed(["cat"])
    with pytest.raises(UserError, match="is not a tokenizer of the package tokenizers"):
        embed.load_embedder(str(broken)).unknown(["cat"])
    monkeypatch.setattr(embed, "_SHA256", "0" * 64)
    with pytest.raises(UserError, match="is not the known all-MiniLM-L6-v2"):
        embed.load_embedder("static", tmp_path)
    monkeypatch.setattr(embed, "_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="Sentence-BERT is not installed"):
        embed.load_embedder("sentence-bert")


def test_static_vectors_are_what_the_model_says_of_each_piece_alone(tiny, tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr(embed, "_packaged", lambda: tiny)
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path))
    embedder = embed.load_embedder("static")
    assert not list(tmp_path.iterdir())  # lazy
    model = AutoModel.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    raw = []
    for piece in range(len(tokenizer)):
        with torch.inference_mode():
            state = model(torch.tensor([[2, piece, 3]])).last_hidden_state[0]
        raw.append((state[1] + state.mean(0)).numpy())
    rank = np.maximum(np.arange(len(raw)) - 4, 0) + 2  # "the" is piece 5
    frequency = (1 / rank) / (1 / rank).sum()
    table = (raw - np.mean(raw, 0)) * (3e-6 / (3e-6 + frequency))[:, None]
    text = "the cats sat . cat"
    expected = table[tokenizer(text, add_special_tokens=False)["input_ids"]].sum(0)
    np.testing.assert_allclose(
        embedder.embed([text, "dog"])[0], expected / np.linalg.norm(expected), atol=1e-4
    )
    assert [f.suffix for f in tmp_path.iterdir()] == [".safetensors"]  # nothing half-written
    monkeypatch.setattr(embed, "_distil", None)  # a second process finds the table
    again = embed.load_embedder("static", tmp_path)
    assert np.array_equal(again.embed([text]), embedder.embed([text]))
    assert again.digest == embedder.digest
    empty = again.embed(["", "cat"])
    assert empty[0].tolist() == [0] * 32 and np.linalg.norm(empty[1]) == pytest.approx(1)
    assert again.embed([]).shape == (0, 32)
    (table,) = tmp_path.iterdir()
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(UserError, match=r"static-.* is not a readable"):
        embed.load_embedder("static", tmp_path).embed([text])


@pytest.mark.slow
def test_static_and_sentence_bert_agree_on_what_belongs_together():
    topics = [
        ["The court held that the appeal was dismissed.", "A judge ruled on the statute."],
        ["Patients received the drug twice a day.", "A clinical trial of the vaccine."],
        ["The striker scored in the final match.", "Our team won the football league."],
        ["Simmer the onions in butter and salt.", "Bake the dough until it is golden."],
    ]
    texts = [text for pair in topics for text in pair]
    for name in ("static", "sentence-bert"):
        vectors = embed.load_embedder(name).embed(texts)
        assert vectors.shape == (8, 384)
        cosine = vectors @ vectors.T - 2 * np.eye(8)
        assert [int(i) for i in cosine.argmax(1)] == [1, 0, 3, 2, 5, 4, 7, 6], name


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A tokenizer of whole words, in a folder."""
    numbers = {f"w{i}": 2 + i for i in range(40)}
    made = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, **numbers}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tk.save(made, folder := tmp_path_factory.mktemp("words"), "</s>")
    return folder


def windows(texts: Sequence[str], tokenizer: Path, out: Path) -> TokenDataset:
    """A dataset of as many windows as texts."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenize_corpus(resolve([str(out / "texts.jsonl")]), tokenizer, 5_000, keys.Data(), out)
    return TokenDataset(out)


@pytest.fixture
def numbered(words, tmp_path) -> tuple[TokenDataset, tk.Opened]:
    """35 windows, each of one word."""
    return (windows([f"w{i}" for i in range(35)], words, tmp_path / "corpus"), tk.opened(words))


class Failure(BaseException):
    """A kill, as near as one process can come to it."""


def counting_embedder(calls: list[int], fail_at: int = -1) -> embed.Embedder:
    def run(texts):
        calls.append(len(texts))
        if len(calls) == fail_at:
            raise Failure
        return np.array([[float(t[1:] or 0), 1.0] for t in texts], np.float32)

    return embed.Embedder("counting", "0" * 64, lambda: run)


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_a_dataset_killed_midway_goes_on_where_it_was(tmp_path, monkeypatch, numbered, fail_at):
    monkeypatch.setattr(embed, "_BLOCK", 10)
    with pytest.raises(Failure):
        embed.embed_dataset(*numbered, counting_embedder([], 1 + fail_at), tmp_path / "out")
    calls: list[int] = []
    embedder = counting_embedder(calls)
    found = embed.embed_dataset(*numbered, embedder, tmp_path / "out")
    assert calls == [1, *[10, 10, 10, 5][fail_at - 1 :]]  # the width; a shard at most was lost
    assert found.dtype == np.float16 and found.shape == (35, 2)
    assert np.array_equal(found[:][:, 0], np.arange(35))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "embeddings.json", *(f"part-{i:05d}.npy" for i in range(4))]
    calls.clear()
    assert np.array_equal(embed.embed_dataset(*numbered, embedder, tmp_path / "out"), found)
    assert calls == []


def test_a_shard_holds_what_one_of_all_windows_would(tmp_path, monkeypatch, numbered):
    monkeypatch.setattr(embed, "_BLOCK", 4)
    some = np.array([1, 2, 3, 5, 8, 13, 21, 34])
    several = embed.embed_dataset(*numbered, counting_embedder([]), tmp_path / "several", some)
    assert len(list((tmp_path / "several").glob("part-*"))) == 2
    assert several[:][:, 0].tolist() == some.tolist()
    numbers = np.array([7, 0, 6, 0, 3])
    assert several[numbers][:, 0].tolist() == some[numbers].tolist()
    assert several[some > 4][:, 0].tolist() == some[some > 4].tolist()
    assert several[2:6][:, 0].tolist() == [3, 5, 8, 13] and several[5].tolist() == [13, 1]
    assert several[::3][:, 0].tolist() == [1, 5, 21] and len(several[6:6]) == 0


def test_embeddings_of_the_older_layout_are_read(tmp_path, numbered):
    out = tmp_path / "out"
    files.write_json(out / "embeddings.json", {"embedder": "counting", "digest": "0" * 64,
                                               "windows": 35})
    joined = np.arange(70, dtype=np.float16).reshape(35, 2)
    files.write_array(out / "embeddings.npy", joined)
    assert np.array_equal(embed.open_embeddings(out), joined)
    calls: list[int] = []
    assert np.array_equal(embed.embed_dataset(*numbered, counting_embedder(calls), out), joined)
    assert not calls
    (out / "embeddings.npy").unlink()  # it was interrupted before its blocks were joined
    files.write_array(out / "embeddings-000000.npy", joined)
    found = embed.embed_dataset(*numbered, counting_embedder(calls), out)
    assert found[:][:, 0].tolist() == list(range(35)) and not list(out.glob("embeddings-*"))


@pytest.mark.parametrize("text", ["{", "[1]", "7", "{}"])
def test_where_nobody_knows_that_embedding_ended_it_is_looked_at_again(tmp_path, numbered, text):
    out, calls = tmp_path / "out", []
    found = embed.embed_dataset(*numbered, counting_embedder([]), out)[:]
    (out / "embeddings.json").write_text(text)
    with pytest.raises(UserError, match=r"embeddings\.json is (damaged|not valid JSON)"):
        embed.open_embeddings(out)
    assert np.array_equal(embed.embed_dataset(*numbered, counting_embedder(calls), out)[:], found)
    assert np.array_equal(embed.open_embeddings(out)[:], found)


def test_another_embedder_where_a_worker_runs_is_one_sentence(tmp_path, monkeypatch, numbered):
    monkeypatch.setattr(embed, "load_embedder", lambda name, cache: counting_embedder([]))
    work, _ = embed._work(*numbered, embed.Embedder("x", "1" * 64, lambda: None), tmp_path,
                          np.arange(35), Local())
    embed._known.clear()
    with pytest.raises(UserError, match="the embedder 'x' is another one on"):
        Local().map(work)


def test_no_windows_are_fine(tmp_path, numbered):
    none = np.empty(0, np.int64)
    assert embed.embed_dataset(*numbered, counting_embedder([]), tmp_path, none).shape == (0, 2)


def test_text_that_the_embedder_does_not_know_is_told(tiny, tmp_path, capsys):
    letters = tmp_path / "letters"
    tk.save(tk.train([""], keys.Tokenizer(vocab_size=300)), letters)
    embedder = embed.load_embedder(str(tiny))
    for number, (texts, told) in enumerate([
            ([f"{'ጀልባ ' * n}ማዕበል።" for n in range(1, 30)], "% of the text is unknown to the"),
            (sentences(40, 30), ""),
            (["the cat", "The cat", "THE cat", *sentences(20, 30)], "13% of the windows"),
            (["the cat"], "")]):
        dataset = windows(texts, letters, tmp_path / f"{number}-texts")
        capsys.readouterr()
        embed.embed_dataset(dataset, tk.opened(letters), embedder, tmp_path / str(number))
        err = capsys.readouterr().err
        assert (told in err and "under cluster.embedder" in err) if told else "warning" not in err
    assert embedder.unknown(["cat ጀልባ", "dog"]) == pytest.approx(9 / 16)
