"""What each rank must hold in HBM, by part, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from clustersim.errors import Mistake
from clustersim.plan.parameters import (
    EXPERT_MATRICES,
    attention_parameters,
    expert_parameters,
    kv_heads_held,
)
from clustersim.spec.checks import divisors
from clustersim.spec.deployment import Deployment
from clustersim.spec.hardware import Gpu
from clustersim.spec.model import FORMAT_BYTES, Model
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Workload
from clustersim.units import show

PARTS = ("weights", "kv", "activations", "exchange buffers")


@dataclass(frozen=True, slots=True)
class Need:
    """HBM of one rank of a stage, bytes, by part."""

    weights: float
    kv: float
    activations: float
    exchange_buffers: float

    def parts(self) -> dict[str, float]:
        """By the names of PARTS."""
        values = (self.weights, self.kv, self.activations, self.exchange_buffers)
        return dict(zip(PARTS, values, strict=True))

    @property
    def total(self) -> float:
        return sum(self.parts().values())


def slots_of(deployment: Deployment, experts: int) -> int:
    """Expert places per EP rank."""
    wish = deployment.experts
    if wish.policy == "replicated":
        return wish.per_gpu
    if wish.policy == "explicit":
        return len(wish.slots[0])
    return experts // deployment.expert_parallel


def weight_bytes(model: Model, deployment: Deployment, stage: int) -> float:
    """Weights of one rank of a stage; norms and gate are held whole by every rank."""
    d, m = deployment, model
    layers = m.layers // d.pipeline_parallel
    held = kv_heads_held(m, d.tensor_parallel)
    attention = attention_parameters(m) + 2 * m.hidden * (held - m.kv_heads) * m.head_dim
    layer = attention / d.tensor_parallel + m.hidden * m.experts + 2 * m.hidden
    layer += slots_of(d, m.experts) * expert_parameters(m) / d.expert_tensor_parallel
    ends = m.vocab * m.hidden / d.tensor_parallel
    first, last = stage == 0, stage == d.pipeline_parallel - 1
    tables = (first or last) if m.tied_embeddings else first + last
    return (layers * layer + tables * ends + last * m.hidden) * FORMAT_BYTES[m.format]


def kv_bytes_per_token(model: Model, deployment: Deployment) -> float:
    """Keys and values of one token on one rank: all layers of its stage, its share of the heads."""
    heads = kv_heads_held(model, deployment.tensor_parallel) / deployment.tensor_parallel
    layers = model.layers // deployment.pipeline_parallel
    return layers * 2 * heads * model.head_dim * FORMAT_BYTES[model.kv_format]


def kv_tokens(workload: Workload) -> int:
    """Longest context of one sequence, in whole KV blocks."""
    blocks = ceil((workload.prompt_tokens + workload.decode_steps) / workload.kv_block_tokens)
    return blocks * workload.kv_block_tokens


def pass_tokens(workload: Workload, deployment: Deployment) -> int:
    """Most tokens one shard reads in one pass of a micro-batch."""
    sequences = workload.sequences / deployment.data_parallel
    prompt = 1 if workload.phase == "decode" else workload.prompt_tokens
    return ceil(sequences * prompt / workload.microbatches)


def need(model: Model, deployment: Deployment, workload: Workload, stage: int) -> Need:
    """What one rank of a stage holds at most, for one batch, with evenly loaded experts.

    activations       three copies of the residual stream (itself, normed, summed), queries, keys and
                      values, and the experts' inner activations
    exchange_buffers  tokens sent and received by dispatch and combine
    """
    d, m = deployment, model
    size = FORMAT_BYTES[m.format]
    tokens = pass_tokens(workload, d)
    heads = (m.heads + 2 * kv_heads_held(m, d.tensor_parallel)) * m.head_dim / d.tensor_parallel
    inner = (EXPERT_MATRICES[m.ffn_kind] - 1) * m.ffn / d.expert_tensor_parallel
    choices = tokens / d.tensor_parallel * m.top_k
    sequences = workload.sequences / d.data_parallel
    return Need(
        weights=weight_bytes(m, d, stage),
        kv=ceil(sequences) * kv_tokens(workload) * kv_bytes_per_token(m, d),
        activations=size * (tokens * (3 * m.hidden + heads) + choices * d.expert_tensor_parallel * inner),
        exchange_buffers=size * 2 * choices * m.hidden * d.expert_tensor_parallel,
    )


def needs(scenario: Scenario) -> list[Need]:
    """One Need per stage; all ranks of a stage hold alike."""
    stages = range(scenario.deployment.pipeline_parallel)
    return [need(scenario.model, scenario.deployment, scenario.workload, s) for s in stages]


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
    return (
        f"tensor_parallel {nearest.tensor_parallel}, pipeline_parallel {nearest.pipeline_parallel}, "
        f"data_parallel {nearest.data_parallel}, expert_parallel {nearest.expert_parallel}, "
        f"expert_tensor_parallel {nearest.expert_tensor_parallel} fits"
        + ("" if d.experts.policy == "contiguous" else ", with each expert held once (contiguous)")
    )


def _degrees(d: Deployment) -> np.ndarray:
    return np.array([d.tensor_parallel, d.pipeline_parallel, d.expert_parallel], dtype=float)


def _largest(scenario: Scenario, deployment: Deployment) -> float:
    stages = range(deployment.pipeline_parallel)
    return max(need(scenario.model, deployment, scenario.workload, s).total for s in stages)


def _alternatives(scenario: Scenario) -> list[Deployment]:
    """Every split of the same GPUs that cuts layers, heads, experts and sequences evenly."""
    d, m, w = scenario.deployment, scenario.model, scenario.workload
    gpus = d.pipeline_parallel * d.tensor_parallel * d.data_parallel
    found = []
    for pp in divisors(gpus):
        for tp in divisors(gpus // pp):
            dp = gpus // pp // tp
            if m.layers % pp or m.heads % tp or w.sequences % dp or (w.sequences // dp) % w.microbatches:
                continue
            for ep in divisors(tp * dp):
                if m.experts % ep == 0 and m.ffn % (tp * dp // ep) == 0:
                    found.append(_split(d, tp, pp, dp, ep))
    return found


def _split(d: Deployment, tp: int, pp: int, dp: int, ep: int) -> Deployment:
    return d.model_copy(
        update={
            "tensor_parallel": tp,
            "pipeline_parallel": pp,
            "data_parallel": dp,
            "expert_parallel": ep,
            "expert_tensor_parallel": tp * dp // ep,
            "experts": d.experts.model_copy(update={"policy": "contiguous", "per_gpu": 0, "slots": ()}),
        }
    )
