"""What people read after their GPU was measured, or before: cases by kernel, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from clustersim.report.page import put_line, put_paragraph, put_section, said_share, said_size

#: What may come of a case, in the order of the columns.
_RESULTS = ("measured", "kept", "no room", "cannot run", "too fast")


def show_measured(found: Mapping[str, Any], console: Console) -> None:
    """Prints what was measured, or what would be.

    found  what `study.measure.summary` or `study.measure_plan.outline` gives
    """
    if "planned" in found:
        _planned(found, console)
        return
    put_line(console, f"Rows: {found['folder']}", "bold")
    rows = [
        [kernel, *(f"{counts.get(result, 0):,}" for result in _RESULTS)]
        for kernel, counts in found["kernels"].items()
    ]
    put_section(console, "Cases", _RESULTS, rows)
    for one in found["missing"]:
        put_paragraph(console, "! ", f"{one['cases']} x {one['result']}: {one['example']}: {one['why']}")
    unsteady = [[one["case"], said_share(one["spread"])] for one in found["least_steady"]]
    put_section(console, "Least steady", ("slowest over fastest",), unsteady)
    put_line(console, "")
    put_line(console, "cases.csv tells what came of every case, machine.csv what it was measured on")


def _planned(found: Mapping[str, Any], console: Console) -> None:
    rows = [
        [one["kernel"], f"{one['cases']:,}", said_size(one["largest"]), one["file"]]
        for one in found["planned"]
    ]
    put_section(console, "Would be measured", ("cases", "largest takes", "file"), rows)
