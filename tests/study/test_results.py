"""The study that the repository keeps: what its page says is what its rows give."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from planearly.config import look_up
from planearly.errors import UserError
from planearly.files import read_json, write_json
from planearly.plan.recommend import RESAMPLING_PAYS
from planearly.report import table
from planearly.studies import suite
from planearly.studies.paper import SUITE
from planearly.study import compare, seeds, view
from planearly.study.compare import Arm, Cells
from planearly.study.run import again

NANO = Path(__file__).parents[2] / "docs/results/nano"
KEPT = sorted(path.parent for path in NANO.parent.glob("*/study.json"))
ANEW = "make it anew: planearly study docs/results/NAME/study.json --report"


@pytest.fixture(scope="module")
def nano():
    return read_json(NANO / "study.json")


@pytest.fixture(scope="module")
def seen(nano):
    return view.view(nano, SUITE)


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: path.name)
def test_a_kept_page_and_its_tables_are_those_of_the_kept_rows(folder):
    study = read_json(folder / "study.json")
    this = view.view(study, suite(look_up(study["recipe"], "study.suite") or "paper"))
    page = (folder / "index.html").read_text("utf-8")
    page = re.sub("<figure>.*?</figure>\n", "", page, flags=re.DOTALL)
    assert view.text(this, "study_page.html.j2") == page, ANEW
    assert view.text(this, "readme.md.j2") == (folder / "README.md").read_text("utf-8"), ANEW
    names = {path.stem for path in (folder / "tables").glob("*.json")}
    assert names == {one.name for one in this.tables}
    for one in this.tables:
        kept = table.read(folder / "tables" / f"{one.name}.json")
        assert json.loads(json.dumps(one.to_dict())) == kept.to_dict(), f"{one.name}: {ANEW}"


def test_the_kept_claims_are_of_the_kept_rows(nano, seen):
    rows = [row for row in nano["rows"] if row["method"] == "slm" and row["settings"] == {
        **row["settings"], "pretrain_tokens": 4_000_000, "spec_tokens": 50_000, "seed": 0,
        "pretrain.optimizer.preset": "modern", "finetune.replay_share": 0.0,
        "data.max_tokens": None}]
    nats = np.mean([sum(row["nll_after"]) / sum(row["tokens"]) for row in rows])
    assert len(rows) == 9
    claim = next(each for each in seen.claims if "the large one with 4M tokens" in each.text)
    assert f"fine-tuning) {math.exp(nats):.2f} against llm" in claim.evidence


@pytest.mark.parametrize("rows", [None, [{"method": "slm", "domain": "law", "ppl_after": 3.0}]])
def test_a_file_of_other_rows_is_refused(tmp_path, rows):
    other = tmp_path / "other.json"
    write_json(other, {"name": "other", "recipe": {}, "rows": rows})
    with pytest.raises(UserError, match=r"other\.json is not a study\.json"):
        again(other, tmp_path, suite)


def test_a_study_file_alone_makes_its_page_anew(tmp_path, nano, monkeypatch):
    monkeypatch.setattr(view.chart, "draw", lambda table: None)  # slow, and not what is asked
    assert again(NANO / "study.json", tmp_path, suite) == tmp_path / "index.html"
    assert read_json(tmp_path / "study.json") == nano
    for name in ("README.md", "tables/table-04-baselines.csv"):
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes(), ANEW


def test_the_readme_s_table_is_of_the_kept_rows():
    cells = Cells(read_json(NANO.parent / "regime/study.json"))
    lines = (NANO.parents[2] / "README.md").read_text("utf-8").splitlines()
    start = lines.index("| tokens of pretraining | 9.5M | 19M | 38M | 50M |")
    shown = [[cell.strip(" *") for cell in line.strip("|").split("|")[1:]]
             for line in lines[start + 2:start + 9]]

    def perplexities(method, budgets, **changes):
        return [f"{compare.macro(list(cells.rows(arm).values()))['perplexity']:.1f}"
                for budget in budgets
                for arm in [Arm(method, {compare.BUDGET: int(budget * 1e6), **changes})]]

    network, large = (5.8, 11.6, 23.2, 34.7), (2.7, 5.4, 10.8, 16.2)
    assert shown == [
        perplexities("slm", (9.5, 19, 38, 50)), perplexities("slm-pn", network),
        perplexities("slm-pn", network, expert="blend"),
        perplexities("slm-mix", (9.5, 19, 38, 56.6)),
        [*perplexities("slm-is", (12.5,)), "", "", ""],
        [*perplexities("slm-nopt", (12.5,)), "", "", ""], perplexities("llm", large)]
    assert f"(6.2M: {perplexities('slm-is', (6.2,))[0]})" in lines[start + 6]
    assert f"adapters {perplexities('llm-lora', (16.2,))[0]})" in lines[start + 8]


def test_what_distillation_gains_over_the_very_pretraining_of_its_student():
    cells = Cells(read_json(NANO.parent / "again/study.json"))
    told = (NANO.parents[1] / "experiments.md").read_text("utf-8").replace("\n  ", " ")
    budget = {compare.BUDGET: 50_000_000}

    def gains(teacher, domains):
        arms = Arm("slm-d", {**budget, "distill.teacher_tokens": teacher}), Arm("slm", budget)
        assert len({row["generic_cost"]["tokens"] for row in cells.rows(arms[1]).values()}) == 1
        found = [compare.difference(cells, *(arm.at(seed=seed) for arm in arms), domains)
                 for seed in (0, 1)]
        assert all(each and len(each.domains) == len(domains) for each in found)
        return found

    whole = " and ".join(f"{-each.nats:.3f} [{-each.high:.3f}, {-each.low:.3f}]"
                         for each in gains(16_200_000, cells.domains))
    assert f"it gains {whole} on nine domains" in told
    four = ["arxiv", "openwebtext2", "pubmed_abstracts", "wikipedia"]
    least = [" and ".join(f"{-each.nats:.3f}" for each in gains(tokens, four)).replace("-", "−")
             for tokens in (16_200_000, 10_800_000, 5_400_000, 2_700_000)]
    assert ("{} with 16.2M, {} with 10.8M, {} with 5.4M, {} with 2.7M".format(*least)) in told


def test_the_study_in_bfloat16_has_the_numbers_of_the_one_in_float32():
    cells = {name: Cells(read_json(NANO.parent / name / "study.json"))
             for name in ("bf16", "regime", "again")}
    told = (NANO.parents[1] / "experiments.md").read_text("utf-8").replace("\n", " ")
    budgets = {"slm": 50_000_000, "slm-is": 12_500_000, "slm-pn": 34_700_000}

    def nats(name, method, seed):
        """Of each domain, after fine-tuning."""
        arm = Arm(method, {compare.BUDGET: budgets[method]}).at(seed=seed)
        rows = cells[name].rows(arm)
        assert len(rows) == 9
        return np.array([sum(rows[domain]["nll_after"]) / sum(rows[domain]["tokens"])
                         for domain in sorted(rows)])

    def moved_from(name, method):
        return [nats("bf16", method, seed) - nats(name, method, seed) for seed in (0, 1)]

    def means(both):
        return " and ".join(f"{each.mean():+.3f}".replace("-", "−") for each in both)

    arms = [Arm("slm", {compare.BUDGET: budgets["slm"]}).at(seed=seed) for seed in (0, 1)]
    for arm in arms:  # the very same rows in the same order
        counts = [{domain: row["pretrain_tokens"] for domain, row in cells[name].rows(arm).items()}
                  for name in ("bf16", "again")]
        assert counts[0] == counts[1] and len(counts[0]) == 9
    alike = moved_from("again", "slm")
    assert (f"differs from it after fine-tuning by {means(alike)} nats per token (first and second "
            f"seed, mean over nine domains), at most {np.abs(alike).max():.3f} on a domain") in told
    moved = {method: moved_from("regime", method) for method in budgets}
    said = {method: means(both) for method, both in moved.items()}
    assert f"`slm` differs from these by {said['slm']} nats per token" in told
    assert (f"importance sampling by {said['slm-is']}, the network by {said['slm-pn']}, within "
            f"{max(np.abs(both).max() for both in moved.values()):.3f} on single domains") in told

    def less(name, method):
        found = np.mean([nats(name, method, seed) - nats(name, "slm", seed) for seed in (0, 1)])
        return f"{found:+.3f}".replace("-", "−")

    sampling, network = ([less(name, method) for name in ("bf16", "regime")]
                         for method in ("slm-is", "slm-pn"))
    assert "importance sampling less `slm` {} ({} in float32".format(*sampling) in told
    assert "the network less `slm` {} ({})".format(*network) in told


def test_a_seed_does_alike_to_a_pair_at_several_budgets():
    """The correlation by which budgets are counted is that of the kept studies (seeds.ALIKE)."""
    found = []
    for name in ("split", "regime"):
        cells = Cells(read_json(NANO.parent / name / "study.json"))
        for a, b in itertools.combinations(cells.methods, 2):
            moved = _moved_by_a_seed(cells, [(1.0, Arm(a)), (-1.0, Arm(b))])
            if len(moved) > 1:  # mean over pairs of rows of unit length: their correlation
                many, unit = len(moved), moved / np.linalg.norm(moved, axis=1, keepdims=True)
                found.append(((unit.sum(0) ** 2).sum() / many - 1) / (many - 1))
    assert np.mean(found) == pytest.approx(seeds.ALIKE, abs=0.05)


def _moved_by_a_seed(cells, terms):
    """The contrast by set of pretrainings and seed, less its mean over seeds."""
    rows: dict[str, list] = {}
    for name, at in seeds._contexts(cells, terms):
        of = [seeds.at_seed(at, seed) for seed in (cells.own("seed"), *cells.seeds())]
        shared = set.intersection(*(set(compare.shared(cells, [arm for _, arm in there]))
                                    for there in of))
        if shared:
            rows.setdefault(name, []).append([np.mean(
                [nats for nats, _, _ in compare.per_domain(cells, there, shared).values()])
                for there in of])
    moved = np.array([np.mean(each, axis=0) for each in rows.values()])
    return moved - moved.mean(axis=1, keepdims=True) if rows else moved


# What the domains' own sources are worth ----------------------------------------------------------

EXPERTS = {"projected.experts": 32, "projected.rank": 23, "expert": "lowest-loss"}


def gains(name: str, method: str, seeds: range) -> dict[str, float]:
    """Of a kept study: a method less slm of 34.7M tokens, nats per token, the seeds' mean, by
    domain."""
    found: dict[tuple, float] = {}
    for row in read_json(NANO.parent / name / "study.json")["rows"]:
        told = row["settings"]
        wanted: dict[str, object] = {"spec_tokens": 32_000}
        if row["method"] == "slm-pn":
            wanted |= EXPERTS
        if row["method"] != "slm-is":
            wanted["pretrain_tokens"] = 34_700_000
        if row["method"] in ("slm", method) and all(
                told.get(key, value) == value for key, value in wanted.items()):
            found[row["method"], row["domain"], told["seed"]] = (
                sum(row["nll_after"]) / sum(row["tokens"]))
    domains = sorted({domain for _, domain, _ in found})
    return {domain: float(np.mean([found[method, domain, seed] - found["slm", domain, seed]
                                   for seed in seeds])) for domain in domains}


@pytest.mark.parametrize(("method", "both", "of_each", "over_domains"), [
    ("slm-pn", (-0.173, -0.037), [0.18, 0.04, 0.05, 0.12, 0.07, 0.36], (0.136, 0.009, 0.263)),
    ("slm-is", (-0.524, -0.238), [0.52, 0.13, 0.08, 0.56, 0.12, 0.31], (0.286, 0.063, 0.509))])
def test_what_sources_in_the_corpus_are_worth_is_that_of_the_kept_rows(
        method, both, of_each, over_domains):
    inside, outside = (gains(name, method, range(2)) for name in ("inside", "outside"))
    for arm, told in zip((inside, outside), both, strict=True):
        assert np.mean([*arm.values()]) == pytest.approx(told, abs=6e-4)
    more = np.array([outside[domain] - inside[domain] for domain in inside])
    np.testing.assert_allclose(more, of_each, atol=6e-3)
    half = 2.5706 * more.std(ddof=1) / math.sqrt(len(more))  # Student's, five degrees
    told, share = {"slm-pn": (-0.078, 1 / 3), "slm-is": (-0.429, 2 / 3)}[method]
    tenth = np.mean([*gains("tenth", method, range(2)).values()])
    assert tenth == pytest.approx(told, abs=6e-4)
    assert (both[1] - tenth) / (both[1] - both[0]) == pytest.approx(share, abs=0.04)
    assert (more.mean(), more.mean() - half, more.mean() + half) == pytest.approx(
        over_domains, abs=1e-3)


# What trigrams foresee ----------------------------------------------------------------------------

FORESEEN = read_json(NANO.parent / "foresight.json")


def foreseen(study: str, domain: str, by: str = "trigrams", method: str = "slm-is",
             k: int = 256) -> float:
    """Nats better than the corpus as it is, the mean of two seeds."""
    found = [row[by] if by == "histogram" else row[by]["gain"] for row in FORESEEN
             if (row["study"], row["domain"], row["method"], row["k"]) == (
                 f"study-{study}", domain, method, k)]
    assert len(found) == 2
    return float(np.mean(found))


def found(name: str, tokens: int, **wanted: object) -> dict[tuple, float]:
    """Nats per token after fine-tuning by method, k, domain and seed, of a kept study's rows."""
    return {(row["method"], row.get("k"), row["domain"], row["settings"]["seed"]):
            sum(row["nll_after"]) / sum(row["tokens"])
            for row in read_json(NANO.parent / name / "study.json")["rows"]
            if row["settings"] == {**row["settings"], "pretrain_tokens": tokens, **wanted}}


