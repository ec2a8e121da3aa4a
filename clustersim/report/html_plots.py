"""What stands in the figures of a report, as the plotting library takes it: traces and layout.

Plain values. Colours are names (see html_theme), words from files have passed through `label`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clustersim.report.html_theme import LINES, colour

Plot = dict[str, Any]

#: Points of a line, and of a distribution.
_POINTS = 600
_WIDE_RANGE = 30.0
_ROW, _HEAD = 26, 90


def unit_of(longest: float) -> tuple[float, str]:
    """(seconds of one unit, its name) in which times up to the longest read best."""
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
    return next((unit for unit in units if longest >= unit[0]), (1e-9, "ns"))


def short(values: Any, digits: int = 5) -> list[float | None]:
    """Numbers with few digits, for the page is read by people; None for what is not known."""
    return [None if value != value else float(f"{value:.{digits}g}") for value in np.asarray(values).tolist()]


def axis(title: str, **other: Any) -> Plot:
    """An axis with its title, which names its unit."""
    return {"title": {"text": title, "standoff": 8}, **other}


def layout(height: int, x: Plot, y: Plot, **other: Any) -> Plot:
    """What all figures have in common.

    height   CSS pixels
    """
    return {
        "height": height,
        "margin": {"l": 60, "r": 24, "t": 24, "b": 48},
        "xaxis": x,
        "yaxis": y,
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "xanchor": "left",
        },
        **other,
    }


def distributions(samples: Mapping[str, tuple[np.ndarray, np.ndarray | None]], what: str) -> Plot:
    """Cumulative distributions as steps.

    samples  name → values, s, and their weights, or None for all alike
    what     of the x axis, before its unit
    """
    every = np.concatenate([values for values, _ in samples.values()])
    factor, unit = unit_of(float(every.max()))
    positive = every[every > 0]
    wide = len(positive) == len(every) and every.max() > _WIDE_RANGE * every.min()
    data = []
    # Lines that lie on each other are seen by their widths.
    widths = range(2 * len(samples), 0, -2)
    for (name, (values, weights)), (tint, dash), wide_ in zip(
        samples.items(), _lines(len(samples)), widths, strict=True
    ):
        at, share = cumulative(values, weights)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": short(at / factor),
                "y": short(share * 100),
                "line": {"shape": "hv", "color": colour(tint), "dash": dash, "width": wide_},
                "hovertemplate": f"{name}: %{{y:.4g}} % take at most %{{x:.4g}} {unit}<extra></extra>",
            }
        )
    x = axis(f"{what} ({unit}{', logarithmic' if wide else ''})", type="log" if wide else "linear")
    if not wide:
        x["range"] = _around(every / factor)
    y = axis("share that took at most this (%)", range=[0, 103], fixedrange=True)
    return {"data": data, "layout": layout(360, x, y, showlegend=True)}


def _around(values: np.ndarray) -> list[float | None]:
    """A range in which a spread is seen, and one of next to nothing is not blown up."""
    least, most = float(values.min()), float(values.max())
    room = max(0.05 * most, 0.08 * (most - least)) or 1.0
    return short([max(least - room, -0.01 * most), most + room])


def _lines(count: int) -> list[tuple[str, str]]:
    return [LINES[n % len(LINES)] for n in range(count)]


def cumulative(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(values in order, share that is at most each), from share 0 on; of many only some, both ends kept."""
    order = np.argsort(values, kind="stable")
    weight = np.ones(len(values)) if weights is None else weights[order].astype(float)
    share = np.cumsum(weight) / weight.sum()
    at, share = np.append(values[order][:1], values[order]), np.append(0.0, share)
    if len(values) > _POINTS:
        some = np.unique(np.searchsorted(share, np.linspace(0, 1, _POINTS)).clip(max=len(at) - 1))
        some = np.unique(np.concatenate([[0], some, [len(at) - 1]]))
        at, share = at[some], share[some]
    return at, share


def stacked(
    names: Sequence[str],
    parts: Mapping[str, tuple[str, Sequence[float]]],
    x: str,
    factor: float,
    unit: str,
    more: int = 0,
) -> Plot:
    """Horizontal bars, each cut into parts.

    names    of bars, the first on top
    parts    name of a part → its colour, and its size in every bar
    x        title of the axis; values are divided by `factor` and told in `unit`
    more     pixels of height for a legend of several lines
    """
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": list(names),
            "x": short(np.asarray(sizes) / factor),
            "marker": {"color": colour(tint), "line": {"color": colour("paper"), "width": 1}},
            "hovertemplate": f"%{{y}}<br>{name}: %{{x:.4g}} {unit}<extra></extra>",
        }
        for name, (tint, sizes) in parts.items()
    ]
    y = {"type": "category", "autorange": "reversed", "fixedrange": True, "ticksuffix": "  "}
    height = _HEAD + more + _ROW * len(names)
    return {
        "data": data,
        "layout": layout(height, axis(x), y, barmode="stack", bargap=0.25, showlegend=True),
    }


