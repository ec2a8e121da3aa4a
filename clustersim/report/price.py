"""Prices of kernels for people: how long, where the price comes from, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.page import (
    Cell,
    put_line,
    put_paragraph,
    put_section,
    put_table,
    said_share,
    said_time,
)

Found = Mapping[str, Any]

#: Origin → what it means.
ORIGIN_SENTENCES = {
    "measured": "this very call was timed",
    "interpolated": "between timed calls of the same kernel, GPU and format",
    "extrapolated": "beyond what was timed, or from a relative of the GPU",
    "formula": "no curve speaks about it: parameters and data sheet alone",
    "skipped": "no kernel speaks about the row, or its GPU lacks the format",
}


def show_prices(found: Found, console: Console) -> None:
    """Prints what `study.price_flags.price_flags` gives: a page for one price, a table for several."""
    prices = found["prices"]
    if len(prices) == 1:
        _one(found["kernel"], prices[0], console)
    else:
        _several(found, console)
    for sentence in dict.fromkeys(basis_sentence(one) for one in prices):
        put_line(console, "")
        put_paragraph(console, "  ", sentence)


def _one(kernel: str, one: Found, console: Console) -> None:
    put_line(console, f"{kernel} on {one['gpu']}: {said_time(one['seconds'])}", "bold")
    asked = ", ".join(f"{flag} {said_value(value)}" for flag, value in one["flags"].items())
    rows: list[list[Cell]] = [
        ["asked", Text(asked)],
        ["origin", Text(f"{one['origin']}: {ORIGIN_SENTENCES[one['origin']]}")],
        ["outside", Text(_outside(one["outside"]))],
        [
            "roofline",
            Text(f"{said_time(one['roofline'])} by the data sheet, {said_share(_reached(one))} of the price"),
        ],
    ]
    put_table(console, ("",), rows)


def _several(found: Found, console: Console) -> None:
    prices, varies = found["prices"], found["varies"]
    put_line(console, f"{found['kernel']}: {len(prices)} prices", "bold")
    same = {flag: value for flag, value in prices[0]["flags"].items() if flag not in varies}
    put_paragraph(console, "  ", ", ".join(f"{flag} {said_value(value)}" for flag, value in same.items()))
    rows: list[list[Cell]] = [
        [
            Text(one["gpu"]),
            *(said_value(one["flags"][flag]) for flag in varies if flag != "gpu"),
            said_time(one["seconds"]),
            said_time(one["roofline"]),
            said_share(_reached(one)),
            "-" if one["outside"] is None else f"{one['outside']:.1f}" if one["outside"] else "",
            Text(one["origin"]),
        ]
        for one in prices
    ]
    columns = (*(flag for flag in varies if flag != "gpu"), "time", "roofline", "of it", "outside", "origin")
    put_line(console, "")
    put_table(console, columns, rows)


def said_value(value: Any) -> str:
    """A flag's value as it was given."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _reached(one: Found) -> float:
    return float(one["roofline"] / one["seconds"]) if one["seconds"] else 1.0


def _outside(octaves: float | None) -> str:
    if octaves is None:
        return "nothing of the kind was measured"
    if not octaves:
        return "inside of what was measured"
    return f"{octaves:.1f} octaves (factors of two) from what was measured"


def basis_sentence(one: Found) -> str:
    """Which measurements a price rests on."""
    basis = one["basis"]
    if basis is None:
        return f"{one['gpu']}: timed neither on it nor on a relative: a guess from the data sheet."
    table = f"{basis['kernel']}, {basis['gpu']}, {basis['format']}, {basis['library']}"
    if basis["relative"]:
        return f"{one['gpu']}: its own data sheet through what was measured of its relative: {table}."
    return f"{one['gpu']}: table {table}."


def show_priced_file(found: Found, console: Console) -> None:
    """Prints what `study.price_rows.summary` gives."""
    put_line(console, f"{found['file']}: {found['rows']:,} rows priced into {found['out']}", "bold")
    put_paragraph(console, "  ", f"read as {found['form']}; kernels: {_counted(found['kernels'])}")
    rows = [
        [name, f"{one['rows']:,}", said_share(one["share"]), Text(ORIGIN_SENTENCES[name])]
        for name, one in found["origins"].items()
    ]
    put_section(console, "Where the prices come from", ("rows", "of the time", ""), rows)
    if found["outside"]:
        put_paragraph(console, "  ", f"farthest from what was measured: {found['outside']:.1f} octaves")


def _counted(kernels: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {rows:,}" for name, rows in kernels.items())
