"""Training, taking and saving tokenizers; encoding without loss, fast and exactly."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from examples import examples
from planearly import keys
from planearly.data import encode
from planearly.data import tokenizer as tk
from planearly.data.encode import Encoder
from planearly.data.inputs import resolve
from planearly.data.text import pieces
from planearly.errors import UserError
from small_models import tokenizer_folder

PROSE = ("the small model learns from text that it's given, don't it? (yes) 12 of 345 x_y = {z};\n"
         "\tdef f(a, b):  return a + b\n\nnaïve café, 中文字 ½ cup — “quoted”… 😀 ")
WORDS = PROSE.split(" ")


def corpus(n: int = 400) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 30)) for _ in range(n)]


def trained(kind: str) -> Tokenizer:
    made = tk.train(corpus(), keys.Tokenizer(kind=kind, vocab_size=400))
    made.encode_special_tokens = True
    return made


TOKENIZERS = {kind: trained(kind) for kind in ("bpe", "unigram")}


def bert() -> Tokenizer:
    """A tokenizer that splits texts as BERT's do, with pieces that show where its words end."""
    signs = sorted({*"abcdefghijklmnopqrstuvwxyz0159éß中,.!-_\"'", "the", "it", "00", "caf"})
    pieces = ["[UNK]", *signs, *(f"##{sign}" for sign in signs)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)},
                                      unk_token="[UNK]", max_input_chars_per_word=12))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[UNK]"])
    made.encode_special_tokens = True
    return made


ENCODED = {**TOKENIZERS, "bert": bert()}
ENCODERS = {kind: Encoder(made) for kind, made in ENCODED.items()}
ODD = st.text(st.one_of(st.sampled_from(
    " \n\t\r\v\f\x00\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b\ufeff0159²½Ⅷ٣'’sStTrvmldaZé̈中ßſ_-.,!(#"
    "\u2581\ufffd\U0001F600\u0301"), st.characters(exclude_categories=["Cs"]))
    , max_size=60)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@examples(300)
@given(text=ODD)
@example(text=f"a{tk.EOT}b <|endoftext|>")
@example(text="a  5  ² \n\n6\n 7 's 'll '' don''t")
def test_round_trip_is_exact_and_has_no_special_token(kind, text):
    made = TOKENIZERS[kind]
    ids = made.encode(text, add_special_tokens=False).ids
    assert 0 not in ids
    assert made.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bert"])
@examples(500)
@given(texts=st.lists(ODD, max_size=4))
@example(texts=["a  5", "a  ²", "a \n x", "\n\nb", "it's", "!'re", "x 0 0a0 é0"])
@example(texts=["cafe\u0301 ab\x00cd a\x1cb", "[UNK] the-it's_ok", "0", "abcdefghijklmn .\u0301a"])
def test_encoder_gives_the_tokenizers_ids(kind, texts):
    ids, counts = ENCODERS[kind].encode(texts)
    expected = [ENCODED[kind].encode(t, add_special_tokens=False).ids for t in texts]
    assert ids.tolist() == [i for one in expected for i in one]
    assert counts.tolist() == [len(e) for e in expected]
    assert ENCODERS[kind]._splitting  # not by asking the tokenizer itself


def test_encoder_starts_its_table_afresh_when_it_is_full(monkeypatch):
    monkeypatch.setattr("planearly.data.encode._TABLE_CHUNKS", 20)
    encoder = Encoder(TOKENIZERS["bpe"])
    for text in corpus(20):
        assert encoder.encode([text])[0].tolist() == TOKENIZERS["bpe"].encode(text).ids
        assert len(encoder._table) <= 20


@examples(200)
@given(text=ODD, size=st.integers(1, 12))
def test_pieces_join_to_the_text(text, size):
    cut = list(pieces(text, size))
    assert "".join(cut) == text and all(len(piece) <= size for piece in cut)


def test_cutting_a_long_text_at_spaces_does_not_change_its_tokens():
    text = "\n\n".join(corpus(50))
    cut = list(pieces(text, 200))
    assert len(cut) > 40
    for made in TOKENIZERS.values():
        joined = [i for piece in cut for i in made.encode(piece).ids]
        assert joined == made.encode(text).ids


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_repeats_and_special_token_is_zero(kind):
    again = trained(kind)
    assert again.to_str() == TOKENIZERS[kind].to_str()
    assert again.token_to_id(tk.EOT) == 0
    assert tk.vocab_size(again) == again.get_vocab_size() <= 400


def test_saved_folder_loads_in_transformers_and_encodes_alike(tmp_path):
    from transformers import AutoTokenizer

    made = TOKENIZERS["bpe"]
    tk.save(made, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = corpus()[3] + " 2024 é😀"
    assert loaded(text)["input_ids"] == made.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.eos_token_id) == (tk.EOT, tk.EOT, 0)
    assert loaded.model_max_length > 1 << 60  # the export knows the context, a tokenizer none
    assert tk.load(tmp_path).encode(text).ids == made.encode(text).ids
    assert tk.opened(tmp_path).eot == 0


