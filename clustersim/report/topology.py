"""What people read of a machine: its parts, how wide it is where, how far GPUs are apart, what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.report.page import (
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_ratio,
    said_share,
    said_time,
)
from clustersim.units import show as quantity

Found = Mapping[str, Any]

_MARKS = {True: ("ok", "green"), False: ("wrong", "red"), None: ("note", "yellow")}
_PLURALS = {"leaf": "leaves", "nvswitch": "NVSwitches", "gpu": "GPUs", "nic": "cards"}
_NAMES = {"nvswitch": "NVSwitch", "gpu": "GPU", "nic": "card"}
_TAPERS = {
    "domain": "NVLink domain: NVLink over cards",
    "leaf": "leaf: cards over uplinks",
    "router": "router: cards over links in its group",
    "group": "group: cards over global links",
}


def show_topology(found: Found, console: Console) -> None:
    """Prints what `study.topology.inspect` gives."""
    put_line(console, found["file"], "bold")
    for section in _SECTIONS:
        section(found, console)


def said_kind(kind: str, count: int = 1) -> str:
    """A kind of vertex as people write it, for one or several."""
    return _NAMES.get(kind, kind) if count == 1 else _PLURALS.get(kind, f"{kind}s")


def said_counts(counts: Mapping[str, int]) -> str:
    """`8 GPUs, 1 NVSwitch`."""
    return ", ".join(f"{count:,} {said_kind(kind, count)}" for kind, count in counts.items())


def said_machine(found: Found) -> str:
    """The machine in one line."""
    long = found["longest_path"]
    return (
        f"{found['gpus']:,} x {found['gpu']} in {found['servers']:,} servers; "
        f"bisection {quantity(found['bisection']['bandwidth'], 'bandwidth')}; "
        f"longest path {long['links']} links, {said_time(long['latency'])}"
    )


def _machine(found: Found, console: Console) -> None:
    put_paragraph(console, "  ", f"family {found['family']}: {said_machine(found)}")
    put_paragraph(console, "  ", f"parts: {said_counts(found['vertices'])}")
    sizes = f"GPUs per server: {_sizes(found['gpus_per_server'])}; per NVLink domain: "
    put_paragraph(console, "  ", f"{sizes}{_sizes(found['gpus_per_domain'])}")
    put_paragraph(console, "  ", _CHOICES[found["routing"], found["load_balancing"]])


_CHOICES = {
    ("minimal", "ecmp"): "of equal ways a flow takes one, by a hash (ECMP)",
    ("minimal", "spray"): "packets are sprayed over equal ways, which stand as one link",
    ("valiant", "ecmp"): "flows between groups pass a third one, chosen by a hash (Valiant)",
}


def _sizes(sizes: Mapping[str, int]) -> str:
    if len(sizes) == 1:
        return next(iter(sizes))
    return ", ".join(f"{size} in {times:,} of them" for size, times in sizes.items())


def _tiers(found: Found, console: Console) -> None:
    rows = [
        [
            tier,
            f"{facts['links']:,}",
            _range(facts["each"], lambda value: quantity(value, "bandwidth")),
            quantity(facts["together"], "bandwidth"),
            _range(facts["latency"], said_time),
        ]
        for tier, facts in _one_way(found["tiers"])
    ]
    put_section(console, "Links by tier, one way", ["links", "of each", "together", "latency"], rows)


def _one_way(tiers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A tier that equals its way back stands for both."""
    seen: dict[str, Any] = {}
    for tier, facts in tiers.items():
        back = "-".join(reversed(tier.split("-")))
        if back == tier or seen.get(back) != facts:
            yield tier, facts
        seen[tier] = facts


def _range(values: Sequence[float], said: Callable[[float], str]) -> str:
    least, most = said(values[0]), said(values[1])
    return least if least == most else f"{least} to {most}"


def _bisection(found: Found, console: Console) -> None:
    cut = found["bisection"]
    put_title(console, "Bisection")
    put_paragraph(
        console,
        "  ",
        f"{quantity(cut['bandwidth'], 'bandwidth')} from {cut['halves'][0]} to {cut['halves'][1]}, that is "
        f"{quantity(cut['per_gpu'], 'bandwidth')} per GPU: the maximum flow, whatever the routing, between "
        "halves in rank order, so server by server; another halving might be narrower",
    )
    if cut["forward"] != cut["back"]:
        there, back = (quantity(cut[way], "bandwidth") for way in ("forward", "back"))
        put_paragraph(console, "  ", f"there {there}, back {back}")


def _oversubscription(found: Found, console: Console) -> None:
    rows = [
        [
            _TAPERS[taper["at"]],
            f"{taper['count']:,}",
            quantity(taper["below"], "bandwidth"),
            quantity(taper["above"], "bandwidth"),
            said_ratio(taper["ratio"]),
        ]
        for taper in found["oversubscription"]
    ]
    columns = ["there are", "towards GPUs", "towards the rest", "ratio"]
    put_section(console, "Oversubscription, where it is worst", columns, rows)


def _paths(found: Found, console: Console) -> None:
    rows = [
        [
            way["relation"],
            said_share(way["share"]),
            str(way["links"]),
            _range(way["latency"], said_time),
            quantity(way["bandwidth"], "bandwidth"),
            Text(" > ".join(said_kind(kind) for kind in way["kinds"])),
        ]
        for way in found["paths"]
    ]
    columns = ["of pairs", "links", "latency", "narrowest", "way"]
    put_section(console, "Paths from GPU to GPU, nearest first", columns, rows)


def _checks(found: Found, console: Console) -> None:
    put_title(console, "Checks")
    for check in found["checks"]:
        mark, style = _MARKS[check["good"]]
        console.print(Text.assemble("  ", (f"{mark:<6}", style)), end="")
        put_line(console, f"{check['check']}: {check['found']}")


#: The sections in the order in which they are printed.
_SECTIONS: tuple[Callable[[Found, Console], None], ...] = (
    _machine,
    _tiers,
    _bisection,
    _oversubscription,
    _paths,
    _checks,
)
