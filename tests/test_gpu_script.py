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


@pytest.mark.parametrize("parts", ["9", "1 0", "run", "88"])
def test_the_script_names_the_parts_that_there_are(parts, tmp_path):
    done = subprocess.run(["bash", BENCHMARKS / "gpu.sh", parts], capture_output=True, text=True,
                          env={**os.environ, "OUT": str(tmp_path), "PYTHON": "false"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"there is no part {parts.split()[-1]}: name some of 1 to 8, "
                           "as in '1 3'\n")


@pytest.fixture
def study(gpu, tmp_path, monkeypatch):
    """Part 8 with a program of one's own as the study; the report does nothing."""
    (tmp_path / "text" / "domains").mkdir(parents=True)
    monkeypatch.setenv("PLANEARLY_STUDY", str(tmp_path / "text"))
    begun = []

    class Begun(subprocess.Popen):
        def __init__(self, command, **how):
            begun.append(self)
            super().__init__([sys.executable, "-c", program], **how)

    program = ""

    def run(said, seconds=20.0):
        nonlocal program
        program = said
        monkeypatch.setenv("PLANEARLY_STUDY_SECONDS", str(seconds))
        monkeypatch.setattr(gpu.subprocess, "Popen", Begun)
        monkeypatch.setattr(gpu.subprocess, "run", lambda *what, **how: None)
        return gpu.study(True, None, tmp_path)

    run.begun = begun
    return run


def test_a_study_that_crashes_is_a_failure(study):
    with pytest.raises(RuntimeError, match=r"^no such key$"):
        study("import sys; print('loading'); sys.exit('no such key')")


def test_a_study_whose_time_is_over_is_none(study):
    assert study("import time; time.sleep(60)", 0.2)["cells"] == 0
    assert study.begun[0].returncode is not None


def test_a_study_does_not_go_on_behind_a_part_that_fails(gpu, study, monkeypatch):
    def full(out):
        raise OSError("the disk is full")

    monkeypatch.setattr(gpu, "pack", full)
    with pytest.raises(OSError, match="full"):
        study("import time; time.sleep(60)", 0.2)
    assert study.begun[0].returncode is not None


def test_what_is_being_written_is_not_packed(gpu, tmp_path, monkeypatch):
    rows = tmp_path / "study/rows"
    (rows / ".folder.here-1.tmp").mkdir(parents=True)
    for name in ("a.json", "gone.json", ".b.json.here-1.tmp", ".folder.here-1.tmp/c.json"):
        (rows / name).write_text("{}")
    (tmp_path / "study.txt").write_text("said")
    add = tarfile.TarFile.add

    def late(self, path, *rest, **how):
        if Path(path).name == "gone.json":
            (rows / "gone.json").unlink()
        return add(self, path, *rest, **how)

    monkeypatch.setattr(tarfile.TarFile, "add", late)
    gpu.pack(tmp_path)
    with tarfile.open(tmp_path / "study.tgz") as packed:
        assert packed.getnames() == ["study.txt", "study/rows/a.json"]
