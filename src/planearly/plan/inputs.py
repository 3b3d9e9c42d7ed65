"""What the user has and wants, and how it is typed: counts or paths, hours or money, folders or
NAME:PARAMETERS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planearly import methods, storage, units
from planearly.cluster import shared
from planearly.cost import devices
from planearly.data import corpora
from planearly.data.inputs import resolve
from planearly.errors import UserError
from planearly.files import read_json
from planearly.model import reading, starts
from planearly.plan import law, sizes
from planearly.progress import say

if TYPE_CHECKING:
    from planearly.cost.devices import Device
    from planearly.methods import Method
    from planearly.plan.law import Law

WIDE = 0.7
"""Entropy of the domain's cluster histogram over ln k from which a domain counts as wide: the
paper's wikipedia and openwebtext2 lie above from k = 64 up, and gain nothing from one expert."""
_BYTES_PER_TOKEN = 4.2
"""Of English text and a vocabulary of 32k; for sizing a corpus given by path."""
_PACKED = {".zst": 3.0, ".gz": 2.8, ".parquet": 2.0}
"""Times that text is larger than its file of this kind, roughly."""


@dataclass(frozen=True)
class OpenModel:
    """A model that exists already."""

    name: str
    """Its folder, or what it is called."""
    params: int
    context: int | None = None
    """Most tokens that it reads, where known."""


@dataclass(frozen=True)
class PlanInput:
    """What the user has and wants. Hours are device-hours; None means no limit was stated."""

    device: Device
    limit: int | None = None
    """Parameters admitted at inference."""
    generic_tokens: int = 0
    spec_tokens: int = 1_000_000
    """Tokens of one domain's specialization set."""
    domains: int = 1
    domains_later: int = 0
    devices: int = 1
    generic_hours: float | None = None
    specialization_hours: float | None = None
    """Per domain."""
    price: float | None = None
    currency: str = "USD"
    quantization: str = "bf16"
    checkpoint: OpenModel | None = None
    teacher: OpenModel | None = None
    entropy: float | None = None
    """Of the domain's cluster histogram, in nats, with ``clusters`` clusters."""
    clusters: int | None = None
    foreseen: float | None = None
    """Nats per token by which a trigram model of the corpus resampled for the domain foretells it
    better than one of the corpus as it is (:mod:`planearly.stages.foresight`)."""
    windows: int | None = None
    """Windows of the specialization set; None: its tokens over the context."""
    laws: dict[str, Law] = field(default_factory=dict)
    """Fitted loss laws by method, and by :data:`planearly.plan.law.LINE` that of several."""
    measured: list[dict[str, Any]] = field(default_factory=list)
    """What the runs that they are fitted to found (:func:`planearly.plan.law.measured`)."""
    paper: bool = False
    """Whether the paper's Figure 1 decides, whatever such runs and ``foreseen`` say."""

    @property
    def total_domains(self) -> int:
        return self.domains + self.domains_later

    @property
    def wide(self) -> bool:
        """Whether the domain is known to spread over many clusters."""
        return self.entropy is not None and self.clusters is not None \
            and self.entropy >= WIDE * math.log(self.clusters)

    def expert(self, method: Method) -> str:
        """How a method with experts should choose the domain's, by a rule of the recipe's key.

        A mixture's are never blended: the average of models that were never close is worse than one
        of them.
        """
        return "blend" if self.wide and method.bank == "projected" else "lowest-loss"


def check(given: PlanInput) -> None:
    """Refuse an input that cannot be.

    Raises:
        UserError: what it is.
    """
    def need(ok: bool, what: str) -> None:
        if not ok:
            raise UserError(what)

    need(given.domains + given.domains_later >= 1, "--domains: plan for at least one domain")
    need(given.domains >= 0 and given.domains_later >= 0, "--domains: it cannot be negative")
    need(given.devices >= 1, "--devices: at least one device is needed")
    need(given.spec_tokens >= 1, "--spec-tokens: a specialization set needs at least one token")
    need(given.generic_tokens >= 0, "--generic-tokens: it cannot be negative")
    need(given.limit is None or given.limit > 0, "the inference limit must be positive")
    need(given.windows is None or given.windows >= 1, "--windows: a set has at least one")
    for flag, hours in (("--generic-hours", given.generic_hours),
                        ("--specialization-hours", given.specialization_hours)):
        need(hours is None or (hours >= 0 and math.isfinite(hours)),
             f"{flag}: give a finite number of hours that is not negative")
    need((given.entropy is None) == (given.clusters is None),
         "--entropy goes with --clusters: give both or neither")
    need(given.foreseen is None or math.isfinite(given.foreseen),
         "--foreseen: give a finite number of nats per token")
    if given.entropy is not None and given.clusters is not None:
        need(given.clusters >= 2, "--clusters: a histogram needs at least two")
        need(0 <= given.entropy <= math.log(given.clusters) + 1e-6,
             f"--entropy: {given.clusters} clusters have at most "
             f"{math.log(given.clusters):.2f} nats, not {given.entropy:g}")


