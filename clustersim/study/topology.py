"""One question: what is this machine worth, before anything runs on it?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clustersim.errors import ClustersimError, Mistake, ResultError, ScenarioError
from clustersim.plan import inspection
from clustersim.plan.paths import Paths
from clustersim.plan.sketch import sketch
from clustersim.plan.topology import Topology, build
from clustersim.plan.topology import summary as counted
from clustersim.spec.hardware import TopologySpec
from clustersim.spec.reading import read_topology
from clustersim.study.run import find

#: Vertices and links that are named one by one where something is wrong with them.
_NAMED = 5


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """A topology as asked for and as built.

    shown  what the user calls the file
    """

    shown: str
    spec: TopologySpec
    topology: Topology


def load_machine(path: str | Path, overrides: Sequence[str] = ()) -> Machine:
    """The machine of a topology file or of a scenario.

    overrides  "key=value" texts, as after --set
    Raises     ScenarioError with every mistake of the file, or when some GPU cannot be reached
    """
    shown = str(path)
    spec = read_topology(find(path), overrides)
    try:
        return Machine(shown, spec, build(spec))
    except ClustersimError as error:
        raise ScenarioError(shown, [Mistake("", str(error))]) from error


def inspect(machine: Machine) -> dict[str, Any]:
    """Everything `clustersim topology` shows, as JSON values in SI units.

    Returns  file, family, load_balancing, routing, gpu, gpus, servers, domains, vertices (by kind), tiers,
             gpus_per_server, gpus_per_domain, bisection, oversubscription, paths, longest_path, checks
    """
    topology, spec = machine.topology, machine.spec
    counts, facts = counted(topology), inspection.facts(topology)
    ways = inspection.ways(topology, Paths(topology))
    return {
        "file": machine.shown,
        "family": spec.family,
        "load_balancing": getattr(spec, "load_balancing", "ecmp"),
        "routing": topology.routing,
        "gpu": topology.gpu.name,
        "gpus": len(topology.gpus),
        "servers": counts["servers"],
        "domains": len(set(topology.domain.tolist())),
        "gpus_per_server": _sizes(facts["gpus_per_server"]),
        "gpus_per_domain": _sizes(facts["gpus_per_domain"]),
        "vertices": counts["vertices"],
        "tiers": facts["tiers"],
        "bisection": _bisection(topology),
        "oversubscription": [
            {**asdict(taper), "ratio": taper.ratio} for taper in inspection.tapers(topology)
        ],
        "paths": [asdict(way) for way in ways],
        "longest_path": {
            "links": max((way.links for way in ways), default=0),
            "latency": max((way.latency[1] for way in ways), default=0.0),
        },
        "checks": _checks(topology),
    }


def _sizes(sizes: dict[int, int]) -> dict[str, int]:
    """JSON has text for keys."""
    return {str(size): times for size, times in sizes.items()}


def _bisection(topology: Topology) -> dict[str, Any]:
    found = inspection.bisection(topology)
    gpus = topology.gpus
    halves = (
        f"{gpus[0]}..{gpus[found.first - 1]}" if found.first else "nothing",
        f"{gpus[found.first]}..{gpus[-1]}",
    )
    least = min(found.forward, found.back)
    return {
        "bandwidth": least,
        "per_gpu": least / found.first if found.first else 0.0,
        "forward": found.forward,
        "back": found.back,
        "halves": list(halves),
        "gpus": [found.first, found.second],
    }


def _checks(topology: Topology) -> list[dict[str, Any]]:
    """What was looked at, whether it is good (None: that is for the reader to say), and what was found."""
    weak = inspection.weak_points(topology)
    cutting = ", ".join(f"{kind} {number}" for kind, number in weak.cutting.items())
    return [
        {"check": "connected", "good": True, "found": "every GPU reaches every other"},
        {
            "check": "duplex",
            "good": not weak.one_sided,
            "found": f"{len(weak.one_sided)} links have none back of the same bandwidth and latency"
            + _named(weak.one_sided)
            if weak.one_sided
            else "every link has one back of the same bandwidth and latency",
        },
        {
            "check": "isolated",
            "good": not weak.isolated,
            "found": f"{len(weak.isolated)} vertices have no link{_named(weak.isolated)}"
            if weak.isolated
            else "every vertex has a link",
        },
        {
            "check": "single points of failure",
            "good": None if cutting else True,
            "found": f"vertices whose loss alone cuts GPUs off from others: {cutting}"
            if cutting
            else "no GPU is cut off by the loss of one switch or card",
        },
    ]


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return f": {', '.join(names[:_NAMED])}{f' and {more} more' if more > 0 else ''}"


def drawing(machine: Machine) -> dict[str, Any]:
    """What `report.topology_svg` draws: detail, nodes and bundles, as plain values."""
    return asdict(sketch(machine.topology))


def save_drawing(path: Path, text: str) -> None:
    """Writes an SVG file whole or not at all.

    Raises   ResultError where that is not possible or the name is not one of a drawing
    """
    if path.suffix != ".svg":
        raise ResultError(f'{path}: is not the name of a drawing, such as "machine.svg"')
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ResultError(f"{path}: cannot be written: {error.strerror or error}") from error
