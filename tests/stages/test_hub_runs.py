"""Runs on datasets of the hub: what is asked of it, and what happens without it."""

from __future__ import annotations

import numpy as np
import pytest

from planearly.data import corpora, hub
from planearly.data.dataset import TokenDataset
from planearly.errors import UserError
from planearly.stages import corpus, pipeline
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from small_hub import corpora as repositories
from small_hub import serving
from small_runs import TOPICS, document, recipe

pytest.importorskip("datasets")


def texts(name):
    rng = np.random.default_rng(list(corpora.TABLE).index(name))
    return [[document(topic, rng) for _ in range(6) for topic in TOPICS] for _ in range(3)]


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """A hub on this machine, which the libraries take for the real one."""
    import datasets
    from huggingface_hub import constants

    repositories(tmp_path / "hub", texts)
    monkeypatch.chdir(tmp_path)
    hub._load.cache_clear()
    with serving(tmp_path / "hub") as served:
        for place, name, value in (
                (constants, "ENDPOINT", served.address), (constants, "HF_HUB_OFFLINE", False),
                (constants, "HF_HUB_CACHE", str(tmp_path / "cache")),
                (constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                 f"{served.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"),
                (datasets.config, "HF_ENDPOINT", served.address)):
            monkeypatch.setattr(place, name, value)
        yield served
    hub._load.cache_clear()


@pytest.mark.slow
def test_corpora_are_read_from_the_hub_and_a_finished_run_asks_nobody(made, standin, tmp_path):
    run = recipe(made, generic=list(corpora.TABLE), methods=["slm"])

    def generic(out):
        hub._load.cache_clear()
        standin.asked.clear()
        pipeline.run(run, tmp_path / out, "prepare")
        return corpus.generic(Run(tmp_path / out, run, build=False))

    made_first = generic("run")
    dataset = TokenDataset(made_first)
    assert standin.asked and dataset.meta["read"] == 5 * 3 * 18
    assert dataset.meta["sources"] == [
        "allenai/c4", "HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb-edu",
        "mlfoundations/dclm-baseline-1.0", "FreeLaw", "ArXiv"]
    (tmp_path / "hub" / "allenai" / "c4" / "more.md").write_text("another commit")
    assert generic("run") == made_first and not standin.asked  # this run goes on with its own
    other = generic("other")
    assert standin.asked and facts(other)["fingerprint"] != facts(made_first)["fingerprint"]


def test_without_a_network_a_run_says_so_and_loses_nothing(made, standin, tmp_path):
    with pytest.raises(UserError, match=r"cannot read hf://org/absent .*: check the name"):
        pipeline.run(recipe(made, generic=["hf://org/absent"]), tmp_path / "run", "prepare")
    with pytest.raises(UserError, match=r"no configuration 'ens'; it has en, realnewslike"):
        pipeline.run(recipe(made, generic=["hf://allenai/c4/ens"]), tmp_path / "run", "prepare")
    standin.down = True
    with pytest.raises(UserError, match=r"cannot read hf://allenai/c4/en:train \(.*\): check .* "
                                        "connection"):
        pipeline.run(recipe(made, generic=["c4"]), tmp_path / "run", "prepare")
    pipeline.run(recipe(made), tmp_path / "run", "prepare")
