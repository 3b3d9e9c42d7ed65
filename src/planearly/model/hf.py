"""The model under the names of Hugging Face `transformers`, both ways.

A gated feed-forward makes the model a ``LlamaForCausalLM``, a plain one an ``ArceeForCausalLM``
(Llama with an ungated feed-forward). Both are stock: plain `transformers` loads them without code
of ours, and computes the same logits.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planearly import parallel
from planearly.errors import UserError, refused
from planearly.files import expanded, read_json
from planearly.model import reading
from planearly.model.transformer import GATED, Shape

_WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_HEAD = _WHOLE["head.weight"]
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


class CannotHold(UserError):
    """A model that :class:`~planearly.model.transformer.Transformer` is not."""


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
            another activation, another width of heads), or weights that are missing, quantized,
            not finite or without a place in the model.
    """
    shape = read_shape(folder)
    theirs = reading.weights(folder)
    state = {}
    for name, parts in _names(shape):
        for part, size in zip(parts, _sizes(name, shape), strict=True):
            if part not in theirs:
                raise UserError(f"{folder} has no tensor '{part}': its weights are incomplete")
            if theirs[part].shape != size:
                raise UserError(
                    f"{folder}: the tensor '{part}' has shape {list(theirs[part].shape)} and its "
                    f"config.json asks for {list(size)}: the files do not belong together, "
                    "copy the folder again, whole")
        state[name] = torch.cat([theirs[part].float() for part in parts])
    known = {part for _, parts in _names(shape) for part in parts}
    if shape.tie_embeddings:
        reading.check_tied(theirs[_WHOLE["embed.weight"]], theirs.get(_HEAD), folder)
        known.add(_HEAD)
    left = (name for name in theirs.keys() - known if not name.endswith("rotary_emb.inv_freq"))
    reading.check_left_over(left, folder)
    return shape, state


def read_shape(folder: Path) -> Shape:
    """The shape that the ``config.json`` of a Llama or Arcee folder states.

    Raises:
        UserError: as :func:`from_hf`, but for the weights, which are not read.
    """
    return _shape(reading.config(folder), folder)


