"""What people read after a replay of traffic: how long it took, which flows were slow, which links full."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.page import (
    Cell,
    printable,
    put_line,
    put_section,
    said_or_dash,
    said_ratio,
    said_share,
    said_size,
    said_time,
)
from clustersim.report.terminal import put_notes
from clustersim.units import show as quantity

_COLUMNS = ("mean", "p50", "p90", "p99", "max")
#: Longer names are cut, so that a line stays one.
_NAME = 24


def show_replay(found: Mapping[str, Any], console: Console, case: Path, out: Path | None = None) -> None:
    """Prints the summary of a replay.

    found    what `study.network.summary` gives
    case     the folder of the traffic
    out      where the times were written, None if nowhere
    """
    put_line(console, str(case), "bold")
    model = found["model"]
    detail = {"fluid": f", tolerance {model['tolerance']:g}" if model["tolerance"] else "",
              "chunked": f", chunks of {said_size(model['chunk'])}"}  # fmt: skip
    put_line(
        console,
        f"  {found['flows']:,} flows, {said_size(found['bytes'])}, over {found['links']:,} links; "
        f"model: {model['fidelity']}{detail.get(model['fidelity'], '')}",
    )
    put_line(
        console,
        f"  {said_time(found['makespan'])} from the first release to the last finish, "
        f"at {said_time(found['last_finish'])}",
        "bold green",
    )
    _times(found, console)
    _slowest(found, console)
    _busiest(found, console)
    put_notes(found, console)
    put_line(console, "")
    hint = "--out FILE writes when each flow was released and done"
    put_line(console, hint if out is None else f"Times: {out}")


def _times(found: Mapping[str, Any], console: Console) -> None:
    rows = [["duration", *(said_time(found["duration"][column]) for column in _COLUMNS)]]
    if found["slowdown"] is not None:
        rows.append(["slowdown", *(said_ratio(found["slowdown"][column]) for column in _COLUMNS)])
    put_section(console, "Flows, from release to finish", _COLUMNS, rows)
    put_line(console, "  slowdown: how much longer than with the network to itself", "dim")


def _slowest(found: Mapping[str, Any], console: Console) -> None:
    rows: list[list[Cell]] = [
        [
            str(flow["flow"]),
            Text(_cut(f"{flow['src']} to {flow['dst']}")),
            said_size(flow["bytes"]),
            said_time(flow["release"]),
            said_time(flow["duration"]),
            said_or_dash(said_ratio, flow["duration"] / flow["alone"] if flow["alone"] else None),
        ]
        for flow in found["slowest"]
    ]
    columns = ["from and to", "bytes", "release", "duration", "slowdown"]
    put_section(console, "The slowest flows", columns, rows)


def _busiest(found: Mapping[str, Any], console: Console) -> None:
    rows: list[list[Cell]] = [
        [
            str(link["link"]),
            Text(_cut(link["name"])),
            quantity(link["bandwidth"], "bandwidth"),
            said_size(link["bytes"]),
            said_share(link["utilization"]),
        ]
        for link in found["busiest"]
    ]
    put_section(console, "The busiest links", ["name", "bandwidth", "bytes", "in use"], rows)


def _cut(name: str) -> str:
    plain = printable(name)
    return plain if len(plain) <= _NAME else f"{plain[: _NAME - 3]}..."
