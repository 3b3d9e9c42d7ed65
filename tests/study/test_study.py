"""The study: its grid, its cells through the stages, workers, and budgets that branch off."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from planearly import config, methods, tensors
from planearly.cost import ledger
from planearly.errors import UserError
from planearly.files import read_json
from planearly.stages import corpus
from planearly.stages.claims import Busy
from planearly.stages.folder import MANIFEST, Missing, Run
from planearly.stages.trained import pretrained
from planearly.studies.paper import SUITE
from planearly.study import forecast, grid, view
from planearly.study.run import Study, share_of_machine, work
from planearly.study.run import study as whole_study
from planearly.study.view import RESULTS
from planearly.train import arithmetic, loop, metrics
from small_models import sentence_model
from small_runs import TOPICS, call, command
from small_runs import recipe as small
from small_work import alive, children, until


def study(recipe, out, **how):
    return whole_study(recipe, out, SUITE, **how)


def with_grid(root, *blocks, **over):
    return small(root, study={"grid": list(blocks)}, methods=["slm"], **over)


def names(cells):
    return [(cell.method, cell.domain, dict(cell.variant.changes)) for cell in cells]


def test_a_grid_is_every_combination_of_each_block_once(made):
    recipe = with_grid(made, {"methods": ["slm", "slm-is"]},
                       {"methods": ["slm"], "over": {"spec_tokens": [None, 200, "1k"],
                                                     "seed": [0, 1]}})
    cells = grid.cells(recipe, ["law"])
    assert names(cells) == [
        ("slm", "law", {}), ("slm-is", "law", {}), ("slm", "law", {"seed": 1}),
        ("slm", "law", {"spec_tokens": 200}), ("slm", "law", {"spec_tokens": 200, "seed": 1}),
        ("slm", "law", {"spec_tokens": 1000}), ("slm", "law", {"spec_tokens": 1000, "seed": 1})]
    assert all(cell.settings.keys() == {"spec_tokens", "seed"} for cell in cells)
    assert cells[1].settings == {"spec_tokens": None, "seed": 0}


@pytest.mark.parametrize("block, said", [
    ({"methods": ["slm"], "over": {"spec_token": [1]}}, "spec_token"),
    ({"methods": ["slm"], "domains": ["lav"]}, "did you mean 'law'"),
    ({"methods": []}, "names no methods"),
])
def test_a_misspelt_grid_is_refused(made, block, said):
    with pytest.raises(UserError, match=said):
        grid.cells(with_grid(made, block), ["law"])
    with pytest.raises(UserError, match=r"study\.grid"):
        grid.cells(with_grid(made), ["law"])


def test_every_budget_of_a_grid_can_share_with_every_other(made):
    recipe = with_grid(made, {"methods": ["slm", "slm-pn"]},
                       {"methods": ["slm"], "over": {"pretrain_tokens": ["12k"]}},
                       {"methods": ["slm"], "over": {"pretrain_tokens": [2000, "1k", -5, "much"]}},
                       {"methods": ["slm"], "over": {"seed": [1]}}, pretrain_tokens=4000)
    cells = grid.cells(recipe, ["law"])
    found = [(of.pretrain_tokens, of.pretrain.branch_tokens) for cell in cells
             if (of := cell.variant.recipe)]
    budgets = [1000, 2000, 4000, 12_000]
    assert found == [(n, budgets) for n in (4000, 4000, 12_000, 2000, 1000, 4000)]
    assert sum(cell.variant.recipe is None for cell in cells) == 2


def test_methods_take_their_main_budgets_where_a_block_names_none(made):
    recipe = with_grid(made, {"methods": ["slm", "slm-is"], "over": {"seed": [0, 1]}},
                       {"methods": ["slm"], "over": {"pretrain_tokens": [2000]}},
                       pretrain_tokens=4000)
    recipe = config.variant(recipe, {"study.main": {"slm": 8000}})
    assert [(cell.method, cell.settings["pretrain_tokens"], cell.settings["seed"])
            for cell in grid.cells(recipe, ["law"])] == [
        ("slm", 8000, 0), ("slm", 8000, 1), ("slm-is", 4000, 0), ("slm-is", 4000, 1),
        ("slm", 2000, 0)]
    recipe = config.variant(recipe, {"study.main": {"slm-pm": 8000}})
    with pytest.raises(UserError, match="'slm-pm', which no block"):
        grid.cells(recipe, ["law"])


@pytest.mark.slow
def test_impossible_cells_are_told_and_the_others_run(made, tmp_path):
    recipe = with_grid(made, {"methods": ["slm", "slm-pn", "nonsense"]},
                       {"methods": ["slm"], "over": {"spec_tokens": [-5, 300]}})
    out = tmp_path / "study"
    page = study(recipe, out)
    found = read_json(out / RESULTS)
    assert [(r["method"], r["settings"]["spec_tokens"]) for r in found["rows"]] == [
        ("slm", None), ("slm", 300)]
    reasons = {(s["method"], s["settings"]["spec_tokens"]): s["reason"] for s in found["skipped"]}
    assert "projected.experts" in reasons["slm-pn", None]
    assert "nonsense" in reasons["nonsense", None] and "spec_tokens" in reasons["slm", -5]
    assert not found["pending"] and page.exists()
    told = (out / "README.md").read_text("utf-8")
    assert "projected.experts" in told and "fine-tuning" in told.lower()
    row = found["rows"][0]
    assert len(row["nll_after"]) == len(row["nll_before"]) == len(row["tokens"])
    assert row["finetuning"]["validation"]


@pytest.mark.slow
def test_a_finished_cell_is_never_made_again(made, tmp_path):
    out = tmp_path / "study"
    one, both = {"methods": ["slm"]}, {"methods": ["slm", "slm-nopt"]}
    study(with_grid(made, both), out, only_report=True)
    found = read_json(out / RESULTS)
    assert len(found["pending"]) == 2 and not found["rows"]
    study(with_grid(made, one), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    assert before
    study(with_grid(made, both), out)
    again = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    assert before.items() <= again.items() and len(again) == len(before) + 2
    assert len(read_json(out / RESULTS)["rows"]) == 2


@pytest.mark.slow
def test_a_report_needs_no_lock_and_leaves_all_or_nothing(made, tmp_path, monkeypatch):
    out, recipe = tmp_path / "study", with_grid(made, {"methods": ["slm-nopt"]})
    study(recipe, out)
    (out / "tables" / "of-an-earlier-grid.csv").touch()
    other = with_grid(made, {"methods": ["slm-nopt", "slm"]}, name="other")
    with Run(out, recipe).opened():
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(view, "text", interrupted)
            study(other, out, only_report=True)
        assert before == {p: p.read_bytes() for p in before}
        study(other, out, only_report=True)
    found = read_json(out / RESULTS)
    assert found["name"] == "other" and len(found["rows"]) == len(found["pending"]) == 1
    assert (out / "recipe.yaml").read_bytes() == before[out / "recipe.yaml"]
    assert not (out / "tables" / "of-an-earlier-grid.csv").exists()
    assert list(out.glob("tables/*.csv")) and list(out.glob("figures/*.svg"))
    assert not (out / ".report").exists()


@pytest.mark.slow
def test_a_failure_is_noted_and_tried_again(made, tmp_path, monkeypatch):
    out, recipe = tmp_path / "study", with_grid(made, {"methods": ["slm", "slm-nopt"]})
    real = loop.train

    def broken(*args, **kwargs):
        if kwargs["name"].startswith("slm-nopt"):
            raise FloatingPointError("the loss is not finite")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train", broken)
    with pytest.raises(UserError, match="1 cell failed, slm-nopt on law as: Floating"):
        study(recipe, out)
    found = read_json(out / RESULTS)
    assert [r["method"] for r in found["rows"]] == ["slm"]
    reason = found["skipped"][0]["reason"]
    assert "not finite" in reason
    log = out / reason.partition("traceback: ")[2].split()[0]
    assert "in broken" in log.read_text("utf-8")
    monkeypatch.setattr(loop, "train", real)
    study(recipe, out)
    assert not read_json(out / RESULTS)["skipped"] and not log.exists()


@pytest.mark.slow
def test_what_cells_share_fails_once_in_a_session(made, tmp_path, monkeypatch):
    out, tried = tmp_path / "study", []
    recipe = with_grid(made, {"methods": ["slm"], "over": {"spec_tokens": [None, 300]}})

    def broken(*args, **kwargs):
        tried.append(kwargs["name"])
        raise KeyError("no such thing")

    monkeypatch.setattr(loop, "train", broken)
    for times in (1, 2):
        with pytest.raises(UserError, match="2 cells failed"):
            study(recipe, out)
        assert tried == ["slm"] * times
    one, other = read_json(out / RESULTS)["skipped"]
    assert "KeyError: 'no such thing'" in one["reason"] and one["reason"] == other["reason"]


def test_a_worker_that_stops_is_told_after_the_report(made, tmp_path, monkeypatch):
    out = tmp_path / "study"
    monkeypatch.setattr("planearly.study.run.spread", lambda *args: -9)
    with pytest.raises(UserError, match="status -9"):
        study(with_grid(made, {"methods": ["slm"]}), out, workers=2)
    assert len(read_json(out / RESULTS)["pending"]) == 1


def test_workers_divide_what_this_process_may_use(monkeypatch):
    def shares(gpus, workers=2, **environment):
        for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return [share_of_machine(number, workers) for number in range(workers)]

    def masks(found):
        return [share["CUDA_VISIBLE_DEVICES"] for share in found]

    def sharing(found):
        return [int(share.pop(arithmetic.SHARING)) for share in found]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert masks(shares(2, 3)) == ["0", "1", "0"]
    assert masks(shares(2, CUDA_VISIBLE_DEVICES="4, 5")) == ["4", "5"]
    assert masks(shares(1, CUDA_VISIBLE_DEVICES="GPU-8932f937,-1,3")) == ["GPU-8932f937"] * 2
    for gpus in (0, 2):
        for workers, environment, threads in ((2, {}, "3"), (9, {}, "1"),
                                              (2, {"OMP_NUM_THREADS": "5"}, None)):
            assert [share.get("OMP_NUM_THREADS") for share in shares(gpus, workers, **environment)
                    ] == [threads] * workers
    assert sharing(shares(2, 2)) == [1, 1] and sharing(shares(2, 5)) == [3, 2, 3, 2, 3]
    assert sharing(shares(0, 3)) == [3, 3, 3]


def test_a_stage_that_another_process_makes_is_left_to_it(made, tmp_path):
    run = Run(tmp_path / "run", small(made), wait=False)
    run.out.mkdir()

    def build(folder):
        with pytest.raises(Busy):
            Run(run.out, small(made), wait=False).stage("one", {}, {}, lambda folder: None)

    made_folder = run.stage("one", {}, {}, build)
    assert (made_folder / MANIFEST).exists()
    with pytest.raises(Missing):
        Run(run.out, small(made), build=False).stage("two", {}, {}, lambda folder: None)


@pytest.mark.slow
def test_a_worker_comes_back_to_what_another_one_made(made, tmp_path, monkeypatch):
    out, recipe = tmp_path / "study", with_grid(made, {"methods": ["slm", "slm-nopt"]})
    first = Study(recipe, out, wait=False)
    out.mkdir()
    corpus.kept(first.base)
    tried = []
    real = Study.make

    def busy_once(self, cell):
        tried.append(cell.method)
        if tried == ["slm"]:
            raise Busy("pretrain/slm")
        real(self, cell)

    monkeypatch.setattr(Study, "make", busy_once)
    work(first)
    assert tried == ["slm", "slm-nopt", "slm"]


@pytest.mark.slow
@pytest.mark.parametrize("rate, at_step", [("wsd", 14), ("constant", 19)])
def test_a_budget_that_branches_off_ends_as_one_of_its_own(made, tmp_path, rate, at_step):
    long, short = 16 * 8 * 40, 16 * 8 * 20
    pretrain = {"batch_tokens": 128, "compile": "no", "log_steps": 8,
                "optimizer": {"warmup_steps": 2, "schedule": rate}}

    def run(out, tokens, branches):
        made_recipe = small(made, pretrain_tokens=tokens,
                            pretrain={**pretrain, "branch_tokens": branches})
        with Run(out, made_recipe).opened() as this:
            return pretrained(this, "slm")

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    run(shared, long, [long, short])
    branched = run(shared, short, [long, short])
    single = run(alone, short, [])
    assert branched.name == single.name
    begun = read_json(branched / MANIFEST)["begun"]
    assert begun["at_step"] == at_step and begun["tokens"] > 0
    spent = ledger.add_up([shared])
    trained = [s["tokens"] for s in spent["stages"] if s["stage"].startswith("pretrain")]
    assert spent["total"]["tokens"] == sum(trained) - begun["tokens"]
    assert "begun" not in read_json(single / MANIFEST)
    told = [(r["step"], r["loss"]) for r in metrics.read(branched / "metrics.jsonl")]
    assert told == [(r["step"], r["loss"]) for r in metrics.read(single / "metrics.jsonl")]
    one, other = (tensors.load_tensors(p / loop.FINAL)[0] for p in (branched, single))
    assert all(torch.equal(one[name], other[name]) for name in other)


def budgets(root, *more):
    """A study of 20 steps, and of 40 and 12 after it."""
    return with_grid(
        root, {"methods": ["slm"]},
        {"methods": ["slm"], "over": {"pretrain_tokens": [16 * 8 * 40, 16 * 8 * 12]}}, *more,
        pretrain_tokens=16 * 8 * 20,
        pretrain={"batch_tokens": 128, "compile": "no", "optimizer": {"warmup_steps": 1}})


def pretrainings(out):
    """Steps of every finished pretraining, and the step at which it branched off another."""
    made = [read_json(path) for path in out.glob(f"pretrain/*/{MANIFEST}")]
    return {m["settings"]["steps"]: m.get("begun", {}).get("at_step") for m in made}


@pytest.mark.slow
def test_the_longest_budget_is_pretrained_first_unless_it_fails(made, tmp_path, monkeypatch):
    steps, real = [], loop.train

    def train(model, stream, n, *args, **kwargs):
        if kwargs["name"] == "slm":
            steps.append(n)
            if n in failing:
                raise FloatingPointError("the loss is not finite")
        return real(model, stream, n, *args, **kwargs)

    monkeypatch.setattr(loop, "train", train)
    failing = []
    study(budgets(made), tmp_path / "whole")
    assert steps == [40, 20, 12] and pretrainings(tmp_path / "whole") == {40: None, 20: 14, 12: 8}
    steps.clear()
    failing = [40]
    out = tmp_path / "failing"
    with pytest.raises(UserError, match="1 cell failed"):
        study(budgets(made), out)
    assert steps == [40, 20, 12] and pretrainings(out) == {20: None, 12: 8}
    skipped = read_json(out / RESULTS)["skipped"]
    assert [cell["settings"]["pretrain_tokens"] for cell in skipped] == [16 * 8 * 40]


@pytest.mark.slow
def test_a_budget_waits_for_the_longer_one_that_another_worker_makes(made, tmp_path):
    out, recipe = tmp_path / "study", budgets(made, {"methods": ["slm-nopt"]})
    out.mkdir()
    whole = Study(recipe, out, wait=False)
    own, longest, shortest, other = whole.cells
    real, busy = loop.train, []

    def train(model, stream, n, *args, **kwargs):
        if kwargs["name"] == "slm" and n == 40:
            worker = Study(recipe, out, wait=False)
            for cell in (own, longest, shortest):
                with pytest.raises(Busy):
                    worker.make(cell)
                busy.append(cell)
            worker.make(other)
        return real(model, stream, n, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", train)
        work(whole)
    assert busy == [own, longest, shortest]
    assert pretrainings(out) == {40: None, 20: 14, 12: 8}


@pytest.mark.slow
def test_a_finished_budget_does_not_call_for_a_longer_one(made, tmp_path):
    out = tmp_path / "study"
    study(small(made, study={"grid": [{"methods": ["slm"]}]}, pretrain_tokens=16 * 8 * 20,
                pretrain=budgets(made).to_dict()["pretrain"]), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}
    this = Study(budgets(made), out)
    this.make(this.cells[0])
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}


def test_a_forecast_counts_shared_trainings_once(made):
    recipe = with_grid(
        made, {"methods": ["slm", "slm-d"]},
        {"methods": ["slm"], "over": {"finetune.replay_share": [0.1]}},
        {"methods": ["slm-is"], "over": {"spec_tokens": [300, 600]}}, spec_tokens=200)
    found = forecast.forecast(recipe, "a100")
    assert found["cells"] == 5
    # pretraining: slm and llm once, slm-is per set; fine-tuning: slm (2), llm, slm-d, slm-is (2)
    assert found["stages"] == 2 + 2 + 6
    assert found["total"]["flops"] == sum(m["flops"] for m in found["methods"].values())


@pytest.mark.parametrize("base", ["slm", "slm-pn"])
def test_a_forecast_counts_the_plateau_once(made, base):
    def tokens(*names):
        recipe = with_grid(made, {"methods": list(names)}, spec_tokens=200,
                           projected={"experts": 3})
        return forecast.forecast(recipe, "a100")["total"]["tokens"]

    shared = 17 * 8 * 16  # of 24 steps
    assert tokens(base, f"{base}-adapt") == pytest.approx(
        tokens(base) + tokens(f"{base}-adapt") - shared)


def test_a_method_of_the_table_is_in_the_forecast(made, monkeypatch):
    monkeypatch.setitem(methods.TABLE, "slm-new", methods.Method("slm-new", "SLM-new", "a new one"))
    found = forecast.forecast(with_grid(made, {"methods": ["slm", "slm-new"]}, spec_tokens=200),
                              "a100")
    assert found["cells"] == 2 and not found["impossible"]
    assert found["stages"] == 1 + 2  # one pretraining, which they share
    assert 0 < found["methods"]["slm-new"]["flops"] < found["methods"]["slm"]["flops"]


@pytest.mark.parametrize("rate, own", [
    ({"schedule": "constant"}, 1 / 20), ({"schedule": "wsd"}, 0.3), ({"schedule": "cosine"}, 1.0)])
def test_a_forecast_counts_the_steps_that_budgets_share_once(made, rate, own):
    long, short = 16 * 8 * 40, 16 * 8 * 20
    over = {"spec_tokens": 200, "pretrain_tokens": short,
            "pretrain": {"batch_tokens": 128, "optimizer": {"warmup_steps": 2, **rate}}}

    def tokens(*blocks):
        recipe = with_grid(made, {"methods": ["slm"]}, *blocks, **over)
        return forecast.forecast(recipe, "a100")["total"]["tokens"]

    tuning = tokens() - short
    both = tokens({"methods": ["slm"], "over": {"pretrain_tokens": [long]}})
    assert both == pytest.approx(2 * tuning + long + own * short)
    seeds = tokens({"methods": ["slm"], "over": {"pretrain_tokens": [long], "seed": [1]}})
    assert seeds == pytest.approx(2 * tuning + long + short)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study-nano", "study-split", "study-smoke", "study-paper"])
def test_every_study_recipe_is_forecast(name, monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
    recipe = config.load(name)
    if recipe.domains_root and not os.path.isdir(recipe.domains_root) and not recipe.domains:
        pytest.skip("the recipe's domains are not here")
    found = forecast.forecast(recipe, "a100")
    on_purpose = ["slm-pn"] if name == "study-smoke" else []
    assert [cell["cell"].split()[0] for cell in found["impossible"]] == on_purpose
    assert found["total"]["flops"] > 0


@pytest.fixture
def two_seeds(made, tmp_path):
    """The file of a recipe whose study has four cells and two pretrainings."""
    words = [word for topic in TOPICS.values() for word in topic.split()]
    path = tmp_path / "tiny.yaml"
    values = {**small(made).to_dict(), "methods": ["slm"], "study": {"grid": [
        {"methods": ["slm", "slm-nopt"], "domains": [], "over": {"seed": [0, 1]}}]}}
    values["cluster"]["embedder"] = str(sentence_model(tmp_path / "embedder", words))
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_with_the_study_in_the_middle_of_a_training(two_seeds, tmp_path):
    out = tmp_path / "study"
    words = command("study", two_seeds, "pretrain_tokens=100M", "--out", out, "--workers", 2)
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        for left in out.glob("pretrain/*/arithmetic.json"):
            left.unlink()
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            until(lambda: len(list(out.glob("pretrain/*/arithmetic.json"))) == 2, 300)
            workers = children(process.pid)
            assert len(workers) == 2
            process.send_signal(number)
            if number == signal.SIGTERM:
                assert process.wait(60) == status and not any(map(alive, workers))
            said = process.communicate(timeout=60)[1].splitlines()  # all that could write ended
            assert process.returncode == status and not any(map(alive, workers))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert not [line for line in said if line.startswith("Traceback")]
        goes_on = [line for line in said if "continues from here" in line]
        assert goes_on == (said[-1:] if number == signal.SIGTERM else [])


@pytest.mark.slow
def test_two_workers_make_what_one_makes(two_seeds, tmp_path):
    rows = {}
    for workers in (1, 2):
        out = tmp_path / f"by-{workers}"
        call("study", two_seeds, "--out", out, "--workers", workers)
        found = read_json(out / RESULTS)
        assert not found["pending"] and not found["skipped"]
        rows[workers] = [(r["method"], r["settings"], r["nll_after"]) for r in found["rows"]]
    assert len(rows[1]) == 4 and rows[1] == rows[2]
