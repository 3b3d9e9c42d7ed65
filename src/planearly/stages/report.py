"""The report of a run: gathers what the stages found, and writes the run_page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from markupsafe import Markup
from tokenizers import Tokenizer

from planearly import methods
from planearly.cluster import embed
from planearly.cost import devices, ledger
from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows
from planearly.errors import UserError
from planearly.files import read_array, read_object
from planearly.generate import generate
from planearly.model import flops
from planearly.plan import inputs, recommend
from planearly.plan import page as plan_page
from planearly.progress import say
from planearly.report import run_page, words
from planearly.stages import clusters, corpus, training
from planearly.stages.folder import Run, once
from planearly.stages.manifest import MANIFEST, facts
from planearly.stages.noted import PAGE, RESULTS
from planearly.stages.trained import Trained

_SAMPLE = 6_000
"""Windows from which the words of clusters are told."""
_PROMPT = 48
"""Most tokens of a sample's prompt."""


def write(run: Run, all_trained: list[Trained], results: dict[str, Any]) -> Path:
    """Write ``report.html`` in the run folder."""
    gathered: run_page.Facts = {
        "title": f"{run.recipe.name}: small language models for "
                 + ", ".join(dict.fromkeys(t.domain for t in all_trained)),
        "recipe": run.recipe.to_dict(),
        "rows": results["rows"],
        "comparisons": results["comparisons"],
        "macro": results["macro"],
        "curves": list(_curves(all_trained)),
        "domains": list(_domains(run, all_trained)),
        "experts": list(_experts(run, all_trained)),
        "costs": list(_costs(run)),
        "currency": run.recipe.cost.currency,
        "samples": list(_samples(run, all_trained)),
        "sources": list(_sources(run, all_trained)),
        "warnings": list(_warnings(run, all_trained)),
        "next_steps": _next_steps(run, results),
    }
    if (plan := _plan(run, all_trained)) is not None:
        gathered["plan"] = plan
    out = run.out / PAGE
    run_page.write_report(run.out, gathered, out)
    return out


def _plan(run: Run, all_trained: list[Trained]) -> Markup | None:
    """The planner's section for this corpus, this limit and this device.

    None where it has nothing to say: an uncalibrated device, a model below all that it plans.
    """
    if not run.recipe.reads_generic:
        return None
    dataset, used = corpus.specialization_windows(run, all_trained[0].domain)
    try:
        plan = recommend.recommend(inputs.PlanInput(
            device=devices.find("here"), limit=flops.parameters(training.shape_of(run)),
            generic_tokens=int(TokenDataset(corpus.generic(run)).meta["n_tokens"]),
            spec_tokens=int(dataset.windows["length"][used].sum()), windows=len(used),
            domains=len({t.domain for t in all_trained}), price=run.recipe.cost.price_per_hour,
            currency=run.recipe.cost.currency, foreseen=_foreseen(all_trained),
        ))
    except UserError:
        return None
    return plan_page.section(plan)


def _foreseen(all_trained: list[Trained]) -> float | None:
    """What trigrams foresee of importance sampling, the domains' mean; None: it was not asked."""
    told = [one.notes["foresight"]["gain"] for one in all_trained
            if methods.find(one.method).draws == "importance" and "foresight" in one.notes]
    return float(np.mean(told)) if told else None


def _curves(all_trained: list[Trained]) -> Iterator[run_page.Curve]:
    seen = set()
    for one in all_trained:
        for stage, path in (("pretraining", one.base), ("fine-tuning", one.tuned)):
            if path is not None and path not in seen:
                seen.add(path)
                shared = stage == "pretraining" and path in one.generic
                yield {"stage": stage, "method": one.method,
                       "domain": None if shared else one.domain,
                       "metrics": cast(list[run_page.Point], training.metrics_of(path))}


