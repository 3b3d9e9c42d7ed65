"""Projected networks and mixtures as a person runs them: rows, bundles, one expert alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from planearly import config, keys, methods, parallel
from planearly.data.dataset import TokenDataset
from planearly.errors import UserError
from planearly.export import bundle as bundle_module
from planearly.export.bundle import read_info
from planearly.files import read_array, read_json, write_array
from planearly.model.transformer import Transformer
from planearly.stages import bundled, clusters, corpus, evaluate, experts, pipeline, trained
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train import loop
from small_models import check_batches
from small_runs import TOPICS, Words, recipe
from small_stores import fill
from small_trainings import killed_after_steps

PROJECTED = {"experts": 3, "rank": 2, "embedding": 3}


def settings(root, **over) -> keys.Recipe:
    return recipe(root, **{"methods": ["slm-pn", "slm-mix"], "projected": PROJECTED,
                           "mixture": {"experts": 3}, **over})


@pytest.mark.slow
def test_both_write_their_rows_and_a_bundle_specialises_offline(
        made, tmp_path, memory, monkeypatch):
    monkeypatch.setattr(bundle_module, "load_embedder", lambda name, cache=None: Words())
    out = tmp_path / "run"
    results = pipeline.run(settings(made), out)
    pn, mix = results["rows"]
    assert (pn["method"], mix["method"]) == ("slm-pn", "slm-mix")
    for row in (pn, mix):
        assert row["expert"] == "lowest-loss" and row["k"] == 3
        assert row["params"] > row["inference_params"]
        assert row["ppl_after"] < row["ppl_before"]
        check_batches(out / row["model"])
    assert mix["params"] == 3 * mix["inference_params"]
    assert pn["cost"]["tokens"] > pn["specialization_cost"]["tokens"]

    report = (out / "report.html").read_text()
    assert "<h2>Experts</h2>" in report and "has the lowest loss on the specialization" in report
    for row in (pn, mix):
        assert f'<td class="text">law</td><td>{row["expert_number"]}</td>' in report
    assert report.count("correlate with") == 2

    (bundle,) = out.glob("bundle/slm-pn-*/bundle")
    documents = str(made / "domains" / "law")
    offline = bundled.from_bundle(bundle, [documents], [])
    again = pipeline.run(offline, tmp_path / "offline")["rows"][0]
    assert again["method"] == "slm-pn" and again["generic_ppl"] is None
    assert again["ppl_before"] == pytest.approx(pn["ppl_before"], rel=1e-6)
    assert again["expert_number"] == pn["expert_number"]
    assert "<h2>Experts</h2>" in (tmp_path / "offline" / "report.html").read_text()
    one, two = (load_file(next(root.glob("model/slm-pn.law-*/export/model.safetensors")))
                for root in (out, tmp_path / "offline"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    check_batches(tmp_path / "offline" / again["model"])

    fill(f"{memory}/bundle", bundle)  # the same from a store
    there = config.variant(offline, {"bundle": f"{memory}/bundle"})
    bundled.check(there)
    with Run(tmp_path / "offline", there).opened() as run:
        assert corpus.bundle(run) and not run.made


@pytest.mark.slow
def test_pretraining_knows_no_domain_and_serves_those_that_come(
        made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle_module, "load_embedder", lambda name, cache=None: Words())
    out, methods = tmp_path / "run", ["slm", "llm", "slm-pn", "slm-mix"]
    pipeline.run(settings(made, methods=methods, domains_root=None), out, "pretrain")
    told = capsys.readouterr().err
    assert "no domain's texts are given: generic text that a later domain tests on" in told
    assert "'run' and 'domains=[FOLDER_OF_YOUR_DOCUMENTS]' goes on from here" in told
    (kept,) = out.glob("kept-*")
    dataset = TokenDataset(next(out.glob("generic-*")))
    held_out = np.unique(dataset.windows["document"][read_array(kept / "generic-test.npy")])
    assert np.array_equal(np.flatnonzero(read_array(kept / "excluded.npy")), held_out)

    documents = made / "mine.jsonl"
    shutil.copyfile(made / "domains" / "law" / "train.jsonl", documents)
    for method in ("slm-pn", "slm-mix"):
        (bundle,) = out.glob(f"bundle/{method}-*/bundle")
        assert read_info(bundle)["recipe"].domains == []
        there = bundled.from_bundle(bundle, [str(documents)], [])
        row = pipeline.run(there, tmp_path / method, "export")["rows"][0]
        assert (row["method"], row["domain"]) == (method, "mine")
        assert row["ppl_after"] < row["ppl_before"]
        assert (tmp_path / method / row["model"] / "model.safetensors").exists()

    before = {path.parent for path in out.glob("pretrain/*/manifest.json")}
    pipeline.run(settings(made, methods=methods), out, "pretrain")
    assert len(list(out.glob("kept-*"))) == 2
    assert {path.parent for path in out.glob("pretrain/*/manifest.json")} == before


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [{"k": [3, 6, 12]}, {"k": [3, 12], "nested": False}],
                         ids=["nested", "apart"])
def test_a_bundle_divides_a_domain_as_its_run_did(
        cluster, made, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "load_embedder", lambda name, cache=None: Words())
    rng, words = np.random.default_rng(1), " ".join(TOPICS.values()).split()
    wide = made / "domains" / "wide.jsonl"  # of no cluster: its windows lie between the centroids
    wide.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(words, 60))})
                              for _ in range(60)))
    here = Run(tmp_path / "run", settings(made, methods=["slm-pn"], expert="blend",
                                          domains=[str(wide)], cluster=cluster))
    with here.opened():
        row, base = methods.find("slm-pn"), experts.pretrained(here, "slm-pn")
        bundle = bundled.save_bundle(here, row, base) / "bundle"
        assert (len(read_array(bundle / "finest.npy")) == 12) == cluster.get("nested", True)
        longer = config.variant(here.recipe, {"finetune.max_epochs": 2})
        other = bundled.save_bundle(Run(here.out, longer), row, base) / "bundle"
        assert bundle_module.read_info(other)["recipe"].finetune.max_epochs == 2
        offline = Run(tmp_path / "offline", bundled.from_bundle(bundle, [str(wide)], []))
        with offline.opened():
            ours, theirs = (
                read_array(clusters.domain_clusters(run, "wide") / "assignment-3.npy")
                for run in (here, offline))
            assert len(np.unique(ours)) > 1 and np.array_equal(ours, theirs)
            ours, theirs = (facts(experts.chosen(run, "slm-pn", "wide")) for run in (here, offline))
    for fact in ("histogram", "choice", "similarity"):
        assert ours[fact] == theirs[fact], fact
    # another embedder is refused where the bundle was read with the right one before, too
    other = Words()
    other.digest = "f" * 64
    monkeypatch.setattr(bundle_module, "load_embedder", lambda name, cache=None: other)
    again = Run(tmp_path / "offline", bundled.from_bundle(bundle, [str(wide)], []))
    with again.opened(), pytest.raises(UserError, match="is not the one that the clusters"):
        clusters.domain_clusters(again, "wide")


@pytest.mark.slow
def test_every_rule_chooses(made, tmp_path):
    out = tmp_path / "run"
    chosen = {}
    for rule in ("most-frequent", "blend", "best-tuned"):
        row = pipeline.run(settings(made, expert=rule, methods=["slm-pn"]), out)["rows"][0]
        assert row["expert"] == rule
        chosen[rule] = row["expert_number"]
        report = (out / "report.html").read_text()
        assert ("loss with every expert" in report) == (rule == "best-tuned")
    assert chosen["blend"] is None and chosen["best-tuned"] in range(3)
    tuned = settings(made, expert="blend", methods=["slm-pn"],
                     projected={**PROJECTED, "tune_vector": True})
    assert pipeline.run(tuned, out)["rows"][0]["expert"] == "blend"
    assert len(list(out.glob("pretrain/slm-pn-*"))) == 1  # the vector is trained after it


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slm-pn", "slm-mix"])
def test_a_domain_is_routed_window_by_window(made, tmp_path, method):
    run = Run(tmp_path / "run", settings(made, methods=[method]))
    stage = experts.routed(run, method, "law")
    dataset, windows = corpus.held_out(run, "law", "test")
    model = experts.load(run, method)
    centroids, parent = clusters.lineage(run, 3)
    texts = dataset.texts(windows, corpus.tokenizer_of(run).tokenizer)
    embedded = clusters.embedder(run).embed(texts)
    cluster = parent[((embedded[:, None] - centroids[None]) ** 2).sum(2).argmin(1)]
    assert len(set(cluster.tolist())) > 1  # or one expert would do
    sums: dict[int, float] = {}
    for window, expert in zip(windows, cluster, strict=True):
        dense = Transformer(model.shape)
        dense.load_state_dict(model.materialise(int(expert)))
        inputs, targets = dataset.rows([np.array([window])])
        length = dataset.windows["length"][window]
        logits = dense(torch.as_tensor(inputs))[0, :length].double()
        nats = torch.nn.functional.cross_entropy(
            logits, torch.as_tensor(targets)[0, :length], reduction="sum").item()
        document = int(dataset.windows["document"][window])
        sums[document] = sums.get(document, 0.0) + nats
    nll = read_array(stage / "test-nll.npy")
    np.testing.assert_allclose(nll, [sums[d] for d in sorted(sums)], rtol=1e-5)
    one, _ = evaluate.evaluations(run, trained.specialize(run, method, "law"))
    assert (read_array(one / "test-tokens.npy") == read_array(stage / "test-tokens.npy")).all()
    assert not np.allclose(read_array(one / "test-nll.npy"), nll, rtol=1e-5)


@pytest.mark.slow
def test_long_sets_are_sampled_and_a_mixture_s_average_warned_of(
        made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experts, "EXPERT_CHOICE_TOKENS", 300)
    run = Run(tmp_path / "run", settings(made, methods=["slm-pn"]))
    with run.opened():
        dataset, used = corpus.specialization_windows(run, "law")
        sample, part = experts.choice_windows(run, "law")
        tokens = dataset.windows["length"][sample].sum()
        assert 300 <= tokens < 300 + dataset.context and set(sample) < set(used)
        first = used[np.cumsum(dataset.windows["length"][used]) <= tokens]
        assert sample.max() > first.max()  # not what happens to stand first in the file
        reason = facts(experts.chosen(run, "slm-pn", "law"))["choice"]["reason"]
        assert f"loss on {part}the specialization set" in reason and str(tokens) in reason
    few = Run(tmp_path / "run", settings(made, methods=["slm-pn"], spec_tokens=200))
    with few.opened():
        sample, part = experts.choice_windows(few, "law")
        assert part == "" and set(sample) == set(corpus.specialization_windows(few, "law")[1])
    assert "warning" not in capsys.readouterr().err
    blended = Run(tmp_path / "run", settings(made, methods=["slm-mix"], expert="blend"))
    with blended.opened():
        experts.chosen(blended, "slm-mix", "law")
    assert "warning: the average of a mixture's weights" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["slm-pn", "slm-mix"])
def test_a_cluster_without_trained_text_is_refused_before_training(
        method, made, tmp_path):
    out = tmp_path / "run"
    asked = settings(made, methods=[method])
    pipeline.run(asked, out, "cluster")
    (assignment,) = out.glob("clusters-*/assignment-3.npy")
    write_array(assignment, np.minimum(read_array(assignment), 1))
    with pytest.raises(UserError, match="in 1 of 3 clusters, the first number 2"):
        pipeline.run(asked, out, "pretrain")
    assert not list(out.glob("pretrain"))


@pytest.mark.slow
def test_experts_trained_one_by_one_are_those_trained_together(made, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    pipeline.run(settings(made, methods=["slm-mix"]), together, "pretrain")
    for expert in range(3):
        mixture = {"experts": 3, "expert": expert}
        pipeline.run(settings(made, methods=["slm-mix"], mixture=mixture), alone, "pretrain")
    for expert in range(3):
        one, two = (load_file(next(
            root.glob(f"pretrain/slm-mix-expert{expert:03d}-*/final.safetensors")))
            for root in (together, alone))
        assert all(torch.equal(one[name], two[name]) for name in one)
    pipeline.run(settings(made, methods=["slm-mix"]), alone, "pretrain")
    steps = [read_json(p)["steps"]
             for p in together.glob("pretrain/slm-mix-expert*/outcome.json")]
    asked = settings(made)
    assert abs(np.sum(steps) - asked.pretrain_tokens // asked.pretrain.step_tokens) <= 2


def test_impossible_experts_are_one_sentence(made, tmp_path):
    for over, sentence in (
        ({"projected": {**PROJECTED, "experts": 5}}, "'projected.experts' is 5"),
        ({"projected": {**PROJECTED, "layers": [9]}}, "'projected.layers' holds 9"),
        ({"projected": {**PROJECTED, "matrices": ["q"]}}, "'projected.matrices' holds 'q'"),
        ({"mixture": {"experts": 3, "expert": 7}}, "'mixture.expert' is 7"),
        ({"mixture": {"experts": 3, "expert": 1}}, "use 'planearly pretrain'"),
    ):
        with pytest.raises(UserError, match=sentence):
            pipeline.run(settings(made, **over), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="is not a bundle"):
        bundled.from_bundle(tmp_path, ["x"], [])


@pytest.mark.slow
def test_a_network_trained_on_blends_resumes_and_gives_the_domain_its_blend(
        made, tmp_path, monkeypatch, capsys):
    def network(out, blends=2, **over):
        run = Run(out, settings(made, methods=["slm-pn"],
                                projected={**PROJECTED, "blends": blends}, **over))
        with run.opened():
            return run, trained.pretrain(run, "slm-pn")

    def weights(stage):
        return load_file(stage / loop.FINAL)

    run, whole = network(tmp_path / "a", expert="blend")
    manifest = facts(whole)
    assert manifest["settings"]["projected"]["blends"] == 2
    histograms = read_array(run.out / manifest["folders"]["blends"] / "histograms.npy")
    assert histograms.shape == (4096, 3) and np.allclose(histograms.sum(1), 1)
    assert sum(manifest["epochs"]["rows_drawn"]) == 24 * 8
    with run.opened():
        chosen = facts(trained.specialize(run, "slm-pn", "law").expert)["choice"]
    assert chosen["rule"] == "blend" and "trained on blends" not in capsys.readouterr().err

    monkeypatch.setenv("PLANEARLY_CHECKPOINT_EVERY_STEP", "1")
    killed_after_steps(10, lambda: network(tmp_path / "b"))
    again, of = weights(network(tmp_path / "b")[1]), weights(whole)
    assert all(torch.equal(again[name], tensor) for name, tensor in of.items())

    _, plain = network(tmp_path / "a", blends=0)
    assert "blends" not in facts(plain)["settings"]["projected"]  # as in older run folders
    assert any(not torch.equal(weights(plain)[name], tensor) for name, tensor in of.items())
    with pytest.raises(UserError, match=r"'projected.blends' is 9, and a step has 8 rows"):
        trained.check(settings(made, projected={**PROJECTED, "blends": 9}))
    run.recipe = settings(made, methods=["slm-pn"], projected={**PROJECTED, "blends": 2})
    run.memory.clear()
    with run.opened():
        experts.chosen(run, "slm-pn", "law")
    assert "the network was trained on blends of its experts" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "every_rank", "seconds"), [
    ("cpu", False, 16.0), ("cpu", True, 64.0), ("cuda", False, 64.0), ("cuda", True, 64.0)])
def test_choosing_an_expert_costs_what_the_processes_hold(monkeypatch, kind, every_rank, seconds):
    """Of 8 on two machines; on a processor each of those in the stage counts a part of it."""
    monkeypatch.setattr(parallel, "world", lambda: 8)
    monkeypatch.setattr(parallel, "device", lambda: torch.device(kind))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    spent = experts.Spent(every_rank)
    spent.add(1, 1, 8.0)
    assert spent.seconds == seconds
