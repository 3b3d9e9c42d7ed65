"""The verbs `plan`, `cost` and `calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planearly import units
from planearly.errors import UserError

if TYPE_CHECKING:
    from planearly.cost.devices import Device
    from planearly.plan.law import Law
    from planearly.plan.options import OpenModel

_BYTES_PER_TOKEN = 4.2
"""Of English text and a vocabulary of 32k; for sizing a corpus given by path."""
_PACKED = {".zst": 3.0, ".gz": 2.8, ".parquet": 2.0}
"""Times that text is larger than its file of this kind, roughly."""

Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Device_ = Annotated[str | None, typer.Option(
    help="a100, h100, l4, rtx-4090, ...; what the driver calls it; or here [default: here]")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(plan)
    app.command()(cost)
    app.command()(calibrate)


def plan(
    recipe: Annotated[str | None, typer.Argument(
        help="show what this recipe will cost instead of recommending a method")] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="its keys: key=value")] = None,
    inference_params: Annotated[str | None, typer.Option(
        help="limit on the deployed model: parameters, as 126M")] = None,
    inference_bytes: Annotated[str | None, typer.Option(
        help="the limit as bytes of weights, as 150MB, with --quantization")] = None,
    inference_speed: Annotated[float | None, typer.Option(
        help="the limit as tokens/s decoded on --inference-device")] = None,
    inference_device: Device_ = None,
    quantization: Annotated[str, typer.Option(
        help="of the deployed weights: bf16, q8_0, q4_k_m, ...")] = "bf16",
    generic_tokens: Annotated[str, typer.Option(
        help="generic corpus: tokens, as 150B, or a path")] = "0",
    spec_tokens: Annotated[list[str] | None, typer.Option(
        help="one domain's set: tokens, as 1M, or a path; again for each set")] = None,
    domains: Annotated[str | None, typer.Option(
        help="domains now [default: the number of --spec-tokens]")] = None,
    domains_later: Annotated[str, typer.Option(help="domains to come")] = "0",
    device: Device_ = None,
    devices: Annotated[int, typer.Option(help="how many of them")] = 1,
    generic_hours: Annotated[str | None, typer.Option(
        help="device-hours before the domain is known, as 650 or 90min")] = None,
    specialization_hours: Annotated[str | None, typer.Option(
        help="device-hours per domain")] = None,
    generic_money: Annotated[str | None, typer.Option(help="the same as money")] = None,
    specialization_money: Annotated[str | None, typer.Option(help="the same as money")] = None,
    price: Annotated[str | None, typer.Option(help="money per device-hour")] = None,
    currency: Annotated[str, typer.Option(help="of the money")] = "USD",
    checkpoint: Annotated[str | None, typer.Option(
        help="an open model to start from: a folder, or NAME:PARAMETERS")] = None,
    teacher: Annotated[str | None, typer.Option(
        help="a teacher that exists already: a folder, or NAME:PARAMETERS")] = None,
    entropy: Annotated[float | None, typer.Option(
        help="nats, of the domain's cluster histogram, with --clusters")] = None,
    clusters: Annotated[int | None, typer.Option(help="k of that histogram")] = None,
    windows: Annotated[int | None, typer.Option(help="windows of the specialization set")] = None,
    results: Annotated[list[Path] | None, typer.Option(
        help="results.json of your own small runs, to predict perplexity from")] = None,
    out: Annotated[Path | None, typer.Option(
        help="folder for plan.json, plan.html and recipes")] = None,
    as_json: Json = False,
) -> None:
    """Recommend a method, with its reason and what every method would cost."""
    from rich.console import Console

    from planearly.cost import devices as known
    from planearly.plan import options, recipes, recommend, show
    from planearly.plan.sizes import bits

    found = known.find(device)
    if recipe is not None:
        from planearly import config
        from planearly.plan.predict import predict

        stages = predict(config.load(recipe, settings or []), found)
        print(json.dumps(stages)) if as_json else show.predicted(stages, Console())
        return
    bits(quantization)
    per_hour = None if price is None else units.money(price, "--price")
    sets = spec_tokens or ["1M"]
    sizes = [_tokens(item, "--spec-tokens") for item in sets]
    now = len(sizes) if domains is None else units.count(domains, "--domains")
    made = recommend.recommend(options.PlanInput(
        device=found,
        limit=_limit(inference_params, inference_bytes, inference_speed,
                     inference_device, found, quantization),
        generic_tokens=_tokens(generic_tokens, "--generic-tokens"),
        spec_tokens=round(sum(sizes) / len(sizes)), domains=now,
        domains_later=units.count(domains_later, "--domains-later"), devices=devices,
        generic_hours=_hours(generic_hours, generic_money, per_hour, "generic"),
        specialization_hours=_hours(specialization_hours, specialization_money, per_hour,
                                    "specialization"),
        price=per_hour, currency=currency, quantization=quantization,
        checkpoint=_model(checkpoint, "--checkpoint"), teacher=_model(teacher, "--teacher"),
        entropy=entropy, clusters=clusters, windows=windows, laws=_laws(results or []),
    ))
    generic_paths = [generic_tokens] if Path(generic_tokens).exists() else []
    domain_paths = [item for item in sets if Path(item).exists()]
    output = made.to_dict()
    output["recipes"] = {row.method: recipes.recipe(made, row, generic_paths, domain_paths)
                         for row in made.rows if row.feasible}
    if out is not None:
        _write(out, made, output, generic_paths, domain_paths)
    if as_json:
        print(json.dumps(output))
        return
    show.text(made, Console())
    if out is not None:
        start = out / f"{made.recommended}.yaml"
        print(f"Recipes, plan.json and plan.html are in {out}"
              + (f"; start with: planearly run {start}" if start.exists() else ""))


def cost(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs")],
    as_json: Json = False,
) -> None:
    """Add up what runs cost, per method and domain, predicted beside actual."""
    from rich.console import Console

    from planearly.cost import ledger
    from planearly.plan import show

    found = ledger.add_up(folders)
    if as_json:
        print(json.dumps(found))
        return
    show.ledger(found, Console())


def calibrate(
    recipe: Annotated[str | None, typer.Argument(
        help="a recipe whose shapes are measured [default: nano, on a GPU slm-126m]")] = None,
    seconds: Annotated[float, typer.Option(help="of training steps, in all")] = 60.0,
) -> None:
    """Measure this device on real training steps; plans and ledgers then use what it did."""
    import torch

    from planearly import config
    from planearly.plan.calibrate import calibrate as measure

    if not 0 < seconds <= 3600:
        raise UserError("--seconds: give a number above 0 and at most 3600")
    name = recipe or ("slm-126m" if torch.cuda.is_available() else "nano")
    print(measure(config.load(name), seconds))


# Reading what the user typed ----------------------------------------------------------------------

def _limit(params: str | None, size: str | None, speed: float | None, on: str | None,
           trained_on: Device, quantization: str) -> int | None:
    """Parameters admitted at inference; the smallest of the limits given."""
    from planearly.cost import devices
    from planearly.plan import sizes

    limits = []
    if params is not None:
        limits.append(units.count(params, "--inference-params"))
    if size is not None:
        limits.append(sizes.limit_from_bytes(units.size(size, "--inference-bytes"), quantization))
    if speed is not None:
        device = trained_on if on is None else devices.find(on)
        limits.append(sizes.limit_from_speed(speed, device, quantization))
    return min(limits, default=None)


def _tokens(text: str, flag: str) -> int:
    """A count, or the estimated tokens of a file, a folder or a token dataset."""
    path = Path(text)
    if not path.exists():
        try:
            return units.count(text, flag)
        except UserError:
            if "/" in text or path.suffix:
                raise UserError(f"{flag}: {text} does not exist") from None
            raise
    if (path / "dataset.json").is_file():
        from planearly.files import read_json

        return int(read_json(path / "dataset.json")["n_tokens"])
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size * _PACKED.get(p.suffix, 1.0) for p in files)
    if size == 0:
        raise UserError(f"{flag}: {text} holds no text")
    return max(round(size / _BYTES_PER_TOKEN), 1)


def _hours(hours: str | None, amount: str | None, price: float | None, what: str) -> float | None:
    """Device-hours from hours or money; the smaller where both are given."""
    given = []
    if hours is not None:
        given.append(units.hours(hours, f"--{what}-hours"))
    if amount is not None:
        if not price:
            raise UserError(f"--{what}-money needs --price, the money per device-hour")
        given.append(units.money(amount, f"--{what}-money") / price)
    return min(given, default=None)


def _model(text: str | None, flag: str) -> OpenModel | None:
    """A model folder, or NAME:PARAMETERS."""
    if text is None:
        return None
    from planearly.files import read_json
    from planearly.plan.options import OpenModel

    folder = Path(text)
    if folder.is_dir():
        count = _parameters(folder)
        if not count:
            raise UserError(f"{flag}: {text} holds no .safetensors files: give a model folder")
        stated = folder / "config.json"
        reach = read_json(stated).get("max_position_embeddings") if stated.is_file() else None
        return OpenModel(text, count, reach)
    name, separator, params = text.rpartition(":")
    if not separator:
        raise UserError(f"{flag}: '{text}' is not a folder; write NAME:PARAMETERS, as "
                        f"'{text}:135M'")
    return OpenModel(name, units.count(params, flag))


def _parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, from their headers alone."""
    import math

    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    return total


