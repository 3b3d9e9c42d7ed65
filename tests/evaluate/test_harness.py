"""lm-evaluation-harness on a domain, as docs/evaluation.md says, gives our bits per byte."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from planearly.evaluate.files import evaluate_files
from small_models import TEXT, model_folder
from small_outside import outside_folder

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
pytestmark = [
    pytest.mark.lm_eval, pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None,
                       reason="needs the extra lm-eval: make lm-eval"),
    pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")]


@pytest.mark.parametrize("family", [None, "gemma3"])
def test_bits_per_byte_are_those_of_evaluate(family: str | None, tmp_path: Path) -> None:
    model = (outside_folder(tmp_path / "m", family, max_position_embeddings=256) if family
             else model_folder(tmp_path, context=256))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in (
        *TEXT, " ".join(TEXT), "naïve café, 中文 🙂\n\n  x = 1")))
    page = PAGE.read_text("utf-8").partition("## In the lm-evaluation-harness")[2]
    for language, name in (("yaml", "domain.yaml"), ("python", "domain.py")):
        (tmp_path / name).write_text(re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)[1])
    command = re.search(r"^    lm_eval (.*)\\\n(.*)$", page, re.MULTILINE)
    words = shlex.split((command[1] + command[2]).replace("MODEL", str(model)))
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--output_path", str(tmp_path / "out.json")],
        check=True, cwd=tmp_path, capture_output=True, timeout=600,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"})
    (found,) = tmp_path.glob("out*.json")
    theirs = json.loads(found.read_text())["results"]["domain"]["bits_per_byte,none"]
    ours = evaluate_files(model, [str(tmp_path / "test.jsonl")], 256)["bits_per_byte"]
    assert theirs == pytest.approx(ours, abs=0.005)
