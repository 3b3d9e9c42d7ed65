"""Perplexities of a model on files, as a table for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    """Print what :func:`planearly.evaluate.files.evaluate_files` returned."""
    table = Table("file", "perplexity", "95% interval", "bits per byte", "tokens")
    for name, one in [*result["files"].items(), ("all", result)]:
        low, high = one["ci95"]
        table.add_row(name, f"{one['perplexity']:.2f}", f"{low:.2f} to {high:.2f}",
                      f"{one['bits_per_byte']:.3f}", f"{one['tokens']}")
    Console().print(table)
