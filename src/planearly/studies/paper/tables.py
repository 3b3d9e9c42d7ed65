"""The specifications of the paper's tables and figures, by its numbers, and of ours (extra-...)."""

from __future__ import annotations

from collections.abc import Sequence

from planearly.methods import label
from planearly.report import form, sentences
from planearly.report.form import number, si
from planearly.report.table import Axis, Column, Figure, Table
from planearly.studies.paper.crossing import crossings, meetings
from planearly.studies.paper.listings import (
    blends,
    by_clusters,
    clusters_of,
    every_domain,
    finetuning,
    foreseen,
    over_seeds,
    parameters,
    ratios,
    routed,
    spent,
    test_texts,
    throughput,
)
from planearly.studies.paper.published import DOMAINS
from planearly.studies.paper.rows import (
    POOL,
    adapted,
    along,
    before_and_after,
    best_by_budget,
    by_budget,
    by_size,
    expert_choices,
    generic_models,
    larger_sets,
    numbers_of_experts,
    of_generic_text,
    others,
    papers,
    selectors,
    several_budgets,
    slices,
    smallest,
    teachers,
    top_cluster,
    total,
    variants,
)
from planearly.study.compare import When
from planearly.study.spec import (
    AFTER,
    AFTER_AXIS,
    BUDGETS,
    COST,
    DOMAIN,
    GENERIC,
    GENERIC_COST,
    METHOD,
    OWN_COST,
    PAIRED,
    SET,
    SETS_AXIS,
    Averages,
    Lines,
    Listing,
    sweep,
    with_interval,
)

TOTAL_COST = "figure-06-total-cost"
WHICH = "figure-01-which"
PERPLEXITY = with_interval("ppl", "perplexity")
AFTER_LOG = Axis(AFTER_AXIS.key, AFTER_AXIS.label, True)


def total_cost(n: int) -> Averages:
    plural = "domain" if n == 1 else "domains"
    return Averages(
        f"{TOTAL_COST}-{n:02d}", f"Total cost for {n} {plural}", "Figure 6",
        f"C(N) at N = {n}: the generic cost once and N times the mean specialization cost of a "
        "domain, at the smallest specialization set.",
        smallest(by_budget), (), Figure(
            "lines", Axis("total_flops", f"FLOPs for {n} {plural}", True), AFTER_LOG, "method",
            "after_ci"),
        columns=[METHOD, BUDGETS, SET, *AFTER, Column("total_tokens", "tokens", "tokens"),
                 Column("total_flops", "FLOPs", "flops"),
                 Column("total_hours", "device-hours", "hours")], then=total(n))


def swept(name: str, title: str, paper: str, lines: Lines, words: str, note: str) -> Averages:
    """A figure of one method along one setting, against slm."""
    return Averages(
        name, title, paper, f"{note} The baseline is slm at the same tokens.", lines,
        [METHOD, Column("setting", words, "text")], before=True,
        figure=Figure("lines", Axis("x", words, True), AFTER_AXIS, "method", "after_ci"))


def compared(name: str, title: str, key: str, words: str, note: str, share: bool = False,
             extra: Sequence[Column] = ()) -> Averages:
    """A table of one setting for every method that varies it, against the recipe's own value.

    Args:
        share: the setting is a number, to be drawn along an axis.
    """
    return Averages(
        name, title, "", f"{note} The baseline is the same method at the recipe's own value, "
        f"{{{key}}}.", lambda cells: sweep(cells, cells.methods, key),
        [METHOD, Column("setting", words, "text")], before=True, extra=extra,
        figure=Figure("lines", Axis("x", words), AFTER_AXIS, "method", "after_ci") if share else
        Figure("bars", Axis("method", "method"), AFTER_AXIS, "setting", "after_ci"))


