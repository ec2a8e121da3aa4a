"""The deployment: how the model is cut over the GPUs, and by which algorithms they exchange."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from clustersim.spec.quantities import Count, Fraction, Value, Whole


class Experts(Value):
    """Which rank holds which expert copy, and how its queue is served.

    policy       contiguous: expert e on EP rank e * EP // E, once; round_robin: on e % EP, once;
                 replicated: `per_gpu` slots on every EP rank, filled with experts 0, 1, … over and
                 over; explicit: `slots`
    per_gpu      slots per EP rank, for `replicated`; 0 otherwise
    slots        for `explicit`: the expert ids that each EP rank holds, one list per EP rank
    copy_choice  which copy serves a token: round_robin over all, or local_first (same rank, else
                 same server, else all)
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
    """

    policy: Literal["contiguous", "round_robin", "replicated", "explicit"] = "contiguous"
    per_gpu: Annotated[int, Field(ge=0)] = 0
    slots: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] = ()
    copy_choice: Literal["round_robin", "local_first"] = "round_robin"
    combine_format: Literal["bf16", "fp8"] = "bf16"
    service: Literal["grouped", "by_expert"] = "grouped"
    start: Literal["all_arrived", "expert_complete", "chunks"] = "all_arrived"
    chunk_tokens: Whole = 0
    order: Literal["arrival", "longest_first", "as_listed"] = "arrival"

    @field_validator("slots", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        return tuple(tuple(row) if isinstance(row, list) else row for row in value)


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
                            another's are taken
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
