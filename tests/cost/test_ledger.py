"""Entries hold all four quantities; sums follow who was made from whom."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planearly import keys, methods
from planearly.cost import devices, ledger, model
from planearly.errors import UserError
from planearly.files import write_json
from planearly.model import flops
from planearly.model.transformer import Shape
from planearly.stages import training
from planearly.stages.evaluate import total_cost
from planearly.train.loop import Outcome
from planearly.train.objective import NextToken


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_entry_says_unknown_of_an_unknown_device() -> None:
    entry = ledger.book("pretrain/slm", 1000, 5e9, 7200, device="abacus")
    assert entry["device_hours"] == 2 and entry["device"] == "abacus"
    assert entry["utilisation"] == {"data_sheet": "unknown", "measured": "unknown"}
    assert "money" not in entry
    assert json.loads(json.dumps(entry)) == entry


def test_an_entry_holds_utilisation_and_money() -> None:
    entry = ledger.book("pretrain/slm", 10, 312e12 * 1800, 3600, device="NVIDIA A100-SXM4-80GB",
                        price_per_hour=2.0, currency="EUR")
    assert entry["utilisation"] == {"data_sheet": pytest.approx(0.5), "measured": "unknown"}
    assert entry["money"] == 2.0 and entry["currency"] == "EUR"


def test_money_of_two_currencies_is_not_added() -> None:
    euro, dollar = (ledger.book("x", 1, 1, 3600, "abacus", price_per_hour=1.0, currency=c)
                    for c in ("EUR", "USD"))
    assert "money" not in ledger.total([euro, dollar])
    assert ledger.total([euro, euro]) | {"money": 2.0, "currency": "EUR"} == ledger.total(
        [euro, euro])


def test_a_small_model_s_steps_are_predicted_as_they_are_planned() -> None:
    """Starting the operations of a step takes longer than the operations."""
    shape = Shape(layers=2, d_model=128, heads=2, d_ff=352, vocab_size=8192, context=256)
    h100 = devices.find("h100")
    setting = model.Setting(shape, shape, h100, keys.Projected(), batch_tokens=16_384)
    for method in ("slm", "slm-pn"):
        planned = model.pretraining(setting, method, 100 * 16_384)
        entry = ledger.book(f"pretrain/{method}", planned.tokens, planned.flops, 1.0, "h100")
        found = ledger.predicted_hours(entry, {
            "stage": f"pretrain/{method}", "shape": shape.to_dict(), "settings": {
                **({"projected": asdict(setting.projected)} if method == "slm-pn" else {}),
                "steps": 100, "train": {"batch_tokens": 16_384,
                                        "optimizer": {"preset": "modern"}}}})
        assert found == pytest.approx(planned.device_hours), method
        assert found > 2 * h100.seconds(planned.flops, 128) / 3600, method


def test_the_device_is_this_machines_by_default() -> None:
    assert ledger.book("x", 1, 1, 1)["device"] == devices.here()
    assert devices.here().strip()


def stage(root: Path, name: str, inputs: dict[str, str], hours: float | None = 1.0,
          device: str = "abacus") -> str:
    fingerprint = name.replace("/", "_") + "f"
    manifest: dict[str, Any] = {"stage": name, "inputs": inputs, "fingerprint": fingerprint,
                                "seconds": 36.0}
    if hours is not None:
        manifest["cost"] = ledger.book(name, 100, 1e15, hours * 3600, device, price_per_hour=3.0)
        manifest["shape"] = {"d_model": 1024}
    write_json(root / f"{name}-{fingerprint[:8]}" / "manifest.json", manifest)
    return fingerprint


def run_folder(root: Path, device: str = "abacus") -> Path:
    data = stage(root, "prepare/generic", {}, None)
    base = stage(root, "pretrain/slm", {"data": data}, 10.0, device)
    for name in ("a", "b"):
        stage(root, f"specialize/slm.{name}", {"start": base}, 1.0, device)
        own = stage(root, f"pretrain/slm-is.{name}", {"data": data}, 5.0, device)
        stage(root, f"specialize/slm-is.{name}", {"start": own}, 1.0, device)
    teacher = stage(root, "pretrain/llm", {"data": data}, 50.0, device)
    tuned = stage(root, "specialize/llm.a", {"start": teacher}, 4.0, device)
    stage(root, "specialize/slm-d.a", {"start": base, "teacher": tuned}, 2.0, device)
    return root


def test_sums_per_method_and_domain(tmp_path: Path) -> None:
    found = ledger.add_up([run_folder(tmp_path / "run")])

    def hours(method: str) -> tuple[float, float, float]:
        of = found["methods"][method]
        return tuple(of[k]["device_hours"] for k in ("generic", "specialization", "total"))

    assert hours("slm") == (10, 2, 12)
    assert hours("slm-is") == (0, 12, 12)
    assert hours("slm-d") == (60, 6, 66)  # the student's and the teacher's
    assert found["methods"]["slm-is"]["domains"]["b"]["device_hours"] == 6
    assert found["methods"]["slm"]["total"]["money"] == pytest.approx(36)
    # every stage once: 10 + 2 x (1 + 5 + 1) + 50 + 4 + 2, and 36 seconds of preparation
    assert found["total"]["device_hours"] == pytest.approx(80.01)
    assert found["total"]["predicted_hours"] is None


def test_choosing_the_expert_is_part_of_what_a_method_cost(tmp_path: Path) -> None:
    """10 + 5 + 1 hours are 16, by `planearly cost` and by the function of results.json."""
    base = stage(tmp_path, "pretrain/slm-pn", {}, 10.0)
    expert = stage(tmp_path, "expert/slm-pn.a", {"model": base}, 5.0)
    stage(tmp_path, "specialize/slm-pn.a", {"start": expert}, 1.0)
    of = ledger.add_up([tmp_path])["methods"]["slm-pn"]
    assert [of[k]["device_hours"] for k in ("generic", "specialization", "total")] == [10, 6, 16]
    folders = [path.parent for path in sorted(tmp_path.rglob("manifest.json"))]
    assert total_cost(folders)["device_hours"] == 16


def test_saving_is_booked_beside_the_hours_and_paid_for() -> None:
    entry = ledger.book("pretrain/slm", 1, 1.0, 3600, "abacus", price_per_hour=2.0,
                        saving_seconds=1800)
    assert entry["device_hours"] == 1 and entry["saving_hours"] == 0.5 and entry["money"] == 3
    both = ledger.total([entry, ledger.book("x", 1, 1.0, 3600, "abacus")])
    assert (both["device_hours"], both["saving_hours"], both["money"]) == (2, 0.5, 3)


@pytest.mark.parametrize("where", ["train", "finetune"])
def test_an_entry_of_a_shared_device_is_predicted_as_it_was_shared(cache: Path, where: str) -> None:
    for sharing, precision, rate in ((1, "", 1e12), (2, "", 3e12), (2, "float32", 2e12)):
        write_json(devices.calibration_file("abacus", precision, sharing), {
            "device": "abacus", "matmul_flops": 4e12, "when": "2026-01-01", "sharing": sharing,
            "matmul_kind": precision or "bfloat16", "named_precision": bool(precision),
            "shapes": {"slm": {"d_model": 1024, "flops_per_second": rate,
                               "tokens_per_second": 100}}})

    def predicted(precision: str, sharing: float = 1.0) -> float | None:
        entry = ledger.book("pretrain/slm", 10, 3.6e15, 1800, "abacus", sharing=sharing)
        return ledger.predicted_hours(entry, {
            "stage": "pretrain/slm", "shape": {"d_model": 1024},
            "settings": {where: {"precision": precision}}})

    assert predicted("auto") == predicted("fp32") == pytest.approx(1.0)  # nobody was alone in it
    assert predicted("auto", 1.9) == predicted("bf16", 1.9) == pytest.approx(1 / 3)
    assert predicted("fp32", 1.9) == pytest.approx(1 / 2)


def test_a_stage_without_a_cost_has_the_devices_time(tmp_path: Path) -> None:
    for number, told in enumerate(({"seconds": 36.0}, {"seconds": 36.0, "device_seconds": 9.0})):
        write_json(tmp_path / f"evaluate/{number}-f" / "manifest.json", {
            "stage": f"evaluate/{number}", "inputs": {}, "fingerprint": str(number), **told})
    hours = [entry["device_hours"] for entry in ledger.add_up([tmp_path])["stages"]]
    assert sorted(hours) == pytest.approx([9 / 3600, 36 / 3600])


def test_utilisation_is_of_the_measured_rate_too(cache: Path) -> None:
    write_json(devices.calibration_file("abacus"), {
        "device": "abacus", "matmul_flops": 2e12, "when": "2026-01-01", "shapes": {
            "slm": {"d_model": 1024, "flops_per_second": 1e12, "tokens_per_second": 100}}})
    entry = ledger.book("pretrain/slm", 10, 3.6e15, 7200, "abacus")
    assert entry["utilisation"] == {"data_sheet": "unknown", "measured": pytest.approx(0.25)}


def test_steps_of_a_longer_run_are_counted_once(tmp_path: Path) -> None:
    stage(tmp_path, "pretrain/slm", {}, 10.0)
    shared = {"from": "slm-pretrain", "tokens": 50, "device_hours": 2.0, "saving_hours": 0.5}
    write_json(tmp_path / "pretrain/slm-short" / "manifest.json", {
        "stage": "pretrain/slm", "inputs": {}, "fingerprint": "short", "seconds": 1.0,
        "begun": shared, "shape": {"d_model": 1024}, "cost": ledger.book(
            "pretrain/slm", 100, 1e15, 4 * 3600, "abacus", price_per_hour=3.0,
            saving_seconds=3600)})
    whole = ledger.add_up([tmp_path])["total"]
    assert (whole["tokens"], whole["flops"]) == (150, pytest.approx(1.5e15))
    assert (whole["device_hours"], whole["saving_hours"]) == (12, 0.5)
    assert whole["money"] == pytest.approx(30 + 15 - 15 * 2.5 / 5)
    alone = ledger.add_up([tmp_path / "pretrain" / "slm-short"])["total"]
    assert alone["tokens"] == 100  # nobody else counts them


def test_any_projected_pretraining_is_predicted_with_its_projection(
        cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated = {"device": "abacus", "matmul_flops": 2e12, "when": "2026-01-01", "shapes": {
        "slm": {"d_model": 1024, "flops_per_second": 1e12, "tokens_per_second": 100},
        "pn": {"d_model": 1024, "flops_per_second": 1e12, "tokens_per_second": 80}}}
    write_json(devices.calibration_file("abacus"), calibrated)
    monkeypatch.setitem(methods.TABLE, "new", replace(methods.find("slm-pn"), name="new"))
    entry, shape = {"device": "abacus", "flops": 3.6e15}, {"shape": {"d_model": 1024}}
    hours = {name: ledger.predicted_hours(entry, {"stage": f"pretrain/{name}", **shape})
             for name in ("slm", "slm-pn", "new")}
    assert hours == pytest.approx({"slm": 1.0, "slm-pn": 1.25, "new": 1.25})
    part = {"method": "slm-pn-plateau", "domain": None}, {"method": "slm-pn-adapt", "domain": "x"}
    both = [ledger.predicted_hours(entry, {"stage": "pretrain/of", **of, **shape}) for of in part]
    assert both == pytest.approx([1.25, 1.0])


@pytest.mark.parametrize("processes", [1, 8])
def test_a_projected_pretraining_is_predicted_as_it_is_planned(processes: int) -> None:
    """On a device that was not calibrated; the operations of projecting take no time beside its
    bytes."""
    shape = Shape(layers=7, d_model=1024, heads=8, d_ff=4096, vocab_size=32_768, context=1024)
    bank = keys.Projected(experts=16, rank=12, embedding=16)
    setting = model.Setting(shape, shape, devices.find("h200"), bank, devices=processes,
                            preset="adamw", batch_tokens=262_144)
    planned = model.pretraining(setting, "slm-pn", 100 * 262_144)
    entry = ledger.book("pretrain/slm-pn", planned.tokens, planned.flops, 1.0, "h200",
                        processes=processes)
    found = ledger.predicted_hours(entry, {
        "stage": "pretrain/slm-pn", "shape": shape.to_dict(), "settings": {
            "projected": asdict(bank), "steps": 100,
            "train": {"optimizer": {"preset": "adamw"}}}})
    assert found == pytest.approx(planned.device_hours)


@pytest.mark.parametrize("answered", [None, 500_000])
@pytest.mark.parametrize("device", ["a100", "h100"])
def test_a_distillation_is_predicted_as_it_is_planned(
        device: str, answered: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's operations are at its own width, whether it answers beside or beforehand."""
    small = Shape(layers=4, d_model=256, heads=4, d_ff=1024, vocab_size=8192, context=256)
    large = replace(small, layers=7, d_model=2048, heads=16, d_ff=8192)
    setting = model.Setting(small, large, devices.find(device), keys.Projected(),
                            finetune_batch_tokens=8192)
    tokens = 100 * 8192
    planned = model.distilled(setting, tokens, answered)
    monkeypatch.setattr(devices, "here", lambda: device)
    goal = NextToken()
    goal.teacher_width = large.d_model
    if answered is None:
        goal.flops_per_token = flops.forward(large)
    else:
        goal.flops_before = answered * flops.forward(large)
    run: Any = SimpleNamespace(recipe=keys.Recipe())
    entry = training.book(run, "slm-d.a", Outcome(tokens=tokens, seconds=1.0),
                          flops.training(small), goal)
    assert entry["flops"] == pytest.approx(planned.flops)
    manifest = {"stage": "specialize/slm-d.a", "shape": small.to_dict(), "settings": {
        "distill": {}, "train": {"batch_tokens": 8192}}}
    assert ledger.predicted_hours(entry, manifest) == pytest.approx(planned.device_hours)
    older = {key: value for key, value in entry.items() if key != "teacher"}
    assert ledger.predicted_hours(older, manifest) is None


