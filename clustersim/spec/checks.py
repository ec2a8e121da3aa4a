"""What must hold between the parts of a scenario: pure functions on validated values.

Every check takes the parts it compares and yields (key path of the scenario, sentence). A part
that did not validate is None, and the checks that need it are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from clustersim.errors import nearest
from clustersim.spec.deployment import BY_LOAD, SPARING, Deployment, Experts
from clustersim.spec.dividing import does_not_divide
from clustersim.spec.documents import KeyPath
from clustersim.spec.fabrics import Mismatch, links_per_pair, uplinks
from clustersim.spec.formats import missing_format, multiplied_as, rate_key
from clustersim.spec.gating_checks import check_beside, check_gating
from clustersim.spec.hardware import (
    Dragonfly,
    FatTree,
    Gpu,
    Nvl72,
    RailFatTree,
    Server,
    SingleServer,
    TopologySpec,
    VertexByVertex,
)
from clustersim.spec.kernel_tables import fitted_parameters
from clustersim.spec.model import PLAIN, Model
from clustersim.spec.placement_checks import EXPERT_CHECKS
from clustersim.spec.references import catalogue_entries, not_in_catalogue
from clustersim.spec.workload import Beside, Fault, Gating, Network, TraceLevel, Workload
from clustersim.units import show

#: GPUs of the largest machine that is simulated.
MOST_GPUS = 100_000

Findings: TypeAlias = Iterator[tuple[KeyPath, str]]


#: Longest span of arrivals, s: a double still resolves 0.1 ns there.
LONGEST_RUN = 1e6

#: Shortest period of a flapping link, s. Hardware takes longer to train a link again, and a run of a
#: second would have a thousand million faults to work through with a nanosecond.
SHORTEST_PERIOD = 1e-6


@dataclass(frozen=True, slots=True)
class Parts:
    """The sections of a scenario that validated."""

    topology: TopologySpec | None = None
    model: Model | None = None
    deployment: Deployment | None = None
    workload: Workload | None = None
    gating: Gating | None = None
    beside: Beside | None = None
    network: Network | None = None
    trace: TraceLevel | None = None
    faults: tuple[Fault, ...] = ()


def gpu_count(topology: TopologySpec) -> int:
    """GPUs of the whole machine."""
    match topology:
        case SingleServer():
            return topology.server.gpus
        case RailFatTree() | FatTree():
            return topology.servers * topology.server.gpus
        case Nvl72():
            return topology.racks * topology.trays * topology.server.gpus
        case Dragonfly():
            servers = topology.groups * topology.routers * topology.servers_per_router
            return servers * topology.server.gpus
        case VertexByVertex():
            return sum(vertex.kind == "gpu" for vertex in topology.vertices)


def gpu_of(topology: TopologySpec) -> Gpu:
    """The one kind of GPU in the machine."""
    return topology.gpu if isinstance(topology, VertexByVertex) else topology.server.gpu


def check(parts: Parts) -> list[tuple[KeyPath, str]]:
    """Every contradiction between or inside the parts."""
    topology, model = parts.topology, parts.model
    deployment, workload = parts.deployment, parts.workload
    found: list[tuple[KeyPath, str]] = []
    if topology:
        # A large file with one systematic mistake should not be searched for near names for hours.
        found += islice(check_topology(topology), 100)
        found += check_faults(parts.faults, topology, model)
    if model:
        wrong = list(check_model(model))
        found += wrong
        if topology:
            found += check_format(model, topology)
        # A deployment that does not fit a wrong model may fit the right one.
        model = None if wrong else model
    if workload:
        found += check_workload(workload)
    if parts.trace:
        found += check_trace(parts.trace, workload)
    if parts.network:
        found += check_network(parts.network)
    if deployment:
        found += check_ranks(deployment, model)
        found += check_experts(deployment.experts, deployment)
        found += check_kernels(deployment.kernels)
    if topology and deployment:
        found += check_gpu_count(deployment, topology)
    if model and deployment:
        found += check_cut(deployment, model)
        if model.experts:
            found += EXPERT_CHECKS[deployment.experts.policy](deployment, model)
    if parts.gating:
        found += check_gating(parts.gating, model, deployment)
    if parts.beside:
        found += check_beside(parts.beside, model, deployment)
    if workload and deployment:
        found += check_batch(workload, deployment)
    return found


def check_topology(topology: TopologySpec) -> Findings:
    """Counts that must divide, bandwidths that must not be zero, a size that can be simulated."""
    gpus = gpu_count(topology)
    if gpus > MOST_GPUS:
        yield ("topology",), f"it has {gpus} GPUs; at most {MOST_GPUS} are simulated"
    if isinstance(topology, VertexByVertex):
        yield from _check_gpu(topology.gpu, ("topology", "gpu"))
        yield from _check_vertices(topology)
        return
    yield from _check_server(topology.server, ("topology", "server"))
    if isinstance(topology, RailFatTree):
        yield from _check_pods(topology)
    if isinstance(topology, FatTree) and topology.servers % topology.servers_per_leaf:
        problem = does_not_divide(topology.servers_per_leaf, topology.servers, "servers")
        yield ("topology", "servers_per_leaf"), problem
    yield from _check_fabric(topology)


def _check_fabric(topology: TopologySpec) -> Findings:
    """Links between switches carry something, and their numbers agree."""
    rates = ("uplink_bandwidth", "local_bandwidth", "global_bandwidth")
    given = [name for name in rates if getattr(topology, name, None) is not None]
    yield from _positive(topology, given, ("topology",))
    if any(getattr(topology, name) <= 0 for name in given):
        return
    try:
        if isinstance(topology, Dragonfly):
            links_per_pair(topology)
        elif isinstance(topology, FatTree | RailFatTree | Nvl72):
            uplinks(topology)
    except Mismatch as error:
        yield ("topology", error.key), error.problem


def _check_pods(topology: RailFatTree) -> Findings:
    pod = topology.servers_per_pod or topology.servers
    if topology.servers % pod:
        yield ("topology", "servers_per_pod"), does_not_divide(pod, topology.servers, "servers")
    elif pod < topology.servers and not topology.spines and topology.oversubscription is None:
        pods = topology.servers // pod
        yield (
            ("topology", "spines"),
            f"0 leaves {pods} pods unconnected; several pods need at least 1 spine per rail",
        )


def _check_server(server: Server, path: KeyPath) -> Findings:
    yield from _positive(server, ("nvlink_bandwidth", "nic_bandwidth", "pcie_bandwidth"), path)
    yield from _check_gpu(server.gpu, (*path, "gpu"))


def _check_gpu(gpu: Gpu, path: KeyPath) -> Findings:
    yield from _positive(gpu, ("memory", "memory_bandwidth"), path)
    for name, rate in gpu.flop_rate.items():
        if rate <= 0:
            yield (*path, "flop_rate", name), "must be more than zero"
        if rate_key(name) != name:
            yield (*path, "flop_rate", name), f"has the rate of {rate_key(name)}; leave it out"
    if gpu.relative is not None and gpu.relative not in catalogue_entries("gpus"):
        yield (*path, "relative"), not_in_catalogue("gpus", gpu.relative)


def _positive(value: object, fields: Sequence[str], path: KeyPath) -> Findings:
    for name in fields:
        if getattr(value, name) <= 0:
            yield (*path, name), "must be more than zero"


def _check_vertices(topology: VertexByVertex) -> Findings:
    counts = Counter(vertex.name for vertex in topology.vertices)
    for position, vertex in enumerate(topology.vertices):
        if counts[vertex.name] > 1:
            place = ("topology", "vertices", position, "name")
            yield place, f'"{vertex.name}" is the name of {counts[vertex.name]} vertices; names must differ'
    if not gpu_count(topology):
        yield ("topology", "vertices"), 'has no vertex of kind "gpu"'
    yield from _check_cables(topology, counts)


def _check_cables(topology: VertexByVertex, names: Counter[str]) -> Findings:
    for position, cable in enumerate(topology.cables):
        place = ("topology", "cables", position)
        if cable.bandwidth <= 0:
            yield (*place, "bandwidth"), "must be more than zero"
        for end in cable.ends:
            if end not in names:
                yield (*place, "ends"), f'there is no vertex "{end}"{nearest(end, names)}'
        if cable.ends[0] == cable.ends[1]:
            yield (*place, "ends"), f'both ends are "{cable.ends[0]}"'


def check_faults(faults: Sequence[Fault], topology: TopologySpec, model: Model | None) -> Findings:
    """Each fault names what its kind needs and nothing else, and what it names exists."""
    gpus = gpu_count(topology)
    for position, fault in enumerate(faults):
        place = ("faults", position)
        yield from _check_target(fault, place, gpus)
        yield from _check_factor(fault, place)
        yield from _check_times(fault, place)
        yield from _check_spells(fault, place)
        if fault.gpu == "hottest" and model and not model.experts:
            yield (*place, "gpu"), f"{model.name} has no experts; give a rank"


#: Kind of fault → what it needs to be told where it is; nothing: it is everywhere.
_BEFALLS = {"slow_gpu": "gpu", "throttled_gpu": "gpu", "spread_gpus": ""}


def _check_target(fault: Fault, place: KeyPath, gpus: int) -> Findings:
    needed = _BEFALLS.get(fault.kind, "link")
    if needed and getattr(fault, needed) is None:
        yield (*place, needed), f"missing key; {fault.kind} needs it"
    for other in {"gpu", "link"} - {needed}:
        if getattr(fault, other) is not None:
            instead = f"it needs {needed}" if needed else "it befalls all GPUs"
            yield (*place, other), f"{fault.kind} has no {other}; {instead}"
    if needed == "gpu" and isinstance(fault.gpu, int) and fault.gpu >= gpus:
        yield (*place, "gpu"), f"there is no GPU {fault.gpu}; the topology has 0 to {gpus - 1}"


def _check_factor(fault: Fault, place: KeyPath) -> Findings:
    if fault.kind == "spread_gpus":
        if fault.factor is not None:
            yield (*place, "factor"), "spread_gpus has no factor; it needs spread"
        if fault.spread is None:
            yield (*place, "spread"), "missing key; spread_gpus needs it"
    elif fault.spread is not None:
        yield (*place, "spread"), f"{fault.kind} has no spread; only spread_gpus has"
    if fault.kind == "down_link" and fault.factor is not None:
        problem = "down_link carries nothing and has no factor; a link that still carries is a slow_link"
        yield (*place, "factor"), problem
    if fault.kind in ("slow_gpu", "throttled_gpu", "slow_link") and fault.factor is None:
        yield (*place, "factor"), f"missing key; {fault.kind} needs it"


def _check_times(fault: Fault, place: KeyPath) -> Findings:
    for name in ("start", "end"):
        if (getattr(fault, name) or 0.0) > LONGEST_RUN:
            never = "; left out it means never" if name == "end" else ""
            yield (*place, name), f"at most {LONGEST_RUN:.0e} s are simulated{never}"
    if fault.end is not None and fault.end <= fault.start:
        yield (*place, "end"), f"{fault.end:g} s is not after the start at {fault.start:g} s"


def _check_spells(fault: Fault, place: KeyPath) -> Findings:
    if fault.kind in ("flapping_link", "throttled_gpu"):
        if fault.period is None:
            yield (*place, "period"), f"missing key; {fault.kind} needs it"
        elif fault.period < SHORTEST_PERIOD:
            yield (*place, "period"), f"must be at least {SHORTEST_PERIOD * 1e6:g} us"
        return
    for name, usual in (("period", None), ("duty", 0.5), ("timing", "regular")):
        if getattr(fault, name) != usual:
            yield (*place, name), f"{fault.kind} has no {name}; only flapping_link and throttled_gpu have"


# --- the model and the work ----------------------------------------------------------------------


def check_model(model: Model) -> Findings:
    """Attention, experts and dense layers are each said once and whole."""
    yield from _check_attention(model)
    yield from _check_routing(model)
    yield from _check_networks(model)
    if model.full_every and not model.window:
        yield ("model", "full_every"), "says which layers have no window, but there is none; give window"


def _check_attention(model: Model) -> Findings:
    for name in ("kv_heads", "head_dim"):
        given = getattr(model, name)
        if model.mla and given:
            yield ("model", name), "latent attention (mla) has none; leave it out"
        elif not model.mla and not given:
            yield ("model", name), "missing key; only latent attention (mla) does without"
    if model.kv_heads and model.heads % model.kv_heads:
        yield ("model", "kv_heads"), does_not_divide(model.kv_heads, model.heads, "heads")
    if model.mla:
        for name in ("qk_norm", "attention_bias", "window"):
            if getattr(model, name):
                yield ("model", name), "is not known for latent attention (mla); leave it out"


def _check_routing(model: Model) -> Findings:
    """A token cannot go to more experts than there are."""
    wanted = ("top_k", "ffn")
    if model.experts:
        for name in wanted:
            if not getattr(model, name):
                yield ("model", name), f"missing key; the {model.experts} experts of a layer need it"
        if model.top_k > model.experts:
            yield ("model", "top_k"), f"{model.top_k} is more than the {model.experts} experts of a layer"
        if not model.moe_layers:
            yield ("model", "experts"), f"no layer has any: dense_layers is {model.dense_layers}"
    else:
        for name in (*wanted, "shared_experts", "dense_layers", "expert_format"):
            if getattr(model, name):
                yield ("model", name), "means nothing without experts; give experts or leave it out"
    if model.groups_chosen > model.expert_groups:
        yield ("model", "groups_chosen"), f"more than the {model.expert_groups} expert_groups"


def _check_networks(model: Model) -> Findings:
    dense = model.layers - model.moe_layers
    if dense and not model.dense_ffn:
        # Whoever forgot the experts has no dense layers in mind.
        what = f"{dense} layers without experts need it" if model.experts else "without experts it is needed"
        yield ("model", "dense_ffn"), f"missing key; {what}"
    if model.dense_ffn and not dense:
        yield ("model", "dense_ffn"), "every layer has experts; leave it out, or give dense_layers"
    if model.shared_ffn and not model.shared_experts:
        yield ("model", "shared_ffn"), "there are no shared_experts; leave it out"


def check_format(model: Model, topology: TopologySpec) -> Findings:
    """The GPU must have a rate for the model's number formats."""
    gpu = gpu_of(topology)
    wanted = {"format": model.format, "expert_format": model.expert_format}
    for name, fmt in wanted.items():
        if fmt and rate_key(multiplied_as(gpu, fmt)) not in gpu.flop_rate:
            yield ("model", name), missing_format(gpu, fmt)
    if PLAIN not in gpu.flop_rate:
        yield ("topology",), f"{missing_format(gpu, PLAIN)}; gates and LM heads need it"


