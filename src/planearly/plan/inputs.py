"""What a user types for a plan: counts or paths, hours or money, folders or NAME:PARAMETERS."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planearly import units
from planearly.cost import devices
from planearly.errors import UserError
from planearly.files import read_json
from planearly.plan import law, sizes
from planearly.plan.options import OpenModel
from planearly.progress import say

if TYPE_CHECKING:
    from planearly.cost.devices import Device
    from planearly.plan.law import Law

_BYTES_PER_TOKEN = 4.2
"""Of English text and a vocabulary of 32k; for sizing a corpus given by path."""
_PACKED = {".zst": 3.0, ".gz": 2.8, ".parquet": 2.0}
"""Times that text is larger than its file of this kind, roughly."""


def limit(params: str | None, size: str | None, speed: float | None, on: str | None,
          trained_on: Device, quantization: str) -> int | None:
    """Parameters admitted at inference; the smallest of the limits given."""
    limits = []
    if params is not None:
        limits.append(units.count(params, "--inference-params"))
    if size is not None:
        limits.append(sizes.limit_from_bytes(units.size(size, "--inference-bytes"), quantization))
    if speed is not None:
        device = trained_on if on is None else devices.find(on)
        limits.append(sizes.limit_from_speed(speed, device, quantization))
    return min(limits, default=None)


def tokens(text: str, flag: str) -> int:
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
        return int(read_json(path / "dataset.json")["n_tokens"])
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size * _PACKED.get(p.suffix, 1.0) for p in files)
    if size == 0:
        raise UserError(f"{flag}: {text} holds no text")
    return max(round(size / _BYTES_PER_TOKEN), 1)


def hours(text: str | None, amount: str | None, price: float | None, what: str) -> float | None:
    """Device-hours from hours or money; the smaller where both are given."""
    given = []
    if text is not None:
        given.append(units.hours(text, f"--{what}-hours"))
    if amount is not None:
        if not price:
            raise UserError(f"--{what}-money needs --price, the money per device-hour")
        given.append(units.money(amount, f"--{what}-money") / price)
    return min(given, default=None)


def model(text: str | None, flag: str) -> OpenModel | None:
    """A model folder, or NAME:PARAMETERS."""
    if text is None:
        return None
    folder = Path(text)
    if folder.is_dir():
        count = parameters(folder)
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


def parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, from their headers alone."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    return total


def laws(files: list[Path]) -> dict[str, Law]:
    """A law for each method that the rows support; the others stay unknown, and are named."""
    rows: list[Any] = []
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise UserError(f"{file} is not a results.json or study.json: it has no 'rows'")
        rows += law.plain(content)
    fitted = {}
    for method in sorted({row["method"] for row in rows}):
        try:
            fitted[method] = law.fit(rows, method)
        except UserError as reason:
            say(str(reason))
    return fitted