def read(
    *, device: Device, inference_params: str | None = None, inference_bytes: str | None = None,
    inference_speed: float | None = None, inference_device: str | None = None,
    quantization: str = "bf16", generic_tokens: str = "0", spec_tokens: Sequence[str] = (),
    domains: str | None = None, domains_later: str = "0", devices: int = 1,
    generic_hours: str | None = None, specialization_hours: str | None = None,
    generic_money: str | None = None, specialization_money: str | None = None,
    price: str | None = None, currency: str | None = None, checkpoint: str | None = None,
    teacher: str | None = None, entropy: float | None = None, clusters: int | None = None,
    foreseen: float | None = None, windows: int | None = None, results: Sequence[Path] = (),
    paper: bool = False,
) -> PlanInput:
    """What the options of ``planearly plan`` say, under their names.

    Raises:
        UserError: a quantity that cannot be read, or money of two currencies; the option is named.
    """
    sizes.bits(quantization)
    amounts, currency = _money({"price": price, "generic-money": generic_money,
                                "specialization-money": specialization_money}, currency)
    laws, measured = evidence(results)
    sets = [tokens(item, "--spec-tokens") for item in spec_tokens or ["1M"]]
    return PlanInput(
        device=device,
        limit=limit(inference_params, inference_bytes, inference_speed, inference_device, device,
                    quantization),
        generic_tokens=tokens(generic_tokens, "--generic-tokens"),
        spec_tokens=round(sum(sets) / len(sets)),
        domains=len(sets) if domains is None else units.count(domains, "--domains"),
        domains_later=units.count(domains_later, "--domains-later"), devices=devices,
        generic_hours=hours(generic_hours, amounts, "generic"),
        specialization_hours=hours(specialization_hours, amounts, "specialization"),
        price=amounts.get("price"), currency=currency, quantization=quantization,
        checkpoint=model(checkpoint, "--checkpoint"), teacher=model(teacher, "--teacher"),
        entropy=entropy, clusters=clusters, foreseen=foreseen, windows=windows, laws=laws,
        measured=measured, paper=paper,
    )


def paths(texts: Sequence[str]) -> list[str]:
    """Those that name files, folders or corpora, for the recipes of the plan."""
    return [text for text in texts
            if Path(text).exists() or text in corpora.TABLE or storage.is_url(text)]


def limit(params: str | None, size: str | None, speed: float | None, on: str | None,
          trained_on: Device, quantization: str) -> int | None:
    """Parameters admitted at inference; the smallest of the limits given."""
    limits = []
    if params is not None:
        limits.append(units.count(params, "--inference-params"))
    if size is not None:
        limits.append(sizes.limit_from_bytes(units.size(size, "--inference-bytes"), quantization))
    if speed is not None:
        if not 1e-3 <= speed <= 1e9:
            raise UserError(f"--inference-speed: {speed:g} tokens/s is no speed of a model")
        device = trained_on if on is None else devices.find(on)
        limits.append(sizes.limit_from_speed(speed, device, quantization))
    return min(limits, default=None)


def tokens(given: object, flag: str) -> int:
    """A count, or the tokens of a corpus by name, or about those of a file, a folder (also by URL)
    or a token dataset."""
    text = str(given)
    path = Path(text)
    if not storage.is_url(text) and not (text and path.exists()):
        if text in corpora.TABLE:
            return round(corpora.TABLE[text].tokens)
        try:
            return units.count(text, flag)
        except UserError:
            if "/" in text or path.suffix:
                raise UserError(f"{flag}: {text} does not exist: check the path, or give "
                                "a number of tokens") from None
            raise
    if (path / "dataset.json").is_file():
        dataset = read_json(path / "dataset.json")
        many = dataset.get("n_tokens") if isinstance(dataset, dict) else None
        if type(many) is int:  # else a file of the user's own
            return many
    if path.suffix == ".json" and shared.is_shared(path):
        raise UserError(f"{flag}: {text} is a histogram, which does not tell how many tokens its "
                        "documents have: give a number of tokens")
    size = sum(unit.size * _PACKED.get(Path(unit.path).suffix, 1.0) for unit in resolve([text]))
    if size == 0:
        raise UserError(f"{flag}: {text} holds no text: name files that do, or give a number of "
                        "tokens")
    return max(round(size / _BYTES_PER_TOKEN), 1)


