"""Bundles: whole, and refused in one sentence where they are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from planearly import keys
from planearly.cluster.embed import Embedder
from planearly.data import tokenizer
from planearly.errors import UserError
from planearly.export import bundle
from planearly.files import read_json, write_array, write_json
from planearly.model.choice import Experts
from planearly.model.mixture import Mixture
from planearly.model.projected import Projected
from planearly.model.transformer import Shape
from planearly.stages import bundled, pipeline

SHAPE = Shape(layers=1, d_model=16, heads=2, d_ff=24, vocab_size=20, context=64)
K = 3
CLUSTERS = bundle.Clusters(
    np.eye(K, 5, dtype=np.float32), np.array([4.0, 2.5, 1.0]),
    np.eye(5, dtype=np.float32), np.array([0, 1, 2, 1, 0], np.int32))
EMBEDDER = Embedder("toy", "d1" * 32, lambda: lambda texts: np.zeros((len(texts), 5), np.float32))


def make(kind: str) -> Experts:
    if kind == "slm-mix":
        return Mixture(SHAPE, K, seed=3)
    return Projected(SHAPE, keys.Projected(experts=K, rank=2, embedding=4, layers=[0]), seed=3)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "load_embedder", lambda name, cache=None: EMBEDDER)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    vocabulary = {"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate("abcdefgh")}}
    tokenizer.save(Tokenizer(models.BPE(vocabulary, [])), folder)
    return folder


def save(folder: Path, words: Path, kind: str = "slm-pn", **changes: object) -> Path:
    parts = {"clusters": CLUSTERS, "embedder": EMBEDDER, "tokenizer_folder": words,
             "recipe": keys.Recipe(name="mine", seed=5, context=64), **changes}
    bundle.save_bundle(folder, kind, make(kind), **parts)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("kind", ["slm-pn", "slm-mix"])
def test_round_trip(kind: str, tmp_path: Path, words: Path, here: None) -> None:
    save(tmp_path / "original", words, kind)
    shutil.rmtree(words)
    shutil.move(tmp_path / "original", tmp_path / "elsewhere")
    found = bundle.load_bundle(tmp_path / "elsewhere")
    model = make(kind)
    for (name, ours), theirs in zip(model.named_parameters(), found.model.parameters(),
                                    strict=True):
        assert torch.equal(ours, theirs), name
    assert found.kind == kind and type(found.model) is type(model)
    for name, array in vars(CLUSTERS).items():
        kept = getattr(found.clusters, name)
        assert np.array_equal(kept, array) and kept.dtype == array.dtype, name
    assert found.recipe == keys.Recipe(seed=5, context=64) and found.embedder is EMBEDDER
    assert tokenizer.load(found.tokenizer).get_vocab_size() == 9
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_embedder_absent(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, cache: Path | None = None) -> Embedder:
        raise UserError("no such model")

    save(tmp_path / "b", words)
    monkeypatch.setattr(bundle, "load_embedder", absent)
    with pytest.raises(UserError, match=r"'toy' cannot be loaded.*=FOLDER.*\(no such model\)"):
        bundle.load_bundle(tmp_path / "b")


def test_embedder_different(tmp_path: Path, words: Path, here: None) -> None:
    save(tmp_path / "b", words, embedder=Embedder("toy", "ff" * 32, lambda: None))  # type: ignore
    with pytest.raises(UserError, match=r"not the one.*d1d1d1d1d1d1 and ffffffffffff"):
        bundle.load_bundle(tmp_path / "b")


def test_embedder_elsewhere(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder moved with its bundle is the same embedder; another one is not, by any name."""
    digests = {"old/place": "aa" * 32, "new/place": "aa" * 32, "other": "bb" * 32}

    def installed(name: str, cache: Path | None = None) -> Embedder:
        if name == "old/place":
            raise UserError("no such model")
        return Embedder(name, digests[name], lambda: None)  # type: ignore

    folder = save(tmp_path / "b", words,
                  embedder=Embedder("old/place", digests["old/place"], lambda: None))  # type: ignore
    monkeypatch.setattr(bundle, "load_embedder", installed)
    with pytest.raises(UserError, match="'old/place' cannot be loaded"):
        bundle.load_bundle(folder)
    assert bundle.load_bundle(folder, "new/place").embedder.name == "new/place"
    with pytest.raises(UserError, match="'other' installed here is not the one"):
        bundle.load_bundle(folder, "other")


def test_clusters_that_do_not_match(tmp_path: Path, words: Path, here: None) -> None:
    for name, array, words_of in [
        ("centroids", np.eye(4, 5, dtype=np.float32), "4 clusters and the network 3 experts"),
        ("counts", np.array([1.0, 0.0, 2.0]), "in 1 of 3 clusters, the first number 1"),
        ("parent", np.array([0, 1, 1, 1, 0], np.int32), "lead from its 5 finest clusters to the 3"),
        ("finest", np.eye(4, 5, dtype=np.float32), "lead from its 4 finest clusters to the 3"),
    ]:
        with pytest.raises(UserError, match=words_of):
            save(tmp_path / "refused", words, clusters=replace(CLUSTERS, **{name: array}))
        folder = save(tmp_path / "b", words)
        write_array(folder / f"{name}.npy", array)
        with pytest.raises(UserError, match=words_of):
            bundle.load_bundle(folder)
    assert not (tmp_path / "refused").exists()