def pairs(method: str) -> list[tuple[str, str, float]]:
    """Study, domain and a method's difference from slm, of 21 pairs of a domain and a corpus."""
    told = [(name, domain, gain) for name in ("inside", "outside")
            for domain, gain in gains(name, method, range(2)).items()]
    if method == "slm-pn":
        told += [("regime", *each) for each in gains("regime", "slm-pn", range(3)).items()]
    else:
        shape = {"spec_tokens": 32_000, "model.d_model": 48}
        plain = found("regime", 50_000_000, **shape)
        resampled = found("regime", 12_500_000, **shape, **{"importance.k": 256})
        told += [("regime", domain, float(np.mean([
            resampled["slm-is", 256, domain, seed] - plain["slm", None, domain, seed]
            for seed in range(3)]))) for domain in sorted({of for _, _, of, _ in resampled})]
    assert len(told) == 21
    return told


def ranked(x: list[float], y: list[float]) -> float:
    return float(np.corrcoef(*(np.argsort(np.argsort(each)) for each in (x, y)))[0, 1])


@pytest.mark.parametrize(("method", "ranks", "line", "left", "level"), [
    ("slm-is", (0.95, 0.94, 0.88, 0.75), (0.121, -0.814), 0.11, 0.15),
    ("slm-pn", (0.72, 0.71, 0.62, 0.54), (0.038, -0.212), 0.07, 0.18)])
