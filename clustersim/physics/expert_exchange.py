"""How long libraries for expert parallelism take to dispatch tokens to experts and combine the results.

One equation for all of them. With T tokens on each of n members, of which D share an NVLink domain,
a *row* being one copy of a token on the wire (numbers and scales):

    time = latency of the path + fixed + transfer
    fixed = launch + expert · E + signal · E · (n - D) / n + network · [n > D] + target · copies + fill · row
    transfer = (sm⁸ + nvlink⁸ + nic⁸)^⅛, a maximum that is a little rounded where two of them are near
        sm     = T · (token + copies · (replica + byte · row) + relay · row · rows over the network) / SMs
        nvlink = T · rows over NVLink · row / (share · bandwidth)
        nic    = T · rows over the network · (row / (share · bandwidth) + message)

Libraries differ in how many rows travel (`ROWS`), which follows from how they work, and in the
parameters (`spec.expert_costs.ExpertKernel`), which are fitted to measurements. Members are taken as
equally busy; in a simulation the links, not this page, say what uneven gating costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.spec.expert_costs import ExpertKernel

#: How sharply the slowest of SMs, NVLink and network rules; infinity would be the plain maximum.
_SHARPNESS = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """What becomes of one token, on the mean over all members.

    copies  rows that the sender's SMs write, those to itself counted
    nvlink  rows that cross a GPU's NVLink port (each way)
    nic     rows that cross a GPU's card (each way)
    abroad  share of the members that are reached through the card
    """

    copies: float
    nvlink: float
    nic: float
    abroad: float


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """An even exchange as its busiest member sees it. Each number may be a float64[N] of N exchanges.

    tokens            of each member
    row               bytes of one copy on the wire: numbers, scales, header
    copies, nvlink_rows, nic_rows  per token, see Rows
    experts           of the layer
    abroad            see Rows
    sms               SMs at work; 1 where the costs are those of the whole GPU
    nvlink_bandwidth  of one GPU, one way, bytes/s
    nic_bandwidth     of one GPU's share of the cards, bytes/s
    """

    tokens: Any
    row: Any
    copies: Any
    nvlink_rows: Any
    nic_rows: Any
    experts: Any
    abroad: Any
    sms: Any
    nvlink_bandwidth: Any
    nic_bandwidth: Any


def expected_targets(groups: float, top_k: int, experts: int) -> float:
    """How many of the groups hold at least one of a token's experts, on the mean.

    groups   equal parts of the experts (ranks, servers), experts contiguous or not
    top_k    different experts of one token, all sets of them equally likely
    experts  in all
    Returns  groups · (1 - C(E - E/g, k) / C(E, k)): a given group is missed if all k are drawn from the rest
    """
    rest = experts - experts / groups
    missed = 1.0
    for drawn in range(top_k):
        missed *= max(rest - drawn, 0.0) / (experts - drawn)
    return groups * (1.0 - missed)


def even_targets(groups: float, top_k: int, experts: int) -> float:
    """As `expected_targets`, where gating is arranged so that a token meets as many groups as it can."""
    return min(float(top_k), groups)


#: How a token's experts lie → how many of the groups it meets.
TARGETS: dict[str, Callable[[float, int, int], float]] = {"random": expected_targets, "even": even_targets}


def every_copy(members: int, domain: int, ranks: float, servers: float, top_k: int) -> Rows:
    """Every copy goes straight to the rank of its expert, over NVLink where there is one.

    members  ranks in all; domain  of them in each NVLink domain
    ranks    that a token meets; servers  NVLink domains that it meets
    Source   DeepEP low-latency kernels, pplx-kernels, pplx-garden; NCCL with padded buffers
    """
    abroad = (members - domain) / members
    return Rows(top_k, top_k * (domain - 1) / members, top_k * abroad, abroad)


def every_copy_by_nic(members: int, domain: int, ranks: float, servers: float, top_k: int) -> Rows:
    """As `every_copy`, but NVLink is not used: neighbours reach each other through their cards.

    Source   DeepEP's first release
    """
    abroad = (members - 1) / members
    return Rows(top_k, 0.0, top_k * abroad, abroad)


def once_per_rank(members: int, domain: int, ranks: float, servers: float, top_k: int) -> Rows:
    """A token goes once to every rank that has any of its experts.

    Source   TensorRT-LLM NVLink one-sided and two-sided kernels
    """
    abroad = (members - domain) / members
    return Rows(ranks, ranks * (domain - 1) / members, ranks * abroad, abroad)


def once_per_server(members: int, domain: int, ranks: float, servers: float, top_k: int) -> Rows:
    """A token crosses the network once per server; there, the GPU at the same place hands it on by NVLink.

    Source   DeepEP normal kernels
    """
    abroad = (members - domain) / members
    return Rows(ranks, ranks * (domain - 1) / domain, servers * abroad, abroad)


#: Way of sending → rows per token.
ROWS: dict[str, Callable[[int, int, float, float, int], Rows]] = {
    "low_latency": every_copy,
    "low_latency_by_nic": every_copy_by_nic,
    "one_sided": once_per_rank,
    "two_sided": once_per_rank,
    "hierarchical": once_per_server,
    "pairwise": every_copy,
}


def rows_per_token(
    way: str, members: int, domain: int, top_k: int, experts: int, gating: str = "random"
) -> Rows:
    """Rows of one token, on the mean.

    way      a key of ROWS
    members  ranks in all; domain  of them in each NVLink domain
    gating   a key of TARGETS
    """
    domain = min(domain, members)
    meets = TARGETS[gating]
    ranks = meets(float(members), top_k, experts)
    servers = meets(members / domain, top_k, experts)
    return ROWS[way](members, domain, ranks, servers, top_k)


def sms_for(experts: int, most: int) -> int:
    """SMs of a kernel that gives each expert one group of warps, as many groups on every SM.

    most    SMs of the GPU
    Source  DeepEP csrc/kernels/internode_ll.cu: num_warp_groups = ceil(experts / SMs), and
            ceil(experts / num_warp_groups) SMs; so few experts leave most of the GPU idle
    """
    return -(-experts // -(-experts // most))


def fixed_seconds(costs: ExpertKernel, load: Load) -> Any:
    """s before rows flow at their rate, the path's latency not counted."""
    return (
        costs.launch
        + costs.expert * load.experts
        + costs.signal * load.experts * load.abroad
        + costs.network * (np.asarray(load.abroad) > 0)
        + costs.target * load.copies
        + costs.fill * load.row
    )


def transfer_seconds(costs: ExpertKernel, load: Load) -> Any:
    """s that rows flow: never less than NVLink or the cards need for them at their full bandwidth."""
    written = costs.token + load.copies * (costs.replica + costs.byte * load.row)
    sm = (written + costs.relay * load.row * load.nic_rows) / load.sms
    nvlink = load.nvlink_rows * load.row / (costs.nvlink * load.nvlink_bandwidth)
    nic = load.nic_rows * (load.row / (costs.nic * load.nic_bandwidth) + costs.message)
    slowest = np.maximum(np.maximum(sm, nvlink), np.maximum(nic, 1e-30))
    rounded = sum((part / slowest) ** _SHARPNESS for part in (sm, nvlink, nic)) ** (1 / _SHARPNESS)
    return load.tokens * slowest * rounded


def seconds(costs: ExpertKernel, load: Load, latency: Any) -> Any:
    """s from the start of the kernel until the last row is there.

    latency  of the longest path among the members, s
    """
    return latency + fixed_seconds(costs, load) + transfer_seconds(costs, load)
