"""What people read of a drawn deployment: how large the drawing is, whether it is sound, what is claimed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.console import Console

from clustersim.report.page import put_line, put_paragraph, put_title

Found = Mapping[str, Any]

_KINDS = {
    "communication": "communication",
    "computation": "computation",
    "end": "input and output",
    "rest": "left-out parts",
    "routing": "routing and aggregation",
}


def show_drawn(found: Found, console: Console) -> None:
    """Prints what `study.dag.save` gives."""
    put_line(console, found["title"], "bold")
    kinds = ", ".join(f"{number:,} {_KINDS[kind]}" for kind, number in found["kinds"].items())
    put_paragraph(
        console, "  ", f"{found['file']}: {found['nodes']:,} nodes ({kinds}), {found['edges']:,} edges"
    )


def show_checks(found: Found, console: Console) -> None:
    """Prints what `study.dag.check` gives."""
    put_line(console, found["title"], "bold")
    put_title(console, f"The drawing at level {found['level']}, {_extent(found)}")
    for one in found["checks"]:
        _verdict(console, one["good"], "ok", "wrong", one["check"], one["found"])
    for document, claims in groupby(found["claims"], key=lambda claim: claim["document"]):
        some = list(claims)
        held = sum(claim["holds"] for claim in some)
        put_title(console, f'What "{document}" says of it: {held} of {len(some)} claims hold')
        for claim in some:
            _verdict(console, claim["holds"], "holds", "does not", claim["words"], claim["found"])


def _extent(found: Found) -> str:
    every = "every shard, head and expert" if found["full"] else "sampled"
    return f"{every}: {found['nodes']:,} nodes, {found['edges']:,} edges"


def _verdict(console: Console, good: bool, yes: str, no: str, what: str, said: str) -> None:
    width = max(len(yes), len(no))
    put_paragraph(console, f"  {(yes if good else no):<{width}}  ", f"{what}: {said}")
