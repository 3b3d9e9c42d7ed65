"""Datasets of the hub: names that are wrong, commits that are pinned, no request without need."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from planearly.data import hub, shards
from planearly.data.build import tokenize_corpus
from planearly.data.documents import Problems
from planearly.data.inputs import resolve
from planearly.data.readers import read_documents
from planearly.engine.local import Local
from planearly.errors import UserError
from small_documents import DATA, lines, texts
from small_hub import note_loads, noting_loads
from small_models import tokenizer_folder

datasets = pytest.importorskip("datasets")

CARD = """---
configs:
- config_name: law
  data_files: [{split: train, path: law/a.jsonl}, {split: test, path: law/b.jsonl}]
- config_name: sea
  data_files: [{split: train, path: sea/*.jsonl}]
---
"""


@pytest.fixture
def repository(tmp_path):
    for name in ("law/a", "law/b", "sea/a", "sea/b"):
        path = tmp_path / "mine" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines({"text": f"{name} 1"}, {"text": f"{name} 2"}))
    (tmp_path / "mine" / "README.md").write_text(CARD)
    return f"hf://{tmp_path / 'mine'}"


def test_configurations_and_splits_of_a_local_repository(repository):
    assert texts(f"{repository}/law") == ["law/a 1", "law/a 2"]
    assert texts(f"{repository}/law:test") == ["law/b 1", "law/b 2"]
    assert texts(f"{repository}/sea") == ["sea/a 1", "sea/a 2", "sea/b 1", "sea/b 2"]
    for name, told in (("", r"several configurations \(law, sea\): name one, hf://.*/CONFIG"),
                       ("/wood", "no configuration 'wood'; it has law, sea"),
                       ("/law:dev", "no split 'dev'; it has train, test")):
        with pytest.raises(UserError, match=told):
            resolve([repository + name])


def test_a_local_repository_that_changes_is_another(repository, tmp_path):
    entry = f"{repository}/sea"
    before = resolve([entry])[0].revision
    assert before == resolve([entry])[0].revision
    (tmp_path / "mine" / "sea" / "c.jsonl").write_bytes(lines({"text": "new"}))
    assert resolve([entry])[0].revision != before
    assert "new" in texts(entry)


class Streamed:
    """As much of a streamed dataset as is used here."""

    num_shards = 3
    info = SimpleNamespace(splits={"train": SimpleNamespace(num_bytes=900)})

    def shard(self, num_shards, index):
        return Shard(index)


class Shard:
    column_names = ("text",)

    def __init__(self, index):
        self.index = index

    def select_columns(self, names):
        return iter([{"text": f"text {self.index}"}])


def test_the_commit_is_resolved_once(monkeypatch):
    asked = []

    class Hub:
        def dataset_info(self, name):
            asked.append(name)
            return SimpleNamespace(sha="abc")

    def load(name, configuration, revision, **more):
        asked.append((name, configuration, revision))
        return SimpleNamespace(as_streaming_dataset=lambda split: Streamed(),
                               config=SimpleNamespace(data_files=None))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("datasets.load_dataset_builder", load)
    hub._load.cache_clear()
    pinned: dict = {}
    units = resolve(["hf://org/set/de"], pinned)
    assert asked == ["org/set", ("org/set", "de", "abc")]
    assert [(u.shard, u.revision, u.size) for u in units] == [((i, 3), "abc", 300)
                                                             for i in range(3)]
    assert [d.text for u in units for d in read_documents(u, DATA, Problems(0.01))] == [
        "text 0", "text 1", "text 2"]
    asked.clear()
    assert resolve(["hf://org/set/de"], pinned) == units and not asked  # from the pins alone
    hub._load.cache_clear()


@pytest.mark.parametrize(("files", "most"), [(1, 1), (99, 99), (199, 100), (250, 100)])
def test_the_size_of_a_dataset_is_estimated_from_some_of_its_files(monkeypatch, files, most):
    names = [f"data/{i:03}.jsonl{'.gz' * (i % 2)}" for i in range(files)]
    asked = []

    class Hub:
        def dataset_info(self, name):
            return SimpleNamespace(sha="abc")

        def get_paths_info(self, path, names, revision, repo_type):
            assert (path, revision, repo_type) == ("org/set", "abc", "dataset")
            asked.extend(names)
            return [SimpleNamespace(path=name, size=1_000) for name in names]

    streamed = SimpleNamespace(info=SimpleNamespace(splits=None), num_shards=files)
    builder = SimpleNamespace(
        as_streaming_dataset=lambda split: streamed, config=SimpleNamespace(data_files={
            "train": [f"hf://datasets/org/set@abc/{name}" for name in names]}))
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: builder)
    hub._load.cache_clear()
    units = resolve(["hf://org/set"])
    hub._load.cache_clear()
    assert len(units) == files and len(asked) == len(set(asked)) == most <= files
    steps = np.diff([names.index(name) for name in [*asked, names[-1]]])
    assert max(steps, default=0) <= files / most + 1  # of the whole, evenly
    each = np.mean([3_500 if name.endswith(".gz") else 1_000 for name in asked])
    assert sum(unit.size for unit in units) == pytest.approx(files * each, rel=0.01)


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    class Hub:
        def dataset_info(self, name):
            raise ConnectionError("\n no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(UserError, match=r"cannot read hf://org/set \(no route\): check the name, "):
        resolve(["hf://org/set"])


def test_a_slip_of_our_own_is_not_told_as_the_hubs(monkeypatch, repository):
    monkeypatch.setattr(hub, "Loaded", None)
    with pytest.raises(TypeError):
        resolve([f"{repository}/law"])
    monkeypatch.setattr(hub, "_parse", lambda entry: None)
    with pytest.raises(TypeError):
        hub._misnamed(f"{repository}/law", {})

    class Hub:
        def dataset_info(self, name):
            return None.sha

    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(AttributeError):
        resolve(["hf://org/set"])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dataset_is_loaded_once_by_each_process(repository, tmp_path, monkeypatch, processes):
    for number in range(8):
        (tmp_path / "mine" / "sea" / f"more-{number}.jsonl").write_bytes(lines({"text": "sea"}))
    monkeypatch.setenv("NOTED_LOADS", str(tmp_path / "loads"))
    monkeypatch.setattr(shards, "tokenize", noting_loads)
    monkeypatch.setattr(shards, "_POOL_MEGABYTES", 0)
    monkeypatch.setattr("planearly.data.documents._GROUP", 1)  # a job for each
    hub._load.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset_builder", datasets.load_dataset_builder)
    note_loads()
    tokenize_corpus(resolve([f"{repository}/sea", f"{repository}/law"]),
                    tokenizer_folder(tmp_path / "tok"), 16, DATA, tmp_path / "out",
                    executor=Local(processes))
    loads, jobs = ([line.split() for line in (tmp_path / name).read_text().splitlines()]
                   for name in ("loads", "loads.jobs"))
    assert len(jobs) == 11 and len({process for process, _ in jobs}) == processes
    assert {process for process, _ in loads} >= {process for process, _ in jobs}
    assert len(loads) == len({tuple(each) for each in loads})  # none by one process twice


def test_a_gated_or_absent_dataset_is_one_sentence(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    class Hub:
        def dataset_info(self, name):
            return SimpleNamespace(sha="abc")

    def refused(*_, **__):
        raise DatasetNotFoundError(f"Dataset 'org/set' {why}")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    for name in ("load_dataset_builder", "get_dataset_config_names"):
        monkeypatch.setattr(f"datasets.{name}", refused)
    for why in ("is a gated dataset on the Hub.\nVisit it to ask for access.", "doesn't exist."):
        hub._load.cache_clear()
        with pytest.raises(UserError, match=rf"cannot read hf://org/set \(Dataset 'org/set' "
                           rf"{why[:9]}.*\): check the name.*logged in \(hf auth login\)"):
            resolve(["hf://org/set"])


def test_a_stream_that_breaks_loses_no_finished_shard(monkeypatch, tmp_path):
    read = []

    class Lines:
        def __init__(self, number, breaks):
            self.number, self.breaks, self.column_names = number, breaks, ("text",)

        def select_columns(self, names):
            return self

        def __iter__(self):
            read.append(self.number)
            yield {"text": f"one {self.number}"}
            if self.breaks:
                raise ConnectionError("the other side hung up")

    whole = [True]
    dataset = SimpleNamespace(
        shard=lambda num_shards, index: Lines(index, index == 1 and not whole))
    monkeypatch.setattr(hub, "_load", lambda entry, revision: hub.Loaded(dataset, []))
    units = [hub.Unit("hf://x", "hub", revision="abc", shard=(i, 3)) for i in range(3)]
    monkeypatch.setattr("planearly.data.documents._GROUP", 1)  # a job for each

    def made(out):
        tokenize_corpus(units, tokenizer_folder(tmp_path / "tok"), 16, DATA, tmp_path / out,
                        executor=Local(1))
        return (tmp_path / out / "dataset.json").read_text()

    straight = made("straight")
    whole.clear()
    with pytest.raises(UserError, match=r"shard 2 of 3 cannot be read after row 1 \(the other"):
        made("cut")
    read.clear()
    whole.append(True)
    assert made("cut") == straight and read == [1, 2]


def test_a_shard_that_breaks_is_one_sentence_that_says_why(monkeypatch):
    class Broken:
        column_names = None

        def __iter__(self):
            yield {"text": "one"}
            raise RuntimeError("\n no route\nto host")

    monkeypatch.setattr(hub, "_load", lambda entry, revision: hub.Loaded(Broken(), []))
    with pytest.raises(UserError, match=r"after row 1 \(no route\)"):
        list(hub.records(hub.Unit("hf://x", "hub"), ["text"]))


def test_a_shard_that_does_not_say_its_size_counts_as_large():
    units = [hub.Unit("hf://x", "hub", shard=(i, 9)) for i in range(9)]
    assert sum(unit.text_bytes for unit in units) > 1e9
