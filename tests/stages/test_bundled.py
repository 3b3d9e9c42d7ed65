"""Adaptation from a bundle: the same stages and weights as in the run that it comes from."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from planearly import api, config, storage, tensors
from planearly.cli import main
from planearly.cluster import embed
from planearly.errors import UserError
from planearly.export import bundle, hub
from planearly.files import cache_folder, read_array, read_json, write_json
from planearly.stages import bundled, doctor, exchange, pipeline, trained
from planearly.train import loop, state
from small_runs import Words, corpus
from small_runs import recipe as small
from small_stores import fill

NETWORK = {"projected": {"experts": 3, "rank": 2, "embedding": 3}, "expert": "blend"}


@pytest.fixture
def owners(made, monkeypatch):
    monkeypatch.setattr(bundle, "load_embedder", lambda name, cache=None: Words())
    return made


def recipe(root, method, **over):
    return small(root, **{"methods": [method], "cluster": {"k": [3, 6]}, **NETWORK, **over})


def provided(root, out, method="slm-adapt", **over):
    """The bundle of a provider who knows no domain."""
    pipeline.run(recipe(root, method, domains_root=None, **over), out, "pretrain")
    (folder,) = out.glob(f"bundle/{method}-*/bundle")
    return folder


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A corpus, and the bundle of ``slm-adapt`` on it; for reading."""
    folder = tmp_path_factory.mktemp("early")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "load_embedder", lambda name, cache=None: Words())
        patch.setattr(embed, "_FEW", 1 << 20)
        root = corpus(folder / "text")
        return root, provided(root, folder / "provider", importance={"k": 6})


def owner_s(root, folder, *overrides):
    return bundled.from_bundle(folder, [str(root / "domains" / "law")], [
        f"generic=[{root / 'generic.jsonl'}]", "data.generic_eval_tokens=500", *overrides])


def weights(out, stage):
    (folder,) = out.glob(f"{stage}-*")
    return load_file(folder / loop.FINAL)


def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "nested"), [
    ("slm-adapt", True), ("slm-adapt", False), ("slm-pn-adapt", True)])
def test_weights_are_those_of_the_run_that_it_comes_from(owners, tmp_path, method, nested):
    cluster = {"cluster": {"k": [3, 6], "nested": nested}, "adapt": {"replay_share": 0.25}}
    pipeline.run(recipe(owners, method, **cluster), tmp_path / "whole", "pretrain")
    folder = provided(owners, tmp_path / "provider", method, **cluster)
    pipeline.run(owner_s(owners, folder), tmp_path / "owner", "pretrain")
    stage = f"pretrain/{method}.law"
    assert same(weights(tmp_path / "whole", stage), weights(tmp_path / "owner", stage))


@pytest.mark.slow
def test_a_bundle_s_model_is_tuned_and_its_own_part_alone_is_paid(owners, tmp_path):
    whole = pipeline.run(recipe(owners, "slm-adapt"), tmp_path / "whole", "report")["rows"][0]
    (folder,) = tmp_path.glob("whole/bundle/slm-adapt-*/bundle")
    ours = pipeline.run(owner_s(owners, folder), tmp_path / "owner")["rows"][0]
    stage = "specialize/slm-adapt.law"
    assert same(weights(tmp_path / "whole", stage), weights(tmp_path / "owner", stage))
    assert (ours["ppl_after"], ours["generic_ppl"]) == (whole["ppl_after"], whole["generic_ppl"])
    assert ours["generic_cost"]["tokens"] == 0
    assert ours["specialization_cost"]["tokens"] == whole["specialization_cost"]["tokens"]
    card = (tmp_path / "owner" / ours["model"] / "README.md").read_text()
    assert "not counted: the part of the pretraining that all domains share" in card
    assert doctor.examine(tmp_path / "owner").well


