"""Quantities as people write and read them: ``126M`` parameters, ``50GB``, ``2h``, ``$300``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from planearly.errors import UserError

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "hours": 3600, "hour": 3600,
            "d": 86400, "days": 86400, "day": 86400}
_MOST = 1e100  # finite in every unit
CURRENCIES = {"$": ("USD", "AUD", "CAD", "HKD", "MXN", "NZD", "SGD", "TWD"), "€": ("EUR",),
              "£": ("GBP",), "¥": ("JPY", "CNY")}
"""Signs of money, and the currencies that each may stand for, the first unless one is named."""


_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)"
_QUANTITY = re.compile(rf"\s*([+-]?(?:{_WHOLE}\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Z]*)\s*")


def _split(text: object, what: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(str(text))
    if not match:
        raise UserError(f"{what}: '{text}' is not a number with a unit: give one such as {example}")
    digits = match[1].replace("_", "").replace(",", "")
    value = int(digits) if digits.isdecimal() and len(digits) < 40 else float(digits)
    if not 0 <= value < _MOST:
        raise UserError(f"{what}: '{text}' must be a number that is not negative and below "
                        f"{_MOST:g}")
    return value, match[2].lower()


def count(text: object, what: str = "count") -> int:
    """``126M``, ``1.5B``, ``8k`` or a plain number of tokens, parameters or domains.

    Raises:
        UserError: not a number, negative, a part of one, or a unit of something else (``50GB``,
            ``2h``).
    """
    value, unit = _split(text, what, "8k, 126M or 1.5B")
    if unit not in _SCALE:
        raise UserError(f"{what}: '{text}' should be a count such as 8k, 126M or 1.5B")
    if value * _SCALE[unit] % 1 and not unit:
        raise UserError(f"{what}: '{text}' should be a whole number")
    return round(value * _SCALE[unit])


def size(text: object, what: str = "size") -> int:
    """``50GB``, ``512MiB`` or a plain number of bytes."""
    value, unit = _split(text, what, "50GB or 512MiB")
    unit = unit or "b"
    if unit not in _BYTES:
        raise UserError(f"{what}: '{text}' should be a number of bytes such as 50GB or 512MiB")
    return round(value * _BYTES[unit])


def hours(text: object, what: str = "hours") -> float:
    """``2h``, ``90min``, ``3d`` or a plain number of hours, in hours."""
    value, unit = _split(text, what, "2h, 90min or 3d")
    if unit == "":
        return value
    if unit not in _SECONDS or str(text).strip().endswith("M"):  # 126M is a count, 126m minutes
        raise UserError(f"{what}: '{text}' should be a time such as 2h, 90min or 3d")
    return value * _SECONDS[unit] / 3600


def money(text: object, what: str = "money") -> tuple[float, str]:
    """``$300``, ``€300``, ``300 USD``, ``2.5k`` or a plain number: how much, and the currency's
    three letters ("": none is named).

    Raises:
        UserError: no amount, or a sign beside the letters of another currency.
    """
    bare = str(text).strip()
    sign = bare[0] if bare[:1] in CURRENCIES else bare[-1:] if bare[-1:] in CURRENCIES else ""
    value, unit = _split(bare.strip(sign or None), what, "$300 or 300 USD")
    named = CURRENCIES.get(sign, ("",))
    if unit in _SCALE:
        return value * _SCALE[unit], named[0]
    if unit in _BYTES or unit in _SECONDS or len(unit) != 3:
        raise UserError(f"{what}: '{text}' should be an amount such as $300 or 300 USD")
    if sign and unit.upper() not in named:
        raise UserError(f"{what}: '{text}' names two currencies, {sign} and {unit.upper()}: give "
                        "one")
    return value, unit.upper()


def short(value: float) -> str:
    """A count, of tokens or parameters say, to three significant digits: ``1.23M``, ``150B``."""
    return _suffixed(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")))


def prefixed(value: float) -> str:
    """A number to three significant digits with the decimal prefix of the unit that follows, as
    bytes or FLOP: ``1.6G``."""
    return _suffixed(value, ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"),
                             (1e6, "M"), (1e3, "k")))


def _suffixed(value: float, suffixes: Iterable[tuple[float, str]]) -> str:
    value = float(f"{value:.3g}")  # as it is shown, so that 999.9k is 1M
    for limit, suffix in suffixes:
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
