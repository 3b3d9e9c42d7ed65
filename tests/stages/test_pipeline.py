"""The command, as a person runs it: whole runs, kills at any moment, errors of one sentence."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from planearly import keys, storage
from planearly.files import read_json
from planearly.stages import evaluate
from planearly.stages.folder import Run
from small_models import sentence_model
from small_runs import TOPICS, call, corpus, forked
from small_stores import fill

SETTINGS = [
    "name=small", "methods=[slm,slm-is]", "context=16", "pretrain_tokens=20000",
    "data.generic_eval_tokens=500", "tokenizer.vocab_size=320", "cluster.k=[3,6]",
    "model.layers=1", "model.d_model=32", "model.heads=2", "model.d_ff=48",
    "pretrain.batch_tokens=256", "finetune.batch_tokens=128", "finetune.max_epochs=2",
    "pretrain.log_steps=5", "pretrain.checkpoint_seconds=0", "finetune.checkpoint_seconds=0",
    # else it is decided by how long a step takes on this machine just now
    "pretrain.compile=no", "finetune.compile=no",
]


STAGES = ("tokenizer", "generic", "embeddings", "clusters", "pretrain/slm", "pretrain/slm-is.law",
          "specialize/slm.law", "evaluate/slm-is.law", "model/slm.law")
"""A run is killed in each of these."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe file on a corpus made up here."""
    root = corpus(tmp_path_factory.mktemp("text"))
    path = root / "small.yaml"
    lines = [f"generic: [{root / 'generic.jsonl'}]", f"domains_root: {root / 'domains'}"]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A finished run, by a process of its own."""
    out, told = (tmp_path_factory.mktemp(name) for name in ("whole", "told"))
    process = forked(told / "told", "run", recipe, *SETTINGS, "--out", out)
    process.join()
    assert process.exitcode == 0, (told / "told").read_text()[-3000:]
    return out


@pytest.mark.s3
@pytest.mark.slow
def test_a_run_from_and_to_a_store(recipe, whole, s3, tmp_path):
    fill(s3, recipe.parent)
    out = tmp_path / "run"
    words = [*SETTINGS, f"generic=[{s3}/gen*.jsonl]", f"domains_root={s3}/domains", "processes=2"]
    call("run", recipe, *words, "--out", out, "--to", f"{s3}/models")
    rows, ours = (json.loads((place / "results.json").read_text())["rows"]
                  for place in (out, whole))
    assert [row["ppl_after"] for row in rows] == [row["ppl_after"] for row in ours]
    there = storage.local(f"{s3}/models")
    assert (there / "report.html").read_bytes() == (out / "report.html").read_bytes()
    for row, other in zip(rows, ours, strict=True):
        assert (there / row["model"] / "model.safetensors").read_bytes() == (
            whole / other["model"] / "model.safetensors").read_bytes()
    told = call("export", out, "--to", f"{s3}/models").stderr
    assert "models and bundles 2, files sent now" in told and " 0 stages made" in told
    call("evaluate", f"{s3}/models/{rows[0]['model']}", f"{s3}/domains/law/test.jsonl")


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = sorted(out.glob("*/**/final.safetensors"))
    return {str(p.relative_to(out)): load_file(p) for p in found}


def results(out: Path) -> dict:
    """results.json without what a clock says."""
    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not k.endswith("_hours")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads((out / "results.json").read_text()))


@pytest.mark.slow
def test_rows_have_what_others_rely_on(whole):
    rows = results(whole)["rows"]
    assert [r["method"] for r in rows] == ["slm", "slm-is"]
    for row in rows:
        low, high = row["ppl_after_ci"]
        assert low < row["ppl_after"] < high
        assert row["ppl_after"] < row["ppl_before"]
        assert row["bpb_after"] > 0 and row["generic_ppl"] > 1
        assert row["params"] == row["inference_params"] > 10_000
        assert row["pretrain_tokens"] > 15_000 and row["spec_tokens"] > 0
        assert row["domain"] == "law"
        assert set(row["cost"]) >= {"tokens", "flops", "device"}
        assert (whole / row["model"] / "model.safetensors").exists()
        assert Path(row["model"]).name == "export"
    page = (whole / "report.html").read_text()
    assert "SLM-is" in page and "http://" not in page.split("</style>")[1].split("<svg")[0]


@pytest.mark.slow
def test_run_again_does_nothing(whole, recipe):
    def files():
        return {p: p.stat().st_mtime_ns for p in whole.glob("*/**/*")
                if p.is_file() and p.parent.name != ".locks"}

    before = files()
    again = call("run", recipe, *SETTINGS, "--out", whole)
    assert "0 stages made" in again.stderr
    assert before == files()


@pytest.mark.parametrize("old", ["{", "[]", '{"recipe": {}}'])
def test_results_of_something_else_are_set_aside_as_they_are(tmp_path, old):
    run = Run(tmp_path / "run", keys.Recipe())
    with run.opened():
        (run.out / "results.json").write_text(old)
        for _ in range(2):
            evaluate.write_results(run, [])
    assert read_json(run.out / "results.json")["recipe"] == run.recipe.to_dict()
    assert [path.read_text() for path in (run.out / "earlier").iterdir()] == [old]


@pytest.mark.slow
def test_a_change_redoes_what_depends_on_it(whole, recipe, tmp_path_factory):
    before = set(whole.glob("**/manifest.json"))
    call("run", recipe, *SETTINGS, "finetune.max_epochs=1", "--out", whole)
    made = {p.parent.parent.name for p in set(whole.glob("**/manifest.json")) - before}
    assert made == {"specialize", "evaluate", "model"}
    assert len(list((whole / "earlier").glob("*.json"))) == 1
    call("run", recipe, *SETTINGS, "--out", whole)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(whole, recipe, tmp_path):
    out = tmp_path / "cut"
    chance = random.Random(5)
    killed = []
    for target in (*STAGES, None):
        process = forked(tmp_path / "told", "run", recipe, *SETTINGS, "--out", out)
        until = time.monotonic() + 600
        while target and process.is_alive() and time.monotonic() < until:
            if list(out.glob(f"{target}-*")):
                time.sleep(chance.uniform(0, 0.3))
                if process.is_alive():
                    process.kill()
                    killed.append(target)
                break
            time.sleep(0.01)
        process.join()
    assert process.exitcode == 0 and len(killed) >= 5, (killed, (tmp_path / "told").read_text())
    one, other = weights(whole), weights(out)
    assert other.keys() <= one.keys() and len(other) == 4
    for name, tensors in other.items():
        assert all(torch.equal(tensors[key], one[name][key]) for key in tensors), name
    assert results(out) == results(whole)
    assert not list(out.glob("**/.*.tmp"))


@pytest.mark.slow
def test_the_exported_model_is_evaluated_and_tried(whole, recipe):
    row = results(whole)["rows"][1]
    test = recipe.parent / "domains" / "law" / "test.jsonl"
    done = call("evaluate", whole / row["model"], test, "--json")
    found = json.loads(done.stdout)
    assert found["perplexity"] == pytest.approx(row["ppl_after"], rel=1e-5)
    assert found["tokens"] == row["test_tokens"]
    text = call("generate", whole / row["model"], "The judge", "--tokens", "5").stdout
    assert text.startswith("The judge")


@pytest.mark.slow
def test_a_model_from_a_folder_embeds(recipe, tmp_path):
    words = [word for topic in TOPICS.values() for word in topic.split()]
    tiny = sentence_model(tmp_path / "embedder", words)
    call("weigh", recipe, *SETTINGS, "processes=1", f"cluster.embedder={tiny}",
         "--out", tmp_path / "run")
    assert list(tmp_path.glob("run/weights/law-*/manifest.json"))


@pytest.mark.slow
def test_stages_one_by_one_equal_the_run(recipe, whole, tmp_path):
    out = tmp_path / "steps"
    for verb in ("prepare", "cluster", "weigh", "pretrain", "specialize", "evaluate", "export"):
        call(verb, recipe, *SETTINGS, "processes=1", "--out", out)
    assert results(out)["rows"] == results(whole)["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "sentence"), [
    (["run", "RECIPE", "contxt=3"], "did you mean 'context'"),
    (["run", "RECIPE", "methods=[slm,best]"], "'methods' names 'best'"),
    (["run", "no-such-recipe"], "there is no recipe"),
    (["run", "RECIPE", "generic=[/no/such/file.jsonl]"], "/no/such/file.jsonl does not exist"),
    (["run", "RECIPE", "domains=[nowhere]"], "nowhere"),
    (["run", "RECIPE", *SETTINGS, "cluster.k=[100000]"], "cluster.k"),
    (["evaluate", "/no/model", "x.jsonl"], "is not a folder"),
])
def test_a_mistake_is_one_sentence(recipe, tmp_path, words, sentence):
    words = [str(recipe) if w == "RECIPE" else w for w in words]
    extra = ["--out", str(tmp_path)] if words[0] == "run" else []
    done = call(*words, *extra, check=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("planearly: ") and sentence in last
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_bad_lines_are_set_aside_and_told(recipe, tmp_path):
    lines = (recipe.parent / "generic.jsonl").read_text().splitlines()
    lines[5:5] = ["{broken", '{"words": "no text"}']
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    done = call("prepare", recipe, *SETTINGS, f"generic=[{bad}]", "--out", tmp_path / "out")
    assert "bad.jsonl" in done.stderr and "6" in done.stderr
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(lines[:20] + ["{broken"] * 20))
    done = call("prepare", recipe, *SETTINGS, f"generic=[{many}]", "--out", tmp_path / "out",
                check=2)
    assert "many.jsonl" in done.stderr.strip().splitlines()[-1]
