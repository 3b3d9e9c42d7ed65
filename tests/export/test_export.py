"""Exported folders: whole or absent, loaded by plain transformers, their card well formed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from planearly import keys, methods
from planearly.errors import UserError
from planearly.export import tokens
from planearly.export.card import conversion, model_card
from planearly.export.folder import export
from planearly.model import hf, outside
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected
from small_models import EOT, TEXT, check_batches, small_model, tokenizer_folder
from small_outside import FAMILIES, outside_folder

PLAIN = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
"""Steps at the end of published tokenizers that add nothing to a text."""
SUMMARY = {"perplexity": 12.345, "ci95": [11.0, 14.0], "bits_per_byte": 1.2345, "tokens": 98_765}


@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu2"])
def test_plain_transformers_loads_it(ffn: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    model = small_model(ffn)
    export(model.state_dict(), model.shape, tokenizer_folder(tmp_path / "tok"), tmp_path / "m", {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m", trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == (EOT, EOT, 0)
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 0
    assert loaded.dtype == torch.float32
    tokens = tokenizer(TEXT[0], return_tensors="pt").input_ids[:, :16]
    ids = tokenizer(TEXT[3]).input_ids
    assert ids[0] == 0 and tokenizer.decode(ids[1:]) == TEXT[3]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), loaded(tokens).logits, rtol=0, atol=1e-5)


def test_the_tokenizer_is_told_the_models_own_context(tmp_path: Path) -> None:
    """Not that of the run that its stage was made in."""
    tokens = tokenizer_folder(tmp_path / "tokens")
    path = tokens / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 99}))
    model = small_model(context=16)
    export(model.state_dict(), model.shape, tokens, tmp_path / "out", {})
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 16 and settings["eos_token"] == "<|endoftext|>"


def test_bfloat16_when_asked_for(tmp_path: Path) -> None:
    model, tokenizer = small_model(), tokenizer_folder(tmp_path / "tok")
    export(model.state_dict(), model.shape, tokenizer, tmp_path / "m", {}, "bfloat16")
    saved = load_file(tmp_path / "m/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    _, state = hf.from_hf(tmp_path / "m")
    assert torch.equal(state["embed.weight"], model.embed.weight.bfloat16().float())
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model, tokenizer = small_model(), tokenizer_folder(tmp_path / "tok")
    for name in "ab":
        export(model.state_dict(), model.shape, tokenizer, tmp_path / name, {"method": "slm"})
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab")
    assert first == second
    given, found = (json.loads(text) for text in (
        (tokenizer / "tokenizer.json").read_bytes(), first["tokenizer.json"]))
    assert {**given, "post_processor": None} == {**found, "post_processor": None}
    assert set(first) == {"config.json", "generation_config.json", "model.safetensors",
                          "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                          "README.md"}


def test_a_failure_leaves_the_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small_model(), tokenizer_folder(tmp_path / "tok")
    export(model.state_dict(), model.shape, tokenizer, tmp_path / "m", {})
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match="disk is full"):
        export(small_model("relu2").state_dict(), small_model("relu2").shape, tokenizer,
               tmp_path / "m", {})
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "tok"]


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    model = small_model()

    def attempt(folder: Path) -> None:
        export(model.state_dict(), model.shape, folder, tmp_path / "m", {})

    with pytest.raises(UserError, match="they do not belong together, take the model's"):
        attempt(tokenizer_folder(tmp_path / "large", entries=310))
    with pytest.raises(UserError, match=r"tokenizer_config\.json does not exist"):
        attempt(tmp_path / "nowhere")
    tokenizer = tokenizer_folder(tmp_path / "tok")
    (tokenizer / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no eos_token"):
        attempt(tokenizer)
    assert not (tmp_path / "m").exists()


def test_the_card_tells_what_it_was_given() -> None:
    shape = small_model().shape
    card = model_card(shape, {
        "method": "slm-is", "domain": "pubmed", "recipe": "nano", "seed": 3,
        "data": {"generic": ["../data/*.jsonl"], "pretrain_tokens": 5_000_000,
                 "spec_tokens": 100_000},
        "before": SUMMARY | {"perplexity": 20.5}, "after": SUMMARY,
        "cost": {"tokens": 5_100_000, "flops": 2.5e14, "device_hours": 0.125, "device": "a CPU",
                 "money": None},
    }, "## GGUF")
    for words in ("pubmed", methods.find("slm-is").sentence, "`nano`, seed 3", "`*.jsonl`",
                  "5,000,000", "100,000",
                  "| this model | 12.35 | 11.00 to 14.00 | 1.234 | 98,765 |",
                  "| before fine-tuning | 20.50 |", "5.1M tokens", "250TFLOP",
                  "0.125 device-hours on a CPU", "windows of 16 tokens", "## GGUF"):
        assert words in card, words
    assert "None" not in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and "slm-is" in front["tags"]


def test_the_card_escapes_what_it_is_given() -> None:
    nasty = "a|b\n# <script>x</script> [y](z) `q` *s*\n---"
    card = model_card(small_model().shape, {
        "method": nasty, "domain": nasty, "recipe": nasty, "data": {"generic": [nasty]},
        "cost": {"device_hours": 1.0, "device": nasty}, "after": SUMMARY}, "")
    assert yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))["tags"][1] == nasty
    body = card.split("\n---\n", 1)[1]
    outside = [part for line in body.split("\n") for part in line.split("`")[::2]]
    assert not any("<script>" in part or "[y](z)" in part for part in outside)
    assert sum(line.startswith("# ") for line in body.split("```")[0].split("\n")) == 1
    assert not any(line.startswith("---") for line in body.split("\n"))


def test_the_python_in_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(context=64)
    export(model.state_dict(), model.shape, tokenizer_folder(tmp_path / "tok"), tmp_path / "m", {})
    monkeypatch.chdir(tmp_path / "m")
    code = (tmp_path / "m/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once")


def test_the_card_tells_how_to_get_gguf_where_that_would_be_right(tmp_path: Path) -> None:
    tokenizer = json.loads((tokenizer_folder(tmp_path) / "tokenizer.json").read_text())
    assert "planearly gguf" in conversion(small_model().shape, tokenizer)
    assert "planearly gguf" in conversion(small_model("relu2").shape, tokenizer)
    assert "squared ReLU" in conversion(small_model("gelu").shape, tokenizer)
    for other in ({"pre_tokenizer": {"type": "ByteLevel"}}, {"normalizer": {"type": "NFC"}}):
        told = conversion(small_model().shape, tokenizer | other)
        assert "convert_hf_to_gguf.py" in told and "planearly gguf" not in told
    unigram = tokenizer | {"model": {"type": "Unigram"}}
    assert "not a byte-level BPE" in conversion(small_model().shape, unigram)


def exported_experts(bank: str, place: Path) -> Path:
    """One expert of several, as a run exports it."""
    shape = small_model(context=64).shape
    settings = keys.Projected(experts=3, rank=2, embedding=3)
    model = Projected(shape, settings, seed=1) if bank == "projected" else Mixture(shape, 3, seed=1)
    export(model.materialise(model.blend(torch.tensor([0.6, 0.3, 0.1]))), shape,
           tokenizer_folder(place / "tok"), place / "m", {})
    return place / "m"


def exported_of_others(family: str, place: Path) -> Path:
    """A checkpoint of others, as a run exports it."""
    begun = outside_folder(place / "begun", family)
    shape, state = outside.weights_in(begun, 64)
    export(state, shape, begun, place / "m", {}, companions=begun)
    return place / "m"


def exported_with(kind: str, place: Path) -> Path:
    """A model of ours with a tokenizer of a kind."""
    model = small_model(context=64)
    export(model.state_dict(), model.shape, tokenizer_folder(place / "tok", kind=kind),
           place / "m", {})
    return place / "m"


@pytest.mark.parametrize(("made", "kind"), [
    *((exported_with, kind) for kind in ("bpe", "unigram")),
    *((exported_experts, bank) for bank in ("projected", "mixture")),
    *((exported_of_others, family) for family in FAMILIES)])
def test_batches_of_prompts_and_of_training_texts(
        made: Callable[[str, Path], Path], kind: str, tmp_path: Path) -> None:
    check_batches(made(kind, tmp_path))


def test_batches_are_padded_before_the_text_by_a_padding_token_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    folder = outside_folder(tmp_path / "m", "qwen3")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {**config, "pad_token": "a", "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    tokens.complete(folder, 64)
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    write = pipeline("text-generation", str(folder))
    assert write.tokenizer.pad_token == "a"
    together = write(TEXT[:3], batch_size=3, max_new_tokens=4, do_sample=False)
    assert together == [write([t], max_new_tokens=4, do_sample=False)[0] for t in TEXT[:3]]


def test_a_checkpoint_keeps_its_tokenizer_and_chat_template(tmp_path: Path) -> None:
    beside = tokenizer_folder(tmp_path / "theirs")
    (beside / "chat_template.jinja").write_text("{{ messages }}")
    (beside / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    model = small_model()
    export(model.state_dict(), model.shape, tokenizer_folder(tmp_path / "tok"), tmp_path / "m", {},
           companions=beside)
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (beside / name).read_bytes()
    found, given = (json.loads((place / "tokenizer.json").read_text())
                    for place in (tmp_path / "m", beside))
    assert {**found, "post_processor": None} == {**given, "post_processor": None}
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    assert config["pad_token"] == EOT
    assert "first = tokenizer.bos_token" not in (tmp_path / "m/README.md").read_text()
    again = small_model()
    export(again.state_dict(), again.shape, tokenizer_folder(tmp_path / "tok"),
           tmp_path / "again", {}, companions=tmp_path / "m")  # one that begins texts already
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


@pytest.mark.parametrize(("family", "kind", "processor"), [
    ("qwen3", "Qwen2Tokenizer", BYTES), ("gpt2", "GPT2Tokenizer", None),
    ("gpt-neox", "GPTNeoXTokenizer", PLAIN), ("llama-3.2", "PreTrainedTokenizerFast", BYTES),
    ("phi3", "LlamaTokenizer", PLAIN)])
def test_an_exported_checkpoint_begins_texts_as_in_training(
        family: str, kind: str, processor: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    begun = outside_folder(tmp_path / "begun", family)
    for name, key, value in (("tokenizer_config.json", "tokenizer_class", kind),
                             ("tokenizer.json", "post_processor", processor)):
        values = json.loads((begun / name).read_text())
        (begun / name).write_text(json.dumps({**values, key: value}))
    shape, state = outside.weights_in(begun, 64)
    export(state, shape, begun, tmp_path / "m", {}, companions=begun)
    theirs, ours = (AutoTokenizer.from_pretrained(place) for place in (begun, tmp_path / "m"))
    assert ours.special_tokens_map == theirs.special_tokens_map | {"pad_token": EOT}
    for text in (*TEXT[:3], "", " a  b\n"):
        assert ours(text).input_ids == [ours.bos_token_id, *theirs(text).input_ids]
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


def test_a_checkpoint_without_a_tokenizer_configuration_gets_the_runs(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens, begun = tokenizer_folder(tmp_path / "tok"), outside_folder(tmp_path / "begun", "qwen3")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (begun / name).unlink()
    shape, state = outside.weights_in(begun, 64)
    export(state, shape, tokens, tmp_path / "m", {}, companions=begun)
    found = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (found.eos_token, found.pad_token, found.padding_side) == (EOT, EOT, "left")
    check_batches(tmp_path / "m")


def test_the_card_tells_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.TABLE, "slm-new", methods.Method(
        "slm-new", "SLM-new", "a new one", tune="prefix"))  # type: ignore[arg-type]
    for method, row in methods.TABLE.items():
        assert row.sentence in model_card(small_model().shape, {"method": method}, "")
        bare = model_card(small_model().shape, {
            "method": method, "data": {"pretrain_tokens": 0}}, "")
        assert (row.tuning if row.pretrains else row.sentence) in bare
        assert row.tune != "prefix" or "(prefix)" in bare


def test_the_card_claims_nothing_that_did_not_happen() -> None:
    shape = small_model().shape
    for method, words in (("slm", "fine-tuned on the domain's documents"),
                          ("llm-lora", "low-rank matrices")):
        card = model_card(shape, {
            "method": method, "start": "/home/someone/models/Base-1B", "domain": "law",
            "data": {"generic": ["/home/someone/corpus/*.jsonl"], "pretrain_tokens": 0},
            "front": {"license": "apache-2.0", "datasets": ["a/b"], "base_model": None}}, "")
        assert words in card and "`Base-1B`" in card
        told = card.split("## Use")[0]
        assert "pretrained" not in told and "generic" not in told and "someone" not in told
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["license"] == "apache-2.0" and front["datasets"] == ["a/b"]
        assert "base_model" not in front


def test_the_card_tells_what_of_a_method_did_not_happen_as_it_says(tmp_path: Path) -> None:
    ours = small_model().shape
    theirs = outside.shape_in(outside_folder(tmp_path, "qwen3"), 16)
    taught = model_card(ours, {"method": "slm-d", "teacher": "/home/someone/Large-8B"}, "")
    assert "the predictions of the model `Large-8B`" in taught
    assert "fine-tuned on them" not in taught
    none = {"method": "slm", "best_step": 0}
    assert "these are the weights before it" in model_card(ours, none, "")
    assert "the weights before it" not in model_card(ours, none | {"best_step": 9}, "")
    cost = {"cost": {"tokens": 100}}
    begun = model_card(theirs, {"start": "Base-1B"} | cost, "")
    assert "not counted: what `Base-1B` had cost" in begun
    assert "not counted: the pretraining" in model_card(ours, {"bundle": True} | cost, "")
    assert "not counted" not in model_card(ours, cost, "")
    fresh = model_card(ours, {}, "")
    assert "not taught to follow" in fresh and "not taught to follow" not in begun  # who knows
    assert "together hold at most 16 tokens" in fresh
    assert "windows of 16 tokens" in begun and "together hold at most 64 tokens" in begun