def _laws(files: list[Path]) -> dict[str, Law]:
    """A law for each method that the rows support; the others stay unknown, and are named."""
    from planearly.files import read_json
    from planearly.plan import law
    from planearly.progress import say

    rows: list[Any] = []
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise UserError(f"{file} is not a results.json or study.json: it has no 'rows'")
        rows += law.plain(content)
    laws = {}
    for method in sorted({row["method"] for row in rows}):
        try:
            laws[method] = law.fit(rows, method)
        except UserError as reason:
            say(str(reason))
    return laws


def _write(out: Path, made: Any, output: dict[str, Any], generic: list[str],
           domains: list[str]) -> None:
    from markupsafe import Markup

    from planearly.files import atomic_write, write_json
    from planearly.plan import recipes, show

    recipes.write(made, out, generic, domains)
    write_json(out / "plan.json", output)
    page = Markup("<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' "
                  "content='width=device-width'><title>Plan</title><style>body{{font-family:"
                  "sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}table{{border-collapse:"
                  "collapse;display:block;overflow-x:auto}}td,th{{padding:.3em .6em;text-align:"
                  "left;border-bottom:1px solid #ddd}}svg{{max-width:40em}}</style>{}</html>")
    with atomic_write(out / "plan.html", "w") as handle:
        handle.write(page.format(show.section(made)))
