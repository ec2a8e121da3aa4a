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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.physics.startup import Shape, Startup
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


# ---- what the simulation adds ---------------------------------------------------------------------

#: Algorithm of an all-to-all → library whose kernels work so: group of catalogue/expert_exchange.toml
#: without its kind. On Blackwell, low_latency is "deepep_low_latency_blackwell".
LIBRARY = {
    "low_latency": "deepep_low_latency",
    "hierarchical": "deepep_normal",
    "one_sided": "trtllm_one_sided",
    "two_sided": "trtllm_two_sided",
    "pairwise": "nccl_padded",
}

#: SMs that DeepEP's normal kernels take unless told otherwise. Source: DeepEP deep_ep/buffer.py, num_sms.
NORMAL_SMS = 20
#: DeepEP's low-latency rows begin with a header of 16 bytes. Source: csrc/kernels/internode_ll.cu.
HEADER = 16


def row_bytes(hidden: float, fmt: str) -> float:
    """Bytes of one copy of a token on the wire, a header not counted.

    fmt      bf16; fp8: with a float32 scale for each 128 numbers; nvfp4: with a scale byte for each 16
    """
    return hidden * {"bf16": 2.0, "fp8": 1.0 + 4 / 128, "nvfp4": 0.5 + 1 / 16}[fmt]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the members of an expert group exchange.

    count    tokens of each member, the mean
    payload  bytes of a copy as the simulation sends it
    row      bytes of a copy on the wire, see row_bytes
    top_k    experts of a token
    experts  of the layer
    sms      SMs the kernel may use: of the GPU for low_latency, NORMAL_SMS for hierarchical,
             1 where the library's costs are those of the whole GPU (all others)
    gating   a key of TARGETS
    """

    count: float
    payload: float
    row: float
    top_k: int
    experts: int
    sms: int
    gating: str = "random"


def load_of(way: str, shape: Shape, tokens: Tokens) -> Load:
    """An even exchange among the members of a group.

    way     a key of ROWS
    """
    domain = int(shape.per_domain)
    rows = rows_per_token(way, int(shape.members), domain, tokens.top_k, tokens.experts, tokens.gating)
    return Load(
        tokens=tokens.count,
        row=tokens.row,
        copies=rows.copies,
        nvlink_rows=rows.nvlink,
        nic_rows=rows.nic,
        experts=tokens.experts,
        abroad=rows.abroad,
        sms=sms_for(tokens.experts, tokens.sms) if way == "low_latency" else tokens.sms,
        nvlink_bandwidth=shape.nvlink_bandwidth,
        nic_bandwidth=shape.network_bandwidth,
    )


def port_seconds(way: str, shape: Shape, tokens: Tokens) -> float:
    """s that the busiest ports need for the payload of an even exchange, round after round.

    The simulation sends a copy to each expert's rank. `hierarchical` has two rounds: over the network
    once per domain, beside it what stays at home; then every copy that came is handed on.
    """
    near = tokens.top_k * (shape.per_domain - 1) / shape.members
    far = tokens.top_k * (shape.members - shape.per_domain) / shape.members
    handed_on = 0.0
    if way == "hierarchical":
        handed_on = far * (shape.per_domain - 1) / shape.per_domain
        domains = TARGETS[tokens.gating](float(shape.domains), tokens.top_k, tokens.experts)
        far = domains * (shape.domains - 1) / shape.domains
    together = max(near / shape.nvlink_bandwidth, far / shape.network_bandwidth if shape.crosses else 0.0)
    return float(tokens.count * tokens.payload * (together + handed_on / shape.nvlink_bandwidth))


def startup(kernel: ExpertKernel, way: str, shape: Shape, tokens: Tokens) -> Startup:
    """What the simulation adds to the rounds of one dispatch or combine, so that an even one takes `seconds`.

    Where a library sends less than the simulation (once per rank what is for several of its experts)
    and reaches nearly all of the bandwidth, wire would be below 1; it is 1 then, and the simulation slower.

    kernel   costs of the library's dispatch or combine; the launch of the kernel is among them
    way      a key of ROWS
    """
    load = load_of(way, shape, tokens)
    latency = float(shape.network_latency if shape.crosses else shape.nvlink_latency)
    # The second round of a hierarchical exchange has a path of its own, which the fit counts as fixed.
    handed_on = way == "hierarchical" and bool(shape.crosses)
    transfer = float(transfer_seconds(kernel, load))
    port = port_seconds(way, shape, tokens)
    return Startup(
        launch=float(fixed_seconds(kernel, load)),
        step=-shape.nvlink_latency / 2 if handed_on else 0.0,
        wire=max(transfer / port, 1.0) if port > 0 else 1.0,
        latency=latency,
        transfer=transfer,
    )


def choose(kernels: Mapping[str, ExpertKernel], shape: Shape, tokens: Mapping[str, Tokens]) -> str:
    """The way that takes least time by the closed form; the first of equals.

    kernels  way → its costs; tokens: way → the same exchange in its rows and SMs
    """
    return min(kernels, key=lambda way: startup(kernels[way], way, shape, tokens[way]).seconds)
