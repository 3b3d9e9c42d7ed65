"""GGUF files: the same tensors and tokens as the folder's, and the same logits in llama.cpp."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planearly.errors import UserError
from planearly.evaluate.files import evaluate_files
from planearly.export import gguf
from planearly.export.folder import export
from planearly.files import check_place, write_json
from planearly.model import hf
from planearly.model.transformer import Shape, Transformer
from small_models import EOT, TEXT, small_model, tokenizer_folder
from small_outside import outside_folder

TEXTS = [*TEXT[:6], "", " ", "a", "isn't 2024/05 3.14159e-10", "éà ü 日本語 🙂",
         "  \n\n\tx = 12345 \n"]


def folder_of(model: Transformer, place: Path) -> Path:
    export(model.state_dict(), model.shape, tokenizer_folder(place / "tok"), place / "m", {})
    return place / "m"


def llama_cpp(file: Path) -> Any:
    """llama.cpp with this model, on one thread and without flash attention."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 256, False, 1
    params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


@pytest.mark.parametrize(("ffn", "kind", "most"), [
    ("swiglu", "f32", 0.01), ("swiglu", "f16", 0.02), ("swiglu", "bf16", 0.1),
    ("swiglu", "q8_0", 0.15), ("relu2", "f32", 0.01)])
def test_llama_cpp_computes_the_same(ffn: str, kind: str, most: float, tmp_path: Path) -> None:
    model = small_model(ffn, context=256)
    folder = folder_of(model, tmp_path)
    server = llama_cpp(gguf.write(folder, tmp_path / "m.gguf", kind))
    _, tokenizer = hf.load(folder)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        answer, of_ids = (server.handle_completions({
            "prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0.0,
            "cache_prompt": False,
            "logit_bias": [[tokenizer.encode("a")[-1], 1e3]]})  # of what is drawn, not of the odds
            for prompt in (text, ids))
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["choices"][0]["logprobs"] == of_ids["choices"][0]["logprobs"]  # the same ids
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        theirs = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert len(theirs) == 10
        for one in theirs:
            assert ours[one["id"]].item() == pytest.approx(one["logprob"], abs=most)


def test_a_checkpoints_prompts_have_the_ids_of_its_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, tokens = small_model(context=64), tokenizer_folder(tmp_path / "tok")
    exported = tmp_path / "exported"
    export(model.state_dict(), model.shape, tokens, exported, {}, companions=tokens)
    published = tmp_path / "published"  # with a tokenizer that begins nothing
    export(model.state_dict(), model.shape, tokens, published, {})
    shutil.copyfile(tokens / "tokenizer.json", published / "tokenizer.json")
    for folder, more in ((exported, 1), (published, 0)):
        server = llama_cpp(gguf.write(folder, tmp_path / f"{folder.name}.gguf"))
        own = AutoTokenizer.from_pretrained(folder)
        for text in TEXTS[:2]:
            answer = server.handle_completions({"prompt": text, "n_predict": 1})
            ids = own(text).input_ids
            assert answer["usage"]["prompt_tokens"] == len(ids)
            assert len(ids) == len(own(text, add_special_tokens=False).input_ids) + more


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_continues_with_the_same_text(kind: str, tmp_path: Path) -> None:
    from planearly.generate import generate

    folder = folder_of(small_model(context=256), tmp_path)
    server = llama_cpp(gguf.write(folder, tmp_path / "m.gguf", kind))
    for text in TEXTS[:4]:
        answer = server.handle_completions({
            "prompt": text, "n_predict": 8, "temperature": 0.0, "cache_prompt": False})
        assert text + answer["choices"][0]["text"] == generate(folder, text, 8, temperature=0)


@pytest.mark.parametrize(("kind", "most"), [("f16", 0.01), ("q8_0", 0.05)])
def test_perplexity_in_llama_cpp_is_that_of_evaluate(
        kind: str, most: float, tmp_path: Path) -> None:
    """Target by target: the odds of each token of a document after those before it."""
    folder = folder_of(small_model(context=256), tmp_path)
    server = llama_cpp(gguf.write(folder, tmp_path / "m.gguf", kind))
    (tmp_path / "a.txt").write_text(" ".join(TEXT))
    _, tokenizer = hf.load(folder)
    ids = [*tokenizer(" ".join(TEXT))["input_ids"], tokenizer.eos_token_id]
    nats = 0.0
    for i in range(1, len(ids)):
        answer = server.handle_completions({
            "prompt": ids[:i], "n_predict": 1, "n_probs": 300, "temperature": 0.0,
            "logit_bias": [[tokenizer.encode("a")[-1], 1e3]]})
        odds = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        nats -= next(one["logprob"] for one in odds if one["id"] == ids[i])
    ours = evaluate_files(folder, [str(tmp_path / "a.txt")], 256)
    assert ours["tokens"] == len(ids) - 1
    assert np.exp(nats / ours["tokens"]) == pytest.approx(ours["perplexity"], rel=most)


