"""A run's summary for people at a terminal; plain text without colours where the output is piped.

Words that come from files are printed as they are: never read as markup, control characters escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.analysis.statistics import said_within
from clustersim.analysis.utilization import STATES, busiest, spread, worst
from clustersim.report.page import (
    Cell,
    printable,
    put_line,
    put_paragraph,
    put_section,
    put_table,
    put_title,
    said_count,
    said_or_dash,
    said_ratio,
    said_share,
    said_size,
    said_time,
    tier_rows,
)

Summary = Mapping[str, Any]

_LATENCIES = {
    "step": "step",
    "token_batch": "token batch",
    "tpot": "TPOT",
    "ttft": "TTFT",
    "request": "request",
}
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
_BOUNDS = ("compute", "memory", "network")
_PARTS_SHOWN = 12
_WORST_SHOWN = 5
_WORTH_A_LINE = 0.0005
#: Below this times the mean the slowest expert is one of many that are alike.
_NO_TIE = 1.01
_LINKS_SHOWN = 5
_BAR_WIDTH = 30
_WITHOUT_BAR = 60


def show(
    summary: Summary,
    console: Console,
    peers: Mapping[str, Summary] | None = None,
    path: Path | None = None,
) -> None:
    """Prints a run's summary.

    summary  content of a summary.json; also one that only tells of a failure
    peers    name → summary of results to set this one beside
    path     where the result lies
    """
    _headline(summary, console)
    if "error" in summary:
        put_line(console, f"  failed: {summary['error']}", "red")
    else:
        for section in _SECTIONS:
            section(summary, console)
        _peers(summary, console, peers or {})
        put_notes(summary, console)
    if path is not None:
        put_line(console, "")
        put_line(console, f"Result: {path}")


def _headline(summary: Summary, console: Console) -> None:
    head = Text.assemble((printable(summary.get("name") or "?"), "bold"))
    for key, said in _HEAD.items():
        if summary.get(key) is not None:
            head.append(f"  {said(summary[key])}", style="dim")
    console.print(head, soft_wrap=True)


def _throughput(summary: Summary, console: Console) -> None:
    rates = summary["throughput"]
    total, output, read = (rates[f"{side}_tokens_per_second"] for side in ("total", "output", "input"))
    if total is not None:
        dropped = rates.get("dropped_share")
        lost = f" ({said_share(dropped)} of assignments dropped)" if dropped else ""
        sides = f"(output {said_count(output)}, input {said_count(read)})"
        put_line(console, f"  {said_count(total)} tokens/s{lost}  {sides}", "bold green")


def _latency(summary: Summary, console: Console) -> None:
    rows = [
        [label, *(said_time(found[column]) for column in _COLUMNS), f"{found['count']:,}"]
        for key, label in _LATENCIES.items()
        if (found := summary["latency"][key]) is not None
    ]
    put_section(console, "Latency", [*_COLUMNS, "count"], rows)
    if rows:
        put_line(console, "  exact for this seed; --seeds 10 tells how far others are from it", "dim")


def _steps(summary: Summary, console: Console) -> None:
    """Where a step's time goes, phase by phase, with the bounds no step can beat."""
    for phase, found in summary["phases"].items():
        period = found["period"]
        title = f"Where the {said_time(period)} of a {phase} step go, mean over GPUs"
        rows = list(_part_rows(found["parts"], period, console))
        put_section(console, title, ["", "busy", "wait", "share"], rows)
        put_line(console, f"  {_legend(console)}", "dim")
        put_paragraph(console, "  ", f"{_rate(found)}; {_bounds(found['step'], found['bounds'])}")
        _steady(found.get("steady"), console)


def _steady(found: Summary | None, console: Console) -> None:
    """What a run without end would take: nothing where steps are too few to tell."""
    if not found or found["mean_half_width"] is None:
        return
    mean = said_within(found["mean"], found["mean_half_width"], "time")
    put_paragraph(console, "  ", f"in a longer run {mean} (95 %, {found['mean_how']}); {found['warm_up']}")


