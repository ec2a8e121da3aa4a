"""The catalogue for people: main figures and sources of all entries, or one entry with every origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.page import (
    Cell,
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_count,
    said_or_dash,
    said_share,
    said_time,
)
from clustersim.units import show as quantity

Found = Mapping[str, Any]

_GUESS = "guess"


def show_listing(found: Mapping[str, Sequence[Found]], console: Console) -> None:
    """Prints what `study.catalogue.listing` gives."""
    put_line(console, "catalogue", "bold")
    for section, entries in found.items():
        for table in (section, f"fitted {section}"):
            if table in _LISTS:
                title, columns, cells = _LISTS[table]
                rows = [[one["name"], *cells(one)] for one in entries if _table_of(section, one) == table]
                put_section(console, title, columns, rows)
        for one in entries:
            if one.get("source"):
                put_paragraph(console, f"  {one['name']}: ", one["source"])
    put_line(console, "")
    put_paragraph(console, "", "`clustersim catalogue SECTION NAME` shows the origin of every number.")


def _table_of(section: str, one: Found) -> str:
    return f"fitted {section}" if one.get("kind") == "fitted" else section


def show_entry(found: Found, console: Console) -> None:
    """Prints what `study.catalogue.entry` gives."""
    put_line(console, f"{found['section']}: {found['name']}", "bold")
    _summary(found, console)
    for field in found.get("fields", ()):
        _field(field, found.get("source"), console)
    _columns(found, console)


def _summary(found: Found, console: Console) -> None:
    for key in ("what", "licence", "source"):
        if found.get(key):
            put_paragraph(console, "  ", f"{key}: {found[key]}")
    if found["section"] == "models":
        put_paragraph(console, "  ", f"parameters: {_parameters(found['parameters'])}")
    if found["section"] == "gpus":
        put_paragraph(console, "  ", f"computes in {', '.join(found['formats'])}")
        put_paragraph(console, "  ", f"fitted kernels: {', '.join(found['kernels']) or 'none'}")
        put_paragraph(console, "  ", f"measured rows: {_by_count(found['measured']) or 'none'}")
    guesses = [field["key"] for field in found.get("fields", ()) if field["guess"]]
    if guesses:
        put_paragraph(console, "  ", f"guesses, assumed or unverified: {', '.join(guesses)}")


def _field(field: Found, source: str | None, console: Console) -> None:
    put_line(console, "")
    mark = Text(f"  {_GUESS}", "yellow") if field["guess"] else Text("")
    console.print(Text.assemble("  ", (field["key"], "bold"), f"  {field['text']}", mark), soft_wrap=True)
    origin = "the source above" if field["origin"] == source else field["origin"]
    note = f"note: {field['remark']}" if field["remark"] else ""
    for said in (field["meaning"], f"origin: {origin}", note):
        if said:
            put_paragraph(console, "    ", said)


def _columns(found: Found, console: Console) -> None:
    if "columns" not in found:
        return
    put_line(console, f"  {found['rows']:,} rows, {found['suspect']:,} of them marked suspect")
    rows = [
        [
            one["column"],
            Text(one["kind"]),
            f"{one['different']:,}",
            f"{one['gaps']:,}",
            said_or_dash(said_count, one.get("least")),
            said_or_dash(said_count, one.get("most")),
        ]
        for one in found["columns"]
    ]
    put_section(console, "Columns", ["kind", "different", "gaps", "least", "most"], rows)
    if found["gpus"]:
        put_section(console, "Rows by GPU", ["rows"], [[gpu, f"{n:,}"] for gpu, n in found["gpus"].items()])
    put_title(console, "Rows by source")
    for source, rows_of in found["sources"].items():
        put_paragraph(console, f"  {rows_of:>6,}  ", source)


def _parameters(counted: Found) -> str:
    stated = counted["stated"]
    beside = f"; the source states {_billions(stated)}" if stated else "; the source states no size"
    return f"{_billions(counted['total'])}, {_billions(counted['active'])} of them active per token{beside}"


def _billions(count: float) -> str:
    return f"{count / 1e9:,.4g} billion"


def _by_count(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _gpu(one: Found) -> list[Cell]:
    return [
        Text(", ".join(f"{fmt} {quantity(rate, 'flop rate')}" for fmt, rate in one["flop_rate"].items())),
        f"{one['memory'] / 2**30:.4g} GiB",
        quantity(one["memory_bandwidth"], "bandwidth"),
        f"{one['sms']}",
        said_or_dash(lambda power: quantity(power, "power"), one["power"]),
        said_time(one["launch_latency"]),
        Text(_priced_by(one)),
    ]


def _priced_by(one: Found) -> str:
    own = [f"{len(one['kernels'])} measured"] if one["kernels"] else []
    relative = [f"as {one['relative']}"] if one["relative"] else []
    return ", else ".join(own + relative) or "data sheet"


def _server(one: Found) -> list[Cell]:
    return [
        Text(f"{one['gpus']} x {one['gpu']}"),
        quantity(one["nvlink_bandwidth"], "bandwidth"),
        said_time(one["nvlink_latency"]),
        f"{one['nics']} x {quantity(one['nic_bandwidth'], 'bandwidth')}",
        said_time(one["nic_latency"]),
        quantity(one["pcie_bandwidth"], "bandwidth"),
    ]


def _model(one: Found) -> list[Cell]:
    counted = one["parameters"]
    return [
        f"{one['layers']}",
        f"{one['hidden']:,}",
        f"{one['experts']:,}, top {one['top_k']}" if one["experts"] else "none",
        _billions(counted["total"]),
        _billions(counted["active"]),
        said_or_dash(_billions, counted["stated"]),
    ]


def _network(one: Found) -> list[Cell]:
    return [
        f"{one['parameters']}",
        f"{len(one['without_rows'])}",
        f"{one['most_rows']:,}",
        said_or_dash(said_share, one["residual"]),
        Text(", ".join(one["files"])),
    ]


def _fitted(one: Found) -> list[Cell]:
    return [f"{one['points']:,}", *_network(one)]


def _calibration(one: Found) -> list[Cell]:
    return [
        f"{one['rows']:,}",
        f"{one['suspect']:,}",
        Text(", ".join(one["gpus"]) or "-"),
        Text(one["licence"]),
        Text(one["what"]),
    ]


#: Section → title, columns, and the cells of an entry.
_LISTS: dict[str, tuple[str, list[str], Callable[[Found], list[Cell]]]] = {
    "gpus": (
        "GPUs: dense rates, memory, and whose measured kernels price it",
        ["rates", "memory", "bandwidth", "SMs", "power", "launch", "kernels"],
        _gpu,
    ),
    "servers": (
        "Servers: bandwidths one way",
        ["GPUs", "NVLink", "latency", "cards", "latency", "PCIe"],
        _server,
    ),
    "models": (
        "Models: parameters as counted, beside the size that the source states",
        ["layers", "hidden", "experts", "total", "active", "stated"],
        _model,
    ),
    "network": (
        "Fitted costs of exchanges",
        ["parameters", "guessed", "most rows", "median error", "measured tables"],
        _network,
    ),
    "calibration": (
        "Measured tables",
        ["rows", "suspect", "GPUs", "licence", "what"],
        _calibration,
    ),
    "fitted calibration": (
        "Fitted kernels: formulas with parameters, and the measured points laid over them",
        ["points", "parameters", "guessed", "most rows", "median error", "measured tables"],
        _fitted,
    ),
}
