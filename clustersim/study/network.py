"""Replays a folder of traffic through a network model: when every flow is done, and what held it up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.physics.fidelity import build
from clustersim.physics.fidelity import wait as wait
from clustersim.physics.kernel import COMPILES
from clustersim.physics.replay import Traffic, replay, replay_fluid
from clustersim.study.traffic import Case, read_case
from clustersim.trace.csv import check_place, to_csv, write_csv
from clustersim.trace.plain import plain
from clustersim.units import parse

#: Chunks times links that the chunked model moves within some minutes.
MOST_HOPS = 1e8
_SHOWN = 5
_US_PER_S = 1e6
#: Share of a flow's duration that the clock may be coarse by before a note says so.
_COARSE = 1e-6


@dataclass(frozen=True, eq=False, slots=True)
class Replay:
    """When each flow of a case was released and done.

    release, finish  float64[F] s
    model            fidelity, chunk in bytes, tolerance
    """

    case: Case
    release: np.ndarray
    finish: np.ndarray
    model: dict[str, Any]

    def times(self) -> dict[str, np.ndarray]:
        """The columns of the answer, rows in the order of flows.csv: flow_id, release_us, finish_us."""
        release, finish = self.release * _US_PER_S, self.finish * _US_PER_S
        return {"flow_id": self.case.flow, "release_us": release, "finish_us": finish}

    def csv(self) -> bytes:
        """The answer as text."""
        return to_csv(self.times())

    def write(self, path: Path) -> None:
        """Writes the answer; compressed if the name ends in `.gz`.

        Raises   ResultError if nothing can be written there
        """
        write_csv(path, self.times())


def replay_case(
    folder: Path, fidelity: str = "fluid", chunk: str | float = 262144.0, tolerance: float = 0.0
) -> Replay:
    """Reads a case and plays it through a network model.

    folder     holds links.csv and flows.csv, each possibly with `.gz`
    fidelity   a key of physics.fidelity.NETWORKS
    chunk      of the chunked model: bytes, or a size with its unit
    tolerance  of the fluid model, 0 to 0.5, as `network.tolerance` of a scenario
    Raises     ScenarioError with the mistakes of the files, ClustersimError for options that do not fit
    """
    size = parse(chunk, "size") if isinstance(chunk, str) else chunk
    if not size > 0:
        raise ClustersimError(f"--chunk: {chunk} is too small; a chunk has more than 0 bytes")
    if not 0 <= tolerance <= 0.5:
        raise ClustersimError(f"--tolerance: {tolerance:g} is not between 0, which is exact, and 0.5")
    if tolerance and fidelity != "fluid":
        raise ClustersimError(f"--tolerance: is for fidelity fluid, not for {fidelity}")
    case = read_case(folder)
    if fidelity == "chunked":
        _refuse_too_many(case.traffic, size)
    if fidelity == "fluid" and COMPILES:
        release, finish = replay_fluid(case.traffic, tolerance)
    else:
        network = build(fidelity, case.traffic.bandwidth, size, tolerance=tolerance)
        release, finish = replay(case.traffic, network)
    return Replay(case, release, finish, {"fidelity": fidelity, "chunk": size, "tolerance": tolerance})


def check_out(out: Path, folder: Path) -> None:
    """Raises ClustersimError if the answer could not be written there, or would replace the question."""
    check_place(out)
    for name in ("links.csv", "flows.csv", "links.csv.gz", "flows.csv.gz"):
        path = folder / name
        if out.exists() and path.exists() and out.samefile(path):
            raise ClustersimError(f"{out}: is a file of the case itself; name another for the answer")


def _refuse_too_many(traffic: Traffic, chunk: float) -> None:
    hops = float((np.ceil(traffic.size / chunk) * (traffic.links >= 0).sum(axis=1)).sum())
    if hops > MOST_HOPS:
        raise ClustersimError(
            f"--fidelity chunked: {hops:.2g} chunks would cross links, more than {MOST_HOPS:.0e}; "
            "a larger --chunk makes them fewer, --fidelity fluid needs none"
        )


def summary(found: Replay) -> dict[str, Any]:
    """What `clustersim network` shows, as JSON values in SI units.

    Returns  model, flows, links, bytes, first_release, last_finish, makespan, duration and slowdown
             (duration ÷ what the flow would take with the network to itself) as mean, p50, p90, p99, max;
             slowest: the flows of longest duration; busiest: the links that carried the most of what
             they could in the makespan; notes
    """
    traffic = found.case.traffic
    duration = found.finish - found.release
    alone = _alone(traffic)
    first, last = float(found.release.min()), float(found.finish.max())
    slowed = alone > 0
    shown = {
        "model": found.model,
        "flows": len(duration),
        "links": len(traffic.bandwidth),
        "bytes": float(traffic.size.sum()),
        "first_release": first,
        "last_finish": last,
        "makespan": last - first,
        "duration": _spread(duration),
        "slowdown": _spread(duration[slowed] / alone[slowed]) if slowed.any() else None,
        "slowest": _slowest(found, duration, alone),
        "busiest": _busiest(found, last - first),
        "notes": list(_notes(found, duration)),
    }
    answer: dict[str, Any] = plain(shown)
    return answer


def _alone(traffic: Traffic) -> np.ndarray:
    """float64[F] s that each flow would take with the network to itself."""
    slowness = np.append(1 / traffic.bandwidth, 0.0)
    return np.asarray(traffic.latency + traffic.size * slowness[traffic.links].max(axis=1))


def _spread(values: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}


def _slowest(found: Replay, duration: np.ndarray, alone: np.ndarray) -> list[dict[str, Any]]:
    case = found.case
    return [
        {
            "flow": int(case.flow[at]),
            "src": case.source.words[case.source.codes[at]],
            "dst": case.target.words[case.target.codes[at]],
            "bytes": float(case.traffic.size[at]),
            "release": float(found.release[at]),
            "duration": float(duration[at]),
            "alone": float(alone[at]),
        }
        for at in np.argsort(-duration, kind="stable")[:_SHOWN].tolist()
    ]


def _busiest(found: Replay, makespan: float) -> list[dict[str, Any]]:
    case, traffic = found.case, found.case.traffic
    sizes = np.broadcast_to(traffic.size[:, None], traffic.links.shape)
    carried = np.bincount(traffic.links.ravel() + 1, sizes.ravel(), minlength=len(traffic.bandwidth) + 1)[1:]
    share = carried / traffic.bandwidth / makespan if makespan > 0 else np.zeros(len(carried))
    order = np.argsort(-share, kind="stable")[:_SHOWN].tolist()
    return [
        {
            "link": int(case.link[at]),
            "name": case.name.words[case.name.codes[at]],
            "bandwidth": float(traffic.bandwidth[at]),
            "bytes": float(carried[at]),
            "utilization": float(share[at]),
        }
        for at in order
        if carried[at] > 0
    ]


def _notes(found: Replay, duration: np.ndarray) -> Iterator[str]:
    traffic = found.case.traffic
    empty = int((traffic.links[:, 0] < 0).sum())
    if empty:
        yield f"{_flows(empty)} an empty path and took no time."
    whole = int((traffic.size < found.model["chunk"]).sum())
    if found.model["fidelity"] == "chunked" and 2 * whole > len(traffic.size):
        yield (
            f"{_flows(whole)} less than one chunk to send, which every link stores before it goes on; "
            "a smaller --chunk comes nearer to what a network does."
        )
    moving = duration > 0
    # Each of the two times may be off by an ulp when it is reckoned and by another when it is written.
    coarse = int((4 * np.spacing(found.finish[moving]) > _COARSE * duration[moving]).sum())
    if coarse:
        yield (
            f"{_flows(coarse)} a duration below what the clock can tell apart that late, to one part in "
            f"{1 / _COARSE:,.0f}; let the traffic begin nearer to 0."
        )


def _flows(count: int) -> str:
    return "1 flow has" if count == 1 else f"{count:,} flows have"
