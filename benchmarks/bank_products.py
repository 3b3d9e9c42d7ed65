"""A projected network's three products on a GPU: torch's beside ours, and what memory allows.

    python benchmarks/bank_products.py --json

Of n experts and h slices of 1,024 x 4,096: medians of `triton.testing.do_bench`, in microseconds.
For the coefficients torch has two: one product, and the sum of one for each row of the matrices,
which is what stands in where the kernels do not work. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

ROWS, COLUMNS = 1024, 4096
SIZES = [(16, 12), (16, 46), (32, 23), (64, 46)]


def products(n: int, h: int) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Each product by each of its ways."""
    from planearly.model import kernels, projected

    coefficients, slices, gradients = (
        torch.randn(*size, device="cuda")
        for size in ((n, h), (h, ROWS * COLUMNS), (n, ROWS * COLUMNS)))
    matrices = [each.view(-1, ROWS, COLUMNS) for each in (gradients, slices)]
    return {
        "coefficients times slices": {
            "torch": lambda: coefficients @ slices,
            "ours": lambda: kernels.combine(coefficients, slices)},
        "gradients times slices": {
            "torch": lambda: gradients @ slices.T,
            "torch by rows": lambda: projected._inner_by_rows(*matrices),
            "ours": lambda: kernels.inner(gradients, slices)},
        "coefficients times gradients": {
            "torch": lambda: coefficients.T @ gradients,
            "ours": lambda: kernels.combine(coefficients.T, gradients)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here, where these products are")
    from triton.testing import do_bench

    found = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, torch's float32 products in "
          f"precision '{torch.get_float32_matmul_precision()}'")
    for n, h in SIZES:
        for product, ways in products(n, h).items():
            spent = {way: 1e3 * do_bench(call, return_mode="median")
                     for way, call in ways.items()}
            found[f"{product}, n = {n}, h = {h}"] = spent
            print(f"n = {n:2} h = {h:2}  {product:28}  " + "  ".join(
                f"{way} {value:.0f}" for way, value in spent.items()), flush=True)
    if asked.json:
        print(json.dumps({"what": "microseconds of a product", "matrix": [ROWS, COLUMNS],
                          "products": found}))


if __name__ == "__main__":
    main()