def check_kernels(kernels: str) -> Findings:
    """The library must be one whose kernels were measured."""
    known = dict.fromkeys(["auto", *sorted({key.library for key in fitted_parameters()})])
    if kernels not in known:
        yield (
            ("deployment", "kernels"),
            f'"{kernels}" is no library with measured kernels{nearest(kernels, known)}; '
            f"there are {', '.join(known)}",
        )


def check_workload(workload: Workload) -> Findings:
    """Steps and arrivals fit the phase and the kind of arrival."""
    if workload.phase == "prefill" and workload.decode_steps:
        yield (
            ("workload", "decode_steps"),
            f'{workload.decode_steps} steps, but phase "prefill" has none; use 0',
        )
    if workload.phase != "prefill" and not workload.decode_steps:
        yield ("workload", "decode_steps"), f'phase "{workload.phase}" needs at least 1 step'
    if workload.arrivals == "together" and workload.interval:
        yield ("workload", "interval"), 'arrivals "together" have no interval; choose uniform or poisson'
    if workload.interval * workload.batches > LONGEST_RUN:
        yield (
            ("workload", "interval"),
            f"{workload.batches} batches would arrive over {workload.interval * workload.batches:.3g} s; "
            f"at most {LONGEST_RUN:.0e} s are simulated, so that the clock still tells nanoseconds",
        )
    if workload.arrivals != "together" and not workload.interval:
        yield ("workload", "interval"), f'arrivals "{workload.arrivals}" need an interval of more than zero'
    if workload.shard_skew and workload.router != "round_robin":
        problem = f'"{workload.router}" has no say where shard_skew says which shard gets what; leave it out'
        yield ("workload", "router"), problem