def test_the_owner_chooses_how_to_adapt_and_not_from_what(early):
    root, folder = early
    asked = owner_s(root, folder)
    assert (asked.importance.k, asked.cluster.k, asked.methods) == (6, [3, 6], ["slm-adapt"])
    trained.check(owner_s(root, folder, "importance.k=3", "adapt.specialization_share=0.1",
                          "finetune.replay_share=0.1", "pretrain.microbatch_tokens=64",
                          "adapt.draws=dsir"))
    with pytest.raises(UserError, match=r"'adapt.draws' is color, which .* of slm, and the bundle "
                                        r".* holds no model at the end"):
        trained.check(owner_s(root, folder, "adapt.draws=color"))
    for key, value in (("adapt.share", "0.5"), ("pretrain_tokens", "9M"), ("context", "8"),
                       ("pretrain.batch_tokens", "64"), ("model.d_model", "64"),
                       ("cluster.k", "[3]"), ("methods", "[slm]")):
        with pytest.raises(UserError, match=f"'{key}' is .*settled in the bundle"):
            trained.check(owner_s(root, folder, "importance.k=3", f"{key}={value}"))


def test_the_recipe_keeps_the_url_of_a_bundle(early, owners, memory, tmp_path, monkeypatch):
    root, folder = early
    law, url, out = str(root / "domains" / "law"), f"{memory}/bundle", tmp_path / "run"
    fill(url, folder)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", lambda recipe, *words: asked.append(recipe))
        api.specialize(url, law)
        api.run(url, domains=[law])
        main(["specialize", url, law])
    assert [recipe.bundle for recipe in asked] == [url] * 3
    main(["weigh", url, law, f"generic=[{root / 'generic.jsonl'}]", "data.generic_eval_tokens=500",
          "--out", str(out)])
    shutil.rmtree(cache_folder())
    storage.local.cache_clear()
    main(["doctor", str(out)])
    assert url in (out / "recipe.yaml").read_text()


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def weights_alone(file):
    found, note = tensors.load_tensors(file)
    tensors.save_tensors(file, state.weights_of(found), note)


def another_step(file):
    found, note = tensors.load_tensors(file)
    note["outcome"]["steps"] += 1
    tensors.save_tensors(file, found, note)


def without_a_step(file):
    info = read_json(file)
    write_json(file, {key: value for key, value in info.items() if key != "step"})


def without_levels(file):
    write_json(file, {**read_json(file), "levels": []})


@pytest.mark.parametrize(("name", "damage", "says"), [
    *((name, Path.unlink, f"the bundle lacks .*{name}")
      for name in (bundle.STATE, bundle.METRICS, "rows-3.npy")),
    (bundle.STATE, cut, "state.safetensors is not a readable checkpoint"),
    (bundle.STATE, lambda file: save_file(load_file(file), file), "state.safetensors is damaged"),
    (bundle.STATE, weights_alone, "has weights alone.*ask its provider for the whole bundle"),
    (bundle.STATE, another_step, "is not the state from which the recipe beside it adapts"),
    ("bundle.json", without_a_step, "bundle.json is damaged"),
    ("bundle.json", without_levels, "bundle.json is damaged"),
    (bundle.METRICS, cut, "metrics.jsonl is not as it was saved"),
])
def test_what_a_bundle_lacks_is_one_sentence(early, tmp_path, name, damage, says):
    root, whole = early
    folder = Path(shutil.copytree(whole, tmp_path / "bundle"))
    damage(folder / name)
    with pytest.raises(UserError, match=says) as told:
        pipeline.run(owner_s(root, folder), tmp_path / "owner", "prepare")
    assert str(folder) in str(told.value) and "\n" not in str(told.value).strip()


