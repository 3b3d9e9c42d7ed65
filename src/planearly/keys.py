"""The keys of a recipe: dataclasses whose fields carry their default and one line of meaning.

:mod:`planearly.config` fills them from YAML; the recipe reference is generated from them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def key(meaning: str, default: Any) -> Any:
    """A recipe key: its meaning for the reference, and its default."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


def section(meaning: str, factory: Any) -> Any:
    return field(default_factory=factory, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Data:
    text_field: str = key("field of a JSONL or Parquet record that holds the text", "text")
    source_field: str = key("field that names the record's source, if there is one (a.b: field "
                            "b of a)", "source")
    max_bad_share: float = key("stop when more than this share of records is unreadable", 0.01)
    max_tokens: int | None = key("use a fair sample of so many tokens of the generic corpus (null: "
                                 "all)", None)
    held_out: float = key("share of a domain's documents for valid, and for test, if unsplit", 0.1)
    held_out_documents: int | None = key("most documents of valid, and of test, if unsplit (null: "
                                         "as many as the share comes to)", None)
    eval_tokens: int | None = key("use at most this many tokens of test (null: all)", None)
    valid_tokens: int | None = key("the same of valid, which is scored at every validation",
                                   200_000)
    generic_eval_tokens: int = key("tokens of the generic corpus held out to report on", 100_000)


@dataclass(frozen=True)
class Tokenizer:
    kind: Literal["bpe", "unigram"] = key("algorithm of a newly trained tokenizer", "bpe")
    vocab_size: int = key("entries of a newly trained tokenizer", 32_768)
    sample_bytes: int = key("bytes of generic text that a tokenizer is trained on", 100_000_000)
    path: str | None = key("take this tokenizer.json or model folder or hub name instead", None)


@dataclass(frozen=True)
class Cluster:
    embedder: str = key("static, sentence-bert, or a sentence-transformers name or folder",
                        "static")
    k: list[int] = key("numbers of clusters, each divides the generic corpus", [16, 64, 256])
    nested: bool = key("coarser clusterings merge clusters of the finest (a tree)", True)
    iterations: int = key("most k-means iterations", 25)
    sample_per_centroid: int = key("windows per centroid that k-means is fitted on", 256)


@dataclass(frozen=True)
class Importance:
    k: int | None = key("clusters to weigh by (null: the one of cluster.k that predicts best)",
                        None)
    smoothing: float | None = key("windows' worth of generic prior, tau (null: leave-one-out)",
                                  None)
    max_epochs: float = key("cap on the passes over one cluster's windows", 16.0)
    warn_epochs: float = key("warn when a cluster is read more often than this", 4.0)


@dataclass(frozen=True)
class Selection:
    epochs: float = key("passes over the generic windows that a selector takes", 4.0)
    share: float = key("largest share of its candidates that it takes", 0.5)
    candidates: float = key("share of the generic windows, drawn at random, that it chooses among",
                            1.0)


@dataclass(frozen=True)
class Model:
    layers: int = key("transformer blocks", 6)
    d_model: int = key("width", 256)
    heads: int = key("attention heads", 4)
    d_ff: int = key("width of the feed-forward layer", 704)
    ffn: Literal["swiglu", "gelu", "relu2"] = key(
        "feed-forward: gated SiLU (swiglu), or plain", "swiglu")
    tie_embeddings: bool = key("output matrix is the embedding matrix", True)
    rope_theta: float = key("base of the rotary position embedding", 10_000.0)
    norm_eps: float = key("epsilon of RMSNorm", 1e-5)
    kv_heads: int | None = key("heads of keys and values, shared by groups (null: heads)", None)


@dataclass(frozen=True)
class Projected:
    experts: int = key("k, experts: one per cluster of the generic corpus", 16)
    rank: int | None = key("h, slices of the bank T: multiplies the feed-forward parameters (null: "
                           "by the tokens per parameter, docs/planning.md)", 12)
    embedding: int = key("m, numbers that belong to one expert alone", 16)
    matrices: list[str] = key("projected feed-forward matrices", ["gate", "up", "down"])
    layers: list[int] | None = key("projected layers (null: all)", None)
    deviation: float = key("share of the coefficients' variance that differs per expert", 0.5)
    tune_vector: bool = key("train the chosen expert's m numbers alone before fine-tuning", False)
    bank_lr: float = key("learning rate of the bank relative to a plain layer's", 1.0)
    coefficient_lr: float = key("learning rate of E and M relative to a plain layer's", 1.0)
    blends: int = key("random blends of the experts that a step trains, each on rows drawn by its "
                      "histogram (0: each row trains the expert of its cluster)", 0)

    @property
    def slices(self) -> int:
        """h, which :func:`planearly.plan.sizes.settled` has chosen where a recipe leaves it open.
        """
        assert self.rank is not None
        return self.rank

    @property
    def at_once(self) -> int:
        """Most dense models that a step projects: its blends, or an expert of each cluster."""
        return self.blends or self.experts


@dataclass(frozen=True)
class Mixture:
    experts: int = key("independent small models, one per cluster", 16)
    expert: int | None = key("train this one only (one machine among many)", None)


@dataclass(frozen=True)
class Optimizer:
    preset: Literal["modern", "adamw", "paper"] = key(
        "Muon and AdamW, warm-up-stable-decay; AdamW alone; or the paper's Adam at 1e-4", "modern")
    lr: float | None = key("learning rate of the hidden matrices (null: by preset and width)", None)
    embedding_lr: float | None = key("learning rate of embeddings and norms (null: likewise)", None)
    weight_decay: float | None = key("decoupled weight decay (null: the preset's)", None)
    clip: float | None = key("gradient norm above which gradients are scaled (null: preset's)",
                             None)
    warmup_steps: int | None = key("linear warm-up steps (null: the preset's)", None)
    schedule: Literal["wsd", "inverse-sqrt", "cosine", "constant"] | None = key(
        "learning-rate schedule after the warm-up (null: the preset's)", None)
    decay_share: float = key("share of steps in which wsd decays to zero", 0.3)


@dataclass(frozen=True)
class Train:
    batch_tokens: int | None = key("tokens per optimiser step (null: by pretrain_tokens, for some "
                                   "2,000 steps)", None)
    microbatch_tokens: int | None = key("tokens per forward pass (null: fits the device)", None)
    precision: Literal["auto", "bf16", "fp32"] = key("matrix products (auto: bf16 if fast)", "auto")
    compile: Literal["auto", "yes", "no"] = key("torch.compile (auto: where it pays)", "auto")
    shard: Literal["auto", "yes", "no"] = key(
        "torchrun's processes divide weights and optimiser state (auto: where one device's memory "
        "does not hold them)", "auto")
    gradients: Literal["auto", "bf16", "fp32"] = key(
        "how gradients travel between torchrun's processes (auto: bf16 in pretraining on "
        "GPUs of several machines, where an estimate says that float32 takes long)", "auto")
    log_steps: int = key("steps between two lines of metrics", 20)
    validate_steps: int | None = key("steps between validations (null: a tenth of all)", None)
    checkpoint_seconds: float = key(
        "least seconds between two checkpoints (0: after every step)", 60.0)
    optimizer: Optimizer = section("the optimiser", Optimizer)

    @property
    def section_name(self) -> str:
        """Name of the section in a recipe."""
        return "pretrain"

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimiser step, which :func:`planearly.plan.sizes.settled` has chosen where
        a recipe leaves them open."""
        assert self.batch_tokens is not None
        return self.batch_tokens


@dataclass(frozen=True)
class Pretrain(Train):
    branch_tokens: list[int] = key(
        "other values of pretrain_tokens whose runs share this one's stable phase", [])
    specialization_share: float = key(
        "share of tokens drawn from the domain's own text, by methods whose whole pretraining is "
        "for one domain (those that adapt: adapt.specialization_share)", 0.0)
    specialization_after: float = key(
        "share of the steps that are over before the first of these tokens", 0.0)


@dataclass(frozen=True)
class Adapt:
    share: float | None = key("share of pretraining's steps that are made for each domain (null: "
                              "those in which wsd decays)", None)
    draws: Literal["importance", "generic", "dsir", "knn", "color", "linear", "top"] = key(
        "how they draw the generic corpus: by the domain's cluster weights (importance), as it is "
        "(generic), or what a selector takes for the domain (dsir, knn, color, linear, top)",
        "importance")
    specialization_share: float = key("share of their rows drawn from the domain's own text", 0.0)
    replay_share: float = key("share of their rows drawn from the generic corpus as it is", 0.0)


@dataclass(frozen=True)
class Finetune(Train):
    batch_tokens: int = key("tokens per optimiser step", 4_096)
    max_steps: int | None = key("most steps (null: 2k, 4k or 30k by set size, as the paper)", None)
    max_epochs: float = key("most passes over the specialization set", 30.0)
    scratch_epochs: float = key("the same where nothing was pretrained (slm-nopt)", 30.0)
    patience: int = key("validations without improvement before stopping", 3)
    lr_scale: float | None = key(
        "learning rate as a share of pretraining's; of this section's own where its optimizer sets "
        "a rate or has another preset than pretraining's (null: by set size, and 1 for rates that "
        "this section sets)", None)
    replay_share: float = key("share of tokens replayed from the generic corpus", 0.0)
    replay_draws: Literal["generic", "importance"] = key(
        "how replay draws the generic corpus: as it is (generic), or by the domain's cluster "
        "weights", "generic")
    average: float = key("average the weights over the steps, with a time constant of this share "
                         "of the steps so far (0: the last step's, 1: all alike)", 0.0)

    @property
    def section_name(self) -> str:
        return "finetune"


@dataclass(frozen=True)
class Distill:
    data_weight: float = key("weight of the next-token loss on the data", 0.5)
    teacher_weight: float = key("weight of the divergence from the teacher", 0.5)
    temperature: float = key("softmax temperature of both distributions", 1.0)
    top_k: int | None = key("store the teacher's k largest probabilities once (null: live)", None)
    teacher: str | None = key("Hugging Face folder to teach (null: the llm method's)", None)
    teacher_tokens: int | None = key("tokens of the llm method's pretraining as the teacher (null: "
                                     "'pretrain_tokens')", None)
    on: Literal["specialization", "importance"] = key("text the student learns on",
                                                      "specialization")


@dataclass(frozen=True)
class Lora:
    rank: int = key("rank of the adapters", 64)
    alpha: float = key("adapter scale is alpha / rank", 128.0)
    step_factor: float = key("steps allowed, times full fine-tuning's", 5.0)
    lr_factor: float = key("learning rate, times full fine-tuning's", 1.0)


@dataclass(frozen=True)
class Cost:
    price_per_hour: float | None = key("money per device-hour", None)
    currency: str = key("of the price", "USD")


@dataclass(frozen=True)
class Card:
    license: str | None = key("of the exported model, by its SPDX or hub name", None)
    base_model: str | None = key("hub name of the model that it began as", None)
    datasets: list[str] = key("hub names of what it was trained on", [])
    language: list[str] = key("codes of its languages", [])


@dataclass(frozen=True)
class Block:
    """A part of a study's grid: every combination of what it lists."""

    methods: list[str] = key("methods", [])
    domains: list[str] = key("names of domains (empty: all)", [])
    over: dict[str, list[Any]] = key("recipe key: its values", {})


@dataclass(frozen=True)
class Study:
    suite: Literal["paper", "split", "variants"] = key(
        "tables and claims: the paper's; also those of ways to split a budget between before the "
        "domain is known and after (split); or what each change of the recipe's settings does, "
        "without claims (variants)", "paper")
    main: dict[str, int] = key(
        "method: its tokens of pretraining in the main comparison, where they are not "
        "'pretrain_tokens', and in blocks without that key", {})
    equal_compute: list[dict[str, int]] = key(
        "sets of method: tokens of pretraining that are held against each other, such as those of "
        "equal device-hours, beside equal tokens", [])
    grid: list[Block] = key(
        "blocks of 'methods', 'domains' (empty: all) and 'over' (recipe key: values); every "
        "combination in a block is a cell, done in this order", [])


@dataclass(frozen=True)
class Recipe:
    name: str = key("shown in reports; runs/NAME is the run folder without --out", "recipe")
    seed: int = key("of the split, the sampler and the weights", 0)
    generic: list[str] = key("files, folders, globs, URLs (s3://...), hf://NAME or a corpus by "
                             "name (c4, fineweb, fineweb-edu, dclm, pile) of generic text; or "
                             "pydocs", [])
    bundle: str | None = key("specialise from this pretrained slm-pn or slm-mix, offline; adapt "
                             "from this slm-adapt or slm-pn-adapt, on 'generic'; or count by these "
                             "clusters", None)
    start: str | None = key("begin the small model, or every expert, as this model: a folder, a "
                            "URL, or a name on the Hugging Face hub", None)
    large_start: str | None = key("the same for the large model", None)
    domains_root: str | None = key("folder with NAME/{train,valid,test}.* per domain", None)
    domains: list[str] = key("names under domains_root, or paths, also of histograms that 'weigh "
                             "--share' wrote (empty: all of domains_root)", [])
    methods: list[str] = key("what to train and compare", ["slm", "slm-is"])
    context: int = key("most tokens of a window", 256)
    pretrain_tokens: int = key("tokens of pretraining, per method (0: fine-tune 'start' as it is)",
                               5_000_000)
    spec_tokens: int | None = key("tokens of each domain's train split to use (null: all)", None)
    engine: Literal["local", "shared", "ray"] = key(
        "who does the data stages: processes of this machine, those of every planearly that is "
        "started in the same run folder (shared), or workers of a Ray cluster; the last two divide "
        "trainings too", "local")
    processes: int | None = key("most workers of the data stages (null: one a core, or one a GPU "
                                "where they compute on GPUs)", None)
    track: Literal["tensorboard", "wandb", "trackio"] | None = key(
        "tracker that losses are also sent to", None)
    data: Data = section("reading documents", Data)
    tokenizer: Tokenizer = section("the tokenizer", Tokenizer)
    cluster: Cluster = section("embedding and clustering", Cluster)
    importance: Importance = section("cluster importance sampling (paper, section 3)", Importance)
    selection: Selection = section("the selectors slm-dsir, slm-knn, slm-color and slm-linear",
                                   Selection)
    model: Model = section("the small model", Model)
    large: Model = section("the large model (llm, and the teacher of slm-d)", Model)
    projected: Projected = section("the projected network, slm-pn", Projected)
    mixture: Mixture = section("the hard mixture, slm-mix", Mixture)
    expert: Literal["most-frequent", "lowest-loss", "best-tuned", "blend"] = key(
        "how slm-pn and slm-mix choose the domain's expert", "lowest-loss")
    pretrain: Pretrain = section("pretraining", Pretrain)
    adapt: Adapt = section("the last part of pretraining, per domain, of methods that adapt", Adapt)
    finetune: Finetune = section("fine-tuning on the specialization set", Finetune)
    distill: Distill = section("distillation, slm-d", Distill)
    lora: Lora = section("low-rank adaptation, llm-lora", Lora)
    cost: Cost = section("prices", Cost)
    card: Card = section("front matter of model cards", Card)
    study: Study = section("`planearly study`: what to compare", Study)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def reads_generic(self) -> bool:
        """Whether there is a generic corpus: if none is given, not with a bundle, nor where a
        checkpoint is fine-tuned as it is."""
        return bool(self.generic or (self.pretrain_tokens and not self.bundle))
