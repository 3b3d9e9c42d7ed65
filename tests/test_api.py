"""The functions of Python: the same as the verbs, and importable whatever was imported before."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import scipy

import planearly
from planearly import api, config, keys, storage
from planearly.cli import main
from planearly.data import pydocs
from small_models import TEXT, model_folder
from small_runs import corpus, recipe
from small_stores import fill, put

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first-run.ipynb"
ASKED = {"inference_params": "126M", "generic_tokens": 150_000_000_000, "spec_tokens": "1M",
         "device": "a100", "generic_hours": 650, "specialization_hours": "1", "domains": 50}


def test_a_plan_is_what_the_command_prints(capsys):
    made = planearly.plan(**ASKED)
    main(["plan", "--json", *(word for name, value in ASKED.items()
                              for word in (f"--{name.replace('_', '-')}", str(value)))])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(made))
    assert planearly.plan(**ASKED) == made  # the package of this name is imported by now
    assert planearly.plan.recommend


def test_what_a_recipe_will_cost():
    told = planearly.plan("nano", device="a100", spec_tokens=50_000, model={"layers": 2})
    more = planearly.plan("nano", device="a100", spec_tokens=50_000, **{"model.layers": 8})
    assert told["total"]["flops"] < more["total"]["flops"]


@pytest.mark.parametrize("call", [
    lambda: planearly.run("nanno"), lambda: planearly.run("nano", contxt=3),
    lambda: planearly.run("nano", model={"layrs": 3}), lambda: planearly.run("nano", until="end"),
    lambda: planearly.run("nano", "s3://b/run"),
    lambda: planearly.plan(inference_params="50GB"), lambda: planearly.plan("nano", context=1),
    lambda: planearly.evaluate("no folder", ["x"]), lambda: planearly.generate("no folder", "x"),
    lambda: planearly.specialize("no folder", "x")])
def test_a_wrong_call_raises_one_sentence(call):
    with pytest.raises(planearly.UserError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_keys_change_a_recipe_given_in_any_form(tmp_path):
    by_name = api._recipe("nano", {"model": {"layers": 2}, "finetune.patience": 5})
    assert (by_name.model.layers, by_name.model.d_model, by_name.finetune.patience) == (2, 256, 5)
    assert api._recipe(config.load("nano"), {"model": {"layers": 2}, "finetune.patience": 5}
                       ) == by_name
    assert api._recipe({"generic": [tmp_path]}, {}) == keys.Recipe(generic=[str(tmp_path)])


def test_a_run_up_to_a_verb(tmp_path):
    made = recipe(corpus(tmp_path / "text"), methods=["slm"])
    assert planearly.run(made, tmp_path / "run", until="prepare", seed=3) is None
    assert config.load(tmp_path / "run" / "recipe.yaml").seed == 3


def test_a_model_is_evaluated_and_tried(tmp_path, capsys):
    model = model_folder(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(TEXT))
    found = planearly.evaluate(model, tmp_path / "a.txt")
    capsys.readouterr()
    main(["evaluate", str(model), str(tmp_path / "a.txt"), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    said = planearly.generate(model, "The quick", tokens=4, temperature=0)
    assert said.startswith("The quick")


def test_a_model_in_a_store_is_evaluated_and_tried(tmp_path, memory, capsys):
    model = model_folder(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT[0])
    fill(f"{memory}/model", model)
    url = put(f"{memory}/a.txt", TEXT[0].encode())
    found = planearly.evaluate(f"{memory}/model", url)
    assert list(found.pop("files")) == [url]
    ours = planearly.evaluate(model, tmp_path / "a.txt")
    assert ours.pop("files") and found == ours
    capsys.readouterr()
    for words in (["evaluate", f"{memory}/model", url, "--json"],
                  ["generate", f"{memory}/model", "a", "--tokens", "2"],
                  ["gguf", f"{memory}/model", "--out", str(tmp_path / "m.gguf")],
                  ["gguf", f"{memory}/model", "--out", f"{memory}/m.gguf", "--modelfile"],
                  ["push", str(model), f"{memory}/pushed"]):
        main(words)
    evaluated, continued = capsys.readouterr().out.splitlines()[:2]
    assert json.loads(evaluated)["perplexity"] == found["perplexity"]
    assert continued == planearly.generate(model, "a", tokens=2).splitlines()[0]
    assert (tmp_path / "m.gguf").read_bytes() == storage.local(f"{memory}/m.gguf").read_bytes()
    assert "FROM ./m.gguf" in storage.local(f"{memory}/Modelfile").read_text()
    assert planearly.generate(f"{memory}/pushed", "a", tokens=2) == continued
    with pytest.raises(SystemExit):
        main(["generate", f"{memory}/none", "a"])
    assert "none does not exist: check the bucket" in capsys.readouterr().err


def test_importing_brings_no_torch():
    done = subprocess.run([sys.executable, "-c", "import planearly, sys; "
                           "from planearly import cli; assert 'torch' not in sys.modules"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not NOTEBOOK.exists(), reason="not in a checkout")
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # of the installation, whose files take a minute to read: the domain and a little more
    monkeypatch.setattr(pydocs, "installation", lambda: [
        (module.__name__, Path(module.__file__).parent) for module in (scipy, numpy, json)])
    known: dict = {}
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), known)
    assert {row["method"] for row in known["results"]["rows"]} == {"slm", "slm-is"}
    assert known["planned"]["total"]["flops"] > 0
