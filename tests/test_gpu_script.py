"""benchmarks/gpu.sh at toy sizes on this machine: known to work before a GPU is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_runs import corpus

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes(tmp_path):
    text = corpus(tmp_path / "text")
    (text / "domain.jsonl").write_bytes((text / "domains/law/train.jsonl").read_bytes())
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh"], capture_output=True, text=True,
        env={**os.environ, "OUT": str(tmp_path / "out"), "TOY": "1", "PYTHON": sys.executable,
             "PLANEARLY_TEXT": str(text), "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("part ")]
    assert len(lines) == 7 and not [x for x in lines if "failed" in x or "stopped" in x], (
        done.stdout + done.stderr[-2000:])
    notes = [json.loads((tmp_path / f"out/gpu-{n}.json").read_text()) for n in range(1, 8)]
    assert notes[1]["tokens_per_second"]["ours"] > 0
    assert set(notes[2]["ratios"]) == {"adamw, h = 3", "modern, h = 3"}
    assert notes[3]["formula_bytes"] > 0
    assert notes[5]["seconds"] > 0
    assert min(notes[6]["tokens_per_second"].values()) > 0 < notes[6]["side_by_side"]["sum"]
