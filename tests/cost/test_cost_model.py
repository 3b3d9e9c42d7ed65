"""The cost model against the paper's Tables 2 and 3, and its own algebra."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares

from examples import examples
from planearly import keys, methods, parallel
from planearly.cost import devices, model
from planearly.errors import UserError
from planearly.model import flops, lora, memory
from planearly.model.projected import Projected
from planearly.model.transformer import Shape, Transformer
from planearly.train import arithmetic
from planearly.train.trainable import Dense

SMALL = Shape(layers=7, d_model=1024, heads=8, d_ff=4096, vocab_size=32_768, context=1024,
              ffn="gelu")
LARGE = Shape(layers=7, d_model=2816, heads=22, d_ff=11264, vocab_size=32_768, context=1024,
              ffn="gelu")


@pytest.fixture(autouse=True)
def nothing_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path))


def setting(spec_tokens: int = 1_000_000, **changes: object) -> model.Setting:
    values = {"small": SMALL, "large": LARGE, "device": devices.find("a100"),
              "projected": keys.Projected(experts=32, rank=23), "spec_tokens": spec_tokens,
              "batch_tokens": model.BATCH_TOKENS}
    return model.Setting(**{**values, **changes})  # type: ignore[arg-type]


# The paper's Table 2: GPU-hours per 1B tokens -----------------------------------------------------

FIT = 0.10
"""Largest error of one curve over the width through Table 2's four rates, which it is fitted to;
what is reckoned from these rates inherits it. The paper's rounding is less: 2% of 2.2, 1% of 0.61.
"""


@pytest.mark.parametrize(("method", "hours"), [("slm", 2.2), ("slm-mix", 2.2), ("llm", 7.7)])
def test_table_2_training(method: str, hours: float) -> None:
    ours = model.pretraining(setting(), method, 1e9).device_hours
    assert ours == pytest.approx(hours, rel=FIT)


@pytest.mark.parametrize(("shape", "hours"), [(SMALL, 0.61), (LARGE, 2.54)])
def test_table_2_inference(shape: Shape, hours: float) -> None:
    a100 = devices.find("a100")
    ours = a100.seconds(flops.forward(shape) * 1e9, shape.d_model) / 3600
    assert ours == pytest.approx(hours, rel=FIT)


def test_table_2_projected_network_is_cheaper_than_the_papers() -> None:
    """The paper pays 3.6 hours, 64% over the plain model; the deferred projection a few percent."""
    ours = model.pretraining(setting(preset="paper"), "slm-pn", 1.0).device_hours
    plain = model.pretraining(setting(preset="paper"), "slm", 1.0).device_hours
    assert 1.0 < ours / plain < 1.08
    assert plain * 1.64 * 1e9 == pytest.approx(3.6, rel=FIT)


@pytest.mark.parametrize(("preset", "rank", "measured"), [
    ("adamw", 12, (1.079, 1.130)), ("adamw", 46, (1.159, 1.171)),
    ("modern", 12, (1.142, 1.185)), ("modern", 46, (1.524, 1.524))])
def test_what_projecting_adds_is_about_what_it_added_on_an_h200(
    preset: str, rank: int, measured: tuple[float, float],
) -> None:
    """docs/benchmarks.md, 16 experts, 262,144 tokens a step: within a fifth of what was measured
    in two or three sittings, which differ by more among themselves."""
    at = setting(device=devices.find("h200"), preset=preset,
                 projected=keys.Projected(experts=16, rank=rank, embedding=16))
    added = model.pretraining(at, "slm-pn", 1.0).device_hours \
        / model.pretraining(at, "slm", 1.0).device_hours - 1
    assert 0.8 * (measured[0] - 1) < added < 1.2 * (measured[1] - 1)


PROJECTED = keys.Projected(experts=16, rank=12, embedding=16)
WEIGHTS = 14 * 1024 * 4096
"""Numbers of the two projected matrices of seven layers."""


@pytest.mark.parametrize(("memory", "banks"), [(141e9, 8), (15e9, 1)])
def test_devices_project_each_for_itself_and_divide_a_bank_that_one_does_not_hold(
        memory: float, banks: int) -> None:
    """By hand: 13 passes over 12 slices and 10 over 16 dense models, 4 bytes a number, at half of
    4.8 TB/s."""
    card = replace(devices.find("h200"), memory=memory)
    how = model.Projecting(SMALL, PROJECTED, "adamw", 8)
    alone = model.projection_seconds(card, replace(how, devices=1))
    assert alone == pytest.approx(4 * WEIGHTS * (13 * 12 + 10 * 16) / 2.4e12)
    assert model.projection_seconds(card, how) == pytest.approx(
        4 * WEIGHTS * (13 * 12 * banks + 10 * 16 * 8) / 2.4e12)
    # Muon's products of the eleven slices more than a plain model's are dealt out
    muon = model.projection_seconds(card, replace(how, preset="modern"))
    per_number = 5 * (4 * 1024 + 2 * 1024 * 1024 / 4096)
    assert muon - model.projection_seconds(card, how) == pytest.approx(
        card.seconds(11 * WEIGHTS * per_number, 1024))
    tokens = setting(device=card, devices=8, preset="adamw", projected=PROJECTED)
    added = model.pretraining(tokens, "slm-pn", 1.0).device_hours \
        - model.pretraining(tokens, "slm", 1.0).device_hours
    assert added * 3600 * 262_144 == pytest.approx(model.projection_seconds(card, how))


def test_the_utilisation_is_the_fit_it_says_it_is() -> None:
    widths = np.array([1024, 2816, 1024, 2816])
    count = np.array([flops.training(SMALL), flops.training(LARGE),
                      flops.forward(SMALL), flops.forward(LARGE)], dtype=float)
    paper = np.array([2.2, 7.7, 0.61, 2.54])

    def errors(p: np.ndarray) -> np.ndarray:
        return np.log(count * 1e9 / 312e12 * (p[0] + p[1] / widths) / 3600 / paper)

    fit = least_squares(errors, [1.0, 1000.0])
    assert fit.x == pytest.approx([devices.PAPER_A, devices.PAPER_B], rel=1e-3)
    assert abs(np.expm1(fit.fun)).max() < FIT


def test_the_utilisation_of_hopper_is_the_fit_it_says_it_is() -> None:
    widths, rates = np.array(devices.HOPPER_STEPS).T

    def errors(p: np.ndarray) -> np.ndarray:
        return (p[0] + p[1] / widths) / (989e12 / rates) - 1

    fit = least_squares(errors, [1.0, 1000.0])
    assert fit.x == pytest.approx([devices.HOPPER_A, devices.HOPPER_B], rel=1e-3)
    assert abs(fit.fun).max() < 0.13


@pytest.mark.parametrize(("shape", "batch", "tokens_per_second"), [
    (SMALL, 262_144, 629_482), (LARGE, 262_144, 117_497),
    # so small that a step takes as long as launching it does
    (Shape(layers=2, d_model=48, heads=2, d_ff=128, vocab_size=1024, context=128), 8192, 958_024)])
def test_speeds_on_an_h200_are_those_measured(shape: Shape, batch: int,
                                              tokens_per_second: float) -> None:
    given = replace(setting(), device=devices.find("h200"), small=shape, batch_tokens=batch)
    hours = model.pretraining(given, "slm", 1.0).device_hours
    assert 1 / (3600 * hours) == pytest.approx(tokens_per_second, rel=0.15)


# Table 3: upper limits of training cost -----------------------------------------------------------

PRETRAIN_TOKENS = {"llm": 650 / 7.7e-9, "slm": 530 / 2.2e-9, "slm-mix": 650 / 2.2e-9,
                   "slm-is": 130 / 2.2e-9}
"""Tokens that Table 3's hours buy at Table 2's rates; the paper does not print them."""


@pytest.mark.parametrize(("method", "generic", "specialization"), [
    ("llm", 650, (0.12, 0.5, 3.5)),
    ("slm", 530, (0.02, 0.07, 0.5)),
    ("slm-is", 0, (130, 130, 130)),
    ("slm-mix", 650, (0.02, 0.07, 0.5)),
])
def test_table_3(method: str, generic: float, specialization: tuple[float, ...]) -> None:
    for spec_tokens, hours in zip((10**6, 8 * 10**6, 64 * 10**6), specialization, strict=True):
        ours = model.cost(setting(spec_tokens), method, PRETRAIN_TOKENS[method])
        assert ours.generic.device_hours == pytest.approx(generic, rel=FIT)
        # the paper prints two decimals, so 0.02 means 0.015 to 0.025
        assert ours.specialization.device_hours == pytest.approx(hours, rel=FIT, abs=0.005)


def test_table_3_projected_network() -> None:
    """650 hours at the paper's rate are 181B tokens; ours trains them in 1.6 times fewer hours."""
    ours = model.cost(setting(preset="paper"), "slm-pn", 650 / 3.6e-9)
    assert ours.generic.device_hours * 3.6 / 2.2 == pytest.approx(650, rel=FIT)
    assert ours.specialization.device_hours == pytest.approx(0.02, abs=0.005)


