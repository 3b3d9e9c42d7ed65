"""The ledger: what every stage of every run cost, beside what it was predicted to.

A stage's manifest holds an entry ``cost`` made by :func:`book`: always tokens, FLOPs, device-hours
and the device's name together, and money when a price is known. :func:`total` is how entries are
added up everywhere: what a method cost is the total over the stages with a cost that its model was
made from (pretraining, choosing the expert, the teacher's, fine-tuning), and :func:`paid_once` says
which of them were paid before the domain was known. :func:`add_up` does so for run folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from planearly import keys, methods
from planearly.cost import devices
from planearly.errors import UserError
from planearly.files import read_json

UNKNOWN = "unknown"


def book(
    stage: str, tokens: float, flops: float, seconds: float, device: str | None = None, *,
    price_per_hour: float | None = None, currency: str = "USD", saving_seconds: float = 0.0,
    processes: int = 1, sharing: float = 1.0, teacher: tuple[float, int] | None = None,
) -> dict[str, Any]:
    """A ledger entry.

    Args:
        stage: its name, for the record.
        tokens: tokens trained on, or read.
        flops: floating-point operations, by :mod:`planearly.model.flops`.
        seconds: device-seconds: time on the clock times the number of devices; where others had the
            device too, a part of it.
        device: what the driver calls it; None is this machine's.
        saving_seconds: device-seconds that checkpoints took, not in ``seconds``: they depend on
            the disk and on the interval, not on the method.
        processes: that trained together, each on a device.
        sharing: how many had the device meanwhile, on average.
        teacher: how many of the operations are another model's, that taught this one, and its
            width, on which the time that they take depends.

    Returns:
        ``stage``, ``tokens``, ``flops``, ``device_hours``, ``device``, ``utilisation`` of one
        device (against the data sheet and against the measured matrix rate, each a share or
        "unknown"), ``saving_hours`` if there were any, ``processes`` if there were several,
        ``sharing`` if others had the device too (how many had it), ``teacher`` (``flops`` and
        ``d_model``) if there was one, and ``money`` with its ``currency`` if a price is given, for
        both kinds of hours.
    """
    name = device or devices.here()
    entry: dict[str, Any] = {
        "stage": stage, "tokens": int(tokens), "flops": float(flops),
        "device_hours": seconds / 3600, "device": name,
        "utilisation": utilisation(name, flops, seconds),
    }
    if sharing > 1.01:
        entry["sharing"] = sharing
    if saving_seconds:
        entry["saving_hours"] = saving_seconds / 3600
    if processes > 1:
        entry["processes"] = processes
    if teacher:
        entry["teacher"] = {"flops": float(teacher[0]), "d_model": teacher[1]}
    if price_per_hour is not None:
        entry["money"] = (seconds + saving_seconds) / 3600 * price_per_hour
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

    None if the device is unknown, the stage trains no model, or it was taught and does not tell by
    what, as older ones do not.
    """
    width = manifest.get("shape", {}).get("d_model")
    if not width or not entry.get("flops"):
        return None
    try:
        device = devices.find(entry["device"], devices.in_bf16(_precision(manifest)),
                              round(entry.get("sharing", 1)))
    except UserError:
        return None
    if "teacher" not in entry and "distill" in manifest.get("settings", {}):
        return None
    kind, method, _ = place({"stage": "", **manifest})
    row = methods.TABLE.get(method.removesuffix(methods.PLATEAU))
    if (kind == "pretrain" and row is not None and row.bank == "projected"
            and not row.adapts):  # which goes on as a dense model
        return _projected_seconds(device, entry, manifest) / 3600
    taught = entry.get("teacher", {"flops": 0.0, "d_model": width})
    own = _dense_seconds(device, entry, manifest, entry["flops"] - taught["flops"])
    return (own + device.seconds(taught["flops"], taught["d_model"])) / 3600


def _precision(manifest: Mapping[str, Any]) -> str | None:
    """What the recipe of a training stage, of choosing an expert or of scoring text named."""
    settings = manifest.get("settings", {})
    return settings.get("precision") or next(
        (settings[key].get("precision") for key in ("train", "finetune") if key in settings), None)


def _dense_seconds(device: devices.Device, entry: Mapping[str, Any], manifest: Mapping[str, Any],
                   flops: float) -> float:
    """Device-seconds that the cost model gives for the ``flops`` of a stage's model: at least what
    starting the operations of its steps takes, where the stage says how large a step is."""
    shape, train = manifest["shape"], manifest.get("settings", {}).get("train", {})
    steps = entry["tokens"] / train["batch_tokens"] if train.get("batch_tokens") else 0.0
    return max(device.seconds(flops, shape["d_model"]),
               device.least_seconds(steps, shape.get("layers", 0)))


def _projected_seconds(device: devices.Device, entry: Mapping[str, Any],
                       manifest: Mapping[str, Any]) -> float:
    """Device-seconds that the cost model gives for a projected network's training."""
    settings = manifest.get("settings", {})
    if "projected" not in settings:  # nobody says how much is projected
        return _dense_seconds(device, entry, manifest, entry["flops"]) * (
            device.projection_overhead or 1.0)
    from planearly.cost import model  # with torch, which other stages' entries do without

    how = model.Projecting(
        model.Shape(**manifest["shape"]), keys.Projected(**settings["projected"]),
        settings["train"]["optimizer"]["preset"], entry.get("processes", 1))
    plain = _dense_seconds(device, entry, manifest, entry["flops"] - settings["steps"] *
                           model.flops.projection_per_step(how.shape, how.projected,
                                                           how.projected.at_once))
    return plain + model.projecting_adds(device, how, settings["steps"], plain)


