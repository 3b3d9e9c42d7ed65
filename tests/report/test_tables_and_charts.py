"""Tables, their figures, and the study's page: all it is given, escaped, in one file."""

import math
import re

import numpy as np
import pytest

from html_outline import Outline
from planearly.keys import Recipe
from planearly.report import chart
from planearly.report.table import Axis, Column, Figure, Table
from planearly.study import view
from planearly.study.verdict import Claim

EVIL = '<script>alert("x")</script> & $\\frac{$'
DOMAINS = ["freelaw", "wikipedia"]
LINES = Figure("lines", Axis("tokens", "pretraining tokens", True),
               Axis("ppl", "perplexity", True), "method", "ci")
BARS = Figure("bars", Axis("domain", "domain"), Axis("ppl", "perplexity"), "method", "ci")


def row(method: str, domain: str, after: float, seed: int = 0, **settings) -> dict:
    cost = {"tokens": 2e6, "flops": 1e13, "device_hours": 0.5, "device": "2 cores", "money": None}
    return {
        "method": method, "domain": domain, "seed": seed, "spec_tokens": 50_000,
        "pretrain_tokens": 8_000_000, "inference_params": 700_000, "ppl_before": after * 2,
        "ppl_after": after, "test_tokens": 20_000, "tokens": [100, 200],
        "nll_after": [100 * math.log(after), 200 * math.log(after)],
        "settings": {"seed": seed, "pretrain_tokens": 8_000_000, "importance.k": None, **settings},
        "cost": cost, "generic_cost": {**cost, "tokens": 1e6 + after * (method == "slm-is")},
        "specialization_cost": {**cost, "tokens": 1e6 + after},
    }


def study(domains: list[str] = DOMAINS) -> dict:
    recipe = {**Recipe().to_dict(), "name": "nano", "pretrain_tokens": 8_000_000, "seed": 0}
    rows = [row(method, domain, after + i) for i, domain in enumerate(domains)
            for method, after in (("slm", 30.0), ("slm-is", 20.0), ("llm", 25.0))]
    return {"name": "nano", "recipe": recipe, "device": "2 cores", "seconds": 10.0,
            "domains": domains,
            "rows": [*rows, row("slm", domains[0], 28.0, 1),
                     row("slm-is", domains[0], 19.0, **{"importance.k": 64})],
            "skipped": [{"method": "slm-mix", "domain": domains[0], "reason": "no expert",
                         "settings": {"seed": 0, "importance.k": 7}}],
            "pending": [{"method": "slm-pn", "domain": domains[0], "settings": {"seed": 0}}]}


def table(name: str, figure: Figure | None = None, domains: list[str] = DOMAINS,
          methods=("slm", "slm-is"), budgets=(1e6, 4e6)) -> Table:
    columns = [Column("domain", "Domain", "text"), Column("method", "Method", "text"),
               Column("ppl", "Perplexity", "perplexity"), Column("ci", "95%", "interval"),
               Column("share", "Share", "percent"), Column("tokens", "Tokens", "tokens"),
               Column("flops", "FLOPs", "flops"), Column("hours", "Time", "hours"),
               Column("nats", "Nats", "nats"), Column("experts", "Experts", "number")]
    rows = [{"domain": domain, "method": method, "tokens": tokens,
             "ppl": (ppl := 20.0 + 5 * i + j - 2 * math.log10(tokens)), "ci": [ppl - 1, ppl + 1],
             "share": 0.25, "flops": 3e15, "hours": 0.5, "nats": -0.0625, "experts": 1024}
            for i, domain in enumerate(domains) for j, method in enumerate(methods)
            for tokens in budgets]
    return Table(name, f"Title of {name}", "Table 4", f"Note of {name}", columns, rows, figure)


CLAIMS = [Claim("Fine-tuning is essential", "reproduced", "12.0 against 30.0.", "table-04"),
          Claim("No pretraining is far worse", "not reproduced", "It was not.", "absent"),
          Claim("C(N) crosses over", "cannot be judged", "Rows are missing.", "")]


