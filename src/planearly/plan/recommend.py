"""Which method to train: the paper's Figure 1, with the costs and the budgets put in.

Figure 1: a large inference budget takes the large model; a small one with a large specialization
budget takes importance sampling; a small one with a small specialization budget, or many domains,
takes a projected network or a hard mixture. What it leaves open is decided by what each method
could do (:mod:`planearly.plan.options`). Where the user's own runs tell more, they go before the
figure (:mod:`planearly.plan.split`), unless the paper is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeGuard

from planearly import methods
from planearly.cost import model
from planearly.cost.model import MethodCost, Setting, Work
from planearly.errors import UserError
from planearly.methods import Method
from planearly.model import flops
from planearly.plan import inputs, law, options, sizes
from planearly.plan import split as splits
from planearly.plan.inputs import PlanInput
from planearly.plan.options import CHECKPOINT, CLUSTERS, MOST_PASSES, Row, method_of
from planearly.plan.split import Split
from planearly.units import prefixed, short

RESAMPLING_PAYS, FEWER = 0.15, 3.0
"""Nats per token foreseen by trigrams from which importance sampling with a quarter of the plain
model's tokens was ahead of it (docs/experiments.md); and how many times its tokens the plain model
has to have here for that to count, since at equal tokens it was ahead whatever was foreseen."""
LEAST_WINDOWS = 0.75
"""Windows of the set per cluster below which k is lowered; the paper's 1M tokens at k = 1,024 are
0.95, and were its best."""


@dataclass(frozen=True)
class Plan:
    """A recommendation, and everything it was chosen from."""

    recommended: str
    reason: str
    expert: str
    """How the one that is recommended should choose the domain's, if it has experts."""
    clusters: int
    """k for importance sampling."""
    notes: list[str]
    rows: list[Row]
    break_evens: list[dict[str, Any]]
    """Pairs of feasible methods, the number of domains at which they cost the same, which is
    cheaper below it, and ``at`` what quality or tokens they are compared."""
    setting: Setting
    given: PlanInput
    split: Split | None
    """How pretraining is split between before and per domain, where runs of the user's own tell."""
    paper: tuple[str, str]
    """What the paper's Figure 1 recommends, and why."""
    costed: list[Row]
    """All methods as they are before a split is chosen: the same for any number of domains but for
    ``total``."""

    def frontier(self, domains: Sequence[int] = splits.FRONTIER) -> list[dict[str, Any]]:
        """What each total cost buys, by :func:`planearly.plan.split.frontier`."""
        return splits.frontier(self.given, self.setting, domains)

    def row(self, method: str) -> Row:
        return next(row for row in self.rows if row.method == method)

    def to_dict(self) -> dict[str, Any]:
        given = asdict(replace(self.given, laws={}))
        given["laws"] = {name: fitted.describe() for name, fitted in self.given.laws.items()}
        return {
            "recommended": self.recommended, "reason": self.reason, "expert": self.expert,
            "split": self.split and self.split.to_dict(),
            "paper": {"recommended": self.paper[0], "reason": self.paper[1]},
            "clusters": self.clusters, "notes": self.notes,
            "methods": [row.to_dict() for row in self.rows],
            "break_evens": self.break_evens, "frontier": self.frontier(),
            "small": self.setting.small.to_dict(), "large": self.setting.large.to_dict(),
            "projected": asdict(self.setting.projected), "experts": self.setting.experts,
            "device": self.setting.device.label, "given": given,
        }