def test_parts_that_do_not_fit(tmp_path: Path, words: Path, here: None) -> None:
    folder = save(tmp_path / "b", words)
    info = read_json(folder / "bundle.json")
    write_json(folder / "bundle.json", {**info, "shape": {**info["shape"], "d_ff": 40}})
    with pytest.raises(UserError, match=r"has shape \[2, 24, 16\] where this model needs"):
        bundle.load_bundle(folder)
    write_json(folder / "bundle.json", {**info, "projected": {**info["projected"], "experts": 4}})
    with pytest.raises(UserError, match="3 experts and of 4"):
        bundle.load_bundle(folder)
    write_json(folder / "bundle.json", {**info, "format": 9})
    with pytest.raises(UserError, match="format 9"):
        bundle.load_bundle(folder)
    write_json(folder / "bundle.json", info)
    other = Tokenizer(models.BPE({"<|endoftext|>": 0, "z": 1}, []))
    tokenizer.save(other, folder / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer .* is not the one"):
        bundle.load_bundle(folder)
    with pytest.raises(UserError, match="is not a bundle"):
        bundle.load_bundle(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def without(key: str) -> Callable[[Path], None]:
    def drop(path: Path) -> None:
        info = read_json(path)
        write_json(path, {name: value for name, value in info.items() if name != key})

    return drop


def shaped(key: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        info = read_json(path)
        write_json(path, {**info, "shape": {**info["shape"], key: value}})

    return change


def first_half(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[:text.index("\n", len(text) // 2) + 1])


@pytest.mark.parametrize(("name", "damage"), [
    *[(name, Path.unlink) for name in (
        "recipe.yaml", "weights.safetensors", "centroids.npy", "counts.npy", "finest.npy",
        "parent.npy", "tokenizer/tokenizer.json")],
    *[(name, cut) for name in (
        "bundle.json", "weights.safetensors", "centroids.npy", "finest.npy", "parent.npy")],
    ("parent.npy", lambda path: path.write_bytes(b"")),
    ("recipe.yaml", lambda path: path.write_text("just: [a list")),
    ("recipe.yaml", lambda path: path.write_text("words")),
    ("recipe.yaml", lambda path: path.write_text("a_newer_key: 3")),
    ("recipe.yaml", first_half),  # which is a recipe, of other values
    *[("bundle.json", shaped(key, value)) for key, value in (
        ("experts_per_token", 2), ("layers", 0), ("layers", "x"), ("d_model", -1), ("heads", 0),
        ("heads", 3), ("d_ff", 1e30), ("vocab_size", "x"), ("context", 0), ("context", 16),
        ("ffn", 7), ("rope_theta", "x"), ("norm_eps", -1))],
    *[("bundle.json", without(key)) for key in (
        "shape", "experts", "finest", "embedder", "tokenizer", "projected")],
])
def test_a_bundle_that_is_not_whole_is_one_sentence(
        name: str, damage: Callable[[Path], None], tmp_path: Path, words: Path,
        here: None) -> None:
    folder = save(tmp_path / "b", words)
    damage(folder / name)
    with pytest.raises(UserError, match=name) as told:
        bundle.load_bundle(folder)
    assert str(folder) in str(told.value) and "\n" not in str(told.value).strip()


@pytest.mark.parametrize("kind", ["slm-pn", "clusters"])
def test_an_altered_file_is_told_by_its_digest(kind: str, tmp_path: Path, words: Path) -> None:
    folder = tmp_path / "b"
    if kind == "clusters":
        bundle.save_clusters(
            folder, {"centroids-3": np.eye(3, 5), "rows-3": np.ones(3)}, [3],
            embedder={"name": "toy", "digest": "d1"}, tokenizer_folder=words,
            recipe=keys.Recipe())
    else:
        save(folder, words)
    (folder / "README.md").write_text("what a hub adds")
    info = bundle.read_info(folder)
    bundle.check_files(folder, info)
    for name in info["files"]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} is not as it was saved"):
            bundle.check_files(folder, info)
        (folder / name).write_bytes(whole)
    assert {"recipe.yaml", "tokenizer/tokenizer.json"} < info["files"].keys()
    bundle.check_files(folder, {})  # of a bundle that was saved without digests


OWN = keys.Recipe(
    context=64, spec_tokens=200, data=keys.Data(eval_tokens=100, valid_tokens=50),
    cluster=keys.Cluster(k=[2, K, 5]), projected=keys.Projected(experts=K),
    finetune=keys.Finetune(replay_share=0.2, patience=7), domains=["theirs"], generic=["theirs"])


def test_all_documents_of_the_owner_are_used(tmp_path: Path, words: Path) -> None:
    folder = save(tmp_path / "b", words, recipe=OWN)
    asked = bundled.from_bundle(folder, ["mine"], ["finetune.max_epochs=2"])
    bundled.check(asked)
    assert asked.spec_tokens is None and asked.data == keys.Data()
    assert (asked.domains, asked.generic) == (["mine"], [])
    assert asked.cluster.k == [K, 5] and asked.context == 64
    assert asked.finetune == keys.Finetune(patience=7, max_epochs=2)
    assert bundled.from_bundle(folder, ["mine"], ["spec_tokens=5k"]).spec_tokens == 5_000


@pytest.mark.parametrize("override", [
    "cluster.k=[2]", "cluster.nested=false", "projected.experts=2", "projected.rank=3",
    "projected.embedding=5", "projected.layers=[1]", "model.d_model=64", "model.layers=1",
    "mixture.experts=2", "methods=[slm]", "methods=[slm-mix]", "generic=[x]", "context=128",
    "finetune.replay_share=0.1", "tokenizer.vocab_size=512", "pretrain_tokens=9M",
    "pretrain.optimizer.preset=paper",
])
def test_what_a_bundle_fixes_is_not_overridden(
        override: str, tmp_path: Path, words: Path) -> None:
    folder = save(tmp_path / "b", words, recipe=OWN)
    asked = bundled.from_bundle(folder, ["mine"], [override])
    with pytest.raises(UserError, match=f"'{override.split('=')[0]}' is .* the bundle"):
        pipeline.run(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