def domains_listed(number: str, when: When) -> Listing:
    return Listing(
        f"figure-{number}-domains-{when}", f"Every domain, {when} fine-tuning", f"Figure {number}",
        "At the recipe's own settings. The baseline is slm on the same documents; below 0, a "
        "difference is in the row's favour.",
        [DOMAIN, METHOD, *with_interval("ppl", f"perplexity {when} fine-tuning"), *PAIRED, *COST],
        every_domain(when), Figure("bars", Axis("domain", "domain"), Axis("ppl", "perplexity"),
                                   "method", "ppl_ci"))


def histogram_listed(number: str, what: str, title: str, kind: str) -> Listing:
    return Listing(
        f"table-{number}-clusters", title, f"Table {int(number)}",
        "Of the specialization sets and of the generic corpus, by number of clusters. A wide "
        "domain spreads over many clusters: small share, large entropy.",
        by_clusters(what, kind), clusters_of(what))


TABLES: list[Averages | Listing] = [
    Listing(
        "table-01-parameters", "Parameters", "Tables 1 and 7",
        "Trained are the parameters of what is pretrained before the domain is known; deployed is "
        "the specialized model.",
        [METHOD, Column("experts", "experts"), Column("params", "trained parameters"),
         Column("inference_params", "deployed parameters"),
         Column("non_embedding_params", "deployed, without embeddings"),
         Column("inference_flops", "FLOPs per token of inference", "flops")], parameters),
    Listing(
        "extra-ratios", "Tokens per parameter, beside the paper's", "",
        "A small study can hold the paper's claims only where it keeps its ratios: with a few "
        "tokens per parameter, tokens buy more than their choice does, and experts starve. The "
        "paper's are of its own budgets, least to most, at its rates, and of its smallest "
        "specialization set.",
        [METHOD, Column("times", "parameters trained, of slm's"),
         Column("papers_times", "the paper's"), BUDGETS,
         Column("deployed", "tokens per deployed parameter"),
         Column("papers_deployed", "the paper's", "text"),
         Column("trained", "tokens per trained parameter"),
         Column("papers_trained", "the paper's", "text"),
         Column("cluster", "windows per cluster"),
         Column("papers_cluster", "the paper's", "text"),
         Column("own", "tokens per token of the specialization set"),
         Column("papers_own", "the paper's", "text")], ratios),
    Listing(
        "table-02-throughput", "Device-hours per 1B tokens", "Table 2",
        "Measured on {devices}; reading, validation and saving are in them. The specialization of "
        "slm-pn and slm-mix holds the choice of the expert, forward passes only. slm-d is left "
        "out: its tokens are of two models. Short trainings pay for starting, validating and "
        "saving: with few tokens, hours per billion are far above a long run's.",
        [METHOD, Column("generic_cost_hours", "generic pretraining, per 1B tokens", "hours"),
         Column("generic_cost_flops", "its FLOPs per token", "flops"),
         Column("specialization_cost_hours", "specialization, per 1B tokens", "hours"),
         Column("specialization_cost_flops", "its FLOPs per token", "flops"),
         Column("inference_flops", "inference FLOPs per token", "flops")], throughput),
    Listing(
        "table-03-costs", "Cost of training", "Table 3",
        "What was spent on {devices}, where the paper gives upper limits. Generic cost is paid "
        "once for all domains; specialization is the mean of the domains that were run, their "
        "number beside it. slm-is pretrains per domain.",
        [METHOD, SET, Column("domains", "domains"), *GENERIC_COST, *OWN_COST], spent),
    Averages(
        "table-04-baselines", "Before and after fine-tuning, by set size", "Table 4",
        "All methods at the recipe's own pretraining budget; the baseline of each row is slm at "
        "the same set size.",
        lambda cells: by_size(cells, papers(cells)), [METHOD, SET], before=True),
    Averages(
        "table-05-experts", "Choice of the expert", "Table 5",
        "'blend' is not in the paper. The baseline is the recipe's own rule, '{expert}'. "
        "best-tuned pays for fine-tuning every expert.", expert_choices,
        [METHOD, Column("experts", "experts"), Column("setting", "expert", "text")], before=True,
        extra=[Column("expert_share", "share of the domain in its cluster", "percent")]),
    Averages(
        "table-08-budgets", "By pretraining budget", "Table 8",
        "The paper compares at equal device-hours; here the budget is in tokens, with FLOPs and "
        "device-hours beside it. The baseline is slm at the same set size and at the budget that "
        f"the study takes as equal, else at the same. {sentences.ROUTED}", several_budgets,
        [METHOD, BUDGETS, SET], before=True, extra=GENERIC),
    histogram_listed("09", "largest_share", "Share of a domain in its most frequent cluster",
                     "percent"),
    histogram_listed("10", "entropy", "Entropy of the cluster histogram, nats", "nats"),
    Averages(
        WHICH, "Which method for which budgets", "Figure 1",
        "The best of everything that this study ran within each limit: of the deployed model's "
        "size (that of slm, or that of llm), of FLOPs before the domain is known, and of what is "
        "done per domain. Limits before the domain are 0 and the costs of slm's budgets. The best "
        "is that of the recipe's own seed; it is level with those from which it cannot be told: "
        "the 95% interval of their difference, over documents and seeds, holds zero; for what was "
        "run at one seed, it takes from other methods how far another seed moves a difference. The "
        "figure has a bar for the limits within which the best is the same.",
        smallest(several_budgets), (), Figure(
            "bars", Axis("limits", "FLOPs before the domain, at most"), AFTER_AXIS, "method",
            "after_ci", "panel", "told"),
        columns=[Column("inference", "deployed model", "text"),
                 Column("limit", "FLOPs before the domain, at most", "flops"),
                 Column("per_domain", "per domain", "text"), METHOD, BUDGETS, *AFTER,
                 Column("next", "the next best method", "text"),
                 Column("level", "level with", "text"), *GENERIC_COST[1:2],
                 *OWN_COST[1:2]], then=best_by_budget),
    Averages(
        "figure-03-generic", "Generic perplexity by pretraining cost", "Figure 3",
        "On held-out generic text, before fine-tuning, each window through its own cluster's "
        f"expert where there are experts. {sentences.ROUTED}", generic_models, (),
        Figure("lines", Axis("generic_flops", "FLOPs of generic pretraining", True),
               Axis("generic", "generic perplexity", True), "series", "generic_ci"),
        columns=[METHOD, BUDGETS, *GENERIC, *GENERIC_COST], then=of_generic_text),
    Averages(
        "figure-04-budget", "Domain perplexity by cost, before and after fine-tuning", "Figure 4",
        "At the smallest specialization set. The cost is of the generic pretraining and one "
        "domain, fine-tuning included, before it too.", smallest(several_budgets), (),
        Figure("lines", Axis("flops", "training FLOPs, one domain", True),
               Axis("ppl", "perplexity", True), "method", "ppl_ci", "when"),
        columns=[METHOD, BUDGETS, SET, Column("when", "when", "text"), *PERPLEXITY, *COST],
        then=before_and_after),
    Averages(
        "figure-05-set-size", "Larger specialization sets", "Figure 5",
        "After fine-tuning, at the recipe's own pretraining budget; the baseline is slm at the "
        "same set size.", larger_sets, [METHOD, SET],
        Figure("lines", SETS_AXIS, AFTER_AXIS, "method", "after_ci")),
    *(total_cost(n) for n in DOMAINS),
    Listing(
        "figure-06-crossing", "From how many domains on slm-pn costs less than slm-is", "Figure 6",
        "C(N) of slm-is at its own pretraining tokens, paid for every domain, and of slm-pn at "
        "each of its budgets, over the domains that both have; none where the curves do not "
        "cross. Where the difference in perplexity (slm-pn less slm-is) is above 0, slm-pn is "
        "worse, and the crossing is arithmetic alone.",
        [BUDGETS, Column("expert", "expert", "text"), SET,
         Column("domains", "domains averaged over"),
         Column("flops", "domains at equal FLOPs"), Column("hours", "domains at equal hours"),
         Column("tokens", "domains at equal tokens"),
         *with_interval("difference", "slm-pn less slm-is, nats per token", "nats")], crossings),
    Listing(
        "figure-06-equal-quality",
        "From how many domains on slm-pn costs less than slm-is, at equal perplexity", "Figure 6",
        "The tokens of pretraining at which slm-is is as good as a budget of slm-pn, between two "
        "that it was run with, and the number of domains at which both cost the same then. "
        "Intervals are of 95%, over documents and over what another training would give; an empty "
        "end is beyond the budgets tried.",
        [BUDGETS, Column("expert", "expert", "text"), SET,
         Column("domains", "domains averaged over"),
         *with_interval("tokens", "tokens of slm-is as good", "tokens"),
         *with_interval("flops", "domains at equal FLOPs", "number"),
         *with_interval("hours", "domains at equal hours", "number")], meetings,
        Figure("points", Axis("budget", "tokens of slm-pn", True),
               Axis("flops", "domains at equal FLOPs"), "expert", "flops_ci")),
    Averages(
        "figure-07-pn-experts", "Experts of the projected network", "Figure 7",
        "One expert per cluster of the generic corpus, combined of h slices: every pair that was "
        "run. The baseline is slm at the same tokens.", numbers_of_experts,
        [METHOD, Column("setting", "experts", "text"), Column("beside", "slices h", "text")],
        Figure("lines", Axis("x", "experts", True), AFTER_AXIS, "series", "after_ci"),
        before=True),
    Averages(
        "figure-08-top-cluster", "The most frequent cluster alone", "Figure 8",
        "slm-top pretrains on the domain's most frequent cluster alone; the baseline is slm-is at "
        "the same number of clusters and tokens.", top_cluster,
        [METHOD, Column("setting", "clusters", "text")],
        Figure("bars", Axis("setting", "clusters"), AFTER_AXIS, "method", "after_ci"),
        before=True),
    Listing(
        "figure-09-finetuning", "Fine-tuning: cost and best step by set size", "Figure 9",
        "Means over the domains that were run, their number beside them. slm-is and slm-d are left "
        "out: their cost per domain is mostly not fine-tuning. That of slm-pn and slm-mix holds "
        "the choice of the expert. The paper's cost grows about tenfold for eight times the text.",
        [METHOD, SET, Column("domains", "domains"), Column("best_step", "best step"),
         Column("steps", "steps taken"), *OWN_COST], finetuning,
        Figure("lines", SETS_AXIS, Axis("own_flops", "FLOPs of fine-tuning, one domain", True),
               "method")),
    swept("figure-10-importance-k", "Clusters for importance sampling", "Figure 10",
          along("slm-is", "importance.k"), "clusters",
          "'chosen' is the number that predicts the domain best."),
    swept("figure-11-mix-k", "Experts of the hard mixture", "Figure 11",
          along("slm-mix", "mixture.experts"), "experts",
          "One independent small model per cluster."),
    domains_listed("12", "before"),
    domains_listed("13", "after"),
    Averages(
        "figure-14-lora", "LoRA against full fine-tuning of the large model", "Figure 14",
        "The baseline is llm, fine-tuned in full, at the same set size. Costs per domain are of "
        "the adaptation alone.", adapted, [METHOD, SET],
        Figure("lines", SETS_AXIS, AFTER_AXIS, "method", "after_ci"), extra=OWN_COST),
    Averages(
        "extra-teachers", "Distillation by teachers of several budgets", "",
        "Students and their teachers by the tokens that each was pretrained on; costs hold both. "
        "The baseline is slm with the student's tokens.", teachers,
        [METHOD, BUDGETS, Column("teacher", "the teacher's", "tokens")],
        Figure("lines", Axis("teacher", "tokens of the teacher's pretraining", True), AFTER_AXIS,
               "series", "after_ci")),
    Listing(
        "extra-test-sets", "Test text of every domain", "",
        "Intervals treat documents as the independent units: with few of them, or one that holds "
        "much of the text, they are wide. At the recipe's own seed.",
        [DOMAIN, Column("documents", "documents"), Column("tokens", "tokens", "tokens"),
         Column("largest", "share of the longest document", "percent")], test_texts),
    Averages(
        "extra-selectors", "Selectors of generic text at equal tokens", "",
        "The same number of pretraining tokens for each, drawn from what the selector takes of "
        "the generic corpus. The baseline is slm, which takes it as it is, of as many generic "
        "tokens.", selectors,
        lambda cells: [METHOD, Column("embedder", "embedder", "text"),
                       Column("setting", "clusters", "text"),
                       *([Column("pool", "generic tokens", "text")]
                         if len(cells.values_of(POOL)) > 1 else [])],
        Figure("bars", Axis("bar", "selector"), AFTER_AXIS, "method", "after_ci"), before=True),
    Averages(
        "extra-methods", "Methods that the paper has not, by set size", "",
        "At the recipe's own pretraining budget; the baseline of each row is slm at the same set "
        "size.", others, [METHOD, SET], before=True, least=1),
    Listing(
        "extra-blend", "Blended experts by width of the domain", "",
        "Each domain's blend of experts against the single expert of the rule named, and both "
        "against slm, in nats per token on the same documents; below 0, the first is better. "
        "Domains are ordered from narrow to wide by the entropy of their cluster histogram.",
        [METHOD, DOMAIN, Column("entropy", "entropy", "nats"),
         Column("rule", "single expert", "text"),
         *with_interval("after", "perplexity of the blend"),
         *with_interval("difference", "blend less single", "nats"),
         *with_interval("single_slm", "single less slm", "nats"),
         *with_interval("blend_slm", "blend less slm", "nats"), *COST], blends,
        Figure("points", Axis("entropy", "entropy of the domain, nats"),
               Axis("difference", "blend less single expert, nats per token"), "method",
               "difference_ci")),
    Listing(
        "extra-foresight", "What trigrams foresee, and what was found", "",
        "By how many nats per token a trigram model of what a method draws of the corpus foretells "
        "a domain's validation text better than one of the corpus as it is: known before any "
        "training. Beside it the method's difference from slm after fine-tuning, at the budgets of "
        "the recipe; a method that draws the corpus as it is has the foresight of slm-is.",
        [METHOD, DOMAIN, *with_interval("foreseen", "foreseen gain", "nats"),
         *with_interval("difference", "method less slm", "nats")], foreseen,
        Figure("points", Axis("foreseen", "gain foreseen by trigrams, nats per token"),
               Axis("difference", "method less slm, nats per token"), "method",
               "difference_ci")),
    Listing(
        "extra-routed", "A domain's text through the experts of its windows' clusters", "",
        "Before fine-tuning, each window of the test text through the expert of the cluster that "
        "this very window is of, as generic text goes; against the one expert of the domain, and "
        "both against slm, in nats per token on the same documents; below 0, the first is better.",
        [METHOD, DOMAIN, Column("share", "of the domain in its expert's cluster", "percent"),
         *with_interval("before", "perplexity, routed"),
         *with_interval("one_slm", "one expert less slm", "nats"),
         *with_interval("difference", "routed less one expert", "nats"),
         *with_interval("routed_slm", "routed less slm", "nats")], routed),
    Averages(
        "extra-slices", "Slices of the projected network's bank", "",
        "h slices are combined into each expert's matrices: many hold more and need more tokens. "
        f"The baseline is slm at the same budget. {sentences.ROUTED}", slices,
        [METHOD, BUDGETS, Column("setting", "slices h"), Column("rule", "expert", "text")],
        Figure("lines", Axis("budget", "tokens of pretraining", True), AFTER_LOG, "series",
               "after_ci"), before=True, extra=GENERIC),
    compared("extra-mixed", "Specialization text mixed into pretraining",
             "pretrain.specialization_share", "share of pretraining tokens",
             "Part of the pretraining tokens is drawn from the domain's own text.", share=True),
    compared("extra-replay", "Generic text replayed while fine-tuning", "finetune.replay_share",
             "share of fine-tuning tokens",
             "Replay should keep what the model knew of generic text.", share=True,
             extra=[Column("generic_after", "generic perplexity after fine-tuning",
                           "perplexity")]),
    compared("extra-optimizer", "Optimisers", "pretrain.optimizer.preset", "optimiser",
             "'modern' is Muon and AdamW with a decay. 'paper' is the paper's Adam at 1e-4 without "
             "one, made for runs of a million steps: one of few steps hardly gets anywhere with "
             "it, so its row says how little such a rate does here, not that the paper erred."),
    Averages(
        "extra-variants", "Every variant against the method as the recipe has it", "",
        "The baseline is the same method with none of these settings changed, at the same "
        "pretraining tokens, set size and seed.", variants,
        [METHOD, Column("setting", "settings", "text"), BUDGETS, SET, Column("seed", "seed")],
        least=1, apart=True),
    Listing(
        "extra-seeds", "Spread over seeds", "",
        "The same settings at several seeds, which draw the test documents, the specialization "
        "set, the sampler's order and the weights: perplexities of two seeds are of different "
        "text. The difference from slm is of the same seed and the same documents; how far it "
        "moves is what a seed does to a comparison.",
        [METHOD, Column("seeds", "seeds", "text"), Column("domains", "averaged over", "text"),
         Column("lowest", "lowest perplexity", "perplexity"),
         Column("highest", "highest perplexity", "perplexity"),
         Column("low", "lowest difference from slm, nats per token", "nats"),
         Column("high", "highest difference", "nats"), *COST], over_seeds),
]
"""In the order of the page."""