def check_trace(trace: TraceLevel, workload: Workload | None) -> Findings:
    """What is chosen to be written is something that can happen."""
    if trace.window and trace.window[0] >= trace.window[1]:
        start, end = (show(time, "time") for time in trace.window)
        yield ("trace", "window"), f"begins at {start} and ends at {end}; the end must be later"
    if not trace.steps:
        return
    first, after = trace.steps
    if first >= after:
        yield ("trace", "steps"), f"[{first}, {after}] holds no step; [{first}, {first + 1}] is one step"
        return
    if workload:
        each = workload.decode_steps + (workload.phase != "decode")
        steps = workload.batches * each
        if first >= steps > 0:
            yield ("trace", "steps"), f"begins with step {first}, but the run has {steps}: 0 to {steps - 1}"


def check_network(network: Network) -> Findings:
    """A chunk holds at least something, and a bounded queue two chunks."""
    if network.chunk < 1:
        yield ("network", "chunk"), "must be at least one byte"
    if network.tolerance and network.fidelity != "fluid":
        yield ("network", "tolerance"), f'is of fidelity "fluid", not of "{network.fidelity}"'
    if network.buffer and network.queueing == "fair":
        yield ("network", "buffer"), 'bounds the queues of queueing "fifo"; under "fair" the window does'
    if 0 < network.buffer < 2 * network.chunk:
        least = show(2 * network.chunk, "size")
        yield ("network", "buffer"), f"must hold two chunks, {least}, or be 0 for no bound"


