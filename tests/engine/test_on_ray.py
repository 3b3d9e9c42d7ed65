"""Ray's workers, where they cannot be had, and a node of its cluster that dies."""

import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import planearly
from planearly.cluster import assign, embed, neighbours, ngrams
from planearly.data import documents, domains, duplicates, overlap, pack, shards
from planearly.engine import on_ray
from planearly.engine.local import Inline, Local
from planearly.engine.on_ray import OnRay, places
from planearly.errors import UserError
from planearly.processes import Stopped, ending_in_order
from planearly.stages import pipeline
from planearly.train import loop
from small_models import sentence_model
from small_runs import TOPICS, corpus, results
from small_runs import recipe as small
from small_work import log, made, serve, until, work


def test_without_ray_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install planearly\[ray\]"):
        OnRay(2).map(work(tmp_path / "out"))
    little = work(tmp_path / "little", small=8)
    assert isinstance(OnRay(2).workers(little, little.shards, print), Inline)  # needs none


def test_a_signal_still_ends_in_order_once_ray_is_connected(monkeypatch, capsys):
    def init(*words, **more):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=bool, init=init))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Stopped), ending_in_order():
        on_ray._connected(1)
        signal.raise_signal(signal.SIGTERM)
    assert ("no Ray cluster is named by RAY_ADDRESS: one of this machine is started for this "
            "command (1 core), and ends with it") in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://somewhere", "no-such-host.invalid:6379"])
def test_an_address_without_a_cluster_is_one_sentence(tmp_path, monkeypatch, address):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"no Ray cluster can be reached at RAY_ADDRESS={address}"):
        OnRay(2).map(work(tmp_path / "out"))