def add_up(folders: Iterable[Path]) -> dict[str, Any]:
    """Costs of run folders: every stage, per method, per method and domain, and in all.

    A stage that several methods or folders share is counted once in ``total`` and in each method
    that is built on it.

    Returns:
        ``stages``: entries with ``predicted_hours`` (or None) and ``folder``; ``methods``: name to
        ``generic``, ``domains`` (name to sums), ``specialization`` (their sum) and ``total``;
        ``total``. Sums are as of :func:`total`.

    Raises:
        UserError: a folder without finished stages.
    """
    stages: dict[str, dict[str, Any]] = {}
    for root in folders:
        found = [(manifest, path.parent) for path in sorted(root.rglob("manifest.json"))
                 if isinstance(manifest := read_json(path), dict)
                 and "fingerprint" in manifest and "stage" in manifest]
        if not found:
            raise UserError(f"{root} holds no finished stages: give the folder of a run")
        for manifest, folder in found:
            stages.setdefault(manifest["fingerprint"],
                              {"manifest": manifest, "folder": str(folder)})
    for made in stages.values():
        made["entry"] = _entry(made["manifest"], made["folder"])
    methods: dict[str, Any] = {}
    for fingerprint, made in stages.items():
        kind, method, domain = place(made["manifest"])
        if kind == "specialize":
            used = [f for f in _ancestors(fingerprint, stages) if "cost" in stages[f]["manifest"]]
            of = methods.setdefault(method, {"generic": set(), "domains": {}})
            own = of["domains"].setdefault(domain, set())
            for each in used:
                if paid_once(stages[each]["manifest"]):
                    of["generic"].add(each)
                else:
                    own.add(each)
    return {
        "stages": [made["entry"] for made in stages.values()],
        "methods": {name: _summed_method(of, stages) for name, of in sorted(methods.items())},
        "total": counted_once(stages.values()),
    }


def counted_once(stages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """As :func:`total`, without the steps that a training took over from another of the stages.

    Args:
        stages: ``entry``, ``manifest`` and ``folder`` of each.
    """
    stages = list(stages)
    names = {Path(made["folder"]).name for made in stages}
    whole = total(made["entry"] for made in stages)
    for made in stages:
        begun, booked = made["manifest"].get("begun"), made["entry"]
        if begun and begun.get("from") in names:
            share = begun["tokens"] / booked["tokens"]
            whole["tokens"] -= begun["tokens"]
            whole["flops"] -= share * booked["flops"]
            shared, saved = begun["device_hours"], begun.get("saving_hours", 0.0)
            whole["device_hours"] -= shared
            whole["saving_hours"] -= saved
            if "money" in booked:
                whole["money"] -= booked["money"] * (shared + saved) / (
                    booked["device_hours"] + booked.get("saving_hours", 0.0))
    return whole


def _entry(manifest: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A stage's entry; a stage that trains nothing has its time only."""
    booked = manifest.get("cost") or {
        "stage": manifest["stage"], "tokens": 0, "flops": 0.0,
        "device_hours": seconds_of(manifest) / 3600, "device": UNKNOWN,
    }
    return {**booked, "stage": manifest["stage"], "folder": folder,
            "predicted_hours": predicted_hours(booked, manifest)}


def seconds_of(manifest: Mapping[str, Any]) -> float:
    """Device-seconds of a stage without a cost of its own; older ones tell those on the clock."""
    return float(manifest.get("device_seconds", manifest.get("seconds", 0.0)))


def place(manifest: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Kind, method and domain of a stage (None: paid once, before the domain is known).

    A training stage says it itself; of others, and in older run folders, its name does.
    """
    kind, method, domain = parts(manifest["stage"])
    if "method" in manifest:
        return kind, manifest["method"], manifest["domain"]
    return kind, method, domain


def paid_once(manifest: Mapping[str, Any]) -> bool:
    """Whether a stage is paid once for all domains, and not for each anew."""
    return place(manifest)[2] is None


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
    def summed(of: Iterable[str]) -> dict[str, Any]:
        return counted_once(stages[f] for f in sorted(of))

    own = set().union(*of["domains"].values())
    return {
        "generic": summed(of["generic"]),
        "domains": {name: summed(used) for name, used in sorted(of["domains"].items())},
        "specialization": summed(own),
        "total": summed(own | of["generic"]),
    }


def total(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Ledger entries added up.

    Returns:
        ``tokens``, ``flops``, ``device_hours``, ``saving_hours``, ``predicted_hours`` (over the
        entries that have one; None: none has), ``actual_of_predicted`` (their device-hours),
        ``devices``, and ``money`` with its ``currency`` where any has it and all that have it have
        the same currency.
    """
    entries = list(entries)
    predicted = [e for e in entries if e.get("predicted_hours") is not None]
    priced = [e for e in entries if e.get("money") is not None]
    found: dict[str, Any] = {
        "tokens": sum(e["tokens"] for e in entries), "flops": sum(e["flops"] for e in entries),
        "device_hours": sum(e["device_hours"] for e in entries),
        "saving_hours": sum(e.get("saving_hours", 0.0) for e in entries),
        "predicted_hours": sum(e["predicted_hours"] for e in predicted) if predicted else None,
        "actual_of_predicted": sum(e["device_hours"] for e in predicted),
        "devices": sorted({e["device"] for e in entries} - {UNKNOWN}),
    }
    if len(currencies := {e.get("currency", "") for e in priced}) == 1:
        found["money"] = sum(e["money"] for e in priced)
        found["currency"] = currencies.pop()
    return found
