"""What an exchange costs the network. Run: pytest tests/bench --benchmark-only -s

tests/bench/network_scaling.py measures more, for docs/network.md.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from network_scaling import TOLERANCE, as_flows, counted, play, token_exchange

from clustersim.physics.fluid import Fluid
from clustersim.physics.plain_fluid import PlainFluid

#: CPU seconds: what else the computer does is not the network's cost.
pytestmark = pytest.mark.benchmark(timer=time.process_time)


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("gpus", [16, 128, 1024])
def test_cost_of_a_token_exchange_weighed_by_bytes(benchmark, gpus, tolerance):
    size, links, capacity = token_exchange(gpus)
    network, flows = Fluid(capacity, tolerance), as_flows(size, links)
    first = play(network, flows)
    before = counted(network)
    ends = play(network, flows, 1.0) - 1.0
    shared, judged, _ = (counted(network) - before).tolist()
    benchmark.extra_info.update(flows=len(size), share_outs=shared, judged=judged)
    begin = iter(range(2, 10_000))
    benchmark(lambda: play(network, flows, float(next(begin))))
    # Flows with one bottleneck end together, so there are as many ends as full links, and no link is
    # looked at more than a few times.
    assert shared <= len(capacity) + 1
    assert judged <= 8 * len(capacity)
    assert np.allclose(ends, first, rtol=1e-9)
    print(
        f"\n{gpus} GPUs, tolerance {tolerance}: {len(size):,} flows, {shared:,} share-outs, {judged:,} judged"
    )


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_cost_of_an_exchange_whose_flows_end_one_by_one(benchmark, tolerance):
    size, links, capacity = token_exchange(128)
    network, flows = Fluid(capacity, tolerance), as_flows(size, links, alone=True)
    begin = iter(range(10_000))
    benchmark(lambda: play(network, flows, float(next(begin))))
    before = counted(network)
    play(network, flows, 10_000.0)
    shared, judged, _ = (counted(network) - before).tolist()
    benchmark.extra_info.update(flows=len(size), share_outs=shared, judged=judged)
    assert shared <= len(size)
    print(f"\ntolerance {tolerance}: {len(size):,} flows, {shared:,} share-outs, {judged:,} judged")


@pytest.mark.parametrize("gpus", [16, 64])
def test_cost_of_an_exchange_without_machine_code(benchmark, gpus):
    size, links, capacity = token_exchange(gpus)
    flows = as_flows(size, links)
    ends = benchmark.pedantic(lambda: play(PlainFluid(capacity), flows), rounds=3, iterations=1)
    assert np.allclose(ends, play(Fluid(capacity), flows), rtol=1e-9)
