"""The report of a run: one self-contained HTML file, made from a dictionary of facts.

The page shows what it is given: a fact that is missing leaves its section out. Text is escaped;
figures are inline; nothing is fetched from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import yaml
from markupsafe import Markup

from planearly.files import atomic_write
from planearly.report import figures, form
from planearly.report.form import number, percent, si

HEAVIEST = 16  # clusters of a domain that are shown one by one

#: Name on the page, and what it is, of every method.
METHODS = {
    "slm": ("SLM", "small model pretrained on the generic corpus as it is, then fine-tuned"),
    "slm-is": ("SLM-is", "small model pretrained on the generic corpus resampled to the domain's "
                         "clusters (importance sampling), then fine-tuned"),
    "slm-nopt": ("SLM-nopt", "small model trained on the domain's documents alone"),
    "slm-d": ("SLM-d", "small model distilled from the fine-tuned large one"),
    "slm-mix": ("SLM-mix", "one of several small models, each pretrained on one cluster, then "
                           "fine-tuned"),
    "slm-pn": ("SLM-pn", "small model projected from a pretrained projected network, then "
                         "fine-tuned"),
    "slm-dsir": ("SLM-dsir", "small model pretrained on windows chosen by hashed n-grams, then "
                             "fine-tuned"),
    "slm-knn": ("SLM-knn", "small model pretrained on the domain's nearest neighbours, then "
                           "fine-tuned"),
    "slm-top": ("SLM-top", "small model pretrained on the domain's most frequent cluster alone, "
                           "then fine-tuned"),
    "llm": ("LLM", "large model pretrained on the generic corpus, then fine-tuned"),
    "llm-lora": ("LLM-LoRA", "large model adapted with low-rank matrices"),
}


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
    generic: figures.Vector  # histogram of the generic corpus
    histogram: figures.Vector  # histogram of the domain, smoothed
    expected_epochs: figures.Vector  # passes over each cluster's windows that SLM-is would make
    realised_epochs: figures.Vector  # and made
    words: Mapping[int, Sequence[str]]  # of the heaviest clusters: words.characteristic_words
    snippets: Mapping[int, str]  # text nearest the centroid: words.nearest_windows, words.snippet
    windows: int  # windows of the specialization set
    generic_windows: int
    smoothing: float  # tau, windows' worth of generic prior
    effective_size: float  # (sum w)^2 / sum w^2 over the generic windows
    divergence: float  # KL of the domain's histogram from the generic one, nats
    entropy: float  # of the domain's histogram, nats
    generic_entropy: float


class Expert(TypedDict, total=False):
    """The expert of a projected network or mixture that a domain got, and why."""

    method: Required[str]
    domain: Required[str]
    rule: Required[str]
    reason: Required[str]  # a sentence
    expert: int | None  # its number; None of a blend
    share: float  # of the domain's text in its cluster
    losses: Sequence[float] | None  # of every expert, nats per token; None where not measured
    histogram: figures.Vector  # of the domain over the experts' clusters
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
    curves: Sequence[Curve]
    domains: Sequence[Domain]
    experts: Sequence[Expert]
    costs: Sequence[Cost]
    currency: str  # of money
    samples: Sequence[Sample]
    sources: Sequence[Source]
    plan: Markup  # plan.show.section: what to train for this corpus, limit and device
    warnings: Sequence[str]
    next_steps: Sequence[str]


def write_report(run: Path, facts: Facts, out: Path) -> None:
    """Render ``facts`` to the HTML file ``out``; ``run`` is the run folder that it tells of."""
    with atomic_write(out, "w") as handle:
        handle.write(render(run, facts))


def render(run: Path, facts: Facts) -> str:
    """The page as text."""
    environment = form.environment(Path(__file__).parent)
    environment.filters["label"] = label
    rows = [row for row in facts.get("rows", ()) if row.get("ppl_after") is not None]
    methods = list(dict.fromkeys(
        [row["method"] for row in rows] + [curve["method"] for curve in facts.get("curves", ())]))
    averages = macro(rows)
    return environment.get_template("page.html.j2").render(
        title=facts.get("title") or "planearly report",
        run=run, facts=facts, rows=rows,
        best=_best(rows), macro=averages,
        best_macro=min(averages, key=lambda m: averages[m]["ppl_after"], default=None),
        summary=summary(rows, facts.get("comparisons", ())),
        legend=[METHODS[m] for m in dict.fromkeys(row["method"] for row in rows) if m in METHODS],
        perplexities=figures.perplexities(rows, _labels(methods)) if rows else None,
        experts=_experts(facts.get("experts", ())),
        sections=[_section(name, facts, methods) for name in _domain_names(facts)],
        totals=_totals(facts.get("costs", ())),
        recipe=yaml.safe_dump(dict(facts["recipe"]), sort_keys=False, allow_unicode=True)
        if facts.get("recipe") else None,
    )


def label(method: str) -> str:
    """The method's name on the page; what follows a comma stays."""
    name, comma, rest = method.partition(",")
    return METHODS.get(name, (name, ""))[0] + comma + rest


