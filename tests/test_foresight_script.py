"""benchmarks/foresight.py: shorter sequences beside the trigrams that a run tells of."""

import importlib.util
from pathlib import Path

import pytest

from planearly import methods
from planearly.stages import trained
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from small_runs import recipe

SCRIPT = Path(__file__).parents[1] / "benchmarks/foresight.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("foresight_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_trigrams_are_those_of_the_run_and_a_row_tells_shorter_ones_too(
        script, made, tmp_path):
    run = Run(tmp_path / "run", recipe(made, methods=["slm", "slm-is", "slm-dsir", "slm-color"]))
    with run.opened():
        rows = list(script.foreseen(run, "a study"))
        told = {name: facts(trained.weigh(run, methods.find(name), "law"))
                for name in ("slm-is", "slm-dsir")}
    assert [row["method"] for row in rows] == ["slm-is", "slm-dsir"]
    for row in rows:
        assert row["trigrams"] == {key: told[row["method"]][key] for key in ("gain", "ci95")}
        assert row["unigrams"]["gain"] > 0 and row["bigrams"]["gain"] > 0
        assert (row["study"], row["domain"], row["seed"]) == ("a study", "law", 0)
    assert rows[0]["histogram"] > 0 and "histogram" not in rows[1]


@pytest.mark.parametrize(("words", "says"), [
    (["nosuch"], "there is no recipe 'nosuch'"), (["demo", "methods=[x]"], "names 'x'"),
    (["demo", "--json", "here"], "holds no list")])
def test_a_wrong_use_is_one_sentence(script, tmp_path, monkeypatch, capsys, words, says):
    (tmp_path / "here").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["foresight.py", *words, "--out", "run"])
    with pytest.raises(SystemExit):
        script.main()
    assert says in capsys.readouterr().err.splitlines()[-1]
