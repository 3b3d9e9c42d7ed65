from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from html_outline import Outline
from planearly.keys import Recipe
from planearly.report import run_page as page
from planearly.report import sentences, words

K = 64
TOPICS = [["samples", "estimator", "fit", "classifier", "features"],
          ["array", "axis", "dtype", "shape", "broadcast"],
          ["tensor", "gradient", "backward", "module", "cuda"],
          ["graph", "nodes", "edges", "weight", "directed"],
          ["figure", "axes", "legend", "colormap", "plot"]]


def row(method: str, domain: str, before: float, after: float, width: float = 0.02,
        ) -> dict[str, Any]:
    return {"method": method, "domain": domain, "spec_tokens": 640_000,
            "pretrain_tokens": 2_500_000, "params": 5_243_136, "inference_params": 5_243_136,
            "generic_ppl": before * 0.7, "ppl_before": before, "ppl_after": after,
            "ppl_after_ci": [after * (1 - width), after * (1 + width)], "bpb_after": 1.2345,
            "cost": {"tokens": 3_100_000, "flops": 9.7e13, "device_hours": 0.0841,
                     "device": "2 cores of Xeon & sons"},
            "model": f"specialize/{method}-{domain}-0a1b2c3d/export"}


def macro(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As results.json has it."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        mean = {when: math.exp(sum(math.log(row[f"ppl_{when}"]) for row in mine) / len(mine))
                for when in ("before", "after")}
        found.append({"method": method, "domains": len(mine), **{
            when: {"perplexity": value, "ci95": [0.9 * value, 1.1 * value]}
            for when, value in mean.items()}})
    return found


def curve(stage: str, method: str, domain: str | None, start: float, end: float, tokens: int,
          ) -> page.Curve:
    rng = np.random.default_rng(len(method))
    metrics: list[page.Point] = []
    for step in range(1, 121):
        share = step / 120
        loss = end + (start - end) * math.exp(-5 * share) + 0.2 * (9 - start) * (step < 4)
        metrics.append({"tokens": round(share * tokens), "loss": loss + rng.normal(0, 0.06)})
        if step % 6 == 0:
            metrics.append({"tokens": round(share * tokens), "validation": loss + 0.05})
    return {"stage": stage, "method": method, "domain": domain, "metrics": metrics}


def domain(name: str, seed: int) -> page.Domain:
    rng = np.random.default_rng(seed)
    generic = rng.dirichlet(np.full(K, 3.0))
    own = rng.dirichlet(np.full(K, 0.12))
    expected = 0.3 * own / generic
    heavy = np.argsort(-own)[: page.HEAVIEST].tolist()
    return {"name": name, "generic": generic, "histogram": own, "expected_epochs": expected,
            "realised_epochs": expected * rng.normal(1, 0.05, K), "windows": 2_613,
            "words": {c: TOPICS[c % 5] for c in heavy},
            "snippets": {c: words.snippet("Return the coefficient of determination of the "
                                          "prediction. " * 6, 160) for c in heavy},
            "generic_windows": 41_822, "smoothing": 12.5, "effective_size": 5_120.7,
            "divergence": 1.83, "entropy": 2.4, "generic_entropy": 4.02,
            "foresight": {"gain": 0.314, "ci95": [0.241, 0.387], "tokens": 1_000_000}}


def expert(method: str, name: str, rule: str, k: int = 16) -> page.Expert:
    rng = np.random.default_rng(k)
    share = rng.dirichlet(np.full(k, 0.3))
    points = rng.normal(size=(k, 4))
    cosines = (points @ points.T) / np.outer(*[np.linalg.norm(points, axis=1)] * 2)
    return {"method": method, "domain": name, "rule": rule,
            "expert": None if rule == "blend" else int(share.argmax()), "share": 0.4375,
            "losses": rng.uniform(3, 4, k).tolist() if rule == "lowest-loss" else None,
            "reason": f"the reason for {name}", "histogram": share.tolist(),
            "words": [] if rule == "blend" else TOPICS[0],
            "similarity": {"experts": (0.5 * cosines).tolist(), "centroids": cosines.tolist(),
                           "correlation": 0.8125}}


