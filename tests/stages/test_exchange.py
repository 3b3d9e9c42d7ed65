"""A domain that is known by its histogram alone, from its owner to who pretrains and back."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from planearly import api, config
from planearly.cli import main
from planearly.errors import UserError
from planearly.export import bundle
from planearly.files import read_array, read_json, write_json
from planearly.stages import doctor, exchange, pipeline
from planearly.stages.manifest import facts
from planearly.train import loop
from small_runs import Words
from small_runs import recipe as small

METHODS = ["slm-is", "slm-adapt"]


@pytest.fixture
def owners(made, monkeypatch):
    monkeypatch.setattr(bundle, "load_embedder", lambda name, cache=None: Words())
    return made


def recipe(root, **over):
    return small(root, **{"methods": METHODS, "cluster": {"k": [3, 6]}, **over})


def by_texts(root, tmp_path, until="pretrain", **over):
    pipeline.run(recipe(root, **over), tmp_path / "texts", until)
    return tmp_path / "texts"


def histogram(root, tmp_path, **more):
    """Of the owner, who has nothing but the clusters and the texts."""
    asked = recipe(root, domains_root=None)
    api.run(asked, tmp_path / "provider", until="cluster", share=tmp_path / "clusters")
    file = tmp_path / "law.json"
    api.run(tmp_path / "clusters", tmp_path / "owner", until="weigh", share=file,
            domains=[str(root / "domains" / "law")], **more)
    return file


def given(root, file, **over):
    return recipe(root, domains_root=None, domains=[str(file)], **over)


def one(folder, name, file):
    (stage,) = folder.glob(f"{name}-*")
    return stage / file


@pytest.mark.slow
def test_the_same_weights_and_models_as_from_the_texts_and_fine_tuned_at_home(owners, tmp_path):
    texts = by_texts(owners, tmp_path, "specialize")
    file = histogram(owners, tmp_path)
    assert "appeal" not in file.read_text() and not list(tmp_path.glob("owner/pretrain"))
    pipeline.run(given(owners, file), tmp_path / "provider")
    for name in ("weights.npy", "domain.npy"):
        ours, theirs = (sorted(map(read_bytes, folder.glob(f"weights/law-*/{name}")))
                        for folder in (texts, tmp_path / "provider"))
        assert len(ours) == 2 and ours == theirs  # of both methods, which draw other numbers
    for method in METHODS:
        ours, theirs = (load_file(one(folder, f"pretrain/{method}.law", loop.FINAL))
                        for folder in (texts, tmp_path / "provider"))
        assert all((ours[key] == theirs[key]).all() for key in ours)
    model = one(tmp_path / "provider", "model/slm-is.law", "export")
    card = (model / "README.md").read_text()
    assert "fine-tuning is left to who has the documents" in card and "Perplexity" not in card
    home = config.load(model / exchange.TUNE, [f"start={model}"], changes={
        "domains_root": str(owners / "domains"), "finetune.compile": "no"})
    pipeline.run(home, tmp_path / "home", "specialize")
    ours = load_file(one(texts, "specialize/slm-is.law", loop.FINAL))
    theirs = load_file(one(tmp_path / "home", "specialize/slm.law", loop.FINAL))
    assert all((ours[key] == theirs[key]).all() for key in ours)


def test_with_a_prior_of_one_s_own_the_number_of_clusters_is_chosen_by_that(owners, tmp_path):
    asked = {"methods": ["slm-is"], "importance": {"smoothing": 200.0}}
    texts, file = by_texts(owners, tmp_path, "weigh", **asked), histogram(owners, tmp_path)
    pipeline.run(given(owners, file, **asked), tmp_path / "provider", "weigh")
    ours, theirs = (facts(next(folder.glob("weights/law-*")))
                    for folder in (texts, tmp_path / "provider"))
    assert (theirs["k"], theirs["tau"]) == (ours["k"], 200.0)
    owner = {k: level["gain"] for k, level in read_json(file)["levels"].items()}
    # what is left out in place of a document is an average one
    assert all(abs(gain - ours["gain"][k]) < 0.1 * abs(owner[k] - ours["gain"][k])
               for k, gain in theirs["gain"].items())


def test_an_expert_too_is_chosen_by_the_histogram(owners, tmp_path):
    network = {"methods": ["slm-pn-adapt"], "expert": "blend",
               "projected": {"experts": 3, "rank": 2, "embedding": 3}}
    texts, file = by_texts(owners, tmp_path, **network), histogram(owners, tmp_path)
    pipeline.run(given(owners, file, **network), tmp_path / "provider")
    for stage in ("expert/slm-pn-adapt.law", "pretrain/slm-pn-adapt.law"):
        ours, theirs = (load_file(one(folder, stage, loop.FINAL))
                        for folder in (texts, tmp_path / "provider"))
        assert all((ours[key] == theirs[key]).all() for key in ours), stage
    assert one(tmp_path / "provider", "model/slm-pn-adapt.law", f"export/{exchange.TUNE}").exists()
    for over, says in (
            ({"expert": "lowest-loss"}, "slm-pn-adapt needs the texts of 'law'.*slm-is, slm-adapt, "
             "and this one with 'expert=blend'"),
            ({"projected": {**network["projected"], "tune_vector": True}},
             "and this one with 'expert=blend projected.tune_vector=no'"),
            ({"adapt": {"draws": "dsir"}},
             "by it, slm-is, and this one with 'adapt.draws=importance'$"),
            ({"cluster": {"k": [3, 4]}, "projected": {"experts": 4}}, "counts 3 and 6 clusters, "
             "and slm-pn-adapt has an expert for each of 4")):
        with pytest.raises(UserError, match=says):
            pipeline.run(given(owners, file, **{**network, **over}), tmp_path / "run")
    assert not list(tmp_path.glob("run/generic-*"))  # told before anything is read


def read_bytes(path):
    return read_array(path).tobytes()


def test_what_needs_the_texts_is_refused_or_left_out(owners, tmp_path, capsys):
    file = histogram(owners, tmp_path)

    def refused(match, **over):
        with pytest.raises(UserError, match=match) as caught:
            pipeline.run(given(owners, file, **over), tmp_path / "run", "weigh")
        assert "\n" not in str(caught.value)

    refused("slm-dsir needs the texts of 'law'.*slm-is, slm-adapt", methods=["slm-is", "slm-dsir"])
    refused("by which none of the recipe's methods draws", methods=["slm"])
    refused("'pretrain.specialization_share' mixes in the text of 'law'",
            pretrain={"batch_tokens": 128, "compile": "no", "specialization_share": 0.1})
    refused("'adapt.specialization_share' mixes", adapt={"specialization_share": 0.1})
    refused("is a histogram of 3 and 6 clusters, and 'cluster.k' is", cluster={"k": [4]})
    refused("is a histogram of other 3 clusters than this run's.*digests", seed=1)
    capsys.readouterr()
    assert pipeline.run(given(owners, file), tmp_path / "run") is None
    told = capsys.readouterr().err
    assert "law: given without texts, so not fine-tuned or evaluated here" in told
    assert "for the owner of law" in told and "at home: planearly run" in told
    assert not list((tmp_path / "run").glob("specialize")) and "next:" not in told
    found = doctor.examine(tmp_path / "run")
    assert found.well and not found.again and not found.not_looked
    embedder = read_json(file)
    embedder["embedder"]["digest"] = "0" * 64
    write_json(file, embedder)
    refused("by the embedder 'words', and this run's, 'words', is another")


def test_a_domain_with_texts_beside_it_goes_on(owners, tmp_path):
    file = histogram(owners, tmp_path)
    shutil.copytree(owners / "domains" / "law", owners / "mine")
    pipeline.run(recipe(owners, methods=["slm-is"], domains_root=None,
                        domains=[str(file), str(owners / "mine")]), tmp_path / "run", "specialize")
    assert [path.name.split("-")[1] for path in tmp_path.glob("run/specialize/*")] == ["is.mine"]
    assert one(tmp_path / "run", "model/slm-is.law", f"export/{exchange.TUNE}").exists()


def test_noise_is_told_and_hides_the_owner_s_prior(owners, tmp_path, capsys):
    file = histogram(owners, tmp_path, epsilon=2.0)
    told = capsys.readouterr().err
    assert "private by document at epsilon 2: the noise costs 0." in told
    found = json.loads(file.read_text())
    assert list(found["levels"]) == ["6"] and found["levels"]["6"]["tau"] is None
    assert found["noise"]["scale"] == 1.0  # twice a window over epsilon
    assert all((count * 16).is_integer() for count in found["levels"]["6"]["counts"])
    pipeline.run(given(owners, file, methods=["slm-is"], importance={"k": 6}), tmp_path / "run",
                 "weigh")
    weights = read_array(one(tmp_path / "run", "weights/law", "weights.npy"))
    assert weights.sum() == pytest.approx(1)
    with pytest.raises(UserError, match=r"counts 6 clusters, and not 3: set 'importance\.k'"):
        pipeline.run(given(owners, file, importance={"k": 3}), tmp_path / "run", "weigh")


@pytest.mark.parametrize(("words", "says"), [
    (["weigh", "nano", "--epsilon", "1"], "'weigh --share FILE', to which --epsilon adds noise"),
    (["weigh", "CLUSTERS"], "name the documents: planearly weigh BUNDLE DOCS"),
    (["specialize", "CLUSTERS", "LAW"], "holds clusters alone"),
    (["weigh", "CLUSTERS", "LAW", "methods=[slm-is]"], "'methods' is \\['slm-is'\\], but that is"),
    (["weigh", "CLUSTERS", "LAW", "--share", "F", "--epsilon", "0"], "--epsilon: 0 is no use"),
    (["weigh", "CLUSTERS", "LAW", "FARM", "--share", "F"], "a histogram is of one domain"),
    (["cluster", "nano", "bundle=CLUSTERS", "--share", "F"], "settled in the bundle")])
def test_a_wrong_use_is_one_sentence(owners, tmp_path, capsys, words, says):
    shared_clusters(owners, tmp_path)
    shutil.copytree(owners / "domains" / "law", tmp_path / "farm")
    places = {"CLUSTERS": tmp_path / "clusters", "LAW": owners / "domains" / "law",
              "FARM": tmp_path / "farm", "F": tmp_path / "f.json",
              "bundle=CLUSTERS": f"bundle={tmp_path / 'clusters'}"}
    with pytest.raises(SystemExit):
        main([str(places.get(word, word)) for word in [*words, "--out", str(tmp_path / "run")]])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("planearly: ")
    assert re.search(says, told), told
    assert not (tmp_path / "f.json").exists()


def shared_clusters(root, tmp_path):
    api.run(recipe(root, domains_root=None), tmp_path / "provider", until="cluster",
            share=tmp_path / "clusters")


@pytest.mark.parametrize("file", ["rows-3.npy", "parent-6.npy", "centroids-6.npy"])
def test_a_damaged_bundle_of_clusters_is_refused(owners, tmp_path, file):
    shared_clusters(owners, tmp_path)
    place = tmp_path / "clusters" / file

    def refused(match):
        with pytest.raises(UserError, match=match):
            api.run(tmp_path / "clusters", tmp_path / "owner", until="weigh",
                    share=tmp_path / "f.json", domains=[str(owners / "domains" / "law")])

    np.save(place, read_array(place, mapped=False)[:-1])
    refused("does not hold what belongs")
    place.write_bytes(b"no array")
    refused("damaged or of another version")
    place.unlink()
    refused("the bundle lacks")


def test_a_bundle_of_experts_shares_too(owners, tmp_path):
    """Its experts' clusters come with the text that each holds, the finest without."""
    asked = recipe(owners, methods=["slm-pn"], domains_root=None,
                   projected={"experts": 3, "rank": 2, "embedding": 4})
    pipeline.run(asked, tmp_path / "provider", "pretrain")
    (folder,) = tmp_path.glob("provider/bundle/slm-pn-*/bundle")
    file = tmp_path / "law.json"
    api.run(folder, tmp_path / "owner", until="weigh", share=file,
            domains=[str(owners / "domains" / "law")])
    with pytest.raises(UserError, match="none of the recipe's methods draws: give the bundle its"):
        api.run(folder, tmp_path / "owner", domains=[str(file)])
    levels = read_json(file)["levels"]
    assert levels["3"]["tau"] is not None and levels["6"]["tau"] is None
    pipeline.run(given(owners, file), tmp_path / "provider", "weigh")
    texts = by_texts(owners, tmp_path, "weigh", importance={"k": 3})
    pipeline.run(given(owners, file, importance={"k": 3}), tmp_path / "other", "weigh")
    ours, theirs = (sorted(map(read_bytes, folder.glob("weights/law-*/weights.npy")))
                    for folder in (texts, tmp_path / "other"))
    assert ours == theirs
    assert facts(next(texts.glob("weights/law-*")))["k"] == 3
