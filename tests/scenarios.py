"""Tiny scenarios in memory for tests, and the traces of their runs as tables that are easy to ask.

The GPU here is chosen for reckoning by hand: nothing of it was measured, so that a
product takes the longer of 2 m n k / rate and its bytes; no launch, no latency anywhere unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from clustersim import units
from clustersim.engine.simulation import simulate
from clustersim.plan.layout import Layout, lay_out
from clustersim.plan.memory import does_not_fit
from clustersim.spec.checks import Parts, check, gpu_of
from clustersim.spec.scenario import Scenario
from clustersim.trace.record import Text, Trace

#: Rates of the plain machine, SI.
FLOP_RATE = 1e12
HBM = 1e11
NVLINK = 1e10
NIC = 1e9
PCIE = 4e9

MODEL = {
    "name": "tiny",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 16,
    "experts": 4,
    "top_k": 2,
    "ffn": 128,
    "ffn_kind": "plain",
    "vocab": 100,
    "source": "test",
}


def gpu(
    rate: float = FLOP_RATE, hbm: float = HBM, launch: float = 0.0, memory: str = "80 GiB", **other: Any
) -> dict[str, Any]:
    """One accelerator. rate FLOP/s, hbm bytes/s, launch s."""
    values = {"sms": 1, "source": "test"}
    return {
        "name": "plain",
        "flop_rate": {"bf16": units.exact(rate, "flop rate"), "fp8": units.exact(2 * rate, "flop rate")},
        "memory": memory,
        "memory_bandwidth": units.exact(hbm, "bandwidth"),
        "launch_latency": units.exact(launch, "time"),
        **values,
        **other,
    }


def server(
    gpus: int = 2,
    nics: int | None = None,
    nvlink: float = NVLINK,
    nic: float = NIC,
    pcie: float = PCIE,
    latency: float = 0.0,
    **of_gpu: Any,
) -> dict[str, Any]:
    """One box. Bandwidths bytes/s; `latency` is that of NVLink and half that of the cards, s."""
    return {
        "name": "box",
        "gpu": gpu(**of_gpu),
        "gpus": gpus,
        "nics": gpus if nics is None else nics,
        "nvlink_bandwidth": units.exact(nvlink, "bandwidth"),
        "nvlink_latency": units.exact(latency, "time"),
        "nic_bandwidth": units.exact(nic, "bandwidth"),
        "nic_latency": units.exact(2 * latency, "time"),
        "pcie_bandwidth": units.exact(pcie, "bandwidth"),
        "source": "test",
    }


def single_server(gpus: int = 2, **box: Any) -> dict[str, Any]:
    """NVLink only; `box` as in `server`."""
    return {"family": "single_server", "server": server(gpus, **box)}


def rail_tree(servers: int = 2, gpus: int = 2, **box: Any) -> dict[str, Any]:
    """One pod of rails; `box` as in `server`."""
    return {"family": "rail_fat_tree", "server": server(gpus, **box), "servers": servers}


def fat_tree(
    servers: int = 2, gpus: int = 2, uplink: float = NIC, latency: float = 0.0, **box: Any
) -> dict[str, Any]:
    """A leaf per server under one spine; `box` as in `server`."""
    return {
        "family": "fat_tree",
        "server": server(gpus, latency=latency, **box),
        "servers": servers,
        "servers_per_leaf": 1,
        "spines": 1,
        "uplink_bandwidth": units.exact(uplink, "bandwidth"),
        "uplink_latency": units.exact(latency, "time"),
    }


def parallel(tp: int = 1, pp: int = 1, dp: int = 1, etp: int = 1, **other: Any) -> dict[str, Any]:
    """A deployment; EP is what TP * DP leaves beside ETP."""
    return {
        "tensor_parallel": tp,
        "pipeline_parallel": pp,
        "data_parallel": dp,
        "expert_parallel": tp * dp // etp,
        "expert_tensor_parallel": etp,
        **other,
    }


def tiny(topology: Mapping[str, Any] | None = None, **sections: Any) -> Scenario:
    """A scenario that passed every check; two GPUs, DP = EP = 2, four sequences, one decode step.

    sections  "model", "workload" and "gating" are laid over the defaults key by key; others replace them
    Raises    AssertionError with all that is wrong
    """
    values = {
        "name": "tiny",
        "topology": topology or single_server(2),
        "deployment": parallel(dp=2),
        **sections,
        "model": MODEL | sections.get("model", {}),
        "workload": {"phase": "decode", "sequences": 4, "prompt_tokens": 10}
        | ({} if sections.get("workload", {}).get("phase") == "prefill" else {"decode_steps": 1})
        | sections.get("workload", {}),
    }
    scenario = Scenario.model_validate(values)
    names = ("topology", "model", "deployment", "workload", "network", "trace", "faults")
    wrong = [
        *check(Parts(**{name: getattr(scenario, name) for name in names})),
        *does_not_fit(scenario, gpu_of(scenario.topology)),
    ]
    assert not wrong, wrong
    return scenario


def trace_of(scenario: Scenario, layout: Layout | None = None) -> Trace:
    """What happens when it runs."""
    return simulate(scenario, layout or lay_out(scenario), {})


def table(trace: Trace, name: str) -> dict[str, np.ndarray]:
    """The columns of a table, words written out."""
    columns = trace.tables[name].items()
    return {column: values.rows() if isinstance(values, Text) else values for column, values in columns}


def same_tables(one: Trace, other: Trace) -> bool:
    """Whether two runs left the same rows, to the last bit."""
    for name in one.tables:
        a, b = table(one, name), table(other, name)
        for column in a:
            nan = a[column].dtype.kind == "f"
            if not np.array_equal(a[column], b[column], equal_nan=nan):
                return False
    return True
