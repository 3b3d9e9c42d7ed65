"""The verbs as functions of Python: ``planearly.run``, ``plan``, ``evaluate`` and others.

Recipe keys are keyword arguments: a section as a dict (``model={"layers": 2}``), or one key by its
dotted name (``**{"model.layers": 2}``). What goes wrong by the caller's doing raises
:class:`planearly.UserError`, with one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planearly import config, storage, usage
from planearly.errors import UserError

if TYPE_CHECKING:
    from planearly.keys import Recipe
    from planearly.plan.recommend import Plan

PathLike = str | Path


def run(recipe: PathLike | Mapping[str, Any] | Recipe, out: PathLike | None = None, *,
        until: str = "report", share: PathLike | None = None, epsilon: float | None = None,
        to: str | None = None, **changes: Any) -> dict[str, Any] | None:
    """``planearly run``: all of a recipe, or its stages up to a verb; what is done is kept.

    Args:
        recipe: a recipe file, the name of one of the package, a recipe's keys and values, or the
            folder of a bundle.
        out: run folder, or its URL in a store; None takes ``runs/NAME``.
        until: prepare, cluster, weigh, pretrain, specialize, evaluate, export or report.
        share: with ``until="cluster"`` a folder for the clusters, with ``"weigh"`` a file for the
            histogram of the domain.
        epsilon: of the noise on that histogram.
        to: URL of a folder in a store to publish models, bundles, results and page in at the end.
        changes: recipe keys.

    Returns:
        The contents of results.json, where the run got that far: ``rows`` with a perplexity and a
        cost for each domain and method, ``comparisons`` and more.

    Raises:
        UserError: a recipe that cannot work, or bad data.
    """
    usage.supported()
    place = usage.local(share)
    if (place and until not in ("cluster", "weigh")) or (
            epsilon is not None and (until, bool(place)) != ("weigh", True)):
        raise UserError("clusters are shared by 'cluster --share FOLDER', a histogram by 'weigh "
                        "--share FILE', to which --epsilon adds noise")
    loaded = _recipe(recipe, changes)
    from planearly.stages import exchange, pipeline  # after the keys are read: torch takes seconds

    if until not in pipeline.VERBS:
        raise UserError(f"until='{until}': choose from {', '.join(pipeline.VERBS)}")
    if place is not None:
        exchange.check_place(place, until)
    return pipeline.run(
        loaded, usage.run_folder(out) or Path("runs") / loaded.name, until,
        None if place is None else (lambda run: exchange.share_clusters(run, place))
        if until == "cluster" else (lambda run: exchange.share_histogram(run, place, epsilon)), to)


def plan(recipe: PathLike | Mapping[str, Any] | Recipe | None = None, out: PathLike | None = None,
         *, device: str | None = None, html: PathLike | None = None,
         **asked: Any) -> dict[str, Any]:
    """``planearly plan``: which method to choose and what each would cost, before anything runs.

    Args:
        recipe: tell what this recipe will cost, instead of recommending; ``asked`` are its keys.
        out: folder for plan.json, plan.html and recipes.
        device: ``a100``, ``h100``, ...; None is this machine's own.
        html: file for one page, on which limits, budgets and domains can be moved.
        asked: the options of the command, with underscores: ``inference_params="126M"``,
            ``generic_tokens="150B"``, ``spec_tokens=["1M"]``, ``generic_hours="650"``.

    Returns:
        What ``planearly plan --json`` prints: ``recommended``, ``reason``, ``methods`` and more.

    Raises:
        UserError: a quantity that cannot be read, or a setting that cannot be planned.
    """
    if recipe is not None:
        if out is not None or html is not None:
            raise UserError("'out' and 'html' are of a plan that recommends a method: leave them "
                            "out, or the recipe")
        return predict(_recipe(recipe, asked), device)
    if "spec_tokens" in asked:
        asked["spec_tokens"] = _many(asked["spec_tokens"])
    return planned(usage.local(out), device=device, html=usage.local(html), **asked)[1]


def planned(out: Path | None, *, device: str | None, html: Path | None = None,
            **asked: Any) -> tuple[Plan, dict[str, Any]]:
    """A plan, as it is and as plain values; written to ``out`` and ``html`` if they are given."""
    from planearly.cost import devices
    from planearly.plan import inputs, page, recommend

    if html is not None:
        page.check_page(html)
    made = recommend.recommend(inputs.read(device=devices.find_or_nearest(device), **asked))
    generic = inputs.paths([str(asked.get("generic_tokens", "0"))])
    domains = inputs.paths(asked.get("spec_tokens") or ())
    if out is not None:
        page.write(out, made, generic, domains)
    if html is not None:
        page.write_page(html, made, limits=True)
    return made, page.content(made, generic, domains)


def predict(recipe: Recipe, device: str | None = None) -> dict[str, Any]:
    """What a recipe will cost, stage by stage."""
    from planearly.cost import devices
    from planearly.plan.predict import predict as stages

    wanted = devices.in_bf16(recipe.pretrain.precision)
    return stages(recipe, devices.find_or_nearest(device, wanted))


def evaluate(model: PathLike, documents: PathLike | Sequence[PathLike], *,
             context: int | None = None, text_field: str = "text") -> dict[str, Any]:
    """``planearly evaluate``: perplexity and bits per byte of a model folder on documents.

    Args:
        model: folder in Hugging Face format, or its URL.
        documents: files, folders, globs, URLs (``s3://...``) or ``hf://NAME``.
        context: most targets of a window; None takes what the model reads, at most 1,024.
        text_field: field of JSONL or Parquet records that holds the text.

    Returns:
        ``perplexity``, ``bits_per_byte``, ``ci95``, ``tokens`` and more of all documents, and under
        ``files`` those of each file.

    Raises:
        UserError: no model, no documents, or a context that the model cannot read.
    """
    from planearly.evaluate.files import evaluate_files

    return evaluate_files(model_folder(model), _many(documents), context=context,
                          text_field=text_field)


def generate(model: PathLike, prompt: str, *, tokens: int = 80, temperature: float = 0.8,
             top_p: float = 0.95, seed: int = 0) -> str:
    """``planearly generate``: the prompt and its continuation by a model folder.

    Args:
        model: folder in Hugging Face format, or its URL.
        tokens: most new ones.
        temperature: 0 takes the likeliest token every time.
        top_p: draws from the smallest set of tokens with this probability.
        seed: of the draws.
    """
    from planearly.generate import generate as continued

    return continued(model_folder(model), prompt, tokens, temperature, top_p, seed)


def specialize(bundle: PathLike, documents: PathLike | Sequence[PathLike],
               out: PathLike | None = None, **changes: Any) -> dict[str, Any] | None:
    """``planearly specialize BUNDLE DOCUMENTS``: a small model for a new domain, where it is.

    Args:
        bundle: folder that the pretraining of a method with experts or of one that adapts left, or
            its URL; of the latter ``generic`` is needed too.
        documents: of the domain.
        out: run folder; None takes ``runs/specialize``.
        changes: recipe keys that the bundle does not settle.

    Returns:
        As :func:`run`.
    """
    usage.supported()
    from planearly.stages import bundled, pipeline

    made = bundled.from_bundle(bundle, _many(documents), [])
    made = config.variant(made, changes) if changes else made
    return pipeline.run(made, usage.run_folder(out) or Path("runs") / made.name)


def model_folder(model: PathLike) -> Path:
    """A model's folder; of a URL, its copy."""
    from planearly.model.starts import WANTED

    return storage.local(str(model), WANTED)


def _recipe(recipe: PathLike | Mapping[str, Any] | Recipe, changes: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, str | Path):
        copied = storage.local(recipe) if storage.is_url(recipe) else recipe
        if not Path(copied).is_dir():
            return config.load(copied, changes=changes)
        from planearly.stages.bundled import from_bundle

        documents = _many(changes.get("domains", []))
        rest = {key: value for key, value in changes.items() if key != "domains"}
        return config.variant(from_bundle(recipe, documents, []), rest)
    values = recipe if isinstance(recipe, Mapping) else recipe.to_dict()
    return config.override(values, changes=changes)


def _many(documents: PathLike | Sequence[PathLike]) -> list[str]:
    """One or several, as several."""
    several = isinstance(documents, Sequence) and not isinstance(documents, str)
    return [str(one) for one in documents] if several else [str(documents)]  # type: ignore
