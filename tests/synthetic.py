"""A trace small enough to reckon by hand: two ranks, two requests, two decode steps, ten seconds."""

from __future__ import annotations

from typing import Any

import numpy as np

from clustersim.trace.record import Recorder, Trace

NAN = float("nan")

FACTS: dict[str, Any] = {
    "name": "tiny",
    "scenario_hash": "0123456789abcdef",
    "seed": 7,
    "simulated_seconds": 10.0,
    "wall_seconds": 0.25,
    "operators": 10,
    "events": 40,
    "gpu_model": "h200_sxm",
    "phase": "decode",
    "claimed": None,
    "scenario": 'name = "tiny"\n',
}

CLAIM = {"source": "a brochure", "total_tokens_per_second": 450.0, "tpot": 1.0, "against": "other"}


def tiny(
    *,
    spans: bool = True,
    experts: bool = True,
    faults: bool = False,
    prices: bool = True,
    rebalances: bool = False,
    requests: dict[str, Any] | None = None,
    **facts: Any,
) -> Trace:
    """The trace; `requests` and `facts` overwrite columns and facts."""
    recorder = Recorder()
    _requests_and_steps(recorder, requests or {})
    _ranks(recorder)
    _sums_and_links(recorder)
    if spans:
        _spans(recorder)
    if experts:
        _experts(recorder)
    if rebalances:
        _rebalances(recorder)
    if prices:
        _prices(recorder)
    if faults:
        recorder.rows("faults", kind="slow_gpu", place="rank 1", start=0.0, end=1.0, factor=2.0)
    return recorder.finish({**FACTS, **facts})


def _rebalances(recorder: Recorder) -> None:
    """Two plans, of which the first moves 8 B in half a second between the steps."""
    recorder.rows(
        "rebalances",
        rebalance=[0, 1],
        observed=0.0,
        planned=[3.0, 7.0],
        ready=[3.0, 7.0],
        outcome=["moved", "nothing_better"],
        began=[3.0, NAN],
        ended=[3.5, NAN],
        layers=[1, 0],
        copies=[2, 0],
        bytes=[8.0, 0.0],
        stopped=[0.5, 0.0],
        before=[1.5, 1.1],
        wished=[1.0, 1.08],
        foreseen=[1.0, 1.1],
        after=[1.25, NAN],
        unmoved=[1.75, NAN],
    )
    recorder.rows("placements", token_batch=[0, 1], layer=0, mean=2.0, busiest=[3, 4], first=[4, 4])


def _prices(recorder: Recorder) -> None:
    """Ten seconds: five measured, three interpolated, two extrapolated by 1.5 octaves."""
    recorder.rows(
        "prices",
        operator=["qkv", "qkv", "attention"],
        phase="decode",
        kernel=["gemm", "gemm", "attention_decode"],
        format="bf16",
        basis="h100_sxm bf16 trtllm",
        origin=["measured", "interpolated", "extrapolated"],
        count=[4, 3, 2],
        seconds=[5.0, 3.0, 2.0],
        outside=[0.0, 0.0, 1.5],
        launch=[0.5, 0.3, 0.0],
    )


def _requests_and_steps(recorder: Recorder, overwritten: dict[str, Any]) -> None:
    columns = {
        "request": [0, 1],
        "batch": 0,
        "shard": [0, 1],
        "arrival": 0.0,
        "started": 0.0,
        "first_token": 3.0,
        "finish": 8.0,
        "input_tokens": 0,
        "output_tokens": 2,
    }
    recorder.rows("requests", **{**columns, **overwritten})
    recorder.rows(
        "steps",
        step=[0, 1],
        batch=0,
        index=[0, 1],
        phase="decode",
        start=[0.0, 3.0],
        end=[3.0, 8.0],
        input_tokens=0,
        output_tokens=2,
        flop=150.0,
        bound_compute=0.1,
        bound_memory=[1.0, 2.0],
        bound_network=0.5,
    )
    recorder.rows(
        "token_batches",
        token_batch=[0, 1],
        step=[0, 1],
        microbatch=0,
        ready=0.0,
        start=[0.0, 3.0],
        end=[3.0, 8.0],
        tokens=2,
        dropped=0,
    )


