"""Recipes: dataclasses, filled from a YAML file, overridden by ``key=value``.

Every key a recipe may hold is a field here, with its default and one line of meaning; the recipe
reference in the documentation is generated from these lines. A key that does not exist is an error
that names the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from planearly import units
from planearly.errors import UserError


def key(meaning: str, default: Any) -> Any:
    """A recipe key: its meaning for the reference, and its default."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


def section(meaning: str, factory: Any) -> Any:
    return field(default_factory=factory, metadata={"meaning": meaning})


@dataclass
class Data:
    text_field: str = key("field of a JSONL or Parquet record that holds the text", "text")
    source_field: str = key("field that names the record's source, if there is one", "source")
    max_bad_share: float = key("stop when more than this share of records is unreadable", 0.01)
    max_tokens: int | None = key("read the generic corpus up to this many tokens (null: all)", None)
    held_out: float = key("share of a domain's documents for valid, and for test, if unsplit", 0.1)
    eval_tokens: int | None = key("use at most this many tokens of test (null: all)", None)
    valid_tokens: int | None = key("the same of valid, which is scored ten times while fine-tuning",
                                   200_000)
    generic_eval_tokens: int = key("tokens of the generic corpus held out to report on", 100_000)


@dataclass
class Tokenizer:
    kind: Literal["bpe", "unigram"] = key("algorithm of a newly trained tokenizer", "bpe")
    vocab_size: int = key("entries of a newly trained tokenizer", 32_768)
    sample_bytes: int = key("bytes of generic text that a tokenizer is trained on", 100_000_000)
    path: str | None = key("take this tokenizer.json or model folder or hub name instead", None)


@dataclass
class Cluster:
    embedder: str = key("static, sentence-bert, or a sentence-transformers name or folder",
                        "static")
    k: list[int] = key("numbers of clusters, each divides the generic corpus", [16, 64, 256])
    nested: bool = key("coarser clusterings merge clusters of the finest (a tree)", True)
    iterations: int = key("most k-means iterations", 25)
    sample_per_centroid: int = key("windows per centroid that k-means is fitted on", 256)


@dataclass
class Importance:
    k: int | None = key("clusters to weigh by (null: the one of cluster.k that predicts best)",
                        None)
    smoothing: float | None = key("windows' worth of generic prior, tau (null: leave-one-out)",
                                  None)
    max_epochs: float = key("cap on the passes over one cluster's windows", 16.0)
    warn_epochs: float = key("warn when a cluster is read more often than this", 4.0)


@dataclass
class Selection:
    epochs: float = key("passes over the generic windows that slm-dsir and slm-knn select", 4.0)
    share: float = key("largest share of the generic corpus that they select", 0.5)


@dataclass
class Model:
    layers: int = key("transformer blocks", 6)
    d_model: int = key("width", 256)
    heads: int = key("attention heads", 4)
    d_ff: int = key("width of the feed-forward layer", 704)
    ffn: Literal["swiglu", "gelu", "relu2"] = key("feed-forward: gated SiLU, or plain", "swiglu")
    tie_embeddings: bool = key("output matrix is the embedding matrix", True)
    rope_theta: float = key("base of the rotary position embedding", 10_000.0)
    norm_eps: float = key("epsilon of RMSNorm", 1e-5)
    kv_heads: int | None = key("heads of keys and values, shared by groups (null: heads)", None)


@dataclass
class Projected:
    experts: int = key("k, experts: one per cluster of the generic corpus", 16)
    rank: int = key("h, slices of the bank T: multiplies the feed-forward parameters", 12)
    embedding: int = key("m, numbers that belong to one expert alone", 16)
    matrices: list[str] = key("projected feed-forward matrices", ["gate", "up", "down"])
    layers: list[int] | None = key("projected layers (null: all)", None)
    deviation: float = key("share of the coefficients' variance that differs per expert", 0.5)
    tune_vector: bool = key("train the chosen expert's m numbers alone before fine-tuning", False)
    bank_lr: float = key("learning rate of the bank relative to a plain layer's", 1.0)
    coefficient_lr: float = key("learning rate of E and M relative to a plain layer's", 1.0)


@dataclass
class Mixture:
    experts: int = key("independent small models, one per cluster", 16)
    expert: int | None = key("train this one only (one machine among many)", None)


@dataclass
class Optimizer:
    preset: Literal["modern", "adamw", "paper"] = key(
        "Muon and AdamW, warm-up-stable-decay; AdamW alone; or the paper's Adam at 1e-4", "modern")
    lr: float | None = key("learning rate of the hidden matrices (null: the preset's)", None)
    embedding_lr: float | None = key("learning rate of embeddings and norms (null: preset's)", None)
    weight_decay: float | None = key("decoupled weight decay (null: the preset's)", None)
    clip: float | None = key("gradient norm above which gradients are scaled (null: preset's)",
                             None)
    warmup_steps: int | None = key("linear warm-up steps (null: the preset's)", None)
    schedule: Literal["wsd", "inverse-sqrt", "cosine", "constant"] | None = key(
        "learning-rate schedule after the warm-up (null: the preset's)", None)
    decay_share: float = key("share of steps in which wsd decays to zero", 0.3)


