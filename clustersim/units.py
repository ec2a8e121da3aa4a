"""Quantities as text with a unit, to SI floats and back.

b is bit, B is byte; k, M, G, T are decimal, Ki, Mi, Gi, Ti binary. A bare number is refused: it
has no unit. Inside the program there are only seconds, bytes, bytes/s, FLOP, FLOP/s, W and Hz.
"""

from __future__ import annotations

import math
import re

from clustersim.errors import UnitError, nearest

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SIZES = {
    f"{prefix}{unit}": factor * bytes_
    for unit, bytes_ in (("B", 1.0), ("b", 0.125))
    for prefix, factor in {**_DECIMAL, **_BINARY}.items()
}

#: dimension → unit → SI value; the order is the one in which messages list the units.
UNITS: dict[str, dict[str, float]] = {
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0},
    "size": _SIZES,
    "bandwidth": {f"{unit}/s": value for unit, value in _SIZES.items()},
    "flop rate": {f"{prefix}FLOP/s": factor for prefix, factor in _DECIMAL.items()},
    "power": {"W": 1.0, "kW": 1e3, "MW": 1e6},
    "frequency": {"Hz": 1.0, "MHz": 1e6, "GHz": 1e9},
}

EXAMPLES = {
    "time": "2 us",
    "size": "80 GiB",
    "bandwidth": "400 Gb/s",
    "flop rate": "989 TFLOP/s",
    "power": "700 W",
    "frequency": "1830 MHz",
}

_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S.*?)?\s*")


def parse(text: object, dimension: str) -> float:
    """A quantity's SI value.

    text       a number and a unit, e.g. "400 Gb/s"
    dimension  a key of UNITS
    Returns    seconds, bytes, bytes/s, FLOP/s, W, Hz; finite and never negative
    Raises     UnitError that says what would be right
    """
    example = EXAMPLES[dimension]
    if not isinstance(text, str):
        raise UnitError(f'{text!r} has no unit; write a {dimension} as text, such as "{example}"')
    match = _QUANTITY.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        raise UnitError(f'"{text}" is not a {dimension}; write a number and a unit, such as "{example}"')
    number, unit = match.groups()
    if unit is None:
        raise UnitError(f'"{text}" has no unit; write a {dimension} such as "{example}"')
    known = UNITS[dimension]
    if unit not in known:
        raise UnitError(_wrong_unit(text, unit, dimension))
    # Adding zero turns "-0 s" into plain zero: equal quantities must also be equal text.
    value = float(number) * known[unit] + 0.0
    if not math.isfinite(value) or value < 0:
        raise UnitError(f'"{text}" must be finite and not negative')
    return value


def _wrong_unit(text: str, unit: str, dimension: str) -> str:
    for other, known in UNITS.items():
        if unit in known:
            return f'"{text}" is a {other}; a {dimension} is wanted, such as "{EXAMPLES[dimension]}"'
    near = nearest(unit, UNITS[dimension])
    return f'"{text}": unknown {dimension} unit "{unit}"{near}; such as "{EXAMPLES[dimension]}"'


#: Less than this of the smallest unit is roundoff to people.
_NOTHING = 1e-6

_SHOWN: dict[str, tuple[tuple[float, str], ...]] = {
    "time": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "size": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "bandwidth": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s")),
    "flop rate": ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1.0, "FLOP/s")),
    "power": ((1e6, "MW"), (1e3, "kW"), (1.0, "W")),
    "frequency": ((1e9, "GHz"), (1e6, "MHz"), (1.0, "Hz")),
}


def show(value: float, dimension: str, digits: int = 3) -> str:
    """The quantity for people: `show(5e10, "bandwidth")` is "50 GB/s".

    digits   significant digits
    """
    steps = _SHOWN[dimension]
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {next(unit for factor, unit in steps if factor == 1.0)}"
    for factor, unit in steps:
        if abs(value) >= factor * 0.9995:
            return f"{float(f'{value / factor:.{digits}g}'):,g} {unit}"
    factor, unit = steps[-1]
    if abs(value) < factor * _NOTHING:
        return show(0.0, dimension)
    return f"{value / factor:.{digits}g} {unit}"


def exact(value: float, dimension: str) -> str:
    """The quantity as text that `parse` reads back to the very same float."""
    unit = next(unit for unit, factor in UNITS[dimension].items() if factor == 1.0)
    return f"{value!r} {unit}"
