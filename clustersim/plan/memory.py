"""What each rank must hold in HBM, by part, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from clustersim.errors import Mistake
from clustersim.plan.groups import layers_of
from clustersim.plan.parameters import (
    FFN_MATRICES,
    attention_parameters,
    expert_parameters,
    ffn_parameters,
    kv_heads_held,
    latent_projection,
    small_parameters,
)
from clustersim.spec.deployment import Deployment
from clustersim.spec.dividing import divisors
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import FORMAT_BYTES, PLAIN, Model
from clustersim.spec.scenario import Scenario
from clustersim.spec.shards import sequences_per_shard
from clustersim.spec.workload import Workload
from clustersim.units import show

PARTS = ("weights", "kv", "activations", "exchange buffers", "rebalancing buffers")


@dataclass(frozen=True, slots=True)
class Need:
    """HBM of one rank of a stage, bytes, by part."""

    weights: float
    kv: float
    activations: float
    exchange_buffers: float
    rebalancing_buffers: float = 0.0

    def parts(self) -> dict[str, float]:
        """By the names of PARTS; the last only where experts move."""
        values = (self.weights, self.kv, self.activations, self.exchange_buffers, self.rebalancing_buffers)
        found = dict(zip(PARTS, values, strict=True))
        return found if self.rebalancing_buffers else {part: found[part] for part in PARTS[:-1]}

    @property
    def total(self) -> float:
        return sum(self.parts().values())


def slots_of(deployment: Deployment, experts: int) -> int:
    """Expert places per EP rank."""
    return deployment.experts.places_per_rank(experts, deployment.expert_parallel)


def weights_held(model: Model, deployment: Deployment, stage: int) -> dict[str, float]:
    """Parameters that one rank of a stage holds, by their format.

    Norms, gate, shared experts and the projections into latent vectors are held whole by every rank.
    """
    d, m, tp = deployment, model, deployment.tensor_parallel
    layers = layers_of(m.layers, d.pipeline_parallel, stage)
    routed = sum(m.has_experts(layer) for layer in layers)
    whole = latent_projection(m, m.mla) if m.mla else 0
    copied = 0 if m.mla else 2 * m.hidden * (kv_heads_held(m, tp) - m.kv_heads) * m.head_dim
    attention = whole + (attention_parameters(m) - whole + copied) / tp
    first, last = stage == 0, stage == d.pipeline_parallel - 1
    tables = (first or last) if m.tied_embeddings else first + last
    plain = len(layers) * small_parameters(m) + routed * m.hidden * m.experts
    experts = slots_of(d, m.experts) * expert_parameters(m) / d.expert_tensor_parallel
    found = {PLAIN: plain + tables * m.vocab * m.hidden / tp + last * m.hidden}
    for fmt, count in (
        (m.format, len(layers) * attention),
        (m.format, routed * ffn_parameters(m, m.shared_width)),
        (m.format, (len(layers) - routed) * ffn_parameters(m, m.dense_ffn) / tp),
        (m.expert_numbers, routed * experts),
    ):
        found[fmt] = found.get(fmt, 0.0) + count
    return found


def weight_bytes(model: Model, deployment: Deployment, stage: int) -> float:
    """Weights of one rank of a stage."""
    held = weights_held(model, deployment, stage)
    return sum(count * FORMAT_BYTES[fmt] for fmt, count in held.items())


def kv_bytes(model: Model, deployment: Deployment, stage: int, tokens: int) -> float:
    """What one rank of a stage caches of a sequence of so many tokens.

    Keys and values of its share of the heads; of latent attention one vector for all heads, whole on
    every TP rank. A layer with a window keeps that many tokens at most.
    """
    m, tp = model, deployment.tensor_parallel
    layers = layers_of(m.layers, deployment.pipeline_parallel, stage)
    if m.mla:
        numbers = float(m.mla.kv_lora_rank + m.mla.qk_rope_head_dim)
    else:
        numbers = 2 * kv_heads_held(m, tp) / tp * m.head_dim
    near = sum(m.windowed(layer) for layer in layers)
    kept = near * min(tokens, m.window) + (len(layers) - near) * tokens
    return kept * numbers * FORMAT_BYTES[m.kv_format]


def kv_bytes_per_token(model: Model, deployment: Deployment, workload: Workload) -> float:
    """The mean over the tokens of the longest sequence, on a rank of the stage that caches most."""
    tokens = kv_tokens(workload)
    stages = range(deployment.pipeline_parallel)
    return max(kv_bytes(model, deployment, stage, tokens) for stage in stages) / tokens


def kv_tokens(workload: Workload) -> int:
    """Longest context of one sequence, in whole KV blocks."""
    blocks = ceil((workload.prompt_tokens + workload.decode_steps) / workload.kv_block_tokens)
    return blocks * workload.kv_block_tokens


def most_sequences(workload: Workload, deployment: Deployment, seed: int) -> float:
    """Sequences of a batch on the fullest shard."""
    if workload.shard_skew:
        return float(sequences_per_shard(workload, deployment.data_parallel, seed).max())
    return workload.sequences / deployment.data_parallel


def pass_tokens(workload: Workload, deployment: Deployment, seed: int) -> int:
    """Most tokens one shard reads in one pass of a micro-batch."""
    sequences = most_sequences(workload, deployment, seed)
    prompt = 1 if workload.phase == "decode" else workload.prompt_tokens
    return ceil(sequences * prompt / workload.microbatches)


def need(model: Model, deployment: Deployment, workload: Workload, stage: int, seed: int) -> Need:
    """What one rank of a stage holds at most, for one batch, with evenly loaded experts.

    seed              of the scenario: it says which shards of a ragged workload are full
    activations       three copies of the residual stream (itself, normed, summed), queries, keys and
                      values, and the experts' inner activations
    exchange_buffers  tokens sent and received by dispatch and combine
    rebalancing_buffers  weights that have come for a layer, while the old ones still serve
    """
    d, m, tp = deployment, model, deployment.tensor_parallel
    size = FORMAT_BYTES[PLAIN]
    tokens = pass_tokens(workload, d, seed)
    own = tokens / tp
    sequences = most_sequences(workload, d, seed)
    per_choice = (FORMAT_BYTES[m.sent_as] + size) * m.hidden
    return Need(
        weights=weight_bytes(m, d, stage),
        kv=ceil(sequences) * kv_bytes(m, d, stage, kv_tokens(workload)),
        activations=size * (tokens * (3 * m.hidden + _head_numbers(m, tp)) + _inner_numbers(m, d, tokens)),
        exchange_buffers=per_choice * own * m.top_k * d.expert_tensor_parallel,
        rebalancing_buffers=_staged(m, d, stage),
    )


def expert_bytes(model: Model, deployment: Deployment) -> float:
    """Weights of one expert of a layer on one of the ranks that share it."""
    numbers = expert_parameters(model) / deployment.expert_tensor_parallel
    return numbers * FORMAT_BYTES[model.expert_numbers]


def _staged(m: Model, d: Deployment, stage: int) -> float:
    """Weights of experts that may be on their way to one rank at once: every place of so many layers."""
    how = d.experts.rebalance
    if not how.every or not m.experts:
        return 0.0
    layers = sum(m.has_experts(layer) for layer in layers_of(m.layers, d.pipeline_parallel, stage))
    together = min(how.layers_at_once or layers, layers)
    return together * slots_of(d, m.experts) * expert_bytes(m, d)


def _head_numbers(m: Model, tp: int) -> float:
    """Queries, keys and values of a token on one rank."""
    if m.mla:
        query = m.mla.qk_nope_head_dim + m.mla.qk_rope_head_dim
        return m.heads * (2 * query + m.mla.v_head_dim) / tp
    return (m.heads + 2 * kv_heads_held(m, tp)) * m.head_dim / tp


def _inner_numbers(m: Model, d: Deployment, tokens: float) -> float:
    """Inner activations of so many tokens of a shard on one rank, in the layer that has most."""
    wide, own = FFN_MATRICES[m.ffn_kind] - 1, tokens / d.tensor_parallel
    # Tokens of all that share an expert come to each of them, for its part of the columns.
    routed = own * (m.top_k * m.ffn + m.shared_width)
    return wide * max(routed, own * m.dense_ffn)


def needs(scenario: Scenario) -> list[Need]:
    """One Need per stage; all ranks of a stage hold alike."""
    stages = range(scenario.deployment.pipeline_parallel)
    about = (scenario.model, scenario.deployment, scenario.workload)
    return [need(*about, stage, scenario.seed) for stage in stages]


def does_not_fit(scenario: Scenario, gpu: Gpu) -> list[Mistake]:
    """A mistake that names the largest part and the nearest deployment that fits, or nothing."""
    room = gpu.memory * scenario.deployment.memory_fraction
    stage, worst = max(enumerate(needs(scenario)), key=lambda pair: pair[1].total)
    if worst.total <= room:
        return []
    parts = worst.parts()
    largest = max(parts, key=lambda part: parts[part])
    listed = ", ".join(f"{part} {show(size, 'size')}" for part, size in parts.items())
    return [
        Mistake(
            "deployment",
            f"a rank of stage {stage} needs {show(worst.total, 'size')} ({listed}) but may use "
            f"{show(room, 'size')} of {gpu.name}; the largest part is {largest}; "
            f"{_way_out(scenario, room)}",
        )
    ]


def _way_out(scenario: Scenario, room: float) -> str:
    d = scenario.deployment
    now = _degrees(d)
    fitting = [c for c in _alternatives(scenario) if _largest(scenario, c) <= room]
    if not fitting:
        return "no other split of these GPUs fits: use more GPUs, fewer sequences or shorter prompts"
    nearest = min(fitting, key=lambda c: (float(np.abs(np.log(_degrees(c) / now)).sum()), tuple(_degrees(c))))
    among_experts = (
        f", expert_parallel {nearest.expert_parallel}, "
        f"expert_tensor_parallel {nearest.expert_tensor_parallel}"
        if scenario.model.experts
        else ""
    )
    return (
        f"tensor_parallel {nearest.tensor_parallel}, pipeline_parallel {nearest.pipeline_parallel}, "
        f"data_parallel {nearest.data_parallel}{among_experts} fits"
        + ("" if d.experts.policy == "contiguous" else ", with each expert held once (contiguous)")
    )


def _degrees(d: Deployment) -> np.ndarray:
    return np.array([d.tensor_parallel, d.pipeline_parallel, d.expert_parallel], dtype=float)


def _largest(scenario: Scenario, deployment: Deployment) -> float:
    stages = range(deployment.pipeline_parallel)
    about = (scenario.model, deployment, scenario.workload)
    return max(need(*about, stage, scenario.seed).total for stage in stages)


def _alternatives(scenario: Scenario) -> list[Deployment]:
    """Every split of the same GPUs that cuts heads, columns, experts and sequences evenly."""
    d, m, w = scenario.deployment, scenario.model, scenario.workload
    gpus = d.pipeline_parallel * d.tensor_parallel * d.data_parallel
    found = []
    for pp in divisors(gpus):
        for tp in divisors(gpus // pp):
            dp = gpus // pp // tp
            if m.layers < pp or m.heads % tp or m.dense_ffn % tp:
                continue
            if w.sequences % dp or (w.sequences // dp) % w.microbatches:
                continue
            if not m.experts:
                found.append(_split(d, tp, pp, dp, 1, 1))
                continue
            for ep in divisors(tp * dp):
                if m.experts % ep == 0 and m.ffn % (tp * dp // ep) == 0:
                    found.append(_split(d, tp, pp, dp, ep, tp * dp // ep))
    return found


def _split(d: Deployment, tp: int, pp: int, dp: int, ep: int, etp: int) -> Deployment:
    return d.model_copy(
        update={
            "tensor_parallel": tp,
            "pipeline_parallel": pp,
            "data_parallel": dp,
            "expert_parallel": ep,
            "expert_tensor_parallel": etp,
            "experts": d.experts.held_once(),
        }
    )
