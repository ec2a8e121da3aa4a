"""A run's summary for people at a terminal; plain text without colours where the output is piped.

Words that come from files are printed as they are: never read as markup, control characters escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.analysis.utilization import STATES, busiest, spread, worst
from clustersim.errors import ScenarioError
from clustersim.units import show as quantity

Summary = Mapping[str, Any]
Cell = str | Text

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
_LINKS_SHOWN = 5
_LABEL_WIDTH = 12
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
        _line(console, f"  failed: {summary['error']}", "red")
    else:
        for section in _SECTIONS:
            section(summary, console)
        _peers(summary, console, peers or {})
        _notes(summary, console)
    if path is not None:
        _line(console, "")
        _line(console, f"Result: {path}")


def show_mistakes(error: ScenarioError, console: Console) -> None:
    """Prints one line per mistake, however long, exactly as the error words it."""
    for line in error.lines():
        _line(console, line)


def _headline(summary: Summary, console: Console) -> None:
    head = Text.assemble((_clean(summary.get("name") or "?"), "bold"))
    for key, said in _HEAD.items():
        if summary.get(key) is not None:
            head.append(f"  {said(summary[key])}", style="dim")
    console.print(head, soft_wrap=True)


def _throughput(summary: Summary, console: Console) -> None:
    rates = summary["throughput"]
    total, output, read = (rates[f"{side}_tokens_per_second"] for side in ("total", "output", "input"))
    if total is not None:
        _line(
            console,
            f"  {_count(total)} tokens/s  (output {_count(output)}, input {_count(read)})",
            "bold green",
        )


def _latency(summary: Summary, console: Console) -> None:
    rows = [
        [label, *(_time(found[column]) for column in _COLUMNS), f"{found['count']:,}"]
        for key, label in _LATENCIES.items()
        if (found := summary["latency"][key]) is not None
    ]
    _section(console, "Latency", [*_COLUMNS, "count"], rows)


def _steps(summary: Summary, console: Console) -> None:
    """Where a step's time goes, phase by phase, with the bounds no step can beat."""
    for phase, found in summary["phases"].items():
        mean = found["step"]["mean"]
        title = f"Where a {phase} step's {_time(mean)} go, mean over GPUs"
        rows = list(_part_rows(found["parts"], mean, console))
        _section(console, title, ["", "busy", "wait", "share"], rows)
        _line(console, f"  {_legend(console)}", "dim")
        _paragraph(console, "  ", f"{_rate(found)}; {_bounds(found['step'], found['bounds'])}")


def _part_rows(parts: Sequence[Summary], step: float, console: Console) -> Iterator[list[Cell]]:
    """Rows of label, bar, busy, wait, share of the step; what runs beside the compute stream last."""
    inline = [part for part in parts if part["stream"] == "compute"]
    shown, others = inline[:_PARTS_SHOWN], inline[_PARTS_SHOWN:]
    rows = [(part["operator"], part["busy"], part["wait"]) for part in shown]
    if others:
        sums = (sum(part[key] for part in others) for key in ("busy", "wait"))
        rows.append((f"{len(others)} others", *sums))
    longest = max((busy + wait for _, busy, wait in rows), default=0.0)
    for operator, busy, wait in rows:
        bar = _bar(busy, wait, longest, console)
        yield [operator, bar, _time(busy), _time(wait), _part_of(step, busy + wait)]
    idle = max(step - sum(part["busy"] + part["wait"] for part in inline), 0.0)
    yield ["idle", Text(""), "", _time(idle), _part_of(step, idle)]
    for part in parts:
        if part["stream"] != "compute":
            label = f"{part['operator']} ({part['stream']})"
            yield [label, Text("beside", "dim"), _time(part["busy"]), _time(part["wait"]), ""]


def _part_of(step: float, seconds: float) -> str:
    return _share(seconds / step) if step > 0 else ""


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
    return f"{phase['steps']:,} steps" + (f", {_count(rate)} tokens/s" if rate is not None else "")


def _bounds(step: Summary, bounds: Summary) -> str:
    parts = ", ".join(f"{kind} {_time(bounds[kind])}" for kind in _ordered(bounds))
    return f"step {_time(step['mean'])}; bounds: {parts}"


