"""The page whose limits can be moved says what the planner says, in a browser too."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import planearly
from planearly.cost import devices
from planearly.plan import law, page, whatif
from planearly.plan.inputs import PlanInput
from planearly.plan.recommend import recommend

M, B = 10**6, 10**9
STOPS: dict[str, list[float | None]] = {
    "limit": [126 * M, None], "domains": [1.0, 50.0], "before": [100.0, 650.0],
    "each": [1.0, 130.0, None]}
BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def asked(**changes: Any) -> PlanInput:
    values: dict[str, Any] = {
        "device": devices.from_sheet(devices.SHEETS[0]), "limit": 126 * M,
        "generic_tokens": 150 * B, "spec_tokens": M, "generic_hours": 650.0,
        "specialization_hours": 1.0, "domains": 50}
    return PlanInput(**{**values, **changes})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whatif, "stops", lambda given: STOPS)


def line() -> law.Law:
    """Of models of 122M parameters; without noise."""
    rows = [{"method": method, "domain": "law", "inference_params": 121_641_984, "spec_tokens": M,
             "pretrain_tokens": tokens, "generic_cost": {"tokens": share * tokens},
             "ppl_after": 8 + (tokens / B) ** -0.4 + 4 * share**4}
            for tokens in (B, 8 * B, 64 * B)
            for method, share in (("slm", 1.0), ("slm-adapt", 0.7), ("slm-is", 0.0))]
    return law.fit_line(rows, refits=2)


def test_the_table_holds_what_the_planner_says(few: None) -> None:
    given = asked(laws={law.LINE: line()})
    found = whatif.table(given)
    assert [slider["start"] for slider in found["sliders"]] == [0, 1, 1, 0]
    for entry, values in zip(found["plans"], product(*STOPS.values()), strict=True):
        plan = recommend(whatif.at(given, dict(zip(STOPS, values, strict=True))))
        chosen, reason, split, rows, _ = entry
        assert found["methods"][chosen] == plan.recommended
        assert found["texts"][reason] == plan.reason
        assert (split is None) == (plan.split is None)
        if split and plan.split:
            assert split[:3] == [plan.split.to_dict()[key] for key in (
                "adapt_share", "generic_tokens", "adapted_tokens")]
        for row, (can, why, before, each, perplexity) in zip(
                plan.rows, found["rows"][rows], strict=True):
            assert (row.feasible, row.why) == (can, found["texts"][why])
            total = before + plan.given.total_domains * each
            assert total == pytest.approx(row.total.device_hours)
            assert perplexity == (row.perplexity and row.perplexity["perplexity"])
    assert {entry[0] for entry in found["plans"]} != {found["plans"][0][0]}
    assert [name for name, _ in found["frontiers"][found["plans"][0][4]]] == sorted(law.line())


def test_the_frontier_at_every_stop_is_the_command_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets choose a network's slices, and from 771M parameters up the models' sizes."""
    steps: dict[str, list[float | None]] = {
        "limit": [126 * M, 4 * B], "domains": [1.0, 7.0], "before": [4.0, 40.0, 40_000.0, None],
        "each": [0.1, 1.0, None]}
    monkeypatch.setattr(whatif, "stops", lambda given: steps)
    rows = [{"method": "slm-pn", "domain": "law", "inference_params": params, "spec_tokens": M,
             "pretrain_tokens": tokens, "settings": {},
             "ppl_after": 8 + 1e9 / params + (tokens / B) ** -0.4}
            for tokens in (B, 4 * B, 16 * B, 64 * B) for params in (M * 60, M * 121, M * 500)]
    given = asked(generic_hours=40.0, domains=7, generic_tokens=200 * B,
                  laws={"slm-pn": law.fit(rows, "slm-pn", refits=2)})
    found = whatif.table(given)
    seen = set()
    for entry, values in zip(found["plans"], product(*steps.values()), strict=True):
        plan = recommend(whatif.at(given, dict(zip(steps, values, strict=True))))
        drawn: dict[str, list[list[float]]] = {}
        for point in plan.frontier([plan.given.domains]):
            drawn.setdefault(point["method"], []).append(
                [round(point["hours"], 6), round(point["perplexity"], 3)])
        assert drawn and dict(found["frontiers"][entry[4]]) == drawn
        seen.add((entry[4], values[:2], plan.setting.projected.slices, plan.setting.small.d_model))
    for limit in range(2):  # the budgets do change them
        assert len({of[2 + limit] for of in seen if of[1][0] == steps["limit"][limit]}) > 1
    assert len(found["frontiers"]) == len({number for number, *_ in seen}) <= len(seen)