def heat(
    traces: Sequence[Plot], x: Plot, y: Plot, height: int, lines: Sequence[tuple[float, str]] = ()
) -> Plot:
    """Heat maps of which one is shown at a time, each a trace with `meta`.

    lines    rows behind which a group of rows ends, and its name
    """
    shapes = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": at,
            "y1": at,
            "line": {"color": colour("ink"), "width": 0.6},
        }
        for at, _ in lines[:-1]
    ]
    starts = [-0.5, *(at for at, _ in lines)]
    names = [
        {
            "text": name,
            "xref": "paper",
            "x": 1.0,
            "xanchor": "left",
            "y": (begin + end) / 2,
            "showarrow": False,
            "font": {"size": 11, "color": colour("muted")},
        }
        for begin, (end, name) in zip(starts, lines, strict=False)
        if len(lines) > 1
    ]
    found = layout(height, x, y, shapes=shapes, annotations=names)
    found["margin"]["r"] = 150 if names else 90
    return {"data": list(traces), "layout": found}


def scale_beside(title: str, crowded: bool, ticks: str = "") -> Plot:
    """The colour bar of a heat map; crowded: names of rows stand between."""
    return {
        "title": {"text": title, "side": "right"},
        "thickness": 12,
        "outlinewidth": 0,
        "ticksuffix": ticks,
        "x": 1.08 if crowded else 1.01,
    }


def over_time(
    lines: Sequence[Plot], title: str, longest: float, shaded: Sequence[tuple[float, float]] = ()
) -> Plot:
    """Lines over the time of a run.

    longest  s, the end of the run; x of the lines is s
    shaded   s from and to, times that are marked
    """
    factor, unit = unit_of(longest)
    data = [{**line, "x": short(np.asarray(line["x"]) / factor)} for line in lines]
    marks = [
        {
            "type": "rect",
            "yref": "paper",
            "x0": begin / factor,
            "x1": min(end, longest) / factor,
            "y0": 0,
            "y1": 1,
            "fillcolor": colour("muted"),
            "opacity": 0.15,
            "layer": "below",
            "line": {"width": 0},
        }
        for begin, end in _joined(shaded)
    ]
    x = axis(f"simulated time ({unit})", range=[0, longest / factor])
    y = axis(title, rangemode="tozero", fixedrange=True)
    return {"data": data, "layout": layout(360, x, y, shapes=marks, showlegend=True)}


def _joined(times: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Intervals of which those that overlap are one."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(times):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def line(
    name: str, x: np.ndarray, y: np.ndarray, tint: str, dash: str, unit: str, meta: Plot | None = None
) -> Plot:
    """A line of steps between bins; x are the middles of bins, s."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": short(y, 4),
        "line": {"shape": "hvh", "color": colour(tint), "dash": dash, "width": 1.6},
        "meta": meta or {},
        "hovertemplate": f"{name}: %{{y:.3g}}{unit} at %{{x:.4g}}<extra></extra>",
    }


def bars_in_time(pieces: Sequence[Mapping[str, Any]], rows: Sequence[str], latency: float) -> Plot:
    """What ranks did, as bars in rows.

    pieces   row, name and told (in the legend, and whether), colour, width (share of the row), start and
             seconds (s, since the beginning), words (of the label)
    rows     from top to bottom
    latency  s, the end of the axis
    """
    factor, unit = unit_of(latency)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for piece in pieces:
        groups.setdefault(piece["name"], []).append(piece)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "legendgroup": group[0]["colour"],
            "showlegend": group[0]["told"],
            "y": [piece["row"] for piece in group],
            "x": short([piece["seconds"] / factor for piece in group], 4),
            "base": short([piece["start"] / factor for piece in group], 7),
            "width": group[0]["width"],
            "text": [piece["words"] for piece in group],
            "textposition": "none",
            "marker": {"color": colour(group[0]["colour"]), "line": {"width": 0}},
            "hovertemplate": f"%{{text}}<br>%{{x:.4g}} {unit} from %{{base:.6g}} {unit} on<extra></extra>",
        }
        for name, group in groups.items()
    ]
    x = axis(f"time since the step began ({unit})", range=[0, latency / factor])
    y = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": list(rows),
        "range": [len(rows) - 0.4, -0.6],
        "fixedrange": True,
        "ticksuffix": "  ",
        "showgrid": False,
    }
    height = _HEAD + 50 + 34 * len(rows)
    return {"data": data, "layout": layout(height, x, y, barmode="overlay", showlegend=True)}


def against(
    names: Sequence[str],
    seconds: Sequence[float],
    tints: Sequence[str],
    words: Sequence[str],
    recorded: float,
    what: str,
) -> Plot:
    """Horizontal bars of times beside a recorded one, which is a line.

    words    what is said of each bar
    """
    factor, unit = unit_of(max(*seconds, recorded))
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": list(names),
        "x": short(np.asarray(seconds) / factor),
        "marker": {"color": [colour(tint) for tint in tints]},
        "text": [f"{seconds_ / recorded:.1%}" if recorded > 0 else "" for seconds_ in seconds],
        "textposition": "outside",
        "cliponaxis": False,
        "customdata": list(words),
        "hovertemplate": f"%{{y}}: %{{x:.4g}} {unit}<br>%{{customdata}}<extra></extra>",
    }
    mark = {
        "type": "line",
        "yref": "paper",
        "x0": recorded / factor,
        "x1": recorded / factor,
        "y0": 0,
        "y1": 1,
        "layer": "below",
        "line": {"color": colour("muted"), "width": 1.5, "dash": "dot"},
    }
    y = {"type": "category", "autorange": "reversed", "fixedrange": True, "ticksuffix": "  "}
    most = max(*seconds, recorded) / factor * 1.08
    found = layout(_HEAD + _ROW * len(names), axis(f"{what} ({unit})", range=[0, most]), y, shapes=[mark])
    return {"data": [bars], "layout": {**found, "showlegend": False, "bargap": 0.3}}
