"""torchrun on several machines: network namespaces with addresses of their own stand for them."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from planearly.train import loop, metrics

STEPS = 30
WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import small_trainings as small
from planearly import parallel
from planearly.train import loop
from planearly.train.trainable import Dense
parallel.start()
folder = Path(sys.argv[1])
(folder / f"pid-{{parallel.rank()}}").write_text(str(os.getpid()))
settings = small.settings(log_steps=1, checkpoint_seconds=0.0, shard="yes",
                          optimizer=small.keys.Optimizer(preset="adamw"))
model = small.Transformer(small.SHAPE, seed=1).double()
loop.train(Dense(model), small.Words(), {steps}, settings, folder, name="t")
"""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces, at 10.231.77.1 and .2, joined by a cable that nothing else is on."""
    names = [f"planearly-{os.getpid()}-{n}" for n in (1, 2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and the command ip")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable",
               "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.231.77.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def started(host: str, number: int, hosts: int, script: Path, folder: Path) -> subprocess.Popen:
    """Two processes on a host."""
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run",
         f"--nnodes={hosts}", "--nproc-per-node=2", f"--node-rank={number}",
         "--master-addr=10.231.77.1", "--master-port=29400", str(script), str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"})


def lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_a_training_on_two_hosts_of_which_a_process_is_killed_goes_on_on_one(
        tmp_path: Path, hosts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script, alone, many = tmp_path / "worker.py", tmp_path / "alone", tmp_path / "many"
    for folder in (alone, many):
        folder.mkdir()
    script.write_text(WORKER.format(tests=str(Path(__file__).parent.parent), steps=STEPS))
    monkeypatch.setattr(sys, "argv", [str(script), str(alone)])
    runpy.run_path(str(script))
    running = [started(host, number, 2, script, many) for number, host in enumerate(hosts)]
    try:
        until = time.monotonic() + 600
        while lines(many) < 4 and time.monotonic() < until:
            assert all(process.poll() is None for process in running)
            time.sleep(0.01)
        os.kill(int((many / "pid-3").read_text()), signal.SIGKILL)
        for process in running:
            assert process.wait(timeout=300) != 0
        assert 4 <= lines(many) < STEPS and not (many / loop.OUTCOME).exists()
        running.append(started(hosts[0], 0, 1, script, many))
        _, told = running[-1].communicate(timeout=600)
        assert running[-1].returncode == 0, told.decode()
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    expected, found = ([(line["step"], line["loss"]) for line in
                        metrics.read(folder / "metrics.jsonl")] for folder in (alone, many))
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