def load(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Any causal language model in a folder, and its tokenizer, by plain `transformers`.

    A folder of `peft` adapters is the model that they adapt, with them merged in. Nothing is
    fetched, unpickled, or run from the folder.

    Args:
        dtype: of the weights (None: float32 on a CPU, bfloat16 on a GPU).

    Raises:
        UserError: no such folder; `transformers` cannot load a causal model or tokenizer of it; or
            what it would load is not the model: quantized, incomplete or damaged weights, or
            tensors without a place in it.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _adapted(folder, dtype)
    values = reading.config(folder)
    reading.check_weights(folder)

    check_known(values, folder)

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    device = parallel.device()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    with refused(f"transformers cannot load {folder} as a causal model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            dtype=kind, output_loading_info=True, ignore_mismatched_sizes=True)  # told below
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False)
    names = list(tokenizer.vocab_files_names.values())
    if tokenizer.is_fast and "tokenizer.json" not in names:  # which the class does not name itself
        names.append("tokenizer.json")
    if names and not any((folder / name).is_file() for name in names):  # it would know no text
        raise UserError(f"{folder} has no tokenizer ({', '.join(names)}): copy the model's folder "
                        "again, whole")
    model, info = loaded
    if info["mismatched_keys"]:
        name, found, asked = min(info["mismatched_keys"])
        raise UserError(f"{folder}: the tensor '{name}' has the shape {list(found)}, and its "
                        f"config.json asks for {list(asked)}: copy the model's folder again, whole")
    if info["missing_keys"]:
        raise UserError(f"{folder} has no tensor '{min(info['missing_keys'])}': its weights are "
                        "incomplete, or it is not a causal model")
    reading.check_left_over(info["unexpected_keys"], folder)
    reading.check_finite(model.named_parameters(), folder)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head is not None:
        reading.check_tied(table.weight, head.weight, folder)
    model = model.to(device).eval()
    last = torch.tensor([[0, 0, 0], [0, 0, 1]], device=device)
    with refused(f"transformers cannot run the model in {folder}"), torch.no_grad():
        first = model(input_ids=last, use_cache=False).logits[:, :2].float()
    if (first[0] - first[1]).abs().max() > 1e-3 * first.abs().max():
        raise UserError(f"the model in {folder} is not causal: what it says of a token depends on "
                        "the tokens after it")
    return model, tokenizer


def check_known(values: dict[str, Any], folder: Path) -> None:
    """Refuse a model that would need code of its own.

    Args:
        values: what the ``config.json`` in the folder holds.

    Raises:
        UserError: `transformers` has no code for its ``model_type``.
    """
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        why = ("needs code of its own ('auto_map'), which is not run" if values.get("auto_map")
               else "may need a newer transformers, or is no model's")
        raise UserError(f"transformers knows no models of type '{kind}': the one in {folder} {why}")


def _adapted(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The base of a `peft` folder with the adapters merged in; the tokenizer beside them, if any.
    """
    settings = read_json(folder / "adapter_config.json")
    named = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(named, str) or not named:
        raise UserError(f"{folder / 'adapter_config.json'} names no model that its adapters adapt "
                        "('base_model_name_or_path'): write the model's folder there")
    places = [expanded(named), folder / named]
    base = next((place for place in places if (place / "config.json").is_file()), None)
    if base is None:
        raise UserError(f"the adapters in {folder} adapt the model '{named}', and no folder of "
                        "that name is here: say in adapter_config.json where it is "
                        "('base_model_name_or_path'): write the model's folder there")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{folder} holds adapters, which the package peft reads: pip install peft")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no {weights.name}: adapters are read from there alone")
    model, tokenizer = load(base, dtype)
    peft: Any = importlib.import_module("peft")
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    with refused(f"peft cannot put the adapters in {folder} on {base}"):
        tensors = load_file(weights)
        adapted = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(folder))
        found = peft.set_peft_model_state_dict(adapted, tensors)
        reading.check_left_over(found.unexpected_keys, folder)
        if missing := [name for name in found.missing_keys if ".lora_" in name]:
            raise UserError(f"{folder} has no tensor '{missing[0]}': its adapters are incomplete")
        reading.check_finite(tensors.items(), folder)
        model = adapted.merge_and_unload().eval()
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False)
    return model, tokenizer


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
            raise CannotHold(f"the model in {folder} has {what}, which planearly's cannot hold; "
                             "choose a plain Llama or Arcee model")

    def whole(key: str, default: int | None = None) -> int:
        return int(reading.number(config, key, folder, default=default))

    kinds = {(_ARCHITECTURE[ffn][0], _ACTIVATION[ffn]): ffn for ffn in _ACTIVATION}
    model_type = str(config.get("model_type"))
    need(model_type in ("llama", "arcee"), f"the architecture '{model_type}'")
    activation = str(config.get("hidden_act", "silu" if model_type == "llama" else "relu2"))
    need((model_type, activation) in kinds, f"the activation '{activation}'")
    heads, width = whole("num_attention_heads"), whole("hidden_size")
    groups = whole("num_key_value_heads", heads)
    need(heads % groups == 0, f"{heads} heads over {groups} of keys and values")
    per_head = whole("head_dim", width // heads)
    need(per_head * heads == width, f"heads of {per_head} numbers in a width of {width}")
    need(per_head % 2 == 0, f"heads of {per_head} numbers, which rotary positions cannot pair")
    need(not config.get("attention_bias") and not config.get("mlp_bias"), "biases")
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        said = config.get(key) or {}
        need(isinstance(said, dict), f"'{key}' {said!r}")
        rope |= said
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind == "default", f"the rope scaling '{kind}'")
    need(rope.get("partial_rotary_factor", 1.0) == 1.0, "rotary positions on a part of each head")
    theta = {"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}
    return Shape(
        layers=whole("num_hidden_layers"),
        d_model=width,
        heads=heads,
        kv_heads=groups,
        d_ff=whole("intermediate_size"),
        vocab_size=whole("vocab_size"),
        context=whole("max_position_embeddings"),
        ffn=kinds[model_type, activation],
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=float(reading.number(theta, "rope_theta", folder, default=10_000.0,
                                        whole=False)),
        norm_eps=float(reading.number(config, "rms_norm_eps", folder, whole=False,
                                      default=1e-6 if model_type == "llama" else 1e-5)),
    )
