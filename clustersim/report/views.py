"""The views of a result for people at a terminal: tables, and lines whose letters grow darker with time."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from clustersim.analysis.utilization import STATES
from clustersim.report.page import (
    Cell,
    printable,
    put_line,
    put_paragraph,
    put_section,
    put_title,
    said_or_dash,
    said_share,
    said_size,
    said_time,
)
from clustersim.report.terminal import show
from clustersim.units import show as quantity

Found = Mapping[str, Any]

#: Nothing to full, and what is not known.
_BLOCKS, _LETTERS, _UNKNOWN = " ▁▂▃▄▅▆▇█", " .:-=+*#%@", "?"
_CELL = 34
#: A rank that would be waited for this share of what the first is without it is told.
_WORTH_NEXT = 0.1
_VIEWERS = {
    "perfetto": "open it in https://ui.perfetto.dev, where it does not leave your browser",
    "chrome": "open it in chrome://tracing or https://ui.perfetto.dev",
}
_WIDEST = 60
_QUEUE = ("queue", "coming", "behind", "p99 wait", "service")
#: Order of expert copies → what stands first.
_FIRST = {
    "": "the longest behind other work and in service",
    "load": "the most loaded",
    "wait": "the longest wait",
    "service": "the longest service",
    "behind": "the longest behind other work",
}


def show_summary(found: Found, console: Console) -> None:
    """Prints `study.views.summary_view`."""
    show(found["summary"], console)
    recorded = found["recorded"]
    steps = recorded["steps"]
    put_title(console, "Recorded")
    level = {"sums": "sums only", "spans": "sums and spans", "flows": "sums, spans and flows"}
    put_paragraph(
        console,
        "  ",
        f"{level[recorded['level']]}; spans of {steps['spans']:,} of {steps['all']:,} steps; "
        f"trace version {recorded['trace_version']}",
    )
    rows = ", ".join(f"{table} {count:,}" for table, count in recorded["rows"].items() if count)
    put_paragraph(console, "  ", f"rows: {rows}")
    put_line(console, "")
    put_line(console, f"Result: {found['folder']}")


def show_gpus(found: Found, console: Console, most: int) -> None:
    """Prints `study.views.gpus_view`; most: lines."""
    by, entries = found["by"], found["gpus"]
    if found["over_time"]:
        _gpus_over_time(found, console, most)
        return
    shown = entries[:most]
    what = f"{len(entries):,} GPUs" if by == "gpu" else f"{len(entries):,} {by}s, mean over their GPUs"
    title = f"{what}, share of {_said_window(found)}; longest without work first"
    if by == "gpu":
        columns = ["rank", "stage", *STATES, "MFU", "waited for"]
        rows: list[list[Cell]] = [
            [
                gpu["gpu"],
                str(gpu["rank"]),
                str(gpu["stage"]),
                *(said_share(gpu[state]) for state in STATES),
                said_or_dash(said_share, gpu["mfu"]),
                _waited_for(gpu["waited_for"]),
            ]
            for gpu in shown
        ]
    else:
        columns = ["GPUs", *STATES, "MFU", "worst"]
        rows = [
            [
                f"{by} {group[by]}",
                str(group["gpus"]),
                *(said_share(group[state]) for state in STATES),
                said_or_dash(said_share, group["mfu"]),
                Text(printable(group["worst"])),
            ]
            for group in shown
        ]
    put_section(console, title, columns, rows)
    _more(console, len(entries) - len(shown), "--top shows them")


def _waited_for(cause: Found | None) -> Text:
    if cause is None:
        return Text("")
    said = cause["operator"] if cause["rank"] is None else f"{cause['operator']} of rank {cause['rank']}"
    return Text(printable(said))


def _gpus_over_time(found: Found, console: Console, most: int) -> None:
    over, by = found["over_time"], found["by"]
    lines, state = over["lines"][:most], over["state"]
    said = "computing or exchanging" if state == "busy" else state
    label = str if by == "gpu" else f"{by} {{}}".format
    shares = [_shares_of(line, state) for line in lines]
    # Of what is mostly little the differences are worth seeing, of busy GPUs how far they are from full.
    full = (
        1.0
        if state == "busy"
        else max((v for values in shares for v in values if v is not None), default=0.0)
    )
    rows = [(label(line["name"]), values, full) for line, values in zip(lines, shares, strict=True)]
    title = f"Share of time {said}, {'GPU' if by == 'gpu' else by} by {'GPU' if by == 'gpu' else by}"
    put_heat(console, title, over["edges"], rows, said_share)
    _more(console, len(over["lines"]) - len(lines), "--top shows them")


def _shares_of(line: Found, state: str) -> list[float | None]:
    parts = ("compute", "exchange") if state == "busy" else (state,)
    return [
        None if None in values else sum(values)
        for values in zip(*(line[part] for part in parts), strict=True)
    ]


def show_links(found: Found, console: Console, most: int) -> None:
    """Prints `study.views.links_view`; most: links."""
    tiers, links = found["tiers"], found["links"]
    rows = [
        [
            tier,
            f"{about['links']:,}",
            said_size(about["bytes"]),
            said_share(about["mean"]),
            said_share(about["max"]),
        ]
        for tier, about in tiers.items()
    ]
    title = f"Links by tier, utilization in {_said_window(found)}"
    put_section(console, title, ["links", "bytes", "mean", "busiest"], rows)
    shown = links[:most]
    put_section(
        console,
        f"Busiest of {len(links):,} links that carried something",
        ["bytes", "used", "of", "tier"],
        [
            [
                link["link"],
                said_size(link["bytes"]),
                said_share(link["utilization"]),
                _said_rate(link["bandwidth"]),
                Text(printable(link["tier"])),
            ]
            for link in shown
        ],
    )
    _more(console, len(links) - len(shown), "--top shows them")
    over = found["over_time"]
    if not over:
        return
    for which, said in (("mean", "mean over the tier's links"), ("max", "its busiest link")):
        peak = max((max(line[which], default=0.0) for line in over["tiers"]), default=0.0)
        lines = [(line["tier"], line[which], peak) for line in over["tiers"]]
        put_heat(console, f"Utilization over time, {said}", over["edges"], lines, said_share)
    if over["links"]:
        peak = max(max(line["utilization"], default=0.0) for line in over["links"])
        lines = [(line["link"], line["utilization"], peak) for line in over["links"]]
        put_heat(console, "Utilization over time, link by link", over["edges"], lines, said_share)


def show_experts(found: Found, console: Console, most: int) -> None:
    """Prints `study.views.experts_view`; most: copies."""
    rows = [
        [
            f"layer {layer['layer']}",
            f"{layer['tokens']:,}",
            f"{layer['imbalance']:.2f} x",
            f"{layer['busiest']['expert']} ({layer['busiest']['load']:.2f} x)",
            *_queue_cells(layer),
        ]
        for layer in found["layers"]
    ]
    columns = ["tokens", "imbalance", "hottest expert", *_QUEUE]
    put_section(console, "Layers", columns, rows)
    copies = found["copies"]
    shown = copies[:most]
    put_section(
        console,
        f"{len(copies):,} expert copies, {_FIRST[found['order']]} first",
        ["rank", "layer", "expert", "tokens", "load", *_QUEUE],
        [
            [
                copy["gpu"],
                str(copy["rank"]),
                str(copy["layer"]),
                str(copy["expert"]),
                f"{copy['tokens']:,}",
                f"{copy['load']:.2f} x",
                *_queue_cells(copy),
            ]
            for copy in shown
        ],
    )
    _more(console, len(copies) - len(shown), "--top shows them")
    put_paragraph(
        console,
        "  ",
        "imbalance: tokens of the busiest EP rank / mean; load: tokens / mean of the layer's copies; queue: "
        "tokens there when service began, mean over passes; coming: waiting for tokens still to come; "
        "behind: then waiting behind other work of the rank; p99 wait: the worst pass",
    )
    over = found["over_time"]
    if over:
        lines = over["lines"][:most]
        peak = max((max(line["tokens"], default=0.0) for line in lines), default=0.0)
        named = [(line["gpu"], line["tokens"], peak) for line in lines]
        put_heat(console, "Tokens that wait, mean", over["edges"], named, "{:,.1f}".format)


def _queue_cells(entry: Found) -> list[str]:
    wait = entry["wait"]
    return [
        f"{entry['length']['mean']:,.1f}",
        said_or_dash(said_time, wait["coming"]),
        said_or_dash(said_time, wait["behind"]),
        said_time(wait["p99"]),
        said_time(entry["service"]),
    ]


def show_stragglers(found: Found, console: Console, most: int) -> None:
    """Prints `study.views.stragglers_view`; most: ranks and moments."""
    if not found["ranks"]:
        put_line(console, "No GPU waited for another.")
        return
    places = [
        [entry["operator"], said_time(entry["seconds"]), said_share(entry["share"]), str(entry["rank"])]
        for entry in found["operators"]
    ]
    put_section(console, "Where GPUs waited for others", ["all together", "share", "most for rank"], places)
    ranks = found["ranks"]
    put_section(
        console,
        f"{len(ranks):,} rank{'' if len(ranks) == 1 else 's'} that others waited for",
        ["rank", "stage", "all together", "share", "each, per step", "mostly at"],
        [
            [
                entry["gpu"],
                str(entry["rank"]),
                str(entry["stage"]),
                said_time(entry["seconds"]),
                said_share(entry["share"]),
                said_time(entry["each"]),
                _mostly(entry),
            ]
            for entry in ranks[:most]
        ],
    )
    _more(console, len(ranks) - most, "--top shows them")
    after = found["next"]
    if after is not None and after["wait"] >= _WORTH_NEXT * ranks[0]["each"]:
        put_line(console, "")
        put_paragraph(
            console,
            "  ",
            f"Without {ranks[0]['gpu']}, each would wait {said_time(after['wait'])} per step for "
            f"{after['gpu']} (rank {after['rank']}).",
        )
    moments = found["moments"]
    if moments is None:
        put_line(console, "")
        put_paragraph(console, "  ", f"When: {found['note']}")
        return
    put_section(
        console,
        f"Longest of {found['moments_all']:,} times that ranks waited for one",
        ["from", "to", "layer", "step", "for rank", "ranks", "longest", "all together"],
        [
            [
                moment["operator"],
                _said_moment(moment["start"]),
                _said_moment(moment["end"]),
                str(moment["layer"]) if moment["layer"] >= 0 else "-",
                said_or_dash(str, moment["step"]),
                str(moment["rank"]) if moment["rank"] >= 0 else "?",
                str(moment["ranks"]),
                said_time(moment["longest"]),
                said_time(moment["seconds"]),
            ]
            for moment in moments[:most]
        ],
    )


def _mostly(entry: Found) -> Text:
    """Where, and why if the rank itself has a reason."""
    place = entry["at"][0]
    where = place["operator"] + (f" L{place['layer']}" if place["layer"] >= 0 else "")
    why = {
        "slow GPU": f"slow GPU, {entry['slowness']:.2f} x",
        "more tokens": f"more tokens, {entry['load'] or 0.0:.2f} x",
    }
    return Text(printable("; ".join([where, *(why[reason] for reason in entry["reasons"])])))


# ---- a slice of time ----------------------------------------------------------------------------


def show_slice(found: Found, console: Console, most: int) -> None:
    """Prints `study.views.slice_view`: time downwards, streams side by side; most: lines."""
    begin, end = found["window"]
    marks = _marks(console)
    for gpu in found["gpus"]:
        put_line(
            console,
            f"rank {gpu['rank']}  {gpu['gpu']}, server {gpu['server']}, stage {gpu['stage']}: "
            f"{said_time(begin)} to {said_time(end)}",
            "bold",
        )
    put_line(
        console,
        "  " + "  ".join(f"{mark} {state}" for state, mark in marks.items() if state != "idle"),
        "dim",
    )
    if not found["whole"]:
        put_line(console, "  Not all spans of this time were recorded: idle may be what is not known.")
    columns = [(gpu["rank"], stream) for gpu in found["gpus"] for stream in gpu["streams"]]
    lanes = [_lane(found["pieces"], rank, stream, begin, end) for rank, stream in columns]
    heads = [stream if len(found["gpus"]) == 1 else f"rank {rank} {stream}" for rank, stream in columns]
    times = sorted({max(piece["start"], begin) for lane in lanes for piece in lane})
    if not times:
        put_line(console, "  nothing")
        return
    width = _CELL if len(lanes) < 4 else 28
    put_line(console, f"  {'from':>12}  " + "".join(f"{head:<{width}}" for head in heads), "dim")
    for time in times[:most]:
        cells = [_cell(lane, time, begin, marks, width) for lane in lanes]
        put_line(console, f"  {_said_moment(time):>12}  {''.join(cells).rstrip()}")
    if len(times) <= most:
        put_line(console, f"  {_said_moment(end):>12}  end", "dim")
    _more(console, len(times) - most, "--rows shows them")


def _said_moment(seconds: float) -> str:
    """With digits enough to tell operators apart."""
    return quantity(seconds, "time", 6)


def _marks(console: Console) -> dict[str, str]:
    """State → what stands for it."""
    letters = "#=.:" if console.options.ascii_only else "█▒·┊"
    return dict(zip(("compute", "exchange", "wait", "idle"), letters, strict=True))


def _lane(pieces: Sequence[Found], rank: int, stream: str, begin: float, end: float) -> list[Found]:
    """The pieces of one stream in order, with idle ones between those of the compute stream."""
    mine = [piece for piece in pieces if piece["rank"] == rank and piece["stream"] == stream]
    if stream != "compute":
        return mine
    lane: list[Found] = []
    at = begin
    for piece in mine:
        if piece["start"] > at:
            lane.append({"state": "idle", "start": at, "end": piece["start"]})
        lane.append(piece)
        at = max(at, piece["end"])
    if at < end:
        lane.append({"state": "idle", "start": at, "end": end})
    return lane


def _cell(lane: Sequence[Found], time: float, begin: float, marks: Mapping[str, str], width: int) -> str:
    """What a stream does from `time` on: named where it begins, a mark where it goes on."""
    starting = [piece for piece in lane if max(piece["start"], begin) == time]
    # Of pieces that begin together all but the last took no time.
    if starting:
        piece = starting[-1]
        said = f"{marks[piece['state']]} {_said_piece(piece)} {said_time(piece['end'] - piece['start'])}"
        return f"{said[: width - 1]:<{width}}"
    going = next((piece for piece in lane if piece["start"] < time < piece["end"]), None)
    return f"{marks[going['state']] if going else '':<{width}}"


def _said_piece(piece: Found) -> str:
    if piece["state"] == "idle":
        return "idle"
    where = piece["operator"] + (f" L{piece['layer']}" if piece["layer"] >= 0 else "")
    if piece["state"] != "wait":
        return str(printable(where))
    awaited = "" if piece["rank_awaited"] is None else f" r{piece['rank_awaited']}"
    return printable(f"wait{awaited}: {where}")


# ---- answers of queries -------------------------------------------------------------------------


def show_export(found: Found, console: Console) -> None:
    """Prints what `study.exporting.export` found."""
    window = " to ".join(said_time(second) for second in found["window"])
    put_title(console, f"{found['path']}: {said_size(found['bytes'])}")
    if found["format"] == "csv":
        rows = ", ".join(f"{table} {count:,}" for table, count in found["rows"].items() if count)
        put_paragraph(console, "  ", f"a file per table, of {window}; rows: {rows}")
        return
    put_paragraph(
        console,
        "  ",
        f"{found['spans']:,} spans of {window}: {found['slices']:,} slices, {found['arrows']:,} arrows, "
        f"{found['points']:,} points of counters",
    )
    put_paragraph(console, "  ", _VIEWERS[found["format"]])


def show_answer(found: Found, console: Console) -> None:
    """Prints `study.views.sql_view` as a table: numbers to the right, all else to the left."""
    numeric = [_is_number(kind) for kind in found["types"]]
    cells = [
        [_said_value(value, right) for value, right in zip(row, numeric, strict=True)]
        for row in found["rows"]
    ]
    heads = [printable(name) for name in found["columns"]]
    widths = [max([len(head), *(len(row[n]) for row in cells)]) for n, head in enumerate(heads)]
    for style, row in (("dim", heads), *(("", row) for row in cells)):
        line = "  ".join(
            f"{cell:>{width}}" if right else f"{cell:<{width}}"
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        put_line(console, line.rstrip(), style)


def to_csv(found: Found) -> str:
    """The answer as CSV: every number as it is, nothing where there is none."""
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(found["columns"])
    writer.writerows(["" if value is None else value for value in row] for row in found["rows"])
    return sheet.getvalue()


def _is_number(kind: str) -> bool:
    return kind.startswith(("INT", "BIGINT", "SMALLINT", "TINYINT", "U", "HUGEINT", "DOUBLE", "FLOAT", "DEC"))


def _said_value(value: Any, number: bool) -> str:
    if value is None:
        return "-"
    if number and isinstance(value, float):
        return f"{value:.6g}"
    return printable(str(value))


# ---- lines over time ----------------------------------------------------------------------------


def put_heat(
    console: Console,
    title: str,
    edges: Sequence[float],
    lines: Sequence[tuple[str, Sequence[float | None], float]],
    said: Callable[[float], str],
) -> None:
    """A title, one line of letters for each name, and the times at both ends.

    lines  name, a value for each bin (None: not known), and the value of the darkest letter
    said   how the largest value and the mean of a line are written
    """
    if not lines:
        return
    rows: list[list[Cell]] = []
    for name, values, full in lines:
        known = [value for value in values if value is not None]
        mean = said(sum(known) / len(known)) if known else "-"
        rows.append([name, _heat(values, full, console), mean, said(max(known)) if known else "-"])
    begin, end = said_time(edges[0]), said_time(edges[-1])
    ruler = Text(f"{begin}{end:>{max(len(lines[0][1]) + 2 - len(begin), len(end) + 1)}}", "dim")
    put_section(console, title, ["", "mean", "most"], [*rows, ["", ruler, "", ""]])
    peak = max(full for _, _, full in lines)
    letters = _scale(console)
    put_line(console, f"  '{letters[0]}' nothing to '{letters[-1]}' {said(peak)}", "dim")


def _scale(console: Console) -> str:
    return _LETTERS if console.options.ascii_only else _BLOCKS


def _heat(values: Sequence[float | None], full: float, console: Console) -> Text:
    letters = _scale(console)
    line = "".join(_letter(value, full, letters) for value in values)
    return Text.assemble(
        "|" if console.options.ascii_only else "▏", (line, "cyan"), "|" if console.options.ascii_only else "▕"
    )


def _letter(value: float | None, full: float, letters: str) -> str:
    if value is None:
        return _UNKNOWN
    if value <= 0 or full <= 0:
        return letters[0]
    # Whatever is there at all is seen.
    return letters[min(max(math.ceil(value / full * (len(letters) - 1) - 0.5), 1), len(letters) - 1)]


def _said_window(found: Found) -> str:
    begin, end = found["window"]
    return f"{said_time(begin)} to {said_time(end)}"


def _said_rate(bandwidth: float) -> str:
    return f"{said_size(bandwidth)}/s"


def _more(console: Console, count: int, how: str) -> None:
    if count > 0:
        put_line(console, f"  and {count:,} more; {how}", "dim")