def test_trigrams_foresee_what_resampling_gains_as_the_page_says(method, ranks, line, left, level):
    told = pairs(method)
    gain = [each for _, _, each in told]
    for by, rank in zip(("trigrams", "bigrams", "unigrams", "histogram"), ranks, strict=True):
        x = [foreseen(study, domain, by) for study, domain, _ in told]
        assert ranked(x, gain) == pytest.approx(-rank, abs=6e-3)
    x = [foreseen(study, domain) for study, domain, _ in told]
    slope, start = np.polyfit(x, gain, 1)
    assert (start, slope) == pytest.approx(line, abs=6e-4)
    rest = np.array(gain) - start - slope * np.array(x)
    assert rest.std(ddof=2) == pytest.approx(left, abs=6e-3)
    assert -start / slope == pytest.approx(level, abs=6e-3)
    if method == "slm-is":
        told += [("tenth", *each) for each in gains("tenth", method, range(2)).items()]
        assert level == RESAMPLING_PAYS and len(told) == 27
        assert all((foreseen(study, domain) >= level) == (each < 0) for study, domain, each in told)


def test_at_equal_tokens_resampling_pays_as_the_page_says():
    kept = read_json(NANO.parent / "split/study.json")["rows"]
    for when, line in (("nll_after", (-0.040, -0.404)), ("nll_before", (-0.052, -0.795))):
        nats = {(row["method"], row["domain"], row["settings"]["seed"]):
                sum(row[when]) / sum(row["tokens"]) for row in kept
                if row["method"] in ("slm", "slm-is") and row["settings"] == {
                    **row["settings"], "pretrain_tokens": 4_000_000, "projected.blends": 0,
                    "pretrain.specialization_share": 0.0}}
        domains = sorted({domain for _, domain, _ in nats})
        gain = [np.mean([nats["slm-is", domain, seed] - nats["slm", domain, seed]
                         for seed in range(3)]) for domain in domains]
        slope, start = np.polyfit([foreseen("regime", domain) for domain in domains], gain, 1)
        assert len(domains) == 9 and (start, slope) == pytest.approx(line, abs=6e-4)