def _part_rows(parts: Sequence[Summary], step: float, console: Console) -> Iterator[list[Cell]]:
    """Rows of label, bar, busy, wait, share of the step; what runs beside the compute stream last.

    step   what a step costs, s; less than it takes where the steps of several micro-batches overlap
    """
    inline = [part for part in parts if part["stream"] == "compute"]
    shown, others = inline[:_PARTS_SHOWN], inline[_PARTS_SHOWN:]
    rows = [(part["operator"], part["busy"], part["wait"]) for part in shown]
    if others:
        sums = (sum(part[key] for part in others) for key in ("busy", "wait"))
        rows.append((f"{len(others)} others", *sums))
    longest = max((busy + wait for _, busy, wait in rows), default=0.0)
    for operator, busy, wait in rows:
        bar = _bar(busy, wait, longest, console)
        yield [operator, bar, said_time(busy), said_time(wait), _part_of(step, busy + wait)]
    idle = max(step - sum(part["busy"] + part["wait"] for part in inline), 0.0)
    yield ["idle", Text(""), "", said_time(idle), _part_of(step, idle)]
    for part in parts:
        if part["stream"] != "compute":
            label = f"{part['operator']} ({part['stream']})"
            yield [label, Text("beside", "dim"), said_time(part["busy"]), said_time(part["wait"]), ""]


def _part_of(step: float, seconds: float) -> str:
    return said_share(seconds / step) if step > 0 else ""


def _bar(busy: float, wait: float, longest: float, console: Console) -> Text:
    """A bar of two parts; `longest` seconds fill it, and it leaves room for the numbers beside it."""
    full, light = _blocks(console)
    width = min(_BAR_WIDTH, max(console.width - _WITHOUT_BAR, 10))
    scale = width / longest if longest > 0 else 0.0
    solid = round(busy * scale)
    hollow = round((busy + wait) * scale) - solid
    return Text.assemble((full * solid, "cyan"), (light * hollow, "yellow"))


def _blocks(console: Console) -> tuple[str, str]:
    return ("#", ".") if console.options.ascii_only else ("█", "░")


def _legend(console: Console) -> str:
    full, light = _blocks(console)
    return f"{full} busy  {light} waiting"


def _rate(phase: Summary) -> str:
    rate = phase["tokens_per_second"]
    steps = f"{phase['steps']:,} step" + ("" if phase["steps"] == 1 else "s")
    return steps + (f", {said_count(rate)} tokens/s" if rate is not None else "")


def _bounds(step: Summary, bounds: Summary) -> str:
    parts = ", ".join(f"{kind} {said_time(bounds[kind])}" for kind in ordered_bounds(bounds))
    return f"step {said_time(step['mean'])}; bounds: {parts}"


def ordered_bounds(bounds: Summary) -> list[str]:
    """Names of the bounds, the largest first."""
    return sorted(_BOUNDS, key=lambda kind: -bounds[kind])


def _gpus(summary: Summary, console: Console) -> None:
    gpus = summary["gpus"]
    rows = []
    for key in (*STATES, "mfu"):
        found = spread(gpus, key)
        if found is not None:
            label = "MFU" if key == "mfu" else key
            rows.append([label, *(said_share(found[which]) for which in ("min", "mean", "max"))])
    put_section(console, f"{len(gpus):,} GPUs, share of the run", ["min", "mean", "max"], rows)
    waiting = [
        [
            gpu["gpu"],
            str(gpu["rank"]),
            str(gpu["stage"]),
            said_share(gpu["wait"]),
            said_share(gpu["idle"]),
            _cause(gpu),
        ]
        for gpu in worst(gpus, _WORST_SHOWN)
        if gpu["wait"] + gpu["idle"] >= _WORTH_A_LINE
    ]
    put_section(console, "Longest without work", ["rank", "stage", "wait", "idle", "waited for"], waiting)


def _cause(gpu: Summary) -> Cell:
    cause = gpu["waited_for"]
    if cause is None:
        return Text("")
    said = cause["operator"] if cause["rank"] is None else f"{cause['operator']} of rank {cause['rank']}"
    return Text(printable(said))


