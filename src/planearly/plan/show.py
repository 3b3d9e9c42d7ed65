"""A plan and a ledger on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from planearly.plan.options import Row, method_of
from planearly.plan.recommend import Plan
from planearly.progress import PlainTable
from planearly.units import prefixed, short

COLUMNS = ("method", "ok", "tokens before", "per domain", "FLOPs in all", "hours before",
           "per domain", "in all", "money in all", "training GB", "perplexity")


def cells(plan: Plan, row: Row) -> list[str]:
    """A row of the table of methods, in the order of ``COLUMNS``."""
    costs = row.cost
    perplexity = "unknown"
    if row.perplexity:
        low, high = row.perplexity["ci95"]
        perplexity = f"{row.perplexity['perplexity']:.1f} ({low:.1f} to {high:.1f})"
    return [
        row.method, "yes" if row.feasible else "no",
        short(costs.generic.tokens), short(costs.specialization.tokens),
        f"{row.total.flops:.1e}".replace("+", ""), number(costs.generic.device_hours),
        number(costs.specialization.device_hours), number(row.total.device_hours),
        "-" if row.total.money is None else f"{row.total.money:,.0f} {plan.given.currency}",
        number(row.train_bytes_per_device / 1e9), perplexity,
    ]


def deployed(plan: Plan) -> list[str]:
    """One line for each deployed model: what inference costs."""
    lines: dict[tuple[int, int], tuple[str, list[str]]] = {}
    for row in plan.rows:
        costs = row.cost
        lines.setdefault(
            (costs.inference_params, costs.inference_flops),
            (f"{short(costs.inference_params)} parameters, {prefixed(costs.inference_flops)}FLOP "
             f"per token, {prefixed(row.inference_bytes)}B at {plan.given.quantization} with the "
             "key-value cache of one full context", []))[1].append(row.method)
    return [f"{', '.join(methods)}: {line}" for line, methods in lines.values()]


def crossings(plan: Plan) -> list[str]:
    """One line for each place where cost curves cross; methods that cost the same stand together.
    """
    lines: dict[tuple[str, str, str], list[str]] = {}
    for even in plan.break_evens:
        first = even["cheaper_below"]
        (other,) = set(even["methods"]) - {first}
        lines.setdefault((f"{even['domains']:.1f}", other, even["at"]), []).append(first)
    return [f"Up to {domains} domains {' or '.join(first)} is cheaper than {other}, at {at}"
            for (domains, other, at), first in lines.items()]


def number(value: float) -> str:
    """Hours and counts with about three digits."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def text(plan: Plan, console: Console) -> None:
    """Print the plan: the recommendation first, then everything it was chosen from."""
    given, setting = plan.given, plan.setting
    console.print(f"Recommended: [bold]{plan.recommended}[/bold]"
                  + (f" (expert: {plan.expert})" if method_of(plan.recommended).bank
                     else ""))
    console.print(f"Because {plan.reason}.\n", markup=False)
    keep = [i for i, name in enumerate(COLUMNS)
            if (name != "money in all" or given.price is not None)
            and (name != "perplexity" or any(row.perplexity for row in plan.rows))]
    table = PlainTable(box=None, pad_edge=False, padding=(0, 1))
    for i in keep:
        table.add_column(COLUMNS[i], justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in plan.rows:
        found = cells(plan, row)
        table.add_row(*(found[i] for i in keep),
                      style="bold" if row.method == plan.recommended else "")
    domains = "one domain" if given.total_domains == 1 else f"{given.total_domains} domains"
    console.print(f"All methods for {domains}, in device-hours of {setting.device.label}; of those "
                  "not feasible, what the budgets would buy:", markup=False)
    console.print(table)
    console.print()
    for row in plan.rows:
        if not row.feasible:
            console.print(f"{row.method} is not feasible: {row.why}.", markup=False)
    console.print()
    for line in deployed(plan):
        console.print(f"Inference: {line}.", markup=False)
    console.print()
    for line in crossings(plan):
        console.print(f"{line}.", markup=False)
    for note in plan.notes:
        console.print(f"Note: {note}.", markup=False)
    for line in sorted({row.perplexity_note for row in plan.rows if row.feasible}):
        console.print(f"Perplexity is {line}.", markup=False)


def predicted(found: dict[str, Any], console: Console) -> None:
    """Print the stages of :func:`planearly.plan.predict.predict`."""
    params = ", ".join(f"{name} {short(count)}" for name, count in found["params"].items())
    console.print(f"Parameters: {params}", markup=False)
    table = PlainTable("stage", "tokens", "FLOPs", "device-hours", "money", box=None)
    for entry in [*found["stages"], {"stage": "in all", **found["total"]}]:
        shared = entry.get("begun")  # by a plateau that is another of the stages
        table.add_row(entry["stage"] + (f" ({shared:.0%} shared)" if shared else ""),
                      short(entry["tokens"]), f"{entry['flops']:.2e}",
                      number(entry["device_hours"]),
                      "-" if entry["money"] is None else f"{entry['money']:,.2f}")
    console.print(table)
    if found["slices"]:
        console.print(f"Projected network: {found['slices']}.", markup=False)
    if found.get("note"):
        console.print(f"Note: {found['note']}.", markup=False)
    for corpus in found["corpora"]:
        console.print(f"The corpus {corpus['corpus']} has {short(corpus['tokens'])} tokens "
                      f"({corpus['licence']}); about {prefixed(corpus['downloads'])}B are "
                      "downloaded", markup=False)
    console.print(f"On {found['device']}; fine-tuning at its limits, early stopping ends sooner",
                  markup=False)


def ledger(found: dict[str, Any], console: Console) -> None:
    """Print the sums of :func:`planearly.cost.ledger.add_up`."""
    table = PlainTable(box=None, pad_edge=False, padding=(0, 1))
    for i, name in enumerate(("method", "domain", "tokens", "FLOPs", "device-hours", "predicted",
                              "money")):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)

    def add(method: str, domain: str, of: dict[str, Any]) -> None:
        guess, actual = of["predicted_hours"], of["actual_of_predicted"]
        table.add_row(
            method, domain, short(of["tokens"]), f"{of['flops']:.2e}".replace("+", ""),
            number(of["device_hours"]),
            "unknown" if guess is None else f"{number(guess)} ({guess / actual - 1:+.0%})",
            f"{of['money']:,.2f} {of['currency']}" if "money" in of else "-")

    for method, of in found["methods"].items():
        if of["generic"]["device_hours"]:
            add(method, "before any", of["generic"])
        for domain, sums in of["domains"].items():
            add(method, domain, sums)
        if len(of["domains"]) + bool(of["generic"]["device_hours"]) > 1:
            add(method, "in all", of["total"])
    add("every stage", "once", found["total"])
    console.print(table)
    console.print(f"On {', '.join(found['total']['devices']) or 'unknown devices'}. Predicted: the "
                  "cost model's device-hours of the training stages, and how far off.",
                  markup=False)
    saving = found["total"]["saving_hours"]
    if saving:
        console.print(f"Saving checkpoints took {number(saving)} device-hours more.", markup=False)
