"""Trying a model: continue a prompt, by plain `transformers`."""

from __future__ import annotations

import math
from pathlib import Path

from planearly.errors import UserError, refused

_COLDEST = 1e-4
"""The lowest temperature that logits can be divided by: below, numbers overflow."""


def generate(model_folder: Path, prompt: str, max_new_tokens: int = 80, temperature: float = 0.8,
             top_p: float = 0.95, seed: int = 0) -> str:
    """The prompt and its continuation by any causal model folder in Hugging Face format.

    The prompt is read as the beginning of a document. The continuation stops where the model ends
    the document, after ``max_new_tokens``, or where prompt and continuation fill its context.

    Args:
        temperature: divides the logits; 0 takes the likeliest token every time.
        top_p: draws from the smallest set of tokens with at least this probability (nucleus).
        seed: of the draws; the same seed gives the same text on the same machine.

    The names of special tokens in the prompt are text, as in training.

    Raises:
        UserError: not a model folder, or one whose settings of its own `transformers` refuses; a
            prompt that fills the model's context or is no text; or a setting out of range.
    """
    for name, value, ok, rule in (
        ("tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature == 0 or _COLDEST <= temperature < math.inf,
         f"0, or from {_COLDEST:g} up"),
        ("top-p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not ok:
            raise UserError(f"{name} is {value}; it must be {rule}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text: it holds a byte that belongs to no "
                        "character") from None
    import torch  # the package itself is imported without waiting for it

    from planearly.evaluate.files import check_ids
    from planearly.model import hf

    model, tokenizer = hf.load(model_folder)
    ids = tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    given = ([] if start is None else [start]) + list(ids)
    if not given:
        raise UserError("the prompt is empty, and the model has no token that begins a document: "
                        "give a prompt")
    check_ids(given, len(model.get_input_embeddings().weight), model_folder)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max_new_tokens if most is None else min(max_new_tokens, most - len(given))
    if room < 1:
        raise UserError(f"the prompt has {len(given)} tokens and the model in {model_folder} reads "
                        f"{most}: shorten the prompt")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    inputs = torch.tensor([given], device=model.device)
    with (refused(f"transformers cannot continue a text by the model in {model_folder}"),
          torch.random.fork_rng(), torch.no_grad()):
        torch.manual_seed(seed)
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=room,
            pad_token_id=tokenizer.eos_token_id,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )[0, len(given):]
    return prompt + tokenizer.decode(output, skip_special_tokens=True)