# --- the deployment ------------------------------------------------------------------------------


def check_ranks(deployment: Deployment, model: Model | None) -> Findings:
    """The ranks of a stage are the same for attention and for experts."""
    tensor, data = deployment.tensor_parallel, deployment.data_parallel
    expert, inner = deployment.expert_parallel, deployment.expert_tensor_parallel
    if model and not model.experts:
        for name in ("expert_parallel", "expert_tensor_parallel"):
            degree = getattr(deployment, name)
            if degree != 1:
                yield ("deployment", name), f"{degree}, but {model.name} has no experts; leave it out"
        if deployment.experts != Experts():
            yield ("deployment", "experts"), f"{model.name} has no experts; leave it out"
    elif tensor * data != expert * inner and (model or expert * inner != 1):
        # A model that could not be read may be one without experts.
        yield (
            ("deployment",),
            f"tensor_parallel {tensor} x data_parallel {data} = {tensor * data} ranks of a stage, "
            f"but expert_parallel {expert} x expert_tensor_parallel {inner} = {expert * inner}",
        )


def check_gpu_count(deployment: Deployment, topology: TopologySpec) -> Findings:
    """One rank per GPU."""
    pipeline, tensor = deployment.pipeline_parallel, deployment.tensor_parallel
    data, gpus = deployment.data_parallel, gpu_count(topology)
    ranks = pipeline * tensor * data
    if ranks != gpus:
        yield (
            ("deployment",),
            f"pipeline_parallel {pipeline} x tensor_parallel {tensor} x data_parallel {data} "
            f"= {ranks} ranks, but the topology has {gpus} GPUs",
        )