def _ordered(bounds: Summary) -> list[str]:
    return sorted(_BOUNDS, key=lambda kind: -bounds[kind])


def _gpus(summary: Summary, console: Console) -> None:
    gpus = summary["gpus"]
    rows = []
    for key in (*STATES, "mfu"):
        found = spread(gpus, key)
        if found is not None:
            label = "MFU" if key == "mfu" else key
            rows.append([label, *(_share(found[which]) for which in ("min", "mean", "max"))])
    _section(console, f"{len(gpus):,} GPUs, share of the run", ["min", "mean", "max"], rows)
    waiting = [
        [
            gpu["gpu"],
            str(gpu["rank"]),
            str(gpu["stage"]),
            _share(gpu["wait"]),
            _share(gpu["idle"]),
            _cause(gpu),
        ]
        for gpu in worst(gpus, _WORST_SHOWN)
    ]
    _section(console, "Longest without work", ["rank", "stage", "wait", "idle", "waited for"], waiting)


def _cause(gpu: Summary) -> Cell:
    cause = gpu["waited_for"]
    if cause is None:
        return Text("")
    said = cause["operator"] if cause["rank"] is None else f"{cause['operator']} of rank {cause['rank']}"
    return Text(_clean(said))


def _links(summary: Summary, console: Console) -> None:
    rows = [
        [tier, f"{found['links']:,}", _size(found["bytes"]), _share(found["mean"]), _share(found["max"])]
        for tier, found in summary["tiers"].items()
    ]
    _section(console, "Links by tier", ["links", "bytes", "mean", "max"], rows)
    most = [
        [link["link"], _size(link["bytes"]), _share(link["utilization"])]
        for link in busiest(summary["links"], _LINKS_SHOWN)
    ]
    _section(console, "Busiest links", ["bytes", "used"], most)


def _experts(summary: Summary, console: Console) -> None:
    experts = summary["experts"]
    if experts is None:
        return
    _title(console, "Experts")
    imbalance, length = experts["imbalance"], experts["queue_length"]
    _paragraph(
        console,
        "  ",
        f"busiest rank {imbalance['mean']:.2f} x the mean load ({imbalance['max']:.2f} x at worst); "
        f"queues of {length['mean']:,.1f} tokens ({length['max']:,} at most)",
    )
    rows = [
        [label, *(_time(experts[key][column]) for column in ("mean", "p50", "p99", "max"))]
        for key, label in (("queue_wait", "queue wait"), ("service", "service"))
    ]
    _table(console, ["mean", "p50", "p99", "max"], rows)


def _memory(summary: Summary, console: Console) -> None:
    held = summary["memory"]
    if held is None:
        return
    _title(console, "Memory of the fullest rank")
    parts = ", ".join(f"{part} {_size(size)}" for part, size in held["parts"].items())
    capacity = "" if held["capacity"] is None else f" of {_size(held['capacity'])}"
    _paragraph(console, "  ", f"rank {held['rank']}: {_size(held['total'])}{capacity}: {parts}")


def _prices(summary: Summary, console: Console) -> None:
    prices = summary["prices"]
    if not prices:
        return
    _title(console, "How durations were found")
    _paragraph(console, "  ", _origins(prices))


def _origins(prices: Mapping[str, Any]) -> str:
    """Shares of one as percentages, those of nothing left out; other values as they are."""
    shares = list(prices.values())
    if all(isinstance(share, float) for share in shares) and abs(sum(shares) - 1.0) < 1e-6:
        return ", ".join(f"{origin} {_share(share)}" for origin, share in prices.items() if share > 0)
    return _listed(prices)


