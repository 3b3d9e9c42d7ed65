"""The model under the names of Hugging Face `transformers`, both ways.

A gated feed-forward makes the model a ``LlamaForCausalLM``, a plain one an ``ArceeForCausalLM``
(Llama with an ungated feed-forward). Both are stock: plain `transformers` loads them without code
of ours, and computes the same logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planearly.errors import UserError
from planearly.files import read_json
from planearly.model.transformer import GATED, Shape
from planearly.parallel import best_device

_WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.o.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
_QKV = "attn.qkv.weight"
_Q, _K, _V = (f"self_attn.{name}_proj.weight" for name in "qkv")
"""Ours stacks the three along the outputs, in this order."""

_ACTIVATION = {GATED: "silu", "gelu": "gelu_pytorch_tanh", "relu2": "relu2"}
_ARCHITECTURE = {GATED: ("llama", "LlamaForCausalLM"), "gelu": ("arcee", "ArceeForCausalLM"),
                 "relu2": ("arcee", "ArceeForCausalLM")}


def hf_config(shape: Shape, bos_token_id: int, eos_token_id: int,
              dtype: str = "float32") -> dict[str, Any]:
    """The ``config.json`` of a model; ``max_position_embeddings`` is its training context."""
    model_type, architecture = _ARCHITECTURE[shape.ffn]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "head_dim": shape.head_dim,
        "hidden_act": _ACTIVATION[shape.ffn],
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        # the old place and the new one: transformers 5 reads the second, other programs the first
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
    }


def to_hf(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Our parameters under the names of Hugging Face, each in memory of its own."""
    named: dict[str, Tensor] = {}
    for name, theirs in _names(shape):
        parts = state[name].split(shape.qkv_widths) if len(theirs) == 3 else (state[name],)
        for their_name, part in zip(theirs, parts, strict=True):
            named[their_name] = part.detach().to("cpu", copy=True).contiguous()
    return named


def from_hf(folder: Path) -> tuple[Shape, dict[str, Tensor]]:
    """Read a Llama or Arcee folder: its shape, and its parameters in float32 under our names.

    Raises:
        UserError: not such a folder, or a model that ours cannot hold (biases, a rope scaling,
            another activation, another width of heads), or weights that are missing.
    """
    shape = read_shape(folder)
    theirs = _read_weights(folder)
    state = {}
    for name, parts in _names(shape):
        for part, size in zip(parts, _sizes(name, shape), strict=True):
            if part not in theirs:
                raise UserError(f"{folder} has no tensor '{part}': its weights are incomplete")
            if theirs[part].shape != size:
                raise UserError(
                    f"{folder}: the tensor '{part}' has shape {list(theirs[part].shape)} and its "
                    f"config.json asks for {list(size)}: the files do not belong together")
        state[name] = torch.cat([theirs[part].float() for part in parts])
    return shape, state


def read_shape(folder: Path) -> Shape:
    """The shape that the ``config.json`` of a Llama or Arcee folder states.

    Raises:
        UserError: as :func:`from_hf`, but for the weights, which are not read.
    """
    return _shape(read_json(folder / "config.json"), folder)


def load(folder: Path) -> tuple[Any, Any]:
    """Any causal language model in a folder, and its tokenizer, by plain `transformers`.

    Float32 on a CPU, bfloat16 on a GPU. Nothing is fetched, unpickled, or run from the folder.

    Raises:
        UserError: no such folder, or `transformers` cannot load a causal model or tokenizer of it.
    """
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}: give a model folder in Hugging Face format")

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    device = best_device()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    refused = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
            output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)
    except refused as error:
        brief = " ".join(str(error).split())[:300]
        raise UserError(f"transformers cannot load {folder} as a causal model ({brief})") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{folder} has no tensor '{min(info['missing_keys'])}': its weights are "
                        "incomplete, or it is not a causal model")
    return model.to(device).eval(), tokenizer


def _names(shape: Shape) -> list[tuple[str, tuple[str, ...]]]:
    """Each parameter of a model of this shape, and the one or three it is called by the others."""
    whole = [(ours, (theirs,)) for ours, theirs in _WHOLE.items()
             if ours != "head.weight" or not shape.tie_embeddings]
    inner = [(_QKV, (_Q, _K, _V)), *((ours, (theirs,)) for ours, theirs in _BLOCK.items()
                                     if ours != "ffn.gate.weight" or shape.ffn == GATED)]
    return [*whole, *((f"blocks.{i}.{ours}", tuple(f"model.layers.{i}.{name}" for name in theirs))
                      for i in range(shape.layers) for ours, theirs in inner)]


def _sizes(name: str, shape: Shape) -> list[tuple[int, ...]]:
    """Sizes of the one or three tensors that a parameter of ours is to them."""
    width, inner = shape.d_model, shape.d_ff
    if name.endswith(_QKV):
        return [(out, width) for out in shape.qkv_widths]
    if name.endswith("norm.weight"):
        return [(width,)]
    if name in ("embed.weight", "head.weight"):
        return [(shape.vocab_size, width)]
    if name.endswith("attn.o.weight"):
        return [(width, width)]
    return [(width, inner) if name.endswith("down.weight") else (inner, width)]


def _shape(config: dict[str, Any], folder: Path) -> Shape:
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise UserError(f"the model in {folder} has {what}, which planearly's cannot hold; "
                            "evaluate it, or choose a plain Llama or Arcee model")

    kinds = {(_ARCHITECTURE[ffn][0], _ACTIVATION[ffn]): ffn for ffn in _ACTIVATION}
    model_type = str(config.get("model_type"))
    need(model_type in ("llama", "arcee"), f"the architecture '{model_type}'")
    activation = config.get("hidden_act", "silu" if model_type == "llama" else "relu2")
    need((model_type, activation) in kinds, f"the activation '{activation}'")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    need(heads % groups == 0, f"{heads} heads over {groups} of keys and values")
    per_head = config.get("head_dim") or width // heads
    need(per_head * heads == width, f"heads of {per_head} numbers in a width of {width}")
    need(not config.get("attention_bias") and not config.get("mlp_bias"), "biases")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind == "default", f"the rope scaling '{kind}'")
    need(rope.get("partial_rotary_factor", 1.0) == 1.0, "rotary positions on a part of each head")
    return Shape(
        layers=config["num_hidden_layers"],
        d_model=width,
        heads=heads,
        kv_heads=groups,
        d_ff=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        ffn=kinds[model_type, activation],
        tie_embeddings=config.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        norm_eps=config.get("rms_norm_eps", 1e-6 if model_type == "llama" else 1e-5),
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    parts = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [
        "model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if not (folder / part).is_file():
            raise UserError(f"{folder} has no {part}: a model folder keeps its weights there")
        try:
            tensors.update(load_file(folder / part))
        except SafetensorError as error:
            raise UserError(f"{folder / part} is not a whole safetensors file ({error})") from error
    return tensors
