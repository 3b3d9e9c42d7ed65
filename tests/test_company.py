"""Who has a device at the same time is booked a part of it each."""

import contextlib
import os
import subprocess
import sys
import time
import types

import pytest

from planearly import company
from small_processes import together


@pytest.fixture
def clock(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(company, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(company, "_asked", 0.0)
    monkeypatch.setattr(company.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return now


@contextlib.contextmanager
def another(device="cpu"):
    """A process that lives, beside this one in its company."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    file = company._own.parent / f"{device}.{process.pid}"
    file.touch()
    try:
        yield process, file
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def test_time_is_divided_while_others_have_the_device(clock, tmp_path):
    began = company.device_time()
    with company.joined(tmp_path / "run"):
        clock[0] = 10.0
        assert company.size() == 1 and company.device_time() - began == 10.0
        with another(), another("gpu-0"):
            assert company.size() == 2
            clock[0] = 20.0
            assert company.device_time() - began == 15.0
        clock[0] = 30.0  # it was killed, and has left its file
        assert company.size() == 1 and company.device_time() - began == 25.0
    clock[0] = 40.0
    assert company.device_time() - began == 35.0


def test_a_stage_within_a_stage_is_one(clock, tmp_path):
    with company.joined(tmp_path / "run"):
        file = company._own
        with company.joined(tmp_path / "run"):
            assert company._own == file
        assert file.exists() and company._own == file
    assert not file.exists() and not file.parent.exists() and company._own is None


def test_another_folders_company_is_another(clock, tmp_path):
    with company.joined(tmp_path / "a"):
        first = company._own.parent
    with company.joined(tmp_path / "b"):
        assert company._own.parent != first
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with company.joined(tmp_path / "link"):
        assert company._own.parent == first


def test_what_is_raised_leaves_the_company(clock, tmp_path):
    with pytest.raises(KeyError), company.joined(tmp_path):
        raise KeyError
    assert company._own is None and not os.listdir(company.tempfile.gettempdir())


def test_without_a_place_for_temporary_files_everybody_is_alone(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(company.tempfile, "gettempdir", lambda: str(tmp_path / "none" / "at all"))
    with company.joined(tmp_path):
        assert company.size() == 1


def test_a_gpu_has_one_name_for_all_who_may_use_it(monkeypatch):
    monkeypatch.setattr(company.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(company.torch.cuda, "is_initialized", lambda: False)
    names = []
    for mask, rank in (("2,3", "1"), ("3", "0"), (None, "3")):
        for key, value in (("CUDA_VISIBLE_DEVICES", mask), ("LOCAL_RANK", rank)):
            monkeypatch.delenv(key) if value is None else monkeypatch.setenv(key, value)
        names.append(company._device())
    assert names == ["gpu-3"] * 3


def seen(rank, out):
    """End once both have seen each other."""
    with company.joined(out):
        deadline = time.monotonic() + 120
        while len(list(out.glob("seen-*"))) < 2:
            assert time.monotonic() < deadline
            if company.size() == 2:
                (out / f"seen-{rank}").touch()
            time.sleep(0.01)


def test_processes_of_one_machine_have_its_processor_together(tmp_path):
    together(2, seen, tmp_path)