def _links(summary: Summary, console: Console) -> None:
    rows = tier_rows(summary["tiers"])
    put_section(console, "Links by tier", ["links", "bytes", "mean", "max"], rows)
    most = [
        [link["link"], said_size(link["bytes"]), said_share(link["utilization"])]
        for link in busiest(summary["links"], _LINKS_SHOWN)
    ]
    put_section(console, "Busiest links", ["bytes", "used"], most)


def _exchanges(summary: Summary, console: Console) -> None:
    if not summary["algorithms"]:
        return
    put_title(console, "Exchanges")
    put_paragraph(console, "  ", said_algorithms(summary["algorithms"]))


def said_algorithms(kinds: Mapping[str, Mapping[str, float]]) -> str:
    """Kinds of exchange with their algorithms, and these with their shares where there are several."""

    def said(ways: Mapping[str, float]) -> str:
        return " and ".join(n if len(ways) == 1 else f"{n} {said_share(ways[n])}" for n in ways)

    return "; ".join(f"{kind} {said(ways)}" for kind, ways in kinds.items())


def _experts(summary: Summary, console: Console) -> None:
    experts = summary["experts"]
    if experts is None:
        return
    put_title(console, "Experts")
    imbalance, length = experts["imbalance"], experts["queue_length"]
    put_paragraph(
        console,
        "  ",
        f"busiest rank {imbalance['mean']:.2f} x the mean load ({imbalance['max']:.2f} x at worst); "
        f"queues of {length['mean']:,.1f} tokens ({length['max']:,} at most)",
    )
    rows = [
        [label, *(said_time(experts[key][column]) for column in ("mean", "p50", "p99", "max"))]
        for key, label in (("queue_wait", "queue wait"), ("service", "service"))
    ]
    put_table(console, ["mean", "p50", "p99", "max"], rows)
    slow = experts["slowest"]
    for where, found in (
        ("queue wait on average", experts["queue_wait"]),
        (f"slowest is expert {slow['expert']} of layer {slow['layer']} on rank {slow['rank']}", slow),
    ):
        if found is slow and found.get("over", 2.0) < _NO_TIE:
            continue
        served = f", {said_time(found['service'])} in service" if found is slow else ""
        waits = f"{said_time(found['coming'])} for tokens still to come, {said_time(found['behind'])}"
        put_paragraph(console, "  ", f"{where}: {waits} behind other work{served}")


def _rebalancing(summary: Summary, console: Console) -> None:
    found = summary.get("rebalancing")
    if not found:
        return
    put_title(console, "Experts placed anew")
    left = found["moved"] - found["finished"]
    unfinished = f"{left:,} unfinished at the end, " if left else ""
    put_paragraph(
        console,
        "  ",
        f"{found['moved']:,} of {found['planned']:,} plans moved something: {found['copies']:,} copies, "
        f"{said_size(found['bytes'])} over links in {said_time(found['moving'])}, {unfinished}"
        f"stopped for {said_time(found['stopped'])} ({said_or_dash(said_share, found['stopped_share'])})",
    )
    ratio = "{:.2f} x".format
    imbalance, moves = found["imbalance"], found["of_moves"]
    whole = [said_or_dash(ratio, imbalance[key]) for key in ("first", "mean")]
    rows = [["whole run", whole[0], "-", whole[1]]]
    if found["moved"]:
        old, new = (
            [said_or_dash(ratio, moves[key]) for key in keys]
            for keys in (("before", "unmoved"), ("foreseen", "after"))
        )
        rows += [["loads observed", old[0], new[0], "-"], ["loads after it", old[1], "-", new[1]]]
    put_table(console, ["old places", "as planned", "as it was"], rows)
    if found["net"] is not None:
        put_line(
            console,
            f"  estimated gain {said_time(found['gained'])}, net of the stops {said_time(found['net'])}",
            "dim",
        )


def _memory(summary: Summary, console: Console) -> None:
    held = summary["memory"]
    if held is None:
        return
    put_title(console, "Memory of the fullest rank")
    parts = ", ".join(f"{part} {said_size(size)}" for part, size in held["parts"].items())
    capacity = "" if held["capacity"] is None else f" of {said_size(held['capacity'])}"
    put_paragraph(console, "  ", f"rank {held['rank']}: {said_size(held['total'])}{capacity}: {parts}")


