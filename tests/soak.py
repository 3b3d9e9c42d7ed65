"""Kill a whole study again and again; it must end with the bytes of one that nobody touched.

    python tests/soak.py --kills 200 --out runs/soak

A study of nine methods and two domains, small enough for half a minute, is started, troubled at a
random moment after its first line and started again until it finishes; then its weights, exported
models and tables are held against those of an undisturbed study, and the next round begins. The
troubles: SIGKILL of every process, of one worker, or of the first process alone (its children live
on); a full disk; a folder that turns read-only; a clock that jumps by days while all of it goes on.
The last two and the disk need a tmpfs, that is root; without it they are left out, and the summary
says so.

The count of the studies that were compared is kept in OUT/soak.json: the same command goes on from
there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from small_runs import corpus, document, recipe

METHODS = ["slm", "slm-is", "slm-pn", "slm-mix", "slm-nopt", "llm", "llm-lora", "slm-d", "slm-dsir"]
KILLS = ["all", "all", "all", "first", "worker", "worker"]
MOUNTED = ["full disk", "read-only"]
UNEQUAL = ("hours", "seconds", "money")
"""Parts of the names of fields that tell of time, which no two runs share."""
TROUBLES = 20
"""Of one study, at most; then it is left alone, so that it ends on a slow machine as well."""
TRIES = 40
"""Starts of one study after which it is said not to get anywhere."""
CLOCK = '''
import random, time
_real = time.time
def _jumping():
    return _real() + random.choice([0, 0, 0, -86400 * 3, 86400 * 400, -3600, 7])
time.time = _jumping
'''


def make_study(folder: Path) -> Path:
    """Write corpus and recipe; returns the recipe's file."""
    given = folder / "soak.yaml"
    if given.exists():
        return given
    root = corpus(folder / "text")
    rng = np.random.default_rng(1)
    (root / "domains" / "sea").mkdir()
    for split, n in (("train", 40), ("valid", 12), ("test", 12)):
        (root / "domains" / "sea" / f"{split}.jsonl").write_text(
            "\n".join(json.dumps({"text": document("sea", rng)}) for _ in range(n)))
    values = recipe(root, name="soak", pretrain_tokens=16 * 8 * 60, cluster={"k": [4]},
                    projected={"experts": 4, "rank": 2, "embedding": 4},
                    mixture={"experts": 4}, methods=["slm"]).to_dict()
    values["study"]["grid"] = [{"methods": METHODS}]
    for training in ("pretrain", "finetune"):
        values[training]["checkpoint_seconds"] = 0.05
    given.write_text(yaml.safe_dump(values))
    return given


def start(given: Path, out: Path, workers: int, log: Path, jumps: Path | None) -> subprocess.Popen:
    """The study as its own process group."""
    paths = [str(jumps)] if jumps else []
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with open(log, "ab") as handle:
        handle.write(b"\n== started\n")
        return subprocess.Popen(
            [sys.executable, "-m", "planearly.cli", "study", str(given), "--out", str(out),
             "--workers", str(workers)], stdout=handle, stderr=handle, env=environment,
            start_new_session=True)


def children(pid: int) -> list[int]:
    """Processes below a process, all the way down."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *children(int(child))]
    return found


def kill_group(leader: int) -> None:
    """Kill a study with all that it started, also when its first process is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


class Disk:
    """A small file system in memory, for disks that fill up and folders that turn read-only."""

    def __init__(self, folder: Path, megabytes: int = 512) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        while folder.is_mount() and not subprocess.run(["umount", "-l", str(folder)],
                                                       check=False).returncode:
            pass  # of a soak that was itself killed
        self.mounted = _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)

    def fill(self) -> None:
        """Leave nothing free."""
        with contextlib.suppress(OSError), open(self.folder / "filler", "ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def read_only(self) -> bool:
        """Whether it could be made so: not while a file is open for writing."""
        return _mount("-o", "remount,ro", str(self.folder))

    def writable(self) -> None:
        _mount("-o", "remount,rw", str(self.folder))


def _mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0


def contents(out: Path) -> dict[str, str]:
    """What must be equal, by name: weights by their digest, study.json without times."""
    found = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in sorted(out.rglob("*.safetensors"))
             if path.name in ("final.safetensors", "model.safetensors")
             and not any(part.startswith(".") for part in path.relative_to(out).parts)}
    told = json.loads((out / "study.json").read_text("utf-8"))
    found["study.json"] = json.dumps(lasting(told), sort_keys=True)
    return found


def lasting(value: Any) -> Any:
    """A JSON value without fields that tell of time."""
    if isinstance(value, dict):
        return {name: lasting(inner) for name, inner in value.items()
                if not any(part in name.lower() for part in UNEQUAL)}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


