"""Stages in one process: held-out text stays out of training, weights fit what is drawn."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from planearly import config, parallel
from planearly.data import domains, tokenizer
from planearly.data.dataset import TokenDataset
from planearly.data.pack import Rows
from planearly.data.sample import Sampler
from planearly.errors import UserError
from planearly.files import read_array, read_json
from planearly.stages import clusters, corpus, pipeline, trained, training
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from planearly.train.steps import planned_rows
from small_documents import domain_splits
from small_models import tokenizer_folder
from small_runs import recipe
from small_stores import fill, put


def opened(root, out, **over) -> Run:
    return Run(out, recipe(root, methods=["slm", "slm-is"], **over))


def test_a_name_that_no_folder_could_bear_is_told_at_once(made, tmp_path):
    law = made / "domains" / "law"
    for name, fits in (("é" * 80, True), ("é" * 81, False)):
        place = shutil.copytree(law, tmp_path / name)
        run = opened(made, tmp_path / "run", domains_root=None, domains=[str(place)])
        if fits:
            assert list(corpus.domain_names(run)) == [name]
            continue
        with pytest.raises(UserError, match="has a name of more than 160 bytes"):
            corpus.domain_names(run)


@pytest.mark.parametrize("pins", [
    "[1]", "7", '{"hf://a/b": 3}', '{"hf://a/b": {"revision": "x", "size": 3}}'])
def test_pins_of_another_kind_are_one_sentence(made, tmp_path, pins):
    (tmp_path / ".hub.json").write_text(pins)
    with pytest.raises(UserError, match=r"\.hub\.json does not hold the commits of datasets"), \
            corpus.pinned(opened(made, tmp_path)):
        pass


def test_a_path_that_no_model_could_be_written_in_is_told_at_once(made, tmp_path):
    law = made / "domains" / "law"
    odd = shutil.copyfile(next(law.iterdir()), tmp_path / "l\udce4w.jsonl")
    run = opened(made, tmp_path / "run", domains_root=None, domains=[str(odd)])
    with pytest.raises(UserError, match=r"'l\\udce4w' has a name that is not UTF-8, .* by a link"):
        corpus.domain_names(run)
    (tmp_path / "b\udce4").mkdir()
    (tmp_path / "law.jsonl").symlink_to(odd.rename(tmp_path / "b\udce4" / odd.name))
    named = opened(made, tmp_path / "run", domains_root=None, domains=[str(tmp_path / "law.jsonl")])
    assert list(corpus.domain_names(named)) == ["law"]
    out = tmp_path / "r\udce4n"
    with pytest.raises(UserError, match=r"not UTF-8, .* choose another --out"), opened(
            made, out).opened():
        pass
    assert not out.exists()


FEW, KEY = "too few to judge a model by: give ", r"hold more of them out \(recipe key 'data.{}'\)"


@pytest.mark.parametrize(("documents", "data", "says"), [
    (10, {"held_out": 0.1}, "has 1 document, .*" + KEY.format("held_out")),
    (30, {"held_out": 0.1}, "has 3 documents, .*" + KEY.format("held_out")),
    (40, {"held_out": 0.2, "held_out_documents": 2},
     "has 2 documents, .*" + KEY.format("held_out_documents")), (40, {"held_out": 0.2}, "")])
def test_a_test_split_of_a_few_documents_is_told(made, tmp_path, capsys, documents, data, says):
    texts = (made / "domains" / "law" / "train.jsonl").read_text().splitlines()[:documents]
    assert len(texts) == documents
    (tmp_path / "law.jsonl").write_text("\n".join(texts))
    run = opened(made, tmp_path / "run", domains_root=None, domains=[str(tmp_path / "law.jsonl")],
                 data=data)
    with run.opened():
        corpus.domain(run, "law")
    warned = [line for line in capsys.readouterr().err.splitlines() if "test split" in line]
    assert FEW in warned[0] and re.search(says, warned[0]) if says else not warned


def test_of_a_small_test_split_that_was_given_no_key_makes_more(made, tmp_path, capsys):
    law = shutil.copytree(made / "domains" / "law", tmp_path / "law")
    texts = (law / "test.jsonl").read_text().splitlines()[:2]
    (law / "test.jsonl").write_text("\n".join(texts))
    run = opened(made, tmp_path / "run", domains_root=None, domains=[str(law)])
    with run.opened():
        corpus.domain(run, "law")
    assert (f"the test split of law has 2 documents, {FEW}it more documents"
            in capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_another_tokenizer_at_a_place_is_noticed(made, tmp_path, name):
    """One that was noted by its place alone is taken while what is there is the same."""
    asked = {"tokenizer": {"path": str(tokenizer_folder(tmp_path / "own", entries=300) / name)}}

    def taken():
        run = opened(made, tmp_path / "run", **asked)
        with run.opened():
            return corpus.tokenizer_folder(run)

    run = opened(made, tmp_path / "run", **asked)
    with run.opened():
        old = run.stage("tokenizer", dataclasses.asdict(run.recipe.tokenizer), {},
                        lambda folder: tokenizer.build(run.recipe.tokenizer, run.recipe.data, [],
                                                       folder))
    assert taken() == old
    tokenizer_folder(tmp_path / "own", entries=280)
    new = taken()
    assert new != old and facts(new)["vocab_size"] == 280
    assert taken() == new
    tokenizer_folder(tmp_path / "own", entries=300)
    assert taken() == old


def test_a_corpus_of_one_document_is_told_and_usable_without_a_test(made, tmp_path):
    texts = [line["text"] for line in map(
        json.loads, (made / "generic.jsonl").read_text().splitlines())]
    (made / "one.txt").write_text("\n\n".join(texts))
    (made / "two.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[:2]))
    for name, told in (("one.txt", "is 1 document, and all"), ("two.jsonl", "is 2 documents, and")):
        run = opened(made, tmp_path / name, generic=[str(made / name)])
        with run.opened(), pytest.raises(UserError, match=f"{told}.* 'data.generic_eval_tokens'"):
            corpus.kept(run)
    asked = recipe(made, methods=["slm", "slm-color"], generic=[str(made / "one.txt")],
                   data={"generic_eval_tokens": 0})
    results = pipeline.run(asked, tmp_path / "run")
    assert len(results["rows"]) == 2
    for row in results["rows"]:
        assert row["generic_ppl"] is row["generic_ppl_after"] is row["generic_ppl_ci"] is None
        assert row["ppl_after"] > 1 and not row["generic_ppl_routed"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_held_out_text_in_the_generic_corpus_is_told_and_not_trained_on(
        made, tmp_path, capsys):
    test = (made / "domains" / "law" / "test.jsonl").read_text().splitlines()
    generic = made / "generic.jsonl"
    generic.write_text(generic.read_text() + "\n" + "\n".join(test[:3]))
    run = opened(made, tmp_path / "run")
    with run.opened():
        kept = corpus.kept(run)
        assert facts(kept)["overlap"]["documents"] == 3
        assert "3 documents of the generic corpus hold text of a valid or test" in (
            capsys.readouterr().err)
        excluded = np.flatnonzero(read_array(kept / "excluded.npy"))
        dataset = TokenDataset(corpus.generic(run))
        assert set(excluded) >= set(range(len(dataset.documents) - 3, len(dataset.documents)))
        rows = Rows.load(clusters.rows(run, 3))
        trained = set(dataset.windows["document"][rows.windows].tolist())
        assert not trained & set(excluded.tolist())


def test_the_domain_s_entropy_is_told_before_any_training(made, tmp_path, capsys):
    run = opened(made, tmp_path / "run")
    with run.opened():
        told = facts(clusters.importance_weights(run, "law"))
    shape, said = told["domain"], capsys.readouterr().err
    assert (f"the domain's entropy over {shape['k']} clusters is {shape['entropy']:.2f} nats"
            in said)


def test_a_corpus_in_a_store_gives_what_a_local_copy_gives(made, tmp_path, memory):
    fill(memory, made)
    here = {"generic": [f"{memory}/*.jsonl"], "domains_root": f"{memory}/domains"}
    runs = [opened(made, tmp_path / "local"), opened(made, tmp_path / "store", **here)]
    found = []
    for run in runs:
        with run.opened():
            folders = [corpus.generic(run), corpus.kept(run), corpus.domain(run, "law")]
        found.append([{path.relative_to(folder): path.read_bytes()
                       for path in sorted(folder.rglob("*.npy")) + sorted(folder.rglob("*.bin"))}
                      for folder in folders])
    assert found[0] == found[1] and all(found[0])
    again = opened(made, tmp_path / "store", **here)
    with again.opened():
        assert corpus.kept(again) and not again.made
    put(f"{memory}/domains/law/test.jsonl", (made / "domains/law/test.jsonl").read_bytes() + b"\n")
    changed = opened(made, tmp_path / "store", **here)
    with changed.opened():
        corpus.kept(changed)
        assert [folder.name.split("-")[0] for folder in changed.made] == ["law", "kept"]


def test_a_domain_that_is_the_corpus_is_told_so(made, tmp_path):
    run = opened(made, tmp_path / "run", domains_root=None, domains=[str(made / "generic.jsonl")])
    with run.opened(), pytest.raises(UserError, match="also stands in generic: the domain is the"):
        corpus.kept(run)


def test_a_domain_without_overlap_costs_no_new_pretraining(made, tmp_path):
    other = made / "domains" / "farm"
    other.mkdir()
    for split in ("train", "valid", "test"):
        lines = (made / "domains" / "law" / f"{split}.jsonl").read_text()
        (other / f"{split}.jsonl").write_text(lines.replace("court", "goat"))
    out = tmp_path / "run"
    pipeline.run(recipe(made, methods=["slm"], domains=["law"]), out, "pretrain")
    pipeline.run(recipe(made, methods=["slm"], domains=["law", "farm"]), out, "pretrain")
    assert len(list(out.glob("kept-*"))) == 2
    assert len(list(out.glob("pretrain/slm-*"))) == 1


def test_weights_are_what_is_drawn_and_the_cap_holds(made, tmp_path):
    run = opened(made, tmp_path / "run", importance={"max_epochs": 2.0})
    with run.opened():
        stage = clusters.importance_weights(run, "law")
        rows = np.diff(Rows.load(clusters.rows(run, 3)).group_offsets)
        sampler = Sampler(rows, training.weights_of(stage), clusters.sampler_seed(run))
        drawn = sampler.counts(planned_rows(run.recipe))
        assert np.all(drawn <= 2 * rows)
        expected = np.asarray(read_json(stage / "clusters.json")["epochs"]) * rows
        np.testing.assert_allclose(drawn, expected, atol=1e-6)
        share = read_array(stage / "domain.npy")
        assert share.argmax() == drawn.argmax()


def test_a_document_in_both_corpora_is_trained_on_as_the_domain_s(made, tmp_path):
    train = (made / "domains" / "law" / "train.jsonl").read_text().splitlines()
    generic = made / "generic.jsonl"
    generic.write_text(generic.read_text() + "\n" + "\n".join(train[:2]))
    run = opened(made, tmp_path / "run")
    with run.opened():
        kept = corpus.kept(run)
        assert facts(kept)["also_in_train"] == {"law": 2}
        last = len(TokenDataset(corpus.generic(run)).documents) - 1
        assert read_array(kept / "excluded.npy")[[last - 1, last]].all()


def test_replay_and_mixed_pretraining_train_and_are_booked(made, tmp_path):
    mixed = recipe(
        made, methods=["slm", "slm-is"],
        finetune={"batch_tokens": 128, "compile": "no", "max_epochs": 3, "replay_share": 0.25},
        pretrain={"batch_tokens": 128, "compile": "no", "specialization_share": 0.25})
    out = tmp_path / "run"
    rows = pipeline.run(mixed, out)["rows"]
    assert all(row["ppl_after"] < row["ppl_before"] for row in rows)
    (tuned,) = out.glob("specialize/slm-is.law-*/manifest.json")
    assert "rows" in read_json(tuned)["inputs"]
    (base,) = out.glob("pretrain/slm-is.law-*/manifest.json")
    assert read_json(base)["settings"]["specialization_share"] == 0.25
    drawn = np.sum(read_json(base)["epochs"]["rows_drawn"])
    planned = mixed.pretrain_tokens // mixed.context
    assert abs(drawn - 0.75 * planned) <= 1


@pytest.mark.parametrize(("key", "method", "tokens"), [
    ("pretrain", "slm-is", 64), ("adapt", "slm-adapt", 16), ("pretrain", "slm-is", 2000)])
def test_pretraining_that_repeats_few_documents_often_is_told(made, tmp_path, capsys, key, method,
                                                              tokens):
    asked = recipe(made, methods=[method], spec_tokens=tokens)
    asked = dataclasses.replace(asked, **{key: dataclasses.replace(
        getattr(asked, key), specialization_share=0.5)})
    pipeline.run(asked, tmp_path / "run", "pretrain")
    found = re.search(r"warning: pretraining passes (\d+) times over the domain's own text.*"
                      rf"{key}.specialization_share=([\d.]+)", capsys.readouterr().err)
    assert bool(found) == (tokens < 100)
    if found:
        assert int(found[1]) > 16 and float(found[2]) == pytest.approx(8 / int(found[1]), rel=0.1)


def test_the_prior_of_the_weights_leaves_out_whole_documents(made, tmp_path, monkeypatch):
    """Windows of one document are alike: left out one by one they would vouch for each other."""
    seen = []
    real = clusters.histogram.smooth

    def smooth(groups, size, generic, **more):
        seen.append(more["documents"])
        return real(groups, size, generic, **more)

    monkeypatch.setattr(clusters.histogram, "smooth", smooth)
    run = opened(made, tmp_path / "run")
    with run.opened():
        clusters.importance_weights(run, "law")
        dataset, used = corpus.specialization_windows(run, "law")
    assert len(np.unique(dataset.windows["document"][used])) < len(used)
    assert seen and all(np.array_equal(documents, dataset.windows["document"][used])
                        for documents in seen)


def test_a_split_that_is_made_here_reads_its_documents_once(made, tmp_path, monkeypatch):
    mine = made / "mine.jsonl"
    shutil.copyfile(made / "domains" / "law" / "train.jsonl", mine)
    one = opened(made, tmp_path / "run", domains=[str(mine)])
    with one.opened():
        parts = corpus.split(one, "mine")
        whole = domain_splits(None, str(mine), one.recipe.data, one.recipe.seed)
        assert {name: parts[name] for name in whole} == whole
        finished = corpus.domain(one, "mine")
    monkeypatch.setattr(domains, "read_documents", lambda *args: pytest.fail("read again"))
    again = opened(made, tmp_path / "run", domains=[str(mine)])
    with again.opened():
        assert corpus.domain(again, "mine") == finished and not again.made
    # an older run folder has no such stage: looked at, it is told by its documents
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run" / "split")
    looked = Run(again.out, again.recipe, build=False)
    assert corpus.domain(looked, "mine") == finished


def test_how_steps_are_computed_does_not_make_a_training_again(made, tmp_path, monkeypatch):
    """Nor how much memory or which compiler there is; run folders that counted it are found."""
    out = tmp_path / "run"

    def trainings(**over):
        run = Run(out, config.variant(recipe(made, methods=["slm"]), over))
        with run.opened():
            one = trained.specialize(run, "slm", "law")
        return [one.base, one.tuned], run.made

    with monkeypatch.context() as patch:  # as a run folder of the older layout has them
        patch.setattr(training, "train_settings",
                      lambda train: training._without(train, training._OLDER))
        patch.setattr(training, "same_settings", lambda values, train, place="train": [])
        older, _ = trainings()
    assert "microbatch_tokens" in facts(older[0])["settings"]["train"]
    assert trainings() == (older, [])
    shutil.rmtree(out / "pretrain")
    first, made_now = trainings()
    assert set(first) <= set(made_now) and not set(first) & set(older)
    arithmetic = "bf16" if parallel.bf16_is_fast(parallel.device()) else "fp32"
    for over in ({"pretrain.microbatch_tokens": 32}, {"finetune.microbatch_tokens": 64},
                 {"pretrain.compile": "auto"}, {"pretrain.validate_steps": 7},
                 {"pretrain.precision": arithmetic, "finetune.precision": arithmetic}):
        assert trainings(**over) == (first, []), over
    assert trainings(**{"finetune.validate_steps": 3})[0] != first


def test_only_the_specialization_set_is_embedded_and_clustered(made, tmp_path):
    whole = opened(made, tmp_path / "run")
    with whole.opened():
        every = clusters.domain_clusters(whole, "law")
        everything = read_array(every / "assignment-3.npy")
    part = opened(made, tmp_path / "part", spec_tokens=400)
    with part.opened():
        stage = clusters.domain_clusters(part, "law")
        dataset, used = corpus.specialization_windows(part, "law")
        found = read_array(stage / "assignment-3.npy")
        points = clusters.domain_embeddings(part, "law")
    assert 0 < len(used) < len(dataset) and len(points) == len(used)
    assert np.array_equal(found[used], everything[used])
    beside = opened(made, tmp_path / "run", spec_tokens=400)  # the whole set lies there already
    with beside.opened():
        assert clusters.domain_clusters(beside, "law") == every
        assert np.array_equal(clusters.domain_embeddings(beside, "law"), points)
    assert (np.delete(found, used) == -1).all() and (everything >= 0).all()


def test_the_cap_counts_what_is_drawn_of_the_generic_corpus(made, tmp_path):
    run = Run(tmp_path / "run", config.variant(
        recipe(made, methods=["slm-is"]), {"pretrain.specialization_share": 0.5}))
    with run.opened():
        weighed = facts(clusters.importance_weights(run, "law"))["weights"]
    assert weighed["draws"] == 24 * 8 // 2
