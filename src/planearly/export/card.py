"""The model card of an exported folder: what the model is, how it was made, what it costs.

It tells what happened and nothing else: no pretraining that was not done, no place on the disk of
whoever trained it.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import yaml

from planearly import methods
from planearly.export import gguf
from planearly.model import flops
from planearly.model.outside import AnyShape
from planearly.model.transformer import Shape
from planearly.units import prefixed, short


def model_card(shape: AnyShape, card: dict[str, Any], as_gguf: str, begins: bool = True) -> str:
    """The model card, Markdown with front matter.

    Args:
        card: ``method``, ``domain``, ``start`` (the checkpoint that it began as), ``recipe`` (a
            name), ``seed``; ``untuned`` (fine-tuning is still to come) or ``best_step`` (of
            fine-tuning; 0: the weights are those before it); ``teacher`` (a model that taught it as
            it was); ``bundle`` (whether it was made from a bundle); ``data``
            {``generic``: list of places, ``pretrain_tokens``, ``spec_tokens``}; ``cost``
            {``tokens``, ``flops``, ``device_hours``, ``device``, ``money``, ``currency``};
            ``before`` and ``after``, summaries of
            :func:`planearly.evaluate.perplexity.summary` on held-out documents; ``front``: what the
            recipe's ``card`` section gives the front matter (license, base_model, datasets,
            language).
        as_gguf: the section of :func:`conversion`.
        begins: the tokenizer puts the token that begins documents before a prompt.
    """
    method, domain = str(card.get("method", "")), card.get("domain")
    front = {"library_name": "transformers", "pipeline_tag": "text-generation",
             **{key: value for key, value in (card.get("front") or {}).items() if value},
             "tags": ["planearly", *([method] if method else [])]}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(domain)}: a small language model" if domain else "# A small language model",
        f"A {_kind(shape)} that was trained on windows of {shape.context} tokens"
        + (f", for text such as that of {_text(domain)}" if domain else "")
        + ". It continues text"
        + ("." if card.get("start") else "; it was not taught to follow instructions."),
        _method(method, card), _data(card.get("data") or {}), _cost(card),
        _perplexities(card), _CITATION if method in methods.TABLE else "", _USE.format(
            prompt=_PROMPT if begins else _BEGUN_PROMPT), _limit(shape), as_gguf,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_CITATION = """## Citation

```bibtex
@article{grangier2024need,
  title = {Need a Small Specialized Language Model? Plan Early!},
  author = {Grangier, David and Katharopoulos, Angelos and Ablin, Pierre and Hannun, Awni},
  journal = {arXiv preprint arXiv:2402.01093},
  year = {2024}
}
```"""


def _kind(shape: AnyShape) -> str:
    size = f"model of {short(flops.parameters(shape))} parameters"
    if isinstance(shape, Shape):
        family = "Llama" if shape.ffn == "swiglu" else "Arcee"
        return (f"{family} {size} ({shape.layers} layers, width {shape.d_model}, vocabulary "
                f"{shape.vocab_size})")
    return f"{_text(shape.kind)} {size} (vocabulary {shape.vocab_size})"


def _method(method: str, card: dict[str, Any]) -> str:
    if not method:
        return ""
    row = methods.TABLE.get(method)
    told = ""
    if row:
        nothing = (card.get("data") or {}).get("pretrain_tokens") == 0 and row.pretrains
        row = methods.drawing(row, card.get("draws"))
        told = f": {row.tuning if nothing else row.sentence}"
        if card.get("teacher"):
            told = told.replace(methods.TEACHER, f"the model `{_code(_name(card['teacher']))}`")
        if card.get("best_step") == 0 and row.pretrains:
            told += (". No step of fine-tuning was better on held-out documents: these are the "
                     "weights before it")
        if card.get("untuned"):
            told += ". This is the pretrained model: fine-tuning is left to who has the documents"
    lines = [f"## Method\n\n`{_code(method)}`{told}."]
    if card.get("start"):
        lines.append(f"Its weights began as those of `{_code(_name(card['start']))}`, not fresh.")
    if card.get("recipe") is not None:
        seed = f", seed {_text(card['seed'])}" if card.get("seed") is not None else ""
        lines.append(f"Trained with planearly, recipe `{_code(card['recipe'])}`{seed}, after "
                     "[Need a Small Specialized Language Model? Plan Early!]"
                     "(https://arxiv.org/abs/2402.01093).")
    return "\n\n".join(lines)


def _data(data: dict[str, Any]) -> str:
    lines = []
    if data.get("generic") and data.get("pretrain_tokens") != 0:
        places = ", ".join(dict.fromkeys(f"`{_code(_name(place))}`" for place in data["generic"]))
        lines.append(f"- generic corpus: {places}")
    if data.get("pretrain_tokens"):
        lines.append(f"- tokens of pretraining: {data['pretrain_tokens']:,}")
    if data.get("spec_tokens") is not None:
        lines.append(f"- tokens of the domain's documents: {data['spec_tokens']:,}")
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _name(place: Any) -> str:
    """A place without the folders of somebody's disk: names of a hub stay whole."""
    text = str(place)
    if text.startswith(("hf://", "http")) and not text.startswith("hf:///"):
        return text
    parts = Path(text).parts
    hub = len(parts) == 2 and not text.startswith((".", "~", "/")) and not Path(text).suffix
    return text if hub else parts[-1] if parts else text


def _cost(card: dict[str, Any]) -> str:
    cost, lines = card.get("cost") or {}, []
    if cost.get("tokens") is not None:
        lines.append(f"- {short(cost['tokens'])} tokens")
    if cost.get("flops") is not None:
        lines.append(f"- {prefixed(cost['flops'])}FLOP")
    if cost.get("device_hours") is not None:
        lines.append(f"- {cost['device_hours']:.3g} device-hours on {_text(cost.get('device'))}")
    if cost.get("money") is not None:
        lines.append(f"- {cost['money']:.2f} {_text(cost.get('currency', 'USD'))}")
    if lines and card.get("start"):
        lines.append(f"- not counted: what `{_code(_name(card['start']))}` had cost before")
    if lines and card.get("bundle"):
        row = methods.TABLE.get(str(card.get("method")))
        lines.append("- not counted: the part of the pretraining that all domains share"
                     if row and row.adapts else
                     "- not counted: the pretraining of the experts, of which this is one")
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


_PROMPT = 'prompt = tokenizer("Once", return_tensors="pt")'
_BEGUN_PROMPT = """# in training, every document began with this token
first = tokenizer.bos_token or tokenizer.eos_token
prompt = tokenizer(first + "Once", return_tensors="pt")"""
_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
{prompt}
text = model.generate(**prompt, max_new_tokens=40, do_sample=True, top_p=0.95)
print(tokenizer.decode(text[0], skip_special_tokens=True))
```"""


def _limit(shape: AnyShape) -> str:
    if isinstance(shape, Shape):
        return f"Prompt and continuation together hold at most {shape.context} tokens."
    most = json.loads(shape.config).get("max_position_embeddings")
    return f"Prompt and continuation together hold at most {most} tokens." if most else ""


def conversion(shape: AnyShape, tokenizer: dict[str, Any]) -> str:
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