@dataclass
class Train:
    batch_tokens: int = key("tokens per optimiser step", 16_384)
    microbatch_tokens: int | None = key("tokens per forward pass (null: fits the device)", None)
    precision: Literal["auto", "bf16", "fp32"] = key("matrix products (auto: bf16 if fast)", "auto")
    compile: Literal["auto", "yes", "no"] = key("torch.compile (auto: where it pays)", "auto")
    log_steps: int = key("steps between two lines of metrics", 20)
    validate_steps: int | None = key("steps between validations (null: 10 in the run)", None)
    checkpoint_seconds: float = key("seconds between two checkpoints", 60.0)
    optimizer: Optimizer = section("the optimiser", Optimizer)


@dataclass
class Pretrain(Train):
    branch_tokens: list[int] = key(
        "other values of pretrain_tokens whose runs share this one's stable phase", [])
    specialization_share: float = key("share of tokens drawn from the domain's own text", 0.0)


@dataclass
class Finetune(Train):
    batch_tokens: int = key("tokens per optimiser step", 4_096)
    max_steps: int | None = key("most steps (null: 2k, 4k or 30k by set size, as the paper)", None)
    max_epochs: float = key("most passes over the specialization set", 30.0)
    scratch_epochs: float = key("the same where nothing was pretrained (slm-nopt)", 30.0)
    patience: int = key("validations without improvement before stopping", 3)
    lr_scale: float | None = key("learning rate as a share of pretraining's (null: by set size)",
                                 None)
    replay_share: float = key("share of tokens replayed from the generic corpus", 0.0)


@dataclass
class Distill:
    data_weight: float = key("weight of the next-token loss on the data", 0.5)
    teacher_weight: float = key("weight of the divergence from the teacher", 0.5)
    temperature: float = key("softmax temperature of both distributions", 1.0)
    top_k: int | None = key("store the teacher's k largest probabilities once (null: live)", None)
    teacher: str | None = key("Hugging Face folder to teach (null: the llm method's)", None)
    on: Literal["specialization", "importance"] = key("text the student learns on",
                                                      "specialization")


@dataclass
class Lora:
    rank: int = key("rank of the adapters", 64)
    alpha: float = key("adapter scale is alpha / rank", 128.0)
    step_factor: float = key("steps allowed, times full fine-tuning's", 5.0)
    lr_factor: float = key("learning rate, times full fine-tuning's", 1.0)


@dataclass
class Cost:
    price_per_hour: float | None = key("money per device-hour", None)
    currency: str = key("of the price", "USD")


@dataclass
class Block:
    """A part of a study's grid: every combination of what it lists."""

    methods: list[str] = key("methods", [])
    domains: list[str] = key("names of domains (empty: all)", [])
    over: dict[str, list[Any]] = key("recipe key: its values", {})


@dataclass
class Study:
    main: dict[str, int] = key(
        "method: its tokens of pretraining in the main comparison, where they are not "
        "'pretrain_tokens', and in blocks without that key", {})
    grid: list[Block] = key(
        "blocks of 'methods', 'domains' (empty: all) and 'over' (recipe key: values); every "
        "combination in a block is a cell, done in this order", [])


@dataclass
class Recipe:
    name: str = key("shown in reports", "recipe")
    seed: int = key("of the split, the sampler and the weights", 0)
    generic: list[str] = key("files, folders, globs or hf://NAME of the generic corpus; or pydocs",
                             [])
    bundle: str | None = key("specialise from this pretrained slm-pn or slm-mix, offline", None)
    start: str | None = key("begin the small model, or every expert, as this Llama-family folder",
                            None)
    large_start: str | None = key("the same for the large model", None)
    domains_root: str | None = key("folder with NAME/{train,valid,test}.* per domain", None)
    domains: list[str] = key("names under domains_root, or paths (empty: all of domains_root)", [])
    methods: list[str] = key("what to train and compare", ["slm", "slm-is"])
    context: int = key("most tokens of a window", 256)
    pretrain_tokens: int = key("tokens of pretraining, per method (0: fine-tune 'start' as it is)",
                               5_000_000)
    spec_tokens: int | None = key("tokens of each domain's train split to use (null: all)", None)
    data: Data = section("reading documents", Data)
    tokenizer: Tokenizer = section("the tokenizer", Tokenizer)
    cluster: Cluster = section("embedding and clustering", Cluster)
    importance: Importance = section("cluster importance sampling (paper, section 3)", Importance)
    selection: Selection = section("the selectors slm-dsir and slm-knn", Selection)
    model: Model = section("the small model", Model)
    large: Model = section("the large model (llm, and the teacher of slm-d)", Model)
    projected: Projected = section("the projected network, slm-pn", Projected)
    mixture: Mixture = section("the hard mixture, slm-mix", Mixture)
    expert: Literal["most-frequent", "lowest-loss", "best-tuned", "blend"] = key(
        "how slm-pn and slm-mix choose the domain's expert", "lowest-loss")
    pretrain: Pretrain = section("pretraining", Pretrain)
    finetune: Finetune = section("fine-tuning on the specialization set", Finetune)
    distill: Distill = section("distillation, slm-d", Distill)
    lora: Lora = section("low-rank adaptation, llm-lora", Lora)
    cost: Cost = section("prices", Cost)
    study: Study = section("`planearly study`: what to compare", Study)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def reads_generic(self) -> bool:
        """Whether there is a generic corpus: not with a bundle, nor, if none is given, where a
        checkpoint is fine-tuned as it is."""
        return not self.bundle and bool(self.generic or self.pretrain_tokens)