def recommend(given: PlanInput, costed: Sequence[Row] | None = None) -> Plan:
    """Cost every method, say which are feasible, and choose one.

    Args:
        costed: :attr:`Plan.costed` of a plan that differs in its number of domains alone.

    Raises:
        UserError: an input that cannot be.
    """
    inputs.check(given)
    setting = options.setting_of(given)
    clusters, cluster_notes = _clusters(given, setting)
    rows = options.rows_of(given, setting) if costed is None else [
        replace(row, total=row.cost.total(given.total_domains)) for row in costed]
    costed = rows
    by_name = {row.method: row for row in rows}
    paper = _choose(given, setting, by_name)
    (chosen, reason), found, unknown = _split(given, setting, by_name, paper)
    if (chosen, reason) == paper:
        chosen, reason = _foreseen(given, by_name, paper)
    if found:
        if method_of(chosen).adapts:
            setting = replace(setting, adapt_share=found.adapt_share)
        rows = list(by_name.values())
    feasible = [row for row in rows if row.feasible]
    evens = []
    for i, a in enumerate(feasible):
        for b in feasible[i + 1:]:
            pair = compared(given, setting, a, b)
            if pair is None:
                continue
            (one, other), at = pair
            meeting = model.break_even(one, other)
            if meeting is not None:
                first = one if one.generic.device_hours < other.generic.device_hours else other
                evens.append({"methods": [a.method, b.method], "domains": meeting,
                              "cheaper_below": first.method, "at": at})
    return Plan(chosen, reason, given.expert(method_of(chosen)), clusters,
                cluster_notes + unknown + _notes(given, setting, by_name, chosen), rows, evens,
                setting, given, found, paper, costed)


def _split(given: PlanInput, setting: Setting, rows: dict[str, Row], paper: tuple[str, str],
           ) -> tuple[tuple[str, str], Split | None, list[str]]:
    """What the user's own runs recommend instead of the paper, why, and how pretraining is then
    split; what the paper does, and a note, where they do not tell. Puts the row of the split in."""
    name, _ = paper
    of = method_of(name)
    if given.paper or of.large or of.taught or name == CHECKPOINT or not rows[name].feasible:
        return paper, None, []
    theirs = "" if of.bank is None and not of.per_domain else f"; the paper's Figure 1 takes {name}"
    try:
        found = splits.by_law(given, setting, rows[name].total.device_hours)
    except UserError as unknown:
        by_study = splits.by_study(given, setting, rows)
        if by_study is None:
            return paper, None, [
                "how to split pretraining between before and per domain is not known here: "
                f"{unknown}; a study of {', '.join(law.line())} of your own, given as --results, "
                "would tell"]
        chosen, ground = by_study
        if chosen == name:
            theirs = ""
        return (chosen, f"it has the lowest perplexity of what was compared in {ground}{theirs}"
                ), None, [f"the split between before and per domain is by those runs: {unknown}"]
    rounding = 1 + 1e-9
    row = options.row_of(
        replace(given, generic_hours=found.before * rounding,
                specialization_hours=found.each * rounding),
        replace(setting, adapt_share=found.adapt_share), method_of(found.method),
        most=found.tokens)
    if not row.feasible:
        return paper, None, [f"by {found.ground} {found.method} would have the lowest expected "
                             f"loss, but {row.why}"]
    other = rows[name].perplexity
    if of.bank and other and other["nll_per_token"] <= found.nll:
        return (name, f"{paper[1]}; the laws fitted to your own runs agree, which expect a "
                      f"perplexity of {other['perplexity']:.2f}, and of "
                      f"{math.exp(found.nll or 0):.2f} by the best split, {found.method}"
                ), None, []
    rows[found.method] = row
    if found.method == name:
        theirs = ""
    kinds = [f"{short(tokens)} {what}" for tokens, what in (
        (found.tokens * (1 - found.adapt_share), "generic tokens before the domain is known"),
        (found.tokens * found.adapt_share, "per domain")) if tokens]
    return (found.method, f"of the splits that {_affords(given, name)} it has the lowest expected "
            f"loss, {found.nll:.3f} nats per token, by {found.ground}: {' and '.join(kinds)}"
            f"{theirs}"), found, []


def _affords(given: PlanInput, paper: str) -> str:
    stated = given.generic_hours is not None and given.specialization_hours is not None
    return "the budgets afford" if stated else f"cost what {paper} would in all"


