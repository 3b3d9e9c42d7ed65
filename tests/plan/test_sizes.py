"""Slices of a projected network's bank: the rule, what it rests on, and where it is used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import config
from planearly.cost import devices
from planearly.errors import UserError
from planearly.model import flops
from planearly.plan import page, sizes
from planearly.plan.inputs import PlanInput
from planearly.plan.predict import predict
from planearly.plan.recommend import Plan, recommend
from planearly.stages import noted, pipeline
from planearly.stages.folder import Run
from planearly.study import grid
from small_runs import recipe as small

NANO = Path(__file__).parents[2] / "docs/results/nano/study.json"
M, B = 10**6, 10**9
OPEN = {"experts": 3, "rank": None, "embedding": 3}


@pytest.mark.parametrize(("experts", "each", "count"), [
    (16, "5.5", 4), (64, "41", 4), (32, "0.1", 4), (16, "94", 4), (16, "96", 12),
    (32, "220", 23), (64, "1,323", 46), (30, "500", 23), (4, "500", 12), (200, "500", 46)])
def test_few_slices_where_they_were_measured_and_the_paper_s_where_it_trained(
        experts: int, each: str, count: int) -> None:
    tokens = float(each.replace(",", ""))
    found, why = sizes.slices(experts, tokens)
    assert found == count and why.startswith(f"{count} slices at {each} tokens per parameter")
    assert ("nothing nearer" in why) == (count == 4 and not 5.5 <= tokens <= 41.2)
    assert count != 4 or "from 5.5 to 41.2 they were ahead of 12" in why
    papers = {12: 16, 23: 32, 46: 64}  # its Table of slices, by the experts that it trained
    assert count == 4 or f"the paper's for {papers[count]} experts, which it trained at 220 " in why


def test_the_study_says_what_the_rule_says_of_it() -> None:
    """Four slices ahead of twelve at every budget and rule that has both; nothing beyond them."""
    losses: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in json.loads(NANO.read_text())["rows"]:
        of = row["settings"]
        if row["method"] == "slm-pn" and of["projected.experts"] == 16 and not of["seed"] and (
                of["projected.deviation"] == 0.5 and not of["projected.tune_vector"]):
            at = (row["pretrain_tokens"] / row["inference_params"], of["expert"],
                  of["spec_tokens"], of["projected.rank"])
            losses.setdefault(at, {})[row["domain"]] = math.log(row["ppl_after"])
    lead = {}
    for (*at, rank), few in losses.items():
        many = losses.get((*at, 12))
        if rank == 4 and many:
            lead[tuple(at)] = sum(many[name] - few[name] for name in few) / len(few)
    assert len(lead) == 6 and all(0.025 < ahead < 0.06 for ahead in lead.values()), lead
    low, high = (pick(at[0] for at in lead) for pick in (min, max))
    assert (round(low, 1), round(high, 1)) == sizes.MEASURED


def test_bits_of_a_weight_are_those_of_the_format_s_blocks() -> None:
    import gguf

    for kind, name in {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "Q8_0": "q8_0",
                       "Q6_K": "q6_k", "Q4_0": "q4_0"}.items():
        weights, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert sizes.bits(name) == 8 * n_bytes / weights
    # mixtures: most of their matrices at 4 (5) bits, and some of them at 6
    for name, most in (("q4_k_m", 144), ("q5_k_m", 176)):
        assert 8 * most / 256 < sizes.bits(name) < sizes.bits("q6_k")


@examples(100)
@given(st.integers(900_000, 20 * B))
def test_shapes_keep_to_the_limit_and_use_most_of_it(limit: int) -> None:
    shape = sizes.shape_for(limit)
    assert flops.parameters(shape) <= limit
    assert shape.d_model % shape.heads == 0 and shape.d_model // shape.heads in (32, 64, 128)
    assert limit < 30 * M or flops.parameters(shape) > 0.6 * limit


def test_a_limit_in_bytes_or_in_speed() -> None:
    assert sizes.limit_from_bytes(252 * M, "bf16") == 126 * M
    assert sizes.limit_from_bytes(150 * M, "q8_0") == pytest.approx(141 * M, rel=0.01)
    l4 = devices.find("l4")
    fast, slow = (sizes.limit_from_speed(v, l4, "bf16") for v in (1000, 100))
    assert slow == pytest.approx(10 * fast, rel=1e-6)
    assert fast * 2 * 1000 == pytest.approx(0.6 * 300e9, rel=1e-6)
    for impossible in (0.0, -20.0):
        with pytest.raises(UserError, match="--inference-speed: give a positive number"):
            sizes.limit_from_speed(impossible, l4, "bf16")


def planned(**changes: Any) -> Plan:
    return recommend(PlanInput(**{
        "device": devices.find("a100"), "limit": 126 * M, "generic_tokens": 150 * B, **changes}))


@pytest.mark.parametrize(("tokens", "experts", "count"), [(150 * B, 32, 23), (5 * B, 16, 4)])
def test_a_plan_s_network_follows_its_tokens_and_says_why(
        tokens: int, experts: int, count: int, tmp_path: Path) -> None:
    made = planned(generic_tokens=tokens)
    network = made.setting.projected
    assert (network.experts, network.rank) == (experts, count)
    (note,) = [note for note in made.notes if note.startswith("slm-pn has")]
    assert f"{experts} experts and {count} slices at" in note
    assert note in str(page.section(made)) or note.replace("'", "&#39;") in str(page.section(made))
    found = page.content(made, [], [])["recipes"]["slm-pn"]
    assert f"rank: {count}\n" in found and f"experts: {experts}\n" in found


def test_a_budget_of_few_hours_takes_few_slices() -> None:
    assert planned(generic_hours=20).setting.projected.rank == 4
    assert planned(generic_hours=650).setting.projected.rank == 23


def test_a_recipe_that_leaves_them_open_is_settled_by_its_own_tokens() -> None:
    given = config.load("nano-pn", ["domains=[a]", "spec_tokens=100k"])
    assert sizes.settled(given) == given
    left = config.variant(given, {"projected.rank": None})
    assert sizes.settled(left).projected.rank == 4
    many = config.variant(left, {"pretrain_tokens": 500 * M})
    assert sizes.settled(many).projected.rank == 12
    a100 = devices.find("a100")
    of_four = predict(config.variant(given, {"projected.rank": 4}), a100)
    assert of_four["slices"] == ""
    found = predict(left, a100)
    assert found["slices"].startswith("4 slices at 17.") and {**found, "slices": ""} == of_four
    assert predict(config.variant(left, {"methods": ["slm"]}), a100)["slices"] == ""


@pytest.mark.parametrize(("tokens", "blends", "step"), [
    (1000, 0, 2048), (4 * M, 0, 2048), (12_500_000, 0, 4096), (40 * M, 0, 16_384),
    (10**12, 0, 262_144), (4 * M, 16, 16 * 256)])
def test_a_step_that_a_recipe_leaves_open_is_one_of_some_2000(tokens: int, blends: int,
                                                              step: int) -> None:
    recipe = config.load("best", [f"pretrain_tokens={tokens}", f"projected.blends={blends}"])
    assert recipe.pretrain.batch_tokens is None
    assert sizes.settled(recipe).pretrain.step_tokens == step
    long = config.variant(recipe, {"context": 4096})  # a row, and one of each blend
    assert sizes.settled(long).pretrain.step_tokens == max(step, 4096, blends * 4096)
    fixed = config.variant(recipe, {"pretrain.batch_tokens": 512})
    assert sizes.settled(fixed).pretrain.step_tokens == 512


def test_a_run_of_open_sizes_is_that_of_the_numbers(made: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    asked = small(made, methods=["slm-pn"], projected=OPEN, pretrain={"compile": "no"})
    pipeline.run(asked, tmp_path, "pretrain")
    assert "projected network: 4 slices at" in capsys.readouterr().err
    assert "rank: 4" in (tmp_path / "recipe.yaml").read_text()
    numbered = small(made, methods=["slm-pn"], projected={**OPEN, "rank": 4},
                     pretrain={"compile": "no", "batch_tokens": 2048})
    run = Run(tmp_path, asked)
    assert run.recipe == numbered
    pipeline.run(numbered, tmp_path, "pretrain")
    assert len(list(tmp_path.glob("pretrain/*"))) == 1


def test_cells_of_a_study_are_settled_each_by_its_budget(made: Path, tmp_path: Path) -> None:
    """By the recipe that its folder notes too, from which workers and the doctor go."""
    study = {"grid": [{"methods": ["slm-pn"], "over": {"pretrain_tokens": [20_000, 20 * M]}}]}
    given = small(made, methods=["slm-pn"], projected=OPEN, study=study)
    with Run(tmp_path, given).opened():
        again = noted.recipe_of(tmp_path)
    for recipe in (given, again):
        found = [cell.variant.recipe for cell in grid.cells(recipe, ["law"])]
        assert [of.projected.rank for of in found if of] == [4, 12]
