"""The report of a run: one page with what it found, where time went, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clustersim.analysis.critical_path import CAUSES
from clustersim.analysis.latency import distribution
from clustersim.report.html import page
from clustersim.report.html_content import Bounds, Content
from clustersim.report.html_machine import experts, gpus, links, troubles
from clustersim.report.html_parts import (
    Figure,
    Missing,
    Section,
    Table,
    bullets,
    first_rows,
    paragraph,
    text,
    time,
)
from clustersim.report.html_plots import against, axis, distributions, layout, stacked, unit_of
from clustersim.report.html_step import CAUSE_NAMES, one_step
from clustersim.report.html_theme import colour
from clustersim.report.page import said_count, said_or_dash, said_ratio, said_share, said_size
from clustersim.report.price import ORIGIN_SENTENCES

_LATENCIES = {
    "step": "step",
    "token_batch": "token batch",
    "tpot": "TPOT",
    "ttft": "TTFT",
    "request": "request",
}
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
#: Operators that get a bar of their own.
_OPERATORS = 14
_STRAGGLERS = 10
#: Share of a step from which on being idle is drawn.
_WORTH_A_BAR = 0.0005
#: Letters of one line of a scenario; what is packed into it for machines is cut.
_LONGEST_LINE = 4000

_ORIGIN_COLOURS = {"measured": "a", "interpolated": "f", "extrapolated": "wait", "formula": "b"}
_FLOORS = {
    "memory": "floor: reading HBM",
    "compute": "floor: computing",
    "network": "floor: bytes of the busiest link",
}


def report_page(content: Content) -> str:
    """The report as one HTML file."""
    sections = [
        _brief(content),
        _latency(content),
        _time(content),
        one_step(content),
        _bounds(content),
        gpus(content),
        links(content),
        experts(content),
        *troubles(content),
        _prices(content),
        _scenario(content),
    ]
    return page(f"{content.name}: what happened, and why", _lead(content), sections)


def _lead(content: Content) -> str:
    summary = content.summary
    known = [
        f"{len(summary['gpus']):,} GPUs" + (f" ({content.gpu})" if content.gpu else ""),
        f"{time(summary['simulated_seconds'])} simulated",
        f"{summary['operators']:,} operators",
        f"seed {summary['seed']}",
        f"result {content.folder}",
    ]
    about = paragraph(content.about) if content.about else ""
    return about + paragraph(" · ".join(known), "about")


# ---- in brief -----------------------------------------------------------------------------------


def _brief(content: Content) -> Section:
    summary = content.summary
    parts: list[str | Table | Figure | Missing] = [_numbers(list(_headlines(summary)))]
    claim = summary["claimed"]
    if claim:
        parts.append(_claims(claim))
    if summary["notes"]:
        parts += ["<h3>What stands out</h3>", bullets(summary["notes"])]
    return Section("brief", "In brief", parts)


def _headlines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What, how much, and what stands beside it."""
    claim = summary["claimed"] or {}
    rates, latency = summary["throughput"], summary["latency"]
    rate = rates["total_tokens_per_second"]
    if rate is not None:
        split = (
            f"output {said_count(rates['output_tokens_per_second'])}, "
            f"input {said_count(rates['input_tokens_per_second'])}"
        )
        yield (
            "Tokens per second",
            said_count(rate),
            _beside(claim, "total_tokens_per_second", said_count, split),
        )
    for key, name in (("tpot", "Time per output token"), ("ttft", "Time to first token"), ("step", "Step")):
        found = latency[key]
        if found is not None:
            yield f"{name}, mean", time(found["mean"]), _beside(claim, key, time, f"p99 {time(found['p99'])}")
    states = {state: _mean(summary["gpus"], state) for state in ("compute", "exchange", "wait", "idle")}
    busiest = f"exchanging {said_share(states['exchange'])}, waiting {said_share(states['wait'])}, "
    yield "GPUs computing", said_share(states["compute"]), busiest + f"idle {said_share(states['idle'])}"
    yield "MFU", said_or_dash(said_share, summary["mfu"]), "useful FLOP of all GPUs ÷ peak FLOP"
    if summary["experts"]:
        uneven = summary["experts"]["imbalance"]
        yield (
            "Busiest expert rank",
            f"{uneven['mean']:.2f} x",
            f"of the mean load; at worst {uneven['max']:.2f} x",
        )