def _money(texts: Mapping[str, str | None],
           currency: str | None) -> tuple[dict[str, float], str]:
    """The amounts of options, and the currency that they are in."""
    amounts, by = {}, "--currency"
    for name, text in texts.items():
        if text is not None:
            amounts[name], said = units.money(text, f"--{name}")
            alike = next((of for sign, of in units.CURRENCIES.items() if sign in text), ())
            if said and currency and said != currency.upper() and currency.upper() not in alike:
                raise UserError(f"--{name}: '{text}' is money in {said}, and {by} says "
                                f"{currency}: give all of it in one currency")
            if said and not currency:
                currency, by = said, f"--{name}"
    return amounts, currency or "USD"


def hours(text: str | None, amounts: Mapping[str, float], what: str) -> float | None:
    """Device-hours from hours or, at the price, from money; the smaller where both are given."""
    given = []
    if text is not None:
        given.append(units.hours(text, f"--{what}-hours"))
    if f"{what}-money" in amounts:
        if not amounts.get("price"):
            raise UserError(f"--{what}-money needs --price, the money per device-hour")
        given.append(amounts[f"{what}-money"] / amounts["price"])
    return min(given, default=None)


def model(text: str | None, flag: str) -> OpenModel | None:
    """A model folder, also by URL, or NAME:PARAMETERS.

    Raises:
        UserError: a folder that no run would open, or a name without a number.
    """
    if text is None:
        return None
    folder = starts.located(text) if storage.is_url(text) else Path(text)
    if folder.is_dir():
        reach = reading.config(folder).get("max_position_embeddings")
        return OpenModel(text, parameters(folder), reach if isinstance(reach, int) else None)
    name, separator, params = text.rpartition(":")
    if not separator:
        raise UserError(f"{flag}: '{text}' is not a folder; write NAME:PARAMETERS, as "
                        f"'{text}:135M'")
    return OpenModel(name, units.count(params, flag))


def parameters(folder: Path) -> int:
    """Numbers in the weights of a model folder, from their headers alone.

    Raises:
        UserError: as :func:`planearly.model.reading.check_weights`.
    """
    from safetensors import safe_open

    reading.check_weights(folder)
    total = 0
    for file in reading.weight_files(folder):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    return total


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row of results that no run writes.

    Raises:
        UserError: which of its values it is.
    """
    def number(value: Any) -> bool:
        return value is None or (type(value) in (int, float) and value >= 0)

    cost = row.get("generic_cost") or {}
    fits = {"method": isinstance(row["method"], str), "domain": isinstance(row["domain"], str),
            "settings": isinstance(row.get("settings", {}), dict),
            "generic_cost": isinstance(cost, dict) and number(cost.get("tokens")),
            **{key: number(row.get(key)) for key in (*law.AXES.values(), "ppl_after")}}
    wrong = [key for key, fit in fits.items() if not fit]
    if wrong:
        raise UserError(f"{where}: '{wrong[0]}' is {row[wrong[0]]!r}, which no run writes: give "
                        "the file as a run or a study wrote it")


def evidence(files: Sequence[Path]) -> tuple[dict[str, Law], list[dict[str, Any]]]:
    """A law for each method that the rows support, and one for the line of those that adapt or not;
    the others stay unknown, and are named. And what was measured, by :func:`law.measured`."""
    rows: list[Any] = []
    for file in files:
        content = read_json(file)
        found = content.get("rows") if isinstance(content, dict) else None
        if not isinstance(found, list) or not all(
                isinstance(row, dict) and {"method", "domain"} <= row.keys() for row in found):
            raise UserError(f"{file} is not a results.json or study.json: it has no 'rows' with a "
                            "'method' and a 'domain' each")
        for number, row in enumerate(found, 1):
            _check_row(row, f"{file} row {number}")
        rows += law.plain(content)
    fitted, few = {}, []
    names = sorted({row["method"] for row in rows})
    for name in [*names, law.LINE] if rows else []:
        try:
            if name == law.LINE:
                fitted[name] = law.fit_line(rows)
            elif not (name in law.line() and methods.find(name).adapts):  # its law is the line's
                fitted[name] = law.fit(rows, name)
        except law.TooFew as reason:
            few.append((name, str(reason)))
        except UserError as reason:
            say(str(reason))
    if len(few) == 1:
        say(few[0][1])
    elif few:
        say(f"no law is fitted to the runs of {', '.join(name for name, _ in few)}, which are too "
            f"few: {law.NEEDED}")
    return fitted, law.measured(rows)