def _listed(value: Any) -> str:
    """Any JSON value on one line; numbers grouped, nested tables in brackets."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_nested(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_nested(entry) for entry in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return str(value)


def _nested(value: Any) -> str:
    return f"({_listed(value)})" if isinstance(value, Mapping | list) else _listed(value)


def _claimed(summary: Summary, console: Console) -> None:
    claim = summary["claimed"]
    if claim is None:
        return
    rows = [
        [label, said(found["claimed"]), _or_none(said, found["found"]), _or_none(_times, found["ratio"])]
        for key, label, said in (
            ("total_tokens_per_second", "tokens/s", _count),
            ("tpot", "TPOT", _time),
        )
        if (found := claim[key]) is not None
    ]
    _section(console, "Claimed and found", ["claimed", "found", "found/claimed"], rows)
    _line(console, f"  claimed by {claim['source']}", "dim")


def _peers(summary: Summary, console: Console, peers: Mapping[str, Summary]) -> None:
    rows = [
        [
            f"{name}: tokens/s" if label == "tokens/s" else f"{name}: TPOT",
            _or_none(said, theirs),
            _or_none(said, ours),
            _times(ours / theirs) if ours is not None and theirs else "-",
        ]
        for name, peer in peers.items()
        if "error" not in peer
        for label, said, theirs, ours in (
            ("tokens/s", _count, _tokens(peer), _tokens(summary)),
            ("TPOT", _time, _tpot(peer), _tpot(summary)),
        )
        if theirs is not None or ours is not None
    ]
    _section(console, "Beside other results", ["there", "here", "here/there"], rows)


def _tokens(summary: Summary) -> float | None:
    rate: float | None = summary["throughput"]["total_tokens_per_second"]
    return rate


def _tpot(summary: Summary) -> float | None:
    found = summary["latency"]["tpot"]
    return None if found is None else found["mean"]


def _notes(summary: Summary, console: Console) -> None:
    if not summary["notes"]:
        return
    _title(console, "Notes")
    for note in summary["notes"]:
        _paragraph(console, "  - ", note)


def _section(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A title and a table under it; nothing at all without rows."""
    if rows:
        _title(console, title)
        _table(console, columns, rows)


def _table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A label, then columns: text to the right, Text to the left; lines are never folded or padded."""
    cells = [[cell if isinstance(cell, Text) else Text(_clean(cell)) for cell in row] for row in rows]
    head = [Text(column, "dim") for column in ("", *columns)]
    lefts = [place == 0 or isinstance(cell, Text) for place, cell in enumerate(rows[0])]
    widths = [max(cell.cell_len for cell in column) for column in zip(head, *cells, strict=True)]
    widths[0] = max(widths[0], _LABEL_WIDTH)
    for row in (head, *cells):
        line = Text("  ")
        for cell, width, left in zip(row, widths, lefts, strict=True):
            gap = " " * (width - cell.cell_len)
            line.append_text(Text.assemble(cell, gap, "  ") if left else Text.assemble(gap, cell, "  "))
        line.rstrip()
        console.print(line, soft_wrap=True)


def _title(console: Console, title: str) -> None:
    _line(console, "")
    _line(console, title, "bold")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(_clean(text), style=style), soft_wrap=True)


def _paragraph(console: Console, mark: str, text: str) -> None:
    """The text in lines as wide as the console, the mark before the first and blanks before the others."""
    lines = Text(_clean(text)).wrap(console, max(console.width - len(mark), 20))
    for before, line in zip(chain([mark], repeat(" " * len(mark))), lines, strict=False):
        line.rstrip()
        console.print(Text.assemble(before, line), soft_wrap=True)


def _clean(text: str) -> str:
    """The text on one line: what does not print is escaped, so no file can steer the terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def _time(seconds: float) -> str:
    return quantity(seconds, "time")


def _size(size: float) -> str:
    return quantity(size, "size") if size else "0 B"


def _share(share: float) -> str:
    return f"{share:.1%}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} x"


def _or_none(said: Any, value: float | None) -> str:
    return "-" if value is None else str(said(value))


#: What follows the name in the first line, as far as the summary has it.
_HEAD: dict[str, Callable[[Any], str]] = {
    "seed": lambda seed: f"seed {seed}",
    "simulated_seconds": lambda seconds: f"{_time(seconds)} simulated",
    "operators": lambda count: f"{count:,} operators",
    "wall_seconds": lambda seconds: f"in {_time(seconds)}",
}

#: The sections in the order in which they are printed.
_SECTIONS: tuple[Callable[[Summary, Console], None], ...] = (
    _throughput,
    _latency,
    _steps,
    _gpus,
    _links,
    _experts,
    _memory,
    _claimed,
    _prices,
)