def _mean(entries: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(entry[key] for entry in entries)) / max(len(entries), 1)


def _beside(claim: Mapping[str, Any], key: str, said: Any, otherwise: str) -> str:
    one = claim.get(key)
    return f"claimed {said(one['claimed'])}" if one else otherwise


def _numbers(entries: Sequence[tuple[str, str, str]]) -> str:
    inside = "".join(
        f'<div><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>'
        f'<dd class="beside">{text(beside)}</dd></div>'
        for name, value, beside in entries
    )
    return f'<dl class="numbers">{inside}</dl>'


def _claims(claim: Mapping[str, Any]) -> Table:
    kinds = (("total_tokens_per_second", "tokens per second", said_count), ("tpot", "TPOT, mean", time))
    rows = [
        [
            name,
            said(one["claimed"]),
            said_or_dash(said, one["found"]),
            said_or_dash(said_ratio, one["ratio"]),
        ]
        for key, name, said in kinds
        if (one := claim[key])
    ]
    head = ["", "claimed", "found", "found ÷ claimed"]
    return Table(head, rows, note=f"Claimed by: {claim['source']}" if claim["source"] else "")


# ---- latency ------------------------------------------------------------------------------------


def _latency(content: Content) -> Section:
    figures = [
        _distributed(content, name, title, keys)
        for name, title, keys in (
            ("latencies", "How long steps took, and tokens", ("step", "token_batch", "tpot")),
            ("requests", "How long requests took", ("ttft", "request")),
        )
        if any(len(content.samples[key]) for key in keys)
    ]
    if not figures:
        return Section("latency", "Latency", [Missing("No step was finished in this run.")])
    words = (
        "TPOT is the mean time per further output token of a request, TTFT the time from its arrival to "
        "its first token; a token batch is one pass of a micro-batch through all pipeline stages."
    )
    return Section("latency", "Latency", [*figures, paragraph(words, "note")])


def _distributed(content: Content, name: str, title: str, keys: Sequence[str]) -> Figure:
    samples = {_LATENCIES[key]: content.samples[key] for key in keys if len(content.samples[key])}
    rows, said = [], []
    for what, values in samples.items():
        found = distribution(values)
        assert found is not None
        rows.append([what, *(time(found[column]) for column in _COLUMNS), f"{found['count']:,}"])
        said.append(f"{what} {time(found['p50'])}, {time(found['p99'])}")
    return Figure(
        name,
        title,
        f"Share of them that took at most so long. Median and 99th percentile: {'; '.join(said)}.",
        distributions({what: (values, None) for what, values in samples.items()}, "time taken"),
        Table(["", *_COLUMNS, "count"], rows),
        open=True,
    )


# ---- where a step's time goes -------------------------------------------------------------------


def _time(content: Content) -> Section:
    parts: list[str | Table | Figure | Missing] = [
        _operators(phase, found) for phase, found in content.summary["phases"].items()
    ]
    shares = content.shares
    parts.append(shares if isinstance(shares, Missing) else _causes(shares))
    if content.stragglers:
        parts += ["<h3>Who was waited for</h3>", _stragglers(content.stragglers)]
    return Section("time", "Where a step’s time goes", parts)


