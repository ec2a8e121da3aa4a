"""Wires the processes and runs the clock: a scenario and its layout in, a trace out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import floor, isnan, nan
from typing import Any

import numpy as np
import simpy

from clustersim.engine.details import Details
from clustersim.engine.fabric import Fabric, Process
from clustersim.engine.faults import capacities as changes_of
from clustersim.engine.faults import end_of, factor_of, link_faults, paces
from clustersim.engine.gpu import Inbox, compute_stream, service_of, transfer_stream
from clustersim.engine.ledger import Ledger
from clustersim.engine.link import Capacities, link_process
from clustersim.engine.outages import Outages
from clustersim.engine.replica import Replica
from clustersim.errors import ClustersimError
from clustersim.physics.chunked import Deadlock, Queues
from clustersim.physics.fidelity import build, depths
from clustersim.physics.network import Network
from clustersim.physics.pricing import left_out
from clustersim.plan.layout import Layout, hottest_rank
from clustersim.plan.memory import kv_bytes_per_token, needs
from clustersim.plan.topology import Links
from clustersim.serving.arrivals import requests
from clustersim.serving.kvcache import KvPool
from clustersim.spec.formats import flop_rate_of, multiplied_as
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Fault
from clustersim.trace.record import Recorder, Trace


def simulate(
    scenario: Scenario,
    layout: Layout,
    facts: Mapping[str, Any],
    tell: Callable[[int, int], None] = lambda done, all_: None,
    recorder: Recorder | None = None,
) -> Trace:
    """Runs a scenario from its first arrival to its last token.

    facts    what the trace is to carry beside its tables; the counts of the run are added
    tell     called after every pass with (done, all)
    recorder  takes the rows; None: all are kept in memory
    Raises   ClustersimError where a fault names a link that is not there; StuckError where a flow waits
             for a link that never returns
    """
    env = simpy.Environment()
    links = layout.topology.links
    network = _network(scenario, links.bandwidth)
    faults = link_faults(scenario.faults, links)
    asked = scenario.network
    outages = Outages(layout.topology, asked.on_down, asked.reroute_after) if faults else None
    fabric = Fabric(env, network, outages)
    recorder = recorder or Recorder()
    capacities = Capacities(links.bandwidth)
    details = Details(recorder, capacities, scenario.trace)
    ledger = Ledger(layout, recorder, details)
    inboxes = _streams(env, scenario, layout)
    pool = _pool(scenario, layout)
    replica = Replica(scenario, layout, fabric, inboxes, ledger, recorder, pool, tell)
    over = env.event()
    offered = np.zeros(len(links.bandwidth))
    for link, bandwidth in enumerate(links.bandwidth.tolist()):
        changes = changes_of(bandwidth, scenario.faults, faults.get(link, ()), scenario.seed)
        env.process(link_process(env, link, bandwidth, changes, fabric, capacities, offered, over))
    try:
        env.run(until=env.process(_whole(env, replica, scenario, over)))
    except Deadlock as error:
        raise ClustersimError(_deadlock(error.links, links)) from error
    replica.write()
    ledger.write_sums()
    _machine_rows(recorder, scenario, layout, ledger)
    _memory_rows(recorder, scenario, layout, pool)
    _link_rows(recorder, layout, replica.carried, offered)
    _outage_rows(recorder, outages, env.now)
    _queue_rows(recorder, network, env.now)
    return recorder.finish(
        {
            **facts,
            "simulated_seconds": env.now,
            "operators": ledger.operators,
            "events": _events(env),
            "startup": left_out(layout.topology, scenario.network.startup),
            "gpu_model": layout.topology.gpu.name,
            "kernels": scenario.deployment.kernels,
        }
    )


def _network(scenario: Scenario, bandwidth: np.ndarray) -> Network:
    how = scenario.network
    queues = Queues(how.queueing, how.switching, how.window, how.buffer)
    return build(how.fidelity, bandwidth, how.chunk, queues, how.tolerance)


def _deadlock(circle: Sequence[int], links: Links) -> str:
    names = ", ".join(f"{links.source[link]}->{links.target[link]}" for link in circle)
    return (
        f"network.buffer: the full queues of {names} wait for each other in a circle, for ever; take a "
        'larger buffer, 0 for no bound, or queueing = "fair"'
    )


def _whole(env: simpy.Environment, replica: Replica, scenario: Scenario, over: simpy.Event) -> Process:
    yield env.process(replica.serve(requests(scenario.workload, scenario.seed)))
    over.succeed()
    # One more event, so that the links have written what they know before the clock stops.
    yield env.timeout(0)


def _events(env: simpy.Environment) -> int:
    # SimPy numbers its events; the next number is how many there were.
    return next(env._eid)


def _streams(env: simpy.Environment, scenario: Scenario, layout: Layout) -> list[list[Inbox]]:
    """A process per stream of every GPU. Returns per stage the compute streams' inboxes."""
    run = service_of(scenario.deployment)
    stages = layout.groups.stage
    inboxes: list[list[Inbox]] = []
    pace = paces(scenario.faults, stages.size, hottest_rank(scenario, layout), scenario.seed)
    for stage, ranks in enumerate(stages.tolist()):
        inboxes.append([Inbox(env) for _ in ranks])
        for place, rank in enumerate(ranks):
            transfers = Inbox(env) if stage < len(stages) - 1 else None
            inbox = inboxes[-1][place]
            env.process(compute_stream(env, stage, place, inbox, transfers, pace[rank], run))
            if transfers is not None:
                env.process(transfer_stream(env, stage, place, transfers))
    return inboxes