def test_a_wrong_use_is_one_sentence(early, owners, tmp_path, capsys):
    root, adapts = early
    experts = provided(owners, tmp_path / "experts", "slm-pn")
    api.run(recipe(owners, "slm-pn", domains_root=None), tmp_path / "experts", until="cluster",
            share=tmp_path / "clusters")
    law = str(root / "domains" / "law")
    for words, says in (
        ([adapts], "'generic' names none: give it with 'generic=[FILES]', or give the bundle's"),
        ([experts, "methods=[slm-pn-adapt]"], "holds slm-pn as its pretraining ended: ask its "
         "provider for that of 'planearly pretrain RECIPE methods=[slm-pn-adapt]'"),
        ([adapts, "methods=[slm-pn-adapt]"], "holds those of slm-adapt: ask"),
        ([tmp_path / "clusters", "methods=[slm-adapt]"], "holds clusters alone: ask"),
        ([adapts, "domains=[other]"], f"'domains' is ['other'], and ['{law}'] was named before"),
        ([adapts, "bundle=null"], f"'bundle' is None, and {adapts} was named before"),
        ([experts, f"generic=[{law}]"], f"'generic' is ['{law}'], but that is settled"),
    ):
        with pytest.raises(SystemExit):
            main(["specialize", str(words[0]), law, *words[1:], "--out", str(tmp_path / "run")])
        assert says in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_its_provider_adapts_from_a_histogram_counted_by_it(owners, tmp_path):
    """The same model as the owner makes of the bundle with the corpus at hand."""
    folder = provided(owners, tmp_path / "provider")
    law = [str(owners / "domains" / "law")]
    api.run(folder, tmp_path / "owner", until="weigh", share=tmp_path / "law.json", domains=law)
    assert not list(tmp_path.glob("owner/generic-*"))
    given = config.variant(recipe(owners, "slm-adapt"), {
        "domains_root": None, "domains": [str(tmp_path / "law.json")]})
    before = set(tmp_path.glob("provider/pretrain/slm-plateau-*"))
    pipeline.run(given, tmp_path / "provider")
    assert set(tmp_path.glob("provider/pretrain/slm-plateau-*")) == before
    pipeline.run(owner_s(owners, folder), tmp_path / "owner", "pretrain")
    stage = "pretrain/slm-adapt.law"
    assert same(weights(tmp_path / "provider", stage), weights(tmp_path / "owner", stage))
    # and whoever has the bundle and a corpus is a provider too
    there = bundled.from_bundle(folder, [str(tmp_path / "law.json")], [
        f"generic=[{owners / 'generic.jsonl'}]", "data.generic_eval_tokens=500"])
    pipeline.run(there, tmp_path / "third")
    assert same(weights(tmp_path / "provider", stage), weights(tmp_path / "third", stage))
    (model,) = tmp_path.glob(f"third/model/slm-adapt.law-*/export/{exchange.TUNE}")
    ours, theirs = (
        read_array(next(tmp_path.glob(f"{name}/weights/law-*/weights.npy"))).tobytes()
        for name in ("provider", "third"))
    assert ours == theirs and model.is_file()


def test_a_run_keeps_a_bundle_of_each_method_that_shares_something(owners, tmp_path):
    pipeline.run(recipe(owners, "slm-adapt", adapt={"share": 1.0}), tmp_path / "none", "pretrain")
    assert not (tmp_path / "none" / "bundle").exists()
    asked = config.variant(recipe(owners, "slm-adapt", domains_root=None),
                           {"methods": ["slm", "slm-adapt", "slm-pn-adapt"]})
    pipeline.run(asked, tmp_path, "pretrain")
    assert sorted(path.name.rpartition("-")[0] for path in tmp_path.glob("bundle/*")) == [
        "slm-adapt", "slm-pn-adapt"]


def test_the_card_of_each_kind_says_how_to_use_it(early):
    card = hub.bundle_card(bundle.read_info(early[1]), "us/early")
    assert "# early: small models, 17 steps into their pretraining" in card
    assert "planearly specialize bundle MY_DOCUMENTS 'generic=[MY_CORPUS]'" in card
    clusters = {"kind": bundle.CLUSTERS, "shape": None, "levels": [6, 3],
                "embedder": {"name": "words"}}
    card = hub.bundle_card(clusters, "us/map")
    assert "# map: 6 and 3 clusters" in card
    assert "planearly weigh bundle MY_DOCUMENTS --share histogram.json" in card
