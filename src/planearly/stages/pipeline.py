"""``planearly run``: the stages of a recipe in order, and the summary at the end."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from planearly import methods, parallel, storage
from planearly.engine.work import Advance, shard_function
from planearly.errors import UserError
from planearly.keys import Recipe
from planearly.plan import sizes
from planearly.progress import PlainTable, say
from planearly.report import sentences
from planearly.stages import adapt, bundled, checkpoint, clusters, corpus, exchange, trained
from planearly.stages.evaluate import evaluations, write_results
from planearly.stages.folder import Missing, Run
from planearly.stages.manifest import facts
from planearly.stages.mirror import Mirror
from planearly.stages.noted import PAGE, RECIPE, RESULTS
from planearly.stages.workers import can_spread, joined, spread_trainings
from planearly.units import duration, prefixed, short

VERBS = ("prepare", "cluster", "weigh", "pretrain", "specialize", "evaluate", "export", "report")


def run(recipe: Recipe, out: Path | str, until: str = "report",
        share: Callable[[Run], Any] | None = None, to: str | None = None) -> dict[str, Any] | None:
    """Run the stages of ``recipe`` in ``out`` up to a verb; what is done already is not done again.

    Up to ``pretrain`` it does without domains, for methods whose pretraining is the same for all.
    Of a domain that is given by its histogram the models are pretrained and handed over.

    Args:
        out: run folder, or the URL of one in a store (:mod:`planearly.stages.mirror`).
        share: what to give away at the end (:mod:`planearly.stages.exchange`).
        to: URL of a folder to publish the models in at the end (:func:`publish`).

    Returns:
        The contents of results.json when the run got that far.

    Raises:
        UserError: a recipe that cannot work.
    """
    why, recipe = sizes.why_slices(recipe), sizes.settled(recipe)
    trained.check(recipe)
    if why:
        say(f"projected network: {why}")
    if told := adapt.unread(recipe, recipe.methods):
        say(told)
    corpus.check(recipe)
    if to is not None:
        storage.check_writable(to)
    rows = [methods.of(recipe, name) for name in recipe.methods]
    reach = VERBS.index(until)
    if recipe.mixture.expert is not None and reach > VERBS.index("pretrain"):
        raise UserError("recipe key 'mixture.expert' trains one expert of the mixture alone: use "
                        "'planearly pretrain', and leave the key out once all are trained")
    if not rows and reach > VERBS.index("weigh"):
        raise UserError(
            f"the bundle {recipe.bundle} holds clusters alone, by which a histogram is counted: "
            "planearly weigh BUNDLE DOCUMENTS --share histogram.json" if recipe.bundle else
            "recipe key 'methods' is empty: name at least one, as methods=[slm-is]")
    if reach > VERBS.index("weigh"):
        bundled.check_generic(recipe)
    mirror = Mirror(str(out)) if storage.is_url(out) else None
    if mirror:
        storage.check_writable(mirror.url)
    with Run(mirror.folder if mirror else Path(out), recipe, mirror=mirror).opened() as this:
        names = corpus.domain_names(this)
        given, texts = corpus.histograms(this), corpus.texts(this)
        exchange.check(this, rows)
        for row in rows:
            if reach > VERBS.index("cluster") and (row.per_domain or (
                    row.adapts and reach == VERBS.index("weigh"))):
                corpus.needed_domains(this, f"the pretraining of {row.name}")
        if reach > VERBS.index("pretrain"):
            corpus.needed_domains(this, "fine-tuning")
        for name in texts:
            corpus.split(this, name)  # one that is not there is told before the corpus is read
        trained.check_tokens(this)
        if recipe.reads_generic:
            corpus.kept(this)
        if reach >= VERBS.index("cluster") and recipe.pretrain_tokens:
            for name in names:
                (clusters.received if name in given else clusters.domain_clusters)(this, name)
        if reach >= VERBS.index("weigh"):
            both = [(name, row) for name in names for row in rows]
            worth = this.divided([partial(trained.weigh, this, row, name) for name, row in both])
            if until == "weigh":
                _show_foresight([(name, row.name, facts(stage)) for (name, row), stage
                                 in zip(both, worth, strict=True) if stage])
        if reach >= VERBS.index("pretrain"):
            checkpoint.tell_beginning(this, next(iter(texts), ""))
            _spread(this, until)
            this.divided(pretrainings(this))
            for row in rows if not recipe.bundle and recipe.mixture.expert is None else ():
                # a checkpoint that is adapted from goes over as it is
                if (row.bundled and not (row.adapts and getattr(recipe, row.start))
                        and (base := trained.pretrain(this, row.name))):
                    bundle = bundled.save_bundle(this, row, base) / "bundle"
                    say("for other domains: planearly specialize "
                        f"{shlex.quote(str(bundle))} DOCUMENTS"
                        + (" 'generic=[CORPUS]'" if row.adapts else ""))
            for name in given:
                for row in rows:
                    if exchange.draws_by_histogram(recipe, row):
                        exchange.handed(this, row, name)
            if given and reach > VERBS.index("pretrain"):
                say(f"{', '.join(given)}: given without texts, so not fine-tuned or evaluated here")
        if share:
            share(this)
        if reach < VERBS.index("specialize") or (given and not texts):
            return finish(this, until, to=to)
        every = this.divided(specializations(this))
        if reach >= VERBS.index("evaluate"):
            this.divided([partial(evaluations, this, one) for one in every])
        if reach < VERBS.index("export"):
            return finish(this, until, to=to)
        with this.claimed(this.out / "results"):  # one after the other, where several share it
            results = write_results(this, every)
            if parallel.rank() == 0 and reach >= VERBS.index("report"):
                from planearly.stages.report import write

                with this.by_first_alone():
                    page = write(this, every, results)
                show(results)
                say(f"report: {page}")
        return finish(this, until, results, to)


def pretrainings(this: Run) -> list[Callable[[], Path | None]]:
    """What makes the pretrainings of a run; without domains, what is the same for every one."""
    return [partial(trained.pretrain, this, method, name)
            for name in corpus.domain_names(this) or [""] for method in this.recipe.methods]


def specializations(this: Run) -> list[Callable[[], trained.Trained]]:
    """What fine-tunes on the domains of a run."""
    return [partial(trained.specialize, this, method, name)
            for name in corpus.texts(this) for method in this.recipe.methods]


@shard_function
def make_trainings(item: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Train and evaluate what no other worker does, up to the verb ``until``."""
    with joined(item) as (recipe, out):
        this, reach = Run(out, recipe), VERBS.index(item["until"])
        this.divided(pretrainings(this))
        every = this.divided(specializations(this)) if reach >= VERBS.index("specialize") else []
        if reach >= VERBS.index("evaluate"):
            this.divided([partial(evaluations, this, one) for one in every])
    return {}