class Soak:
    """The rounds, and what is kept of them."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out = out
        self.given = make_study(out)
        self.note = out / "soak.json"
        self.done: dict[str, Any] = {"kills": {}, "rounds": 0, "seconds": 0.0, "untried": []}
        if self.note.exists():
            self.done = json.loads(self.note.read_text())
        self.left: list[int] = []
        self.random = random.Random(seed + self.done["rounds"])
        (out / "jumps").mkdir(exist_ok=True)
        (out / "jumps" / "sitecustomize.py").write_text(CLOCK)

    @property
    def kills(self) -> int:
        return sum(self.done["kills"].values())

    def keep(self) -> None:
        self.note.write_text(json.dumps(self.done, indent=1) + "\n")

    def reference(self) -> dict[str, str]:
        """Of a study that nobody touches."""
        place, log = self.out / "untouched", self.out / "untouched.log"
        began = time.monotonic()
        if start(self.given, place, 1, log, None).wait():
            raise SystemExit(f"the undisturbed study failed: see {log}")
        if not self.done["seconds"]:
            self.done["seconds"] = time.monotonic() - began
            self.keep()
        return contents(place)

    def round(self, expected: dict[str, str], most: int) -> None:
        """Trouble one study until it is finished, with at most so many kills; then compare it."""
        number, hits = self.done["rounds"], Counter[str]()
        log = self.out / f"round-{number}.log"
        disk = Disk(self.out / "disk")
        kinds = KILLS + (MOUNTED if disk.mounted else [])
        self.done["untried"] = [] if disk.mounted else MOUNTED
        place = disk.folder / "study"
        jumps = self.out / "jumps" if number % 3 == 2 else None
        workers = 1 + number % 2
        shutil.rmtree(place, ignore_errors=True)
        try:
            for _ in range(TRIES):
                kind = self.random.choice(kinds) if hits.total() < most else ""
                moment = math.exp(self.random.uniform(math.log(0.1), math.log(
                    max(self.done["seconds"], 8) * 0.7)))
                hit, status = self.trouble(disk, place, log, workers, jumps, kind, moment)
                if hit:
                    hits[kind + (" with a jumping clock" if jumps else "")] += 1
                    print(f"{self.kills + hits.total()} kills: {kind} after {moment:.1f} s "
                          f"(round {number})", flush=True)
                    continue  # what it could not make it says, and the next start makes it
                if status == 0:
                    break
                raise SystemExit(f"the study ended with status {status} untroubled: see {log}")
            else:
                raise SystemExit(f"the study was not finished after {TRIES} starts: see {log}")
            if b"Traceback (most recent call last)" in log.read_bytes():
                raise SystemExit(f"a traceback: see {log}")
            self.clear()
            self.compare(contents(place), expected, log)
        finally:
            self.clear()
            disk.close()
        self.done["rounds"] += 1
        self.done["kills"] = dict(Counter(self.done["kills"]) + hits)
        self.keep()
        log.unlink()

    def clear(self) -> None:
        """End what outlived a first process that was killed."""
        while self.left:
            kill_group(self.left.pop())

    def trouble(self, disk: Disk, place: Path, log: Path, workers: int, jumps: Path | None,
                kind: str, moment: float) -> tuple[bool, int]:
        """Start the study and trouble it once, so many seconds after it first says something.

        Returns:
            whether the trouble came in time, and the status.
        """
        process = start(self.given, place, workers, log, jumps)
        if not kind:
            return False, process.wait()
        said = log.stat().st_size
        while process.poll() is None and log.stat().st_size == said:
            time.sleep(0.02)  # imports, of which nothing is to be learnt
        with contextlib.suppress(subprocess.TimeoutExpired):
            return False, process.wait(moment)
        below = children(process.pid)
        if kind == "worker" and not below:
            kind = "all"
        if kind == "all":
            kill_group(process.pid)
        elif kind == "first":
            process.kill()
            self.left.append(process.pid)
        elif kind == "worker":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(below), signal.SIGKILL)
        elif kind == "full disk":
            disk.fill()
        elif kind == "read-only":
            until = time.monotonic() + 5
            while not disk.read_only() and time.monotonic() < until and process.poll() is None:
                time.sleep(0.001)
        try:
            status = process.wait(5 * max(self.done["seconds"], 60))
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
            raise SystemExit(f"the study hung after '{kind}': see {log}") from None
        finally:
            disk.writable()
            disk.free()
        if kind != "first":  # else the next start is made while its children may still be there
            kill_group(process.pid)
        return True, status

    def compare(self, found: dict[str, str], expected: dict[str, str], log: Path) -> None:
        unequal = sorted(name for name in found.keys() | expected.keys()
                         if found.get(name) != expected.get(name))
        if unequal:
            kept = self.out / f"unequal-{self.done['rounds']}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.out / "disk" / "study", kept)
            raise SystemExit(f"{len(unequal)} of {len(expected)} results differ, as {unequal[:5]}: "
                             f"see {kept} and {log}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="in all, those before included")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round after that")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    soak = Soak(given.out, given.seed)
    expected = soak.reference()
    while soak.kills < given.kills and time.monotonic() - began < given.minutes * 60:
        soak.round(expected, min(given.kills - soak.kills, TROUBLES))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.done["kills"].items()))
    print(f"{soak.kills} kills in {soak.done['rounds']} studies ({kinds}); {len(expected)} results "
          "of each equal to the undisturbed study's"
          + (f"; not tried: {', '.join(soak.done['untried'])}" if soak.done["untried"] else ""))


if __name__ == "__main__":
    main()
