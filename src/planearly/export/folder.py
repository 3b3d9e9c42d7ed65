"""A trained model as a folder that plain `transformers` loads, with its card.

No code travels with it: weights in safetensors, a stock architecture, the tokenizer's own files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from planearly import files, tensors
from planearly.export.card import conversion, model_card
from planearly.export.tokens import (
    CONFIG,
    TOKENIZER_FILES,
    begins_itself,
    complete,
    special_tokens,
    write_tokenizer,
)
from planearly.model import outside
from planearly.model.hf import hf_config, to_hf
from planearly.model.outside import AnyShape, Configured, Outside
from planearly.model.transformer import Shape

GENERATION = "generation_config.json"
COMPANIONS = (*TOKENIZER_FILES, GENERATION)
"""What lies beside the weights of an open checkpoint and is as much a part of it."""


def export(state: dict[str, Tensor], shape: AnyShape, tokenizer_folder: Path, out: Path,
           card: dict[str, Any], dtype: Literal["float32", "bfloat16"] = "float32",
           companions: Path | None = None) -> None:
    """Write the model folder ``out``, at once or not at all.

    Args:
        state: parameters under the model's names.
        tokenizer_folder: where ``tokenizer.json`` and its companions lie.
        card: what :func:`planearly.export.card.model_card` tells; every key may be absent.
        companions: folder with the :data:`COMPANIONS` of the checkpoint that it began as, which it
            keeps: tokenizer (made to begin texts as in training), chat template, special tokens.

    Raises:
        UserError: no tokenizer there, one with more entries than the model has, or a full disk.
    """
    target = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    bos, eos = special_tokens(tokenizer_folder, shape.vocab_size)
    with files.atomic_folder(out) as folder:
        if isinstance(shape, Shape):
            named = {name: tensor.to(target) for name, tensor in to_hf(state, shape).items()}
            files.write_json(folder / "config.json", hf_config(shape, bos, eos, dtype))
            files.write_json(folder / GENERATION, {
                "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})
            with files.atomic_write(folder / "model.safetensors") as handle:
                handle.write(save(named, metadata={"format": "pt"}))
        else:
            _save_others(state, shape, folder, target)
        if companions and (companions / GENERATION).is_file():
            shutil.copyfile(companions / GENERATION, folder / GENERATION)
        if companions and not (companions / CONFIG).is_file():  # older checkpoints have none
            shutil.copyfile(tokenizer_folder / CONFIG, folder / CONFIG)
        write_tokenizer(companions or tokenizer_folder, folder, bos)
        complete(folder, shape.context if isinstance(shape, Shape) else None)
        tokenizer = files.read_json(folder / "tokenizer.json")
        with files.atomic_write(folder / "README.md", "w") as handle:
            handle.write(model_card(shape, card, conversion(shape, tokenizer),
                                    begins=begins_itself(folder, bos)))


def _save_others(state: dict[str, Tensor], shape: Configured, folder: Path,
                 dtype: torch.dtype) -> None:
    """Weights and configuration as `transformers` saves them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = outside.build(shape)
    assert isinstance(model, Outside)
    tensors.set_weights(model, state, "the trained weights")
    model.theirs.to(dtype).save_pretrained(folder)
