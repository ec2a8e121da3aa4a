"""Measures what the network costs and how exact it is, for docs/network.md.

python tests/bench/network_scaling.py [--cases DIR ...] [--part PART ...]

Times are CPU seconds of this process or of those it starts, the best of several; machine code is
loaded before. --cases names folders of traffic, one folder per case, as `clustersim network` reads
them; where one holds simgrid.csv.gz, the times are compared with it. What a part found replaces what
docs/data/network_speed.json held of it.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numba
import numpy as np

from clustersim.physics.chunked import Queues
from clustersim.physics.fluid import Fluid
from clustersim.physics.network import Flows, Network
from clustersim.physics.plain_fluid import PlainFluid
from clustersim.physics.replay import replay_fluid
from clustersim.seeds import stream
from clustersim.study.traffic import read_case

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "docs" / "data" / "network_speed.json"

GPUS = (16, 32, 64, 128, 256, 512, 1024)
ALONE_UP_TO, PLAIN_UP_TO = 256, 128
TOLERANCE = 0.002
#: How often links serve a chunk in one random case.
SERVED = (2_500, 10_000, 40_000)
TOLERANCES = (0.0005, 0.002, 0.01, 0.05)

#: The machine: servers of 8, NVLink and network card in and out of every GPU, bytes/s and s.
SERVER, NVLINK, CARD, LATENCY = 8, 450e9, 50e9, 4e-6
#: The exchange: tokens per GPU, experts each goes to, bytes, Zipf exponent; at least one expert per GPU.
TOKENS, TOP_K, TOKEN_BYTES, SKEW, EXPERTS = 128, 8, 7168, 1.2, 256

#: Case → CPU seconds and peak MiB of SimGrid 3.32 (C++) on two shared x86-64 cores, and what of its
#: time ours may take.
SIMGRID = {
    "a2a_zipf_128_s1": (6.3, 80, 10),
    "random_256_10k_os4sp4": (9.6, 79, 10),
    "a2a_jitter_64": (2.3, 49, None),
    "a2a_jitter_128": (94.4, 84, 15),
    "a2a_uniform_128": (0.18, 85, None),
    "a2a_uniform_256": (1.09, 216, None),
    "a2a_uniform_1024": (138.0, 2647, 15),
}

#: Runs a command as its only child, so that the peak memory is the command's own.
_WATCHED = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def token_exchange(gpus: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dispatch of one MoE layer: each GPU sends every token once to each GPU that holds a wanted expert.

    Returns  float64[F] bytes, int32[F, 2] links, float64[4 * gpus] bytes/s: cards out and in, NVLink
             out and in
    """
    rng = stream(seed, "network_scaling", gpus)
    experts = max(EXPERTS, gpus)
    popularity = 1.0 / np.arange(1, experts + 1) ** SKEW
    popularity = popularity[rng.permutation(experts)]
    holder = np.arange(experts) * gpus // experts
    sent = np.zeros((gpus, gpus))
    for gpu in range(gpus):
        # Drawing without replacement: the first arrivals of Poisson processes.
        keys = rng.exponential(size=(TOKENS, experts)) / popularity
        wanted = np.zeros((TOKENS, gpus), dtype=bool)
        np.put_along_axis(wanted, holder[np.argpartition(keys, TOP_K)[:, :TOP_K]], True, axis=1)
        sent[gpu] = wanted.sum(axis=0)
    np.fill_diagonal(sent, 0)
    source, target = sent.nonzero()
    near = source // SERVER == target // SERVER
    links = np.stack([source, target + gpus], axis=1) + 2 * gpus * near[:, None]
    capacity = np.repeat([CARD, NVLINK], 2 * gpus)
    return sent[source, target] * TOKEN_BYTES, links.astype(np.int32), capacity


def as_flows(size: np.ndarray, links: np.ndarray, alone: bool = False) -> Flows:
    """The exchange as one start; `alone`: every flow weighs 1 and ends on its own."""
    weight = np.ones(len(size)) if alone else size / size.mean()
    return Flows(size, weight, links, np.full(len(size), LATENCY))


def play(network: Network, flows: Flows, begin: float = 0.0) -> np.ndarray:
    """Moves one exchange. Returns float64[F] s when each flow ended."""
    ends = np.full(len(flows.size), np.nan)
    network.start(flows, "exchange", begin)
    while (now := network.next_finish()) < np.inf:
        for _, positions in network.finish(now):
            ends[positions] = now
    assert not np.isnan(ends).any()
    return ends


def counted(network: Fluid) -> np.ndarray:
    """int64[3] share-outs, links judged, links judged flow by flow, so far."""
    totals = network._state.totals
    return np.array([totals[name][0] for name in ("shared", "judged", "fitted")])


def cpu_seconds(work: Callable[[], object], budget: float = 2.0) -> float:
    """The least CPU seconds of 3 to 30 runs, fewer where one is long."""
    seconds: list[float] = []
    while len(seconds) < 30 and (len(seconds) < 3 or sum(seconds) < budget):
        before = time.process_time()
        work()
        seconds.append(time.process_time() - before)
        if sum(seconds) > 20 * budget:
            break
    return min(seconds)


