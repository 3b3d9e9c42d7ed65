"""SLM-pn and SLM-mix: one pretraining for all domains, an expert for each (paper, section 3)."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from planearly import config, keys, parallel, tensors
from planearly.cost import ledger
from planearly.cost.model import EXPERT_CHOICE_TOKENS
from planearly.errors import UserError
from planearly.evaluate import perplexity
from planearly.evaluate.perplexity import mean_nll
from planearly.export import bundle as bundles
from planearly.files import read_array
from planearly.model import choice, flops
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.parallel import bf16_is_fast
from planearly.progress import say
from planearly.stages import checkpoint, clusters, corpus, training
from planearly.stages.evaluate import Trained
from planearly.stages.folder import Run, facts, once
from planearly.train import loop


def count(recipe: keys.Recipe, method: str) -> int:
    """Experts of a method, one per cluster."""
    return recipe.projected.experts if method == "slm-pn" else recipe.mixture.experts


def check(recipe: keys.Recipe, method: str) -> None:
    """Refuse a number of experts without its clustering."""
    place = "projected.experts" if method == "slm-pn" else "mixture.experts"
    if count(recipe, method) not in recipe.cluster.k:
        raise UserError(f"recipe key '{place}' is {count(recipe, method)}, one expert per cluster: "
                        f"it must be among 'cluster.k', {recipe.cluster.k}")
    alone = recipe.mixture.expert
    if method == "slm-mix" and alone is not None and not 0 <= alone < recipe.mixture.experts:
        raise UserError(f"recipe key 'mixture.expert' is {alone}; the experts are 0 to "
                        f"{recipe.mixture.experts - 1}")


@once
def trained_rows(run: Run, method: str) -> tuple[Path, np.ndarray]:
    """The generic rows of the experts' clusters, and how many each has, float64 [k].

    Raises:
        UserError: a cluster has none.
    """
    packed = clusters.rows(run, count(run.recipe, method))
    weights = clusters.generic_weights(packed)
    bundles.check_counts(weights, "the generic corpus")
    return packed, weights


@once
def pretrained_pn(run: Run, domain: str = "") -> Path:
    """The projected network on the generic corpus, every row through its cluster's expert."""
    if run.recipe.bundle:
        return bundled(run)
    settings = run.recipe.projected
    shape = training.shape_of(run)
    packed, weights = trained_rows(run, "slm-pn")

    def network() -> Projected:
        begun = checkpoint.checkpoint(run)
        if begun is None:
            return Projected(shape, settings, run.recipe.seed)
        path = begun / loop.FINAL
        return Projected.from_dense(
            tensors.load_tensors(path)[0], shape, settings, run.recipe.seed, str(path))

    return training.pretrain(
        run, "slm-pn", packed, weights,
        network=network,
        flops_per_step=flops.projection_per_step(shape, settings, len(weights)),
        settings={"projected": {**asdict(settings), "tune_vector": False}},  # a later stage's
    )


@once
def pretrained_expert(run: Run, expert: int) -> Path:
    """One expert of the mixture: a plain model on its cluster's rows, for its share of the steps.

    Experts share nothing, so each can be trained on another machine (``mixture.expert``).
    """
    packed, weights = trained_rows(run, "slm-mix")
    alone = np.zeros_like(weights)
    alone[expert] = 1.0
    return training.pretrain(
        run, f"slm-mix-expert{expert:03d}", packed, alone,
        share_of_steps=float(weights[expert] / weights.sum()),
    )


def mixture_members(run: Run) -> list[Path]:
    return [pretrained_expert(run, i) for i in range(run.recipe.mixture.experts)]


@once
def pretrained_mix(run: Run, domain: str = "") -> Path:
    """All experts of the mixture, gathered; or only the one that ``mixture.expert`` names."""
    if run.recipe.bundle:
        return bundled(run)
    recipe = run.recipe
    if recipe.mixture.expert is not None:
        return pretrained_expert(run, recipe.mixture.expert)
    members = mixture_members(run)

    def build(folder: Path) -> dict[str, Any]:
        shape = Shape(**facts(members[0])["shape"])
        mixture = Mixture(shape, len(members), recipe.seed)
        for i, member in enumerate(members):
            path = member / loop.FINAL
            tensors.set_weights(mixture.model(i), tensors.load_tensors(path)[0], path)
        tensors.save_tensors(folder / loop.FINAL, tensors.weights(mixture), {})
        return {"shape": shape.to_dict()}

    return run.stage("mixture", {}, {f"{i:03d}": m for i, m in enumerate(members)}, build)


PRETRAINED = {"slm-pn": pretrained_pn, "slm-mix": pretrained_mix}


def load(run: Run, method: str) -> choice.Experts:
    """The pretrained network or mixture."""
    stage = PRETRAINED[method](run)
    shape = Shape(**facts(stage)["shape"])
    model: choice.Experts
    if method == "slm-pn":
        model = Projected(shape, run.recipe.projected)
    else:
        model = Mixture(shape, run.recipe.mixture.experts)
    path = stage / loop.FINAL
    tensors.set_weights(model, tensors.load_tensors(path)[0], path)
    return model