def compared(given: PlanInput, setting: Setting, a: Row,
             b: Row) -> tuple[tuple[MethodCost, MethodCost], str] | None:
    """What two methods cost when they are as good as each other, as far as that is known.

    One that pretrains per domain against one for all domains: at equal quality, by
    :func:`planearly.plan.options.matching`, unless its budget stops it before; None where its
    tokens of equal quality are not known, as those of a method that adapts are not. All others,
    whose qualities no rule compares: at the tokens that are planned for them.
    """
    of, other = method_of(a.method), method_of(b.method)
    if of.adapts or other.adapts:
        return None
    if of.per_domain == other.per_domain or CHECKPOINT in (a.method, b.method):
        return (a.cost, b.cost), "the tokens planned"
    own, shared, row = (a, b, of) if of.per_domain else (b, a, other)
    against = other if of.per_domain else of
    if against.large or against.taught or not against.pretrains:
        return (a.cost, b.cost), "the tokens planned"
    tokens, equal = options.matching(given, setting, row, shared)
    if not equal["known"]:
        return None
    most = MOST_PASSES * given.generic_tokens if given.specialization_hours is None \
        else own.pretrain_tokens
    if tokens > most:
        return (a.cost, b.cost), (
            f"what budget and corpus allow: {own.method} stops at {short(most)} tokens, "
            f"before the {short(tokens)} of equal quality")
    planned, wanted = (model.own_pretraining(setting, row, many)
                       for many in (own.pretrain_tokens, tokens))
    cost = replace(own.cost, specialization=own.cost.specialization + planned * -1.0 + wanted)
    pair = (cost, shared.cost) if of.per_domain else (shared.cost, cost)
    return pair, (f"equal quality: {own.method} at {equal['share']:.0%} of {shared.method}'s "
                  f"tokens, {short(tokens)}; {equal['ground']}")


def _foreseen(given: PlanInput, rows: dict[str, Row], paper: tuple[str, str]) -> tuple[str, str]:
    """The plain model in place of importance sampling with far fewer tokens, and why, where
    trigrams foresee that the corpus holds hardly anything for the domain to choose."""
    name, plain = paper[0], _plain(rows)
    if (given.paper or given.foreseen is None or given.foreseen >= RESAMPLING_PAYS
            or method_of(name).draws != "importance" or name == CHECKPOINT or not _can(plain)
            or plain.pretrain_tokens < FEWER * rows[name].pretrain_tokens):
        return paper
    return plain.method, (
        f"what would be drawn for the domain foretells it by only {given.foreseen:.2f} nats per "
        f"token better than the corpus as it is: below {RESAMPLING_PAYS:g} importance sampling "
        "with a quarter of the tokens was not ahead of the plain model in our studies, and here "
        f"that has {plain.pretrain_tokens / rows[name].pretrain_tokens:.1f} times its tokens; the "
        f"paper's Figure 1 takes {name}")


def _plain(rows: dict[str, Row]) -> Row | None:
    """Of the small model that is pretrained on the corpus as it is, for all domains."""
    return _first(rows, lambda m: m.pretrains and not (m.large or m.needs_domain or m.bank
                                                       or m.taught))


