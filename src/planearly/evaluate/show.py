"""Perplexities of a model on files, as a table for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from planearly.progress import PlainTable


def show(result: dict[str, Any]) -> None:
    """Print what :func:`planearly.evaluate.files.evaluate_files` returned."""
    table = PlainTable("file", "perplexity", "95% interval", "bits per byte", "tokens")
    for name, one in [*result["files"].items(), ("all", result)]:
        low, high = one["ci95"]
        table.add_row(name, _perplexity(one["perplexity"]),
                      f"{_perplexity(low)} to {_perplexity(high)}",
                      f"{one['bits_per_byte']:.3f}", f"{one['tokens']}")
    Console().print(table)


def _perplexity(value: float) -> str:
    """What a table shows of a perplexity: beyond 1e300 the figure says no more than that."""
    return f"{value:.2f}" if value < 1e300 else "above 1e300"
