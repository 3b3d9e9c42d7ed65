"""Quantities as they are written: what is written can be read again as the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from planearly import units


@pytest.mark.parametrize(("value", "count", "prefixed"), [
    (7, "7", "7"), (1234.5, "1.23k", "1.23k"), (126e6, "126M", "126M"), (150e9, "150B", "150G"),
    (15.6e12, "15.6T", "15.6T"), (2.7e20, "2.7e+08T", "270E"), (4e21, "4e+09T", "4Z"),
    (-3.2e9, "-3.2B", "-3.2G"), (999_817_216, "1B", "1G"), (999_499, "999k", "999k"),
    (-999_500, "-1M", "-1M"), (999.6, "1k", "1k")])
def test_counts_are_in_billions_and_units_have_decimal_prefixes(
        value: float, count: str, prefixed: str) -> None:
    assert (units.short(value), units.prefixed(value)) == (count, prefixed)


@given(st.integers(0, 10**15))
@examples(50)
def test_a_count_as_told_is_the_count_as_given(value: int) -> None:
    assert units.count(units.short(value)) == pytest.approx(value, rel=5.1e-3)