@once
def chosen(run: Run, method: str, name: str) -> Path:
    """The domain's expert as a dense model, ready for fine-tuning, and why it was chosen."""
    recipe = run.recipe
    k = count(recipe, method)
    base, mine = PRETRAINED[method](run), clusters.domain_clusters(run, name)
    settings: dict[str, Any] = {
        "rule": recipe.expert, "spec_tokens": recipe.spec_tokens, "seed": recipe.seed, "k": k,
        "tune_vector": recipe.projected.tune_vector and method == "slm-pn",
    }
    if recipe.expert == "best-tuned" or settings["tune_vector"]:
        settings["finetune"] = training.train_settings(recipe.finetune)
        settings["valid_tokens"] = recipe.data.valid_tokens
    sample, part = choice_windows(run, name)
    if recipe.expert == "lowest-loss" and part:
        settings["choice_tokens"] = EXPERT_CHOICE_TOKENS

    def build(folder: Path) -> dict[str, Any]:
        model = load(run, method)
        dataset, used = corpus.specialization_windows(run, name)
        size = np.asarray(dataset.windows["length"][used], np.float64)
        share = np.bincount(read_array(mine / f"assignment-{k}.npy")[used], size, k)
        if method == "slm-mix" and recipe.expert == "blend":
            say("  warning: the average of a mixture's weights was measured to be worse than its "
                "best expert; 'expert=lowest-loss' is the default")

        def loss(dense: Transformer) -> float:
            bf16 = bf16_is_fast(dense.embed.weight.device)
            return mean_nll(dense, dataset, sample, bf16=bf16)

        spent = Spent()

        def tune(expert: int, state: dict[str, Tensor]) -> float:
            dense = Transformer(model.shape)
            tensors.set_weights(dense, state, f"expert {expert}")
            outcome = training.finetune(run, name, loop.Dense(dense), folder / f"tuned-{expert}",
                                        f"{method}.{name}, expert {expert}")
            spent.add(outcome.tokens, flops.training(model.shape), outcome.seconds)
            assert outcome.best_validation is not None
            return outcome.best_validation

        began = time.monotonic()
        picked = choice.choose(model, recipe.expert, share, loss=loss, tune=tune, of=part)
        if recipe.expert == "lowest-loss":
            tokens = k * float(dataset.windows["length"][sample].sum())
            spent.add(tokens, flops.forward(model.shape), time.monotonic() - began)
        which: int | Tensor = picked.which
        say(f"  {picked.reason}")
        if settings["tune_vector"]:
            assert isinstance(model, Projected)
            which, outcome = training.finetune_vector(
                run, name, model, model.vector(which), folder / "vector", f"{method}.{name} vector")
            spent.add(outcome.tokens, flops.training(model.shape), outcome.seconds)
        tensors.save_tensors(folder / loop.FINAL, model.materialise(which), {})
        centroids = read_array(clusters.clusters(run) / f"centroids-{k}.npy")
        return {
            "shape": model.shape.to_dict(), "choice": picked.facts(),
            "similarity": choice.similarity(model, centroids), "histogram": share / share.sum(),
            "cost": spent.booked(run, f"expert/{method}.{name}"),
        }

    return run.stage(f"expert/{method}.{name}", settings,
                     {"model": base, "domain-clusters": mine}, build,
                     every_rank="finetune" in settings)


def choice_windows(run: Run, name: str) -> tuple[np.ndarray, str]:
    """Windows that every expert is scored on before fine-tuning, and what part of the set they are.

    The documents that a smaller ``spec_tokens`` would take: int64 [n], sorted; and "" or "a sample
    of N tokens of ".
    """
    dataset, used = corpus.specialization_windows(run, name)
    if dataset.windows["length"][used].sum() <= EXPERT_CHOICE_TOKENS:
        return used, ""
    allowed = ~read_array(corpus.domain(run, name) / "train-excluded.npy")
    sample = corpus.documents_up_to(dataset, allowed, EXPERT_CHOICE_TOKENS, run.recipe.seed)
    return sample, f"a sample of {dataset.windows['length'][sample].sum()} tokens of "


class Spent:
    """Tokens, FLOPs and seconds of all devices that choosing an expert took."""

    def __init__(self) -> None:
        self.tokens = self.flops = self.seconds = 0.0

    def add(self, tokens: float, flops_per_token: float, seconds: float) -> None:
        self.tokens += tokens
        self.flops += tokens * flops_per_token
        self.seconds += seconds * parallel.world()  # every process is held meanwhile

    def booked(self, run: Run, stage: str) -> dict[str, Any]:
        return ledger.book(stage, self.tokens, self.flops, self.seconds,
                           price_per_hour=run.recipe.cost.price_per_hour,
                           currency=run.recipe.cost.currency)


