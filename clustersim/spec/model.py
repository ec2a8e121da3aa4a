"""The model: its layers, attention and experts."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from clustersim.spec.quantities import Count, Value, Whole

Format: TypeAlias = Literal["bf16", "fp8", "fp8_block", "fp4"]

#: Format of everything that is not a weight matrix of attention or of a feed-forward network: the
#: residual stream, what operators hand to each other, embedding, LM head, gates and norms. Released
#: fp8 and fp4 checkpoints leave those unquantised (DeepSeek-V3, gpt-oss, Llama-3.1-405B-FP8).
PLAIN = "bf16"


class Mla(Value):
    """Multi-head latent attention: keys and values of all heads are made from one short vector.

    q_lora_rank       width of the vector that queries are made from; 0: straight from the residual
    kv_lora_rank      width of the vector that keys and values are made from; it is cached
    qk_nope_head_dim  part of a query and key head without position
    qk_rope_head_dim  part with position; the key's is shared by all heads, and cached
    v_head_dim        width of a value head
    """

    q_lora_rank: Whole = 0
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count


class Model(Value):
    """A decoder-only transformer, with or without experts.

    name               for people
    layers             in all
    hidden             width of the residual stream
    heads, kv_heads    query and key/value heads; equal for MHA, fewer key/value heads for GQA;
                       kv_heads is left out with mla
    head_dim           width of one head; left out with mla
    mla                latent attention in place of kv_heads and head_dim
    qk_norm            queries and keys are normalised before they are turned
    attention_bias     the query, key and value projections add a bias
    window             tokens that a layer of sliding-window attention looks back; 0: none does
    full_every         with a window: each so-many-th layer looks at all tokens; 0: none does
    experts, top_k     per layer; each token goes to `top_k` different ones; left out: no experts
    ffn                inner width of one expert
    ffn_kind           plain: up, activation, down; gated: gate and up, activation, down
    shared_experts     per layer, which every token goes through besides
    shared_ffn         inner width of one of them; 0: as `ffn`
    dense_layers       leading layers that have one dense network in place of experts
    moe_layer_step     of the others each so-many-th layer has experts, counted from layer 0
    dense_ffn          inner width of a dense layer's network
    expert_groups      groups that a router chooses among first, where gating.node_limited says so
    groups_chosen      of them per token; recorded like those
    mtp_layers         layers that predict further tokens; recorded, neither run nor counted
    vocab              rows of the embedding and of the LM head
    tied_embeddings    the LM head is the embedding
    format             in which the matrices of attention, dense networks and shared experts are
                       held and multiplied; all else is bf16
    expert_format      the same of the routed experts; left out: as `format`
    kv_format          number format of the KV cache
    stated_parameters  what the source calls the model's size, or 0; only ever printed beside
                       what its dimensions give
    source             where the numbers come from
    """

    name: str = Field(min_length=1, max_length=64)
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Whole = 0
    head_dim: Whole = 0
    mla: Mla | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    window: Whole = 0
    full_every: Whole = 0
    experts: Whole = 0
    top_k: Whole = 0
    ffn: Whole = 0
    ffn_kind: Literal["plain", "gated"]
    shared_experts: Whole = 0
    shared_ffn: Whole = 0
    dense_layers: Whole = 0
    moe_layer_step: Count = 1
    dense_ffn: Whole = 0
    expert_groups: Whole = 0
    groups_chosen: Whole = 0
    mtp_layers: Whole = 0
    vocab: Count
    tied_embeddings: bool = False
    format: Format = "bf16"
    expert_format: Format | None = None
    kv_format: Literal["bf16", "fp8"] = "bf16"
    stated_parameters: Annotated[float, Field(ge=0)] = 0.0
    source: str = Field(min_length=1)

    def has_experts(self, layer: int) -> bool:
        """Whether tokens go to experts in a layer, counted from 0."""
        past_dense = layer >= self.dense_layers
        return bool(self.experts) and past_dense and (layer + 1) % self.moe_layer_step == 0

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        behind = self.layers // self.moe_layer_step - self.dense_layers // self.moe_layer_step
        return max(behind, 0) if self.experts else 0

    def windowed(self, layer: int) -> bool:
        """Whether a layer, counted from 0, looks at its window only."""
        return bool(self.window) and not (self.full_every and (layer + 1) % self.full_every == 0)

    @property
    def windowed_layers(self) -> int:
        """Layers that look at their window only."""
        if not self.window:
            return 0
        return self.layers - (self.layers // self.full_every if self.full_every else 0)

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together: they are one network."""
        return self.shared_experts * (self.shared_ffn or self.ffn)

    @property
    def expert_numbers(self) -> Format:
        """Format of the routed experts."""
        return self.expert_format or self.format

    @property
    def sent_as(self) -> str:
        """Format of a token on its way to its experts: fp8 where they multiply fp8, else bf16.

        Four-bit weights are multiplied with wider tokens, as vLLM and SGLang do for gpt-oss.
        """
        return "fp8" if self.expert_numbers in ("fp8", "fp8_block") else PLAIN

    @property
    def formats(self) -> tuple[str, ...]:
        """Every format in which it multiplies; PLAIN always, for gates and the LM head."""
        routed = (self.expert_numbers,) if self.experts else ()
        return tuple(dict.fromkeys((PLAIN, self.format, *routed)))


#: Bytes per number. bf16 and fp8 have 16 and 8 bits. fp8_block: besides, an fp32 scale per block of
#: 128 x 128 weights (DeepSeek-V3 technical report, section 3.3.2, weight_block_size of its config.json).
#: fp4 is MXFP4: an 8-bit scale per 32 numbers (OCP Microscaling Formats (MX) specification 1.0).
#: w4a16 are fp4 weights on a GPU that must unpack them and multiply bf16, see spec.formats.
FORMAT_BYTES = {
    "bf16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4 / 128**2,
    "fp4": 0.5 + 1 / 32,
    "w4a16": 0.5 + 1 / 32,
}
