"""The page about the network models: what they are, what they cost, how far they are from the truth.

The numbers come from docs/data/network_speed.json, which tests/bench/network_scaling.py measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

Row = Mapping[str, Any]

DATA = Path(__file__).resolve().parent / "data" / "network_speed.json"

#: What is plotted: part of the data → label, class of the line.
_LINES = {
    "bytes_exact": ("weighed by bytes, exact", "a"),
    "bytes_coalesced": ("weighed by bytes, tolerance 0.002", "b"),
    "ones_exact": ("weights of 1, exact", "c"),
    "ones_coalesced": ("weights of 1, tolerance 0.002", "d"),
}
#: Kinds of case in the table of errors: beginning of the name → what it is.
_KINDS = {
    "token exchange": "token exchange of 128 or 1024 GPUs, weighed by bytes",
    "a2a_zipf": "skewed all-to-all, weights of 1",
    "a2a_jitter": "even all-to-all, flows start apart",
    "random": "random flows, start apart",
}


def network_pages() -> dict[str, str]:
    """Page, as a path under docs/ → its text."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    return {"network.md": page(found), "network-speed.svg": plot(found["scaling"]["rows"])}


def page(found: Mapping[str, Any]) -> str:
    """docs/network.md."""
    return "\n".join(
        [
            "# The network: what it costs and how exact it is\n",
            "Printed from `docs/data/network_speed.json` by `python docs/make.py`; do not edit it.\n",
            "The numbers are measured by `python tests/bench/network_scaling.py --cases DIR`.\n"
            f"Times are CPU seconds, the best of several, {_machine(found['machine'])}.\n",
            _FIDELITIES,
            _TOLERANCE,
            _table(
                ("traffic", "cases", "tolerance", "median flow", "worst flow", "makespan", "cost ÷ exact"),
                list(_coalesced(found["coalesced"])),
            ),
            _WORST,
            "## One exchange among 16 to 1024 GPUs\n",
            _SCALING,
            _table(
                ("how", "all sizes", "from 64 GPUs on", "last doubling"),
                list(_slopes(found["scaling"]["exponents"])),
            ),
            "![cost of an exchange over its flows](network-speed.svg)\n",
            _table(
                ("GPUs", "flows", "how", "CPU", "per flow", "share-outs", "links judged"), list(_costs(found))
            ),
            "Without machine code the exchange weighed by bytes takes (`physics/plain_fluid.py`, which\n"
            "stands in where numba cannot be installed):\n",
            _table(("GPUs", "flows", "plain numpy", "compiled", "ratio"), list(_plain(found["plain"]))),
            "## Against SimGrid\n",
            _SIMGRID.format(least=_seconds(min(row["seconds"] for row in found["simgrid"]))),
            _table(_SIMGRID_HEAD, list(_simgrid(found["simgrid"]))),
            "## Chunks against the fluid\n",
            _CHUNKS,
            _table(_CHUNKS_HEAD, list(_chunks(found["chunked"]))),
            "## The first run compiles\n",
            _first_run(found["first_run"]),
        ]
    )


_FIDELITIES = """\
## Three fidelities

`network.fidelity` says how finely links are simulated.

- `port_bound`: a flow takes as long as the busiest link on its path needs for the bytes of its own
  exchange. A closed form: nothing is shared with other exchanges, so it is a bound and no forecast where
  several are on the way.
- `fluid`, the default: all flows on the way share the links max-min fairly by weight. The flows of a token
  exchange weigh as their bytes, independent flows weigh 1. Rates are shared out anew when flows begin or
  end or a link changes, only where that is felt.
- `chunked`: every chunk of every flow through the queue of every link. Slow; it judges the fluid, and
  answers what a fluid cannot: queues, back-pressure, head-of-line blocking.
"""

_TOLERANCE = """\
## What `network.tolerance` means

With a tolerance above 0, `fluid` leaves flows that have ended their bandwidth until the first of them could
have sent that share of its bytes once more. Then rates are shared out, for all that ended meanwhile at
once. So the run is the exact run of other traffic: every flow has up to that share more bytes to send. That
is a bound on the input (a *backward* error) and it always holds; no bytes are lost or invented, for what is
reported as sent is what was asked.

What it does to the times (the *forward* error) is measured. Per kind of traffic, over all its cases: the
largest median and the largest single relative error of a flow's duration, the largest error of the
makespan, and CPU time as a share of the exact run's.
"""

_WORST = """\
An exchange weighed by bytes is not changed at all: flows with a common bottleneck end together, and what
they leave behind, nobody is left to use. So its exact run is as cheap, and needs no tolerance. Where flows
are sparse and end alone, tolerance saves next to nothing, and the end of a single flow can move by many
times the tolerance: whether it ends just before or after another begins decides what it gets. Use it for
dense exchanges, and judge makespans by it, not single flows.
"""

