"""Ranks on GPUs and the process groups they form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.spec.deployment import Deployment


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which ranks communicate. Rank r sits on GPU r; S stages of N = TP * DP = EP * ETP ranks each.

    stage  int32[S, N]         ranks of each pipeline stage
    tp     int32[S, DP, TP]    ranks that share a shard's attention heads
    ep     int32[S, ETP, EP]   ranks among which tokens are dispatched; each alone without experts
    etp    int32[S, EP, ETP]   ranks that share one expert's columns and rows
    """

    stage: np.ndarray
    tp: np.ndarray
    ep: np.ndarray
    etp: np.ndarray


def layers_of(layers: int, stages: int, stage: int) -> range:
    """The layers of a pipeline stage.

    Where they do not divide, stages before the last take one more each, the last but one first: the last
    has the LM head.

    Source   vLLM: distributed/utils.py, get_pp_indices
    """
    each, over = divmod(layers, stages)
    sizes = [each] * stages
    for more in range(over):
        sizes[stages - 2 - more] += 1
    begin = sum(sizes[:stage])
    return range(begin, begin + sizes[stage])


def process_groups(deployment: Deployment) -> Groups:
    """Tensor-parallel ranks next to each other, then shards, then stages: Megatron's order.

    Source   Megatron-LM's rank order "tp-dp-pp" keeps the group that talks most inside a server.
    """
    d = deployment
    ranks = d.pipeline_parallel * d.tensor_parallel * d.data_parallel
    stage = np.arange(ranks, dtype=np.int32).reshape(d.pipeline_parallel, -1)
    if d.expert_parallel * d.expert_tensor_parallel == stage.shape[1]:
        etp = stage.reshape(d.pipeline_parallel, d.expert_parallel, d.expert_tensor_parallel)
    else:  # a model without experts, whose ranks have nobody to dispatch to
        etp = stage.reshape(d.pipeline_parallel, 1, -1)
    return Groups(
        stage=stage,
        tp=stage.reshape(d.pipeline_parallel, d.data_parallel, d.tensor_parallel),
        ep=etp.transpose(0, 2, 1),
        etp=etp,
    )
