"""Model folders that would be read wrongly: each kind is one sentence, by whatever way it comes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from examples import examples
from planearly.errors import UserError, refused
from planearly.export import gguf
from planearly.model import hf, outside, reading, starts
from small_models import model_folder, tokenizer_folder
from small_outside import outside_folder

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path)


def configure(folder: Path, **changed: Any) -> Path:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


READERS: list[Callable[[Path], Any]] = [
    hf.load, hf.from_hf, lambda folder: gguf.write(folder, folder / "x.gguf", "f32")]


@pytest.fixture(params=READERS, ids=["evaluate", "start", "gguf"])
def read(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return request.param


def test_a_slip_of_our_own_is_not_blamed_on_a_folder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^transformers cannot \(Expecting"), \
            refused("transformers cannot"):
        json.loads("{")
    with pytest.raises(AttributeError), refused("transformers cannot"):
        reading.number(None, "layers", tmp_path)  # type: ignore[arg-type]
    outside_folder(tmp_path, "gpt2")
    monkeypatch.delattr(outside, "_Given")
    with pytest.raises(NameError):
        outside.read(tmp_path, 16)


def test_heads_of_an_odd_width_are_not_held(folder: Path) -> None:
    width = hf.read_shape(folder).d_model
    configure(folder, num_attention_heads=width, num_key_value_heads=width, head_dim=1)
    with pytest.raises(hf.CannotHold, match="heads of 1 numbers, which rotary positions"):
        hf.read_shape(folder)


@pytest.mark.parametrize("family", ["qwen3", "llama-3.2", "gpt2", "gpt-neox"])
def test_a_folder_without_its_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    folder = outside_folder(tmp_path, family)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        hf.load(folder)


@pytest.mark.parametrize("said", [
    {"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"bits": 8}])
def test_a_quantization_configuration_is_refused(read, folder, said):
    with pytest.raises(UserError, match="is quantized"):
        read(configure(folder, quantization_config=said))


@pytest.mark.parametrize("kind", ["float8", "int8", "scales alone", "packed"])
def test_quantized_tensors_are_refused_without_a_configuration_that_says_so(read, folder, kind):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{Q}.weight"]
        if kind == "float8":
            tensors[f"{Q}.weight"] = weight.to(torch.float8_e4m3fn)
        elif kind == "int8":
            tensors[f"{Q}.weight"] = (weight * 100).to(torch.int8)
        elif kind == "scales alone":
            tensors[f"{Q}.weight_scale_inv"] = torch.ones(1)
        else:
            tensors[f"{Q}.qweight"] = torch.ones(4, 32, dtype=torch.int32)

    with pytest.raises(UserError, match="is quantized"):
        read(reweigh(folder, change))


def test_tensors_without_a_place_are_refused(read, folder):
    reweigh(folder, lambda tensors: tensors.update({f"{Q}.bias": torch.ones(32)}))
    with pytest.raises(UserError, match=r"no place for the tensor 'model.*q_proj.bias'"):
        read(folder)


def test_what_old_checkpoints_carry_along_is_no_weight(read, folder):
    place = "model.layers.0.self_attn.rotary_emb.inv_freq"
    read(reweigh(folder, lambda tensors: tensors.update({place: torch.ones(4)})))


def test_a_tied_model_with_another_output_matrix_is_refused(read, folder):
    configure(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"'lm_head\.weight'"):
        read(folder)

    def same(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    read(reweigh(folder, same))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_told(read, folder, value):
    reweigh(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, value))
    with pytest.raises(UserError, match=r"'model\.norm\.weight' holds numbers that are not finite"):
        read(folder)


@pytest.mark.parametrize("text", ["[]", "3", "{", "null"])
def test_a_configuration_that_is_no_object(read, folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read(folder)


def test_an_index_that_says_nothing(read, folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match="weight_map"):
        read(folder)


@pytest.mark.parametrize("key", ["n_layer", "num_layers", "n_layers", "num_hidden_layers"])
@pytest.mark.parametrize("inside", [False, True])
def test_more_layers_than_any_model_has_are_not_built(folder, key, inside):
    changed = {"text_config": {key: 10**9}} if inside else {"model_type": "gpt2", key: 10**9}
    with pytest.raises(UserError, match=f"'{key}' is 1000000000"):
        hf.load(configure(folder, **changed))


def test_two_sets_of_weights_are_refused(read, folder):
    index = folder / "model.safetensors.index.json"
    shard = folder / "model-00001-of-00001.safetensors"
    shutil.copyfile(folder / "model.safetensors", shard)
    with pytest.raises(UserError, match="two sets of weights"):
        read(folder)
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    with pytest.raises(UserError, match=r"two sets of weights.*does not name model\.safetensors"):
        read(folder)


def test_code_of_its_own_is_not_run_and_said(folder):
    configure(folder, model_type="strange", auto_map={"AutoConfig": "configuration.Strange"})
    with pytest.raises(UserError, match="needs code of its own"):
        outside.configured(folder, 8)
    with pytest.raises(UserError, match="needs code of its own"):
        hf.load(folder)


KEYS = ["num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps",
        "intermediate_size", "max_position_embeddings", "num_key_value_heads", "head_dim",
        "rope_theta", "rope_parameters", "hidden_act", "dtype", "tie_word_embeddings",
        "model_type", "architectures", "bos_token_id", "eos_token_id", "attention_bias"]


@examples(60, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(KEYS), value=st.sampled_from(
    ["absent", None, [], {}, "bf16", "1e-05", "x", 0, -1, 7, 1.5, True, 10**9, [1], {"a": 1}]))
def test_one_odd_key_is_one_sentence_or_nothing(read, folder, key, value):
    before = (folder / "config.json").read_text()
    try:
        read(configure(folder, **{key: value}))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
    finally:
        (folder / "config.json").write_text(before)


def test_a_model_that_sees_what_comes_after_is_no_causal_one(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    BertLMHeadModel(BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1,
                               num_attention_heads=2, intermediate_size=48,
                               initializer_range=0.5)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not causal"):
        hf.load(tokenizer_folder(tmp_path))


@pytest.fixture
def adapters(tmp_path):
    """A base model, a folder of adapters on it, and the logits that both have together."""
    peft = pytest.importorskip("peft")
    base = model_folder(tmp_path)
    model, _ = hf.load(base)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapters")
    inputs = torch.arange(12)[None]
    with torch.no_grad():
        return tmp_path / "adapters", base, inputs, adapted(input_ids=inputs).logits


def test_adapters_are_read_on_their_base(adapters):
    folder, base, inputs, expected = adapters
    model, tokenizer = hf.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, expected, rtol=0, atol=1e-4)
        assert (hf.load(base)[0](inputs).logits - expected).abs().max() > 0.01
    assert tokenizer.eos_token_id == 0


def test_adapters_in_the_place_of_a_model_are_told(adapters):
    folder, *_ = adapters
    for read in (hf.from_hf, lambda it: outside.shape_in(it, 8),
                 lambda it: starts.check_folder("start", it, 8)):
        with pytest.raises(UserError, match="holds adapters and no model: merge them"):
            read(folder)


def test_adapters_that_cannot_be_read(adapters):
    folder, *_ = adapters
    weights, settings_ = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, said = load_file(weights), json.loads(settings_.read_text())
    first = min(whole)
    save_file({k: v for k, v in whole.items() if k != first}, weights)
    with pytest.raises(UserError, match="its adapters are incomplete"):
        hf.load(folder)
    save_file({**whole, "base_model.model.elsewhere.lora_A.weight": torch.ones(2, 2)}, weights)
    with pytest.raises(UserError, match="no place for the tensor"):
        hf.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        hf.load(folder)
    settings_.write_text(json.dumps({**said, "base_model_name_or_path": "someone/base"}))
    with pytest.raises(UserError, match="adapt the model 'someone/base', and no folder"):
        hf.load(folder)
    settings_.write_text("[]")
    with pytest.raises(UserError, match="names no model that its adapters adapt"):
        hf.load(folder)
