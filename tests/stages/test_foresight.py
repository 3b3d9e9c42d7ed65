"""What a way to draw the corpus is worth to a domain, before anything is trained."""

import json

import numpy as np
import pytest

from planearly import methods
from planearly.data.dataset import IGNORE, TokenDataset
from planearly.evaluate import perplexity
from planearly.evaluate.trigrams import Trigrams
from planearly.files import read_array, write_array
from planearly.stages import corpus, foresight, pipeline, trained
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
        assert low < one["difference"] < high < 0
        assert one["difference"] == pytest.approx(one["drawn"] - one["corpus"])
        assert (f"foretells its validation text by {-one['difference']:.2f} nats per token "
                f"[{-high:.2f}, {-low:.2f}] better than one of the corpus as it is") in said
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
    for key, value in perplexity.paired(ours, theirs, tokens).items():
        assert found[key] == pytest.approx(value)


@pytest.mark.parametrize(("difference", "says"), [
    (-0.3, "by 0.30 nats per token [0.20, 0.40] better than"),
    (0.3, "by 0.30 nats per token [0.20, 0.40] worse than"),
    (-0.05, "by 0.05 nats per token [-0.05, 0.15] better than"),
    (0.05, "by 0.05 nats per token [-0.05, 0.15] worse than")])
def test_the_sentence_says_which_foretells_better(difference, says):
    assert says in foresight.explain(
        {"difference": difference, "ci95": [difference - 0.1, difference + 0.1]})


def test_what_comes_again_is_hardly_counted():
    has, weights = np.array([1000, 50, 10]), np.array([60.0, 40.0, 0.0])
    assert foresight.counted(has, weights, 100) == 100  # 40 of the 50
    assert foresight.counted(has, weights, 150) == 150  # 60 of the 50: ten more, 7%
    assert foresight.counted(has, weights, 200) == 100  # 80 of the 50
    assert foresight.counted(np.array([1]), np.ones(1), 1000) == 1


def test_a_model_of_the_corpus_leaves_out_what_training_leaves_out(made, tmp_path):
    """With all but a few documents excluded no more is counted than these hold."""
    run = Run(tmp_path / "run", recipe(made, methods=["slm"]))
    with run.opened():
        dataset = TokenDataset(corpus.generic(run))
        excluded = np.ones(len(dataset.documents), bool)
        excluded[[3, 8]] = False
        write_array(corpus.kept(run) / "excluded.npy", excluded)
        some = foresight.of_corpus(run, 10**6)
        windows = dataset.windows_without(excluded)
    whole = Trigrams(*dataset.rows(list(windows[:, None])), 320)
    inputs, targets = dataset.rows(list(np.arange(50)[:, None]))
    assert (targets != IGNORE).sum() > 100
    np.testing.assert_array_equal(some.nats(inputs, targets), whole.nats(inputs, targets))
    assert read_array(corpus.kept(run) / "excluded.npy").sum() == len(excluded) - 2


def test_a_run_notes_it_in_its_results(made, tmp_path):
    run = recipe(made, methods=["slm", "slm-is"])
    results = pipeline.run(run, tmp_path / "run")
    rows = {row["method"]: row for row in results["rows"]}
    assert "foresight" not in rows["slm"]
    assert rows["slm-is"]["foresight"]["difference"] < 0
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Foreseen by trigrams" in page
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"][1][
        "foresight"] == rows["slm-is"]["foresight"]