@pytest.mark.ray
def test_an_address_without_a_cluster_stops_before_anything_is_done(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    asked = small(corpus(tmp_path / "text"), methods=["slm"], engine="ray")
    with pytest.raises(UserError, match="no Ray cluster can be reached at RAY_ADDRESS=127"):
        pipeline.run(asked, tmp_path / "run", "prepare")  # so little that it needs no workers
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install planearly\[ray\]"):
        pipeline.run(asked, tmp_path / "run", "prepare")


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_do_not_fit_are_one_sentence(tmp_path, monkeypatch, cluster):
    with monkeypatch.context() as patched:
        patched.setattr(planearly, "__version__", "0.0.0")
        with pytest.raises(UserError, match=r"has planearly 0\.1.*, and this is 0\.0\.0: install"):
            OnRay(2).map(work(tmp_path / "out"))
    nowhere = work(tmp_path / "out")
    object.__setattr__(nowhere, "folder", "/nowhere/at/all")
    with pytest.raises(UserError, match="does not see /nowhere/at/all: start planearly in a"):
        OnRay(2).map(nowhere)
    monkeypatch.setattr(on_ray, "_SEEN", 0.2)
    lost = work(tmp_path / "out")
    for shard in lost.shards:
        object.__setattr__(shard, "made", (tmp_path / "out" / "not-seen-here",))
    with pytest.raises(UserError, match="is not seen here: choose an --out on a file system"):
        OnRay(2).map(lost)


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_dies_loses_its_shard_only(tmp_path, cluster):
    out = tmp_path / "out"
    third = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    asked = work(out, {0: "held", 1: "held", 2: "held"}, n=6)

    def kill():
        until(lambda: (out / "log").exists() and len(log(out)) == 3)  # each node has one
        workers = {process for process, _, _ in log(out)}
        cluster.remove_node(third, allow_graceful=False)
        # its worker ends a moment after it, and must not finish meanwhile
        until(lambda: sum(Path(f"/proc/{worker}").exists() for worker in workers) == 2)
        (out / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    found = OnRay(3).map(asked)
    killer.join()
    assert [counts["double"] for counts in found] == [0, 2, 4, 6, 8, 10]
    Local(1).map(work(tmp_path / "plain", n=6))
    assert made(out) == made(tmp_path / "plain")
    begun = Counter(number for _, what, number in log(out) if what == "begin")
    assert sorted(begun.values()) == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("nodes, most, workers, expected", [
    ([(8, 0)], 9, None, (1, 8, 1, 0.0)),  # one for each machine
    ([(8, 0), (4, 0), (0, 0)], 9, None, (2, 4, 2, 0.0)),
    ([(8, 0), (4, 0)], 1, None, (1, 8, 1, 0.0)),
    ([(8, 0)], 9, 3, (3, 2, 3, 0.0)),
    ([(1, 0), (1, 0)], 9, 5, (5, 1, 1, 0.0)),
    ([(16, 4), (8, 2), (64, 0)], 9, None, (6, 4, 1, 1.0)),  # one for each GPU
    ([(16, 4), (8, 2), (64, 0)], 2, None, (2, 4, 1, 1.0)),
    ([(16, 4)], 90, 10, (10, 1, 3, 1 / 3)),
    ([(0, 2), (8, 0)], 9, None, (2, 0, 1, 1.0)),
])
def test_workers_for_trainings_divide_what_the_cluster_has(nodes, most, workers, expected):
    found = places([{"CPU": cpu, "GPU": gpu} for cpu, gpu in nodes], most, workers)
    assert found == pytest.approx(expected)


def spread(out: Path, troubles: dict[int, str], once: bool = True, workers: int = 2) -> None:
    (out / "workers").mkdir(parents=True)
    OnRay(workers).spread("serving", serve, {
        "out": str(out), "troubles": troubles, "once": once}, out / "workers", 9, workers)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_the_others_work_on(tmp_path, cluster, capsys):
    spread(tmp_path / "once", {1: "killed"})
    begun = Counter(number for _, what, number in log(tmp_path / "once") if what == "begin")
    ended = Counter(number for _, what, number in log(tmp_path / "once") if what == "end")
    assert begun == {1: 2, 2: 1} and ended == {1: 1, 2: 1}
    said = capsys.readouterr().err
    assert "serving by 2 workers of the Ray cluster" in said
    assert said.count("worker 1 is here, with 1 core\n") == 2 and "worker 2 is here" in said
    assert "serving: worker 1 of 2 failed, as its Ray worker died" in said
    with pytest.raises(UserError, match=r"worker 2 of 2 failed 3 times, .* Ray worker died"):
        spread(tmp_path / "always", {2: "killed"}, once=False)


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_dies_loses_its_worker_only(tmp_path, cluster):
    out = tmp_path / "out"
    third = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def kill():
        until(lambda: (out / "log").exists() and len(log(out)) == 3, 300)
        workers = {process for process, _, _ in log(out)}
        cluster.remove_node(third, allow_graceful=False)
        until(lambda: sum(Path(f"/proc/{worker}").exists() for worker in workers) == 2,
              300)
        (out / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    spread(out, {1: "held", 2: "held", 3: "held"}, workers=3)
    killer.join()
    begun = Counter(number for _, what, number in log(out) if what == "begin")
    assert sorted(begun.values()) == [1, 1, 2]
    assert sum(what == "end" for _, what, _ in log(out)) == 3


def data_and_weights(out: Path) -> dict[str, bytes]:
    """All files of the data stages, and the weights that were trained."""
    return {name: content for name, content in results(out).items()
            if not name.startswith(("pretrain/", "specialize/")) or name.endswith(".safetensors")}


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_ray_ends_with_the_same_data_and_weights(tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(documents, "_GROUP", 30_000)
    for module in (shards, embed, assign, domains, duplicates, ngrams, neighbours, overlap, pack):
        for name in ("_POOL_MEGABYTES", "_FEW", "_SMALL"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(duplicates, "_RANGE", 100)
    monkeypatch.setattr(overlap, "_SHARD", 100)
    monkeypatch.setattr(pack, "_RANGE", 300)
    root = corpus(tmp_path / "text")
    law = root / "domains" / "law"
    for i, split in enumerate(("train", "valid", "test")):  # to be split anew
        (law / f"{split}.jsonl").rename(law / f"part-{i}.jsonl")
    (root / "more.jsonl").write_text((root / "generic.jsonl").read_text().replace("ship", "boat"))
    words = [word for topic in TOPICS.values() for word in topic.split()]
    tiny = sentence_model(tmp_path / "embedder", words)
    used, spreads, trained_here = [], [], []
    monkeypatch.setattr(loop, "train", lambda *given, real=loop.train, **more: (
        trained_here.append(given[4]), real(*given, **more))[1])
    monkeypatch.setattr(OnRay, "spread", lambda self, name, *more, real=OnRay.spread: (
        spreads.append(name), real(self, name, *more)))
    monkeypatch.setattr(OnRay, "workers", lambda self, work, *more, real=OnRay.workers: (
        used.append((work.name, real(self, work, *more))), used[-1][1])[1])
    for engine in ("local", "ray"):
        asked = small(root, methods=["slm-is", "slm-dsir", "slm-knn", "slm-mix"],
                      mixture={"experts": 3},
                      generic=[str(root / "generic.jsonl"), str(root / "more.jsonl")],
                      cluster={"k": [3]} | {"embedder": str(tiny)}, engine=engine,
                      processes=1 if engine == "local" else None)
        pipeline.run(asked, tmp_path / engine, "specialize")
    pipeline.run(asked, tmp_path / "ray", "specialize")  # nothing is left for workers
    assert len(trained_here) == 10  # by the local run alone
    assert all(folder.is_relative_to(tmp_path / "local") for folder in trained_here)
    assert spreads == ["trainings"] and not (tmp_path / "ray" / ".workers").exists()
    made = data_and_weights(tmp_path / "local")
    assert data_and_weights(tmp_path / "ray") == made
    assert {"pretrain/slm-is.law", "pretrain/slm-mix-expert002", "specialize/slm-mix.law"} <= {
        name.rpartition("-")[0] for name in made if name.endswith("final.safetensors")}
    assert {"tokenizing generic corpus", "embedding", "looking for duplicates", "packing rows",
            "looking for held-out text", "putting windows in groups"} <= {
        name for name, workers in used if isinstance(workers, on_ray._Actors)}
