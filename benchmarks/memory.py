"""Data stages: peak private memory of each process, and MB of text per second and core, by size.

    python benchmarks/memory.py --gigabytes 0.25 1 4 [--out FOLDER] [--processes N] [--json]

Writes text of the given sizes (words by Zipf's law, documents of a topic each), and runs `planearly
weigh` on it with the static embedder: splitting, tokenizing, duplicates, overlaps, embedding,
clustering, packing, weights. Meanwhile the private memory (anonymous pages: memory-mapped files do
not count) and the processor time of all its processes are read some thirty times a second. Needs
Linux, and about five times the text on disk; what is finished in FOLDER is not made again, and
then not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

WORDS, TOPICS, OWN = 20_000, 64, 200  # of a topic
DOCUMENT = 400  # words, on average
FILE = 128e6  # bytes of text
EVERY = 0.03  # seconds
TICK = os.sysconf("SC_CLK_TCK")


# Text -------------------------------------------------------------------------------------------

def write_text(path: Path, n_bytes: float, seed: int, topic: int | None = None) -> None:
    """A file of JSON lines; one document in fifty is repeated later."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypb"))
    table = np.array(["".join(np.random.default_rng(i).choice(letters, 2 + i % 9))
                      for i in range(WORDS)], object)
    common = 1 / np.arange(2, WORDS + 2)
    ends = np.cumsum(common / common.sum())
    written, again = 0, ""
    with open(path, "w", encoding="utf-8") as handle:
        while written < n_bytes:
            n = int(rng.lognormal(np.log(DOCUMENT), 0.6)) + 20
            own = rng.integers(0, OWN, n) + OWN * (
                int(rng.integers(TOPICS)) if topic is None else topic)
            drawn = np.searchsorted(ends, rng.random(n))
            said = table[np.where(rng.random(n) < 0.3, own, drawn).clip(max=WORDS - 1)]
            line = json.dumps({"text": " ".join(said)}) + "\n"
            written += handle.write(line)
            if rng.random() < 0.02:
                written += handle.write(again)
                again = line


def corpus(root: Path, n_bytes: float) -> Path:
    """A generic corpus of that size and a domain of a megabyte; what is there is not made again."""
    if not (root / "recipe.yaml").exists():
        (root / "generic").mkdir(parents=True, exist_ok=True)
        for number in range(max(round(n_bytes / FILE), 1)):
            write_text(root / "generic" / f"{number:03d}.jsonl", min(n_bytes, FILE), number)
        write_text(root / "domain.jsonl", 1e6, 1 << 20, topic=3)
        (root / "recipe.yaml").write_text(yaml.safe_dump({
            "generic": [str(root / "generic")], "domains": [str(root / "domain.jsonl")],
            "methods": ["slm-is"], "context": 256, "pretrain_tokens": 1_000_000,
            "tokenizer": {"vocab_size": 8_192, "sample_bytes": 5_000_000},
            "cluster": {"k": [64], "embedder": "static"},
            "data": {"generic_eval_tokens": 100_000}}))
    return root / "recipe.yaml"


# Measuring --------------------------------------------------------------------------------------

def tree(root: int) -> Iterator[int]:
    """A process and all that it started."""
    yield root
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{root}/task"):
            for child in Path(f"/proc/{root}/task/{task}/children").read_text().split():
                yield from tree(int(child))


def private_bytes(process: int) -> int:
    """Anonymous pages of a process in memory."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(process: int) -> float:
    """Of a process and its children that ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICK


def watched(command: list[str]) -> list[dict[str, Any]]:
    """Stages of a run, with peaks in bytes: of the process that leads, and of any other."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    stages: list[dict[str, Any]] = []
    tail: list[str] = []

    def begin(name: str) -> None:
        stages.append({"stage": name, "leader": 0, "worker": 0, "seconds": time.monotonic(),
                       "cpu": spent})

    def end() -> None:
        if stages:
            stages[-1]["seconds"] = time.monotonic() - stages[-1]["seconds"]
            stages[-1]["cpu"] = spent - stages[-1]["cpu"]

    said: list[str] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            tail[:] = [*tail[-20:], line]
            if line.startswith("── "):
                said.append(line[3:].strip())

    listener = threading.Thread(target=listen)
    spent = 0.0
    begin("start")
    listener.start()
    while process.poll() is None:
        if said:
            end()
            begin(said.pop(0))
        now = 0.0
        for one in list(tree(process.pid)):
            with contextlib.suppress(OSError):
                who = "leader" if one == process.pid else "worker"
                stages[-1][who] = max(stages[-1][who], private_bytes(one))
                now += cpu_seconds(one)
        spent = max(spent, now)
        time.sleep(EVERY)
    end()
    listener.join()
    if process.returncode:
        sys.exit("".join(tail))
    return stages


def measure(root: Path, n_bytes: float, processes: int) -> list[dict[str, Any]]:
    recipe = corpus(root, n_bytes)
    stages = watched([sys.executable, "-m", "planearly.cli", "weigh", str(recipe), "--out",
                      str(root / "run"), f"processes={processes}"])
    for stage in stages:
        stage["mb_per_core_second"] = n_bytes / 1e6 / stage["cpu"] if stage["cpu"] else None
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 1, 4])
    parser.add_argument("--out", type=Path, help="folder for text and runs (default: temporary)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # the embedder's table is distilled once, before anything is measured
    subprocess.run([sys.executable, "-c", "from planearly.cluster.embed import load_embedder; "
                    "load_embedder('static').dim"], check=True)
    with contextlib.ExitStack() as left:
        out = options.out or Path(left.enter_context(tempfile.TemporaryDirectory()))
        found = {}
        for size in options.gigabytes:
            found[size] = measure(out / f"{size:g}", size * 1e9, options.processes)
            if options.json:  # each when it is made: the next one takes longer, and may fail
                print(json.dumps({f"{size:g}": found[size]}), flush=True)
    if options.json:
        return
    names = list(dict.fromkeys(s["stage"] for stages in found.values() for s in stages))
    print("peak private MB of the leading process and of a worker; MB/s of text per core")
    print(f"{'stage':22}" + "".join(f"{f'{size:g} GB':>26}" for size in found))
    for name in names:
        cells = []
        for stages in found.values():
            here = next((s for s in stages if s["stage"] == name), None)
            rate = here and here["mb_per_core_second"]
            cells.append("" if here is None else f"{here['leader'] / 1e6:.0f} / "
                         f"{here['worker'] / 1e6:.0f}; {f'{rate:.1f}' if rate else '-'}")
        print(f"{name:22}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
