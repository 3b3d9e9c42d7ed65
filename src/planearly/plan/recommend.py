"""Which method to train: the paper's Figure 1, with the costs and the budgets put in.

Figure 1: a large inference budget takes the large model; a small one with a large specialization
budget takes importance sampling; a small one with a small specialization budget, or many domains,
takes a projected network or a hard mixture. What it leaves open is decided by what each method
could do (:mod:`planearly.plan.options`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from planearly.cost import model
from planearly.cost.model import Setting, Work
from planearly.plan.options import (
    CHECKPOINT,
    CLUSTERS,
    METHODS,
    MOST_PASSES,
    PlanInput,
    Row,
    check,
    row_of,
    setting_of,
)
from planearly.units import short

WIDE = 0.7
"""Entropy of the domain's cluster histogram over ln k from which a domain counts as wide: the
paper's wikipedia and openwebtext2 lie above from k = 64 up, and gain nothing from one expert."""
LEAST_WINDOWS = 0.75
"""Windows of the set per cluster below which k is lowered; the paper's 1M tokens at k = 1,024 are
0.95, and were its best."""


@dataclass(frozen=True)
class Plan:
    """A recommendation, and everything it was chosen from."""

    recommended: str
    reason: str
    expert: str
    """How ``slm-pn`` and ``slm-mix`` should choose the domain's expert."""
    clusters: int
    """k for importance sampling."""
    notes: list[str]
    rows: list[Row]
    break_evens: list[dict[str, Any]]
    """Pairs of feasible methods, the number of domains at which they cost the same, and which is
    cheaper below it."""
    setting: Setting
    given: PlanInput

    def row(self, method: str) -> Row:
        return next(row for row in self.rows if row.method == method)

    def to_dict(self) -> dict[str, Any]:
        given = asdict(self.given)
        given["laws"] = {name: law.describe() for name, law in self.given.laws.items()}
        return {
            "recommended": self.recommended, "reason": self.reason, "expert": self.expert,
            "clusters": self.clusters, "notes": self.notes,
            "methods": [row.to_dict() for row in self.rows],
            "break_evens": self.break_evens,
            "small": self.setting.small.to_dict(), "large": self.setting.large.to_dict(),
            "projected": asdict(self.setting.projected), "experts": self.setting.experts,
            "given": given,
        }


def recommend(given: PlanInput) -> Plan:
    """Cost every method, say which are feasible, and choose one.

    Raises:
        UserError: an input that cannot be.
    """
    check(given)
    setting = setting_of(given)
    clusters, cluster_notes = _clusters(given, setting)
    rows = [row_of(given, setting, method) for method in METHODS]
    by_name = {row.method: row for row in rows}
    wide = _wide(given)
    chosen, reason = _choose(given, by_name, wide)
    feasible = [row for row in rows if row.feasible]
    evens = []
    for i, a in enumerate(feasible):
        for b in feasible[i + 1:]:
            meeting = model.break_even(a.cost, b.cost)
            if meeting is not None:
                first = a if a.cost.generic.device_hours < b.cost.generic.device_hours else b
                evens.append({"methods": [a.method, b.method], "domains": meeting,
                              "cheaper_below": first.method})
    expert = "blend" if wide and chosen == "slm-pn" else "lowest-loss"
    return Plan(chosen, reason, expert, clusters, cluster_notes + _notes(given, by_name, chosen),
                rows, evens, setting, given)


def _wide(given: PlanInput) -> bool:
    return given.entropy is not None and given.clusters is not None \
        and given.entropy >= WIDE * math.log(given.clusters)