def _choose(given: PlanInput, setting: Setting, rows: dict[str, Row]) -> tuple[str, str]:
    """Figure 1 of the paper, then what it leaves open."""
    limit = "no limit on inference" if given.limit is None \
        else f"the inference limit of {short(given.limit)} parameters"
    no_generic = given.generic_tokens == 0 or given.generic_hours == 0
    large = _first(rows, lambda m: m.large and m.pretrains and not m.per_domain)
    adapted = rows[CHECKPOINT]
    if large is not None and large.feasible and not no_generic:
        admits = "leaves room" if given.limit is None else "admits it"
        return large.method, (
            f"{limit} {admits} and the budgets afford training it; of the methods that share one "
            "pretraining it has the lowest perplexity at every set size")
    if no_generic and adapted.feasible:
        return CHECKPOINT, ("there is no budget for generic pretraining, and an open checkpoint "
                            "within the inference limit has already been paid for: pretrain it on "
                            "a little, on generic text resampled to look like the domain where "
                            "there is any, and fine-tune it")
    importance = _first(rows, lambda m: m.draws == "importance")
    network = _first(rows, lambda m: m.bank == "projected")
    mixture = _first(rows, lambda m: m.bank == "mixture")
    taught = _first(rows, lambda m: m.taught)
    plain = _plain(rows)
    shared = network if _can(network) else mixture
    if importance is not None and importance.feasible:
        against = compared(given, setting, importance, shared) if _can(shared) else None
        (own, other), at = against or ((importance.cost, importance.cost), "")
        n = given.total_domains
        meeting = model.break_even(own, other) if at else None
        cheaper = not at or own.total(n).device_hours <= other.total(n).device_hours
        cross = f"the curves cross at {meeting:.1f} domains, at {at}" if meeting else ""
        if cheaper:
            many = f", and for {_domains(given)} it costs less than a shared pretraining " \
                   f"({cross})" if cross else ""
            return importance.method, (
                "the inference limit asks for a small model and the specialization "
                "budget affords pretraining one per domain on generic text that "
                f"looks like it, the best of the paper's small models{many}"
                + ("; it also suits a domain as wide as this one" if given.wide else ""))
        extra = (f"importance sampling would pretrain once per domain, "
                 f"{own.total(n).device_hours:.3g} device-hours for {_domains(given)} against "
                 f"{other.total(n).device_hours:.3g}" + (f" ({cross})" if cross else ""))
    else:
        extra = f"importance sampling is out: {importance.why}" if importance else \
            "there is no importance sampling"
    if network is not None and network.feasible and given.wide:
        return network.method, (
            "the inference limit asks for a small model and the domains share one "
            f"pretraining; {extra}. The domain is wide (entropy "
            f"{given.entropy:.2f} of at most {math.log(given.clusters or 2):.2f} "
            "nats), where a single cluster's expert does not beat the plain small "
            "model in the paper: blend the experts by the domain's histogram")
    if network is not None and network.feasible:
        return network.method, (
            "the inference limit asks for a small model and one generic pretraining "
            "serves every domain, each then specialised for "
            f"{_hours(network.cost.specialization)}; {extra}")
    out = network.why if network else "there is none"
    if mixture is not None and mixture.feasible:
        return mixture.method, (
            f"as a projected network would, but that is out ({out}): "
            "independent small models each fit on a device and share one generic "
            f"pretraining among all domains; {extra}")
    if taught is not None and taught.feasible:
        return taught.method, (f"a teacher exists already, and {out}: its distribution tells the "
                               "student more per token than the text alone")
    why = plain.why if plain else "there is no plain method"
    if adapted.feasible:
        return CHECKPOINT, (f"pretraining a model here is out ({why}), and the open "
                            "checkpoint fits the inference limit")
    if plain is not None and plain.feasible:
        return plain.method, ("the plain small model is what the budgets afford: "
                              f"projected network: {out}")
    if given.checkpoint is not None:
        return CHECKPOINT, (f"nothing can be pretrained here ({why}), and {given.checkpoint.name} "
                            f"is out: {adapted.why}; name a smaller open checkpoint")
    within = "" if given.limit is None else f" within {limit}"
    return CHECKPOINT, (f"nothing can be pretrained here ({why}): take an open "
                        f"checkpoint{within}, name it with --checkpoint, and continue its "
                        "pretraining on the domain")


def _first(rows: dict[str, Row], kind: Callable[[Method], bool]) -> Row | None:
    """The first of the paper's methods of a kind that is feasible, else the first; others are
    costed, but nothing is known by which to recommend them."""
    found = [rows[name] for name in methods.paper() if kind(methods.TABLE[name])]
    return next((row for row in found if row.feasible), found[0] if found else None)


def _can(row: Row | None) -> TypeGuard[Row]:
    return row is not None and row.feasible


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