@pytest.mark.parametrize(("spec_tokens", "hours"), [(10**6, 0.7), (8 * 10**6, 2.8),
                                                    (64 * 10**6, 21)])
def test_table_3_distillation(spec_tokens: int, hours: float) -> None:
    """Its 1,850 hours are the teacher's 650 and the student's tokens with the teacher beside it:
    ours begins as the plain small model, and is taught on the domain alone."""
    paper = setting(spec_tokens)
    own = model.distilled(paper, PRETRAIN_TOKENS["slm"]).device_hours
    teacher = model.cost(paper, "llm", PRETRAIN_TOKENS["llm"]).generic.device_hours
    assert teacher + own == pytest.approx(1850, rel=FIT)
    # 15 times the plain student's tokens, a number chosen to fit these three
    tuned = model.cost(paper, "slm-d", PRETRAIN_TOKENS["slm"]).specialization.device_hours
    assert tuned == pytest.approx(hours, rel=0.025)


def test_a_teacher_from_outside_is_not_paid_for() -> None:
    ours, theirs = (model.cost(setting(teacher_exists=exists), "slm-d", 1e9)
                    for exists in (False, True))
    pretraining = model.cost(setting(), "llm", 1e9).generic.device_hours
    assert ours.generic.device_hours - theirs.generic.device_hours == pytest.approx(pretraining)
    tuning = model.finetuning(setting(), "llm").device_hours
    assert ours.specialization.device_hours - theirs.specialization.device_hours \
        == pytest.approx(tuning)


