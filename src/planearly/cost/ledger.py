"""The ledger: what every stage of every run cost, beside what it was predicted to.

A stage's manifest holds an entry ``cost`` made by :func:`book`: always tokens, FLOPs, device-hours
and the device's name together, and money when a price is known. :func:`add_up` sums the entries of
run folders per method and per domain, following which stage was made from which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from planearly.cost import devices
from planearly.errors import UserError
from planearly.files import read_json

UNKNOWN = "unknown"


def book(
    stage: str, tokens: float, flops: float, seconds: float, device: str | None = None, *,
    price_per_hour: float | None = None, currency: str = "USD",
) -> dict[str, Any]:
    """A ledger entry.

    Args:
        stage: its name, for the record.
        tokens: tokens trained on, or read.
        flops: floating-point operations, by :mod:`planearly.model.flops`.
        seconds: device-seconds: time on the clock times the number of devices.
        device: what the driver calls it; None is this machine's.

    Returns:
        ``stage``, ``tokens``, ``flops``, ``device_hours``, ``device``, ``utilisation`` of one
        device (against the data sheet and against the measured matrix rate, each a share or
        "unknown"), and ``money`` with its ``currency`` if a price is given.
    """
    name = device or devices.here()
    entry: dict[str, Any] = {
        "stage": stage, "tokens": int(tokens), "flops": float(flops),
        "device_hours": seconds / 3600, "device": name,
        "utilisation": utilisation(name, flops, seconds),
    }
    if price_per_hour is not None:
        entry["money"] = entry["device_hours"] * price_per_hour
        entry["currency"] = currency
    return entry


def utilisation(device: str, flops: float, seconds: float) -> dict[str, float | str]:
    """Share of the data sheet's and of the measured matrix rate; "unknown" where there is none."""
    try:
        known = devices.find(device)
    except UserError:
        return {"data_sheet": UNKNOWN, "measured": UNKNOWN}
    achieved = flops / seconds if seconds > 0 else 0.0
    measured = achieved / known.rate if known.calibrated and achieved else None
    sheet = achieved / known.peak if known.peak and achieved else None
    return {"data_sheet": sheet or UNKNOWN, "measured": measured or UNKNOWN}


