"""Several processes under torchrun make what one makes, and agree on what is finished."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from small_models import sentence_model
from small_runs import TOPICS, call, corpus
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


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path):
    root = corpus(tmp_path / "text")
    words = [word for topic in TOPICS.values() for word in topic.split()]
    tiny = sentence_model(tmp_path / "embedder", words)
    mine = root / "mine.jsonl"  # a domain that is split by a stage
    (root / "domains" / "law" / "train.jsonl").rename(mine)
    asked = small(root, methods=["slm-pn", "slm-pn-adapt"], domains=[str(mine)], domains_root=None,
                  projected={"experts": 3, "rank": 2, "embedding": 3, "tune_vector": True,
                             "blends": 2},
                  expert="blend",  # two experts may be so close that rounding chooses
                  cluster={"k": [3], "embedder": str(tiny)})
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(asked.to_dict()))
    one, two = tmp_path / "one", tmp_path / "two"
    call("run", path, "--out", one)
    for expected in ("stages made", "0 stages made"):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             "-m", "planearly.cli", "run", str(path), "--out", str(two)],
            capture_output=True, text=True, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and expected in done.stderr, done.stderr[-3000:]
    folders = [sorted(str(p.relative_to(out)) for p in out.rglob("manifest.json"))
               for out in (one, two)]
    assert folders[0] == folders[1]
    for ours in one.rglob("final.safetensors"):
        theirs = load_file(two / ours.relative_to(one))
        for name, tensor in load_file(ours).items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-3)