def recipes_folder() -> Path:
    """Where the recipes that come with the package lie (installed, or in a checkout)."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a recipe of the package by name, and apply ``key=value`` overrides.

    A recipe may start from another: ``extends: other.yaml`` (in the same folder) is read first.
    Relative paths of data in a recipe are relative to the current folder, as on a command line.

    Raises:
        UserError: no such recipe; not a mapping; an unknown key; a value of the wrong type.
    """
    return override(_read(find(recipe)), overrides)


def override(values: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of plain values with ``key=value`` overrides, checked; as :func:`load`."""
    for item in overrides:
        name, separator, text = item.partition("=")
        if not separator:
            raise UserError(f"'{item}' is not of the form key=value")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise UserError(f"the value of '{name}' is not valid YAML: {text}") from error
        target = values
        *parents, last = name.strip().split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"'{name}': '{parent}' is not a section")
        target[last] = value
    built = build(Recipe, values, "")
    check(built)
    return built


def variant(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other values of some keys, given by dotted name.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that cannot work.
    """
    values = recipe.to_dict()
    for place, value in changes.items():
        *parents, last = place.split(".")
        target = values
        for parent in parents:
            target = target.get(parent)  # type: ignore[assignment]
            if not isinstance(target, dict):
                raise UserError(f"'{place}' is no recipe key: there is no section '{parent}'")
        target[last] = value
    built = build(Recipe, values, "")
    check(built)
    return built


def value_of(recipe: Recipe, place: str) -> Any:
    """The value of a key given by dotted name.

    Raises:
        UserError: there is no such key.
    """
    found: Any = recipe
    for part in place.split("."):
        if not hasattr(found, part):
            raise UserError(f"'{place}' is no recipe key; 'planearly recipes --reference' lists "
                            "them")
        found = getattr(found, part)
    return found


def look_up(values: Mapping[str, Any], place: str) -> Any:
    """The same of a recipe as plain values; None where there is no such key."""
    found: Any = values
    for part in place.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe as plain values, by dotted name, with its value."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def find(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by the name of one that comes with the package."""
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = recipes_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    known = sorted(p.stem for p in recipes_folder().glob("*.yaml"))
    raise UserError(
        f"there is no recipe '{recipe}'; the ones that come along are {', '.join(known)}"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold 'key: value' lines")
    base = values.pop("extends", None)
    return _merge(_read(path.parent / base), values) if base else values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merge(merged[name], value)
        else:
            merged[name] = value
    return merged


def build(kind: type[Any], values: Any, where: str) -> Any:
    """Make a dataclass of type ``kind`` from a plain mapping; ``where`` is its dotted place.

    Raises:
        UserError: an unknown key (the nearest known one is named) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"'{where}' is a section: write '{where}.KEY=value'")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    filled = {}
    for name, value in values.items():
        place = f"{where}.{name}" if where else str(name)
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.5)
            prefix = f"{where}." if where else ""
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(names)}"
            raise UserError(f"unknown recipe key '{place}'; {hint}")
        filled[name] = _convert(hints[name], value, place)
    return kind(**filled)


def _convert(hint: Any, value: Any, place: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _convert(next(a for a in typing.get_args(hint) if a is not type(None)), value, place)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, place)
    if origin is Literal:
        choices = typing.get_args(hint)
        value = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        if value not in choices:
            raise UserError(f"recipe key '{place}' is '{value}'; choose from {', '.join(choices)}")
        return value
    if origin is list:
        items = value if isinstance(value, list) else [] if value is None else [value]
        return [_convert(typing.get_args(hint)[0], item, place) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"recipe key '{place}' is '{value}'; it should hold 'key: values'")
        inner = typing.get_args(hint)[1]
        return {str(name): _convert(inner, item, f"{place}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise UserError(f"recipe key '{place}' is '{value}'; choose true or false")
        return value
    if hint is int:
        if isinstance(value, bool) or value is None:
            raise UserError(f"recipe key '{place}' is '{value}'; it should be a whole number")
        return units.count(value, f"recipe key '{place}'")
    if hint is float:
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"recipe key '{place}' is '{value}'; it should be a number") from error
    if hint is str:
        if value is None or isinstance(value, dict | list):
            raise UserError(f"recipe key '{place}' is '{value}'; it should be text")
        return str(value)
    raise TypeError(f"no conversion for {hint}")


def check(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything runs."""
    def need(ok: bool, place: str, value: Any, rule: str) -> None:
        if not ok:
            raise UserError(f"recipe key '{place}' is {value}; it must be {rule}")

    need(8 <= recipe.context <= 1 << 20, "context", recipe.context, "between 8 and 1048576 tokens")
    size = recipe.tokenizer.vocab_size
    need(recipe.tokenizer.path is not None or 260 <= size <= 1 << 20, "tokenizer.vocab_size", size,
         "at least 260 (256 bytes and the special tokens) and at most 1048576")
    starts = recipe.start is not None or recipe.large_start is not None
    need(recipe.pretrain_tokens >= (0 if starts else 1), "pretrain_tokens", recipe.pretrain_tokens,
         "positive, or 0 to fine-tune 'start' as it is")
    need(recipe.spec_tokens is None or recipe.spec_tokens > 0, "spec_tokens", recipe.spec_tokens,
         "positive, or null for all")
    need(bool(recipe.cluster.k) and all(k >= 1 for k in recipe.cluster.k), "cluster.k",
         recipe.cluster.k, "a list of positive numbers")
    need(recipe.importance.k is None or recipe.importance.k in recipe.cluster.k, "importance.k",
         recipe.importance.k, f"one of cluster.k {recipe.cluster.k}, or null")
    need(recipe.importance.max_epochs > 0, "importance.max_epochs", recipe.importance.max_epochs,
         "positive")
    need(recipe.selection.epochs > 0, "selection.epochs", recipe.selection.epochs, "positive")
    need(0 < recipe.selection.share <= 1, "selection.share", recipe.selection.share,
         "above 0 and at most 1")
    need(0 < recipe.data.held_out < 0.5, "data.held_out", recipe.data.held_out,
         "between 0 and 0.5")
    for place, model in (("model", recipe.model), ("large", recipe.large)):
        need(model.heads > 0 and model.d_model % model.heads == 0, f"{place}.heads", model.heads,
             f"a divisor of {place}.d_model ({model.d_model})")
        need(model.d_model // max(model.heads, 1) % 2 == 0, f"{place}.d_model", model.d_model,
             "an even number per head, for rotary positions")
        need(model.kv_heads is None or (0 < model.kv_heads <= model.heads
             and model.heads % model.kv_heads == 0), f"{place}.kv_heads", model.kv_heads,
             f"a divisor of {place}.heads ({model.heads}), or null")
        need(model.layers > 0 and model.d_ff > 0, f"{place}.layers", model.layers, "positive")
    for place, train in (("pretrain", recipe.pretrain), ("finetune", recipe.finetune)):
        need(train.batch_tokens >= recipe.context, f"{place}.batch_tokens", train.batch_tokens,
             f"at least one window of {recipe.context} tokens")
    for place, share in (("pretrain.specialization_share", recipe.pretrain.specialization_share),
                         ("finetune.replay_share", recipe.finetune.replay_share)):
        need(0 <= share < 1, place, share, "at least 0 and below 1")


def reference() -> str:
    """The recipe reference, in Markdown: every key, its type, its default and its meaning."""
    lines = ["# Recipe reference", "",
             "Generated from `planearly.config` by `planearly recipes --reference`.", ""]

    def walk(kind: type[Any], prefix: str, title: str) -> None:
        hints = typing.get_type_hints(kind)
        rows, sections = [], []
        for f in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[f.name]):
                sections.append((hints[f.name], f"{prefix}{f.name}.", f.metadata["meaning"]))
                continue
            default = f.default_factory() if callable(f.default_factory) else f.default
            shown = "null" if default is None else yaml.safe_dump(default, default_flow_style=True)
            shown = shown.removesuffix("\n").removesuffix("\n...")
            rows.append(f"| `{prefix}{f.name}` | `{shown}` | {f.metadata['meaning']} |")
        lines.extend([f"## {title}", "", "| key | default | meaning |", "|---|---|---|",
                      *rows, ""])
        for inner, place, meaning in sections:
            walk(typing.cast(type[Any], inner), place, f"`{place[:-1]}`: {meaning}")

    walk(Recipe, "", "A recipe")
    return "\n".join(lines)