def test_digest_follows_what_it_encodes(tmp_path):
    tk.save(TOKENIZERS["bpe"], tmp_path / "a")
    tk.save(TOKENIZERS["bpe"], tmp_path / "b")
    tk.save(TOKENIZERS["unigram"], tmp_path / "c")
    assert tk.digest(tmp_path / "a") == tk.digest(tmp_path / "b") != tk.digest(tmp_path / "c")


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return path


def test_build_records_the_real_size(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["tiny text"])
    meta = tk.build(keys.Tokenizer(vocab_size=5_000), keys.Data(),
                    resolve([str(tmp_path / "a.jsonl")]), tmp_path / "tok")
    assert 257 <= meta["vocab_size"] < 300 and meta["eot_id"] == 0
    assert meta["digest"] == tk.digest(tmp_path / "tok")


def test_no_text_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no text to train.*a\.jsonl.*empty"):
        tk.build(keys.Tokenizer(), keys.Data(), resolve([str(tmp_path / "a.jsonl")]),
                 tmp_path / "tok")


def foreign(path, eot: str | None) -> Tokenizer:
    """A tokenizer with another way of splitting, and a template that adds a token."""
    made = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<pad>", *([eot] if eot else [])]))
    made.save(str(path / "tokenizer.json"))
    return made


def test_foreign_tokenizer_keeps_its_own_end_token(tmp_path):
    made = foreign(tmp_path, "</s>")
    meta = tk.build(keys.Tokenizer(path=str(tmp_path)), keys.Data(), [], tmp_path / "tok")
    assert meta["eot"] == "</s>" and meta["eot_id"] == made.token_to_id("</s>") == 1
    assert tk.opened(tmp_path / "tok").eot == 1
    texts = ["the small model", "", "learns from text"]
    ids, counts = Encoder(tk.load(tmp_path / "tok")).encode(texts)
    expected = [made.encode(t, add_special_tokens=False).ids for t in texts]
    assert ids.tolist() == [i for one in expected for i in one]
    assert counts.tolist() == [len(e) for e in expected]