def _spread(this: Run, until: str) -> None:
    """Have workers of the cluster make the trainings that are not finished, if there are any."""
    recipe, reach = this.recipe, VERBS.index(until)
    if not can_spread(this) or recipe.mixture.expert is not None:
        return
    finished = Run(this.out, recipe, build=False, mirror=this.mirror)

    def scored(task: Callable[[], trained.Trained]) -> None:
        one = task()
        if reach >= VERBS.index("evaluate"):
            evaluations(finished, one)

    def missing(tasks: Sequence[Callable[[], Any]]) -> list[str]:
        """The first stage of each that is not finished."""
        found = []
        for task in tasks:
            try:
                task()
            except Missing as stage:
                found.append(str(stage))
        return found

    first = set(missing(pretrainings(finished)))
    experts = recipe.mixture.experts if first and any(
        methods.find(method).bank == "mixture" for method in recipe.methods) else 0
    tuned = missing([partial(scored, task) for task in specializations(finished)]
                    if reach >= VERBS.index("specialize") else [])
    if first or tuned:
        most = max(len(first) + experts, len(tuned))
        spread_trainings(this, "trainings", make_trainings,
                         min(most, recipe.processes or most), until=until)


def publish(this: Run, to: str) -> None:
    """Publish in a folder of a store what is of use elsewhere: models, bundles, results, the page.

    Their places are those in the run folder, so the results and the page name them rightly; a run
    with other settings adds to them. What is there already is not sent again.
    """
    folders = [(stage / name, last) for stage in this.used
               for kind, name, last in (("model", "export", "config.json"),
                                        ("bundle", "bundle", "bundle.json"))
               if stage.parent == this.out / kind and (stage / name).is_dir()]
    sent = sum(storage.publish(
        {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))
         if path.is_file()}, storage.join(to, folder.relative_to(this.out).as_posix()), last)
        for folder, last in folders)
    files = [this.out / name for name in (RECIPE, PAGE, RESULTS)]
    sent += storage.publish({path.name: path for path in files if path.is_file()}, to,
                            RESULTS)
    say(f"published in {to}: models and bundles {len(folders)}, files sent now {sent}")


