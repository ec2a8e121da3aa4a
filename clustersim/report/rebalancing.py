"""What `clustersim rebalance` found, for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from clustersim.report.page import (
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_count,
    said_size,
    said_time,
)

_COLUMNS = (
    "spare",
    "tokens/s",
    "against never",
    "imbalance",
    "worst",
    "moves",
    "weights",
    "stopped",
    "p99 step",
)


def show_rebalancing(found: Mapping[str, Any], console: Console) -> None:
    """Prints what `study.rebalancing.rebalance` gives."""
    put_line(console, f"{found['name']}: experts placed anew, or left where they are", "bold")
    put_paragraph(
        console,
        "  ",
        f'policy "{found["policy"]}", popularity {found["motion"]}, plans {_PLAN[found["plan"]]}, '
        f"weights move {_TRANSFER[found['transfer']]}, loads of {found['window']} steps, planning takes "
        f"{said_time(found['planning_time'])}, seed {found['seed']}: the same tokens in every row",
    )
    put_section(console, "Every so many steps", list(_COLUMNS), [_row(case) for case in found["cases"]])
    failed = [case for case in found["cases"] if case["error"]]
    if failed:
        put_title(console, "Not run")
        for case in failed:
            put_paragraph(console, "  - ", f"{_every(case)}, {case['spare']} spare: {case['error']}")
    put_title(console, "Answer")
    for sentence in found["sentences"]:
        put_paragraph(console, "  - ", sentence)


_PLAN = {"anew": "made anew", "amended": "amended"}
_TRANSFER = {"stop": "while passes stop", "background": "beside the passes"}


def _every(case: Mapping[str, Any]) -> str:
    return f"{case['every']:,}" if case["every"] else "never"


def _row(case: Mapping[str, Any]) -> list[str]:
    if case["error"]:
        return [_every(case), str(case["spare"]), *["-"] * (len(_COLUMNS) - 1)]
    return [
        _every(case),
        str(case["spare"]),
        said_count(case["tokens_per_second"]),
        "-" if case["gain"] is None or not case["every"] else f"{case['gain']:+.1%}",
        f"{case['imbalance']['mean']:.2f} x",
        f"{case['imbalance']['max']:.2f} x",
        f"{case['moved']:,}",
        said_size(case["bytes"]),
        said_time(case["stopped"]),
        said_time(case["step"]["p99"]),
    ]