def _pool(scenario: Scenario, layout: Layout) -> KvPool:
    """KV blocks per shard: what the fullest rank has left beside weights, activations and buffers."""
    d, w = scenario.deployment, scenario.workload
    most = max(need.total - need.kv for need in needs(scenario))
    room = layout.topology.gpu.memory * d.memory_fraction - most
    block = kv_bytes_per_token(scenario.model, d, w) * w.kv_block_tokens
    return KvPool(d.data_parallel, floor(room / block), w.kv_block_tokens)


def _machine_rows(recorder: Recorder, scenario: Scenario, layout: Layout, ledger: Ledger) -> None:
    topology, gpu = layout.topology, layout.topology.gpu
    stages, per_stage = layout.groups.stage.shape
    recorder.rows(
        "ranks",
        rank=layout.groups.stage.ravel(),
        gpu=list(topology.gpus),
        server=topology.server,
        stage=np.repeat(np.arange(stages), per_stage),
        shard=np.tile(np.arange(per_stage) // scenario.deployment.tensor_parallel, stages),
        flop_rate=max(flop_rate_of(gpu, multiplied_as(gpu, fmt)) for fmt in scenario.model.formats),
        memory_bandwidth=gpu.memory_bandwidth,
        memory=gpu.memory,
        flop=ledger.flop,
        moved=ledger.moved,
        priced=ledger.priced,
    )
    for fault in scenario.faults:
        place = _place(fault, scenario, layout)
        recorder.rows(
            "faults",
            kind=fault.kind,
            place=place,
            start=fault.start,
            end=end_of(fault),
            factor=factor_of(fault) if fault.kind != "spread_gpus" else nan,
        )


def _place(fault: Fault, scenario: Scenario, layout: Layout) -> str:
    """Where a fault is, in words."""
    if fault.link is not None:
        return fault.link
    if isinstance(fault.gpu, int):
        return f"rank {fault.gpu}"
    return f"rank {hottest_rank(scenario, layout)}" if fault.gpu == "hottest" else "all ranks"


def _memory_rows(recorder: Recorder, scenario: Scenario, layout: Layout, pool: KvPool) -> None:
    """What each rank held at most; the KV cache is what its shard's pool really gave out."""
    per_block = kv_bytes_per_token(scenario.model, scenario.deployment, scenario.workload) * pool.block_tokens
    kv = np.repeat(pool.most * per_block, scenario.deployment.tensor_parallel)
    for stage, need in enumerate(needs(scenario)):
        for part, size in need.parts().items():
            held = kv if part == "kv" else size
            recorder.rows("memory", rank=layout.groups.stage[stage], part=part, bytes=held)


def _link_rows(recorder: Recorder, layout: Layout, carried: np.ndarray, offered: np.ndarray) -> None:
    links = layout.topology.links
    recorder.rows(
        "links",
        link=np.arange(len(carried)),
        source=list(links.source),
        target=list(links.target),
        tier=list(links.tier),
        bandwidth=links.bandwidth,
        latency=links.latency,
        bytes=carried,
        offered=offered,
    )


def _outage_rows(recorder: Recorder, outages: Outages | None, now: float) -> None:
    for outage in outages.past if outages else ():
        end = now if isnan(outage.end) else outage.end
        recorder.rows("outages", **{**asdict(outage), "end": end})


def _queue_rows(recorder: Recorder, network: Network, end: float) -> None:
    link, rows = depths(network, end)
    if len(link):
        start, until, mean, most = rows.T
        recorder.rows("queues", link=link, start=start, end=until, mean=mean, max=most)