@pytest.mark.parametrize(("rule", "times"),
                         [("best-tuned", 32), ("blend", 0), ("most-frequent", 0)])
def test_choosing_an_expert_costs_what_its_rule_does(rule: str, times: int) -> None:
    found = model.expert_choice(setting(expert=rule), "slm-pn", 5e6)
    assert found.device_hours == pytest.approx(
        times * model.finetuning(setting(), "slm", 5e6).device_hours)
    assert found.tokens == times * 5e6


# Algebra ------------------------------------------------------------------------------------------

@examples(100)
@given(a=st.tuples(st.integers(0, 10_000), st.integers(0, 1_000)),
       b=st.tuples(st.integers(0, 10_000), st.integers(0, 1_000)))
def test_break_even_is_where_the_totals_meet(a: tuple[int, int], b: tuple[int, int]) -> None:
    one, other = (model.MethodCost("m", model.Work(device_hours=g), model.Work(device_hours=s),
                                  1, 1, 1.0, 1) for g, s in (a, b))
    meeting = model.break_even(one, other)
    assert (meeting is None) == ((a[0] - b[0]) * (a[1] - b[1]) >= 0)
    if meeting is not None:
        totals = [g + meeting * s for g, s in (a, b)]
        assert totals[0] == pytest.approx(totals[1], rel=1e-9)


@pytest.mark.parametrize("a, b, expected", [
    ((0, 10), (80, 2), 10.0), ((0, 1), (80, 2), None), ((0, 2), (80, 2), None)])
def test_crossing(a: tuple[float, float], b: tuple[float, float], expected: float | None) -> None:
    assert model.crossing(*a, *b) == expected


