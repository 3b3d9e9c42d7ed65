"""The methods of the comparison, each in terms of the stages (paper, section 3).

What methods share (a pretraining, a clustering) is a stage of one name, so it is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from planearly.errors import UserError
from planearly.keys import Recipe
from planearly.model import flops, lora
from planearly.stages import checkpoint, clusters, corpus, distill, experts, selection, training
from planearly.stages.evaluate import Trained
from planearly.stages.folder import Run, facts, once


@dataclass(frozen=True)
class Method:
    """How a method gets to a model for a domain."""

    pretrain: Callable[[Run, str], Path | None]
    """Folder of the pretrained model; None where nothing is pretrained."""
    specialize: Callable[[Run, str], Trained]
    """Pretrains if that is not done yet, and fine-tunes."""
    weighs: bool = False
    """Whether it draws the generic corpus by the domain's cluster weights."""


@once
def pretrained_slm(run: Run, domain: str = "") -> Path:
    """A small model on the generic corpus as it is; the same for every domain.

    Without tokens of pretraining it is the checkpoint that it starts from.
    """
    begun = checkpoint.checkpoint(run)
    if begun and not run.recipe.pretrain_tokens:
        return begun
    packed = clusters.rows(run, clusters.finest(run))
    return training.pretrain(run, "slm", packed, clusters.generic_weights(packed))


def slm(run: Run, domain: str) -> Trained:
    """Generic pretraining, fine-tuning."""
    base = pretrained_slm(run)
    tuned = training.specialize(run, f"slm.{domain}", domain, base)
    return Trained("slm", domain, base, tuned, [base], [tuned])


@once
def pretrained_is(run: Run, domain: str) -> Path:
    """A small model on the generic corpus resampled to look like the domain."""
    weights = clusters.importance_weights(run, domain)
    return training.pretrain(
        run, f"slm-is.{domain}", clusters.rows(run, facts(weights)["k"]),
        training.weights_of(weights), inputs={"weights": weights}, mixed_with=domain,
    )


def slm_is(run: Run, domain: str) -> Trained:
    """Cluster importance sampling, fine-tuning."""
    base = pretrained_is(run, domain)
    tuned = training.specialize(run, f"slm-is.{domain}", domain, base)
    k = facts(clusters.importance_weights(run, domain))["k"]
    return Trained("slm-is", domain, base, tuned, [], [base, tuned], notes={"k": k})


def slm_nopt(run: Run, domain: str) -> Trained:
    """The small model on the specialization set alone, from fresh weights."""
    tuned = training.specialize(run, f"slm-nopt.{domain}", domain, None)
    return Trained("slm-nopt", domain, None, tuned, [], [tuned])


@once
def pretrained_llm(run: Run, domain: str = "") -> Path:
    """The same of a large model."""
    begun = checkpoint.checkpoint(run, large=True)
    if begun and not run.recipe.pretrain_tokens:
        return begun
    packed = clusters.rows(run, clusters.finest(run))
    return training.pretrain(run, "llm", packed, clusters.generic_weights(packed), large=True)


def llm(run: Run, domain: str) -> Trained:
    """The large model: generic pretraining, fine-tuning of all weights."""
    base = pretrained_llm(run)
    tuned = training.specialize(run, f"llm.{domain}", domain, base)
    return Trained("llm", domain, base, tuned, [base], [tuned])


def llm_lora(run: Run, domain: str) -> Trained:
    """The large model: generic pretraining, low-rank adapters."""
    base = pretrained_llm(run)
    tuned = training.specialize(
        run, f"llm-lora.{domain}", domain, base, adapters=run.recipe.lora)
    trained = flops.lora_parameters(training.shape_of(run, large=True), run.recipe.lora.rank)
    return Trained("llm-lora", domain, base, tuned, [base], [tuned],
                   notes={"base": "llm", "adapter_params": trained})


def pretrained_pair(run: Run, domain: str) -> Path:
    """The student; and its teacher, where the run trains one."""
    if not run.recipe.distill.teacher:
        pretrained_llm(run)
    return pretrained_slm(run)


def slm_d(run: Run, domain: str) -> Trained:
    """The small model, fine-tuned on the data and on the fine-tuned large model's distribution."""
    base = pretrained_slm(run)
    teacher = None if run.recipe.distill.teacher else llm(run, domain)
    tuned = distill.specialize(run, domain, base, teacher.tuned if teacher else None)
    generic = [base, *(teacher.generic if teacher else [])]
    own = [*(teacher.own if teacher else []), tuned]
    # the teacher's tokens are in the cost; these are what the deployed model was pretrained on
    notes = {"base": "slm", "pretrain_tokens": facts(base)["cost"]["tokens"]}
    return Trained("slm-d", domain, base, tuned, generic, own, notes=notes)


def selected(method: str) -> Method:
    """Pretraining on what a selector takes of the generic corpus for the domain, fine-tuning."""

    def pretrain(run: Run, domain: str) -> Path:
        made = selection.selection(run, method, domain)
        return training.pretrain(
            run, f"{method}.{domain}", made, training.weights_of(made), mixed_with=domain)

    def specialize(run: Run, domain: str) -> Trained:
        base = pretrain(run, domain)
        tuned = training.specialize(run, f"{method}.{domain}", domain, base)
        made = facts(selection.selection(run, method, domain))
        notes: dict[str, object] = {
            key: made[key] for key in ("k", "cluster", "ranks") if key in made}
        return Trained(method, domain, base, tuned, [], [base, tuned], notes=notes)

    return Method(pretrain, specialize, weighs=method == "slm-top")


def nothing(run: Run, domain: str) -> None:
    """No pretraining."""


def with_experts(method: str) -> Method:
    """One pretraining of experts for every domain; the domain's expert, fine-tuned."""
    return Method(lambda run, domain: experts.PRETRAINED[method](run),
                  lambda run, domain: experts.specialize(run, method, domain))


METHODS: dict[str, Method] = {
    "slm": Method(pretrained_slm, slm),
    "slm-is": Method(pretrained_is, slm_is, weighs=True),
    "slm-nopt": Method(nothing, slm_nopt),
    "llm": Method(pretrained_llm, llm),
    "llm-lora": Method(pretrained_llm, llm_lora),
    "slm-d": Method(pretrained_pair, slm_d),
    **{method: with_experts(method) for method in experts.PRETRAINED},
    **{method: selected(method) for method in selection.SELECTORS},
}


def check_methods(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything runs."""
    for name in recipe.methods:
        if name not in METHODS:
            raise UserError(f"recipe key 'methods' names '{name}'; known are {', '.join(METHODS)}")
    checkpoint.check(recipe)
    experts.check_bundle(recipe)
    for method in experts.PRETRAINED:
        if method in recipe.methods:
            experts.check(recipe, method)
    if "llm-lora" in recipe.methods:
        large = checkpoint.shape(recipe, large=True) or recipe.large
        lora.check(recipe.lora, large.d_model, large.d_ff)
    if "slm-d" in recipe.methods:
        distill.check(recipe)


def check_tokens(run: Run) -> None:
    """The same for what is known only with the run's tokenizer."""
    checkpoint.check_vocabulary(run.recipe, corpus.tokenizer_folder(run))
    if "slm-d" in run.recipe.methods:
        distill.check_vocabulary(run)