def which(tables: Sequence[Table]) -> list[str]:
    """What to train within which limits, from Figure 1: nothing before the domain is known, and
    the most that was paid before."""
    said = []
    for table in tables:
        if table.name != WHICH:
            continue
        for inference, per_domain in (("small", "pretraining too"), ("small", "fine-tuning alone"),
                                      ("large", "fine-tuning alone")):
            rows = [row for row in table.rows
                    if (row["inference"], row["per_domain"]) == (inference, per_domain)]
            chosen = rows[-1:] if per_domain == "fine-tuning alone" else rows[:1]
            for row in chosen:
                before = (f"at most {form.flops(row['limit'])} FLOPs before the domain is known"
                          if row["limit"] else "nothing paid before the domain is known")
                others = (f", level with {_labelled(row['level'])}" if row["level"] else
                          f"; next {_labelled(row['next'])}" if row["next"] else "")
                said.append(
                    f"{'Small models' if inference == 'small' else 'Large models allowed'}, "
                    f"{before}, {per_domain} for the domain: {label(row['method'])} with "
                    f"{si(row['budget'])} tokens, perplexity {number(row['after'])}{others}, over "
                    f"{row['over']}.")
    return said


def _labelled(words: str) -> str:
    """``slm-pn, 30.1; slm, 30.2`` with the methods' labels."""
    return " and ".join(label(one) for one in words.split("; "))


def worth(tables: Sequence[Table]) -> list[str]:
    """For each number of domains of Figure 6, the small models that are better than cheaper ones;
    before them what Figure 1 says."""
    said = which(tables)
    for table in tables:
        front = sorted((row for row in table.rows if row.get("front")),
                       key=lambda row: row["total_flops"])
        if table.name.startswith(TOTAL_COST) and front:
            what = table.title.removeprefix("Total cost for ")
            models = "; ".join(f"{label(row['method'])} ({si(row['budget'])}) "
                               f"{number(row['after'])} for {form.flops(row['total_flops'])}"
                               for row in front[-3:])
            said.append(f"For {what}, the dearest small models that are worth their cost, at most "
                        "three, each better than the one before by more than chance (tokens of "
                        f"pretraining, perplexity over {front[0]['over']}, FLOPs in all): "
                        f"{models}.")
    return said