def _operators(phase: str, found: Mapping[str, Any]) -> Figure:
    period = found["period"]
    inline = [part for part in found["parts"] if part["stream"] == "compute"]
    shown = [(part["operator"], part["busy"], part["wait"]) for part in inline[:_OPERATORS]]
    others = inline[_OPERATORS:]
    if others:
        busy, wait = (sum(part[key] for part in others) for key in ("busy", "wait"))
        shown.append((f"{len(others)} others", busy, wait))
    idle = max(period - sum(part["busy"] + part["wait"] for part in inline), 0.0)
    kinds = {part["operator"]: part["kind"] for part in inline}
    if idle > _WORTH_A_BAR * period:
        shown.append(("idle", 0.0, 0.0))
    names = [name for name, _, _ in shown]

    def sizes(kind: str) -> list[float]:
        return [busy if kinds.get(name, "compute") == kind else 0.0 for name, busy, _ in shown]

    factor, unit = unit_of(max(max((busy + wait for _, busy, wait in shown), default=0.0), idle))
    bars = {
        "computing": ("compute", sizes("compute")),
        "exchanging": ("exchange", sizes("exchange")),
        "waiting for others": ("wait", [wait for _, _, wait in shown]),
        "idle": ("idle", [idle if name == "idle" else 0.0 for name in names]),
    }
    bars = {name: bar for name, bar in bars.items() if any(bar[1]) or name == "computing"}
    rows = [
        [name, time(busy), time(wait), _share(busy + wait, period)]
        for name, busy, wait in shown
        if name != "idle"
    ]
    rows.append(["idle", "", time(idle), _share(idle, period)])
    rows += [
        [f"{part['operator']} (beside, on {part['stream']})", time(part["busy"]), time(part["wait"]), ""]
        for part in found["parts"]
        if part["stream"] != "compute"
    ]
    most = max(shown, key=lambda row: row[1] + row[2], default=("nothing", 0.0, 0.0))
    says = (
        f"A {phase} step costs {time(period)}: the time of a GPU in it by operator, mean over all GPUs and "
        f"{_counted(found['steps'], 'step')}. Most goes to {most[0]}, {time(most[1] + most[2])} "
        f"({_share(most[1] + most[2], period)}); a GPU is without work for {time(idle)}."
    )
    return Figure(
        f"operators-{phase}",
        f"The time of a {phase} step, by operator",
        says,
        stacked(names, bars, f"time per step and GPU ({unit})", factor, unit),
        Table(["operator", "busy", "wait", "share of the step"], rows),
    )


def _causes(shares: Mapping[str, Any]) -> Figure:
    mean, p99 = shares["mean"], shares["p99"]
    names = [f"mean of {_counted(shares['steps'], 'step')}", f"p99 step ({p99['step']})"]
    causes = [cause for cause in CAUSES if cause in mean["by"] or cause in p99["by"]]
    factor, unit = unit_of(max(mean["seconds"], p99["seconds"]))
    bars = {
        CAUSE_NAMES[cause]: (cause, [one["by"].get(cause, 0.0) for one in (mean, p99)]) for cause in causes
    }
    rows = [
        [
            CAUSE_NAMES[cause],
            *(cell for one in (mean, p99) for cell in _of_path(one, cause)),
            CAUSES[cause],
        ]
        for cause in causes
    ]
    largest = sorted(causes, key=lambda cause: -mean["by"].get(cause, 0.0))[:3]
    said = ", ".join(f"{CAUSE_NAMES[c]} {_share(mean['by'].get(c, 0.0), mean['seconds'])}" for c in largest)
    return Figure(
        "causes",
        "What steps waited for: their critical paths, by cause",
        f"What stood in the way of a step’s end at every moment. The parts add up to its latency: {said} of "
        f"the mean step of {time(mean['seconds'])}; the p99 step took {time(p99['seconds'])}.",
        stacked(names, bars, f"time on the critical path ({unit})", factor, unit, more=40),
        Table(["cause", "mean step", "share", "p99 step", "share", "what it is"], rows, left=(0, 5)),
    )


