"""What a process tells, and what it tells for others."""

import io
import sys

from rich.console import Console

from planearly import progress
from planearly.plan import show
from planearly.stages import pipeline
from small_work import until


def test_what_others_write_is_told_here_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_LOOK", 0.01)
    said = io.StringIO()  # a thread writes to it: pytest's own would lose what comes while it reads
    monkeypatch.setattr(sys, "stderr", said)
    log = tmp_path / "1.log"
    with progress.told_in(log):
        progress.say("before")
        assert not said.getvalue()
    with progress.relayed(tmp_path):
        with open(log, "a") as handle:
            handle.write("one\nhal")
        until(lambda: "one\n" in said.getvalue())
        first = said.getvalue()
        assert first == "before\none\n"
        with progress.told_in(log):
            progress.say("f [of] it")
        (tmp_path / "2.log").write_text("another\n")
        progress.say("own")
    rest = said.getvalue()[len(first):].splitlines()
    assert sorted(rest) == ["another", "half [of] it", "own"]
    assert (tmp_path / "2.log").read_text() == "another\n"


def test_tables_show_names_as_they_are(capsys):
    name, cost = "[bold]", {"tokens": 1, "flops": 1.0, "device_hours": 1.0, "money": None}
    pipeline.show({"comparisons": [], "rows": [{
        "domain": name, "method": "slm", "ppl_before": None, "ppl_after": 2.0,
        "ppl_after_ci": [1.0, 3.0], "bpb_after": 1.0, "inference_params": 9, "cost": cost}]})
    assert name in capsys.readouterr().out
    show.predicted({"params": {}, "stages": [{"stage": f"specialize/slm.{name}", **cost}],
                    "total": cost, "slices": "", "corpora": [], "device": "a CPU"}, Console())
    assert name in capsys.readouterr().out