_SCALING = """\
Dispatch of one MoE layer: each GPU sends 128 tokens of 7168 bytes to the holders of 8 experts each, drawn
by Zipf 1.2 out of 256 (512 and 1024 GPUs: one expert per GPU), servers of 8 with NVLink of 450 GB/s and a
card of 50 GB/s per GPU. The cost is that of `physics.fluid.Fluid` from the start of the exchange until all
flows are told to be done.

With few GPUs most is paid for telling the caller of each full link's flows as they end. The work itself,
share-outs and links judged, grows more slowly than the flows. With 1024 GPUs the flows in flight no longer
fit the processor's cache: each costs several times as much, and how much depends on who else uses the
cache; so the last doubling grows faster than F·log F, though all sizes together do not. Fitted exponents of
F·log F (1: the cost grows as F·log F, drawn as a dashed line):
"""

_SIMGRID_HEAD = ("case", "flows", "CPU", "SimGrid's", "ratio", "goal", "peak MiB", "SimGrid's", "worst error")

_SIMGRID = """\
Whole process of `clustersim network CASE --out FILE`, reading and writing included ({least} of each are
Python and its libraries), against SimGrid 3.32 (C++), whose seconds were measured apart, on two
shared x86-64 cores. The error is that of the worst flow's duration, relative, where SimGrid's answer is at
hand.
"""

_CHUNKS_HEAD = (
    "queueing",
    "switching",
    "services per case",
    "median",
    "worst",
    "over 2 %",
    "CPU per service",
)

_CHUNKS = """\
Makespan of 200 random cases (2 to 40 flows over 3 to 20 links, some with faults) in the chunked network,
relative to the fluid's, as chunks shrink. With fair queues it comes to the fluid's; first come first served
is another discipline, however small the chunks.
"""


def _first_run(found: Row) -> str:
    return (
        f"`clustersim run workloads/large_ep.toml` takes {found['first']:.1f} s of CPU the first time and "
        f"{found['next']:.1f} s from then on.\nThe machine code is kept beside the modules, in "
        "`clustersim/physics/__pycache__`; where\nthat folder cannot be written to, numba keeps it in "
        "the user's own cache folder (on Linux\n`~/.cache/numba`); where there is neither, every run "
        "compiles. `NUMBA_CACHE_DIR` names another folder,\nfor instance one that jobs share.\n"
    )


def _machine(found: Row) -> str:
    return (
        f"on {found['cpus']} shared {found['architecture']} cores with Python {found['python']}, "
        f"numpy {found['numpy']} and numba {found['numba']}"
    )


def _slopes(exponents: Mapping[str, Row]) -> Iterator[tuple[str, ...]]:
    for name, (label, _) in _LINES.items():
        yield label, *(f"{exponents[name][key]:.2f}" for key in ("all", "from_64_gpus", "last_doubling"))


