"""What the values of a recipe must be: one table of ranges, and what depends on two keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from planearly import keys, storage
from planearly.errors import UserError


class Refused(UserError):
    """A value that cannot work; ``place`` is the dotted name of its key."""

    def __init__(self, place: str, value: Any, rule: str) -> None:
        super().__init__(f"recipe key '{place}' is {value}; it must be {rule}")
        self.place = place


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included unless ``above`` or ``below`` say so."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.above == self.below:
            return f"between {self.low:.15g} and {self.high:.15g}" + ", both excluded" * self.above
        return (f"{'above' if self.above else 'at least'} {self.low:.15g} and "
                f"{'below' if self.below else 'at most'} {self.high:.15g}")


_TOKENS = Range(1, 1e15)
_SHARE = Range(0, 1)
_PART = Range(0, 1, below=True)
_FACTOR = Range(0, 1000, above=True)
_RATE = Range(0, 100, above=True)
_PASSES = Range(0, 1e6, above=True)
_STEPS = Range(1, 1e9)
_MANY = Range(1, 1 << 20)

RANGES: dict[type, dict[str, Range]] = {
    keys.Recipe: {"seed": Range(0, 2**32 - 1), "context": Range(8, 1 << 20),
                  "pretrain_tokens": Range(0, 1e15), "spec_tokens": _TOKENS,
                  "processes": _MANY},
    keys.Data: {"max_bad_share": _SHARE, "max_tokens": _TOKENS,
                "held_out": Range(0, 0.5, above=True, below=True),
                "held_out_documents": Range(1, 1e12), "eval_tokens": _TOKENS,
                "valid_tokens": _TOKENS, "generic_eval_tokens": Range(0, 1e15)},
    keys.Tokenizer: {"vocab_size": Range(1, 1 << 20), "sample_bytes": Range(1, 1e13)},
    keys.Cluster: {"k": _MANY, "iterations": Range(1, 10_000),
                   "sample_per_centroid": Range(1, 1e6)},
    keys.Importance: {"k": _MANY, "smoothing": Range(0, 1e9), "max_epochs": _PASSES,
                      "warn_epochs": _PASSES},
    keys.Selection: {"epochs": _PASSES, "share": Range(0, 1, above=True),
                     "candidates": Range(0, 1, above=True)},
    keys.Model: {"layers": Range(1, 1000), "d_model": Range(2, 1 << 17), "heads": Range(1, 4096),
                 "d_ff": _MANY, "rope_theta": Range(1, 1e12),
                 "norm_eps": Range(0, 1, above=True, below=True), "kv_heads": Range(1, 4096)},
    keys.Projected: {"experts": Range(1, 1 << 16), "rank": Range(1, 1 << 16),
                     "embedding": Range(1, 1 << 16), "layers": Range(0, 999), "deviation": _PART,
                     "bank_lr": _FACTOR, "coefficient_lr": _FACTOR, "blends": Range(0, 1 << 16)},
    keys.Mixture: {"experts": Range(1, 1 << 16), "expert": Range(0, (1 << 16) - 1)},
    keys.Optimizer: {"lr": _RATE, "embedding_lr": _RATE, "weight_decay": Range(0, 100),
                     "clip": Range(0, 1e9, above=True), "warmup_steps": Range(0, 1e9),
                     "decay_share": _SHARE},
    keys.Train: {"batch_tokens": Range(1, 1e12), "microbatch_tokens": Range(1, 1e12),
                 "log_steps": _STEPS, "validate_steps": _STEPS,
                 "checkpoint_seconds": Range(0, 1e9)},
    keys.Pretrain: {"branch_tokens": _TOKENS, "specialization_share": _PART,
                    "specialization_after": _PART},
    keys.Adapt: {"share": _SHARE, "specialization_share": _PART, "replay_share": _PART},
    keys.Finetune: {"max_steps": _STEPS, "max_epochs": _PASSES, "scratch_epochs": _PASSES,
                    "patience": _STEPS, "lr_scale": _FACTOR, "replay_share": _PART,
                    "average": _SHARE},
    keys.Distill: {"data_weight": Range(0, 1000), "teacher_weight": Range(0, 1000),
                   "temperature": _FACTOR, "top_k": _MANY, "teacher_tokens": _TOKENS},
    keys.Lora: {"rank": Range(1, 1 << 16), "alpha": Range(0, 1e6, above=True),
                "step_factor": _FACTOR, "lr_factor": _FACTOR},
    keys.Cost: {"price_per_hour": Range(0, 1e9)},
    keys.Study: {"main": Range(0, 1e15), "equal_compute": Range(0, 1e15)},
}
"""Of every key that holds numbers, one alone or in a list; a section has those of its bases too."""


def range_of(section: type, name: str) -> Range | None:
    """The range of a section's key; None where it holds no numbers."""
    return next((RANGES[base][name] for base in section.__mro__
                 if name in RANGES.get(base, {})), None)