def test_the_papers_break_even_is_at_about_five_domains() -> None:
    importance = model.cost(setting(), "slm-is", PRETRAIN_TOKENS["slm-is"])
    mixture = model.cost(setting(), "slm-mix", PRETRAIN_TOKENS["slm-mix"])
    assert model.break_even(importance, mixture) == pytest.approx(650 / 130, rel=0.005)


def test_money_follows_hours() -> None:
    priced = model.cost(setting(price=2.5), "slm", 1e9)
    assert priced.generic.money == pytest.approx(2.5 * priced.generic.device_hours)
    assert priced.total(3).money == pytest.approx(2.5 * priced.total(3).device_hours)
    assert model.cost(setting(), "slm", 1e9).total(3).money is None


@examples(100)
@given(st.integers(1, 10**9))
def test_finetuning_tokens_grow_and_passes_shrink(spec_tokens: int) -> None:
    now, more = (model.finetuning_tokens(n) for n in (spec_tokens, 2 * spec_tokens))
    assert now < more <= 2 * now * (1 + 1e-9)
    assert now <= 30 * spec_tokens


def test_what_is_planned_is_the_runs_own_microbatch_on_one_device() -> None:
    """Pooled over eight cards, at one row, the 126M model came to 2.5 GB where a run takes 39."""
    card = replace(devices.find("h100"), memory=24e9)
    for count in (1, 8):
        row = methods.find("slm")
        needed, tokens, sharded = model.memory_of(setting(device=card, devices=count), row, 60e9)
        assert not sharded
        job = memory.Job(SMALL, processes=count)
        assert tokens == memory.fitting_microbatch(24e9, job, 262_144 // count)
        assert needed == memory.training_bytes(job, tokens) <= 0.9 * 24e9
    small = model.memory_of(setting(device=replace(card, memory=1e9)), methods.find("llm"), 60e9)
    assert small[1] == 0 and small[0] > 0.9e9


def test_what_one_device_cannot_hold_is_planned_as_the_run_divides_it() -> None:
    card = replace(devices.find("h100"), memory=8e9)
    row = methods.find("llm")
    assert model.memory_of(setting(device=card), row, 60e9)[1:] == (0, False)
    needed, tokens, sharded = model.memory_of(setting(device=card, devices=8), row, 60e9)
    job = memory.Job(setting().large, processes=8, sharded=True)
    assert sharded and tokens == memory.fitting_microbatch(8e9, job, 262_144 // 8) > 0
    assert needed == memory.training_bytes(job, tokens) <= 0.9 * 8e9


@pytest.mark.parametrize("name", ["slm", "slm-pn", "llm-lora", "slm-d"])
def test_the_memory_that_is_planned_is_that_of_the_loops_own_trainings(name: str) -> None:
    small = Shape(layers=1, d_model=32, heads=2, d_ff=64, vocab_size=300, context=16)
    large = replace(small, d_model=64, d_ff=128)
    tiny = setting(small=small, large=large, projected=keys.Projected(experts=3, rank=2))
    row, cuda, preset = methods.find(name), torch.device("cuda"), keys.Optimizer().preset
    planned = [job for job, _ in model.trainings(tiny, row, 1e6)]
    body = Transformer(tiny.shape(row))
    before = Projected(small, tiny.projected) if row.bank else Dense(body)
    found = [arithmetic.job_of(before.module, before.body, preset, None, cuda)]
    if row.tune == "lora":
        lora.add_adapters(body, tiny.lora, 0)
    found.append(arithmetic.job_of(body, body, preset, large if row.taught else None, cuda))
    assert planned[-2:] == found


def test_choosing_by_two_models_costs_them_and_their_passes() -> None:
    usual = setting(candidate_tokens=3e9)
    plain, resampled, chosen = (model.cost(usual, name, 1e9)
                                for name in ("slm", "slm-is", "slm-color"))
    scored = 3e9 * flops.forward(usual.small)
    assert chosen.generic.flops == pytest.approx(plain.generic.flops + scored)
    assert chosen.specialization.flops == pytest.approx(
        resampled.specialization.flops + plain.specialization.flops + scored)


# Devices ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "found"), [
    ("a100", "A100-80GB"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
    ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"),
    ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100"), ("NVIDIA GeForce RTX 4090", "RTX-4090"),
    ("rtx3090", "RTX-3090"), ("NVIDIA H200", "H200"), ("B200", "B200"), ("NVIDIA A10", "A10"),
])
def test_devices_are_found_by_key_and_by_the_drivers_name(name: str, found: str) -> None:
    assert devices.find(name).name == found


def test_a_name_that_begins_alike_is_another_device() -> None:
    assert devices.find_sheet("NVIDIA RTX A1000 Laptop GPU") is None


@pytest.mark.parametrize(("name", "measured", "ratio"), [
    ("l4", "a100", (121 / 0.3) / (312 / 2.039)), ("h100", "h200", (989 / 3.35) / (989 / 4.8))])
def test_traffic_weighs_more_where_there_is_less_bandwidth_for_the_rate(
        name: str, measured: str, ratio: float) -> None:
    """By TFLOP/s and TB/s of the data sheets."""
    device, other = devices.find(name), devices.find(measured)
    assert device.b / other.b == pytest.approx(ratio) and device.a == other.a


def test_a_devices_numbers_are_those_of_its_data_sheet() -> None:
    h100 = devices.find("h100")
    assert (h100.rate, h100.memory, h100.bandwidth) == (989e12, 80e9, 3.35e12)
    assert (h100.links, h100.kind, h100.calibrated) == (450e9, "cuda", False)


@pytest.mark.parametrize(("memory", "near"), [(140e9, "H200"), (17e9, "V100"), (None, "V100")])
def test_a_gpu_that_nobody_knows_is_planned_by_one_of_its_memory(
        memory: float | None, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "here", lambda: "NVIDIA Z1")
    monkeypatch.setattr(devices, "memory_here", lambda: memory)
    monkeypatch.setattr(parallel, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(parallel, "bf16_is_fast", lambda device: True)
    found = devices.find_or_nearest("here")
    assert (found.name, found.memory, found.kind, found.bf16) == (near, memory, "cuda", True)
    assert found.stands_in_for == "NVIDIA Z1"
    assert found.rate == devices.find(near).rate


def test_a_processor_that_nobody_knows_is_planned_by_another_that_was_measured(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "here", lambda: "Some Processor x2")
    assert devices.find_or_nearest().rate == min(row.teraflops for row in devices.SHEETS) * 1e12
    for device in ("NVIDIA H200", "Other Processor x64"):
        write(measured(device) | {"matmul_flops": 3e12})
    found = devices.find_or_nearest()
    assert (found.name, found.rate, found.kind) == ("Other Processor x64", 3e12, "cpu")
    assert found.memory == devices.memory_here() and not found.calibrated


def test_shared_keys_and_values_are_cached_once() -> None:
    own, shared = replace(SMALL, kv_heads=None), replace(SMALL, kv_heads=SMALL.heads // 4)
    cache = [model.inference_memory(shape, 8) - flops.parameters(shape)
             for shape in (own, shared)]
    assert cache[0] == 4 * cache[1] > 0


@pytest.mark.parametrize("bits", [4.5, 8, 16])
def test_a_deployed_model_is_its_weights_and_its_cache(bits: float) -> None:
    shape = Shape(layers=3, d_model=64, heads=4, d_ff=128, vocab_size=512, context=32)
    cache = 2 * 3 * 64 * 32 * 2  # keys and values, in two bytes each
    assert model.inference_memory(shape, bits) == flops.parameters(shape) * bits / 8 + cache



def test_an_unknown_device_asks_for_a_calibration() -> None:
    with pytest.raises(UserError, match="planearly calibrate"):
        devices.find("abacus")
    with pytest.raises(UserError, match="did you mean 'a100'"):
        devices.find("a1000")


def measured(device: str) -> dict[str, object]:
    return {"device": device, "matmul_flops": 200e12, "when": "2026-01-01", "memory": 80e9,
            "bandwidth": 2e12, "shapes": {
                "slm": {"d_model": 1024, "flops_per_second": 100e12, "tokens_per_second": 1.0e5},
                "llm": {"d_model": 2816, "flops_per_second": 150e12, "tokens_per_second": 3.0e4},
                "pn": {"d_model": 1024, "flops_per_second": 96e12, "tokens_per_second": 0.95e5}}}


def write(calibration: dict[str, object]) -> None:
    file = devices.calibration_file(str(calibration["device"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(calibration))


def test_a_calibration_takes_precedence_and_passes_through_what_was_measured() -> None:
    name = "NVIDIA A100-SXM4-80GB"
    write(measured(name))
    for asked in (name, "a100"):
        found = devices.find(asked)
        assert found.calibrated and found.rate == 200e12 and found.peak == 312e12
        assert found.seconds(100e12, 1024) == pytest.approx(1.0)
        assert found.seconds(150e12, 2816) == pytest.approx(1.0)
        assert found.projection_overhead == pytest.approx(1 / 0.95)
    assert not devices.find("a100-40gb").calibrated
    here = setting(device=devices.find("a100"))
    ratio = model.pretraining(here, "slm-pn", 1.0).device_hours \
        / model.pretraining(here, "slm", 1.0).device_hours
    assert ratio == pytest.approx(1 / 0.95)


def test_a_calibrated_projection_is_scaled_to_what_is_asked() -> None:
    """Measured at 12 slices, AdamW, 65,536 tokens a step, where it took 1 / 0.95 of plain steps."""
    told = measured("NVIDIA A100-SXM4-80GB")
    told["shapes"]["pn"] |= {  # type: ignore[index]
        "step_tokens": 65_536, "shape": SMALL.to_dict(), "projected": asdict(PROJECTED),
        "settings": {"optimizer": {"preset": "adamw"}}}
    write(told)
    device = devices.find("a100")
    then = setting(device=device, preset="adamw", projected=PROJECTED, batch_tokens=65_536)

    def added(**changes: object) -> float:
        of = replace(then, **changes)  # type: ignore[arg-type]
        return model.pretraining(of, "slm-pn", 1.0).device_hours \
            - model.pretraining(of, "slm", 1.0).device_hours

    assert added() * 3600 == pytest.approx((1 / 0.95 - 1) / 1e5)
    assert added(batch_tokens=262_144) == pytest.approx(added() / 4)
    assert added(devices=8) == pytest.approx(added() * 8)
    assert added(projected=replace(PROJECTED, rank=46)) == pytest.approx(
        added() * (13 * 46 + 10 * 16) / (13 * 12 + 10 * 16))
    assert added(preset="modern") > 1.5 * added()
    blind = replace(device, bandwidth=None)  # the ratio alone, whatever is asked
    plain = model.pretraining(replace(then, device=blind), "slm", 1.0).device_hours
    for rank in (12, 46):
        assert added(device=blind, projected=replace(PROJECTED, rank=rank)) == pytest.approx(
            plain * (1 / 0.95 - 1))


def test_a_calibration_in_the_precision_and_company_that_is_asked_for_is_taken() -> None:
    name, each = "Some Processor x16", {
        ("bfloat16", False, 1): 4e12, ("float32", True, 1): 3e12, ("bfloat16", False, 2): 8e12,
        ("float32", True, 2): 6e12, ("bfloat16", False, 7): 20e12}
    for (kind, named, sharing), rate in each.items():
        file = devices.calibration_file(name, kind if named else "", sharing)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**measured(name), "matmul_flops": rate, "matmul_kind": kind,
                                    "named_precision": named, "sharing": sharing}))
    assert len(list(devices.calibration_folder().iterdir())) == len(each)

    def found(bf16: bool | None = None, sharing: int = 1) -> tuple[float, bool, int]:
        device = devices.find(name, bf16, sharing)
        return device.rate, device.bf16, device.sharing

    assert found() == found(True) == (4e12, True, 1)
    assert found(False) == (3e12, False, 1)
    assert found(None, 2) == found(True, 2) == (8e12, True, 2)
    assert found(False, 2) == (6e12, False, 2)
    assert found(None, 3) == (4e12, True, 1) and found(False, 3) == (3e12, False, 1)
    assert found(False, 7) == (3e12, False, 1)  # the precision before the company
    devices.calibration_file(name).unlink()  # on a device of no data sheet, for want of others
    assert found() == (3e12, False, 1)
    assert "which the recipe of the calibration named" in devices.find(name).told_of_precision(None)
    for sharing in (1, 2):
        devices.calibration_file(name, "float32", sharing).unlink()
    with pytest.raises(UserError, match="nothing is known"):
        devices.find(name)  # what several do together says nothing of one


def test_devices_of_one_kind_are_told_apart_by_their_names() -> None:
    for name in ("NVIDIA H100", "NVIDIA H100 NVL"):
        write({**measured(name), "matmul_flops": 1e12 * len(name)})
    for name in ("NVIDIA H100", "NVIDIA H100 NVL"):
        assert devices.find(name).rate == 1e12 * len(name)
    devices.calibration_file("NVIDIA H100 NVL").write_text("{}")  # another's is not opened
    assert devices.find("NVIDIA H100").rate == 11e12


def test_a_precision_that_a_recipe_named_is_not_what_suits_a_device_of_the_data_sheets() -> None:
    name = "NVIDIA H100"
    file = devices.calibration_file(name, "float32")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**measured(name), "matmul_flops": 5e13, "matmul_kind": "float32",
                                "named_precision": True}))
    found = devices.find(name)
    assert found.bf16 and not found.calibrated and found.told_of_precision(None) == ""
    assert devices.find("h100", False).rate == 5e13
    assert not devices.find("h100", True).calibrated


