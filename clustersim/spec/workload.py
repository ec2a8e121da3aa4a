"""The workload: batches, their lengths, the gating skew, and what goes wrong on the way."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from clustersim.errors import nearest
from clustersim.spec.quantities import Count, Fraction, Size, Time, Value, Whole


class Workload(Value):
    """Batches of sequences that one replica works through.

    phase            prefill: read every prompt once; decode: `decode_steps` steps at a context of
                     `prompt_tokens` that is already in the KV cache; both: one after the other
    sequences        per batch, dealt to the shards in turn
    prompt_tokens    per sequence
    decode_steps     output tokens per sequence
    microbatches     parts of a batch that follow each other through the pipeline; sequences are
                     dealt out, or, where prefill has more microbatches than a shard has sequences,
                     prompts are cut into chunks
    batches          how many batches arrive
    arrivals         together: all at time zero; uniform: one every `interval`; poisson: gaps of mean
                     `interval`
    interval         time between batches
    router           request → shard: round_robin or least_loaded
    shard_skew       how unevenly the sources send: 0: by the router; else a batch's sequences go to
                     the shards by lognormal shares with this standard deviation of their logarithm,
                     the same shares in every batch; a shard may get none
    kv_block_tokens  tokens per KV block
    """

    phase: Literal["prefill", "decode", "both"]
    sequences: Count
    prompt_tokens: Count
    decode_steps: Whole = 0
    microbatches: Count = 1
    batches: Count = 1
    arrivals: Literal["together", "uniform", "poisson"] = "together"
    interval: Time = 0.0
    router: Literal["round_robin", "least_loaded"] = "round_robin"
    shard_skew: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    kv_block_tokens: Count = 16


class LayerCurve(Value):
    """How one layer's load is spread over its experts, as a fit found it.

    layer  to which the numbers belong; other layers take those of the nearest one
    gini   Gini coefficient of the tokens per expert
    peak   tokens of the busiest expert over the mean
    bend   how much heavier (positive) or lighter the tails are than those of a lognormal
    """

    layer: Whole
    gini: Annotated[float, Field(ge=0.0, lt=1.0)]
    peak: Annotated[float, Field(ge=1.0, le=1e6)]
    bend: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0


class Gating(Value):
    """How popular the experts are, and how that changes. A key that the skew, or the motion, has no use for
    is an error; a file or a --set that names a skew (or motion) puts aside what the files it extends, and
    options before it, had said for others.

    Popularity is the share of all choices of a layer that an expert gets. A token takes `top_k` different
    experts, so that no share exceeds 1 / top_k: what zipf or measured counts would give beyond goes to the
    others; a `hot_share`, `burst_share` or `gini` beyond is an error.

    skew             even: every expert gets the same; uniform: every token draws at random, all experts
                     alike; zipf: popularity of rank r is r ** -exponent; gini: lognormal with the wished
                     `gini`; hot: `hot_experts` share `hot_share` of all choices; hot_rank: the experts that a
                     contiguous placement puts on EP rank `hot_rank` do; topics: every request is about one
                     of `topics`, each with its own popularity of that `gini`; fitted: `layers`, as
                     `clustersim gating fit` writes them; replayed: the measured `counts`
    exponent         of zipf
    gini             Gini coefficient of the popularity; for topics of every topic's
    hot_experts      how many are hot; 0: as few as can get `hot_share`, for hot_rank all that the rank holds
    hot_share        their share of all choices
    hot_rank         EP rank
    topics           how many there are
    topic_exponent   how much more often some are asked about: topic r has a share of r ** -topic_exponent
    topic_requests   requests at a time on one shard of the attention, each about one topic
    layers           of fitted: a table per layer
    fitted_experts   of fitted: experts of a layer that was fitted; the model must have as many; 0: not said
    counts           of replayed: CSV with layer_id,expert_id,count or layer,expert,count; or npz or npy with
                     expert ids [tokens, layers, top_k], which are drawn again token by token; relative to
                     the file that names it
    measurement      which of several in that file: words of its name that no other has
    content          what stood in that file, packed; written, so that a result needs no further file
    motion           still; drifting: experts change ranks, half of the rank correlation is gone after
                     `half_life`; bursting: every `burst_every` steps, for `burst_steps`, a new hot topic of
                     one expert in eight takes `burst_share` of all choices; rotating: every
                     `rotate_every` steps the popularity moves on, by `hot_experts` or by one expert
    half_life        steps
    burst_every      steps from the beginning of a burst to that of the next; the first begins after as many
    burst_steps      steps
    burst_share      of all choices
    rotate_every     steps
    correlation      between the ranks that an expert has in two layers: 0 none, 1 the same order everywhere
    shuffle          popularity ranks are shuffled per layer; otherwise expert 0 is the hottest everywhere
    capacity_factor  an expert takes at most this many times its even share of an EP group's choices, the
                     others are dropped, of every source in proportion; it takes one at least, however
                     small the factor, and what is dropped stands beside tokens/s; 0: no bound
    node_limited     a token's experts lie in `groups_chosen` of the model's `expert_groups`
    """

    skew: Literal["even", "uniform", "zipf", "gini", "hot", "hot_rank", "topics", "fitted", "replayed"] = (
        "even"
    )
    exponent: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    gini: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    hot_experts: Whole = 0
    hot_share: Fraction = 0.5
    hot_rank: Whole = 0
    topics: Annotated[int, Field(ge=1, le=1000)] = 8
    topic_exponent: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    topic_requests: Annotated[int, Field(ge=1, le=100_000)] = 8
    layers: tuple[LayerCurve, ...] = ()
    fitted_experts: Whole = 0
    counts: str = ""
    measurement: str = ""
    content: str = ""
    motion: Literal["still", "drifting", "bursting", "rotating"] = "still"
    half_life: Annotated[float, Field(gt=0.0, le=1e9)] = 100.0
    burst_every: Count = 100
    burst_steps: Count = 20
    burst_share: Fraction = 0.5
    rotate_every: Count = 100
    correlation: Fraction = 0.0
    shuffle: bool = True
    capacity_factor: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    node_limited: bool = False

    @field_validator("layers", mode="before")
    @classmethod
    def _list_is_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


#: Of a burst: one expert in so many is hot.
_BURST_OF = 8


def burst_experts(experts: int) -> int:
    """How many of a layer's experts a burst makes hot."""
    return max(experts // _BURST_OF, 1)


def fewest_hot(share: float, top_k: int) -> int:
    """The fewest experts that can get a share of all choices, of which one gets 1 / top_k at most."""
    return max(ceil(share * top_k - 1e-9), 1)


class Beside(Value):
    """The same scenario under another gating, run with the same random numbers and set beside the result.

    Faults of the hottest GPU befall the same GPU in both runs: the one that is hottest in the scenario.

    label   what it is, in a few words; where an option, or a file that extends this one, changes the
            gating and not the label, the keys of the gating take its place
    gating  in place of the scenario's
    """

    label: str = Field(min_length=1, max_length=40)
    gating: Gating


class Network(Value):
    """How finely links are simulated, and what flows do when a link is down.

    fidelity       port_bound: closed form; what else is on a link is ignored, so that with several
                   exchanges at once even the network bound can be undercut; fluid: max-min fair;
                   chunked: chunk by chunk through queues, for small scenarios
    tolerance      of `fluid`: flows that end are left their bandwidth until the first of them could have
                   sent this share of its bytes once more, and all are taken out together: fewer
                   re-shares for times that are off by about as much; 0: exact
    chunk          bytes per chunk of `chunked`
    queueing       of `chunked`; fair: every link serves its flows in turn, which shares as the fluid
                   does; fifo: one queue per link, first come first served
    switching      of `chunked`; store_and_forward: a chunk goes on when its last byte has come;
                   cut_through: as soon as the next link can serve it without a gap
    window         of `chunked`: chunks that a flow may have under way per link of its path
    buffer         of `chunked` with fifo: bytes that a link's queue holds, at least two chunks; when it
                   is full, the links before it wait, and all that is behind; 0: no bound
    startup        measured: an exchange costs what was measured of the libraries that do such (see
                   docs/validation-network.md); none: its GPUs' launch_latency, and the latencies of paths
    on_down        wait: flows stay on their path until the link is back; reroute: they take the
                   shortest way around it, those under way with what they have not sent yet; where there
                   is no other way they wait. Once the link is back, new flows cross it again
    reroute_after  of reroute: time from a link's going down until the machine has noticed; flows over
                   it stand still meanwhile. An assumption: hardware notices within a millisecond,
                   routing in software within seconds
    """

    fidelity: Literal["port_bound", "fluid", "chunked"] = "fluid"
    tolerance: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    chunk: Size = 262144.0
    startup: Literal["measured", "none"] = "measured"
    on_down: Literal["wait", "reroute"] = "wait"
    reroute_after: Time = 1e-3
    queueing: Literal["fair", "fifo"] = "fair"
    switching: Literal["store_and_forward", "cut_through"] = "store_and_forward"
    window: Count = 2
    buffer: Size = 0.0


def _rank_or_word(value: object) -> object:
    # Said here once: a union would complain about each of its members.
    if value is None or value in _GPU_WORDS or (type(value) is int and value >= 0):
        return value
    near = nearest(value, _GPU_WORDS) if isinstance(value, str) else ""
    raise ValueError(f"must be a rank from 0 on, {' or '.join(_GPU_WORDS)}{near}")


_GPU_WORDS = ("hottest", "all")
WhichGpu = Annotated[Annotated[int, Field(ge=0)] | Literal["hottest", "all"], BeforeValidator(_rank_or_word)]


class Fault(Value):
    """Something slow or down, from `start` to `end`.

    kind    slow_gpu: operators take `factor` times as long; throttled_gpu: they do for the first part
            of every `period`, as GPUs that grow too hot; spread_gpus: operators of every GPU take a
            fixed factor of its own as long, which lies around 1; slow_link: bandwidth is divided by
            `factor`, of a slow network card for instance by its vertex; down_link: nothing is carried;
            flapping_link: slow by `factor`, or down where none is given, for the first part of every
            `period`
    gpu     of slow_gpu and throttled_gpu: a rank; hottest: the rank whose experts are expected to get
            most tokens, over all layers; all: every GPU
    link    for links, by vertex names: "a->b" one way, "a<->b" both ways, "a" every link of that
            vertex, such as a network card ("server0/nic1") or a switch
    factor  how many times slower; an operator takes as much longer as its GPU is slow when it begins
    start   when it begins
    end     when it is over; left out: never
    period  of throttled_gpu and flapping_link: time from one spell to the next
    duty    of throttled_gpu and flapping_link: share of each period in which it is slow or down
    timing  of throttled_gpu and flapping_link: regular: every period is the same, and the same of all
            GPUs; random: spells and the times between are drawn anew from exponential distributions
            with the same means, of every GPU its own; the links of one fault have them in common
    spread  of spread_gpus: standard deviation of the logarithm of the factors, which are lognormal
            and have a mean of 1 over all GPUs; 0.03 is about 3 % around the mean
    """

    kind: Literal["slow_gpu", "throttled_gpu", "spread_gpus", "slow_link", "down_link", "flapping_link"]
    gpu: WhichGpu | None = None
    link: str | None = None
    factor: Annotated[float, Field(ge=1.0, le=1e6)] | None = None
    start: Time = 0.0
    end: Time | None = None
    period: Time | None = None
    duty: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    timing: Literal["regular", "random"] = "regular"
    spread: Annotated[float, Field(gt=0.0, le=2.0)] | None = None


class TraceLevel(Value):
    """How much is written down.

    level   sums: totals only; spans: every operator of every rank; flows: spans and every flow
    steps   of spans and flows: [first, after the last], counted from 0 in order of start; written is all
            that runs from the beginning of the first to the end of the last of them, beside them too; what
            is not written counts in the totals. Left out: all steps
    window  of spans and flows: [from, to], simulated time; written is what touches it. With `steps`, what
            both choose
    """

    level: Literal["sums", "spans", "flows"] = "spans"
    steps: tuple[Whole, Whole] | None = None
    window: tuple[Time, Time] | None = None

    @field_validator("steps", "window", mode="before")
    @classmethod
    def _list_is_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class Claimed(Value):
    """What a document says it measured: printed beside the result, never used in it.

    source                   the document
    total_tokens_per_second  input and output tokens together
    tpot                     time per output token
    against                  name of a scenario whose newest result is set beside this one as a ratio
    """

    source: str = Field(min_length=1)
    total_tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    tpot: Time | None = None
    against: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
