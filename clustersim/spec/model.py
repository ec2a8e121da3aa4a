"""The model: its layers, attention and experts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clustersim.spec.quantities import Count, Value


class Model(Value):
    """A decoder-only transformer in which every layer has experts.

    name               for people
    layers             in all
    hidden             width of the residual stream
    heads, kv_heads    query and key/value heads; equal for MHA, fewer key/value heads for GQA
    head_dim           width of one head
    experts, top_k     per layer; each token goes to `top_k` different ones
    ffn                inner width of one expert
    ffn_kind           plain: up, activation, down; gated: gate and up, activation, down
    vocab              rows of the embedding and of the LM head
    tied_embeddings    the LM head is the embedding
    format             number format of weights and activations
    kv_format          number format of the KV cache
    stated_parameters  what the source calls the model's size, or 0; only ever printed beside
                       what its dimensions give
    source             where the numbers come from
    """

    name: str = Field(min_length=1, max_length=64)
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    experts: Count
    top_k: Count
    ffn: Count
    ffn_kind: Literal["plain", "gated"]
    vocab: Count
    tied_embeddings: bool = False
    format: Literal["bf16", "fp8"] = "bf16"
    kv_format: Literal["bf16", "fp8"] = "bf16"
    stated_parameters: Annotated[float, Field(ge=0)] = 0.0
    source: str = Field(min_length=1)


#: Bytes per number. Source: IEEE-like formats, 16 and 8 bits.
FORMAT_BYTES = {"bf16": 2, "fp8": 1, "fp8_block": 1, "fp4": 0.5}