def finish(this: Run, until: str, results: dict[str, Any] | None = None,
           to: str | None = None) -> dict[str, Any] | None:
    """Publish, if that is asked for; say what was made, and what to do next."""
    if parallel.rank() > 0:
        return results
    if to is not None:
        publish(this, to)
    say(f"{until}: {len(this.made)} stages made, {len(this.reused)} were there already, "
        f"in {this.out}")
    if results:
        best = min(results["rows"], key=lambda r: r["ppl_after"])
        model = shlex.quote(str(this.out / best["model"]))
        say(f"try it: planearly generate {model} \"...\"")
    elif until != VERBS[-1] and this.recipe.methods and (
            corpus.texts(this) or not corpus.domain_names(this)):
        named = "" if corpus.domain_names(this) else " and 'domains=[FOLDER_OF_YOUR_DOCUMENTS]'"
        say(f"next: the same command with 'run'{named} goes on from here")
    return results


def _show_foresight(told: list[tuple[str, str, dict[str, Any]]]) -> None:
    """What drawing the corpus is worth, by domain and method: a table on standard output."""
    if not told or parallel.rank() > 0:
        return
    table = PlainTable("domain", "method", "foreseen, nats per token", "95% interval",
                       "tokens counted")
    for domain, method, found in told:
        low, high = found["ci95"]
        table.add_row(domain, method, f"{found['gain']:.2f}", f"{low:.2f} to {high:.2f}",
                      short(found["tokens"]))
    Console(width=None if Console().is_terminal else 140).print(table)
    resampled = [found["gain"] for _, method, found in told
                 if methods.find(method).draws == "importance"]
    if resampled:
        say("for a plan: planearly plan --foreseen "
            f"{sum(resampled) / len(resampled):.2f} (of importance sampling, the domains' mean)")


def show(results: dict[str, Any]) -> None:
    """The table of results on standard output."""
    table = PlainTable("domain", "method", "before", "after fine-tuning", "95% interval",
                       "bits/byte", "parameters", "tokens", "FLOPs", "device time")
    for row in results["rows"]:
        low, high = row["ppl_after_ci"]
        cost = row["cost"]
        before = f"{row['ppl_before']:.2f}" if row["ppl_before"] else "-"
        table.add_row(
            row["domain"], row["method"], before, f"{row['ppl_after']:.2f}",
            f"{low:.2f} to {high:.2f}", f"{row['bpb_after']:.3f}", short(row["inference_params"]),
            short(cost["tokens"]), prefixed(cost["flops"]), duration(cost["device_hours"] * 3600),
        )
    Console(width=None if Console().is_terminal else 140).print(table)
    for pair in results["comparisons"]:
        say(sentences.compared(pair))

