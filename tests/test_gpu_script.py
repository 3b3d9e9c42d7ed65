"""benchmarks/gpu.sh at toy sizes on this machine: known to work before a GPU is at hand."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from small_runs import corpus

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The module of the parts, which the script calls each in a process of its own."""
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes(gpu, tmp_path, monkeypatch, capsys):
    text = corpus(tmp_path / "text")
    (text / "domain.jsonl").write_bytes((text / "domains/law/train.jsonl").read_bytes())
    out, by_script = tmp_path / "out", (1, 4)
    (text / "generic").mkdir()
    (text / "generic.jsonl").rename(text / "generic/generic.jsonl")
    (text / "generic.jsonl").symlink_to(text / "generic/generic.jsonl")
    monkeypatch.setenv("PLANEARLY_TEXT", str(text))
    monkeypatch.setenv("PLANEARLY_STUDY", str(text))
    done = subprocess.run(
        ["bash", BENCHMARKS / "gpu.sh", " ".join(map(str, by_script))],
        capture_output=True, text=True,
        env={**os.environ, "OUT": str(out), "TOY": "1", "PYTHON": sys.executable,
             "OMP_NUM_THREADS": "1"})
    for part in gpu.PARTS.keys() - by_script:
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(part), "--toy", "--out", str(out)])
        gpu.main()
    said = done.stdout + capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("part ")]
    assert len(lines) == 8 and not [x for x in lines if "failed" in x or "stopped" in x], (
        said + done.stderr[-2000:])
    notes = [json.loads((out / f"gpu-{n}.json").read_text()) for n in gpu.PARTS]
    assert notes[1]["tokens_per_second"]["ours"] > 0
    assert set(notes[2]["ratios"]) == {"adamw, h = 3", "modern, h = 3"}
    assert notes[3]["formula_bytes"] > 0
    assert notes[5]["seconds"] > 0
    assert (notes[7]["cells"], notes[7]["missing"]) == (3, 0), (out / "study.txt").read_text()
    with tarfile.open(out / "study.tgz") as kept:
        assert {"study/study.json", "study/README.md"} <= set(kept.getnames())
    assert min(notes[6]["tokens_per_second"].values()) > 0 < notes[6]["side_by_side"]["sum"]


def test_the_script_calls_every_part_in_its_time(gpu):
    script = (BENCHMARKS / "gpu.sh").read_text()
    *usual, asked_for = gpu.PARTS
    assert f"${{1:-{' '.join(map(str, usual))}}}" in script and f"#   {asked_for}  " in script
    (times,) = [line for line in script.splitlines() if line.startswith("seconds=(")]
    assert len(times.split()) == len(gpu.PARTS) + 1