def _ranks(recorder: Recorder) -> None:
    recorder.rows(
        "ranks",
        rank=[0, 1],
        gpu=["s0/gpu0", "s0/gpu1"],
        server=0,
        stage=0,
        shard=[0, 1],
        flop_rate=100.0,
        memory_bandwidth=10.0,
        memory=100.0,
        flop=[200.0, 100.0],
        moved=[30.0, 10.0],
        priced=[4.0, 3.0],
    )
    recorder.rows(
        "memory",
        rank=[0, 0, 1, 1],
        part=["weights", "kv", "weights", "kv"],
        bytes=[60.0, 20.0, 60.0, 30.0],
    )
    recorder.rows("kv_use", time=[0.0, 0.0, 8.0, 8.0], shard=[0, 1, 0, 1], bytes=[20.0, 30.0, 0.0, 0.0])


def _sums_and_links(recorder: Recorder) -> None:
    recorder.rows(
        "sums",
        rank=[0, 1, 0, 1, 0],
        stream=["compute", "compute", "compute", "compute", "transfer"],
        operator=["attention", "attention", "combine", "combine", "send"],
        phase="decode",
        kind=["compute", "compute", "exchange", "exchange", "exchange"],
        count=2,
        busy=[4.0, 3.0, 1.0, 1.0, 5.0],
        wait=[0.0, 0.0, 0.0, 2.0, 1.0],
        waited_for=[-1, -1, -1, 0, -1],
    )
    recorder.rows("waits", operator="combine", phase="decode", layer=0, rank=0, seconds=2.0)
    recorder.rows(
        "exchanges",
        operator=["combine", "combine", "send"],
        phase="decode",
        kind=["all_to_all", "all_to_all", "point_to_point"],
        algorithm=["pairwise", "hierarchical", "direct"],
        count=[1, 3, 2],
        bytes=[10.0, 30.0, 20.0],
    )
    recorder.rows(
        "links",
        link=[0, 1],
        source=["s0/gpu0", "s0/nvswitch"],
        target=["s0/nvswitch", "s0/gpu0"],
        tier=["gpu-nvswitch", "nvswitch-gpu"],
        bandwidth=10.0,
        latency=1e-6,
        bytes=[50.0, 0.0],
        offered=100.0,
    )
    recorder.rows("link_use", link=0, start=[2.0, 4.0], end=[4.0, 6.0], bytes=[30.0, 20.0])
    recorder.rows(
        "queues",
        link=[0, 0, 1],
        start=[0.0, 4.0, 0.0],
        end=[4.0, 10.0, 10.0],
        mean=[6.0, 0.0, 0.0],
        max=[9.0, 0.0, 0.0],
    )


def _spans(recorder: Recorder) -> None:
    recorder.rows(
        "spans",
        span=np.arange(4),
        token_batch=0,
        rank=[0, 1, 0, 1],
        stage=0,
        stream="compute",
        operator=["attention", "attention", "combine", "combine"],
        kind=["compute", "compute", "exchange", "exchange"],
        algorithm=["", "", "pairwise", "pairwise"],
        layer=[-1, 0, 0, 0],
        group=[-1, -1, 0, 0],
        start=[0.0, 0.0, 2.0, 1.0],
        met=[0.0, 0.0, 2.0, 2.0],
        end=[2.0, 1.0, 3.0, 3.0],
        priced=[2.0, 1.0, NAN, NAN],
        after=[-1, -1, 0, 0],
    )
    recorder.rows("span_links", span=[2, 3], link=0, own=[50.0, 20.0], all=50.0, payload=50.0)


def _experts(recorder: Recorder) -> None:
    recorder.rows(
        "experts",
        token_batch=[0, 0, 1, 1],
        layer=0,
        rank=[0, 1, 0, 1],
        ep_rank=[0, 1, 0, 1],
        slot=0,
        expert=[0, 1, 0, 1],
        tokens=[3, 1, 0, 4],
        first_arrival=[1.0, 1.0, NAN, 4.0],
        last_arrival=[1.5, 1.0, NAN, 4.0],
        served=[2.0, 1.1, 6.0, 6.0],
        done=[2.5, 1.3, 6.0, 7.0],
        length=[3, 1, 0, 4],
        wait=[1.5, 0.1, 0.0, 4.0],
        behind=[0.9, 0.0, 0.0, 1.0],
        wait_p50=[0.5, 0.1, NAN, 1.0],
        wait_p99=[0.5, 0.1, NAN, 1.0],
        wait_max=[1.0, 0.1, NAN, 2.0],
    )
    recorder.rows("token_waits", phase="decode", wait=[0.1, 0.5, 1.0], tokens=[1, 3, 4])
