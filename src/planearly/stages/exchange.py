"""Between a domain's owner and who pretrains for it: clusters, a histogram, and a model go over.

Who has the generic corpus gives its clusters away (:func:`share_clusters`); the owner counts how
often the domain's documents fall into each (:func:`share_histogram`) and gives that back; from it
the corpus is weighed (:func:`planearly.stages.clusters.importance_weights`), a model is pretrained
or adapted and handed over (:func:`handed`), and its owner fine-tunes it at home. No text leaves.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from planearly import files, keys, methods, parallel, tensors
from planearly.cluster import histogram, shared
from planearly.errors import UserError
from planearly.export import bundle as bundles
from planearly.export.folder import export
from planearly.files import atomic_write, read_array
from planearly.methods import GENERIC, Method
from planearly.progress import say
from planearly.stages import checkpoint, clusters, corpus, experts, finetune, trained, training
from planearly.stages.evaluate import total_cost
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train import loop

TUNE = "tune.yaml"
"""Beside a model that is handed over: the recipe that fine-tunes it."""
_BY_HISTOGRAM = {None, GENERIC, "importance"}
"""How a method may draw that needs no more of a domain than its histogram."""
EPSILONS = (1e-3, 1e3)
"""Below, nothing is left of any histogram; above, nothing is hidden."""


def check_place(out: Path, until: str) -> None:
    """Refuse a place for what is given away that holds something else, before anything is made.

    Args:
        until: ``cluster`` for the clusters of a run, ``weigh`` for a domain's histogram.

    Raises:
        UserError: as :func:`planearly.files.check_place`.
    """
    if until == "cluster":
        files.check_place(out, "a bundle of clusters", bundles.of_clusters, folder=True)
    else:
        files.check_place(out, "a histogram", shared.is_shared)


# From who pretrains -----------------------------------------------------------------------------

def share_clusters(run: Run, out: Path) -> Path:
    """Write the clusters of the generic corpus as a bundle for owners of domains.

    Raises:
        UserError: the run has them from a bundle itself.
    """
    if run.recipe.bundle:
        raise UserError(f"the clusters are those of the bundle {run.recipe.bundle} already: give "
                        "that away")
    arrays, ks = clusters.arrays(run)
    by = facts(clusters.clusters(run))["embedder"]
    if parallel.rank() == 0:
        bundles.save_clusters(out, arrays, ks, embedder=by,
                              tokenizer_folder=corpus.tokenizer_folder(run), recipe=run.recipe)
    say(f"{out}: {' and '.join(map(str, ks))} clusters; an owner counts documents by it with: "
        f"planearly weigh {out} DOCUMENTS --share histogram.json")
    return out


def check(run: Run, rows: list[Method]) -> None:
    """Refuse methods that cannot do with a histogram, if the run has a domain without texts.

    Raises:
        UserError: names the method and what it lacks.
    """
    recipe, given = run.recipe, corpus.histograms(run)
    if not given:
        return
    if not recipe.pretrain_tokens:
        raise UserError(f"'{next(iter(given))}' is given by its histogram, which is for pretraining"
                        ", and recipe key 'pretrain_tokens' is 0: give a number of tokens")
    able = ", ".join(row.name for row in methods.TABLE.values() if draws_by_histogram(recipe, row))
    for row in rows:
        if row.needs_domain and not draws_by_histogram(recipe, row):
            change = [*(["adapt.draws=importance"] if row.adapts not in _BY_HISTOGRAM else []),
                      *(["expert=blend"] if row.bank and not experts.by_histogram(recipe) else []),
                      *(["projected.tune_vector=no"] if row.bank
                        and recipe.projected.tune_vector else [])]
            raise UserError(f"{row.name} needs the texts of '{next(iter(given))}', which is given "
                            "by its histogram: a histogram serves the methods that draw by it, "
                            f"{able}" + (f", and this one with '{' '.join(change)}'"
                                         if row.adapts else ""))
        for name, each in given.items():
            if row.needs_domain and row.bank and (
                    k := experts.count(recipe, row.name)) not in each.levels:
                raise UserError(f"the histogram of '{name}' counts "
                                f"{each.numbers} clusters, and "
                                f"{row.name} has an expert for each of {k}: ask its owner for "
                                "a histogram of that number")
        place = "adapt" if row.adapts else "pretrain"
        if row.needs_domain and getattr(recipe, place).specialization_share:
            raise UserError(f"recipe key '{place}.specialization_share' mixes in the text of "
                            f"'{next(iter(given))}', which is given by its histogram: set it to 0")
    if not any(draws_by_histogram(recipe, row) for row in rows):
        raise UserError(f"'{next(iter(given))}' is given by its histogram, by which none of the "
                        "recipe's methods draws: "
                        + ("give the bundle its documents" if recipe.bundle else
                           f"add one of {able}"))


def draws_by_histogram(recipe: keys.Recipe, row: Method) -> bool:
    """Whether a histogram is all that the method's pretraining has to know of a domain: what to
    draw, and which expert, if it has some."""
    row = methods.of(recipe, row.name)
    return row.needs_domain and {row.draws, row.adapts} <= _BY_HISTOGRAM and (
        row.bank is None or experts.by_histogram(recipe))


def handed(run: Run, row: Method, name: str) -> Path:
    """The model pretrained for a domain that is given by its histogram, as a Hugging Face folder
    under ``export/`` of the stage, with the recipe by which its owner fine-tunes it."""
    base = trained.pretrain(run, row.name, name)
    assert base is not None
    recipe, given = run.recipe, corpus.histograms(run)[name]
    tokens, companions = corpus.tokenizer_folder(run), checkpoint.companions(run, row.large)
    paid = _paid(run, base)
    begun = getattr(recipe, row.start)
    front = checkpoint.card_front(recipe, begun)
    shape, home = training.shape_made(base), _home(run, row, given)

    def build(folder: Path) -> None:
        state, _ = tensors.load_tensors(base / loop.FINAL)
        export(state, shape, tokens, folder / "export", {
            "method": row.name, "draws": row.adapts, "domain": name,
            "start": begun,
            "untuned": True, "front": front, "cost": total_cost(paid), "recipe": recipe.name,
            "seed": recipe.seed, "bundle": bool(recipe.bundle),
            "data": {"generic": recipe.generic, "pretrain_tokens": None if recipe.bundle else sum(
                facts(stage)["cost"]["tokens"] for stage in paid)},
        }, companions=companions / "files" if companions else None)
        with atomic_write(folder / "export" / TUNE, "w") as handle:
            handle.write(f"# fine-tunes this model, {row.name} for {name}: planearly run {TUNE} "
                         "start=THIS_FOLDER domains=[YOUR_DOCUMENTS]\n")
            yaml.safe_dump(home, handle, sort_keys=False)

    inputs = {"model": base, "tokenizer": tokens,
              **({"companions": companions} if companions else {})}
    made = run.stage(f"model/{row.name}.{name}", {"card": front, "tune": home}, inputs, build,
                     version=2 if companions else 1)
    model = made / "export"
    say(f"for the owner of {name}: {model}; at home: planearly run {model / TUNE} start={model} "
        "'domains=[DOCUMENTS]'")
    return made


def _paid(run: Run, stage: Path) -> list[Path]:
    """A stage and those that it was made from, of those that have a cost."""
    found, waiting = [], [stage]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.append(each)
            waiting += [Path(os.path.normpath(run.out / place))
                        for place in facts(each).get("folders", {}).values()]
    return [each for each in found if "cost" in facts(each)]


def _home(run: Run, row: Method, given: shared.Shared) -> dict[str, Any]:
    """The recipe by which an owner fine-tunes as this run would have, with the texts at hand."""
    recipe, context = run.recipe, run.recipe.context
    level = next(iter(given.levels.values()))
    tokens = max(round(float(level.counts.sum()) * context), 1)
    values = finetune.in_numbers(run, row.large, tokens) | {"replay_share": 0.0}
    own = asdict(keys.Finetune())
    return {"name": f"{recipe.name}-tuned", "seed": recipe.seed, "methods": ["slm"],
            "pretrain_tokens": 0, "context": context,
            "finetune": {key: value for key, value in values.items() if value != own[key]}}


# From the owner ---------------------------------------------------------------------------------

def share_histogram(run: Run, out: Path, epsilon: float | None = None) -> Path:
    """Write the histogram of the run's one domain, without noise or with that of ``epsilon``.

    Noise is added to one number of clusters alone: ``importance.k``, or the largest.

    Raises:
        UserError: no domain, several, or one without texts; an epsilon out of range.
    """
    recipe = run.recipe
    names = list(corpus.needed_domains(run, "a histogram"))
    if len(names) > 1:
        raise UserError(f"a histogram is of one domain, and there are {len(names)} "
                        f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): name one "
                        "with 'domains=[DOMAIN]'")
    name = names[0]
    if epsilon is not None and not EPSILONS[0] <= epsilon <= EPSILONS[1]:
        raise UserError(f"--epsilon: {epsilon:g} is no use; give a number from {EPSILONS[0]:g} to "
                        f"{EPSILONS[1]:g}, such as 1, where a smaller one hides more")
    dataset, used = corpus.specialization_windows(run, name)
    mine, by = clusters.domain_clusters(run, name), facts(clusters.clusters(run))["embedder"]
    of = np.asarray(dataset.windows["document"][used], np.int64)
    documents = len(np.unique(of))
    told = f"{documents} documents of {name}"
    levels: dict[int, shared.Level] = {}
    noise = 0.0
    if epsilon is None:
        for k in sorted(set(recipe.cluster.k)):
            generic = clusters.generic_counts(run, k)
            found, counts = clusters.smoothed(
                run, name, k, np.ones(k) if generic is None else generic)
            known = (None, None) if generic is None else (found.tau, found.gain)
            levels[k] = shared.Level(clusters.identity(run, k), counts, *known)
    else:
        k, context = recipe.importance.k or clusters.finest(run), dataset.context
        groups = read_array(mine / f"assignment-{k}.npy")[used]
        counts = shared.noisy(shared.bounded(
            groups, np.asarray(dataset.windows["length"][used], np.int64), of, k, context),
            epsilon, context) / context
        noise = shared.scale(epsilon, context) / context
        levels[k] = shared.Level(clusters.identity(run, k), counts)
    made = shared.Shared(by, documents, levels, epsilon, noise)
    if parallel.rank() == 0:
        made.save(out)
    if epsilon is not None:
        told += f", private by document at epsilon {epsilon:g}: " + _cost(run, name, made)
    say(f"{out}: {told}; {made.numbers} clusters, no text: whoever has the "
        f"generic corpus runs 'domains=[{out.name}]'")
    return out


def _cost(run: Run, name: str, made: shared.Shared) -> str:
    """What the noise takes from a histogram, in nats per window."""
    (k,) = made.levels
    generic = clusters.generic_counts(run, k)
    if generic is None:
        return "what the noise costs is not known, since the bundle does not tell how much " \
               "generic text its clusters hold"
    exact, noisy = clusters.smoothed(run, name, k, generic)[0], made.smoothed(k, generic)
    known = histogram.divergence(exact.p, np.asarray(generic, np.float64))
    return (f"the noise costs {histogram.divergence(exact.p, noisy.p):.3f} of the {known:.3f} nats "
            "per window by which the documents differ from generic text (this figure is of the "
            "documents themselves: it is not in the file)")