def _choose(given: PlanInput, rows: dict[str, Row], wide: bool) -> tuple[str, str]:
    """Figure 1 of the paper, then what it leaves open."""
    limit = "no limit on inference" if given.limit is None \
        else f"the inference limit of {short(given.limit)} parameters"
    no_generic = given.generic_tokens == 0 or given.generic_hours == 0
    if rows["llm"].feasible and not no_generic:
        admits = "leaves room" if given.limit is None else "admits it"
        return "llm", (f"{limit} {admits} and the budgets afford training it; of the methods "
                       "that share one pretraining it has the lowest perplexity at every set size")
    if no_generic and rows[CHECKPOINT].feasible:
        return CHECKPOINT, ("there is no budget for generic pretraining, and an open checkpoint "
                            "within the inference limit has already been paid for: pretrain it on "
                            "a little, on generic text resampled to look like the domain where "
                            "there is any, and fine-tune it")
    importance, network, mixture = rows["slm-is"], rows["slm-pn"], rows["slm-mix"]
    shared = network if network.feasible else mixture
    if importance.feasible:
        meeting = model.break_even(importance.cost, shared.cost) if shared.feasible else None
        cheaper = importance.total.device_hours <= shared.total.device_hours
        if not shared.feasible or cheaper:
            many = f", and for {_domains(given)} it costs less than a shared pretraining (the " \
                   f"curves cross at {meeting:.1f} domains)" if meeting else ""
            return "slm-is", ("the inference limit asks for a small model and the specialization "
                              "budget affords pretraining one per domain on generic text that "
                              f"looks like it, the best of the paper's small models{many}"
                              + ("; it also suits a domain as wide as this one" if wide else ""))
        extra = (f"importance sampling would pretrain once per domain, "
                 f"{importance.total.device_hours:.3g} device-hours for {_domains(given)} against "
                 f"{shared.total.device_hours:.3g}" + (
                     f" (the curves cross at {meeting:.1f} domains)" if meeting else ""))
    else:
        extra = f"importance sampling is out: {importance.why}"
    if network.feasible and wide:
        return "slm-pn", ("the inference limit asks for a small model and the domains share one "
                          f"pretraining; {extra}. The domain is wide (entropy "
                          f"{given.entropy:.2f} of at most {math.log(given.clusters or 2):.2f} "
                          "nats), where a single cluster's expert does not beat the plain small "
                          "model in the paper: blend the experts by the domain's histogram")
    if network.feasible:
        return "slm-pn", ("the inference limit asks for a small model and one generic pretraining "
                          "serves every domain, each then specialised for "
                          f"{_hours(network.cost.specialization)}; {extra}")
    if mixture.feasible:
        return "slm-mix", (f"as a projected network would, but that is out ({network.why}): "
                           "independent small models each fit on a device and share one generic "
                           f"pretraining among all domains; {extra}")
    if rows["slm-d"].feasible:
        return "slm-d", (f"a teacher exists already, and {network.why}: its distribution tells the "
                         "student more per token than the text alone")
    if rows[CHECKPOINT].feasible:
        return CHECKPOINT, (f"pretraining a model here is out ({rows['slm'].why}), and the open "
                            "checkpoint fits the inference limit")
    if rows["slm"].feasible:
        return "slm", ("the plain small model is what the budgets afford: "
                       f"projected network: {network.why}")
    return CHECKPOINT, (f"nothing can be pretrained here ({rows['slm'].why}): take an open "
                        f"checkpoint within {limit}, name it with --checkpoint, and continue its "
                        "pretraining on the domain")


def _domains(given: PlanInput) -> str:
    n = given.total_domains
    return "one domain" if n == 1 else f"{n} domains"


def _hours(work: Work) -> str:
    return f"{work.device_hours:.2g} device-hours"


def _clusters(given: PlanInput, setting: Setting) -> tuple[int, list[str]]:
    """k for importance sampling, and why it is lower than the paper's."""
    windows = given.windows or math.ceil(given.spec_tokens / setting.small.context)
    k = next((k for k in CLUSTERS if windows >= LEAST_WINDOWS * k), CLUSTERS[-1])
    if k == CLUSTERS[0]:
        return k, []
    return k, [f"the specialization set has about {windows} windows, too few to estimate the "
               f"frequencies of {CLUSTERS[0]} clusters: weigh by {k}, about "
               f"{windows / k:.1f} windows each"]


def _notes(given: PlanInput, rows: dict[str, Row], chosen: str) -> list[str]:
    notes = []
    if given.teacher is not None and chosen != "slm-d" and rows["slm-d"].feasible:
        notes.append(f"a teacher exists: slm-d costs {_hours(rows['slm-d'].cost.specialization)} "
                     "per domain, mostly the teacher's; worth a trial on one domain")
    if given.checkpoint is not None and chosen != CHECKPOINT and rows[CHECKPOINT].feasible:
        notes.append(f"try {given.checkpoint.name} too: adapting it costs at most "
                     f"{_hours(rows[CHECKPOINT].cost.specialization)} per domain, and whoever made "
                     "it may have trained it longer than these budgets can")
    if chosen == "llm" and given.total_domains > 1:
        notes.append("with LoRA each domain adds its adapters instead of a whole model, at most "
                     "0.5 perplexity behind in the paper, for up to five times the steps")
    passes = rows[chosen].pretrain_tokens / given.generic_tokens if given.generic_tokens else 0
    if passes > 1.01:
        notes.append(f"{chosen} reads the generic corpus {passes:.1f} times; up to {MOST_PASSES} "
                     "are about as good as new text")
    if given.devices > 1:
        notes.append(f"hours are device-hours: {given.devices} devices take {given.devices} times "
                     "less time on the clock where work divides evenly")
    if not given.device.calibrated:
        notes.append(f"hours are estimates for {given.device.name} ({given.device.source}); "
                     "`planearly calibrate` on the device replaces them by measured ones")
    if given.entropy is None and chosen in model.CLUSTERED:
        notes.append("whether the domain is wide is not known yet: `planearly run` reports its "
                     "cluster entropy before any training, to be given here as --entropy")
    return notes