def _domains(run: Run, all_trained: list[Trained]) -> Iterator[run_page.Domain]:
    for name in dict.fromkeys(t.domain for t in all_trained):
        resampled = [t for t in all_trained if t.domain == name and _resampled(t)]
        if not resampled:
            continue
        weighed = clusters.importance_weights(run, name)
        made = facts(weighed)
        k = made["k"]
        by_cluster = read_object(weighed / "clusters.json", "target", "rows")
        target = np.asarray(by_cluster["target"])
        rows = np.asarray(by_cluster["rows"], np.float64)
        heaviest = [int(c) for c in np.argsort(-target)[: run_page.HEAVIEST]]
        found, snippets = cluster_words(run, k)
        realised = [facts(t.base)["epochs"] for t in resampled if t.base]
        entry: run_page.Domain = {
            "name": name, "generic": rows / rows.sum(), "histogram": target,
            "expected_epochs": np.asarray(by_cluster["epochs"]),
            "words": {c: found.get(c, []) for c in heaviest},
            "snippets": {c: snippets[c] for c in heaviest if c in snippets},
            "windows": made["windows"], "generic_windows": len(TokenDataset(corpus.generic(run))),
            "smoothing": made["tau"], "effective_size": made["weights"]["effective_rows"],
            "divergence": made["weights"]["divergence"], "entropy": made["domain"]["entropy"],
            "generic_entropy": facts(clusters.clusters(run))["levels"][str(k)]["entropy"],
        }
        if told := resampled[0].notes.get("foresight"):
            entry["foresight"] = told
        if realised:
            drawn = np.asarray(realised[0]["rows_drawn"], np.float64)
            entry["realised_epochs"] = drawn / np.maximum(rows, 1)
        yield entry


def _resampled(one: Trained) -> bool:
    """Whether a method draws the generic corpus by the domain's cluster weights."""
    return methods.find(one.method).draws == "importance"


