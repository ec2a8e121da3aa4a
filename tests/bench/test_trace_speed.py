"""What recording costs: time beside a run that keeps sums only, memory and disk of a very long run."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from clustersim.study.run import find, load, run_scenario
from clustersim.trace import files
from clustersim.trace.record import Recorder, Trace
from clustersim.trace.spill import Spill

#: Operators of the long run; RECORDED=1000000 makes it a short one.
RECORDED = int(os.environ.get("RECORDED", 100_000_000))
_BLOCK = 131_072


def cpu_seconds(name: str, level: str, folder: Path) -> tuple[float, int]:
    """Of a run with its result on disk, and its operators."""
    scenario = load(find(f"workloads/{name}.toml"), [f"trace.level={level}"])
    started = time.process_time()
    result = run_scenario(scenario, folder=folder)
    result.save(folder)
    return time.process_time() - started, result.summary["operators"]


@pytest.mark.parametrize("name", ["large_ep", "moe_1024"])
def test_recording_all_spans_costs_less_than_a_quarter_of_the_run(name: str, tmp_path: Path) -> None:
    cpu_seconds(name, "spans", tmp_path / "warm")
    # Turn by turn, so that what else the machine does meanwhile hits both alike.
    times = {level: [] for level in ("sums", "spans")}
    for _ in range(3):
        for level, found in times.items():
            seconds, operators = cpu_seconds(name, level, tmp_path / level)
            found.append(seconds)
    ratio = min(times["spans"]) / min(times["sums"])
    disk = sum(path.stat().st_size for path in (tmp_path / "spans" / "trace").iterdir())
    print(f"\n{name}: {operators:,} operators, {min(times['sums']):.2f} s with sums alone,")
    print(f"{ratio:.3f} times that with all spans, {disk / operators:.1f} bytes on disk per operator")
    assert ratio < 1.25


def test_a_hundred_million_operators_stay_within_memory_and_disk(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.process_time()
    trace = recorded(RECORDED, tmp_path)
    files.write(trace, tmp_path / "trace")
    seconds = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    disk = sum(path.stat().st_size for path in (tmp_path / "trace").iterdir())
    print(f"\n{RECORDED:,} spans: {memory / 1e6:.0f} MB of memory more, {disk / 1e6:.0f} MB on disk,")
    print(f"{seconds / RECORDED * 1e9:.0f} ns each")
    assert files.length(files.read(tmp_path / "trace").tables["spans"]) == RECORDED
    assert memory < 2e9
    assert disk < 40 * RECORDED


def recorded(spans: int, place: Path) -> Trace:
    """As many spans of 1024 ranks, with times that do not repeat, as under uneven gating."""
    recorder, rng = Recorder(Spill(place)), np.random.default_rng(1)
    names = [recorder.code("spans", "operator", f"operator {n}") for n in range(20)]
    done = np.zeros(1024)
    per_rank = _BLOCK // 1024
    for batch, first in enumerate(range(0, spans, _BLOCK)):
        count = min(_BLOCK, spans - first)
        end = done[:, None] + np.cumsum(rng.exponential(1e-5, (1024, per_rank)), axis=1)
        start = np.concatenate([done[:, None], end[:, :-1]], axis=1)
        done = end[:, -1]
        place_ = np.arange(count)
        recorder.rows(
            "spans",
            span=first + place_,
            token_batch=batch,
            rank=place_ // per_rank,
            stage=0,
            stream="compute",
            operator=np.take(names, place_ % 20),
            kind="compute",
            algorithm="",
            layer=place_ % per_rank // 20,
            group=-1,
            start=start.ravel()[:count],
            met=start.ravel()[:count],
            end=end.ravel()[:count],
            priced=(end - start).ravel()[:count],
            after=first + place_ - 1,
        )
    return recorder.finish({"name": "long"})
