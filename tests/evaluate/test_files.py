"""Evaluation of model folders against a loop in plain transformers that shares nothing with it."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planearly import keys
from planearly.data.documents import Problems
from planearly.data.inputs import resolve
from planearly.errors import UserError
from planearly.evaluate import files as files_module
from planearly.evaluate.files import evaluate_files
from small_models import EOT, TEXT, model_folder, tokenizer_folder
from small_outside import outside_folder

DOCUMENTS = [*TEXT, "x", " ".join(TEXT * 3), "\u00e9t\u00e9 \u2603 caf\u00e9\n\n" * 5,
             f"a literal {EOT} is text"]


def lines(path: Path, documents: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not of this package: learned positions, biases, LayerNorm."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=24, n_embd=32, n_layer=2, n_head=2,
                               initializer_range=0.3)).save_pretrained(path)
    return tokenizer_folder(path)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents begin with another token than they end with."""
    return outside_folder(tmp_path_factory.mktemp("gemma"), "gemma2")


def brute_force(folder: Path, documents: list[str], context: int) -> tuple[float, int]:
    """Nats and tokens, one prediction at a time, from what came before in the window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, tokens = 0.0, 0
    for text in documents:
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        history = [tokenizer.bos_token_id]
        for token in [*encoded, tokenizer.eos_token_id]:
            with torch.no_grad():
                logits = model(torch.tensor([history])).logits[0, -1]
            nats -= float(torch.log_softmax(logits.double(), 0)[token])
            tokens += 1
            history.append(token)
            if len(history) > context:
                both = {tokenizer.bos_token_id, tokenizer.eos_token_id}
                history = [token if len(both) == 1 else tokenizer.bos_token_id]
    return nats, tokens


@pytest.mark.parametrize("context", [None, 7])
@pytest.mark.parametrize("which", ["folder", "gpt2", "gemma"])
def test_equals_brute_force(which: str, context: int | None, tmp_path: Path,
                            request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    first = lines(tmp_path / "first.jsonl", DOCUMENTS[:3])
    second = lines(tmp_path / "second.jsonl", DOCUMENTS[3:])
    found = evaluate_files(model, [first, second], context)
    used = context or {"folder": 16, "gpt2": 24, "gemma": 64}[which]
    for result, documents in ((found, DOCUMENTS), (found["files"][first], DOCUMENTS[:3]),
                              (found["files"][second], DOCUMENTS[3:])):
        nats, tokens = brute_force(model, documents, used)
        assert result["tokens"] == tokens
        assert result["units"] == len(documents)
        assert result["nll_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
        n_bytes = sum(len(text.encode()) for text in documents)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
        assert result["ci95"][0] < result["perplexity"] < result["ci95"][1]
    json.dumps(found, allow_nan=False)


def test_a_model_that_does_not_divide_is_evaluated_whole(
        gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2LMHeadModel

    forward = GPT2LMHeadModel.forward

    def with_tokens(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        found = forward(self, input_ids=input_ids, **more)
        found.logits = found.logits + input_ids[..., None] * torch.linspace(0, 0.1, 300)
        return found

    file = lines(tmp_path / "a.jsonl", DOCUMENTS[:4])
    plain = evaluate_files(gpt2, [file], 7)
    monkeypatch.setattr(GPT2LMHeadModel, "forward", with_tokens)
    found = evaluate_files(gpt2, [file], 7)
    nats, tokens = brute_force(gpt2, DOCUMENTS[:4], 7)
    assert found["tokens"] == tokens == plain["tokens"]
    assert found["nll_per_token"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["nll_per_token"] != pytest.approx(plain["nll_per_token"], rel=1e-2)


def test_reading_in_pieces_changes_nothing(folder: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    file = lines(tmp_path / "a.jsonl", DOCUMENTS)
    whole = evaluate_files(folder, [file])
    monkeypatch.setattr(files_module, "_AT_ONCE", 30)
    monkeypatch.setattr(files_module, "_PIECE", 40)
    pieces = evaluate_files(folder, [file])
    assert pieces["units"] == whole["units"] and pieces["tokens"] == whole["tokens"]
    assert pieces["nll_per_token"] == pytest.approx(whole["nll_per_token"], rel=1e-7)
    assert pieces["ci95"] == pytest.approx(whole["ci95"], rel=1e-6)


def test_a_text_that_has_no_token_is_no_document(tmp_path: Path) -> None:
    def encode(text: str) -> np.ndarray:
        return np.array([0, *(sign for sign in text.encode() if sign < 128), 1])

    settings = keys.Data()
    units = resolve([lines(tmp_path / "a.jsonl", ["ab", "\u00e9\u00e9", "c"])])
    (streams, size), = files_module._batches(
        units[0], settings, Problems(settings.max_bad_share), encode)
    assert [stream.tolist() for stream in streams] == [[0, 97, 98, 1], [0, 99, 1]] and size == 3


def test_other_forms_of_documents(folder: Path, tmp_path: Path) -> None:
    packed, plain = tmp_path / "a.jsonl.gz", tmp_path / "b.txt"
    packed.write_bytes(gzip.compress(b"".join(json.dumps({"body": t}).encode() + b"\n"
                                              for t in [*TEXT, "", " "])))
    plain.write_text(TEXT[0])
    found = evaluate_files(folder, [str(packed), str(plain)], text_field="body")
    expected = evaluate_files(folder, [lines(tmp_path / "c.jsonl", [*TEXT, TEXT[0]])])
    assert found["tokens"] == expected["tokens"] and found["units"] == 5
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    one = found["files"][str(plain)]
    assert one["units"] > 1, "a single document has windows or tokens for its interval"


def broken(tmp_path: Path, change: dict[str, Any], name: str = "config.json") -> Path:
    path = model_folder(tmp_path)
    values = json.loads((path / name).read_text())
    values = {k: v for k, v in (values | change).items() if v is not None}
    (path / name).write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(("name", "change", "words"), [
    ("tokenizer_config.json", {"eos_token": None, "bos_token": None}, "has no eos_token"),
    ("config.json", {"model_type": "nonsense"}, "knows no models of type .nonsense."),
    ("config.json", {"num_hidden_layers": 3}, "weights are incomplete"),
    ("config.json", {"intermediate_size": 8},
     r"'model\.layers\.\d\.mlp\.\w+\.weight' has the shape \[.*\], and its config\.json asks"),
    ("config.json", {"hidden_act": "nope"}, r"cannot load .* \(KeyError: 'nope'\)"),
    ("config.json", {"d": 1, "auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "xyz"},
     "needs code of its own"),
])
def test_folders_that_are_no_model(name: str, change: dict[str, Any], words: str,
                                   tmp_path: Path) -> None:
    folder = broken(tmp_path, change, name)
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match=words):
        evaluate_files(folder, [lines(tmp_path / "a.jsonl", TEXT)])


def test_what_a_user_may_get_wrong(folder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", TEXT)
    for model, given, options, words in [
        (folder, [str(tmp_path / "nowhere.jsonl")], {}, r"nowhere\.jsonl does not exist"),
        (tmp_path / "no-model", [file], {}, "no-model does not exist"),
        (tmp_path, [file], {}, r"has no config\.json"),
        (folder, [file], {"context": 17}, "reads 1 to 16 tokens"),
        (folder, [file], {"context": 0}, "reads 1 to 16 tokens"),
        (folder, [file], {"text_field": "body"}, "no field 'body'"),
        (folder, [lines(tmp_path / "empty.jsonl", [])], {}, "the file is empty"),
        (folder, [lines(tmp_path / "blank.jsonl", ["", " "])], {}, "no text to evaluate"),
    ]:
        with pytest.raises(UserError, match=words):
            evaluate_files(model, given, **options)


def test_weights_that_would_have_to_be_unpickled_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pickled = model_folder(tmp_path)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no other kind is opened"):
        evaluate_files(pickled, [lines(tmp_path / "a.jsonl", TEXT)])


def test_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path)
    tokenizer_folder(other, entries=330)
    with pytest.raises(UserError, match="do not belong together"):
        evaluate_files(other, [lines(tmp_path / "a.jsonl", ["quick brown fox liquor jugs zebras"])])


def test_an_end_token_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    folder = broken(tmp_path, {"eos_token": "<end>"}, "tokenizer_config.json")
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="has 300: they do not belong together, put"):
        evaluate_files(folder, [lines(tmp_path / "a.jsonl", TEXT)])


def word_model(path: Path) -> Path:
    """A model whose tokenizer knows the words of TEXT alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = model_folder(path)
    words = sorted({word for text in TEXT for word in text.replace(".", " .").split()})
    tokenizer = Tokenizer(models.WordLevel(
        {word: i for i, word in enumerate(["</s>", "<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}))
    return folder


def test_a_result_on_text_that_the_tokenizer_does_not_know_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = word_model(tmp_path)
    with pytest.raises(UserError, match="bytes of the text are unknown to the tokenizer"):
        evaluate_files(folder, [lines(tmp_path / "a.jsonl", ["лодка волна канат гавань"])])
    known = "the quick brown fox jumps over the lazy dog " * 80
    evaluate_files(folder, [lines(tmp_path / "b.jsonl", [known + "лодка"])])
    assert "bytes of the text are unknown to the tokenizer" in capsys.readouterr().err


def test_a_text_with_unknown_words_counts_whatever_its_place(tmp_path: Path) -> None:
    folder = word_model(tmp_path)
    known = "the quick brown fox jumps over the lazy dog " * 20
    files = [lines(tmp_path / "a.jsonl", [known + "лодка волна"]),
             lines(tmp_path / "b.jsonl", [known * 20])]
    one, other = evaluate_files(folder, files), evaluate_files(folder, files[::-1])
    assert one["files"].keys() == set(files)
    assert one["tokens"] == other["tokens"] == 9 * 20 * 21 + 2 + 2
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"])


def test_likelihoods_that_are_no_numbers_name_what_may_be_damaged(folder: Path,
                                                                  tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": -1e9}))
    with pytest.raises(UserError, match=r"not numbers: its weights are damaged, or its config\.json"
                                        " is$"):
        evaluate_files(tmp_path / "model", [lines(tmp_path / "a.jsonl", TEXT)])
