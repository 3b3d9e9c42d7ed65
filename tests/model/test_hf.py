"""The model in plain transformers: the same logits, the same weights there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from planearly.errors import UserError
from planearly.model.hf import from_hf, hf_config, to_hf
from planearly.model.transformer import Shape, Transformer

SHAPES = [
    Shape(layers=2, d_model=32, heads=4, d_ff=80, vocab_size=97, context=24, ffn=ffn,
          tie_embeddings=tied)
    for ffn in ("swiglu", "gelu", "relu2") for tied in (True, False)
] + [
    Shape(layers=1, d_model=24, heads=1, d_ff=56, vocab_size=40, context=8, norm_eps=1e-3),
    Shape(layers=3, d_model=64, heads=8, d_ff=64, vocab_size=300, context=300, ffn="gelu",
          rope_theta=500.0),
    Shape(layers=2, d_model=64, heads=8, d_ff=96, vocab_size=90, context=32, kv_heads=2),
    Shape(layers=2, d_model=48, heads=6, d_ff=96, vocab_size=90, context=32, ffn="relu2",
          tie_embeddings=False, kv_heads=1),
    Shape(layers=1, d_model=128, heads=2, d_ff=256, vocab_size=64, context=64, rope_theta=1e6),
]


def label(shape: Shape) -> str:
    return f"{shape.ffn}-{shape.d_model}-{shape.kv_heads or 'all'}-{shape.tie_embeddings}"


def save(folder: Path, model: Transformer, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = hf_config(model.shape, 0, 0) | changed
    (folder / "config.json").write_text(json.dumps(config))
    save_file(to_hf(model.state_dict(), model.shape), folder / "model.safetensors",
              metadata={"format": "pt"})
    return folder


def trained(shape: Shape) -> Transformer:
    """A model whose norms are not ones and whose logits are not near zero."""
    model = Transformer(shape, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 2:
                parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_logits_equal_those_of_transformers(shape: Shape, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = trained(shape)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        save(tmp_path, ours), output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.max_position_embeddings == shape.context
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    tokens = torch.randint(shape.vocab_size, (3, shape.context),
                           generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_there_and_back_bit_for_bit(shape: Shape, tmp_path: Path) -> None:
    model = trained(shape)
    found, state = from_hf(save(tmp_path, model))
    assert found == shape
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_model_saved_by_transformers_loads_here(kv_heads: int, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=20,
        initializer_range=0.2))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shape, state = from_hf(tmp_path)
    assert shape.kv_heads == (None if kv_heads == 4 else kv_heads)
    ours = Transformer(shape)
    ours.load_state_dict(state)
    tokens = torch.arange(20)[None] * 2
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("changed", "words"), [
    ({"num_key_value_heads": 3}, "4 heads over 3 of keys"),
    ({"model_type": "qwen2"}, "architecture 'qwen2'"),
    ({"attention_bias": True}, "biases"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
     "rope scaling 'llama3'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
     "rope scaling 'linear'"),
    ({"model_type": "gpt2"}, "architecture 'gpt2'"),
    ({"hidden_act": "relu"}, "activation 'relu'"),
    ({"head_dim": 16}, "heads of 16 numbers"),
    ({"num_hidden_layers": 3}, "no tensor 'model.layers.2"),
])
def test_what_the_model_cannot_hold_is_one_sentence(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        from_hf(save(tmp_path, Transformer(SHAPES[0]), **changed))


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        from_hf(tmp_path)
    weights = save(tmp_path, Transformer(SHAPES[0])) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"not a whole safetensors file.*: copy or"):
        from_hf(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        from_hf(tmp_path)