def example(names: list[str]) -> page.Facts:
    """Facts of a run of both methods on the named domains, as large as real ones are."""
    rows, curves = [], [curve("pretraining", "slm", None, 7.0, 4.2, 2_500_000)]
    for i, name in enumerate(names):
        rows += [row("slm", name, 61.7 + 9 * i, 35.0 + 4 * i),
                 row("slm-is", name, 44.1 + 7 * i, 31.2 + 4 * i)]
        curves += [curve("pretraining", "slm-is", name, 6.8, 3.8, 2_500_000),
                   curve("fine-tuning", "slm", name, 4.1, 3.56, 1_900_000),
                   curve("fine-tuning", "slm-is", name, 3.8, 3.44, 1_600_000)]
    cpu = "2 cores of Xeon & sons"
    return {
        "title": "Small models for " + " and ".join(names),
        "recipe": {**Recipe().to_dict(), "name": "demo"},
        "rows": rows, "curves": curves,
        "comparisons": [{"domain": name, "a": "slm-is", "b": "slm", "difference": -0.115,
                         "ci95": [-0.125, -0.105], "units": 99} for name in names],
        "macro": macro(rows) if len(names) > 1 else [],
        "domains": [domain(name, i) for i, name in enumerate(names)],
        "experts": [expert("slm-pn", name, "lowest-loss") for name in names],
        "costs": [
            {"stage": "embedding and clustering", "tokens": 11.2e6, "flops": 2.2e11,
             "device_hours": 0.004, "device": cpu, "money": 0.0004},
            {"stage": "pretraining", "method": "slm", "tokens": 2.5e6, "flops": 7.8e13,
             "device_hours": 0.061, "device": cpu, "money": 0.0061},
            *({"stage": stage, "method": "slm-is", "domain": name, "tokens": 2.5e6,
               "flops": 7.8e13, "device_hours": 0.061, "device": cpu, "money": 0.0061}
              for name in names for stage in ("pretraining", "fine-tuning"))],
        "currency": "USD",
        "samples": [{"domain": name, "prompt": "class LinearModel(BaseEstimator)\n\nFit",
                     "completions": {"slm": " the model.\n\nParameters\n----------\nX : array",
                                     "slm-is": " the estimator.\n\nParameters\n----------\nX : "
                                               "{array-like, sparse matrix} of shape"}}
                    for name in names],
        "sources": [{"method": "slm-is", "domain": names[0], "source": source, "tokens": tokens,
                     "epochs": tokens / 1.1e6}
                    for source, tokens in (("scipy", 1.1e6), ("numpy", 6e5), ("torch", 2e5))],
        "warnings": ["Cluster 17 is passed over 6.1 times in the pretraining of SLM-is; above 4 "
                     "passes repetition begins to cost."],
        "plan": Markup("<section class='plan'><h2>Plan</h2></section>"),
        "next_steps": ["Give the pretraining of SLM-is more tokens: its validation loss was still "
                       "falling."],
    }