def test_stated_end_token_goes_before_known_ones(tmp_path):
    made = foreign(tmp_path, "<stop>")
    stated = {"eos_token": {"content": "<stop>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    taken, eot, _ = tk.take(str(tmp_path))
    assert eot == "<stop>" and taken.token_to_id(eot) == made.token_to_id("<stop>")


@pytest.mark.parametrize("said", ["[]", "{}", '{"bos_token": 1}', '{"bos_token": "no such"}'])
def test_a_folder_that_does_not_say_how_texts_begin_is_one_sentence(tmp_path, said):
    tk.save(tk.train(["some words of text"] * 3, keys.Tokenizer(vocab_size=300)), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(said, "utf-8")
    with pytest.raises(UserError, match=r"its bos_token '.*' is not in its vocabulary"):
        tk.opened(tmp_path)


def test_tokenizer_without_end_token_is_refused(tmp_path):
    foreign(tmp_path, None)
    with pytest.raises(UserError, match="no end-of-text token"):
        tk.take(str(tmp_path / "tokenizer.json"))


def test_not_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        tk.take(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer"):
        tk.take(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no tokenizer could be taken from '~nosuch/x'"):
        tk.take("~nosuch/x")
    with pytest.raises(UserError, match=r"no tokenizer at .*: name a folder"):
        tk.load(tmp_path / "absent")


@pytest.mark.parametrize(("config", "others"), [
    ("[]", {}), ('{"tokenizer_class": "GPT2Tokenizer"}', {"vocab.json": "[]", "merges.txt": "x"}),
    ('{"tokenizer_class": "LlamaTokenizer"}', {"tokenizer.model": "x"}),
    ('{"auto_map": {"AutoTokenizer": ["x.Y", null]}, "tokenizer_class": "Y"}', {})])
def test_a_folder_without_tokenizer_json_that_is_damaged_is_one_sentence(tmp_path, config, others):
    for name, text in {"tokenizer_config.json": config, "config.json": '{"model_type": "gpt2"}',
                       **others}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"no tokenizer could be taken from '.*give a tokenizer"):
        tk.take(str(tmp_path))


def test_a_tokenizer_s_own_code_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    import transformers

    asked = []

    def loaded(place, **how):
        asked.append(how)
        raise ValueError("has code of its own")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loaded)
    with pytest.raises(UserError, match="has code of its own"):
        tk.take(str(tmp_path))
    assert asked == [{"trust_remote_code": False}]


def test_long_runs_cost_no_time(monkeypatch):
    texts = [*corpus(), *(f"total{sign * (30_000 + i)}{i}" for i in range(4)
                          for sign in (" ", "=", "x", "\t", "_", "-_"))]
    began = time.process_time()
    made = tk.train(texts, keys.Tokenizer(vocab_size=400))
    assert time.process_time() - began < 5  # a minute and more, if each is taken as one word
    assert made.get_vocab_size() == 400
    for text in ("a  b", "x" * 999 + " " * 999, "中" * 600):
        assert tk._cut_long_runs(text) == [text]
    assert "".join(tk._cut_long_runs("y" * 2_500 + "z")) == "y" * 2_500 + "z"


def end_of(folder) -> str:
    taken, eot, _ = tk.take(str(folder))
    assert taken.token_to_id(eot) is not None
    return eot


def test_the_end_token_is_found_as_transformers_finds_it(tmp_path):
    from transformers import AutoTokenizer

    foreign(tmp_path, "</s>")
    config, named = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"
    cases = [({}, {"eos_token": "<pad>"}), ({"eos_token": "</s>"}, {"eos_token": "<pad>"}),
             ({"eos_token": None}, {"eos_token": {"content": "<pad>", "lstrip": False,
                                                  "rstrip": False, "normalized": False,
                                                  "single_word": False}}),
             ({"eos_token": "<stop>"}, {}),
             ({"eos_token": "<stop>", "added_tokens_decoder": {"300": {
                 "content": "<stop>", "special": True}}}, {"eos_token": "<pad>"})]
    for stated, listed in cases:
        config.write_text(json.dumps(stated))
        named.write_text(json.dumps(listed))
        assert end_of(tmp_path) == AutoTokenizer.from_pretrained(tmp_path).eos_token
    config.write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        tk.take(str(tmp_path))


def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(["one two three"], trainers.WordLevelTrainer(
        special_tokens=["<unk>", "</s>"], show_progress=False))
    return made


def test_bytes_without_a_token_are_counted():
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.train_from_iterator(["ab ab é"], trainers.BpeTrainer(show_progress=False))
    characters = Tokenizer(models.BPE())
    characters.train_from_iterator(["abc"], trainers.BpeTrainer(show_progress=False))
    cleaned = Tokenizer(characters.model)
    cleaned.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z ]"), "")])
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    for made, text, unknown in ((words(), "one лодка two", 10), (words(), "one", 0),
                                (byte_level, "ab éc中", 4), (characters, "abcdé  a", 3),
                                (cleaned, "Aé bd", 3),
                                (unigram, "aбвb", 4), (TOKENIZERS["bpe"], "中é\x00", 0)):
        encoder = Encoder(made)
        encoder.encode([text, text])
        assert encoder.unknown == 2 * unknown
    with pytest.raises(UserError, match="cannot encode this text"):
        Encoder(Tokenizer(models.Unigram([("a", -1.0)]))).encode(["лодка"])
    with pytest.raises(TypeError):  # the caller's fault, not the text's
        Encoder(Tokenizer(models.Unigram([("a", -1.0)]))).encode([1])


def test_bytes_have_the_signs_that_byte_level_tokenizers_give_them():
    text = "".join(chr(sign) for sign in [*range(0x800), 0x800, 0x4e2d, 0xac00, 0xffff, 0x1f600])
    found = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    signs = encode._byte_signs()
    assert "".join(part for part, _ in found) == "".join(signs[b] for b in text.encode())
    assert set(signs.values()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_much_unknown_text_is_refused_and_little_is_told(capsys):
    tk.check_unknown(0, 100, "it")
    assert capsys.readouterr().err == ""
    tk.check_unknown(1, 100, "it")
    assert "1.00%, 1 of 100 bytes of it are unknown to the tokenizer" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"2 of 100 bytes of it are unknown .* take a tokenizer"):
        tk.check_unknown(2, 100, "it")


def test_a_begin_token_of_its_own_is_kept_and_counts(tmp_path):
    foreign(tmp_path, "</s>")
    spec = tmp_path / "tokenizer_config.json"
    for begin, expected in (("<pad>", 0), (None, 1), ("<absent>", 1)):
        spec.write_text(json.dumps({"eos_token": "</s>", "bos_token": begin}))
        tk.build(keys.Tokenizer(path=str(tmp_path)), keys.Data(), [], tmp_path / f"{begin}")
        assert tk.opened(tmp_path / f"{begin}").begin == expected
        assert tk.opened(tmp_path / f"{begin}").eot == 1
    alike, same, other = (tk.digest(tmp_path / name) for name in ("None", "<absent>", "<pad>"))
    assert alike == same != other


def test_a_folder_is_opened_once_and_again_when_it_changes(tmp_path, monkeypatch):
    folder = tokenizer_folder(tmp_path / "one")
    loads = []
    real = tk.load
    monkeypatch.setattr(tk, "load", lambda place: loads.append(place) or real(place))
    first = tk.opened(folder)
    assert tk.opened(folder) is first and len(loads) == 1
    assert (first.eot, first.vocab_size) == (0, tk.vocab_size(real(folder)))
    assert first.digest == tk.digest(folder) and first.dtype == np.dtype("<u2")
    assert tk.id_type(1 << 16) == np.dtype("<u2") and tk.id_type((1 << 16) + 1) == np.dtype("<u4")
    tokenizer_folder(folder, entries=280)
    assert tk.opened(folder).vocab_size < first.vocab_size
    with pytest.raises(UserError, match="there is no tokenizer"):
        tk.opened(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="its bos_token 'None' is not in its vocabulary"):
        tk.opened(folder)
