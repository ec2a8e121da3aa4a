"""The fluid model against SimGrid's finish times of the same traffic (see tests/oracles/README.md)."""

import csv
import gzip
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path

import numpy as np
import pytest

from clustersim.physics.fluid import Fluid
from clustersim.physics.network import Flows, Network

CASES = Path(__file__).parent / "oracles"


@dataclass(frozen=True)
class Case:
    """Traffic with dependencies, in SI units; release and finish are SimGrid's answers."""

    bandwidth: np.ndarray
    links: np.ndarray
    latency: np.ndarray
    size: np.ndarray
    start: list[float]
    after: list[list[int]]
    release: np.ndarray
    finish: np.ndarray


def rows(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", newline="") as lines:
        return list(csv.DictReader(lines))


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(";")] if text else []


def load(folder: Path) -> Case:
    links, flows = rows(folder / "links.csv.gz"), rows(folder / "flows.csv.gz")
    answers = rows(folder / "simgrid.csv.gz")
    paths = [numbers(row["path"]) for row in flows]
    table = np.full((len(flows), max(map(len, paths))), -1, dtype=np.int32)
    for row, path in enumerate(paths):
        table[row, : len(path)] = path
    latency = np.array([float(row["lat_us"]) * 1e-6 for row in links] + [0.0])
    return Case(
        bandwidth=np.array([float(row["bw_GBps"]) * 1e9 for row in links]),
        links=table,
        latency=latency[table].sum(axis=1),
        size=np.array([float(row["bytes"]) for row in flows]),
        start=[float(row["start_us"]) * 1e-6 for row in flows],
        after=[numbers(row["after"]) for row in flows],
        release=np.array([float(row["release_us"]) * 1e-6 for row in answers]),
        finish=np.array([float(row["finish_us"]) * 1e-6 for row in answers]),
    )


def replay(case: Case, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """When each flow is released and done, s; what is released at one moment is started together."""
    release, finish = np.full(len(case.size), np.nan), np.full(len(case.size), np.nan)
    missing = [len(after) for after in case.after]
    following: list[list[int]] = [[] for _ in case.after]
    for flow, after in enumerate(case.after):
        for other in after:
            following[other].append(flow)
    agenda = [(case.start[flow], flow) for flow, count in enumerate(missing) if not count]
    heapify(agenda)
    while (now := min(agenda[0][0] if agenda else np.inf, network.next_finish())) < np.inf:
        for key, positions in network.finish(now):
            for flow in np.array(key)[positions].tolist():
                finish[flow] = now
                for other in following[flow]:
                    missing[other] -= 1
                    if not missing[other]:
                        heappush(agenda, (max(now, case.start[other]), other))
        ready = []
        while agenda and agenda[0][0] <= now:
            ready.append(heappop(agenda)[1])
        if ready:
            release[ready] = now
            weight = np.ones(len(ready))
            flows = Flows(case.size[ready], weight, case.links[ready], case.latency[ready])
            network.start(flows, tuple(ready), now)
    return release, finish


@pytest.mark.parametrize("name", sorted(folder.name for folder in CASES.iterdir() if folder.is_dir()))
def test_the_fluid_model_gives_the_times_of_simgrid(name):
    case = load(CASES / name)
    release, finish = replay(case, Fluid(case.bandwidth))
    assert finish == pytest.approx(case.finish, rel=1e-6)
    assert finish - release == pytest.approx(case.finish - case.release, rel=1e-6)
