"""A run drawn over time, put together: which tracks there are, in which order, and what is on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clustersim.analysis.chosen import Chosen, part_of
from clustersim.analysis.latency import numbers, words
from clustersim.analysis.timeline_gpus import (
    Place,
    arrows_of,
    laid,
    link_labels,
    queue_points,
    queueing,
    stream_slices,
)
from clustersim.analysis.timeline_links import (
    LinkPlace,
    carrying,
    drawn_links,
    homes,
    link_slices,
    use_points,
)
from clustersim.analysis.timeline_parts import Arrows, Counters, Slices, Timeline, Track
from clustersim.analysis.timeline_run import RunPlace, kv_points, run_slices, shards_of
from clustersim.trace.record import Text, Trace

#: What stands above links that are in no server.
_FABRIC = -1

#: What counters show.
_KV = "KV blocks given out, on each GPU of the fullest stage"
_QUEUE = "mean from the first arrival in a queue until it was served"
_USE = "share of nominal bandwidth; bytes of an exchange are spread evenly over its time"


class _Plan:
    """Tracks in the making, and which number each thing's track has."""

    def __init__(self) -> None:
        self.tracks: list[Track] = []
        self.run: dict[RunPlace, int] = {}
        self.kv: dict[int, int] = {}
        self.gpus: dict[Place, int] = {}
        self.links: dict[LinkPlace, int] = {}
        self.uses: dict[int, int] = {}

    def add(self, name: str, parent: int, kind: str, unit: str = "", about: str = "") -> int:
        """A track behind all others; its number."""
        self.tracks.append(Track(name, parent, kind, unit, about))
        return len(self.tracks) - 1


def timeline(trace: Trace, chosen: Chosen) -> Timeline:
    """What is drawn of a run. Without spans it is steps, faults and counters."""
    part = part_of(trace, chosen)
    plan = _Plan()
    run, run_places = run_slices(trace, part)
    top = _plan_run(plan, str(trace.facts["name"]), run_places, shards_of(trace, chosen.ranks))
    spans = laid(trace, part)
    drawn = drawn_links(trace, part, chosen.ranks)
    links, link_places = link_slices(trace, part, drawn)
    waiting = [(rank, "queue", 0) for rank in queueing(trace, part, chosen.ranks)]
    _plan_servers(trace, plan, top, [*spans.places, *waiting], link_places, carrying(trace, part) & drawn)
    streams, own = stream_slices(trace, spans, plan.gpus)
    arrows = arrows_of(trace, part.rows, streams, own, chosen.most)
    return Timeline(
        name=str(trace.facts["name"]),
        tracks=plan.tracks,
        streams=streams,
        links=_on(links, [plan.links[place] for place in link_places]),
        run=_on(run, [plan.run[place] for place in run_places]),
        arrows=arrows,
        counters=_together(
            kv_points(trace, part, plan.kv),
            queue_points(trace, part, plan.gpus),
            use_points(trace, part, plan.uses),
        ),
        window=part.window,
        spans=len(part.rows),
        notes=(*part.notes, *_thinned(arrows)),
    )


def _thinned(arrows: Arrows) -> list[str]:
    if not arrows.left:
        return []
    return [
        f"left out {arrows.left:,} arrows: of those into each slice only that of the flow that came last is "
        "drawn, as there are more than --most allows"
    ]


def _plan_run(plan: _Plan, name: str, places: Sequence[RunPlace], shards: Sequence[int]) -> int:
    """The track above all others, and those of the run itself. Returns the former's number."""
    top = plan.add(name, -1, "process")
    for what, lane in places:
        plan.run[what, lane] = top if what == "run" else plan.add(what, top, "slices")
    if shards:
        group = plan.add("KV memory", top, "group")
        for shard in shards:
            plan.kv[shard] = plan.add(f"KV memory of shard {shard}", group, "counter", "bytes", _KV)
    return top


def _plan_servers(
    trace: Trace,
    plan: _Plan,
    above: int,
    places: Sequence[Place],
    on_links: Sequence[LinkPlace],
    busy: np.ndarray,
) -> None:
    """Servers in their order; in each its GPUs by rank, then its links; behind all the links between servers.

    above  the track that they are under
    busy   bool[K] links that carried something
    """
    ranks = trace.tables["ranks"]
    rank = numbers(ranks, "rank").tolist()
    gpu_of = dict(zip(rank, words(ranks, "gpu").tolist(), strict=True))
    server_of = dict(zip(rank, numbers(ranks, "server").tolist(), strict=True))
    of_server: dict[int, list[Place]] = {}
    # What each GPU has stands together, in the order in which it came.
    for place in sorted(places, key=lambda place: place[0]):
        of_server.setdefault(server_of[place[0]], []).append(place)
    home = homes(trace)
    lanes_of: dict[int, list[LinkPlace]] = {}
    for one in on_links:
        lanes_of.setdefault(one[0], []).append(one)
    links_of: dict[int, list[int]] = {}
    for link in sorted({*lanes_of, *np.flatnonzero(busy).tolist()}):
        links_of.setdefault(int(home[link]), []).append(link)
    labels = link_labels(trace)
    for server in [*sorted({*of_server, *links_of} - {_FABRIC}), _FABRIC]:
        if server not in of_server and server not in links_of:
            continue
        top = plan.add("network" if server == _FABRIC else f"server {server}", above, "process")
        for place in of_server.get(server, []):
            gpu, (_, what, _) = gpu_of[place[0]], place
            plan.gpus[place] = (
                plan.add(f"{gpu} tokens in expert queues", top, "counter", "tokens", _QUEUE)
                if what == "queue"
                else plan.add(f"{gpu} {what}", top, "slices")
            )
        if server in links_of:
            _plan_links(plan, plan.add("links", top, "group"), links_of[server], lanes_of, busy, labels)


def _plan_links(
    plan: _Plan,
    parent: int,
    links: Sequence[int],
    lanes_of: dict[int, list[LinkPlace]],
    busy: np.ndarray,
    labels: Sequence[str],
) -> None:
    for link, name in zip(links, _short([labels[link] for link in links]), strict=True):
        for place in lanes_of.get(link, []):
            plan.links[place] = plan.add(name, parent, "slices")
        if busy[link]:
            plan.uses[link] = plan.add(f"{name} use", parent, "counter", "%", _USE)


def _short(labels: Sequence[str]) -> Sequence[str]:
    """Labels without what stands before the last stroke of a vertex: the server's name stands above them."""
    short = [" → ".join(end.rpartition("/")[2] for end in label.split(" → ")) for label in labels]
    return short if len(set(short)) == len(short) else labels


def _on(slices: Slices, numbers_: Sequence[int]) -> Slices:
    """The slices with the numbers of their tracks instead of places in a list, sorted by them."""
    track = np.array(numbers_, dtype=np.int64)[slices.track.astype(np.int64)]
    order = np.argsort(track, kind="stable")
    return replace(
        slices,
        track=track[order],
        start=slices.start[order],
        end=slices.end[order],
        name=Text(slices.name.codes[order], slices.name.words),
        category=Text(slices.category.codes[order], slices.category.words),
        about={
            key: Text(column.codes[order], column.words) if isinstance(column, Text) else column[order]
            for key, column in slices.about.items()
        },
    )


def _together(*parts: Counters) -> Counters:
    return Counters(
        np.concatenate([part.track for part in parts]),
        np.concatenate([part.time for part in parts]),
        np.concatenate([part.value for part in parts]),
    )
