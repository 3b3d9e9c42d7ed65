"""Who has a device at the same time is booked a part of it each."""

import contextlib
import shutil
import subprocess
import sys
import threading
import time
import types

import pytest

from planearly import company, keys
from planearly.stages import folder as folder_module
from planearly.stages.folder import Run
from planearly.stages.manifest import facts
from small_processes import together


@pytest.fixture
def clock(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(company, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(company, "_asked", 0.0)
    monkeypatch.setattr(company.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return now


HOLDS = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
print(flush=True)
input()
"""


@contextlib.contextmanager
def another(device="cpu"):
    """A process that lives, beside this one in its company; then it is killed."""
    file = company._own[1].parent / f"{device}.another"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, file], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield file
    finally:
        process.kill()
        process.communicate()


def test_time_is_divided_while_others_have_the_device(clock, tmp_path):
    began = company.device_time()
    with company.joined(tmp_path / "run"):
        clock[0] = 10.0
        assert company.size() == 1 and company.device_time() - began == 10.0
        with another() as left, another("gpu-0"):
            assert company.size() == 2
            clock[0] = 20.0
            assert company.device_time() - began == 15.0
        clock[0] = 30.0  # it was killed, and has left its file
        assert left.exists() and company.size() == 1 and not left.exists()
        assert company.device_time() - began == 25.0
    clock[0] = 40.0
    assert company.device_time() - began == 35.0


def test_a_stage_within_a_stage_is_one(clock, tmp_path):
    with company.joined(tmp_path / "run"):
        own = company._own
        with company.joined(tmp_path / "run"):
            assert company._own == own
        assert own[1].exists() and company._own == own
    assert not own[1].parent.exists() and company._own is None


def test_a_stage_of_a_run_has_the_device_while_it_is_made(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_module, "time", company.time)
    monkeypatch.setattr(company, "size", lambda: 1 if company._own is None else 4)

    def build(folder):
        assert company._own is not None
        clock[0] += 40.0

    made = facts(Run(tmp_path / "run", keys.Recipe()).stage("a", {}, {}, build))
    assert (made["seconds"], made["device_seconds"]) == (40.0, 10.0) and company._own is None


def test_another_folders_company_is_another(clock, tmp_path):
    with company.joined(tmp_path / "a"):
        first = company._own[1].parent
    with company.joined(tmp_path / "b"):
        assert company._own[1].parent != first
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with company.joined(tmp_path / "link"):
        assert company._own[1].parent == first


def test_what_is_raised_leaves_the_company(clock, tmp_path):
    with pytest.raises(KeyError), company.joined(tmp_path):
        raise KeyError
    assert company._own is None and company.size() == 1


def no_folder():
    raise FileNotFoundError("no usable temporary directory")


@pytest.mark.parametrize("place", ["none", "a file", "somebody else's", "gone meanwhile"])
def test_who_cannot_tell_is_alone(clock, monkeypatch, tmp_path, place):
    if place == "none":
        monkeypatch.setattr(company.tempfile, "gettempdir", no_folder)
    if place == "a file":
        monkeypatch.setattr(company.tempfile, "gettempdir", lambda: __file__)
    if place == "somebody else's":
        (tmp_path / "linked").mkdir()
        with company.joined(tmp_path):
            folder = company._own[1].parent
        folder.symlink_to(tmp_path / "linked")
    with company.joined(tmp_path):
        if place == "gone meanwhile":
            shutil.rmtree(company._own[1].parent)
        assert company.size() == 1
    assert company._own is None


def test_a_folder_that_is_removed_while_it_is_entered_is_made_again(clock, monkeypatch, tmp_path):
    left, opened = [3], company.os.open

    def late(path, *more):
        if left[0]:
            left[0] -= 1
            path.parent.rmdir()
        return opened(path, *more)

    monkeypatch.setattr(company.os, "open", late)
    with company.joined(tmp_path):
        assert company._own[1].exists() and not left[0]


def test_who_comes_and_goes_in_the_middle_of_a_stage_is_seen(clock, monkeypatch, tmp_path):
    """Though the stage itself does not look."""
    sizes, looked = iter([1, 2, 3]), threading.Event()

    def size():
        if (many := next(sizes, None)) is None:
            looked.set()
            return 1
        clock[0] += 6.0
        return many

    monkeypatch.setattr(company, "_LOOK", 0.001)
    monkeypatch.setattr(company, "size", size)
    began = company._spent
    with company.joined(tmp_path):
        assert looked.wait(60)
    # each count is of what passed before it was taken
    assert company._spent - began == pytest.approx(0 / 1 + 6 / 2 + 6 / 3 + 6)


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