def test_the_same_folder_twice_counts_once(tmp_path: Path) -> None:
    root = run_folder(tmp_path / "run")
    assert ledger.add_up([root, root]) == ledger.add_up([root])


def test_predicted_stands_beside_actual_where_the_device_is_known(tmp_path: Path) -> None:
    found = ledger.add_up([run_folder(tmp_path / "run", device="NVIDIA A100-SXM4-80GB")])
    a100 = devices.find("a100")
    each = a100.seconds(1e15, 1024) / 3600
    slm = found["methods"]["slm"]["total"]
    assert slm["predicted_hours"] == pytest.approx(3 * each)
    assert slm["actual_of_predicted"] == 12
    assert slm["devices"] == ["NVIDIA A100-SXM4-80GB"]


def test_a_folder_without_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished stages"):
        ledger.add_up([tmp_path])
    with pytest.raises(UserError, match="no finished stages"):
        ledger.add_up([tmp_path / "absent"])
    for other in ([], {"files": []}):  # another program's
        write_json(tmp_path / "manifest.json", other)
        with pytest.raises(UserError, match="no finished stages"):
            ledger.add_up([tmp_path])


def test_a_stage_says_itself_whom_it_is_paid_for() -> None:
    assert not ledger.paid_once({"stage": "expert/slm-pn.a"})
    said = {"stage": "specialize/slm.1.10", "method": "slm", "domain": "1.10"}
    assert ledger.place(said) == ("specialize", "slm", "1.10")
    assert ledger.paid_once({"stage": "pretrain/a.b", "method": "a.b", "domain": None})
    weights = {"stage": "weights/law", "domain": {"entropy": 1.0}}  # no training: a histogram
    assert ledger.place(weights) == ("weights", "law", None)
