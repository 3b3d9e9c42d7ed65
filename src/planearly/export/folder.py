"""A trained model as a folder that plain `transformers` loads, with its card.

No code travels with it: weights in safetensors, a stock architecture, the tokenizer's own files.
"""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from planearly import files
from planearly.export import gguf
from planearly.export.tokens import special_tokens
from planearly.model import flops
from planearly.model.hf import hf_config, to_hf
from planearly.model.transformer import Shape
from planearly.units import short

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
                   "chat_template.jinja")

METHODS = {
    "slm": "pretrained on the generic corpus, then fine-tuned on the domain's documents",
    "slm-nopt": "trained on the domain's documents alone, without pretraining",
    "slm-is": "pretrained on the generic corpus resampled so that its clusters are as frequent as "
              "in the domain's documents (cluster importance sampling), then fine-tuned on these",
    "slm-dsir": "pretrained on the part of the generic corpus that importance resampling on hashed "
                "n-grams (DSIR) selects for the domain's documents, then fine-tuned on these",
    "slm-knn": "pretrained on the part of the generic corpus that is nearest to the domain's "
               "documents by embedding, then fine-tuned on these",
    "slm-top": "pretrained on the generic corpus's cluster that is most frequent in the domain's "
               "documents, then fine-tuned on these",
    "slm-d": "pretrained on the generic corpus, then fine-tuned on a mix of the domain's documents "
             "and the predictions of a larger model fine-tuned on them (distillation)",
    "slm-mix": "one of a mixture of small models, each pretrained on one cluster of the generic "
               "corpus, then fine-tuned on the domain's documents",
    "slm-pn": "projected to a small dense model from a network that was pretrained on the generic "
              "corpus with one expert per cluster, then fine-tuned on the domain's documents",
    "llm": "a large model pretrained on the generic corpus, then fine-tuned on the domain's "
           "documents",
    "llm-lora": "a large model pretrained on the generic corpus, then adapted to the domain's "
                "documents by low-rank matrices (LoRA), merged into its weights",
}


