"""Methods with a bank of experts: one pretraining for all domains, an expert for each (paper,
section 3)."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planearly import company, keys, methods, parallel, tensors
from planearly.cost import ledger
from planearly.cost.model import EXPERT_CHOICE_TOKENS
from planearly.data import limit
from planearly.errors import UserError
from planearly.evaluate import perplexity
from planearly.evaluate.perplexity import mean_nll
from planearly.export import bundle as bundles
from planearly.files import read_array, write_array
from planearly.model import choice, flops, outside, starts
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected, projected_names
from planearly.model.transformer import Shape, Transformer
from planearly.parallel import bf16_is_fast
from planearly.progress import say
from planearly.stages import adapt, checkpoint, clusters, corpus, finetune, pretrain, training
from planearly.stages.folder import Run, once
from planearly.stages.manifest import facts
from planearly.train import loop, optim
from planearly.train.steps import rows_per_step
from planearly.train.trainable import Dense


def count(recipe: keys.Recipe, method: str) -> int:
    """Experts of a method, one per cluster."""
    return (recipe.projected if _projects(method) else recipe.mixture).experts


def _projects(method: str) -> bool:
    """Whether the experts are those of a projected network (else a mixture's)."""
    return methods.find(method).bank == "projected"


def check(recipe: keys.Recipe, method: str) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        UserError: a number of experts without its clustering, one of them that is not there, fewer
            rows than blends in a step, or matrices or layers to project that the model has not.
    """
    place = f"{methods.find(method).bank}.experts"
    if count(recipe, method) not in recipe.cluster.k:
        raise UserError(f"recipe key '{place}' is {count(recipe, method)}, one expert per cluster: "
                        f"it must be among 'cluster.k', {recipe.cluster.k}")
    rows = rows_per_step(recipe.pretrain.step_tokens, recipe.context)
    if _projects(method) and recipe.projected.blends > rows:
        raise UserError(f"recipe key 'projected.blends' is {recipe.projected.blends}, and a step "
                        f"has {rows} rows ('pretrain.batch_tokens' over 'context'): each blend "
                        "needs one at least")
    if _projects(method):
        row = methods.find(method)
        shape = starts.shape(recipe, row.large) or Shape.of(
            getattr(recipe, row.key), recipe.tokenizer.vocab_size, recipe.context)
        assert isinstance(shape, Shape)  # as model.starts has checked
        projected_names(shape, recipe.projected)
    alone = recipe.mixture.expert
    if not _projects(method) and alone is not None and alone >= recipe.mixture.experts:
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


def pretrained_projected(run: Run, method: str) -> Path:
    """The projected network on the generic corpus, every row through its cluster's expert or the
    blend that it was drawn for; of a method that adapts, at the end of its constant rate."""
    settings = run.recipe.projected
    row = methods.find(method)
    shape = training.shape_of(run, row.large)
    assert isinstance(shape, Shape)  # as model.starts has checked
    packed, weights = trained_rows(run, method)

    blends = clusters.blends(run, len(weights)) if settings.blends else None

    def histograms() -> np.ndarray:
        assert blends is not None
        return read_array(blends / "histograms.npy", mapped=False)

    def network() -> Projected:
        begun = checkpoint.checkpoint(run, row.large)
        if begun is None:
            made = Projected(shape, settings, run.recipe.seed)
        else:
            path = begun / loop.FINAL
            made = Projected.from_dense(
                tensors.load_tensors(path)[0], shape, settings, run.recipe.seed, str(path))
        return made.train_on(torch.from_numpy(histograms())) if blends else made

    depends = {**asdict(settings), "tune_vector": False}  # a later stage's
    if not blends:
        del depends["blends"]  # which older versions did not have
    whole = pretrain.Network(
        network, flops.projection_per_step(shape, settings, settings.at_once),
        {"projected": depends}, {"blends": blends} if blends else {},
        (lambda: training.blend_stream(run, packed, histograms())) if blends else None)
    adapting = row if row.adapts else adapt.adapting(run.recipe, row.pretraining())
    begins = adapt.plateau(run, adapting, packed, weights, whole) if adapting else None
    if row.adapts:
        assert begins is not None  # as adapt.check has made sure
        return begins
    return pretrain.pretrain(run, row.pretraining(), packed, weights, large=row.large,
                             network=whole, begins=begins)


@once
def pretrained_expert(run: Run, method: str, expert: int) -> Path:
    """One expert of the mixture: a plain model on its cluster's rows, for its share of the steps.

    Experts share nothing, so each can be trained on another machine (``mixture.expert``).
    """
    packed, weights = trained_rows(run, method)
    alone = np.zeros_like(weights)
    alone[expert] = 1.0
    return pretrain.pretrain(
        run, f"{method}-expert{expert:03d}", packed, alone, large=methods.find(method).large,
        share_of_steps=float(weights[expert] / weights.sum()),
    )


def members(run: Run, method: str) -> list[Path]:
    """The experts of a mixture, each a pretraining; processes that share the folder divide them."""
    return run.divided([functools.partial(pretrained_expert, run, method, i)
                        for i in range(count(run.recipe, method))])


def pretrained_mixture(run: Run, method: str) -> Path:
    """All experts of the mixture, gathered; or only the one that ``mixture.expert`` names."""
    recipe = run.recipe
    if recipe.mixture.expert is not None:
        return pretrained_expert(run, method, recipe.mixture.expert)
    each = members(run, method)

    def build(folder: Path) -> dict[str, Any]:
        shape = Shape(**facts(each[0])["shape"])
        mixture = Mixture(shape, len(each), recipe.seed)
        for i, member in enumerate(each):
            path = member / loop.FINAL
            tensors.set_weights(mixture.model(i), tensors.load_tensors(path)[0], path)
        tensors.save_tensors(folder / loop.FINAL, tensors.weights(mixture), {})
        return {"shape": shape.to_dict()}

    return run.stage("mixture", {}, {f"{i:03d}": m for i, m in enumerate(each)}, build)


BANKS = {"projected": pretrained_projected, "mixture": pretrained_mixture}
"""By the table's column ``bank``: pretrains all experts."""


@once
def pretrained(run: Run, method: str) -> Path:
    """The pretrained experts, or those of the recipe's bundle."""
    if run.recipe.bundle:
        return checkpoint.bundled(run)
    return BANKS[str(methods.find(method).bank)](run, method)


def paid(run: Run, method: str) -> list[Path]:
    """The stages of the experts' pretraining that have a cost."""
    if run.recipe.bundle or _projects(method):
        return [pretrained(run, method)]
    return members(run, method)


def parameters(run: Run, method: str, expert: Path) -> int:
    """Trained parameters of all experts together, of which ``expert`` is a chosen one."""
    shape = Shape(**facts(expert)["shape"])
    if _projects(method):
        return flops.projected_parameters(shape, run.recipe.projected)
    return flops.mixture_parameters(shape, count(run.recipe, method))


def load(run: Run, method: str) -> choice.Experts:
    """The pretrained network or mixture."""
    stage = pretrained(run, method)
    shape = Shape(**facts(stage)["shape"])
    model = choice.empty(str(methods.find(method).bank), shape, run.recipe.mixture.experts,
                         run.recipe.projected)
    path = stage / loop.FINAL
    tensors.set_weights(model, tensors.load_tensors(path)[0], path)
    return model


def by_histogram(recipe: keys.Recipe) -> bool:
    """Whether the domain's expert is chosen by its histogram alone."""
    return recipe.expert in ("most-frequent", "blend") and not recipe.projected.tune_vector


@once
def chosen(run: Run, method: str, name: str) -> Path:
    """The domain's expert as a dense model, ready for fine-tuning, and why it was chosen."""
    recipe = run.recipe
    k = count(recipe, method)
    base, given = pretrained(run, method), name in corpus.histograms(run)
    mine = clusters.received(run, name) if given else clusters.domain_clusters(run, name)
    settings: dict[str, Any] = {
        "rule": recipe.expert, "spec_tokens": recipe.spec_tokens, "seed": recipe.seed, "k": k,
        "tune_vector": recipe.projected.tune_vector and _projects(method),
    }
    if recipe.expert == "best-tuned" or settings["tune_vector"]:
        settings["finetune"] = training.train_settings(recipe.finetune)
        width = outside.width_of(training.shape_of(run))
        whole = recipe.expert == "best-tuned"  # not a vector alone
        if changed := optim.finetuning_deviations(
                recipe.finetune, recipe.pretrain.optimizer, width,
                starts.folder(recipe) is not None, scaled=whole, decays=whole):
            settings["rates"] = changed
        settings["valid_tokens"] = recipe.data.valid_tokens
    sample, part = (np.empty(0, np.int64), "") if given else choice_windows(run, name)
    if recipe.expert == "lowest-loss" and part:
        settings["choice_tokens"] = EXPERT_CHOICE_TOKENS

    def build(folder: Path) -> dict[str, Any]:
        model = load(run, method)
        share = clusters.counts(run, name, k)
        if not _projects(method) and recipe.expert == "blend":
            say("  warning: the average of a mixture's weights was measured to be worse than its "
                "best expert; 'expert=lowest-loss' is the default")

        if recipe.projected.blends and _projects(method) and recipe.expert != "blend":
            say("  warning: the network was trained on blends of its experts, which 'expert=blend' "
                "makes one of for the domain; a single expert is the rarest of them")

        def loss(dense: Transformer) -> float:
            bf16 = bf16_is_fast(dense.embed.weight.device)
            return mean_nll(dense, corpus.specialization_windows(run, name)[0], sample, bf16=bf16)

        spent = Spent("finetune" in settings)

        def tune(expert: int, state: dict[str, Tensor]) -> float:
            dense = Transformer(model.shape)
            tensors.set_weights(dense, state, f"expert {expert}")
            outcome = finetune.finetune(run, name, Dense(dense), folder / f"tuned-{expert}",
                                        f"{method}.{name}, expert {expert}")
            spent.add(outcome.tokens, flops.training(model.shape), outcome.seconds)
            assert outcome.best_validation is not None
            return outcome.best_validation

        began = company.device_time()
        picked = choice.choose(model, recipe.expert, share, loss=loss, tune=tune, of=part)
        if recipe.expert == "lowest-loss":
            dataset, _ = corpus.specialization_windows(run, name)
            tokens = k * float(dataset.windows["length"][sample].sum())
            spent.add(tokens, flops.forward(model.shape), company.device_time() - began)
        which: int | Tensor = picked.which
        say(f"  {picked.reason}")
        if settings["tune_vector"]:
            assert isinstance(model, Projected)
            which, outcome = finetune.finetune_vector(
                run, name, model, model.vector(which), folder / "vector", f"{method}.{name} vector")
            spent.add(outcome.tokens, flops.training(model.shape), outcome.seconds)
        if parallel.rank() == 0:  # all of them are here where it was tuned
            tensors.save_tensors(folder / loop.FINAL, model.materialise(which), {})
        centroids = read_array(clusters.clusters(run) / f"centroids-{k}.npy")
        return {
            "method": method, "domain": name, "shape": model.shape.to_dict(),
            "choice": picked.facts(),
            "similarity": choice.similarity(model, centroids), "histogram": share / share.sum(),
            "cost": spent.booked(run, f"expert/{method}.{name}"),
        }

    return run.stage(f"expert/{method}.{name}", settings,
                     {"model": base, "histogram" if given else "domain-clusters": mine}, build,
                     every_rank="finetune" in settings,
                     same=training.same_settings(settings, recipe.finetune, "finetune")
                     if "finetune" in settings else (),
                     fits=training.as_precise(recipe.finetune))


def choice_windows(run: Run, name: str) -> tuple[np.ndarray, str]:
    """Windows that every expert is scored on before fine-tuning, and what part of the set they are.

    The documents that a smaller ``spec_tokens`` would take: int64 [n], sorted; and "" or "a sample
    of N tokens of ".
    """
    dataset, used = corpus.specialization_windows(run, name)
    if dataset.windows["length"][used].sum() <= EXPERT_CHOICE_TOKENS:
        return used, ""
    allowed = ~read_array(corpus.domain(run, name) / "train-excluded.npy")
    sample = limit.documents_up_to(dataset, allowed, EXPERT_CHOICE_TOKENS, run.recipe.seed)
    return sample, f"a sample of {dataset.windows['length'][sample].sum()} tokens of "


class Spent:
    """Tokens, FLOPs and seconds of all devices that choosing an expert took."""

    def __init__(self, every_rank: bool) -> None:
        self.tokens = self.flops = self.seconds = 0.0
        # every process is held meanwhile; on a processor one that only waits has no part in it
        self.held = parallel.world() if every_rank else parallel.world() // parallel.on_device()

    def add(self, tokens: float, flops_per_token: float, seconds: float) -> None:
        self.tokens += tokens
        self.flops += tokens * flops_per_token
        self.seconds += seconds * self.held

    def booked(self, run: Run, stage: str) -> dict[str, Any]:
        return ledger.book(stage, self.tokens, self.flops, self.seconds,
                           price_per_hour=run.recipe.cost.price_per_hour,
                           currency=run.recipe.cost.currency)


@once
def routed(run: Run, method: str, name: str = "") -> Path | None:
    """Perplexity before fine-tuning with each window through its own cluster's expert: on held-out
    generic text, as the paper reports it (its table 8), or on a domain's test text.

    None of generic text where only a bundle is at hand, or nothing of it is held out.
    """
    if not name and (run.recipe.bundle or not corpus.has_generic_test(run)):
        return None
    k, clustered = count(run.recipe, method), clusters.clusters(run)
    held_out = {"domain": corpus.domain(run, name)} if name else {"kept": corpus.kept(run)}
    settings = {"k": k, **({"eval_tokens": run.recipe.data.eval_tokens, "seed": run.recipe.seed}
                           if name else {})}

    def build(folder: Path) -> dict[str, Any]:
        model = load(run, method)
        dataset, windows = corpus.held_out(run, name, "test") if name else corpus.generic_test(run)
        cluster = clusters.of_windows(run, dataset, windows, k, folder) if name else read_array(
            clustered / f"assignment-{k}.npy")[windows]
        parts = []
        for expert in np.unique(cluster):
            dense = Transformer(model.shape)
            tensors.set_weights(dense, model.materialise(int(expert)), f"expert {expert}")
            parts.append(perplexity.evaluate(
                perplexity.forward_of(dense.to(parallel.device())), dataset,
                windows[cluster == expert]))
        together = perplexity.Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        nll, tokens = together.units()
        if name:
            write_array(folder / "test-nll.npy", nll)
            write_array(folder / "test-tokens.npy", tokens)
        return {"test" if name else "generic": perplexity.summary(
            nll, tokens, limit.text_bytes(dataset, windows))}

    return run.stage(f"evaluate/{method}.{name + '.routed' if name else 'generic'}", settings,
                     {"model": pretrained(run, method), **held_out, "clusters": clustered}, build)