def _notes(given: PlanInput, setting: Setting, rows: dict[str, Row], chosen: str) -> list[str]:
    notes, of = [], method_of(chosen)
    device = given.device
    if device.stands_in_for is not None:
        notes.append(device.told_of_standing_in())
    elif not device.calibrated:
        notes.append(f"hours are estimates for {device.name} ({device.source}); "
                     "`planearly calibrate` on the device replaces them by measured ones")
    if told := device.told_of_precision(None):
        notes.append(told)
    row = rows[chosen]
    if row.equal_quality is not None:
        notes.append(f"no hours per domain were given, so {chosen} takes "
                     f"{row.equal_quality['share']:.0%} of the tokens of "
                     f"{row.equal_quality['with']}: {row.equal_quality['ground']}")
    limit = sizes.PAPER_LARGE if given.limit is None else given.limit
    if of.large and limit > 1.3 * flops.parameters(setting.large):
        held = options.fits(given, sizes.shape_for(round(1.2 * flops.parameters(setting.large))))
        notes.append(f"the large model is sized to {short(flops.parameters(setting.large))} "
                     "parameters by " + (
                         "what corpus and hours train at 20 tokens per parameter" if held else
                         f"the memory of one {device.name}" if given.devices == 1 else
                         f"the memory of {given.devices} {device.name} that divide it"))
    network = _first(rows, lambda m: m.bank == "projected")
    if _can(network):
        notes.append(f"{network.method} has {options.network(given, setting)[1]}")
    taught = _first(rows, lambda m: m.taught)
    if given.teacher is not None and _can(taught) and chosen != taught.method:
        notes.append(f"a teacher exists: {taught.method} costs "
                     f"{_hours(taught.cost.specialization)} per domain, mostly the teacher's "
                     "answers; worth a trial on one domain")
    if given.checkpoint is not None and chosen != CHECKPOINT and rows[CHECKPOINT].feasible:
        notes.append(f"try {given.checkpoint.name} too: adapting it costs at most "
                     f"{_hours(rows[CHECKPOINT].cost.specialization)} per domain, and whoever made "
                     "it may have trained it longer than these budgets can")
    if of.large and given.total_domains > 1:
        notes.append("with LoRA each domain adds its adapters instead of a whole model, at most "
                     "0.5 perplexity behind in the paper, for up to five times the steps")
    passes = row.pretrain_tokens / given.generic_tokens if given.generic_tokens else 0
    if passes > 1.01:
        notes.append(f"{chosen} reads the generic corpus {passes:.1f} times; up to {MOST_PASSES} "
                     "are about as good as new text")
    if given.devices > 1:
        notes.append(f"hours are device-hours: {given.devices} devices take {given.devices} times "
                     "less time on the clock where work divides evenly; " + (
                         f"{chosen} is sharded over {given.devices} devices, because one of them "
                         "does not hold its weights and optimiser state: they gather the weights "
                         "from each other in every pass" if row.cost.sharded else
                         "each holds the whole model and its state, and gradients are summed once "
                         "a step"))
    if row.traffic is not None:
        notes.append(_traffic(given, chosen, row.traffic, row.cost.sharded))
    if given.entropy is None and of.clustered:
        notes.append("whether the domain is wide is not known yet: `planearly weigh` tells its "
                     "entropy over clusters, to be given here as --entropy and --clusters")
    if given.foreseen is None and of.draws == "importance":
        notes.append("whether the corpus holds text like the domain's is not known yet: "
                     "`planearly weigh` tells what drawing it is worth, to be given here as "
                     "--foreseen")
    return notes


def _traffic(given: PlanInput, chosen: str, step: model.Traffic, sharded: bool) -> str:
    """What a step sends between devices, and how long that takes."""
    ways = [(seconds, f"{_time(seconds)} {how}") for seconds, how in (
        (step.links, f"over the links of a machine ({prefixed(given.device.links or 0)}B/s one "
                     "way)"),
        (step.network, f"at {8 * model.NETWORK / 1e9:.0f} Gbit/s between machines"))
        if seconds is not None]
    said = (f"in each step of {chosen} a device sends the others {prefixed(step.sent)}B: "
            f"{', '.join(how for _, how in ways)}, beside {_time(step.computing)} of "
            "operations, and not in the hours")
    slow = [step.slow(seconds) for seconds, _ in ways]
    if slow[-1] and step.narrow < 0.9 * step.network:
        said += (f"; between machines gradients of a pretraining then travel in bfloat16, which "
                 f"takes {_time(step.narrow)} (recipe key 'pretrain.gradients')")
    if all(slow):
        where = "there"
    elif any(slow):
        where = "between machines" if slow[-1] else "over these links"
    else:
        return said
    remedy = "fewer devices" if sharded else "a larger 'pretrain.batch_tokens', or fewer devices"
    return f"{said}: {where} that is slow, and {remedy} would keep them busier"


def _time(seconds: float) -> str:
    """Seconds, as milliseconds below one, with about two digits."""
    value, unit = (seconds, "s") if seconds >= 1 else (1000 * seconds, "ms")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