def test_an_older_calibration_tells_what_its_recipe_named_beside_the_products() -> None:
    told = measured("Some Processor x16")
    told["shapes"]["slm"]["settings"] = {"precision": "fp32"}  # type: ignore[index]
    write({**told, "matmul_kind": "bfloat16"})
    found = devices.find("Some Processor x16")
    assert not found.bf16 and found.named_precision
    write({**told, "device": "NVIDIA H100", "matmul_kind": "bfloat16"})
    assert devices.find("h100").bf16 and not devices.find("h100", False).bf16


def test_a_calibration_that_tells_less_is_read_by_its_name() -> None:
    older = {key: value for key, value in measured("NVIDIA H200").items()
             if key not in ("memory", "bandwidth")}
    write(older)
    found = devices.find("h200")
    assert (found.memory, found.bandwidth, found.kind) == (141e9, None, "cuda")
    assert (found.bf16, found.links) == (True, 450e9)
    write({**older, "device": "Some Processor x16", "matmul_kind": "float32"})
    found = devices.find("Some Processor x16")
    assert (found.memory, found.kind, found.bf16) == (None, "cpu", False)
    assert (found.peak, found.links) == (None, None)


def test_a_calibrations_curve_is_its_points_mean_or_its_nearest_line() -> None:
    # one width: the mean of 1 / utilisation, whatever the width that is asked for
    a, b = devices._through([(512, 2.0), (512, 4.0)])
    assert (a, b) == (3.0, 0.0)
    a, b = devices._through([(512, 2.0 + 1000 / 512), (1024, 2.0 + 1000 / 1024)])
    assert (a, b) == (pytest.approx(2.0), pytest.approx(1000.0))
    # wider is slower: no traffic explains that, so a alone, of the least relative squares
    a, b = devices._through([(512, 2.0), (1024, 4.0)])
    assert (a, b) == (pytest.approx((1 / 2 + 1 / 4) / (1 / 2**2 + 1 / 4**2)), 0.0)


@pytest.mark.parametrize(("name", "rate"), [("v100", 15.7e12), ("t4", 8.1e12)])
def test_without_bfloat16_the_rate_is_float32s(name: str, rate: float) -> None:
    found = devices.find(name)
    assert found.rate == rate and not found.bf16 and devices.find("a10").bf16


def test_a_broken_calibration_is_named() -> None:
    file = devices.calibration_file("abacus")
    file.parent.mkdir(parents=True)
    whole = {"matmul_flops": 1.0, "when": "now", "shapes": {"slm": {
        "d_model": 1, "flops_per_second": 1.0, "tokens_per_second": 1.0}}}
    for content in ({"device": "abacus"}, [1], 7, None, {"device": 5, **whole}):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="is not a calibration"):
            devices.find("abacus")
        with pytest.raises(UserError, match="is not a calibration"):
            devices.find("a100")