def test_tensors_are_those_of_the_folder(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = Transformer(Shape(2, 32, 4, 48, 300, 16, tie_embeddings=False, kv_heads=2), seed=1)
    reader = GGUFReader(gguf.write(folder_of(model, tmp_path), tmp_path / "m.gguf", "f32"))
    state, shape = model.state_dict(), model.shape
    found = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    assert sum(data.size for data in found.values()) == sum(t.numel() for t in state.values())
    assert np.array_equal(found["token_embd.weight"], state["embed.weight"].numpy())
    assert np.array_equal(found["output.weight"], state["head.weight"].numpy())
    q, k, v = np.split(state["blocks.0.attn.qkv.weight"].numpy(), np.cumsum(shape.qkv_widths)[:2])
    half = shape.head_dim // 2
    for name, ours, heads in (("q", q, shape.heads), ("k", k, 2)):
        theirs = found[f"blk.0.attn_{name}.weight"]
        for row in range(len(ours)):
            head, place = divmod(row, shape.head_dim)
            twin = head * shape.head_dim + 2 * (place % half) + place // half
            assert np.array_equal(theirs[twin], ours[row])
        assert len(theirs) == heads * shape.head_dim
    assert np.array_equal(found["blk.0.attn_v.weight"], v)


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="squared ReLU"):
        gguf.write(folder_of(small_model("gelu"), tmp_path), out)
    with pytest.raises(UserError, match="choose from f32, f16, bf16, q8_0"):
        gguf.write(tmp_path / "m", out, "q4")
    with pytest.raises(UserError, match="does not exist"):
        gguf.write(tmp_path / "absent", out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_metadata_says_what_the_card_says(tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = small_model()
    export(model.state_dict(), model.shape, tokenizer_folder(tmp_path / "tok"), tmp_path / "m", {
        "method": "slm", "front": {"license": "apache-2.0", "base_model": "someone/Base-1B",
                                   "language": ["en"]}})
    file = gguf.write(tmp_path / "m", tmp_path / "law-small.gguf", "q8_0")
    fields = GGUFReader(file).fields
    for key, value in (("name", "law-small"), ("license", "apache-2.0"), ("size_label", "37K"),
                       ("base_model.0.name", "Base-1B"), ("base_model.0.organization", "someone"),
                       ("quantization_version", 2)):
        assert fields[f"general.{key}"].contents() == value
    assert fields["general.tags"].contents() == ["planearly", "slm"]
    (tmp_path / "m/README.md").write_text("no front matter")
    gguf.write(tmp_path / "m", tmp_path / "plain.gguf")
    told = gguf.modelfile(tmp_path / "m", file).read_text()
    assert told.startswith("FROM ./law-small.gguf\n") and "PARAMETER num_ctx 16\n" in told
    assert f'stop "{EOT}"' in told
    gguf.modelfile(tmp_path / "m", gguf.write(tmp_path / "m", file))  # its own are replaced
    weights = (tmp_path / "m/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="is there already and is not a GGUF file"):
        gguf.write(tmp_path / "m", tmp_path / "m/model.safetensors")
    assert (tmp_path / "m/model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match=r"m is a folder: name a file in it for a GGUF file"):
        gguf.write(tmp_path / "m", tmp_path / "m")
    with pytest.raises(UserError, match=r"is not the Modelfile of plain\.gguf"):
        gguf.modelfile(tmp_path / "m", tmp_path / "plain.gguf")


@pytest.mark.parametrize("kind", ["q4_k_m", "Q5_K_S", "iq2_xs", "q4_0"])
def test_other_kinds_point_to_llama_quantize(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"llama-quantize .*m\.gguf .*m-{kind}\.gguf {kind}$"):
        gguf.write(tmp_path, tmp_path / "m.gguf", kind)


def test_a_kind_may_be_spelt_as_llama_cpp_does(tmp_path: Path) -> None:
    folder = folder_of(small_model(), tmp_path)
    one, other = (gguf.write(folder, tmp_path / name / "m.gguf", name) for name in ("Q8_0", "q8_0"))
    assert one.read_bytes() == other.read_bytes()


def test_models_of_others_point_to_llama_cpps_converter(tmp_path: Path) -> None:
    folder = outside_folder(tmp_path / "my m", "qwen3")
    with pytest.raises(UserError,
                       match=r"architecture 'qwen3'.*convert_hf_to_gguf\.py '.*/my m' --out"):
        gguf.write(folder, tmp_path / "m.gguf")


def test_a_tokenizer_file_that_does_not_name_its_kind_is_the_same(tmp_path):
    folder = folder_of(small_model(), tmp_path)
    place = folder / "tokenizer.json"
    named = gguf.write(folder, tmp_path / "named" / "model.gguf")
    spec = json.loads(place.read_text())
    del spec["model"]["type"]  # as older versions of tokenizers wrote it
    place.write_text(json.dumps(spec))
    assert gguf.write(folder, tmp_path / "model.gguf").read_bytes() == named.read_bytes()
    del spec["model"]["merges"]
    assert "not a byte-level BPE" in str(gguf.obstacle(small_model().shape, spec))
    place.write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        gguf.write(folder, tmp_path / "model.gguf")


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: check_place(path, "a GGUF file", lambda there: True),
                  lambda path: write_json(path, {})):
        with pytest.raises(UserError, match="pipe is neither a file nor a folder"):
            write(tmp_path / "pipe")
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]
