"""Fitted costs of collective libraries: what an exchange pays besides latency and bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import Field

from clustersim.errors import pick
from clustersim.spec.costs import fitted_tables, from_values, plain
from clustersim.spec.quantities import Bandwidth, Fraction, Size, Time, Value


class LibraryCosts(Value):
    """What NCCL's kernels cost on one GPU architecture. Protocols: LL sends a flag with every 4
    bytes, LL128 with every 120, Simple synchronises chunks.

    launch           from the call to the first byte of a ring or tree
    start_ll128      on top where LL128 is taken
    start_simple     on top where Simple is taken
    step_ll          per hop over NVLink with LL, beside the path's latency
    step_ll128       the same for LL128
    step_simple      the same for Simple
    reach_ll         share of NVLink's bandwidth that a ring reaches with LL
    reach_ll128      the same for LL128
    reach_simple     the same for Simple
    own_ll128        shards a ring with LL128 is busy beyond those it sends: filling the pipeline,
                     and a rank's copy of its own
    own_simple       the same for Simple
    chunk            bytes: a pipeline of chunks takes (1 + (chunk / size)^(1/2)) times as long as its
                     bytes, as it is not full all the time
    switch_head      in-switch reduction: on top of launch, for every member of the domain
    switch_reach     share of NVLink's bandwidth that in-switch reduction reaches
    pair_launch      from the call to the first byte of an all-to-all or send
    pair_peer        per further peer of an all-to-all
    pair_rate        bytes/s between two peers with LL
    pair_simple      on top of pair_launch where Simple is taken
    pair_reach       share of NVLink's bandwidth that an all-to-all reaches
    pair_own         parts a rank is busy with its own copy, beside those it sends
    """

    launch: Time
    start_ll128: Time
    start_simple: Time
    step_ll: Time
    step_ll128: Time
    step_simple: Time
    reach_ll: Fraction
    reach_ll128: Fraction
    reach_simple: Fraction
    own_ll128: float = Field(ge=0)
    own_simple: float = Field(ge=0)
    chunk: Size
    switch_head: Time
    switch_reach: Fraction
    pair_launch: Time
    pair_peer: Time
    pair_rate: Bandwidth
    pair_simple: Time
    pair_reach: Fraction
    pair_own: float = Field(ge=0)


class FabricCosts(Value):
    """What NCCL's proxies cost on one kind of network between servers.

    step_ll       per hop over the network with LL, beyond the path's latency
    step_simple   on top of that where Simple is taken
    rate_ll       bytes/s per GPU that LL reaches over the network
    reach         share of the cards' bandwidth that Simple reaches
    pair_peer     per further peer of an all-to-all
    """

    step_ll: Time
    step_simple: Time
    rate_ll: Bandwidth
    reach: Fraction
    pair_peer: Time


class KernelCosts(Value):
    """What a custom all-reduce kernel costs, in which every GPU reads its peers over NVLink.

    launch     from the start of the kernel to its first byte, in a CUDA graph
    barrier    the second meeting of all members, which only two-shot needs
    peer       per further member
    reach_one  share of NVLink's bandwidth that one-shot reaches
    reach_two  the same for two-shot
    host       outside of CUDA graphs: from call to call, however short the kernel
    copy_rate  outside of CUDA graphs: bytes/s of the copy into memory the peers can read
    """

    launch: Time
    barrier: Time
    peer: Time
    reach_one: Fraction
    reach_two: Fraction
    host: Time
    copy_rate: Bandwidth


SECTION = "collectives"

#: Groups of the section: GPU architectures and kinds of network. All others are custom kernels, called
#: <library>_<architecture>.
ARCHITECTURES = ("ampere", "hopper", "blackwell")
FABRICS = ("infiniband", "ethernet")
#: Architectures whose NVSwitch reduces and multicasts (NVLS).
IN_SWITCH = ("hopper", "blackwell")


@cache
def library_costs(architecture: str) -> LibraryCosts:
    """What NCCL costs on an architecture, a name of ARCHITECTURES. Raises ClustersimError for others."""
    return from_values(_group(architecture, ARCHITECTURES), LibraryCosts)


@cache
def fabric_costs(fabric: str) -> FabricCosts:
    """What a kind of network costs, a name of FABRICS. Raises ClustersimError for others."""
    return from_values(_group(fabric, FABRICS), FabricCosts)


@cache
def kernel_costs(library: str, architecture: str) -> KernelCosts:
    """What the custom all-reduce of a library (vllm, sglang, trtllm) costs on an architecture."""
    known = [name for name in fitted_tables()[SECTION] if name not in (*ARCHITECTURES, *FABRICS)]
    return from_values(_group(f"{library}_{architecture}", known), KernelCosts)


def _group(name: str, known: Sequence[str]) -> dict[str, Any]:
    pick(dict.fromkeys(known, ""), name, f"[{SECTION}] of catalogue/network.toml")
    return plain(fitted_tables()[SECTION][name])