def check(recipe: keys.Recipe) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        Refused: names the key, its value and the rule.
    """
    for place, value, allowed in _numbers(recipe):
        if not (math.isfinite(value) and allowed.holds(value)):
            raise Refused(place, value, str(allowed))
    _relations(recipe)


def _numbers(section: Any, where: str = "") -> Iterator[tuple[str, float, Range]]:
    for field in dataclasses.fields(section):
        value, place = getattr(section, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{place}.")
            continue
        allowed = range_of(type(section), field.name)
        if allowed is None or value is None:
            continue
        for one in _flat(value):
            yield place, one, allowed


def _flat(value: Any) -> Iterator[float]:
    """The numbers of a value, whatever holds them."""
    if isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _flat(part)
    else:
        yield value


def _relations(recipe: keys.Recipe) -> None:
    """What depends on more than one key, or on text."""
    def need(ok: bool, place: str, value: Any, rule: str) -> None:
        if not ok:
            raise Refused(place, value, rule)

    name = recipe.name
    need(bool(name.strip()) and name.isprintable() and len(name) <= 200
         and not name.startswith("/") and ".." not in name.split("/"), "name", repr(name),
         "the name of a folder under runs/, on one line")
    need(recipe.tokenizer.path is not None or recipe.tokenizer.vocab_size >= 260,
         "tokenizer.vocab_size", recipe.tokenizer.vocab_size,
         "at least 260, 256 bytes and the special tokens")
    for place, values, also in (
            ("generic", recipe.generic, "a URL or hf://NAME"),
            ("domains", recipe.domains, "a URL or hf://NAME"),
            ("domains_root", [recipe.domains_root], "in a store"),
            ("bundle", [recipe.bundle], "in a store"),
            ("start", [recipe.start], "in a store or hf://NAME"),
            ("large_start", [recipe.large_start], "in a store or hf://NAME"),
            ("tokenizer.path", [recipe.tokenizer.path], "in a store"),
            ("cluster.embedder", [recipe.cluster.embedder], ""),
            ("distill.teacher", [recipe.distill.teacher], "in a store or hf://NAME")):
        for value in map(str, filter(None, values)):
            kind = ("hf://" if value.startswith("hf://") else "" if not storage.is_url(value)
                    else "URL" if value.startswith("http") else "store" if "store" in also
                    else "URL")  # pages cannot be listed as folders of a store can
            need(kind in also, place, value, "on this machine" + f" or {also}" * bool(also))
    need(recipe.projected.experts == 1 or recipe.projected.embedding >= 2, "projected.embedding",
         recipe.projected.embedding, "at least 2, for experts to differ by")
    starts = recipe.start is not None or recipe.large_start is not None
    need(recipe.pretrain_tokens > 0 or starts, "pretrain_tokens", 0,
         "positive, or 0 to fine-tune 'start' as it is")
    need(bool(recipe.cluster.k), "cluster.k", recipe.cluster.k, "a list of numbers, as [16, 64]")
    need(recipe.importance.k is None or recipe.importance.k in recipe.cluster.k, "importance.k",
         recipe.importance.k, f"one of cluster.k {recipe.cluster.k}, or null")
    for place, model in (("model", recipe.model), ("large", recipe.large)):
        need(model.d_model % model.heads == 0, f"{place}.heads", model.heads,
             f"a divisor of {place}.d_model ({model.d_model})")
        need(model.d_model // model.heads % 2 == 0, f"{place}.d_model", model.d_model,
             "an even number per head, for rotary positions")
        need(model.kv_heads is None or model.heads % model.kv_heads == 0, f"{place}.kv_heads",
             model.kv_heads, f"a divisor of {place}.heads ({model.heads}), or null")
    for place, train in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        need(train.batch_tokens is None or train.batch_tokens >= recipe.context,
             f"{place}.batch_tokens", train.batch_tokens,
             f"at least one window of {recipe.context} tokens")
    weights = (recipe.distill.data_weight, recipe.distill.teacher_weight)
    need(sum(weights) > 0, "distill.teacher_weight", weights[1],
         "positive where distill.data_weight is 0")
