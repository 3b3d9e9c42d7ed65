"""What a way to draw the corpus is worth to a domain, before anything is trained."""

import json

import numpy as np
import pytest

from planearly import methods
from planearly.cost.devices import SHEETS, from_sheet
from planearly.data.dataset import IGNORE, TokenDataset
from planearly.errors import UserError
from planearly.evaluate import perplexity
from planearly.evaluate.trigrams import Trigrams, side_by_side
from planearly.files import write_array
from planearly.stages import corpus, foresight, pipeline, report, trained
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from small_runs import recipe


def told(run: Run, method: str) -> dict | None:
    stage = trained.weigh(run, methods.of(run.recipe, method), "law")
    return stage and facts(stage)


def test_text_drawn_for_the_domain_foretells_it_better(made, tmp_path, capsys):
    run = Run(tmp_path / "run", recipe(made, methods=["slm"]))
    with run.opened():
        found = {method: told(run, method) for method in (
            "slm", "slm-pn", "slm-nopt", "slm-color", "slm-is", "slm-dsir", "slm-adapt")}
        said = capsys.readouterr().err
        assert told(run, "slm-is") == found["slm-is"]
    assert [name for name, one in found.items() if one is None] == [
        "slm", "slm-pn", "slm-nopt", "slm-color"]
    for name in ("slm-is", "slm-dsir", "slm-adapt"):
        one = found[name]
        low, high = one["ci95"]
        assert 0 < low < one["gain"] < high
        assert one["gain"] == pytest.approx(one["corpus"] - one["drawn"])
        assert (f"foretells its validation text by {one['gain']:.2f} nats per token [{low:.2f}, "
                f"{high:.2f}] better than one of as many of the corpus as it is") in said
    assert "foretells" not in capsys.readouterr().err


def test_it_is_the_paired_difference_of_models_of_what_training_reads(made, tmp_path):
    run = Run(tmp_path / "run", recipe(made, methods=["slm-is"]))
    with run.opened():
        found = told(run, "slm-is")
        drawn = trained.by_importance(run, "law")
        dataset, windows = corpus.held_out(run, "law", "valid")
        batch = trained.training.generic_stream(run, drawn.rows, drawn.weights).batch(0, 192)
    assert found["tokens"] == (batch.targets.numpy() != IGNORE).sum()
    models = [Trigrams(batch.inputs.numpy(), batch.targets.numpy(), 320),
              foresight.of_corpus(run, found["tokens"])]
    scores = [model.score(dataset, windows) for model in models]
    (ours, tokens), (theirs, _) = (score.units() for score in scores)
    assert len(tokens) == 12 and found["units"] == 12  # documents
    assert found["drawn"] == pytest.approx(ours.sum() / tokens.sum())
    pair = perplexity.paired(theirs, ours, tokens)
    assert found["gain"] == pytest.approx(pair["difference"])
    assert found["ci95"] == pytest.approx(pair["ci95"])


@pytest.mark.parametrize(("gain", "says"), [
    (0.3, "of 12k tokens of what is drawn foretells its validation text by 0.30 nats per token "
          "[0.20, 0.40] better than"),
    (-0.3, "by 0.30 nats per token [0.20, 0.40] worse than"),
    (0.05, "by 0.05 nats per token [-0.05, 0.15] better than"),
    (-0.05, "by 0.05 nats per token [-0.05, 0.15] worse than")])
def test_the_sentence_says_which_foretells_better(gain, says):
    assert says in foresight.explain(
        {"gain": gain, "ci95": [gain - 0.1, gain + 0.1], "tokens": 12_000})


def test_what_comes_again_is_hardly_counted():
    has, weights = np.array([1000, 50, 10]), np.array([60.0, 40.0, 0.0])
    assert foresight.counted(has, weights, 100) == 100  # 40 of the 50
    assert foresight.counted(has, weights, 150) == 150  # 60 of the 50: ten more, 7%
    assert foresight.counted(has, weights, 200) == 100  # 80 of the 50
    assert foresight.counted(np.array([1]), np.ones(1), 1000) == 1


