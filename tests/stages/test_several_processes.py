"""Several processes under torchrun make what one makes, and agree on what is finished."""

import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from planearly import keys
from planearly.files import read_json
from planearly.model.projected import Projected
from planearly.model.transformer import Shape
from planearly.study.view import RESULTS
from small_processes import environment
from small_runs import call, corpus, with_grid
from small_runs import recipe as small
from small_work import alive, until

MEETING = """
import os, time
from pathlib import Path
from planearly import parallel
parallel.start()
Path(os.environ["RANK"]).write_text(str(os.getpid()))
if parallel.rank() == 0:
    time.sleep(600)
parallel.barrier()
"""

TWICE = """
import sys
from planearly.cli import main
main(sys.argv[1:])
main(sys.argv[1:])  # what is finished is so for both
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_torchrun(tmp_path, number):
    (tmp_path / "go.py").write_text(MEETING)
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "go.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    until(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text()
                      for rank in "01"), 300)
    ranks = [int((tmp_path / rank).read_text()) for rank in "01"]
    time.sleep(0.5)  # the second is in a collective call
    torchrun.send_signal(number)
    torchrun.wait(25)  # less than torchrun's patience with a process that does not end
    until(lambda: not any(map(alive, ranks)))


def moves(out, stage):
    """How a training of a run moved what it trained, by name."""
    made, file = read_json(out / stage / "manifest.json"), out / stage / "final.safetensors"
    from_ = {name: out / folder / "final.safetensors" for name, folder in made["folders"].items()}
    if made["stage"].startswith("expert/"):  # the vector of the domain's blend alone
        file = out / stage / "vector" / "final.safetensors"
        begun = {"vector": torch.tensor(made["histogram"]) @ load_file(from_["model"])["experts"]}
    elif start := from_.get("start") or from_.get("expert"):
        begun = load_file(start)
    else:
        begun = Projected(Shape(**made["shape"]), keys.Projected(**made["settings"]["projected"]),
                          made["settings"]["seed"]).state_dict()
    return {name: tensor - begun[name] for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path):
    root = corpus(tmp_path / "text")
    mine = root / "mine.jsonl"  # a domain that is split by a stage
    (root / "domains" / "law" / "train.jsonl").rename(mine)
    asked = small(root, methods=["slm-pn", "slm-pn-adapt"], domains=[str(mine)], domains_root=None,
                  projected={"experts": 3, "rank": 2, "embedding": 3, "tune_vector": True,
                             "blends": 2},
                  expert="blend",  # two experts may be so close that rounding chooses
                  cluster={"k": [3]})
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(asked.to_dict()))
    one, two = tmp_path / "one", tmp_path / "two"
    call("run", path, "processes=1", "--out", one)
    (tmp_path / "twice.py").write_text(TWICE)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         tmp_path / "twice.py", "run", path, "processes=1", "--out", two],
        capture_output=True, text=True, timeout=600, env=environment())
    said = re.findall(r"(\d+) stages made", done.stderr)
    assert done.returncode == 0 and len(said) == 2 and said[0] != "0" == said[1], (
        done.stderr[-3000:])
    folders = [sorted(str(p.relative_to(out)) for p in out.rglob("manifest.json"))
               for out in (one, two)]
    assert folders[0] == folders[1]
    trained = [folder.relative_to(one) for kind in ("pretrain", "expert", "specialize")
               for folder in (one / kind).iterdir()]
    assert len(trained) == 7
    for stage in trained:
        theirs = moves(two, stage)
        for name, ours in moves(one, stage).items():
            # rounding in bfloat16, Muon's for one, changes it by up to 0.07 where that is fast;
            # a tensor that only one of them trains by 1
            assert (ours - theirs[name]).norm() < 0.2 * ours.norm(), (stage, name)


@pytest.mark.slow
def test_a_study_of_two_processes_makes_each_training_together(tmp_path):
    asked = with_grid(corpus(tmp_path / "text"), {"methods": ["slm", "slm-is"]})
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(asked.to_dict()))
    call("study", path, "processes=1", "--out", tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "planearly.cli", "study", path, "processes=1", "--workers", "2",
         "--out", tmp_path / "two"],
        capture_output=True, text=True, timeout=600, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_json(tmp_path / out / RESULTS)["rows"] for out in ("one", "two"))
    assert [row["method"] for row in two] == ["slm", "slm-is"] == [row["method"] for row in one]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["ppl_after"] == pytest.approx(ours["ppl_after"], rel=1e-3)
