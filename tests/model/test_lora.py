"""Adapters: no effect at the start, only they move, and merging them changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from planearly import keys, tensors
from planearly.errors import UserError
from planearly.model import flops, lora
from planearly.model.transformer import Shape, Transformer
from planearly.train import loop, optim
from planearly.train.trainable import Dense
from small_trainings import Words, killed_after_steps, same, settings

SHAPE = Shape(layers=2, d_model=32, heads=2, d_ff=48, vocab_size=50, context=16)
LORA = keys.Lora(rank=4, alpha=8.0)


def adapted(ffn: str = "swiglu", seed: int = 3, kv_heads: int | None = None) -> Transformer:
    shape = Shape(2, 32, 2, 48, 50, 16, ffn, kv_heads=kv_heads)
    model = Transformer(shape, seed=1)
    lora.add_adapters(model, LORA, seed)
    return model


def train(model: Transformer, folder: Path, steps: int = 6) -> loop.Outcome:
    return loop.train(Dense(model), Words(), steps, settings(), folder, name="t")


@pytest.mark.parametrize(("ffn", "kv_heads"), [("swiglu", None), ("gelu", None), ("swiglu", 1)])
def test_adapters_start_at_no_effect_on_every_matrix_of_every_block(ffn, kv_heads):
    model = adapted(ffn, kv_heads=kv_heads)
    inputs = Words().batch(0, 4).inputs
    torch.testing.assert_close(model(inputs), Transformer(model.shape, seed=1)(inputs),
                               rtol=0, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == flops.lora_parameters(model.shape, LORA.rank)
    per_block = 7 if ffn == "swiglu" else 6
    assert len(trained) == 2 * per_block * model.shape.layers


@pytest.mark.parametrize(("ffn", "kv_heads"), [("swiglu", None), ("relu2", None), ("swiglu", 1)])
def test_merged_equals_adapter_on(ffn, kv_heads, tmp_path):
    model = adapted(ffn, kv_heads=kv_heads)
    train(model, tmp_path)
    dense = Transformer(model.shape)
    state = lora.merged(model)
    assert state.keys() == dict(dense.named_parameters()).keys()
    tensors.set_weights(dense, state, "merged")
    inputs = Words().batch(50, 58).inputs
    start = Transformer(model.shape, seed=1)(inputs)
    with torch.no_grad():
        assert (model(inputs) - start).abs().max() > 0.01
        torch.testing.assert_close(dense(inputs), model(inputs), rtol=0, atol=1e-5)


def test_only_adapters_are_trained_and_saved(tmp_path):
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, tmp_path)
    kept, _ = tensors.load_tensors(tmp_path / loop.FINAL)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".lora_" in name)
        assert (name in kept) == (".lora_" in name)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    train(adapted(), tmp_path / "whole")
    killed_after_steps(3, lambda: train(adapted(), tmp_path / "cut"))
    train(adapted(), tmp_path / "cut")
    whole, cut = (tensors.load_tensors(tmp_path / f / loop.FINAL)[0] for f in ("whole", "cut"))
    assert same(whole, cut)


def test_adapters_are_a_function_of_their_seed_alone():
    torch.manual_seed(1)
    one = tensors.weights(adapted())
    torch.manual_seed(2)
    assert same(one, tensors.weights(adapted()))
    assert not same(one, tensors.weights(adapted(seed=4)))


def test_adapters_use_adam_not_muon():
    kinds = [type(o) for o in optim.build(adapted(), optim.PRESETS["modern"])]
    assert kinds == [torch.optim.AdamW]


def test_a_rank_larger_than_a_matrix_is_one_sentence():
    lora.check(keys.Lora(rank=32), SHAPE, "slm-lora")
    with pytest.raises(UserError, match=r"lora\.rank' is 33.*of slm-lora.*32 x 32.*at most 32"):
        lora.check(keys.Lora(rank=33), SHAPE, "slm-lora")
    with pytest.raises(UserError, match=r"32 x 16.*at most 16"):
        lora.check(keys.Lora(rank=17), replace(SHAPE, d_ff=16), "slm-lora")


def test_without_peft_one_sentence(monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the method slm-lora needs the package peft"):
        lora.check(keys.Lora(rank=4), SHAPE, "slm-lora")
