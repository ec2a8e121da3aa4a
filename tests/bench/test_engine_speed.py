"""What a simulated operator costs beside a bare SimPy timeout. Run: pytest tests/bench --benchmark-only"""

from __future__ import annotations

import time

import pytest
import simpy

from clustersim.study.run import find, load, run_scenario


def bare_loop(processes: int, timeouts: int) -> float:
    """Wall seconds of as many timeouts in as many processes, doing nothing else."""
    env = simpy.Environment()

    def stream(count: int):
        for _ in range(count):
            yield env.timeout(1.0)

    for _ in range(processes):
        env.process(stream(timeouts // processes))
    started = time.perf_counter()
    env.run()
    return time.perf_counter() - started


@pytest.mark.parametrize("skew", ["even", "zipf"])
def test_cost_of_an_operator(benchmark, skew):
    scenario = load(find("workloads/moe_1024.toml"), [f"gating.skew={skew}"])
    result = benchmark.pedantic(lambda: run_scenario(scenario), rounds=1, iterations=1)
    operators = result.summary["operators"]
    bare = bare_loop(1024, operators)
    seconds = benchmark.stats.stats.mean
    benchmark.extra_info["operators"] = operators
    benchmark.extra_info["events"] = result.summary["events"]
    benchmark.extra_info["ratio_to_bare_timeouts"] = round(seconds / bare, 2)
    assert operators == 710_656
    print(f"\n{skew}: {operators:,} operators in {seconds:.1f} s, {seconds / bare:.1f} x bare timeouts")
