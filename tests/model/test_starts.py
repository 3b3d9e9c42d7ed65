"""Checkpoints by their names on the hub: fetched once, whole, and known by the commit."""

from __future__ import annotations

import json

import pytest

from planearly.errors import UserError
from planearly.model import starts
from small_outside import llama_folder
from small_runs import recipe


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with one model in it, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept, commit = tmp_path / "hub" / "models--someone--Base-1B", "a" * 40
    llama_folder(kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    starts._fetched.cache_clear()
    return kept / "snapshots" / commit


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_fetch_that_was_interrupted_goes_on(hub, monkeypatch, lost):
    import huggingface_hub

    shard = hub / "model-00001-of-00002.safetensors"
    (hub / "model.safetensors").rename(shard)
    (hub / "model-00002-of-00002.safetensors").write_bytes(shard.read_bytes())
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "a": shard.name, "b": "model-00002-of-00002.safetensors"}}))
    asked = []

    def download(*, local_files_only=False, **_):
        asked.append(local_files_only)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    starts._fetched("someone/Base-1B")
    assert asked == [True]
    starts._fetched.cache_clear()
    (hub / lost).unlink()
    starts._fetched("someone/Base-1B")
    assert asked == [True, True, False]


def test_a_name_of_the_hub_is_the_commit_that_was_fetched(made, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("someone/Base-1B", "hf://someone/Base-1B"):
        asked = recipe(made, start=name, context=48)
        assert starts.folder(asked) == hub
        assert starts.shape(asked).kv_heads == 2
    assert starts.hub_name("someone/Base-1B") and not starts.hub_name("./someone/Base-1B")
    with pytest.raises(UserError, match="no folder 'someone/other', and no model of that name"):
        starts.check(recipe(made, start="someone/other"))
    (tmp_path / "someone" / "other").mkdir(parents=True)  # a folder goes before a name
    with pytest.raises(UserError, match=r"someone/other has no config\.json"):
        starts.check(recipe(made, start="someone/other"))