def _of_path(one: Mapping[str, Any], cause: str) -> list[str]:
    seconds = one["by"].get(cause, 0.0)
    return [time(seconds), _share(seconds, one["seconds"])]


def _stragglers(found: Sequence[Mapping[str, Any]]) -> Table:
    def where(one: Mapping[str, Any]) -> str:
        at = one["at"][0]
        layer = f", layer {at['layer']}" if at["layer"] >= 0 else ""
        return f"{at['operator']}{layer}"

    rows = [
        [
            f"rank {one['rank']} ({one['gpu']})",
            str(one["stage"]),
            time(one["each"]),
            said_share(one["share"]),
            said_or_dash("{:.2f} x".format, one["load"]),
            f"{one['slowness']:.2f} x",
            where(one),
            " and ".join(one["reasons"]) or "held up itself",
        ]
        for one in found
    ]
    shown, note = first_rows(rows, "clustersim trace stragglers", _STRAGGLERS)
    head = [
        "rank",
        "stage",
        "each other waits per step",
        "of all waiting",
        "load",
        "slowness",
        "mostly at",
        "why",
    ]
    return Table(head, shown, left=(0, 6, 7), note=note)


def _share(part: float, whole: float) -> str:
    return said_share(part / whole) if whole > 0 else "-"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


# ---- bounds -------------------------------------------------------------------------------------


def _bounds(content: Content) -> Section:
    floors, step = content.summary["bounds"], content.summary["latency"]["step"]
    if floors is None or step is None:
        return Section("bounds", "The bounds", [Missing("No step was finished in this run.")])
    found = content.bounds
    parts: list[str | Table | Figure | Missing] = [_bars(floors, step["mean"], found)]
    if isinstance(found, Missing):
        parts.append(found)
    else:
        parts.append(bullets([f"{_plain(one.name)}: {one.words}." for one in found.bounds]))
        if found.unexplained > 0:
            off = time(found.unexplained)
            parts.append(
                paragraph(
                    f"What the recorded graph does not explain keeps its length, {off} at most.", "note"
                )
            )
    return Section("bounds", "The bounds", parts)


def _bars(floors: Mapping[str, Any], mean: float, found: Bounds | Missing) -> Figure:
    names, seconds, tints, words = ["as recorded"], [mean], ["ink"], ["mean step of this run"]
    rows = [["as recorded", time(mean), "1 x", "", "", ""]]
    for one in [] if isinstance(found, Missing) else found.bounds:
        names.append(_plain(one.name))
        seconds.append(one.seconds)
        tints.append("compute")
        words.append(one.words.split(" if ")[0])
        rows.append(
            [
                _plain(one.name),
                time(one.seconds),
                said_ratio(one.speedup),
                said_share(one.faster),
                time(one.p99),
                said_share(one.of_p99),
            ]
        )
    for kind in sorted(_FLOORS, key=lambda kind: -floors[kind]):
        names.append(_FLOORS[kind])
        seconds.append(floors[kind])
        tints.append("idle")
        words.append("no step of this deployment can be faster")
        rows.append(
            [
                _FLOORS[kind],
                time(floors[kind]),
                said_ratio(mean / floors[kind]) if floors[kind] else "-",
                *("",) * 3,
            ]
        )
    bound = floors["bound_by"]
    says = (
        f"The mean step of {time(mean)} (dotted line), what it would be at the least were one thing away, "
        f"and what the busiest GPU or link needs for a step’s work alone; the largest of these is {bound}, "
        f"{time(floors[bound])}. Bounds on one change by itself, no predictions."
    )
    head = ["if it were away", "mean step", "speed-up", "at most faster", "p99 step", "at most faster"]
    return Figure(
        "what-if",
        "What a step could take at the least",
        says,
        against(names, seconds, tints, words, mean, "mean step"),
        Table(head, rows),
    )


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("nvlink", "NVLink")


