"""Calibration runs real steps, is kept by device name, and plans use it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from planearly import keys
from planearly.cost import devices
from planearly.errors import UserError
from planearly.files import read_json
from planearly.model import flops
from planearly.model.transformer import Shape, Transformer
from planearly.plan import calibrate
from planearly.train.trainable import Dense


def tiny() -> keys.Recipe:
    return keys.Recipe(
        name="tiny", context=16, tokenizer=keys.Tokenizer(vocab_size=300),
        model=keys.Model(layers=1, d_model=32, heads=2, d_ff=64),
        large=keys.Model(layers=1, d_model=64, heads=2, d_ff=128),
        projected=keys.Projected(experts=3, rank=2, embedding=2),
        pretrain=keys.Pretrain(batch_tokens=64, compile="no"))


def test_a_calibration_is_what_plans_then_use(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path))
    for name in ("matmul_rate", "copy_rate"):
        monkeypatch.setattr(calibrate, name,
                            functools.partial(getattr(calibrate, name), seconds=0.05))
    path = calibrate.calibrate(tiny(), seconds=0.1)
    assert path.parent == tmp_path / "calibration"
    found = devices.find()
    assert found.calibrated and found.name == devices.here()
    measured = devices.find_calibration(devices.here())
    assert measured is not None and set(measured["shapes"]) == {"slm", "pn", "llm"}
    small = measured["shapes"]["slm"]
    shape = Shape.of(tiny().model, 300, 16)
    assert small["flops_per_token"] == flops.training(shape)
    assert small["flops_per_second"] == pytest.approx(
        small["tokens_per_second"] * flops.training(shape))
    assert found.rate == measured["matmul_flops"] and found.bandwidth == measured["bandwidth"]
    assert found.projection_overhead == pytest.approx(
        small["tokens_per_second"] / measured["shapes"]["pn"]["tokens_per_second"])
    known = found.projection
    assert known is not None and known.seconds == pytest.approx(max(
        64 / measured["shapes"]["pn"]["tokens_per_second"] - 64 / small["tokens_per_second"], 0))
    assert (known.shape, known.projected, known.preset) == (
        shape.to_dict(), asdict(tiny().projected), "modern")


def ends(*_: object) -> None:
    """In place of measuring."""


def killed(link: Connection, ready: Barrier, *_: object) -> None:
    """One of them while the others wait for it."""
    if ready.wait() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    ready.wait()


@pytest.mark.slow
def test_trainings_side_by_side_are_measured_together_and_kept_beside(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "matmul_rate", lambda device, bf16: (1e12, "float32"))
    monkeypatch.setattr(calibrate, "copy_rate", lambda device: 1e10)
    path = calibrate.calibrate(tiny(), seconds=0.1, workers=2)
    assert path == devices.calibration_file(devices.here(), sharing=2)
    with pytest.raises(UserError, match="nothing is known"):
        devices.find()  # of one training alone
    found = devices.find(sharing=2)
    assert found.sharing == 2 and found.calibrated
    shapes = read_json(path)["shapes"]
    assert set(shapes) == {"slm", "pn", "llm"}
    for shape in shapes.values():
        assert shape["flops_per_second"] == pytest.approx(
            shape["tokens_per_second"] * shape["flops_per_token"])


def tells(link: Connection, ready: Barrier, *_: object) -> None:
    """What is wrong with one of them while the others wait for it."""
    if multiprocessing.current_process().name.endswith("1"):
        ready.wait()
    else:
        link.send("it is too large")


@pytest.mark.slow
@pytest.mark.parametrize(("ends", "said"), [
    (ends, "calibrate with fewer --workers"), (killed, "calibrate with fewer --workers"),
    (tells, "it is too large")])
def test_a_training_that_ends_while_it_is_measured_is_one_sentence(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Callable[..., None],
        said: str) -> None:
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "matmul_rate", lambda device, bf16: (1e12, "float32"))
    monkeypatch.setattr(calibrate, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(calibrate, "_alongside", ends)
    with pytest.raises(UserError, match=said):
        calibrate.calibrate(tiny(), seconds=0.1, workers=3)
    assert not list(devices.calibration_folder().iterdir())


def test_a_place_that_takes_no_file_is_refused_before_anything_is_measured(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PLANEARLY_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "matmul_rate", pytest.fail)
    with pytest.raises(OSError, match="file/calibration"):
        calibrate.calibrate(tiny(), seconds=0.1)


def test_a_step_trains() -> None:
    recipe = tiny()
    shape = Shape.of(recipe.model, 300, 16)
    model = Transformer(shape)
    before = model.blocks[0].attn.qkv.weight.clone()  # type: ignore[union-attr, operator]
    found = calibrate.steps(Dense(model), shape, recipe.pretrain, 1, torch.device("cpu"), 0.0)
    assert found["steps"] == 3 and found["tokens_per_second"] > 0
    assert not torch.equal(before, model.blocks[0].attn.qkv.weight)  # type: ignore[union-attr]


def test_rates_are_those_of_the_fastest_repetition() -> None:
    for bf16, name in ((False, "float32"), (True, "bfloat16")):
        rate, kind = calibrate.matmul_rate(torch.device("cpu"), seconds=0.01, bf16=bf16)
        assert rate > 1e9 and kind == name
    assert calibrate.copy_rate(torch.device("cpu"), seconds=0.01) > 1e8
