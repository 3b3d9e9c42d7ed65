"""What a user types for a plan, and the command that reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from planearly import units
from planearly.cli import app, main
from planearly.cluster import shared
from planearly.cost import devices
from planearly.errors import UserError
from planearly.plan import inputs
from small_models import model_folder

ASKED = ["plan", "--inference-params", "126M", "--generic-tokens", "150B", "--spec-tokens", "1M",
         "--device", "a100", "--generic-hours", "650", "--specialization-hours", "1",
         "--domains", "50"]


def test_the_command_prints_one_json_object() -> None:
    result = CliRunner().invoke(app, [*ASKED, "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["recommended"] == "slm-pn"
    for row in found["methods"]:
        assert 0 < row["train_bytes_per_device"] <= 0.9 * 80e9
        assert row["microbatch_tokens"] % 1024 == 0 < row["microbatch_tokens"]
    loaded = yaml.safe_load(json.loads(result.stdout)["recipes"]["slm-pn"])
    assert loaded["methods"] == ["slm-pn"]


def test_the_command_prints_text_and_writes_recipes(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*ASKED, "--out", str(tmp_path / "plan")])
    assert result.exit_code == 0 and "Recommended: slm-pn" in result.stdout
    assert {"plan.json", "plan.html", "slm-pn.yaml"} <= {
        path.name for path in (tmp_path / "plan").iterdir()}


def test_a_page_of_others_is_left_alone_with_all_beside_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.html").write_text("mine")
    with pytest.raises(SystemExit):
        main([*ASKED, "--out", str(tmp_path)])
    assert "plan.html" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


def test_a_corpus_is_known_by_its_name() -> None:
    asked = [{"150B": "c4"}.get(word, word) for word in ASKED]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert yaml.safe_load(found["recipes"]["slm"])["generic"] == ["c4"]
    assert inputs.tokens("c4", "--generic-tokens") == 156 * 10**9


def test_money_is_hours_at_the_price() -> None:
    asked = [a for a in ASKED if a not in ("--generic-hours", "650")]
    result = CliRunner().invoke(app, [*asked, "--generic-money", "$1300", "--price", "2", "--json"])
    rows = {row["method"]: row for row in json.loads(result.stdout)["methods"]}
    assert rows["slm"]["cost"]["generic"]["device_hours"] == pytest.approx(650)
    assert rows["slm"]["cost"]["generic"]["money"] == pytest.approx(1300)


@pytest.mark.parametrize(("flags", "says"), [
    (["--inference-speed", "100", "--inference-device", "abacus"], "planearly calibrate"),
    (["--inference-params", "50GB"], "should be a count"),
    (["--inference-params", "0"], "must be positive"),
    (["--inference-params", "10"], "below the smallest model"),
    (["--teacher", "x:5"], "below the smallest model .* or teacher"),
    (["--windows", "0"], "--windows: a set has at least one"),
    (["--inference-bytes", "1"], "the inference limit must be positive"),
    (["--generic-hours", "126M"], "should be a time"),
    (["--generic-hours", "3parsecs"], "should be a time"),
    (["--inference-bytes", "2h"], "number of bytes"),
    (["--generic-money", "300"], "needs --price"),
    (["--price", "2h"], "should be an amount"),
    (["--domains", "0"], "at least one domain"),
    (["--devices", "0"], "at least one device"),
    (["--generic-tokens", "no/such/file"], "does not exist: check the path"),
    (["--generic-tokens", "abc"], "give one such as 8k, 126M or 1.5B"),
    (["--entropy", "3"], "goes with --clusters"),
    (["--foreseen", "nan"], "give a finite number of nats"),
    (["--entropy", "9", "--clusters", "16"], "at most 2.77 nats"),
    (["--quantization", "q9"], "unknown quantisation"),
    (["--checkpoint", "model"], "NAME:PARAMETERS"),
    (["--inference-speed", "0"], "no speed of a model"),
])
def test_bad_input_is_one_clear_sentence(flags: list[str], says: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*ASKED, *flags])
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert re.search(says, text) and text.count("\n") == 0 and text.startswith("planearly: ")


def test_without_a_device_this_machine_is_planned_though_nobody_measured_it(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "here", lambda: "Some Processor x2")
    asked = [a for a in ASKED if a not in ("--device", "a100")]
    result = CliRunner().invoke(app, [*asked, "--json"])
    assert result.exit_code == 0
    assert "in place of 'Some Processor x2'" in json.loads(result.stdout)["device"]


def test_files_of_another_kind_are_told_in_a_sentence(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for text in ("[1]", '{"rows": [3]}', '{"rows": [{"method": "slm"}]}'):
        other.write_text(text)
        with pytest.raises(UserError, match="is not a results"):
            inputs.evidence([other])
    other.write_text('{"rows": [{"method": "slm", "domain": "a", "settings": {"seed.x": 1}}]}')
    assert inputs.evidence([other]) == ({}, [])
    for text in ('["a file of the user"]', '{"n_tokens": "many"}', '{"n_tokens": [1]}', "7"):
        (tmp_path / "dataset.json").write_text(text)
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert inputs.tokens(str(tmp_path), "--generic-tokens") == round(size / 4.2)


@pytest.mark.parametrize(("key", "value"), [
    ("method", ["slm"]), ("domain", {}), ("inference_params", "x"), ("pretrain_tokens", -1),
    ("spec_tokens", True), ("ppl_after", "20"), ("generic_cost", {"tokens": "9"}),
    ("generic_cost", 7), ("settings", [])])
def test_a_row_that_no_run_writes_is_told(tmp_path: Path, key: str, value: object) -> None:
    row = {"method": "slm", "domain": "a", "inference_params": 10, "pretrain_tokens": 10,
           "spec_tokens": 10, "ppl_after": 3.5, "generic_cost": {"tokens": 10}, "settings": {}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": [row, {**row, key: value}]}))
    with pytest.raises(UserError, match=rf"results\.json row 2: '{key}' is .*, which no run"):
        inputs.evidence([file])


@pytest.mark.parametrize("more", [{}, {"pretrain_tokens": None}, {"pretrain_tokens": 0}])
def test_a_row_that_adapts_without_its_tokens_is_no_evidence(
        tmp_path: Path, more: dict[str, object]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": [{"method": "slm-adapt", "domain": "a", **more}]}))
    assert inputs.evidence([file]) == ({}, [])


def test_methods_without_a_law_are_told_in_one_sentence(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"domain": "a", "inference_params": 10, "pretrain_tokens": 10, "spec_tokens": 10,
           "ppl_after": 3.5}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": [{**row, "method": name}
                                         for name in ("slm-pn", "llm", "slm-mix")]}))
    assert inputs.evidence([file])[0] == {}
    line, first = capsys.readouterr().err.splitlines()
    assert first.startswith("no law is fitted to the runs of llm, slm-mix, slm-pn, which are too ")
    assert "slm and slm-is and slm-adapt together needs" in line


def test_tokens_are_those_of_the_documents_that_a_run_would_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 420)
    (tmp_path / "photo.jpg").write_bytes(bytes(10**6))
    assert inputs.tokens(str(tmp_path), "--spec-tokens") == 100
    made = shared.Shared({"name": "static", "digest": "e"}, 7,
                         {2: shared.Level("c", np.array([1.0, 2.0]))})
    made.save(tmp_path / "law.json")
    with pytest.raises(UserError, match="is a histogram, which does not tell how many tokens"):
        inputs.tokens(str(tmp_path / "law.json"), "--spec-tokens")
    for text in ("", str(tmp_path / "photo.jpg")):
        with pytest.raises(UserError, match=r"--spec-tokens: '' is not a number|its format by"):
            inputs.tokens(text, "--spec-tokens")


def test_a_model_folder_is_read_as_a_run_will_read_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config"):
        inputs.model(str(tmp_path), "--checkpoint")
    folder = model_folder(tmp_path, context=64)
    found = inputs.model(str(folder), "--checkpoint")
    assert found is not None and found.params > 10_000 and found.context == 64
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        inputs.model(str(folder), "--checkpoint")


def test_negative_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*ASKED, "--generic-hours", "-5"])
    assert "not negative" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"),
                         [("$300", (300, "USD")), ("300 usd", (300, "USD")), ("2.5k", (2500, "")),
                          ("1,200", (1200, "")), ("€2k", (2000, "EUR")), ("5 £", (5, "GBP")),
                          ("¥10 CNY", (10, "CNY")), ("¥10", (10, "JPY"))])
def test_money_is_read_as_people_write_it(text: str, value: tuple[float, str]) -> None:
    assert units.money(text) == value


def test_money_refuses_other_units() -> None:
    for text in ("5GB", "2h", "-3", "€10 USD", "$€3", "€", "$3£"):
        with pytest.raises(UserError):
            units.money(text)


@pytest.mark.parametrize(("flags", "currency"), [
    ([], "USD"), (["--price", "€2"], "EUR"), (["--price", "2", "--generic-money", "900£"], "GBP"),
    (["--price", "$2", "--currency", "CAD"], "CAD"), (["--price", "2 eur"], "EUR"),
    (["--price", "€2", "--generic-money", "300", "--currency", "eur"], "eur")])
def test_money_is_in_the_currency_that_its_sign_says(flags: list[str], currency: str) -> None:
    asked = [word for word in ASKED if word not in ("--generic-hours", "650")]
    asked += flags if "--price" in flags else [*flags, "--price", "2"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert yaml.safe_load(found["recipes"]["slm"])["cost"]["currency"] == currency


@pytest.mark.parametrize("flags", [["--price", "€2", "--generic-money", "$300"],
                                   ["--price", "€2", "--currency", "USD"]])
def test_money_of_two_currencies_is_refused(flags: list[str],
                                            capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*ASKED, *flags])
    assert "give all of it in one currency" in capsys.readouterr().err