def macro(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Macro-averaged perplexities by method: exp of the mean over domains of the loss (paper, 4).

    Only for methods with exactly one result in each of at least two domains.
    """
    domains = {row["domain"] for row in rows}
    averages = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        if len(domains) > 1 and sorted(row["domain"] for row in own) == sorted(domains):
            averages[method] = {
                key: math.exp(sum(math.log(row[key]) for row in own) / len(own))
                for key in ("ppl_before", "ppl_after") if all(row.get(key) for row in own)
            }
    return averages


def summary(rows: Sequence[Mapping[str, Any]],
            comparisons: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """What came out, in sentences for somebody who reads nothing else.

    Two methods are told apart by the paired difference on the same documents where ``comparisons``
    has it, and else by whether their intervals overlap, which is more cautious.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    if not domains:
        return []
    of = {(row["domain"], row["method"]): row for row in rows}
    pairs = [(of[d, "slm-is"], of[d, "slm"]) for d in domains
             if (d, "slm-is") in of and (d, "slm") in of]
    sentences = ([_compare(*pairs[0], comparisons)] if len(pairs) == 1
                 else [_compare_all(pairs, comparisons)] if pairs else [])
    averages = macro(rows)
    if len(domains) == 1:
        ranked = sorted(rows, key=lambda row: row["ppl_after"])
        if not pairs or ranked[0]["method"] != "slm-is":
            listed = ", ".join(f"{label(r['method'])} {number(r['ppl_after'])}" for r in ranked)
            sentences.append(f"Perplexity on {domains[0]} after fine-tuning: {listed}.")
        best = ranked[0]
        if best.get("ppl_before"):
            sentences.append(
                f"Fine-tuning on the domain's documents brought {label(best['method'])} from "
                f"{number(best['ppl_before'])} to {number(best['ppl_after'])}.")
    elif averages and (not pairs or len(averages) > 2):
        best_method = min(averages, key=lambda m: averages[m]["ppl_after"])
        sentences.append(
            f"Best over the {len(domains)} domains is {label(best_method)}, with a macro-averaged "
            f"perplexity of {number(averages[best_method]['ppl_after'])} after fine-tuning.")
    return sentences


def _compare(ours: Mapping[str, Any], plain: Mapping[str, Any],
             comparisons: Sequence[Mapping[str, Any]]) -> str:
    a, b = ours["ppl_after"], plain["ppl_after"]
    ending = {
        "lower": "lower, beyond the 95% confidence interval",
        "higher": "higher, beyond the 95% confidence interval: here importance sampling did not "
                  "pay",
        "unclear": f"{'lower' if a <= b else 'higher'}, but within the 95% confidence interval, "
                   "so this run alone does not tell them apart",
    }[_verdict(ours, plain, comparisons)]
    return (f"After fine-tuning, SLM-is reaches a perplexity of {number(a)} on {ours['domain']}, "
            f"where the same model without importance sampling reaches {number(b)}"
            f"{_equal(ours, plain)}: {abs(1 - a / b):.1%} {ending}.")


def _compare_all(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
                 comparisons: Sequence[Mapping[str, Any]]) -> str:
    verdicts = [_verdict(*pair, comparisons) for pair in pairs]
    ours, plain = (math.exp(sum(math.log(pair[i]["ppl_after"]) for pair in pairs) / len(pairs))
                   for i in (0, 1))
    return (f"Over {len(pairs)} domains, SLM-is reaches a macro-averaged perplexity of "
            f"{number(ours)} after fine-tuning, where the same model without importance sampling "
            f"reaches {number(plain)}{_equal(*pairs[0])}. Beyond the 95% confidence "
            f"interval it is lower in {verdicts.count('lower')} of them and higher in "
            f"{verdicts.count('higher')}.")


def _verdict(ours: Mapping[str, Any], plain: Mapping[str, Any],
             comparisons: Sequence[Mapping[str, Any]]) -> str:
    names = (ours["method"], plain["method"])
    for found in comparisons:
        if found["domain"] == ours["domain"] and {found["a"], found["b"]} == set(names):
            low, high = sorted(bound if found["a"] == names[0] else -bound
                               for bound in found["ci95"])
            return "lower" if high < 0 else "higher" if low > 0 else "unclear"
    a, b = (row.get("ppl_after_ci") or [row["ppl_after"]] * 2 for row in (ours, plain))
    return "lower" if a[1] < b[0] else "higher" if a[0] > b[1] else "unclear"


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    same = a.get("pretrain_tokens") == b.get("pretrain_tokens") is not None
    return f", at the same {si(a['pretrain_tokens'])} tokens of pretraining" if same else ""


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


def _section(name: str, facts: Facts, methods: Sequence[str]) -> dict[str, Any]:
    """What the page shows of one domain."""
    drawn = []
    for stage in ("pretraining", "fine-tuning"):
        runs = [dict(curve) for curve in facts.get("curves", ()) if curve["stage"] == stage
                and curve["domain"] in (name, None) and curve["metrics"]]
        if runs:
            caption = f"{stage.capitalize()}: training loss (thin), validation loss (marked)"
            drawn.append((figures.curves(runs, methods, _labels(methods),
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
        figures.histograms(order, generic[order], histogram[order], domain["name"]),
        f"The {len(order)} clusters with most of {domain['name']}, of {len(histogram)}: they hold "
        f"{percent(histogram[order].sum())} of it and {percent(generic[order].sum())} of the "
        "generic corpus")]
    if expected is not None or realised is not None:
        pictures.append((
            figures.epochs(order, None if expected is None else expected[order],
                           None if realised is None else realised[order], domain["name"]),
            "Passes over the same clusters' generic windows in the pretraining of SLM-is"))
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
        drawn = [(e, figures.experts(e["histogram"], e.get("losses"), e.get("expert"),
                                     f"experts of {label(method)} for {e['domain']}"))
                 for e in mine if "histogram" in e]
        alike = next((e["similarity"] for e in mine if e.get("similarity")), None)
        found.append({"method": method, "chosen": mine, "pictures": drawn, "similarity": alike,
                      "maps": alike and figures.similarity(
                          alike["experts"], alike["centroids"],
                          f"similarity of the experts of {label(method)}")})
    return found


def _totals(costs: Sequence[Cost]) -> dict[str, float]:
    """Sums over the ledger; a quantity that no line has is left out."""
    return {key: sum(line.get(key) or 0 for line in costs)  # type: ignore[misc]
            for key in ("flops", "device_hours", "money")
            if any(line.get(key) is not None for line in costs)}


def _labels(methods: Sequence[str]) -> dict[str, str]:
    return {method: label(method) for method in methods}