def check_cut(deployment: Deployment, model: Model) -> Findings:
    """Heads and columns can be cut evenly, and every stage has a layer."""
    tensor, stages = deployment.tensor_parallel, deployment.pipeline_parallel
    if stages > model.layers:
        problem = f"{stages} stages are more than the {model.layers} layers of {model.name}"
        yield ("deployment", "pipeline_parallel"), problem
    cuts = [("tensor_parallel", tensor, model.heads, "heads")]
    if model.moe_layers < model.layers:
        what = "columns of a dense layer (dense_ffn)"
        cuts.append(("tensor_parallel", tensor, model.dense_ffn, what))
    if model.experts:
        inner = deployment.expert_tensor_parallel
        cuts.append(("expert_tensor_parallel", inner, model.ffn, "columns of an expert (ffn)"))
    for name, divisor, number, what in cuts:
        if number % divisor:
            yield ("deployment", name), does_not_divide(divisor, number, what)
    if not model.mla and model.kv_heads and model.kv_heads % tensor and tensor % model.kv_heads:
        problem = f"{tensor} neither divides the {model.kv_heads} key/value heads nor is a multiple of them"
        yield ("deployment", "tensor_parallel"), problem


def check_experts(experts: Experts, deployment: Deployment) -> Findings:
    """Nothing is said that the policy or the cut would ignore."""
    place = ("deployment", "experts")
    if experts.per_gpu and experts.policy != "replicated":
        yield (*place, "per_gpu"), f'policy "{experts.policy}" does not use it; only "replicated" does'
    for name in ("slots", "slots_file", "slots_by_layer"):
        if getattr(experts, name) and experts.policy != "explicit":
            yield (*place, name), f'policy "{experts.policy}" does not use it; only "explicit" does'
    if experts.spare and experts.policy not in SPARING:
        known = ", ".join(SPARING)
        yield (*place, "spare"), f'policy "{experts.policy}" does not use it; only {known} do'
    if experts.rebalance.every and experts.policy not in BY_LOAD:
        known = ", ".join(BY_LOAD)
        problem = f'policy "{experts.policy}" looks at no load, so nothing would ever move; {known} do'
        yield (*place, "rebalance", "every"), problem
    yield from _check_service(experts, deployment.expert_tensor_parallel)