def test_the_page_shows_every_fact(tmp_path):
    facts = example(["sklearn", "scipy"])
    page.write_report(tmp_path / "run", facts, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    outline = Outline(html)
    assert not outline.open, "an element is not closed"
    assert outline.count("svg") == 1 + 2 * 5 + 1
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings == ["Results", "Experts", "Domains", "Completions", "Costs",
                        "What was read in pretraining", "Plan", "What to do next", "The models",
                        "Recipe"]
    for text in ("35.0 [34.3, 35.7]", "macro average", "estimator, fit", "1.83 nats", "5.12k",
                 "0.31 nats per token better than the corpus as it is; 0.24 to 0.39",
                 "Cluster 17 is passed", "still falling", "{array-like, sparse matrix}", "97T",
                 "5 min 03 s", "specialize/slm-is-scipy-0a1b2c3d/export", "pretrain_tokens:"):
        assert text in outline.text, text
    assert html.count('class="best"') == 2 and html.count('class=" best"') == 1


def test_the_page_fetches_nothing():
    html = page.render(Path("run"), example(["sklearn"]))
    for tag, attributes in Outline(html).tags:
        assert tag not in ("script", "link", "img", "iframe"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith(("#", "data:image/png"))
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", html))


def test_ids_of_several_figures_do_not_collide():
    html = page.render(Path("run"), example(["a", "b"]))
    clips = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(clips) == len(set(clips)) > 4


def test_text_of_others_is_escaped():
    evil = '<script>alert("x")</script> & $\\frac{$'
    facts = example([evil])
    facts["title"] = evil
    facts["domains"][0]["words"] = {c: [evil] for c in range(K)}
    facts["domains"][0]["snippets"] = dict.fromkeys(range(K), evil)
    facts["samples"] = [{"prompt": evil, "completions": {evil: evil}}]
    chosen: Any = {**expert("slm-pn", evil, evil), "method": evil, "reason": evil, "words": [evil]}
    facts["experts"] = [chosen]
    facts["costs"] = [{"stage": evil, "method": evil, "domain": evil, "device": evil}]
    facts["sources"] = [{"source": evil, "method": evil, "domain": evil}]
    facts["warnings"] = facts["next_steps"] = [evil]
    html = page.render(Path(evil), facts)
    outline = Outline(html)
    assert outline.count("script") == 0
    assert outline.text.count(evil) > 30


@pytest.mark.parametrize("missing", sorted(page.Facts.__annotations__))
def test_a_missing_fact_leaves_its_section_out(missing, monkeypatch):
    for figure in ("perplexities", "curves", "histograms", "epochs", "experts", "similarity"):
        monkeypatch.setattr(page.plots, figure, lambda *_: "")  # slow, and not what is asked
    facts = example(["sklearn"])
    del facts[missing]
    html = page.render(Path("run"), facts)
    heading = {"rows": "Results", "costs": "Costs", "samples": "Completions",
               "experts": "Experts", "recipe": "Recipe",
               "sources": "What was read in pretraining", "plan": "Plan",
               "next_steps": "What to do next"}
    assert not Outline(html).open
    if missing in heading:
        assert f"<h2>{heading[missing]}</h2>" not in html


def test_experts_are_shown_with_what_their_rule_measured():
    facts: page.Facts = {"experts": [
        expert("slm-pn", "law", "lowest-loss"), expert("slm-mix", "law", "blend", 40),
        expert("slm-mix", "news", "most-frequent", 40)]}
    html = page.render(Path("run"), facts)
    outline = Outline(html)
    said = " ".join(outline.text.split())
    assert outline.count("svg") == 3 + 2  # for each domain, and for each method
    assert said.count("loss with every expert before fine-tuning (above") == 1
    assert said.count("all are blended by it") == html.count("<td>blend</td>") == 1
    assert said.count("the reason for law") == 2 and "samples, estimator, fit" in said
    assert "Over the 120 pairs of experts the two correlate with 0.81:" in said
    assert "Over the 780 pairs of experts" in said
    two = expert("slm-pn", "law", "lowest-loss", 2)
    two["similarity"] = {**two["similarity"], "correlation": None}
    assert "too few experts" in page.render(Path("run"), {"experts": [two]})


def test_a_page_of_nothing_and_of_bare_rows():
    assert "planearly report" in page.render(Path("run"), {})
    html = page.render(Path("run"), {"rows": [{"method": "new", "domain": "d", "ppl_after": 3.0}],
                                     "curves": [{"stage": "pretraining", "method": "new",
                                                 "domain": "d", "metrics": []}]})
    assert "Perplexity on d after fine-tuning: new 3.00." in html


def test_a_method_is_told_as_it_adapted():
    one = row("slm-adapt", "law", 60.0, 50.0)
    for rows, drawn in (([one], ["resampled to look"]),
                        ([one, {**one, "draws": "dsir"}, {**one, "draws": "generic"}],
                         ["resampled to look", r"a selector \(dsir\) takes", "the same corpus"])):
        told = page.render(Path("run"), {"recipe": {}, "rows": rows})
        assert len(re.findall("<strong>SLM-adapt</strong>", told)) == len(drawn)
        assert all(re.search(f"for the last part on [^.]*{each}", told) for each in drawn)


def test_the_same_facts_give_the_same_page():
    assert page.render(Path("run"), example(["a"])) == page.render(Path("run"), example(["a"]))


def test_summary_of_one_domain_says_what_importance_sampling_bought():
    first, second = sentences.summary(example(["sklearn"])["rows"])
    assert first == ("After fine-tuning, SLM-is reaches a perplexity of 31.2 on sklearn, where the "
                     "same model without importance sampling reaches 35.0, at the same 2.5M tokens "
                     "of pretraining: 10.9% lower, beyond the 95% interval over documents; this is "
                     "one training of each, and another could differ by about 0.04 nats per "
                     "token.")
    assert second == ("Fine-tuning on the domain's documents brought SLM-is from 44.1 to 31.2.")


def test_summary_does_not_claim_what_the_intervals_do_not_carry():
    close = [row("slm", "d", 60, 35.0, 0.1), row("slm-is", "d", 50, 34.0, 0.1)]
    sentence = sentences.summary(close)[0]
    assert "2.9% lower, but within the 95% interval over documents, so the two cannot" in sentence
    sentence = sentences.summary([row("slm", "d", 60, 30.0), row("slm-is", "d", 50, 36.0)])[0]
    assert "20.0% higher, beyond the 95% interval over documents: here importance" in sentence
    unequal = [row("slm", "d", 60, 35), {**row("slm-is", "d", 50, 30), "pretrain_tokens": 9}]
    assert "at the same" not in sentences.summary(unequal)[0]


@pytest.mark.parametrize(("a", "b", "bounds", "says"), [
    ("slm-is", "slm", [-0.05, -0.01], "2.9% lower, beyond the 95%"),
    ("slm", "slm-is", [0.01, 0.05], "2.9% lower, beyond the 95%"),
    ("slm", "slm-is", [-0.01, 0.05], "2.9% lower, but within the 95%"),
    ("slm", "slm-is", [0.0, 0.05], "2.9% lower, but within the 95%"),
])
def test_summary_prefers_the_paired_difference(a, b, bounds, says):
    rows = [row("slm", "d", 60, 35.0, 0.1), row("slm-is", "d", 50, 34.0, 0.1)]
    other = {"domain": "e", "a": "slm-is", "b": "slm", "difference": 1.0, "ci95": [0.9, 1.1]}
    paired = {"domain": "d", "a": a, "b": b, "difference": sum(bounds) / 2, "ci95": bounds}
    assert says in sentences.summary(rows, [other, paired])[0]


def test_summary_of_several_domains_averages_their_losses():
    rows = [row("slm", "a", 60, 20.0), row("slm", "b", 60, 80.0), row("slm", "c", 60, 40.0),
            row("slm-is", "a", 60, 10.0), row("slm-is", "b", 60, 79.0), row("slm-is", "c", 60, 50)]
    sentence, = sentences.summary(rows, (), macro(rows))
    mean = math.exp((math.log(10) + math.log(79) + math.log(50)) / 3)
    assert f"Over 3 domains, SLM-is reaches a macro-averaged perplexity of {mean:.1f}" in sentence
    assert "reaches 40.0, at the same" in sentence
    assert "is lower in 1 of them and higher in 1; this is one training of each" in sentence
    rows += [row("llm", d, 30, 9.0) for d in "abc"]
    best = sentences.summary(rows, (), macro(rows))[1]
    assert best == ("The lowest macro-averaged perplexity over the 3 domains after fine-tuning is "
                    "that of LLM, 9.00.")


def test_a_comparison_names_the_better_method_and_what_its_interval_leaves_out():
    pair = {"domain": "law", "a": "slm-is", "b": "slm", "difference": -0.1, "ci95": [-0.2, -0.05]}
    said = sentences.compared(pair)
    assert "slm-is is 0.1000 nats per token better than slm on these documents" in said
    assert "0.0500 to 0.2000" in said and "another could differ by about 0.04 nats" in said
    other = {**pair, "difference": 0.1, "ci95": [0.05, 0.2]}
    assert "slm is 0.1000 nats per token better than slm-is" in sentences.compared(other)
    for edge in ([-0.3, 0.1], [-0.3, 0.0], [0.0, 0.3]):  # 0 in the interval, or on it
        assert "cannot be told apart" in sentences.compared({**pair, "ci95": edge})


def test_generic_perplexity_of_experts_is_labelled():
    html = page.render(Path("run"), {"rows": [row("slm", "d", 3, 2), row("slm-pn", "d", 3, 2)]})
    assert html.count("<small>routed</small>") == 1 and "this very text chooses" in html
    assert "routed" not in page.render(Path("run"), {"rows": [row("slm", "d", 3, 2)]})
    bundled = {**row("slm-pn", "d", 3, 2), "generic_ppl_routed": False}  # of its one expert
    assert "routed" not in page.render(Path("run"), {"rows": [bundled]})


def test_characteristic_words_name_a_cluster_and_not_its_function_words():
    rng = np.random.default_rng(0)
    common = ["the", "of", "and", "returns", "value", "with"]
    texts, clusters = [], []
    for i in range(200):
        texts.append(" ".join(rng.permutation(common * 5 + TOPICS[i % 5] * 2)))
        clusters.append(i % 5)
    texts.append("oddity " * 500)
    clusters.append(0)
    found = words.characteristic_words(texts, clusters, 5)
    assert {c: set(found[c]) for c in range(5)} == {c: set(TOPICS[c]) for c in range(5)}


def test_characteristic_words_of_other_scripts_and_of_nothing():
    found = words.characteristic_words(["данные модель", "данные модель", "über maß 12"], [3, 3, 1])
    assert found == {1: [], 3: ["данные", "модель"]}
    assert words.characteristic_words([], []) == {}
    hindi = words.characteristic_words(["हिन्दी में"] * 2 + ["ภาษาไทยที่ดี abc"], [0, 0, 1])
    assert set(hindi[0]) == {"हिन्दी", "में"}  # not broken at their vowel signs
    asian = words.characteristic_words(["นักเรียนอ่านหนังสือ。学习中文"] * 2 + ["abc"], [0, 0, 1])
    assert set(asian[0]) == {"นักเรียน", "อ่าน", "หนังสือ", "学习", "中文"}


def test_nearest_windows_are_those_of_largest_cosine_within_the_cluster():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 8)).astype(np.float16)
    centroids = rng.normal(size=(5, 8)).astype(np.float32)
    assignment = rng.integers(0, 4, 300)
    nearest = words.nearest_windows(points, assignment, centroids, range(5))
    assert nearest.keys() == {0, 1, 2, 3}
    cosines = points.astype(np.float32) @ centroids.T
    for cluster, window in nearest.items():
        assert assignment[window] == cluster
        assert cosines[window, cluster] == cosines[assignment == cluster, cluster].max()


def test_snippet_is_one_line_cut_between_words():
    assert words.snippet("  a\n\n b ") == "a b"
    assert words.snippet("alpha beta gamma", 12) == "alpha beta …"
