"""The bank's products in Triton, by its interpreter, and when torch's stand in; tests/test_cuda.py
has them on a GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import planearly.model
from planearly.model import projected
from planearly.model.projected import Projected
from planearly.train import loop
from small_banks import PLAIN, SETTINGS, TRAIN, Made

GPU = torch.device("cuda", 0)
SCRIPT = """
import torch
from planearly.model import kernels
torch.manual_seed(0)
for n, h, size in [(16, 12, 1000), (3, 4, 1536), (16, 46, 5000), (40, 23, 777), (64, 64, 333),
                   (1, 1, 70)]:
    left, right, other = torch.randn(n, h), torch.randn(h, size), torch.randn(n, size)
    for found, expected in ((kernels.combine(left, right), left @ right),
                            (kernels.combine(left.T, other), left.T @ other),
                            (kernels.inner(other, right), other @ right.T)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
kernels.check(torch.device("cpu"))
kernels.inner = lambda left, right: left @ right.T + 1
try:
    kernels.check(torch.device("cpu"))
except ArithmeticError:
    pass
else:
    raise AssertionError("a wrong product passes")
"""


def test_products_are_those_of_matrices():
    pytest.importorskip("triton", reason="of torch's builds for GPUs")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def untried():
    """No device has been tried, before and after."""
    projected._kernels.cache_clear()
    yield
    projected._kernels.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Kernels that note which products they are asked for, as if this device were a GPU."""
    asked = []

    def combine(left, right):
        asked.append("combine")
        return left @ right

    def inner(left, right):
        asked.append("inner")
        return left @ right.T

    kernels = SimpleNamespace(MAX_ROWS=64, combine=combine, inner=inner)
    monkeypatch.setattr(projected, "_kernels", lambda device: kernels)
    return asked


@pytest.mark.parametrize(("n", "h", "dtype", "ours"), [
    (64, 64, torch.float32, True), (65, 2, torch.float32, False), (2, 65, torch.float32, False),
    (4, 3, torch.float64, False), (4, 3, torch.bfloat16, False)])
def test_kernels_multiply_float32_of_at_most_64_rows(gpu, n, h, dtype, ours):
    left, right = torch.randn(n, 5, 6).to(dtype), torch.randn(h, 5, 6).to(dtype)
    torch.testing.assert_close(projected._inner(left, right), left.flatten(1) @ right.flatten(1).T)
    assert gpu == ["inner"] * ours
    coefficients, slices = torch.randn(n, h).to(dtype), right.flatten(1)
    torch.testing.assert_close(projected._combine(coefficients, slices), coefficients @ slices)
    assert gpu == ["inner", "combine"] * ours


def test_products_by_rows_are_those_of_matrices():
    left, right = torch.randn(4, 5, 6), torch.randn(3, 5, 6)
    torch.testing.assert_close(projected._inner_by_rows(left, right),
                               torch.einsum("noi,hoi->nh", left, right))


@pytest.mark.parametrize(("text", "why"), [
    ("raise ImportError('no triton here')", "no triton here"),
    ("raise OSError('libtriton.so\\nis damaged')", "libtriton.so is damaged")])
def test_torch_stands_in_for_a_triton_that_does_not_import(text, why, tmp_path, monkeypatch,
                                                           capsys):
    (tmp_path / "triton.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delattr(planearly.model, "kernels", raising=False)
    for name in [*sys.modules]:
        if name.split(".")[0] == "triton" or name == "planearly.model.kernels":
            monkeypatch.delitem(sys.modules, name)
    assert projected._kernels(GPU) is None and projected._kernels(GPU) is None
    assert capsys.readouterr().err == (
        "projected networks use torch's slower products on cuda:0: Triton does not work "
        f"({why})\n")


def test_torch_stands_in_for_kernels_that_the_device_refuses(monkeypatch, capsys):
    tried = []

    def check(device):
        tried.append(device)
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(planearly.model, "kernels", SimpleNamespace(check=check), raising=False)
    assert projected._kernels(GPU) is None and projected._kernels(GPU) is None
    assert tried == [GPU]
    assert "(Failed to find C compiler.)" in capsys.readouterr().err


def test_full_memory_is_no_reason_to_go_without_kernels(monkeypatch, capsys):
    answers = [torch.OutOfMemoryError("full"), None]

    def check(device):
        if error := answers.pop(0):
            raise error

    kernels = SimpleNamespace(check=check)
    monkeypatch.setattr(planearly.model, "kernels", kernels, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        projected._kernels(GPU)
    assert projected._kernels(GPU) is kernels
    assert capsys.readouterr().err == ""


def test_kernels_are_tried_before_the_first_step(tmp_path, monkeypatch):
    order = []
    begin = Projected.begin
    monkeypatch.setattr(projected, "_kernels", lambda device: order.append(device.type))
    monkeypatch.setattr(Projected, "begin", lambda self, groups: (
        order.append("begin"), begin(self, groups)))
    Projected(PLAIN, SETTINGS).to("cpu")
    assert order == ["cpu"]
    order.clear()
    loop.train(Projected(PLAIN, SETTINGS), Made(5), 1, TRAIN, tmp_path, name="t")
    assert order[:2] == ["cpu", "begin"]


def test_kernels_are_tried_before_the_first_step_of_a_divided_bank(monkeypatch):
    tried = []
    monkeypatch.setattr(projected, "_kernels", tried.append)
    monkeypatch.setattr(projected.sharding, "divide", lambda parameter, dim: parameter)
    Projected(PLAIN, SETTINGS).divide(False)
    assert [device.type for device in tried] == ["cpu"]
