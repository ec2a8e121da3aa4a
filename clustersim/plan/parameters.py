"""Closed forms of a model: its parameters and the FLOP of a pass."""

from __future__ import annotations

import numpy as np

from clustersim.spec.batch import Batch
from clustersim.spec.model import Model

#: matrices of one expert by its kind: plain is up and down; gated has gate and up, and down
EXPERT_MATRICES = {"plain": 2, "gated": 3}


def attention_parameters(model: Model) -> int:
    """Of one layer: query, key, value and output projections."""
    kv = 2 * model.kv_heads * model.head_dim
    return model.hidden * (2 * model.heads * model.head_dim + kv)


def expert_parameters(model: Model) -> int:
    """Of one expert."""
    return EXPERT_MATRICES[model.ffn_kind] * model.hidden * model.ffn


def total_parameters(model: Model, experts: int | None = None) -> int:
    """Of the whole model, or with only `experts` experts per layer (active: top_k)."""
    experts = model.experts if experts is None else experts
    layer = attention_parameters(model) + experts * expert_parameters(model)
    layer += model.experts * model.hidden + 2 * model.hidden  # gate, two norms
    embeddings = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    return model.layers * layer + embeddings + model.hidden


def active_parameters(model: Model) -> int:
    """Those that one token passes through."""
    return total_parameters(model, model.top_k)


def kv_heads_held(model: Model, tensor_parallel: int) -> int:
    """Key/value heads over a TP group: with more ranks than heads, heads are held several times."""
    return max(model.kv_heads, tensor_parallel)


def step_flop(model: Model, batch: Batch, tensor_parallel: int) -> float:
    """Useful FLOP of a pass over all ranks: matrix products and attention; 2 per multiply-add.

    Source   2 * parameters per token, and 4 * heads * head_dim per query-key pair (QK and PV)
    """
    tokens = float(batch.tokens.sum())
    m = model
    qkv = m.hidden * (m.heads + 2 * kv_heads_held(m, tensor_parallel)) * m.head_dim
    out = m.heads * m.head_dim * m.hidden
    per_token = qkv + out + m.hidden * m.experts + m.top_k * expert_parameters(m)
    attention = 4.0 * m.heads * m.head_dim * float(np.sum(batch.pairs))
    head = 2.0 * m.hidden * m.vocab * float(batch.outputs.sum())
    return m.layers * (2.0 * per_token * tokens + attention) + head