def exchange_cost(flows: Flows, capacity: np.ndarray, tolerance: float) -> dict[str, Any]:
    """What one exchange costs a network that has room for it and is at rest."""
    network = Fluid(capacity, tolerance)
    play(network, flows)
    before = counted(network)
    play(network, flows, 1.0)
    shared, judged, fitted = (counted(network) - before).tolist()
    begin = iter(range(2, 100))
    seconds = cpu_seconds(lambda: play(network, flows, float(next(begin))))
    return {"seconds": seconds, "share_outs": shared, "judged": judged, "fitted": fitted}


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of log cost over log (F log F): 1 is F log F, less is better."""
    flows, seconds = (np.array([row[key] for row in rows], dtype=float) for key in ("flows", "seconds"))
    return float(np.polyfit(np.log(flows * np.log(flows)), np.log(seconds), 1)[0])


def scaling(most: int = GPUS[-1]) -> dict[str, Any]:
    """Cost of an exchange over the number of GPUs: weighed by bytes, and with weights of 1."""
    found: dict[str, Any] = {"bytes_exact": [], "bytes_coalesced": [], "ones_exact": [], "ones_coalesced": []}
    for gpus in (g for g in GPUS if g <= most):
        size, links, capacity = token_exchange(gpus)
        for name, rows in found.items():
            alone = name.startswith("ones")
            if alone and gpus > ALONE_UP_TO:
                continue
            tolerance = 0.0 if name.endswith("exact") else TOLERANCE
            cost = exchange_cost(as_flows(size, links, alone), capacity, tolerance)
            rows.append({"gpus": gpus, "flows": len(size), **cost})
            print(name, rows[-1], flush=True)
    slopes = {
        name: {
            "all": exponent(rows),
            "from_64_gpus": exponent([row for row in rows if row["gpus"] >= 64]),
            "last_doubling": exponent(rows[-2:]),
        }
        for name, rows in found.items()
    }
    return {"rows": found, "exponents": slopes}


def plain() -> list[dict[str, Any]]:
    """What the same exchange costs without machine code."""
    rows = []
    for gpus in (g for g in GPUS if g <= PLAIN_UP_TO):
        size, links, capacity = token_exchange(gpus)
        flows = as_flows(size, links)
        slow = cpu_seconds(lambda: play(PlainFluid(capacity), flows))  # noqa: B023
        quick = exchange_cost(flows, capacity, 0.0)["seconds"]
        rows.append({"gpus": gpus, "flows": len(size), "plain": slow, "compiled": quick})
        print("plain", rows[-1], flush=True)
    return rows


def cases(folders: list[Path]) -> dict[str, Path]:
    """Name → folder of each case, the first where several have it."""
    found: dict[str, Path] = {}
    for folder in folders:
        for case in sorted(folder.iterdir()):
            if any((case / name).exists() for name in ("flows.csv", "flows.csv.gz")):
                found.setdefault(case.name, case)
    return dict(sorted(found.items()))


def watched(command: list[str], **environment: str) -> tuple[float, float]:
    """CPU seconds and peak MiB of a command."""
    said = subprocess.run(
        [sys.executable, "-c", _WATCHED, *command],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    seconds, peak = json.loads(said)
    return seconds, peak


def _column(path: Path, name: str) -> np.ndarray:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return np.array([float(row[name]) for row in csv.DictReader(file)])


def worst_error(answer: Path, folders: list[Path], case: str) -> float | None:
    """The largest relative error of a flow's duration; None where nobody knows better."""
    files = [at / case / name for at in folders for name in ("simgrid.csv.gz", "simgrid_distinct.csv")]
    known = next((path for path in files if path.exists()), None)
    if known is None:
        return None
    mine, theirs = _column(answer, "finish_us"), _column(known, "finish_us")
    if known.name == "simgrid_distinct.csv":
        # All flows begin at 0, and the file says how many end at each time.
        theirs = np.repeat(theirs, _column(known, "flows").astype(int))
        return float((abs(np.sort(mine) - theirs) / theirs).max())
    mine, theirs = mine - _column(answer, "release_us"), theirs - _column(known, "release_us")
    return float((abs(mine - theirs) / theirs).max())


def against_simgrid(folders: list[Path]) -> list[dict[str, Any]]:
    """Whole-process cost and error of `clustersim network` on each case."""
    rows = []
    for name, case in cases(folders).items():
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "times.csv.gz"
            command = [sys.executable, "-m", "clustersim.cli", "network", str(case), "--out", str(out)]
            runs = [watched(command) for _ in range(3)]
            seconds, peak = min(r[0] for r in runs), max(r[1] for r in runs)
            error = worst_error(out, folders, name)
        theirs, their_peak, goal = SIMGRID.get(name, (None, None, None))
        flows = len(read_case(case).traffic.size)
        if name not in SIMGRID and error is None:
            continue
        row = {"case": name, "flows": flows, "seconds": seconds, "peak_mib": peak, "error": error}
        rows.append({**row, "simgrid_seconds": theirs, "simgrid_peak_mib": their_peak, "goal": goal})
        print("simgrid", rows[-1], flush=True)
    return rows