def predicted_hours(entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> float | None:
    """Device-hours that the cost model gives for a training stage on the same device.

    None if the device is unknown or the stage trains no model.
    """
    width = manifest.get("shape", {}).get("d_model")
    if not width or not entry.get("flops"):
        return None
    try:
        device = devices.find(entry["device"])
    except UserError:
        return None
    hours = device.seconds(entry["flops"], width) / 3600
    projects = str(manifest.get("stage", "")).startswith("pretrain/slm-pn")
    if projects and device.projection_overhead is not None:
        hours *= device.projection_overhead
    return hours


def add_up(folders: Iterable[Path]) -> dict[str, Any]:
    """Costs of run folders: every stage, per method, per method and domain, and in all.

    A stage that several methods or folders share is counted once in ``total`` and in each method
    that is built on it.

    Returns:
        ``stages``: entries with ``predicted_hours`` (or None) and ``folder``; ``methods``: name to
        ``generic``, ``domains`` (name to sums), ``specialization`` (their sum) and ``total``;
        ``total``. Sums have ``tokens``, ``flops``, ``device_hours``, ``predicted_hours`` (over
        the stages that have one), ``actual_of_predicted`` (their device-hours), ``devices`` and
        ``money``.

    Raises:
        UserError: a folder without finished stages.
    """
    stages: dict[str, dict[str, Any]] = {}
    for root in folders:
        found = sorted(root.rglob("manifest.json")) if root.is_dir() else []
        if not found:
            raise UserError(f"{root} holds no finished stages: give the folder of a run")
        for path in found:
            manifest = read_json(path)
            if "fingerprint" in manifest and "stage" in manifest:
                stages.setdefault(manifest["fingerprint"],
                                  {"manifest": manifest, "folder": str(path.parent)})
    for made in stages.values():
        made["entry"] = _entry(made["manifest"], made["folder"])
    methods: dict[str, Any] = {}
    for fingerprint, made in stages.items():
        kind, method, domain = parts(made["manifest"]["stage"])
        if kind == "specialize":
            used = [f for f in _ancestors(fingerprint, stages)
                    if parts(stages[f]["manifest"]["stage"])[0] in ("pretrain", "specialize")]
            of = methods.setdefault(method, {"generic": set(), "domains": {}})
            own = of["domains"].setdefault(domain, set())
            for each in used:
                if parts(stages[each]["manifest"]["stage"])[2] is None:
                    of["generic"].add(each)
                else:
                    own.add(each)
    return {
        "stages": [made["entry"] for made in stages.values()],
        "methods": {name: _summed_method(of, stages) for name, of in sorted(methods.items())},
        "total": _once(_sum([made["entry"] for made in stages.values()]), stages.values()),
    }


def _once(total: dict[str, Any], stages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A sum without the steps that a run shares with the longer one it branched off."""
    for made in stages:
        begun, booked = made["manifest"].get("begun"), made["entry"]
        if begun:
            share = begun["tokens"] / booked["tokens"]
            total["tokens"] -= begun["tokens"]
            total["flops"] -= share * booked["flops"]
            total["device_hours"] -= begun["device_hours"]
            if "money" in booked:
                total["money"] -= booked["money"] * begun["device_hours"] / booked["device_hours"]
    return total


def _entry(manifest: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A stage's entry; a stage that trains nothing has its time only."""
    booked = manifest.get("cost") or {
        "stage": manifest["stage"], "tokens": 0, "flops": 0.0,
        "device_hours": manifest.get("seconds", 0.0) / 3600, "device": UNKNOWN,
    }
    return {**booked, "stage": manifest["stage"], "folder": folder,
            "predicted_hours": predicted_hours(booked, manifest)}


def parts(stage: str) -> tuple[str, str, str | None]:
    """``pretrain/slm-is.arxiv`` as kind, method and domain (None: before the domain is known)."""
    kind, _, rest = stage.partition("/")
    method, _, domain = rest.partition(".")
    return kind, method, domain or None


def _ancestors(fingerprint: str, stages: Mapping[str, Any]) -> list[str]:
    """A stage and all stages it was made from."""
    found: list[str] = []
    waiting = [fingerprint]
    while waiting:
        each = waiting.pop()
        if each in stages and each not in found:
            found.append(each)
            waiting.extend(stages[each]["manifest"].get("inputs", {}).values())
    return found


def _summed_method(of: Mapping[str, Any], stages: Mapping[str, Any]) -> dict[str, Any]:
    def entries(of: Iterable[str]) -> list[dict[str, Any]]:
        return [stages[f]["entry"] for f in sorted(of)]

    own = set().union(*of["domains"].values())
    return {
        "generic": _sum(entries(of["generic"])),
        "domains": {name: _sum(entries(used)) for name, used in sorted(of["domains"].items())},
        "specialization": _sum(entries(own)),
        "total": _sum(entries(own | of["generic"])),
    }


def _sum(entries: list[dict[str, Any]]) -> dict[str, Any]:
    predicted = [e for e in entries if e["predicted_hours"] is not None]
    priced = [e for e in entries if "money" in e]
    total: dict[str, Any] = {
        "tokens": sum(e["tokens"] for e in entries), "flops": sum(e["flops"] for e in entries),
        "device_hours": sum(e["device_hours"] for e in entries),
        "predicted_hours": sum(e["predicted_hours"] for e in predicted) if predicted else None,
        "actual_of_predicted": sum(e["device_hours"] for e in predicted),
        "devices": sorted({e["device"] for e in entries} - {UNKNOWN}),
    }
    if priced:
        total["money"] = sum(e["money"] for e in priced)
        total["currency"] = priced[0].get("currency", "")
    return total
