"""Models of others, held whole: transformers' logits, losses, gradients and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from planearly import keys, tensors
from planearly.errors import UserError
from planearly.model import flops, lora, outside, parts
from planearly.model.transformer import Shape
from planearly.train import loop, optim
from planearly.train.muon import Muon
from planearly.train.trainable import Dense
from small_outside import FAMILIES, logits, outside_folder
from small_trainings import Words, killed_after_steps, same, settings

CONTEXT = 16


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outside_folder(tmp_path_factory.mktemp(request.param), request.param)


def batch(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(300, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[1, 3:] = -100
    return tokens[:, :-1], targets


def test_logits_loss_and_gradients_are_those_of_transformers(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = outside.read(folder, CONTEXT)
    assert isinstance(outside.shape_in(folder, CONTEXT), outside.Configured)
    inputs, targets = batch()
    expected = logits(folder, inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    F.cross_entropy(plain(inputs).logits.flatten(0, 1), targets.flatten(),
                    reduction="sum").backward()
    monkeypatch.setattr(parts, "LOGITS", 7 * 304)  # seven positions at a time
    model.train()
    model.loss(inputs, targets).backward()
    theirs = dict(plain.named_parameters())
    assert dict(model.named_parameters()).keys() == theirs.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)


def test_the_shape_makes_the_model_again(folder):
    model = outside.read(folder, CONTEXT)
    shape = outside.shape_of(json.loads(json.dumps(model.shape.to_dict())))
    assert shape == model.shape == outside.shape_in(folder, CONTEXT)
    again = outside.build(shape)
    tensors.set_weights(again, tensors.weights(model), "here")
    inputs, _ = batch()
    assert torch.equal(again(inputs), model(inputs))
    assert flops.parameters(shape) == sum(p.numel() for p in model.parameters())
    layers = outside.layers(model)
    assert len(layers) == 2 and type(layers[0]) is type(layers[1])
    assert not isinstance(layers[0], torch.nn.Linear)
    one, other = (outside.build(shape, seed=seed) for seed in (3, 3))
    assert torch.equal(one(inputs), other(inputs)) and not torch.equal(one(inputs), model(inputs))


def test_adapters_start_at_no_effect_and_merge(folder):
    model, plain = (outside.read(folder, CONTEXT) for _ in range(2))
    settings = keys.Lora(rank=4, alpha=8.0)
    assert lora.add_adapters(model, settings, 1)
    inputs, targets = batch()
    torch.testing.assert_close(model(inputs), plain(inputs), rtol=0, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == flops.lora_parameters(model.shape, 4)
    for optimizer in optim.build(model, optim.PRESETS["adamw"]):
        model.loss(inputs, targets).backward()
        optimizer.step()
    tensors.set_weights(plain, lora.merged(model), "merged")
    torch.testing.assert_close(plain(inputs), model(inputs), rtol=0, atol=1e-4)


def test_parameters_and_operations_of_a_llama_are_those_of_ours(tmp_path):
    ours = Shape(2, 32, 4, 48, 304, CONTEXT, kv_heads=2, tie_embeddings=True)
    theirs = outside.configured(outside_folder(tmp_path, "llama-3.2"), CONTEXT)
    for count in (flops.parameters, flops.non_embedding, flops.forward, flops.training):
        # older versions of transformers compute the rotation's angles by a product
        assert count(theirs) == pytest.approx(count(ours), rel=2e-4)
    assert flops.lora_parameters(theirs, 4) == flops.lora_parameters(ours, 4)
    assert flops.lora_training(theirs, 4) == pytest.approx(flops.lora_training(ours, 4), rel=0.02)


def test_a_family_without_attention_heads_is_costed_by_its_layers_and_width(tmp_path):
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=304, hidden_size=32, num_hidden_layers=2, state_size=4)
    config.save_pretrained(tmp_path)
    shape = outside.configured(tmp_path, CONTEXT)
    ours = outside.alike(shape)
    assert (ours.layers, ours.d_model) == (2, outside.width_of(shape)) == (2, 32)
    assert flops.non_embedding(ours) == pytest.approx(flops.non_embedding(shape), rel=0.05)


def test_tables_never_go_to_muon(folder):
    model = outside.read(folder, CONTEXT)
    theirs = model.theirs
    tables = {id(m.weight) for m in theirs.modules() if isinstance(m, torch.nn.Embedding)}
    tables.add(id(theirs.get_output_embeddings().weight))
    orthogonal = [p for o in optim.build(model, optim.PRESETS["modern"]) if isinstance(o, Muon)
                  for g in o.param_groups for p in g["params"]]
    assert orthogonal and not tables & {id(p) for p in orthogonal}


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_killed_and_resumed_is_as_if_uninterrupted(family, tmp_path, monkeypatch):
    folder = outside_folder(tmp_path / "model", family)

    def train(place: Path) -> dict[str, torch.Tensor]:
        loop.train(Dense(outside.read(folder, CONTEXT)), Words(), 6, settings(), place,
                   name="t")
        return load_file(place / loop.FINAL)

    whole = train(tmp_path / "whole")
    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    killed_after_steps(3, lambda: train(tmp_path / "cut"))
    assert same(whole, train(tmp_path / "cut"))


def test_a_model_whose_output_is_not_of_its_last_states_alone_is_refused(tmp_path, monkeypatch):
    folder = outside_folder(tmp_path, "qwen2")
    from transformers import Qwen2ForCausalLM

    forward = Qwen2ForCausalLM.forward

    def with_tokens(self, input_ids, **more):
        found = forward(self, input_ids=input_ids, **more)
        found.logits = found.logits + 1e-3 * input_ids[..., None]
        return found

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", with_tokens)
    with pytest.raises(UserError, match="its output matrix is not applied to the last states"):
        outside.read(folder, CONTEXT)


def test_numbers_that_training_would_lose_are_refused(tmp_path, monkeypatch):
    folder = outside_folder(tmp_path, "qwen2")
    from transformers import Qwen2ForCausalLM

    made = Qwen2ForCausalLM.__init__

    def with_buffer(self, config):
        made(self, config)
        self.register_buffer("kept", torch.ones(3))

    monkeypatch.setattr(Qwen2ForCausalLM, "__init__", with_buffer)
    tensors_ = load_file(folder / "model.safetensors")
    save_file({**tensors_, "kept": torch.ones(3)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match="keeps 'kept', which is no parameter"):
        outside.read(folder, CONTEXT)


def test_what_is_no_causal_model_or_reads_less_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="reads 64 tokens, fewer than 65: set 'context=64'"):
        outside.configured(outside_folder(tmp_path, "gpt2"), 65)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="does not know as a causal language model"):
        outside.configured(tmp_path, CONTEXT)
