"""The bank's products in Triton, by its interpreter; tests/test_cuda.py has them on a GPU."""

import os
import subprocess
import sys

import pytest

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
"""


def test_products_are_those_of_matrices():
    pytest.importorskip("triton", reason="of torch's builds for GPUs")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
