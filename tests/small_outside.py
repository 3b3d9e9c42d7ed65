"""Open models as others publish them, random and small: one folder per family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from small_models import tokenizer_folder

_COMMON: dict[str, Any] = {
    "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 303}
_LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": None, "attention_dropout": 0.2}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"attention_dropout": 0.2}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "gpt2": ("gpt2", {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama-3.2": ("llama", {"rope_parameters": _LONG, "tie_word_embeddings": True}),
}
"""Name: (its type in transformers, what its configuration adds); dropout where there is any."""


def outside_folder(folder: Path, family: str, **changed: Any) -> Path:
    """A model folder of a family with random weights, and a tokenizer of 300 or 301 entries."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = FAMILIES[family]
    values = {**_COMMON, **own, **changed}
    if kind == "gpt2":
        values = {k: v for k, v in values.items() if k in (
            "vocab_size", "initializer_range", "bos_token_id", "eos_token_id", *own, *changed)}
    config = AutoConfig.for_model(kind, **{k: v for k, v in values.items() if v is not None})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer_folder(folder)
    if family.startswith(("gemma", "llama")):  # documents begin with another token than they end
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["<bos>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            values = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**values, "bos_token": "<bos>"}))
    return folder


def llama_folder(folder: Path, seed: int = 0, entries: int = 300, **changed: Any) -> Path:
    """A Llama with grouped queries and its output matrix padded, as open ones often are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": entries + 4, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": True,
        "rope_theta": 5000.0, **changed})).save_pretrained(folder)
    return tokenizer_folder(folder, entries)


def logits(folder: Path, inputs: torch.Tensor) -> torch.Tensor:
    """By plain transformers."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(inputs).logits