def written(tmp_path, made, tables, claims) -> str:
    out = view.write(made, view.of(made, tables, claims), tmp_path)
    assert out == tmp_path / "index.html"
    return out.read_text("utf-8")


def test_the_page_shows_all_it_is_given(tmp_path):
    html = written(tmp_path, study(), [table("table-04", BARS), table("figure-03", LINES),
                                       table("table-09")], CLAIMS)
    outline = Outline(html)
    assert not outline.open, "an element is not closed"
    assert re.findall("<h2>(.*?)</h2>", html) == [
        "What was compared", "The claims", "Figures and tables",
        "Cells that are not there", "Recipe"]
    said = " ".join(re.sub("<[^>]*>", " ", html).split())
    for text in (
            "3 claims, 1 came out as they say, 1 did not, and 1 cannot be judged.",
            "(lower is better): SLM-is 20.5, SLM 30.5; of the large model: LLM 25.5.",
            "1 of its 10 cells are not made yet", "Seeds 2 (0, 1)", "importance.k none 64",
            "? cannot be judged C(N) crosses over Rows are missing.",
            "✗ not reproduced No pretraining is far worse It was not. No cell of this study shows "
            "why.",
            "freelaw SLM 8.00 [7.00, 9.00] 25.0% 1M 3P 30 min 00 s -0.062 1,024",
            "SLM-mix freelaw importance.k = 7 no expert", "SLM-pn freelaw main not made yet"):
        assert text in said, text
    assert outline.count("svg") == 2
    files = {f"{stem}.{kind}" for stem in ("table-04", "figure-03") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == files
    links = [value for _, attributes in outline.tags for name, value in attributes.items()
             if name == "href" and value and value.startswith("#table")]
    assert links == ["#table-04", "#table-04", "#table-09"]  # no link to a table that is not there


def test_the_page_fetches_nothing_and_its_ids_do_not_collide(tmp_path):
    html = written(tmp_path, study(), [table("a", LINES), table("b", BARS)], CLAIMS)
    for tag, attributes in Outline(html).tags:
        assert tag not in ("link", "img", "iframe"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert tag != "script" and value is not None and value.startswith("#")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", html))
    clips = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(clips) == len(set(clips)) == 2


def test_text_of_others_is_escaped(tmp_path):
    evil = study([EVIL])
    evil |= {"name": EVIL, "device": EVIL}
    for one in evil["rows"]:
        one["method"] = one["cost"]["device"] = one["settings"]["importance.k"] = EVIL
    evil["skipped"][0] |= {"reason": EVIL, "method": EVIL, "settings": {EVIL: EVIL}}
    evil["recipe"]["name"] = EVIL
    hostile = [Table(f"t{i}", EVIL, EVIL, EVIL, [Column("domain", EVIL, "text")],
                     table("x", domains=[EVIL], methods=[EVIL]).rows, figure)
               for i, figure in enumerate((LINES, BARS))]
    html = written(tmp_path, evil, hostile, [Claim(EVIL, "reproduced", EVIL, EVIL)])
    outline = Outline(html)
    assert outline.count("script") == 1  # the one that sorts
    assert outline.text.count(EVIL) > 20
    for file in (tmp_path / "figures").glob("*.svg"):
        assert Outline(file.read_text("utf-8")).count("script") == 0


@pytest.mark.parametrize("missing", ["rows", "skipped", "pending", "recipe", "device"])
def test_a_partial_study_is_shown_as_far_as_it_goes(tmp_path, missing):
    partial = study()
    del partial[missing]
    html = written(tmp_path, partial, [table("t")], [])
    assert not Outline(html).open and "<h2>Figures and tables</h2>" in html
    assert ("not finished" in html) == (missing != "pending")
    assert ("What was compared" in html) == (missing != "rows")


def test_nothing_finished_is_a_page_too(tmp_path):
    html = written(tmp_path, {"name": "nano", "rows": [], "skipped": [], "pending": []}, [], [])
    assert "<h1>nano</h1>" in html and "<h2>" not in html


def test_missing_values_are_a_dash_and_sort_last():
    one = table("t")
    one.rows[:] = [{"domain": "d", "ppl": 5.0, "ci": [4.0, 6.0], "share": math.nan}]
    values, = one.cells()
    assert [cell.text for cell in values[:5]] == ["d", "–", "5.00", "[4.00, 6.00]", "–"]
    assert [cell.sort for cell in values[:5]] == ["d", None, 5.0, 4.0, None]


def test_an_interval_is_written_in_the_unit_before_it():
    columns = [Column("share", "Share", "percent"), Column("ci", "95%", "interval")]
    one = Table("t", "t", "", "", columns, [{"share": 0.1, "ci": [0.05, 0.15]}])
    assert one.cells()[0][1].text == "[5.0%, 15.0%]"


def test_the_cost_of_a_shared_training_is_counted_once():
    made = study()
    made["rows"] = [row("slm", "a", 30.0), row("slm", "b", 31.0), row("slm-is", "a", 20.0)]
    total = view.cost(made)
    assert total["tokens"] == (1e6 + 30) + (1e6 + 31) + (1e6 + 20) * 2 + 1e6
    assert total["device_hours"] == 2.5 and total["money"] is None
    assert view.cost({**made, "cost": {"tokens": 7}})["tokens"] == 7


def test_a_figure_draws_what_has_values_and_nothing_else():
    assert chart.draw(table("t")) is None
    for figure in (LINES, BARS):
        whole = table("t", figure)
        for one in whole.rows:
            one["ppl"] = None
        assert chart.draw(whole) is None
    mixed = table("t", LINES)
    mixed.rows[0]["ppl"], mixed.rows[1]["ci"], mixed.rows[2]["ppl"] = None, None, -1.0
    drawn = chart.draw(mixed)
    assert drawn is not None
    points = [line for line in drawn.axes.lines if line.get_marker() != "None"]
    assert sum(len(line.get_xdata()) for line in points) == len(mixed.rows) - 2
    bars = [line for line in drawn.axes.lines if line.get_marker() == "None"]
    assert len(bars) == len(mixed.rows) - 3
    assert drawn.axes.get_xscale() == drawn.axes.get_yscale() == "log"


def test_lines_run_along_x_and_methods_keep_their_look():
    shuffled = table("t", LINES, domains=["d"], methods=["slm-is", "slm"], budgets=(4e6, 1e6, 2e6))
    drawn = chart.draw(shuffled)
    assert drawn is not None
    first, *_, = (line for line in drawn.axes.lines if line.get_marker() != "None")
    assert np.all(np.diff(first.get_xdata()) > 0)
    alone = chart.draw(table("t", BARS, methods=["slm-is"]))
    assert alone is not None
    assert alone.axes.patches[0].get_facecolor()[:3] == pytest.approx(
        tuple(int(first.get_color()[i:i + 2], 16) / 255 for i in (1, 3, 5)))


def of_series(names: list[str], kind="lines", **further) -> Table:
    """A table of values at the same places for each series."""
    rows = [{"series": name, "x": x, "at": f"place {x}", "y": 40.0 + i + x / 100, "ci": None}
            | further for i, name in enumerate(names) for x in (16, 1024)]
    x = Axis("at", "place") if kind == "bars" else Axis("x", "clusters", True)
    return Table("t", "t", "", "", [], rows, Figure(
        kind, x, Axis("y", "perplexity", True), "series", "ci"))


@pytest.mark.parametrize("kind", ["lines", "bars"])
@pytest.mark.parametrize("names", [
    [f"{size} model, {what} per domain" for size in ("small", "large")
     for what in ("fine-tuning", "pretraining and fine-tuning")],
    [f"{i} {'many words ' * 9}" for i in range(5)], ["slm", "slm-pn, blend"]])
def test_a_legend_is_whole_and_leaves_the_axes_their_room(names, kind):
    drawn = chart.draw(of_series(names, kind))
    assert drawn is not None
    drawn.figure.draw_without_rendering()
    legend, = drawn.figure.legends
    box, whole = legend.get_window_extent(), drawn.figure.bbox
    assert box.x0 >= 0 and box.x1 <= whole.width and box.y1 <= whole.height
    assert box.y0 >= drawn.axes.get_window_extent().y1
    assert drawn.axes.bbox.width > 0.6 * whole.width and drawn.axes.bbox.height > 50
    texts = [" ".join(text.get_text().split()) for text in legend.get_texts()]
    assert len(set(texts)) == len(names)
    if names[0].startswith("small"):
        assert texts == names


def test_a_variant_has_its_method_s_colour_and_another_mark():
    drawn = chart.draw(of_series(["slm", "slm-pn", "slm-pn, blend", "llm"]))
    assert drawn is not None
    slm, plain, blend, llm = (line for line in drawn.axes.lines if line.get_marker() != "None")
    assert plain.get_color() == blend.get_color() and plain.get_marker() == blend.get_marker()
    assert plain.get_fillstyle() != blend.get_fillstyle()
    assert slm.get_color() == llm.get_color() and slm.get_linestyle() != llm.get_linestyle()


def test_ticks_are_counts_in_full_and_enough_of_them():
    drawn = chart.draw(of_series(["slm", "slm-is"]))
    assert drawn is not None
    drawn.figure.draw_without_rendering()
    assert [text.get_text() for text in drawn.axes.get_xticklabels()] == ["16", "1,024"]
    assert len({text.get_text() for text in drawn.axes.get_yticklabels()}) >= 3  # of 40 to 51


def test_lines_stand_apart_only_where_they_meet():
    def shifts(one: Table) -> set[float]:
        drawn = chart.draw(one)
        assert drawn is not None
        return {round(line.get_transform().transform((16, 40))[0]
                      - drawn.axes.transData.transform((16, 40))[0], 1)
                for line in drawn.axes.lines}

    names = [f"series {i}" for i in range(20)]
    met = of_series(names)
    found = shifts(met)
    assert len(found) == 20 and max(found) - min(found) < 25  # pixels of a figure 490 wide
    for row in met.rows:
        row["x"] *= 1.5 ** names.index(row["series"])
    assert shifts(Table("t", "t", "", "", [], met.rows[:6], met.figure)) == {0.0}


def test_panels_and_what_is_told_above_bars():
    one = of_series(["slm", "llm"], "bars")
    for row in one.rows:
        row |= {"panel": f"of {row['series']}", "told": f"{row['series']} {row['x']}"}
    figure = Figure("bars", Axis("at", "place"), Axis("y", "perplexity"), "series", "ci", "panel",
                    "told")
    drawn = chart.draw(Table("t", "t", "", "", [], one.rows, figure))
    assert drawn is not None
    assert [axes.get_title(loc="left") for axes in drawn.panels] == ["of slm", "of llm"]
    assert [[text.get_text() for text in axes.texts] for axes in drawn.panels] == [
        ["slm 16", "slm 1024"], ["llm 16", "llm 1024"]]
    drawn.figure.draw_without_rendering()
    for axes in drawn.panels:
        for text, bar in zip(axes.texts, axes.patches, strict=True):
            assert text.get_window_extent().y0 >= bar.get_window_extent().y1 - 1


def test_bars_of_a_group_that_lacks_some_stand_around_its_name():
    one = of_series(["slm", "slm-is", "llm"], "bars")
    del one.rows[0]  # of slm at the first place
    drawn = chart.draw(Table("t", "t", "", "", [], one.rows, Figure(
        "bars", Axis("at", "place"), Axis("y", "perplexity"), "series")))
    assert drawn is not None
    middles = sorted(bar.get_y() + bar.get_height() / 2 for bar in drawn.axes.patches)
    names = [text.get_text() for text in drawn.axes.get_yticklabels()]
    few, all_of_them = names.index("place 16"), names.index("place 1024")
    assert np.mean([y for y in middles if abs(y - few) < 0.5]) == pytest.approx(few)
    assert len([y for y in middles if abs(y - all_of_them) < 0.5]) == 3
