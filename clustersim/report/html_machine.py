"""The machine in a report: GPUs and links over time, experts and their queues, faults and moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clustersim.analysis.latency import distribution
from clustersim.analysis.over_time import LinkUse
from clustersim.analysis.utilization import STATES, busiest, spread, worst
from clustersim.report.html import packed
from clustersim.report.html_content import Content, Load
from clustersim.report.html_parts import (
    Figure,
    Missing,
    Section,
    Table,
    first_rows,
    label,
    paragraph,
    time,
)
from clustersim.report.html_plots import (
    Plot,
    axis,
    distributions,
    heat,
    line,
    over_time,
    scale_beside,
    short,
    unit_of,
)
from clustersim.report.html_theme import LINES, around, ramp
from clustersim.report.page import said_or_dash, said_share, said_size, tier_rows
from clustersim.units import show as quantity

#: State of a GPU → what it is called.
_STATE_NAMES = {
    "compute": "computing",
    "exchange": "exchanging",
    "wait": "waiting for others",
    "idle": "idle",
}
#: Full scales of heat maps, percent: the least that holds all values.
_SCALES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_WORST, _LINKS, _COPIES, _EVENTS = 8, 10, 12, 40
#: Share of the run without work from which on a GPU is named.
_WORTH_A_LINE = 0.0005


# ---- GPUs ---------------------------------------------------------------------------------------


def gpus(content: Content) -> Section:
    """The section of GPUs."""
    summary = content.summary
    spreads = {state: spread(summary["gpus"], state) for state in (*STATES, "mfu")}
    rows = [
        [
            "MFU" if state == "mfu" else _STATE_NAMES[state],
            *(said_share(found[which]) for which in ("min", "mean", "max")),
        ]
        for state, found in spreads.items()
        if found is not None
    ]
    table = Table([f"share of the run, {len(summary['gpus']):,} GPUs", "least", "mean", "most"], rows)
    parts: list[str | Table | Figure | Missing] = []
    if isinstance(content.load, Missing):
        parts += [content.load, table]
    else:
        parts.append(_gpu_map(content.load, table, summary["gpus"]))
    idle = [gpu for gpu in worst(summary["gpus"], _WORST) if gpu["wait"] + gpu["idle"] >= _WORTH_A_LINE]
    return Section("gpus", "GPUs", [*parts, _longest(idle)] if idle else parts)


def _longest(idle: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        ["longest without work", "rank", "stage", "waiting", "idle", "waited for"],
        [
            [
                gpu["gpu"],
                str(gpu["rank"]),
                str(gpu["stage"]),
                said_share(gpu["wait"]),
                said_share(gpu["idle"]),
                _waited_for(gpu["waited_for"]),
            ]
            for gpu in idle
        ],
        left=(0, 5),
        note="All of them: clustersim trace gpus",
    )


def _waited_for(cause: Mapping[str, Any] | None) -> str:
    if cause is None:
        return ""
    return cause["operator"] if cause["rank"] is None else f"{cause['operator']} of rank {cause['rank']}"


def _gpu_map(load: Load, table: Table, every: Sequence[Mapping[str, Any]]) -> Figure:
    uses = load.uses
    whole = next(iter(uses.values()))
    factor, unit = unit_of(float(whole.edges[-1]))
    crowded = len(load.ends) > 1
    traces: list[Plot] = []
    for n, state in enumerate(STATES):
        shares = {name: use.shares[:, :, n] * 100 for name, use in uses.items()}
        most = max((float(np.nanmax(one, initial=0.0)) for one in shares.values()), default=0.0)
        full = next((scale for scale in _SCALES if most <= scale * 1.001), 100.0)
        for name, use in uses.items():
            width = float(use.edges[1] - use.edges[0])
            traces.append(
                {
                    "type": "heatmap",
                    "meta": {"GPUs that are": _STATE_NAMES[state], "time": name},
                    "packed": packed(shares[name], full),
                    "labels": [label(row) for row in load.rows],
                    "x0": (float(use.edges[0]) + width / 2) / factor,
                    "dx": width / factor,
                    "y0": (load.ranks - 1) / 2,
                    "dy": load.ranks,
                    "zmin": 0,
                    "zmax": full,
                    "colorscale": ramp(state),
                    "colorbar": scale_beside(f"share of time {_STATE_NAMES[state]} (%)", crowded),
                    "hoverongaps": False,
                    "hovertemplate": f"%{{text}}<br>%{{z:.1f}} % {_STATE_NAMES[state]} "
                    f"at %{{x:.4g}} {unit}<extra></extra>",
                }
            )
    each = "" if load.ranks == 1 else f"; a row is the mean of {load.ranks} ranks"
    unknown = any(np.isnan(use.shares).any() for use in uses.values())
    gaps = " What is empty was not recorded." if unknown else ""
    moment = time(float(whole.edges[1] - whole.edges[0]))
    says = (
        f"GPUs downwards by rank{' and pipeline stage' if crowded else ''}, simulated time to the right: the "
        f"share of each moment ({moment} wide) in which a GPU computes, "
        f"exchanges, waits for others or is idle{each}. Over the run, in the mean: {_means(every)}.{gaps} "
        "Drag to zoom, double-click for all."
    )
    rows = len(load.rows) * load.ranks
    height = int(min(max(90 + 16 * len(load.rows), 240), 640))
    y = axis("rank", range=[rows - 0.5, -0.5], showgrid=False)
    x = axis(f"simulated time ({unit})", showgrid=False)
    return Figure(
        "gpu-map",
        "What every GPU did, over time",
        says,
        heat(traces, x, y, height, load.ends),
        table,
        open=True,
        choices={"GPUs that are": [_STATE_NAMES[state] for state in STATES], "time": list(uses)},
        zooms=True,
    )


def _means(every: Sequence[Mapping[str, Any]]) -> str:
    means = {state: sum(gpu[state] for gpu in every) / max(len(every), 1) for state in STATES}
    return ", ".join(f"{_STATE_NAMES[state]} {said_share(mean)}" for state, mean in means.items())


# ---- links --------------------------------------------------------------------------------------


def links(content: Content) -> Section:
    """The section of links."""
    summary = content.summary
    if not summary["links"]:
        return Section("links", "Links", [Missing("This machine has no links.")])
    rows = tier_rows(summary["tiers"])
    head = ["tier", "links", "bytes carried", "mean utilization", "busiest link"]
    tiers = Table(head, rows)
    most = Table(
        ["busiest links", "bytes carried", "bandwidth", "utilization"],
        [
            [
                one["link"],
                said_size(one["bytes"]),
                quantity(one["bandwidth"], "bandwidth"),
                said_share(one["utilization"]),
            ]
            for one in busiest(summary["links"], _LINKS)
        ],
        note="All of them: clustersim trace links",
    )
    shaded = [(one["start"], one["end"]) for one in content.outages]
    over = content.links if isinstance(content.links, Missing) else _link_lines(content.links, tiers, shaded)
    shown = [over, tiers] if isinstance(over, Missing) else [over]
    return Section("links", "Links", [*shown, most])


def _link_lines(use: LinkUse, table: Table, shaded: Sequence[tuple[float, float]]) -> Figure:
    middle = (use.edges[:-1] + use.edges[1:]) / 2
    pairs: dict[str, int] = {}
    traces = []
    peaks: dict[str, float] = {}
    for tier in use.tiers:
        # Both directions of a pair share a colour; the way up is solid, the way down dashed.
        pair = "-".join(sorted(tier.split("-")))
        second = pair in pairs
        tint = LINES[pairs.setdefault(pair, len(pairs)) % len(LINES)][0]
        for what, shares in (
            (_MEAN, use.of_tier(tier)),
            (_BUSIEST, use.busiest_of_tier(tier)),
        ):
            name = label(tier)
            if what == _BUSIEST:
                peaks[tier] = float(shares.max(initial=0.0))
            traces.append(
                line(
                    name, middle, shares * 100, tint, "dot" if second else "solid", " %", {"of a tier": what}
                )
            )
    fullest = max(peaks, key=lambda tier: peaks[tier])
    marked = " Shaded: some link was slow or down." if shaded else ""
    width = time(float(use.edges[1] - use.edges[0]))
    return Figure(
        "link-use",
        "How full links were, over time",
        f"Bytes carried ÷ what could have been carried, by tier of links, in moments of {width}. The fullest "
        f"moment of any link is in {fullest}: {said_share(peaks[fullest])}.{marked}",
        over_time(traces, "utilization (%)", float(use.edges[-1]), shaded),
        table,
        open=True,
        choices={"of a tier": [_MEAN, _BUSIEST]},
        zooms=True,
    )


_MEAN, _BUSIEST = "mean of its links", "its busiest link, moment by moment"


# ---- experts ------------------------------------------------------------------------------------


def experts(content: Content) -> Section:
    """The section of experts and their queues."""
    if isinstance(content.experts, Missing):
        return Section("experts", "Experts", [content.experts])
    _, copies = content.experts
    rows = [
        [
            f"layer {one['layer']}, expert {one['expert']}",
            f"rank {one['rank']} ({one['gpu']})",
            f"{one['tokens']:,}",
            f"{one['load']:.2f} x",
            f"{one['length']['mean']:,.1f}",
            time(one["wait"]["mean"]),
            time(one["wait"]["p99"]),
            time(one["service"]),
        ]
        for one in copies
    ]
    shown, note = first_rows(rows, "clustersim trace experts", _COPIES)
    head = [
        "expert copy", "on", "tokens", "load", "queue (tokens)", "wait, mean", "wait, p99", "service",
    ]  # fmt: skip
    table = Table(head, shown, left=(0, 1), note=note)
    parts: list[str | Table | Figure | Missing] = [_expert_map(content)]
    if content.waits:
        parts.append(_queue_waits(content))
    return Section("experts", "Experts", [*parts, "<h3>Where tokens wait longest</h3>", table])


def _expert_map(content: Content) -> Figure:
    assert not isinstance(content.experts, Missing)
    found, _ = content.experts
    layers, count = [f"layer {n}" for n in found.layers.tolist()], found.load.shape[1]
    top = max(2.0, float(found.load.max()))
    waits = found.wait[~np.isnan(found.wait)]
    longest = float(waits.max()) if len(waits) else 0.0
    factor, unit = unit_of(longest)
    common = {
        "type": "heatmap",
        "y": found.layers.tolist(),
        "x": list(range(count)),
        "hoverongaps": False,
        "zmin": 0,
        "xgap": 1 if count <= 64 else 0,
        "ygap": 1 if count <= 64 else 0,
    }
    traces: list[Plot] = [
        {
            **common,
            "meta": {"shown": _LOAD},
            "z": [short(row, 4) for row in found.load],
            "zmax": top,
            "colorscale": around(1.0 / top),
            "colorbar": scale_beside("tokens ÷ mean of the layer", False),
            "hovertemplate": "layer %{y}, expert %{x}<br>%{z:.3g} x the mean load<extra></extra>",
        },
        {
            **common,
            "meta": {"shown": _WAIT},
            "z": [short(row / factor, 4) for row in found.wait],
            "zmax": longest / factor or 1.0,
            "colorscale": ramp("wait"),
            "colorbar": scale_beside(f"mean wait ({unit})", False),
            "hovertemplate": f"layer %{{y}}, expert %{{x}}<br>tokens wait %{{z:.3g}} {unit}<extra></extra>",
        },
    ]
    layer, expert = np.unravel_index(int(found.load.argmax()), found.load.shape)
    busy = found.load.argmax(axis=1)
    rows = [
        [
            name,
            f"{found.tokens[at].sum():,.0f}",
            str(int(busy[at])),
            f"{found.load[at].max():.2f} x",
            f"{found.load[at].min():.2f} x",
            time(float(np.nanmax(found.wait[at], initial=0.0))),
        ]
        for at, name in enumerate(layers)
    ]
    head = ["", "tokens", "busiest expert", "its load", "least load", "longest mean wait"]
    says = (
        f"Tokens that came to each expert of each layer over the run, beside the mean of the layer’s experts "
        f"(neutral is the mean). The busiest is expert {expert} of {layers[layer]} with "
        f"{found.load[layer, expert]:.2f} times the mean."
    )
    height = int(min(max(150 + 18 * len(layers), 240), 720))
    x, y = axis("expert", showgrid=False), axis("layer", autorange="reversed", showgrid=False)
    return Figure(
        "expert-map",
        "How loaded experts were, layer by layer",
        says,
        heat(traces, x, y, height),
        Table(head, rows),
        choices={"shown": [_LOAD, _WAIT]},
    )


_LOAD, _WAIT = "load", "mean wait of a token"


def _queue_waits(content: Content) -> Figure:
    rows = []
    for phase, (values, weights) in content.waits.items():
        found = distribution(values, weights)
        assert found is not None
        cells = [time(found[column]) for column in ("mean", "p50", "p90", "p99", "max")]
        rows.append([phase, *cells, f"{weights.sum():,.0f}"])
    held = content.summary["experts"]["queue_wait"]
    return Figure(
        "queue-waits",
        "How long tokens stood in the queues of experts",
        f"Share of tokens that waited at most so long before their expert began with them: half at most "
        f"{time(held['p50'])}, 99 in 100 at most {time(held['p99'])}.",
        distributions(content.waits, "time in an expert’s queue"),
        Table(["tokens of", "mean", "p50", "p90", "p99", "max", "tokens"], rows),
    )


# ---- faults and moves ---------------------------------------------------------------------------


def troubles(content: Content) -> Iterator[Section]:
    """Sections on faults and on experts placed anew, where there were some."""
    if content.faults:
        yield Section("faults", "Faults", list(_faults(content)))
    if content.summary["rebalancing"]:
        yield Section("rebalancing", "Experts placed anew", list(_moves(content)))


def _faults(content: Content) -> Iterator[str | Table]:
    rows = [
        [
            one["kind"].replace("_", " "),
            one["place"],
            time(one["start"]),
            _until(one["end"]),
            _factor(one["factor"]),
        ]
        for one in content.faults
    ]
    shown, note = first_rows(rows, "the table faults of the trace", _EVENTS)
    yield Table(["fault", "where", "from", "until", "times slower"], shown, left=(0, 1), note=note)
    if content.outages:
        rows = [
            [
                one["link"],
                time(one["start"]),
                time(one["end"]),
                quantity(one["bandwidth"], "bandwidth") if one["bandwidth"] else "down",
                f"{one['moved']:,}",
                f"{one['avoided']:,}",
                f"{one['stranded']:,}",
            ]
            for one in content.outages
        ]
        shown, note = first_rows(rows, "the table outages of the trace", _EVENTS)
        head = [
            "link that was slow or down", "from", "until", "carried", "flows moved away", "flows sent around",
            "flows that waited",
        ]  # fmt: skip
        yield Table(head, shown, note=note)


def _until(end: float) -> str:
    return "the end" if np.isinf(end) else time(end)


def _factor(factor: float) -> str:
    if np.isnan(factor):
        return "each its own"
    return "down" if np.isinf(factor) else f"{factor:.3g} x"


def _moves(content: Content) -> Iterator[str | Table | Figure]:
    bill = content.summary["rebalancing"]
    yield paragraph(
        f"{bill['moved']:,} of {bill['planned']:,} plans moved something: {bill['copies']:,} expert copies, "
        f"{said_size(bill['bytes'])} of weights over links; passes stopped for {time(bill['stopped'])}."
    )
    rows = [
        [
            f"plan {one['rebalance']}",
            time(one["planned"]),
            _moment(one["began"]),
            _moment(one["ended"]),
            f"{one['layers']:,}",
            f"{one['copies']:,}",
            said_size(one["bytes"]),
            time(one["stopped"]),
            *(_ratio(one[key]) for key in ("before", "foreseen", "after", "unmoved")),
        ]
        for one in content.rebalances
    ]
    shown, note = first_rows(rows, "the table rebalances of the trace", _EVENTS)
    head = [
        "", "planned at", "began", "ended", "layers", "copies", "weights", "stopped", "imbalance before",
        "as planned", "after it", "had nothing moved",
    ]  # fmt: skip
    table = Table(head, shown, note=note)
    yield table if content.placements is None else _imbalance(content, table)


def _imbalance(content: Content, table: Table) -> Figure:
    assert content.placements is not None
    when, now, first = content.placements
    traces = [
        line("as placed", when, now, "a", "solid", " x"),
        line("at the first places", when, first, "b", "dot", " x"),
    ]
    shaded = [
        (one["began"], one["ended"])
        for one in content.rebalances
        if not np.isnan(one["began"]) and not np.isnan(one["ended"])
    ]
    imbalance = content.summary["rebalancing"]["imbalance"]
    mean, stayed = (said_or_dash("{:.2f}".format, imbalance[key]) for key in ("mean", "first"))
    return Figure(
        "imbalance",
        "Imbalance, token batch by token batch",
        f"Tokens of a layer’s busiest rank ÷ the mean, mean over layers: {mean} over the run, {stayed} had "
        "experts stayed. Shaded: weights were moving.",
        over_time(traces, "busiest rank ÷ mean", float(content.summary["simulated_seconds"]), shaded),
        table,
        open=True,
        zooms=True,
    )


def _moment(seconds: float) -> str:
    return "-" if np.isnan(seconds) else time(seconds)


def _ratio(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f} x"