def _coalesced(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for start, said in _KINDS.items():
        mine = [row for row in rows if row["case"].startswith(start)]
        for tolerance in sorted({row["tolerance"] for row in mine}):
            some = [row for row in mine if row["tolerance"] == tolerance]
            errors = (_percent(max(row[key] for row in some)) for key in ("median", "worst", "makespan"))
            cost = sum(row["seconds"] for row in some) / sum(row["exact_seconds"] for row in some)
            yield said, f"{len(some)}", f"{tolerance:g}", *errors, f"{cost:.2f}"


def _costs(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, (label, _) in _LINES.items():
        for row in found["scaling"]["rows"][name]:
            counts = (f"{row[key]:,}" for key in ("share_outs", "judged"))
            each = _seconds(row["seconds"] / row["flows"])
            yield (
                f"{row['gpus']}",
                f"{row['flows']:,}",
                label,
                _seconds(row["seconds"]),
                each,
                *counts,
            )


def _plain(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        times = (_seconds(row[key]) for key in ("plain", "compiled"))
        yield f"{row['gpus']}", f"{row['flows']:,}", *times, _times(row["plain"] / row["compiled"])


def _simgrid(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        theirs, goal, error = row["simgrid_seconds"], row["goal"], row["error"]
        ratio = "" if theirs is None else _times(theirs / row["seconds"])
        wanted = "" if goal is None else f"{goal}×, {'met' if theirs / row['seconds'] >= goal else 'missed'}"
        yield (
            f"`{row['case']}`",
            f"{row['flows']:,}",
            _seconds(row["seconds"]),
            "" if theirs is None else _seconds(theirs),
            ratio,
            wanted,
            f"{row['peak_mib']:.0f}",
            "" if theirs is None else f"{row['simgrid_peak_mib']}",
            "" if error is None else f"{error:.0e}",
        )


def _chunks(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        ways = (row["queueing"], row["switching"].replace("_", " "), f"{row['served']:,}")
        errors = (_percent(row["median"]), _percent(row["worst"]), f"{row['over_2_percent']} of 200")
        yield *ways, *errors, _seconds(row["seconds_each"])


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def _percent(share: float) -> str:
    return "0" if share < 1e-12 else f"{share * 100:.2g} %"


def _seconds(value: float) -> str:
    unit, scale = next(
        (u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)) if value >= s
    )
    number = value / scale
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.2g} {unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_WIDTH, _HEIGHT, _LEFT, _TOP, _KEY = 560, 380, 80, 40, 260

#: Colours by class; a page in dark mode gets lighter ones.
_STYLE = """<style>
svg { background: #fff; color: #222 }
text { fill: currentColor } .grid { stroke: #8888; stroke-width: .5 } .guide { stroke: currentColor }
.a { color: #1b6ca8 } .b { color: #c77d0a } .c { color: #b3344a } .d { color: #3a7d44 }
path { fill: none; stroke: currentColor; stroke-width: 2 } circle { fill: currentColor }
@media (prefers-color-scheme: dark) {
svg { background: #16181d; color: #ddd }
.a { color: #6db3e8 } .b { color: #f0b04f } .c { color: #f08a9b } .d { color: #86c98f }
}
</style>"""


def plot(lines: Mapping[str, Sequence[Row]]) -> str:
    """SVG of CPU seconds per exchange over its number of flows, both logarithmic, with F·log F beside them.

    lines  part of the data → rows with `flows` and `seconds`
    """
    points = {name: [(row["flows"], row["seconds"]) for row in lines[name]] for name in _LINES}
    every = [point for one in points.values() for point in one]
    across = _Axis([flows for flows, _ in every], _LEFT, _WIDTH)
    down = _Axis([seconds for _, seconds in every], _TOP + _HEIGHT, -_HEIGHT)
    parts = list(_grid(across, down))
    guide = _guide(points["bytes_exact"])
    steps = "L".join(
        f"{across(flows):.1f} {down(seconds):.1f}" for flows, seconds in guide if seconds >= down.low
    )
    parts.append(f'<path class="guide" stroke-dasharray="6 5" style="stroke-width:1.2" d="M{steps}"/>')
    for place, (name, (label, kind)) in enumerate(_LINES.items()):
        spots = [(across(flows), down(seconds)) for flows, seconds in points[name]]
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        dash = ' stroke-dasharray="3 3"' if name.endswith("coalesced") else ""
        parts.append(f'<g class="{kind}"><title>{escape(label)}</title><path{dash} d="M{way}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in spots]
        parts.append(f"</g>{_key(place, kind, label, dash)}")
    parts.append(_key(len(_LINES), "guide", "F·log F, from 1024 GPUs downwards", ' stroke-dasharray="6 5"'))
    about = "; ".join(
        f"{_LINES[name][0]}: from {_seconds(one[0][1])} for {one[0][0]:,} flows "
        f"to {_seconds(one[-1][1])} for {one[-1][0]:,}"
        for name, one in points.items()
    )
    width, height = _LEFT + _WIDTH + _KEY, _TOP + _HEIGHT + 60
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="12" role="img" '
            'aria-labelledby="title about">',
            '<title id="title">CPU time of one token exchange over its number of flows</title>',
            f'<desc id="about">{escape(about)}</desc>',
            _STYLE,
            *parts,
            "</svg>\n",
        ]
    )


class _Axis:
    """Where a value lies on a logarithmic axis of whole decades."""

    def __init__(self, values: Sequence[float], begin: float, length: float) -> None:
        self.first, self.last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.low = 10.0**self.first
        self._begin, self._length = begin, length

    def __call__(self, value: float) -> float:
        return self._begin + self._length * (math.log10(value) - self.first) / (self.last - self.first)

    def decades(self) -> Iterator[int]:
        yield from range(self.first, self.last + 1)


def _guide(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    flows, seconds = points[-1]
    for step in range(61):
        fewer = flows ** (1 - step / 60 * (1 - math.log(points[0][0]) / math.log(flows)))
        yield fewer, seconds * fewer * math.log(fewer) / (flows * math.log(flows))


def _grid(across: _Axis, down: _Axis) -> Iterator[str]:
    right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT
    for power in across.decades():
        x = across(10.0**power)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{10**power:,}</text>'
    for power in down.decades():
        y = down(10.0**power)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        said = _seconds(10.0**power * 1.0000001)
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{said}</text>'
    middle = _LEFT + _WIDTH // 2
    yield f'<text x="{middle}" y="{bottom + 42}" text-anchor="middle">flows of the exchange</text>'
    yield f'<text x="{_LEFT - 60}" y="{_TOP - 16}">CPU time per exchange</text>'


def _key(place: int, kind: str, label: str, dash: str) -> str:
    x, y = _LEFT + _WIDTH + 14, _TOP + 10 + 22 * place
    return (
        f'<path class="{kind}"{dash} d="M{x} {y}h24"/><text x="{x + 30}" y="{y + 4}">{escape(label)}</text>'
    )
