"""Quantities: text with a unit in, SI floats out, and back without loss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim import units
from clustersim.errors import UnitError

values = st.floats(min_value=0, max_value=1e300, allow_nan=False)


@pytest.mark.parametrize("dimension", units.UNITS)
@given(value=values)
def test_exact_text_reads_back_to_the_very_same_float(dimension: str, value: float) -> None:
    assert units.parse(units.exact(value, dimension), dimension) == value


@pytest.mark.parametrize("dimension", units.UNITS)
@given(number=st.integers(0, 10**6))
def test_every_unit_multiplies(dimension: str, number: int) -> None:
    for unit, factor in units.UNITS[dimension].items():
        assert units.parse(f"{number} {unit}", dimension) == number * factor
        assert units.parse(f"  {number}{unit} ", dimension) == number * factor


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("400 Gb/s", "bandwidth", 5e10),  # b is bit
        ("400 GB/s", "bandwidth", 4e11),  # B is byte
        ("80 GiB", "size", 80 * 2**30),
        ("80 GB", "size", 80e9),
        ("80 kb", "size", 1e4),
        ("2 us", "time", 2e-6),
        ("2 µs", "time", 2e-6),
        (".5 min", "time", 30.0),
        ("1e3 ms", "time", 1.0),
        ("989 TFLOP/s", "flop rate", 989e12),
    ],
)
def test_units_people_write(text: str, dimension: str, value: float) -> None:
    assert units.parse(text, dimension) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "dimension", "problem"),
    [
        (400, "bandwidth", '400 has no unit; write a bandwidth as text, such as "400 Gb/s"'),
        ("400", "bandwidth", '"400" has no unit; write a bandwidth such as "400 Gb/s"'),
        ("400 Gb", "bandwidth", '"400 Gb" is a size; a bandwidth is wanted, such as "400 Gb/s"'),
        ("2 us", "size", '"2 us" is a time; a size is wanted, such as "80 GiB"'),
        ("2 parsecs", "time", '"2 parsecs": unknown time unit "parsecs"; such as "2 us"'),
        ("50 GBs", "bandwidth", '"50 GBs": unknown bandwidth unit "GBs" (did you mean "GB/s"?)'),
        ("fast", "bandwidth", '"fast" is not a bandwidth; write a number and a unit'),
        ("-1 s", "time", '"-1 s" must be finite and not negative'),
        ("1e999 s", "time", '"1e999 s" must be finite and not negative'),
        ("nan s", "time", '"nan s" is not a time'),
        ("", "time", '"" is not a time'),
    ],
)
def test_a_refusal_says_what_would_be_right(text: object, dimension: str, problem: str) -> None:
    with pytest.raises(UnitError) as caught:
        units.parse(text, dimension)
    assert str(caught.value).startswith(problem)


@given(text=st.text(max_size=40))
def test_any_text_is_either_a_quantity_or_a_unit_error(text: str) -> None:
    try:
        assert units.parse(text, "time") >= 0
    except UnitError as error:
        assert str(error)


def test_minus_zero_is_zero() -> None:
    assert units.exact(units.parse("-0 s", "time"), "time") == "0.0 s"


@pytest.mark.parametrize(
    ("value", "dimension", "shown"),
    [
        (5e10, "bandwidth", "50 GB/s"),
        (2.2e-3, "time", "2.2 ms"),
        (0.0, "time", "0 s"),
        (989e12, "flop rate", "989 TFLOP/s"),
        (999.9996e-6, "time", "1 ms"),
    ],
)
def test_quantities_for_people(value: float, dimension: str, shown: str) -> None:
    assert units.show(value, dimension) == shown