def export(state: dict[str, Tensor], shape: Shape, tokenizer_folder: Path, out: Path,
           card: dict[str, Any], dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write the model folder ``out``, at once or not at all.

    Args:
        state: parameters under our names.
        tokenizer_folder: where ``tokenizer.json`` and its companions lie.
        card: what :func:`model_card` tells; every key may be absent.

    Raises:
        UserError: no tokenizer there, one with more entries than the model has, or a full disk.
    """
    from safetensors.torch import save

    bos, eos = special_tokens(tokenizer_folder, shape.vocab_size)
    target = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    tensors = {name: tensor.to(target) for name, tensor in to_hf(state, shape).items()}
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    with files.atomic_folder(out) as folder:
        files.write_json(folder / "config.json", hf_config(shape, bos, eos, dtype))
        files.write_json(folder / "generation_config.json", generation)
        with files.atomic_write(folder / "model.safetensors") as handle:
            handle.write(save(tensors, metadata={"format": "pt"}))
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)
        settings = files.read_json(folder / "tokenizer_config.json")
        files.write_json(folder / "tokenizer_config.json",
                         {**settings, "model_max_length": shape.context})
        with files.atomic_write(folder / "README.md", "w") as handle:
            tokenizer = files.read_json(folder / "tokenizer.json")
            handle.write(model_card(shape, card, conversion(shape, tokenizer)))


def model_card(shape: Shape, card: dict[str, Any], as_gguf: str) -> str:
    """The model card, Markdown with front matter.

    Args:
        card: ``method``, ``domain``, ``start`` (the checkpoint that it began as), ``recipe`` (a
            name), ``seed``; ``data`` {``generic``: list of places, ``pretrain_tokens``,
            ``spec_tokens``}; ``cost`` {``tokens``, ``flops``, ``device_hours``, ``device``,
            ``money``, ``currency``}; ``before`` and ``after``, summaries of
            :func:`planearly.evaluate.perplexity.summary` on held-out documents.
        as_gguf: the section of :func:`conversion`.
    """
    method, domain = str(card.get("method", "")), card.get("domain")
    kind = "Llama" if shape.ffn == "swiglu" else "Arcee"
    front = {"library_name": "transformers", "pipeline_tag": "text-generation",
             "tags": ["planearly", *([method] if method else [])]}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(domain)}: a small language model" if domain else "# A small language model",
        f"A {kind} model of {short(flops.parameters(shape))} parameters ({shape.layers} layers, "
        f"width {shape.d_model}, vocabulary {shape.vocab_size}) that reads at most {shape.context} "
        "tokens" + (f", for text such as that of {_text(domain)}" if domain else "")
        + ". It continues text; it was not taught to follow instructions.",
        _method(method, card), _data(card.get("data") or {}), _cost(card.get("cost") or {}),
        _perplexities(card), _USE.format(context=shape.context), as_gguf,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _method(method: str, card: dict[str, Any]) -> str:
    if not method:
        return ""
    lines = [f"## Method\n\n`{_code(method)}`" + (f": {METHODS[method]}." if method in METHODS
                                                  else ".")]
    if card.get("start"):
        lines.append(f"Its weights began as those of `{_code(card['start'])}`, not fresh.")
    if card.get("recipe") is not None:
        seed = f", seed {_text(card['seed'])}" if card.get("seed") is not None else ""
        lines.append(f"Trained with planearly, recipe `{_code(card['recipe'])}`{seed}, after "
                     "[Need a Small Specialized Language Model? Plan Early!]"
                     "(https://arxiv.org/abs/2402.01093).")
    return "\n\n".join(lines)


def _data(data: dict[str, Any]) -> str:
    lines = []
    if data.get("generic"):
        places = ", ".join(f"`{_code(place)}`" for place in data["generic"])
        lines.append(f"- generic corpus: {places}")
    if data.get("pretrain_tokens") is not None:
        lines.append(f"- tokens of pretraining: {data['pretrain_tokens']:,}")
    if data.get("spec_tokens") is not None:
        lines.append(f"- tokens of the domain's documents: {data['spec_tokens']:,}")
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _cost(cost: dict[str, Any]) -> str:
    lines = []
    if cost.get("tokens") is not None:
        lines.append(f"- {short(cost['tokens'])} tokens")
    if cost.get("flops") is not None:
        lines.append(f"- {short(cost['flops'] / 1e12)} TFLOP")
    if cost.get("device_hours") is not None:
        lines.append(f"- {cost['device_hours']:.3g} device-hours on {_text(cost.get('device'))}")
    if cost.get("money") is not None:
        lines.append(f"- {cost['money']:.2f} {_text(cost.get('currency', 'USD'))}")
    return "## Cost of training\n\n" + "\n".join(lines) if lines else ""


def _perplexities(card: dict[str, Any]) -> str:
    rows = [(label, card[key]) for label, key in (("before fine-tuning", "before"),
                                                  ("this model", "after")) if card.get(key)]
    if not rows:
        return ""
    table = ["| | perplexity | 95% interval | bits per byte | tokens |", "|---|---|---|---|---|"]
    for label, value in rows:
        low, high = value["ci95"]
        table.append(f"| {label} | {value['perplexity']:.2f} | {low:.2f} to {high:.2f} "
                     f"| {value['bits_per_byte']:.3f} | {value['tokens']:,} |")
    return "## Perplexity on held-out documents\n\n" + "\n".join(table)


_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
# in training, every document began with this token
prompt = tokenizer(tokenizer.bos_token + "Once", return_tensors="pt")
text = model.generate(**prompt, max_new_tokens=40, do_sample=True, top_p=0.95)
print(tokenizer.decode(text[0], skip_special_tokens=True))
```

Prompt and continuation together hold at most {context} tokens."""


def conversion(shape: Shape, tokenizer: dict[str, Any]) -> str:
    """How this model becomes a GGUF file, or why it cannot.

    Args:
        tokenizer: what ``tokenizer.json`` holds.
    """
    why = gguf.obstacle(shape, tokenizer)
    told = f"Not by planearly: {why}." if why else "```\nplanearly gguf MODEL_FOLDER\n```"
    return f"## As a GGUF file (llama.cpp, Ollama)\n\n{told}"


def _text(value: Any) -> str:
    """Any value as one line of literal Markdown text."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", line)


def _code(value: Any) -> str:
    """Any value inside a code span."""
    return " ".join(str(value).split()).replace("`", "'")