def test_trigrams_rank_ways_to_draw_as_the_page_says():
    nats = found("regime", 12_500_000, spec_tokens=32_000, **{"model.d_model": 48})
    before, after, top = [], [], {}
    for domain in ("arxiv", "openwebtext2", "pubmed_abstracts", "wikipedia"):
        for method, k in (("slm-is", 16), ("slm-is", 64), ("slm-is", 1024), ("slm-top", 16),
                          ("slm-top", 256)):
            before.append(foreseen("regime", domain)
                          - foreseen("regime", domain, method=method, k=k))
            after.append(float(np.mean([nats[method, k, domain, seed]
                                        - nats["slm-is", 256, domain, seed] for seed in (0, 1)])))
        top[domain] = before[-1], after[-1]
    assert len(before) == 20 and ranked(before, after) == pytest.approx(0.93, abs=6e-3)
    assert [round(find(x for x, _ in top.values()), 1) for find in (min, max)] == [0.2, 0.9]
    assert round(top.pop("openwebtext2")[1], 1) == 3.5
    assert [round(find(y for _, y in top.values()), 1) for find in (min, max)] == [0.2, 0.4]


TENTH = {  # foreseen, importance sampling by the line and found, the network by its line and found
    "bible_kjv": (1.27, -0.91, -0.49, -0.23, -0.06),
    "digitalgov": (0.32, -0.14, -0.06, -0.03, -0.03),
    "imdb_reviews": (0.35, -0.16, -0.10, -0.04, -0.04),
    "medquad": (1.06, -0.74, -0.68, -0.19, -0.12),
    "python_peps": (0.42, -0.22, -0.23, -0.05, -0.07),
    "stacks_project": (2.05, -1.55, -1.01, -0.40, -0.15)}


def test_what_was_foreseen_of_a_tenth_of_the_sources_is_that_of_the_page():
    gain = {method: gains("tenth", method, range(2)) for method in ("slm-is", "slm-pn")}
    x = [foreseen("tenth", domain) for domain in TENTH]
    for domain, at, told in zip(TENTH, x, TENTH.values(), strict=True):
        assert (at, 0.121 - 0.814 * at, gain["slm-is"][domain], 0.038 - 0.212 * at,
                gain["slm-pn"][domain]) == pytest.approx(told, abs=6e-3)
    ranks = [ranked(x, [gain[method][domain] for domain in TENTH]) for method in gain]
    assert ranks == pytest.approx([-0.94, -0.83], abs=6e-3)
    page = (NANO.parents[1] / "experiments.md").read_text("utf-8")
    for column, row in enumerate(("foreseen by trigrams", "importance sampling less `slm`, by the",
                                  "found", "network less `slm`, by its line", "found")):
        said = " | ".join(f"{told[column]:.2f}".replace("-", "−") for told in TENTH.values())
        assert re.search(re.escape(row) + r"[^|]* \| " + re.escape(said), page), (row, said)