@once
def routed(run: Run, method: str) -> Path | None:
    """Perplexity on held-out generic text, each window through its own cluster's expert.

    So the paper reports generic perplexity (its table 8). None where only a bundle is at hand.
    """
    if run.recipe.bundle:
        return None
    k = count(run.recipe, method)
    inputs = {"model": PRETRAINED[method](run), "kept": corpus.kept(run),
              "clusters": clusters.clusters(run)}

    def build(folder: Path) -> dict[str, Any]:
        model = load(run, method)
        dataset, windows = corpus.generic_test(run)
        cluster = read_array(inputs["clusters"] / f"assignment-{k}.npy")[windows]
        parts = []
        for expert in np.unique(cluster):
            dense = Transformer(model.shape)
            tensors.set_weights(dense, model.materialise(int(expert)), f"expert {expert}")
            parts.append(perplexity.evaluate(
                perplexity.forward_of(dense.to(parallel.device())), dataset,
                windows[cluster == expert]))
        together = perplexity.Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        return {"generic": perplexity.summary(*together.units(),
                                              corpus.text_bytes(dataset, windows))}

    return run.stage(f"evaluate/{method}.generic", {"k": k}, inputs, build)


def specialize(run: Run, method: str, name: str) -> Trained:
    """The chosen expert, fine-tuned."""
    base = PRETRAINED[method](run)
    expert = chosen(run, method, name)
    tuned = training.specialize(run, f"{method}.{name}", name, expert)
    shape = Shape(**facts(expert)["shape"])
    total = (flops.projected_parameters(shape, run.recipe.projected) if method == "slm-pn"
             else flops.mixture_parameters(shape, run.recipe.mixture.experts))
    choice = facts(expert)["choice"]
    notes = {"expert": choice["rule"], "expert_number": choice["expert"],
             "expert_share": choice["share"], "k": count(run.recipe, method)}
    generic = mixture_members(run) if method == "slm-mix" and not run.recipe.bundle else [base]
    return Trained(method, name, expert, tuned, generic, [expert, tuned], params=total,
                   routed=lambda: routed(run, method), notes=notes)


# Bundles ----------------------------------------------------------------------------------------

def save_bundle(run: Run, method: str) -> Path:
    """The pretrained model as a self-contained folder, ``bundle/`` of the stage."""
    base = PRETRAINED[method](run)
    clustered = clusters.clusters(run)
    k = count(run.recipe, method)
    _, trained = trained_rows(run, method)
    finest, parent = clusters.lineage(run, k)

    def build(folder: Path) -> None:
        bundles.save_bundle(
            folder / "bundle", load(run, method), clusters=bundles.Clusters(
                read_array(clustered / f"centroids-{k}.npy"), trained, finest, parent),
            embedder=clusters.embedder(run),
            tokenizer_folder=corpus.tokenizer_folder(run), recipe=run.recipe,
        )

    settings = {"recipe": bundles.kept_recipe(run.recipe)}
    return run.stage(f"bundle/{method}", settings, {"model": base, "clusters": clustered}, build)


@once
def bundled(run: Run) -> Path:
    """The model of the recipe's bundle, as if it had been pretrained in this run."""
    source = corpus.bundle(run)

    def build(folder: Path) -> dict[str, Any]:
        info = facts(source)
        shutil.copyfile(source / "bundle" / "weights.safetensors", folder / loop.FINAL)
        return {"shape": info["shape"], "cost": ledger.book("bundle", 0, 0, 0)}

    return run.stage(f"pretrain/{facts(source)['kind']}", {}, {"bundle": source}, build)


_FIXED = ("generic", "methods", "pretrain_tokens", "cluster.k", "cluster.nested",
          "finetune.replay_share", "tokenizer.", "model.", "projected.", "mixture.", "pretrain.")
"""Recipe keys, and beginnings of keys, that are a bundle's to say."""


def from_bundle(folder: Path, documents: list[str], overrides: list[str]) -> keys.Recipe:
    """The recipe that specialises a bundle on documents: all of them, unless overridden.

    Raises:
        UserError: not a bundle, or not whole.
    """
    values = _brought(folder).to_dict()
    return config.override({**values, "domains": documents, "name": "specialize"}, overrides)


def _brought(folder: Path) -> keys.Recipe:
    """What a bundle says of a recipe that specialises it: without a generic corpus to read."""
    info = bundles.read_info(folder)
    return config.variant(info["recipe"], {
        "bundle": str(folder), "methods": [info["kind"]], "finetune.replay_share": 0.0,
        "cluster.k": sorted({info["experts"], info["finest"]}), "cluster.nested": True,
    })


def check_bundle(recipe: keys.Recipe) -> None:
    """Refuse a recipe that contradicts its bundle.

    Raises:
        UserError: a key that the bundle fixes has another value, or the context is longer.
    """
    if not recipe.bundle:
        return
    brought = _brought(Path(recipe.bundle).expanduser())
    for place, asked in config.leaves(recipe.to_dict()):
        if (place.startswith(_FIXED) and place != "projected.tune_vector"
                and asked != config.value_of(brought, place)):
            raise UserError(f"recipe key '{place}' is {asked}, but that is settled in the bundle "
                            f"{recipe.bundle}: leave the key out")
    if recipe.context > brought.context:
        raise UserError(f"recipe key 'context' is {recipe.context}, and the experts of the bundle "
                        f"{recipe.bundle} read {brought.context} tokens: give at most that")