# ---- prices -------------------------------------------------------------------------------------


def _prices(content: Content) -> Section:
    found = content.summary["prices"]
    if not found:
        return Section("prices", "How computing was priced", [Missing("Nothing was computed in this run.")])
    shares = found["shares"]
    rows = [
        [
            one["operator"],
            f"{one['kernel']} ({one['format']})",
            one["basis"] or "data sheet",
            one["origin"],
            said_share(one["share"]),
            f"{one['octaves']:.1f}" if one["octaves"] else "",
            f"{one['count']:,}",
        ]
        for one in content.prices
    ]
    head = [
        "operator", "kernel", "measured table", "origin", "share",
        "octaves outside", "operators",
    ]  # fmt: skip
    said = ", ".join(f"{name} {said_share(share)}" for name, share in shares.items() if share > 0)
    figure = Figure(
        "origins",
        "Where the prices come from",
        f"Share of the computing time of all GPUs by how its price was found: {said}.",
        _origins(shares),
        Table(
            ["origin", "share", "what it means"],
            [[name, said_share(share), ORIGIN_SENTENCES[name]] for name, share in shares.items()],
            left=(0, 2),
        ),
    )
    words = (
        "Share: of the computing time of all GPUs. Octaves outside: how many factors of two a call lies "
        "beyond what was measured, at most."
    )
    every = Table(head, rows, left=(0, 1, 2, 3))
    return Section("prices", "How computing was priced", [figure, every, paragraph(words, "note")])


def _origins(shares: Mapping[str, float]) -> dict[str, Any]:
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": ["computing time"],
            "x": [round(share * 100, 2)],
            "text": [f"{share:.0%}" if share >= 0.03 else ""],
            "insidetextanchor": "middle",
            "textangle": 0,
            "marker": {
                "color": colour(_ORIGIN_COLOURS[name]),
                "line": {"color": colour("paper"), "width": 1},
            },
            "hovertemplate": f"{name}: %{{x:.1f}} %<extra></extra>",
        }
        for name, share in shares.items()
        if share > 0
    ]
    x = axis("share of the computing time of all GPUs (%)", range=[0, 100], fixedrange=True)
    y = {"type": "category", "fixedrange": True, "ticksuffix": "  "}
    return {"data": data, "layout": layout(150, x, y, barmode="stack", showlegend=True)}


# ---- the scenario -------------------------------------------------------------------------------


def _scenario(content: Content) -> Section:
    parts: list[str | Table | Figure | Missing] = []
    held = content.summary["memory"]
    if held:
        whole = held["capacity"] or held["total"]
        rows = [[part, said_size(size), _share(size, whole)] for part, size in held["parts"].items()]
        rows.append(["all", said_size(held["total"]), _share(held["total"], whole)])
        parts += [
            f"<h3>Memory of the fullest GPU: rank {held['rank']}</h3>",
            Table(["part", "size", "of its HBM"], rows),
        ]
    ways = content.summary["algorithms"]
    if ways:
        rows = [[kind, way, said_share(share)] for kind, each in ways.items() for way, share in each.items()]
        parts += [
            "<h3>How exchanges were done</h3>",
            Table(["kind", "algorithm", "of the exchanges of its kind"], rows, left=(0, 1)),
        ]
    about = "Everything that was asked, with every default written out; times in s, sizes in bytes."
    parts += [
        "<h3>All of it</h3>",
        paragraph(about),
        f'<pre tabindex="0" aria-label="The scenario, TOML">{_whole(content.scenario)}</pre>',
    ]
    return Section("scenario", "The scenario", parts)


def _whole(scenario: str) -> str:
    lines = []
    for line in scenario.splitlines():
        left = len(line) - _LONGEST_LINE
        cut = f" … {left:,} more letters; see scenario.toml" if left > 0 else ""
        lines.append(text(line[:_LONGEST_LINE] + cut))
    return "\n".join(lines)