@once
def cluster_words(run: Run, k: int) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Characteristic words, and the beginning of the most typical window, of every cluster."""
    dataset = TokenDataset(corpus.generic(run))
    clustered = clusters.clusters(run)
    assignment = read_array(clustered / f"assignment-{k}.npy")
    reader = corpus.tokenizer_of(run).tokenizer
    generator = np.random.default_rng(run.recipe.seed)
    sample = np.sort(generator.choice(len(dataset), min(_SAMPLE, len(dataset)), replace=False))
    found = words.characteristic_words(
        dataset.texts(sample, reader), [int(c) for c in assignment[sample]])
    points = embed.open_embeddings(clusters.embeddings(run) / "blocks")
    centroids = read_array(clustered / f"centroids-{k}.npy")
    nearest = words.nearest_windows(points, assignment, centroids, range(k))
    return found, {c: words.snippet(dataset.text(w, reader)) for c, w in nearest.items()}


def _experts(run: Run, all_trained: list[Trained]) -> Iterator[run_page.Expert]:
    """What the stage ``expert/METHOD.DOMAIN`` found."""
    for one in all_trained:
        if one.expert is None:
            continue
        made = facts(one.expert)
        choice, histogram = made["choice"], made["histogram"]
        entry: run_page.Expert = {
            "method": one.method, "domain": one.domain, "rule": choice["rule"],
            "expert": choice["expert"], "reason": choice["reason"], "share": choice["share"],
            "losses": choice["losses"], "histogram": histogram, "similarity": made["similarity"],
        }
        if choice["expert"] is not None and run.recipe.reads_generic:
            entry["words"] = cluster_words(run, len(histogram))[0].get(choice["expert"], [])
        yield entry


def _costs(run: Run) -> Iterator[run_page.Cost]:
    for folder in run.used:
        if (folder / MANIFEST).exists():
            made = facts(folder)
            _, method, domain = ledger.place(made)
            booked = made.get("cost", {"device_hours": ledger.seconds_of(made) / 3600})
            entry: run_page.Cost = {"stage": made["stage"], "device_hours": booked["device_hours"]}
            if "cost" in made:
                entry |= {"tokens": booked["tokens"], "flops": booked["flops"],
                          "device": booked["device"], "method": method}
                if "money" in booked:
                    entry["money"] = booked["money"]
            if domain:
                entry["domain"] = domain
            yield entry


def _samples(run: Run, all_trained: list[Trained]) -> Iterator[run_page.Sample]:
    """The first words of a test document of each domain, continued by each method's model."""
    reader = corpus.tokenizer_of(run).tokenizer
    results = {(row["method"], row["domain"]): row
               for row in read_object(run.out / RESULTS, "rows")["rows"]}
    for name in dict.fromkeys(t.domain for t in all_trained):
        dataset, windows = corpus.held_out(run, name, "test")
        prompt = beginning(dataset.text(int(windows[0]), reader), reader,
                           min(dataset.context // 2, _PROMPT))
        said = {}
        for one in all_trained:
            if one.domain == name:
                model = run.out / results[one.method, name]["model"]
                try:
                    said[one.method] = generate(model, prompt, max_new_tokens=40, temperature=0.7,
                                                seed=run.recipe.seed)
                except UserError as error:  # no reason to end a run that is done
                    say(f"the report has no sample of {one.method} on {name}: {error}")
        yield {"prompt": prompt, "domain": name, "completions": said}


def beginning(text: str, reader: Tokenizer, most: int) -> str:
    """The first twelve words of a text, or as much of them as ``most`` tokens hold."""
    words = " ".join(text.split()[:12])
    ids = reader.encode(words).ids
    if len(ids) <= most:
        return words
    for n in range(most, 0, -1):  # a decoded part may be encoded in more tokens than it was cut at
        cut = reader.decode(ids[:n], skip_special_tokens=False).rstrip("\ufffd")
        if len(reader.encode(cut).ids) <= most:
            return cut
    return ""


def _sources(run: Run, all_trained: list[Trained]) -> Iterator[run_page.Source]:
    """Tokens and passes of each pretraining over each source of the generic corpus."""
    if not run.recipe.reads_generic:
        return
    dataset = TokenDataset(corpus.generic(run))
    names = dataset.meta["sources"]
    of_window = dataset.documents["source"][dataset.windows["document"].astype(np.int64)]
    length = dataset.windows["length"].astype(np.float64)
    seen = set()
    for one in all_trained:
        if one.base is None or one.base in seen or "epochs" not in facts(one.base):
            continue
        seen.add(one.base)
        stages = facts(one.base)["folders"]
        packed = Rows.load(run.out / stages["rows"])
        drawn = np.asarray(facts(one.base)["epochs"]["rows_drawn"], np.float64)
        passes = drawn / np.maximum(np.diff(packed.group_offsets), 1)
        row_group = np.repeat(np.arange(len(passes)), np.diff(packed.group_offsets))
        per_row = np.diff(packed.row_offsets)
        window_passes = np.repeat(passes[row_group], per_row)
        tokens = np.bincount(of_window[packed.windows], length[packed.windows] * window_passes,
                             len(names))
        available = np.bincount(of_window[packed.windows], length[packed.windows], len(names))
        for source in np.argsort(-tokens)[:12]:
            if tokens[source] > 0:
                entry: run_page.Source = {"source": names[source], "method": one.method,
                                      "tokens": float(tokens[source]),
                                      "epochs": float(tokens[source] / available[source])}
                if one.base in one.own:
                    entry["domain"] = one.domain
                yield entry


def _warnings(run: Run, all_trained: list[Trained]) -> Iterator[str]:
    if not run.recipe.reads_generic:
        return
    overlap = facts(corpus.kept(run)).get("overlap", {})
    if overlap.get("documents"):
        yield (f"{overlap['documents']} generic documents hold text of a domain's valid or test "
               "split and were not trained on")
    bad = facts(corpus.generic(run))["corpus"]["set_aside"]
    if bad:
        yield f"{bad} records of the generic corpus could not be read and were set aside"
    for name in dict.fromkeys(t.domain for t in all_trained if _resampled(t)):
        made = facts(clusters.importance_weights(run, name))["weights"]
        if made["hottest_epochs"] > run.recipe.importance.warn_epochs:
            yield (f"{name}: importance sampling passes over its hottest cluster "
                   f"{made['hottest_epochs']:.1f} times; more generic text would serve it better")
    for one in all_trained:
        outcome = training.outcome_of(one.tuned)
        if outcome["best_step"] == 0:
            yield (f"{one.method} on {one.domain}: fine-tuning did not improve on the pretrained "
                   "model; lower 'finetune.lr_scale' or give more documents")


def _next_steps(run: Run, results: dict[str, Any]) -> list[str]:
    best = min(results["rows"], key=lambda r: r["ppl_after"])
    folder, out = shlex.quote(str(run.out / best["model"])), shlex.quote(str(run.out))
    return [
        f'planearly generate {folder} "..."',
        f"planearly evaluate {folder} YOUR_FILES --json",
        f"the command that made this, with pretrain_tokens=... and --out {out}  (what does "
        "not depend on the tokens is kept)",
    ]
