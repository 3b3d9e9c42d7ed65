"""The report of a run: one self-contained HTML file, made from a dictionary of facts.

The page shows what it is given: a fact that is missing leaves its section out. Text is escaped;
figures are inline; nothing is fetched from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import yaml
from markupsafe import Markup

from planearly import methods
from planearly.files import atomic_write
from planearly.methods import label
from planearly.report import form, plots, sentences
from planearly.report.form import percent

HEAVIEST = 16  # clusters of a domain that are shown one by one


class Point(TypedDict, total=False):
    """A line of ``metrics.jsonl``; other keys are ignored."""

    tokens: Required[int]
    loss: float  # training, nats per token
    validation: float  # nats per token


class Curve(TypedDict):
    """A training run."""

    stage: str  # "pretraining" or "fine-tuning"
    method: str
    domain: str | None  # None: shared by all domains
    metrics: Sequence[Point]


class Domain(TypedDict, total=False):
    """Clusters of the specialization set and of the generic corpus; arrays are by cluster [k]."""

    name: Required[str]
    generic: plots.Vector  # histogram of the generic corpus
    histogram: plots.Vector  # histogram of the domain, smoothed
    expected_epochs: plots.Vector  # passes over each cluster's windows by importance sampling
    realised_epochs: plots.Vector  # and made
    words: Mapping[int, Sequence[str]]  # of the heaviest clusters: words.characteristic_words
    snippets: Mapping[int, str]  # text nearest the centroid: words.nearest_windows, words.snippet
    windows: int  # windows of the specialization set
    generic_windows: int
    smoothing: float  # tau, windows' worth of generic prior
    effective_size: float  # (sum w)^2 / sum w^2 over the generic windows
    divergence: float  # KL of the domain's histogram from the generic one, nats
    entropy: float  # of the domain's histogram, nats
    generic_entropy: float
    foresight: Mapping[str, Any]  # gain and ci95 of stages.foresight, nats per token


class Expert(TypedDict, total=False):
    """The expert of a projected network or mixture that a domain got, and why."""

    method: Required[str]
    domain: Required[str]
    rule: Required[str]
    reason: Required[str]  # a sentence
    expert: int | None  # its number; None of a blend
    share: float  # of the domain's text in its cluster
    losses: Sequence[float] | None  # of every expert, nats per token; None where not measured
    histogram: plots.Vector  # of the domain over the experts' clusters
    words: Sequence[str]  # of the expert's cluster
    similarity: Mapping[str, Any]  # specialize.experts.similarity


class Cost(TypedDict, total=False):
    """A line of the ledger."""

    stage: Required[str]
    method: str
    domain: str
    tokens: float
    flops: float
    device_hours: float
    device: str
    money: float


class Sample(TypedDict, total=False):
    prompt: Required[str]
    completions: Required[Mapping[str, str]]  # by method
    domain: str


class Source(TypedDict, total=False):
    """Passes over one source of the generic corpus in one pretraining run."""

    source: Required[str]
    method: Required[str]
    domain: str
    tokens: float
    epochs: float


class Facts(TypedDict, total=False):
    title: str
    recipe: Mapping[str, Any]  # Recipe.to_dict()
    rows: Sequence[Mapping[str, Any]]  # of results.json
    comparisons: Sequence[Mapping[str, Any]]  # of results.json: nats per token of a minus b, paired
    macro: Sequence[Mapping[str, Any]]  # of results.json: averages over domains, by method
    curves: Sequence[Curve]
    domains: Sequence[Domain]
    experts: Sequence[Expert]
    costs: Sequence[Cost]
    currency: str  # of money
    samples: Sequence[Sample]
    sources: Sequence[Source]
    plan: Markup  # plan.page.section: what to train for this corpus, limit and device
    warnings: Sequence[str]
    next_steps: Sequence[str]


def write_report(run: Path, facts: Facts, out: Path) -> None:
    """Render ``facts`` to the HTML file ``out``; ``run`` is the run folder that it tells of."""
    with atomic_write(out, "w") as handle:
        handle.write(render(run, facts))


def render(run: Path, facts: Facts) -> str:
    """The page as text."""
    rows = [row for row in facts.get("rows", ()) if row.get("ppl_after") is not None]
    names = list(dict.fromkeys(
        [row["method"] for row in rows] + [curve["method"] for curve in facts.get("curves", ())]))
    averages = [one for one in facts.get("macro", ()) if one["domains"] > 1]
    return form.render(
        Path(__file__).parent / "run_page.html.j2",
        title=facts.get("title") or "planearly report",
        run=run, facts=facts, rows=rows, best=_best(rows), macro=averages,
        best_macro=min(averages, key=lambda one: one["after"]["perplexity"], default=None),
        summary=sentences.summary(rows, facts.get("comparisons", ()), averages),
        legend=methods.among(rows),
        is_routed=sentences.is_routed,
        routed=sentences.ROUTED if any(map(sentences.is_routed, rows)) else "",
        perplexities=plots.perplexities(rows, _labels(names)) if rows else None,
        experts=_experts(facts.get("experts", ())),
        sections=[_section(name, facts, names) for name in _domain_names(facts)],
        totals=_totals(facts.get("costs", ())),
        recipe=yaml.safe_dump(dict(facts["recipe"]), sort_keys=False, allow_unicode=True)
        if facts.get("recipe") else None,
    )


def _best(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Positions of the rows with the lowest perplexity of their domain and set size."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row["domain"], row.get("spec_tokens")), []).append(i)
    return {min(group, key=lambda i: rows[i]["ppl_after"]) for group in groups.values()}


def _domain_names(facts: Facts) -> list[str]:
    named = [domain["name"] for domain in facts.get("domains", ())]
    named += [curve["domain"] for curve in facts.get("curves", ()) if curve["domain"]]
    return list(dict.fromkeys(named))


def _section(name: str, facts: Facts, names: Sequence[str]) -> dict[str, Any]:
    """What the page shows of one domain."""
    drawn = []
    for stage in ("pretraining", "fine-tuning"):
        runs = [dict(curve) for curve in facts.get("curves", ()) if curve["stage"] == stage
                and curve["domain"] in (name, None) and curve["metrics"]]
        if runs:
            caption = f"{stage.capitalize()}: training loss (thin), validation loss (marked)"
            drawn.append((plots.curves(runs, names, _labels(names),
                                         f"loss in {stage}, {name}"), caption))
    found = next((d for d in facts.get("domains", ()) if d["name"] == name), None)
    return {"name": name, "curves": drawn, "facts": found,
            **(_clusters(found) if found and "histogram" in found else {"clusters": []})}


def _clusters(domain: Domain) -> dict[str, Any]:
    """The heaviest clusters of a domain, as figures and as rows of a table."""
    histogram, generic = np.asarray(domain["histogram"]), np.asarray(domain["generic"])
    order = [int(c) for c in np.argsort(-histogram, kind="stable")[:HEAVIEST] if histogram[c] > 0]
    expected, realised = (
        np.asarray(domain[key]) if key in domain else None
        for key in ("expected_epochs", "realised_epochs"))

    def at(values: np.ndarray | None, cluster: int) -> float | None:
        return None if values is None else float(values[cluster])

    pictures: list[tuple[Markup, str]] = [(
        plots.histograms(order, generic[order], histogram[order], domain["name"]),
        f"The {len(order)} clusters with most of {domain['name']}, of {len(histogram)}: they hold "
        f"{percent(histogram[order].sum())} of it and {percent(generic[order].sum())} of the "
        "generic corpus")]
    if expected is not None or realised is not None:
        pictures.append((
            plots.epochs(order, None if expected is None else expected[order],
                           None if realised is None else realised[order], domain["name"]),
            "Passes over the same clusters' generic windows in pretraining by importance"))
    rows = [{
        "cluster": c, "domain": float(histogram[c]), "generic": float(generic[c]),
        "weight": float(histogram[c] / generic[c]) if generic[c] > 0 else None,
        "expected": at(expected, c), "realised": at(realised, c),
        "words": list(domain.get("words", {}).get(c, ())),
        "snippet": domain.get("snippets", {}).get(c),
    } for c in order]
    return {"pictures": pictures, "clusters": rows}


def _experts(experts: Sequence[Expert]) -> list[dict[str, Any]]:
    """By method: the domains' experts, and how alike the experts are (the same for all domains)."""
    found = []
    for method in dict.fromkeys(e["method"] for e in experts):
        mine = [e for e in experts if e["method"] == method]
        drawn = [(e, plots.experts(e["histogram"], e.get("losses"), e.get("expert"),
                                     f"experts of {label(method)} for {e['domain']}"))
                 for e in mine if "histogram" in e]
        alike = next((e["similarity"] for e in mine if e.get("similarity")), None)
        found.append({"method": method, "chosen": mine, "pictures": drawn, "similarity": alike,
                      "maps": alike and plots.similarity(
                          alike["experts"], alike["centroids"],
                          f"similarity of the experts of {label(method)}")})
    return found


def _totals(costs: Sequence[Cost]) -> dict[str, float]:
    """Sums over the ledger; a quantity that no line has is left out."""
    return {key: sum(line.get(key) or 0 for line in costs)  # type: ignore[misc]
            for key in ("flops", "device_hours", "money")
            if any(line.get(key) is not None for line in costs)}


def _labels(names: Sequence[str]) -> dict[str, str]:
    return {name: label(name) for name in names}