def test_the_stops_hold_what_was_asked() -> None:
    for given in (asked(), asked(limit=None, generic_hours=None, specialization_hours=None),
                  asked(limit=2 * M, generic_hours=0.0, domains=23)):
        found = whatif.stops(given)
        assert given.limit in found["limit"] and given.generic_hours in found["before"]
        assert given.specialization_hours in found["each"]
        assert float(given.total_domains) in found["domains"]
        for values in found.values():
            numbers = [value for value in values if value is not None]
            assert numbers == sorted(set(numbers)) and None not in values[:-1]


def written(tmp_path: Path, more: str = "") -> Path:
    place = tmp_path / "plan.html"
    page.write_page(place, recommend(asked()), limits=True)
    text = place.read_text("utf-8")
    place.write_text(text.replace("</body>", more + "</body>"), "utf-8")
    return place


def test_the_page_stands_alone_and_is_small(few: None, tmp_path: Path) -> None:
    text = written(tmp_path).read_text("utf-8")
    assert len(text) < 1_000_000
    assert not re.search(r"""(src|href)=["'](?!#)|@import|fetch\(|url\((?!#)""", text)
    packed = re.search(r'id="plans">([^<]*)<', text)
    assert packed is not None
    assert len(json.loads(gzip.decompress(base64.b64decode(packed[1])))["plans"]) == 24
    plain = tmp_path / "plain.html"
    page.write_page(plain, recommend(asked()))
    assert "whatif" not in plain.read_text("utf-8")


def shown(place: Path, fragment: str = "") -> dict[str, str]:
    """What the page shows in a browser, by the names of its parts."""
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000",
         f"--user-data-dir={place.parent / 'profile'}", "--dump-dom", place.as_uri() + fragment],
        capture_output=True, text=True, timeout=120)
    return {name: html.unescape(text) for name, text in re.findall(
        r'id="whatif-([a-z-]+)"[^>]*>([^<]*)</', done.stdout)}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_moved_sliders_change_the_recommendation_as_the_plan_does(
        few: None, tmp_path: Path) -> None:
    def told(**changes: Any) -> tuple[str, str]:
        found = planearly.plan(**{  # type: ignore[operator]
            "inference_params": "126M", "generic_tokens": "150B", "spec_tokens": "1M",
            "device": "a100", "generic_hours": 650, "specialization_hours": 1, "domains": 50,
            **changes})
        return found["recommended"], found["reason"]

    def said(found: dict[str, str]) -> tuple[str, str]:
        return found["recommended"], found["reason"]

    place = written(tmp_path)
    begins = shown(place)
    assert said(begins) == told() and (begins["domains-is"], begins["each-is"]) == ("50", "1 h")
    moved = {"#domains=1&each=130": {"domains": 1, "specialization_hours": 130},
             "#limit=none": {"inference_params": None}}
    for fragment, changes in moved.items():
        found = said(shown(place, fragment))
        assert found == told(**changes) != told()
    # by hand: the slider itself is moved, after the page has opened
    place = written(tmp_path, """<script>setTimeout(() => {
      for (const [key, value] of [["domains", 0], ["each", 1]]) {
        const input = document.getElementById("whatif-" + key);
        input.value = value;
        input.dispatchEvent(new Event("input"));
      }
    }, 3000);</script>""")
    assert said(shown(place)) == told(domains=1, specialization_hours=130)