def test_a_model_of_the_corpus_leaves_out_what_training_leaves_out(made, tmp_path, monkeypatch):
    """However much is excluded, as many tokens are counted as are asked for, spread over the rest;
    or all that is left."""
    counted = []
    monkeypatch.setattr(foresight, "Trigrams", lambda inputs, targets, _: counted.append(
        targets[targets != IGNORE]))
    run = Run(tmp_path / "run", recipe(made, methods=["slm"]))
    with run.opened():
        dataset = TokenDataset(corpus.generic(run))
        excluded = np.arange(len(dataset.documents)) % 10 < 9
        write_array(corpus.kept(run) / "excluded.npy", excluded)
        for tokens in (500, 10**6):
            foresight.of_corpus(run, tokens)
        windows = dataset.windows_without(excluded)
    few, every = counted
    assert 500 <= len(few) <= 500 + dataset.context
    assert len(every) == dataset.windows["length"][windows].sum()
    left = np.concatenate([dataset.tokens(window)[1:] for window in windows])
    assert sorted(every) == sorted(left)
    assert sorted(few) != sorted(left[:len(few)])  # which a sample is not


def test_windows_of_any_length_lie_side_by_side_in_their_order(made, tmp_path):
    run = Run(tmp_path / "run", recipe(made, methods=["slm"]))
    with run.opened():
        dataset = TokenDataset(corpus.generic(run))
    windows = np.random.default_rng(0).permutation(len(dataset))[:200]
    rows = side_by_side(dataset, windows)
    assert np.concatenate(rows).tolist() == windows.tolist()
    sizes = [int(dataset.windows["length"][row].sum()) for row in rows]
    assert max(sizes) <= dataset.context
    starts = [int(dataset.windows["length"][row[0]]) for row in rows[1:]]
    assert all(size + more > dataset.context
               for size, more in zip(sizes, starts, strict=False))
    assert side_by_side(dataset, windows[:0]) == []


def test_weighing_ends_in_a_table_of_what_is_foreseen(made, tmp_path, capsys):
    for _ in range(2):  # the second time nothing is made
        pipeline.run(recipe(made, methods=["slm", "slm-is", "slm-dsir"]), tmp_path / "run",
                     until="weigh")
        said = capsys.readouterr()
        rows = [line for line in said.out.splitlines() if " law " in line]
        assert [line.split()[3] for line in rows] == ["slm-is", "slm-dsir"]
        gain = rows[0].split()[5]
        assert f"for a plan: planearly plan --foreseen {gain} (of importance" in said.err


def test_it_is_told_before_the_training(made, tmp_path, capsys):
    run = Run(tmp_path / "run", recipe(made, methods=["slm-is"]))
    with run.opened():
        trained.specialize(run, "slm-is", "law")
    said = capsys.readouterr().err
    assert said.index("foretells its validation text") < said.index("── pretrain/slm-is")


def test_a_run_notes_it_in_its_results_and_its_plan_takes_it(made, tmp_path, monkeypatch):
    asked = []

    def planned(given):
        asked.append(given.foreseen)
        raise UserError("no plan is of interest here")

    monkeypatch.setattr(report.recommend, "recommend", planned)
    monkeypatch.setattr(report.devices, "find", lambda name: from_sheet(SHEETS[0]))
    run = recipe(made, methods=["slm", "slm-is"])
    results = pipeline.run(run, tmp_path / "run")
    rows = {row["method"]: row for row in results["rows"]}
    assert "foresight" not in rows["slm"]
    assert rows["slm-is"]["foresight"].keys() == {"gain", "ci95", "tokens"}
    assert rows["slm-is"]["foresight"]["gain"] > 0
    assert asked == [rows["slm-is"]["foresight"]["gain"]]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Foreseen by trigrams" in page
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"][1][
        "foresight"] == rows["slm-is"]["foresight"]