def _check_service(experts: Experts, sharers: int) -> Findings:
    """Who is served alone, when and in which order."""
    place, start = ("deployment", "experts"), experts.start
    if start != "all_arrived" and sharers != 1:
        yield (*place, "start"), f'"{start}" needs expert_tensor_parallel = 1, not {sharers}'
    if start != "all_arrived" and experts.service == "grouped":
        problem = f'"{start}" needs service = "by_expert"; one grouped product waits for all tokens'
        yield (*place, "start"), problem
    if start == "chunks" and not experts.chunk_tokens:
        yield (*place, "chunk_tokens"), 'missing key; start = "chunks" needs it'
    elif start != "chunks" and experts.chunk_tokens:
        yield (*place, "chunk_tokens"), f'start = "{start}" does not use it; only "chunks" does'
    if experts.order != "arrival" and experts.service == "grouped":
        problem = f'"{experts.order}" needs service = "by_expert"; one grouped product serves all at once'
        yield (*place, "order"), problem
    elif experts.order == "longest_first" and sharers != 1:
        yield (*place, "order"), f'"longest_first" needs expert_tensor_parallel = 1, not {sharers}'


def check_batch(workload: Workload, deployment: Deployment) -> Findings:
    """Sequences are dealt evenly to shards and microbatches, or prompts are cut into even chunks."""
    shards, parts = deployment.data_parallel, workload.microbatches
    if workload.sequences % shards:
        low = workload.sequences // shards * shards
        near = [str(n) for n in (low, low + shards) if n]
        yield (
            ("workload", "sequences"),
            f"{workload.sequences} cannot be dealt evenly to data_parallel = {shards} shards; "
            f"{' and '.join(near)} can",
        )
        return
    each = workload.sequences // shards
    tokens = each * workload.prompt_tokens
    if workload.phase == "prefill" and tokens % parts:
        yield ("workload", "microbatches"), does_not_divide(parts, tokens, "prompt tokens of a shard")
    elif workload.phase != "prefill" and each % parts:
        what = "sequences of a shard" if each > 1 else "sequence of a shard"
        yield ("workload", "microbatches"), does_not_divide(parts, each, what)
