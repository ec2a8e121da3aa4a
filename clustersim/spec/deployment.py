"""The deployment: how the model is cut over the GPUs, and by which algorithms they exchange."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from clustersim.spec.quantities import Count, Fraction, Time, Value, Whole

#: `Experts` of which every expert stands in one place, in order.
HELD_ONCE = {
    "policy": "contiguous",
    "per_gpu": 0,
    "spare": 0,
    "slots": (),
    "slots_file": "",
    "slots_by_layer": (),
}

#: Expert policies that choose what to copy into spare places.
SPARING = ("eplb", "eplb_hierarchical", "packed")
#: Expert policies that place by load: the others never move anything.
BY_LOAD = ("balanced", *SPARING)


class Rebalance(Value):
    """How often experts are placed anew while the model runs, and how their weights get there.

    every           steps from one planning to the next; 0: never. A plan that is due while weights
                    still move waits until they have come
    window          steps before a planning whose loads it goes by, or as many as there were
    plan            anew: the policy places all, wherever it stood; amended: the places as they are, with
                    few swaps and other copies where those help most, so that far less moves
    transfer        stop: no pass begins while weights move; background: weights share the links with
                    the passes, which take the new places of a layer when its weights have come
    layers_at_once  layers of a pipeline stage whose weights move together and need buffers; 0: all
    planning_time   time from the planning's last observed step to the plan, on the host; GPUs go on
    threshold       imbalance (largest / mean load of the EP ranks, mean over layers) below which
                    nothing moves
    least_gain      a layer moves only if the plan lowers its imbalance under the observed loads by this
                    share or more. The default is a guess: less is within the noise of few tokens
    """

    every: Whole = 0
    window: Count = 16
    plan: Literal["anew", "amended"] = "anew"
    transfer: Literal["stop", "background"] = "stop"
    layers_at_once: Whole = 1
    planning_time: Time = 0.0
    threshold: Annotated[float, Field(ge=1.0)] = 1.0
    least_gain: Fraction = 0.05


class Experts(Value):
    """Which rank holds which expert copy, and how its queue is served.

    policy       contiguous: expert e on EP rank e * EP // E, once; round_robin: on e % EP, once;
                 random: shuffled anew in every layer, once; replicated: `per_gpu` slots on every EP
                 rank, filled with experts 0, 1, … over and over; explicit: `slots`; balanced: once,
                 the most popular first, each on the least loaded rank that has room; eplb: `spare`
                 more slots on every rank, for further copies of what bears most, packed like that
                 onto any rank (EPLB's global policy); eplb_hierarchical: the model's expert_groups
                 are packed onto NVLink domains first, copies stay in their domain; where the
                 domains do not divide the groups it is eplb, as published; packed: as eplb or
                 balanced, then copies are swapped between ranks while that relieves the busiest:
                 never worse than these.
                 What is popular is known from `gating`, before the first step
    per_gpu      slots per EP rank, for `replicated`; 0 otherwise
    spare        slots per EP rank beyond experts / EP, for copies that the policy chooses; experts
                 that EP does not divide stand in them, too
    slots        for `explicit`: the expert ids that each EP rank holds, one list per EP rank, in all
                 layers alike
    slots_file   for `explicit`, in place of `slots`: a TOML, JSON or CSV file with the expert in each
                 place of every layer (see spec/placements.py), relative to the file that names it
    slots_by_layer  what that file says: one list per layer, or per layer with experts, or one for
                 all, of the expert in each place, those of the first EP rank first
    copy_choice  which copy serves a token: round_robin over all; local_first (same rank, else
                 same server, else all); least_loaded: the busiest rank gets as few tokens as the
                 copies allow, with all senders' tokens known, and a copy that this does not need gets
                 none: its weights are not read
    service      grouped: one grouped product over what is served; by_expert: one product per expert
    combine_format  number format in which expert outputs come back, if it is no narrower than the
                    model's: libraries that dispatch fp8 combine bf16
    start        all_arrived: when every sender's tokens are there; expert_complete: as soon as all
                 tokens of one expert are (by_expert only); chunks: as soon as `chunk_tokens` of one
                 expert are, while others still arrive (by_expert only); every chunk reads the expert's
                 weights again
    chunk_tokens  of `chunks`: tokens of an expert that are served together; the last chunk is what is
                  left over and waits for all
    order        of by_expert, which expert that could be served is next: arrival: the one whose tokens
                 have been there longest; longest_first: the one with most tokens waiting; as_listed:
                 the one in the lowest slot
    rebalance    when experts are placed anew while the model runs
    """

    policy: Literal[
        "contiguous",
        "round_robin",
        "random",
        "replicated",
        "explicit",
        "balanced",
        "eplb",
        "eplb_hierarchical",
        "packed",
    ] = "contiguous"
    per_gpu: Annotated[int, Field(ge=0)] = 0
    spare: Whole = 0
    slots: tuple[tuple[Whole, ...], ...] = ()
    slots_file: str = ""
    slots_by_layer: tuple[tuple[Whole, ...], ...] = ()
    copy_choice: Literal["round_robin", "local_first", "least_loaded"] = "round_robin"
    combine_format: Literal["bf16", "fp8"] = "bf16"
    service: Literal["grouped", "by_expert"] = "grouped"
    start: Literal["all_arrived", "expert_complete", "chunks"] = "all_arrived"
    chunk_tokens: Whole = 0
    order: Literal["arrival", "longest_first", "as_listed"] = "arrival"
    rebalance: Rebalance = Rebalance()

    @field_validator("slots", "slots_by_layer", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        return tuple(tuple(row) if isinstance(row, list) else row for row in value)

    def places_per_rank(self, experts: int, ranks: int) -> int:
        """Slots of every EP rank. experts: of a layer; ranks: EP."""
        if self.policy == "replicated":
            return self.per_gpu
        if self.policy == "explicit":
            return len(self.slots[0]) if self.slots else len(self.slots_by_layer[0]) // ranks
        return experts // ranks + self.spare

    def held_once(self) -> Experts:
        """The same with every expert in one place, in order."""
        return self.model_copy(update=HELD_ONCE)


class Algorithms(Value):
    """Which pattern each collective follows; `auto` is what the vendor's library would take for the
    group and its bytes. The tables stand in `plan/collectives.py`. What no library chooses by itself
    (which library moves tokens to experts, how stages hand over) is not left to `auto` by default.

    all_reduce      ring; double_binary_tree; hierarchical: in the NVLink domains, then along the
                    rails; in_switch: added up by the NVSwitch of every domain, and along the
                    rails between domains; one_shot: everything to everybody; two_shot: a part to
                    each and its sum back to all (both in one NVLink domain only)
    all_gather      ring, direct, or hierarchical: along the rails, then in the NVLink domains
    reduce_scatter  ring, direct, or hierarchical: in the NVLink domains, then along the rails
    broadcast       ring, binary_tree or direct; no operator needs one so far
    all_to_all      pairwise: begins when all have met; one_sided: each rank sends when it is ready;
                    hierarchical: to the own rail of the target's NVLink domain, where a token for
                    several ranks comes once, then by NVLink; low_latency: straight to the ranks of
                    the experts, each rank when it is ready, at what DeepEP's kernels take
    point_to_point  between pipeline stages: direct: every rank sends all to its peer;
                    scatter_gather: its share of the TP group's, which the receivers then gather
    """

    all_reduce: str = "auto"
    all_gather: str = "auto"
    reduce_scatter: str = "auto"
    broadcast: str = "auto"
    all_to_all: str = "pairwise"
    point_to_point: str = "direct"


class Deployment(Value):
    """One replica of the model over all GPUs of the topology.

    tensor_parallel         TP of the attention, ranks next to each other
    pipeline_parallel       PP stages
    data_parallel           DP of the attention: shards of the replica
    expert_parallel         EP: ranks over which a layer's experts are spread
    expert_tensor_parallel  ETP: ranks that share one expert's columns and rows
                            PP * TP * DP = GPUs and TP * DP = EP * ETP
    memory_fraction         share of HBM that weights, KV blocks and activations may fill
    experts                 where expert copies stand and how their queues are served
    algorithms              which pattern each collective follows
    kernels                 library whose measured kernels price the computing: auto, trtllm, vllm, ...
                            (`clustersim catalogue calibration` lists them); where it has no such kernel,
                            another's are taken. auto is not the quickest: of the tables of the GPU itself
                            the first in a fixed order, TensorRT-LLM's before vLLM's and others. vLLM's
                            fp8_block products were timed with the host's launch of some 60 us in them
    """

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    data_parallel: Count = 1
    expert_parallel: Count = 1
    expert_tensor_parallel: Count = 1
    memory_fraction: Fraction = 0.9
    experts: Experts = Experts()
    algorithms: Algorithms = Algorithms()
    kernels: str = "auto"