def _prices(summary: Summary, console: Console) -> None:
    prices = summary["prices"]
    if not prices:
        return
    put_title(console, "How computing was priced")
    put_paragraph(console, "  ", _shares(prices["shares"]))
    bases = {one["basis"] or "data sheet": one["share"] for one in prices["bases"]}
    put_paragraph(console, "  ", f"by {_shares(bases)}")


def _shares(shares: Mapping[str, float]) -> str:
    """Those of something as percentages."""
    return ", ".join(f"{name} {said_share(share)}" for name, share in shares.items() if share > 0)


def _claimed(summary: Summary, console: Console) -> None:
    claim = summary["claimed"]
    if claim is None:
        return
    rows = [
        [
            label,
            said(found["claimed"]),
            said_or_dash(said, found["found"]),
            said_or_dash(said_ratio, found["ratio"]),
        ]
        for key, label, said in (
            ("total_tokens_per_second", "tokens/s", said_count),
            ("tpot", "TPOT", said_time),
        )
        if (found := claim[key]) is not None
    ]
    put_section(console, "Claimed and found", ["claimed", "found", "found/claimed"], rows)
    put_line(console, f"  claimed by {claim['source']}", "dim")


def _beside(summary: Summary, console: Console) -> None:
    other = summary.get("beside")
    if other is None:
        return
    rows = [
        [label, said(there), said_or_dash(said_ratio, other["ratio"][key])]
        for key, label, said in (
            ("total_tokens_per_second", "tokens/s", said_count),
            ("tpot", "TPOT", said_time),
            ("ttft", "TTFT", said_time),
            ("step", "step", said_time),
            ("imbalance", "busiest rank", said_ratio),
            ("dropped_share", "dropped", said_share),
        )
        if (there := other["found"].get(key)) is not None
        and (key != "dropped_share" or there or summary["throughput"]["dropped_share"])
    ]
    put_section(console, f"Beside it: {printable(other['label'])}", ["there", "here/there"], rows)


def _peers(summary: Summary, console: Console, peers: Mapping[str, Summary]) -> None:
    rows = [
        [
            f"{name}: tokens/s" if label == "tokens/s" else f"{name}: TPOT",
            said_or_dash(said, theirs),
            said_or_dash(said, ours),
            said_ratio(ours / theirs) if ours is not None and theirs else "-",
        ]
        for name, peer in peers.items()
        if "error" not in peer
        for label, said, theirs, ours in (
            ("tokens/s", said_count, _tokens(peer), _tokens(summary)),
            ("TPOT", said_time, _tpot(peer), _tpot(summary)),
        )
        if theirs is not None or ours is not None
    ]
    put_section(console, "Beside other results", ["there", "here", "here/there"], rows)


def _tokens(summary: Summary) -> float | None:
    rate: float | None = summary["throughput"]["total_tokens_per_second"]
    return rate


def _tpot(summary: Summary) -> float | None:
    found = summary["latency"]["tpot"]
    return None if found is None else found["mean"]


def put_notes(summary: Summary, console: Console) -> None:
    """The sentences on what stands out."""
    if not summary["notes"]:
        return
    put_title(console, "Notes")
    for note in summary["notes"]:
        put_paragraph(console, "  - ", note)


#: What follows the name in the first line, as far as the summary has it.
_HEAD: dict[str, Callable[[Any], str]] = {
    "seed": lambda seed: f"seed {seed}",
    "simulated_seconds": lambda seconds: f"{said_time(seconds)} simulated",
    "operators": lambda count: f"{count:,} operators",
    "wall_seconds": lambda seconds: f"in {said_time(seconds)}",
}

#: The sections in the order in which they are printed.
_SECTIONS: tuple[Callable[[Summary, Console], None], ...] = (
    _throughput,
    _latency,
    _steps,
    _gpus,
    _links,
    _exchanges,
    _experts,
    _rebalancing,
    _memory,
    _claimed,
    _beside,
    _prices,
)
