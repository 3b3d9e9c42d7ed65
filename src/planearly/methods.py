"""The methods that are compared, one row each: the only place that knows them all.

A method is a way through three questions: what its pretraining draws from the generic corpus
(``draws``), what it pretrains (``size`` and ``bank``), and how that is fine-tuned on a domain
(``tune``). Planner, ledger, forecasts, study, report, export, bundle, command line and
documentation read this table, at the time they run and not at import: a row added to :data:`TABLE`
is a method everywhere. A new value of ``draws``, ``bank`` or ``tune`` needs the one function that
carries it out (:mod:`planearly.stages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from planearly.errors import UserError

if TYPE_CHECKING:
    from planearly.keys import Recipe

GENERIC = "generic"
"""``draws``: the generic corpus as it is."""
PLATEAU = "-plateau"
"""Ends the name of a pretraining that others adapt from."""
LIKE = "the corpus resampled to look like the domain"
"""What a method adapts on unless a recipe says otherwise, in the words of a sentence."""

TEACHER = "a larger model fine-tuned on them"
"""Who teaches a method that is ``taught``, unless a recipe names another model."""
TUNED = {
    "full": "fine-tuned on the domain's documents",
    "lora": "adapted to the domain's documents by low-rank matrices (LoRA), merged into its "
            "weights",
    "distill": "fine-tuned on a mix of the domain's documents and the predictions of "
               f"{TEACHER} (distillation)"}
"""What each ``tune`` does, in the words of a sentence."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as in ``methods=[...]``.
        label: as on pages.
        sentence: what it is, without a capital or a full stop.
        size: of the deployed model.
        draws: how pretraining draws the generic corpus: ``generic`` (as it is), ``importance``
            (by the domain's cluster weights) or the name of a selector; None: nothing is
            pretrained.
        bank: what one pretraining makes for all domains, one expert per cluster: a ``projected``
            network or a ``mixture``; None: one dense model.
        tune: ``full`` (all weights), ``lora`` (adapters) or ``distill`` (taught by the fine-tuned
            large model).
        adapts: how the last part of pretraining draws the corpus (as ``draws``) unless a recipe
            says otherwise (:func:`of`), for every domain anew, from where the first part left off
            (of a ``bank``, with the domain's expert as a dense model); None: all of it draws by
            ``draws``.
        source: where the method comes from: "" is the paper that this package implements.
    """

    name: str
    label: str
    sentence: str
    size: Literal["small", "large"] = "small"
    draws: str | None = GENERIC
    bank: Literal["projected", "mixture"] | None = None
    tune: Literal["full", "lora", "distill"] = "full"
    adapts: str | None = None
    source: str = ""

    @property
    def large(self) -> bool:
        return self.size == "large"

    @property
    def pretrains(self) -> bool:
        return self.draws is not None

    @property
    def per_domain(self) -> bool:
        """Whether its pretraining is paid for every domain anew."""
        return self.draws not in (None, GENERIC)

    @property
    def needs_domain(self) -> bool:
        """Whether its pretraining, or the last part of it, has to know the domain."""
        return self.per_domain or self.adapts is not None

    @property
    def weighs(self) -> bool:
        """Whether it needs the domain's cluster weights."""
        return bool({self.draws, self.adapts} & {"importance", "top"})

    @property
    def scored(self) -> bool:
        """Whether it chooses text by its loss under the plain small model before and after its
        fine-tuning on the domain."""
        return "color" in (self.draws, self.adapts)

    @property
    def embedded(self) -> bool:
        """Whether it chooses text by embeddings."""
        return self.weighs or bool({self.draws, self.adapts} & {"knn", "linear"})

    @property
    def clustered(self) -> bool:
        """Whether it depends on a clustering of the generic corpus."""
        return self.weighs or self.bank is not None

    @property
    def experts(self) -> bool:
        """Whether the domain gets one of several experts."""
        return self.bank is not None

    @property
    def taught(self) -> bool:
        """Whether it needs a teacher."""
        return self.tune == "distill"

    @property
    def bundled(self) -> bool:
        """Whether what it pretrains for all domains makes a bundle, from which others go on."""
        return self.bank is not None or self.adapts is not None

    @property
    def tuning(self) -> str:
        """What is left of its sentence where nothing is pretrained."""
        return TUNED.get(self.tune, f"tuned on the domain's documents ({self.tune})")

    @property
    def key(self) -> Literal["model", "large"]:
        """The section of a recipe that gives its model's shape."""
        return "large" if self.large else "model"

    @property
    def start(self) -> Literal["start", "large_start"]:
        """The recipe key that names a checkpoint for it to begin as."""
        return "large_start" if self.large else "start"

    @property
    def base(self) -> str:
        """The method whose pretraining draws the corpus as it is and makes the same, at this size.
        """
        if self.bank:
            return next(row.name for row in TABLE.values() if not row.adapts
                        and (row.bank, row.size) == (self.bank, self.size))
        return "llm" if self.large else "slm"

    @property
    def plateau(self) -> str:
        """Name of the part of its pretraining that it adapts from, under ``pretrain/``."""
        return f"{self.base}{PLATEAU}"

    def pretraining(self, domain: str | None = None) -> str:
        """Name of its pretraining under ``pretrain/``; methods with one of a name share it.

        Args:
            domain: for a method that pretrains per domain.
        """
        if self.needs_domain:
            return f"{self.name}.{domain}" if domain else self.name
        if self.bank:
            return self.name
        return self.base


_ROWS = (
    Method("slm", "SLM", "small model pretrained on the generic corpus as it is, then fine-tuned "
           "on the domain's documents"),
    Method("slm-nopt", "SLM-nopt", "small model trained on the domain's documents alone, without "
           "pretraining", draws=None),
    Method("slm-d", "SLM-d", "small model pretrained on the generic corpus, then fine-tuned on a "
           f"mix of the domain's documents and the predictions of {TEACHER} (distillation)",
           tune="distill"),
    Method("slm-is", "SLM-is", "small model pretrained on the generic corpus resampled so that its "
           "clusters are as frequent as in the domain's documents (cluster importance sampling), "
           "then fine-tuned on these", draws="importance"),
    Method("slm-mix", "SLM-mix", "one of a mixture of small models, each pretrained on one cluster "
           "of the generic corpus, then fine-tuned on the domain's documents", bank="mixture"),
    Method("slm-pn", "SLM-pn", "small dense model projected from a network that was pretrained on "
           "the generic corpus with one expert per cluster, then fine-tuned on the domain's "
           "documents", bank="projected"),
    Method("llm", "LLM", "large model pretrained on the generic corpus, then fine-tuned on the "
           "domain's documents", size="large"),
    Method("llm-lora", "LLM-LoRA", "large model pretrained on the generic corpus, then adapted to "
           "the domain's documents by low-rank matrices (LoRA), merged into its weights",
           size="large", tune="lora"),
    Method("slm-dsir", "SLM-dsir", "small model pretrained on the part of the generic corpus that "
           "importance resampling on hashed n-grams selects for the domain's documents, then "
           "fine-tuned on these", draws="dsir", source="Xie et al. 2023, arXiv 2302.03169"),
    Method("slm-knn", "SLM-knn", "small model pretrained on the part of the generic corpus that is "
           "nearest to the domain's documents by embedding, then fine-tuned on these", draws="knn",
           source="nearest neighbours by embedding"),
    Method("slm-color", "SLM-color", "small model pretrained on the part of the generic corpus "
           "whose loss falls most when the plain small model is fine-tuned on the domain's "
           "documents, then fine-tuned on these", draws="color",
           source="CoLoR-Filter, Brandfonbrener et al. 2024, arXiv 2406.10670"),
    Method("slm-linear", "SLM-linear", "small model pretrained on the part of the generic corpus "
           "that a linear head on embeddings takes for the domain's documents, then fine-tuned on "
           "these", draws="linear", source="after BETR, Mizrahi et al. 2025, arXiv 2507.12466"),
    Method("slm-adapt", "SLM-adapt", "small model pretrained on the generic corpus as it is, and "
           f"for the last part on {LIKE}, then fine-tuned on the domain's documents",
           adapts="importance", source="between the paper's two ends"),
    Method("slm-pn-adapt", "SLM-pn-adapt", "small dense model projected from a network that was "
           "pretrained on the generic corpus with one expert per cluster, pretrained further on "
           f"{LIKE}, then fine-tuned on the domain's documents", bank="projected",
           adapts="importance", source="between the paper's two ends"),
    Method("slm-top", "SLM-top", "small model pretrained on the generic corpus's cluster that is "
           "most frequent in the domain's documents, then fine-tuned on these", draws="top",
           source="the paper's Figure 8"),
)
TABLE: dict[str, Method] = {row.name: row for row in _ROWS}
"""Method by name: the paper's in the order of its tables, then others."""


def find(name: str) -> Method:
    """The row of a method.

    Raises:
        UserError: there is no such method.
    """
    if name not in TABLE:
        raise UserError(f"there is no method '{name}': choose from {', '.join(TABLE)}")
    return TABLE[name]


def of(recipe: Recipe, name: str) -> Method:
    """The row of a method as a recipe has it: with its ``adapt.draws``, if the method adapts."""
    return drawing(find(name), recipe.adapt.draws)


def drawing(row: Method, draws: str | None) -> Method:
    """The row of a method that adapts with another value of ``adapts`` (None: its own), and a
    sentence that says so; that of any other method as it is."""
    if draws is None or row.adapts in (None, draws):
        return row
    told = "the same corpus" if draws == GENERIC else (
        f"the part of the corpus that a selector ({draws}) takes for the domain")
    return replace(row, adapts=draws, sentence=row.sentence.replace(LIKE, told))


def among(results: Iterable[Mapping[str, Any]]) -> list[Method]:
    """The methods of rows of a ``results.json``, each once for each way in which it adapted."""
    found = dict.fromkeys((row["method"], row.get("draws")) for row in results)
    return [drawing(TABLE[name], draws) for name, draws in found if name in TABLE]


def teacher() -> Method:
    """The method whose fine-tuned model teaches those that are ``taught``: large, pretrained on the
    generic corpus as it is, all weights tuned.

    Raises:
        UserError: the table has none.
    """
    for row in TABLE.values():
        if (row.size, row.draws, row.bank, row.tune) == ("large", GENERIC, None, "full"):
            return row
    raise UserError("distillation needs a teacher, and the table of methods has no large model "
                    "that is pretrained on the generic corpus and fine-tuned: set "
                    "'distill.teacher' to a model folder")


def label(name: str) -> str:
    """The method's name on pages; what follows a comma stays (``slm-pn, blend``)."""
    method, comma, rest = name.partition(",")
    return (TABLE[method].label if method in TABLE else method) + comma + rest


def paper() -> list[str]:
    """Names of the paper's methods, in the order of its tables."""
    return [row.name for row in TABLE.values() if not row.source]