def _errors(exact: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Relative errors of float64[F] durations of flows that begin at 0."""
    error = abs(found - exact) / exact
    return {"median": float(np.median(error)), "worst": float(error.max())}


def coalesced(folders: list[Path]) -> list[dict[str, Any]]:
    """Error and speed-up of coalesced mode: one exchange weighed by bytes, and the cases."""
    return [*_coalesced_exchanges(), *_coalesced_cases(folders)]


def _coalesced_exchanges() -> Iterator[dict[str, Any]]:
    for gpus in (128, 1024):
        size, links, capacity = token_exchange(gpus)
        flows = as_flows(size, links)
        exact = play(Fluid(capacity), flows)
        base = exchange_cost(flows, capacity, 0.0)["seconds"]
        for tolerance in TOLERANCES:
            ends = play(Fluid(capacity, tolerance), flows)
            row = {"case": f"token exchange, {gpus} GPUs, weighed by bytes", "tolerance": tolerance}
            row |= _errors(exact, ends) | {"makespan": float(abs(ends.max() / exact.max() - 1))}
            row |= {"exact_seconds": base, "seconds": exchange_cost(flows, capacity, tolerance)["seconds"]}
            print("coalesced", row, flush=True)
            yield row


def _coalesced_cases(folders: list[Path]) -> Iterator[dict[str, Any]]:
    for name, case in cases(folders).items():
        if not name.startswith(("a2a_zipf", "a2a_jitter", "random")):
            continue
        traffic = read_case(case).traffic
        release, finish = replay_fluid(traffic)
        base = cpu_seconds(lambda: replay_fluid(traffic))  # noqa: B023
        for tolerance in TOLERANCES:
            seconds = cpu_seconds(lambda: replay_fluid(traffic, tolerance))  # noqa: B023
            _, ends = replay_fluid(traffic, tolerance)
            whole, mine = finish.max() - release.min(), ends.max() - release.min()
            row = {"case": name, "tolerance": tolerance, **_errors(finish - release, ends - release)}
            row |= {"makespan": float(abs(mine / whole - 1)), "exact_seconds": base, "seconds": seconds}
            print("coalesced", row, flush=True)
            yield row


def chunked() -> list[dict[str, Any]]:
    """Distance of the chunked network's makespans from the fluid's, on the 200 random cases of its tests."""
    # As a script this file sees its own folder only.
    sys.path.insert(0, str(ROOT / "tests"))
    from test_chunked import Case

    cases_, rows = [Case(seed) for seed in range(200)], []
    for queueing, switching in product(("fair", "fifo"), ("store_and_forward", "cut_through")):
        queues = Queues(queueing, switching)
        for served in SERVED:
            before = time.process_time()
            errors = np.array([case.makespan_error(served, queues) for case in cases_])
            cost = (time.process_time() - before) / (served * len(cases_))
            row = {"queueing": queueing, "switching": switching, "served": served, "seconds_each": cost}
            row |= {"median": float(np.median(errors)), "worst": float(errors.max())}
            rows.append({**row, "over_2_percent": int((errors > 0.02).sum())})
            print("chunked", rows[-1], flush=True)
    return rows


def first_run() -> dict[str, float]:
    """CPU seconds of a user's first run, which compiles, and of the next."""
    with tempfile.TemporaryDirectory() as scratch:
        example = str(ROOT / "workloads" / "large_ep.toml")

        def run(out: str) -> float:
            command = [sys.executable, "-m", "clustersim.cli", "run", example, "--out", f"{scratch}/{out}"]
            return watched(command, NUMBA_CACHE_DIR=f"{scratch}/cache")[0]

        first = run("first")
        return {"first": first, "next": min(run(f"next{n}") for n in range(3))}


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
    }


def rounded(value: Any) -> Any:
    """Three digits of everything measured: the rest is noise."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


#: Part of the data → who measures it. Processes are watched before this one is large.
PARTS: dict[str, Callable[[list[Path]], Any]] = {
    "first_run": lambda folders: first_run(),
    "simgrid": against_simgrid,
    "scaling": lambda folders: scaling(),
    "plain": lambda folders: plain(),
    "coalesced": coalesced,
    "chunked": lambda folders: chunked(),
}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--cases", type=Path, nargs="+", default=[], metavar="DIR")
    reader.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    asked = reader.parse_args()
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    for part in asked.part:
        if part == "simgrid" and not asked.cases:
            print("simgrid: skipped, no --cases")
            continue
        data[part] = rounded(PARTS[part](asked.cases))
        DATA.parent.mkdir(exist_ok=True)
        text = json.dumps({**data, "machine": machine()}, indent=1, sort_keys=True)
        DATA.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
