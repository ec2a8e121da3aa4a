"""What every operator of a StepGraph looks like when it is drawn: a table, and the walk that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from clustersim.plan import dag_attention as attention
from clustersim.plan import dag_experts as experts
from clustersim.plan.builder import WIDTH
from clustersim.plan.dag import END, REST, ROUTING, Node, Part, Tensor, Wish, joined
from clustersim.plan.dag_sheet import Sheet, said_groups
from clustersim.plan.layout import Layout
from clustersim.plan.lowering import SCORE
from clustersim.plan.stepgraph import Operator, StepGraph

Form = Callable[[Sheet, int, Operator], Iterator[Node]]


def drawn(graph: StepGraph, layout: Layout, wish: Wish) -> Iterator[Part]:
    """Nodes, each followed by the edges that lead to it, from the input to the output."""
    sheet = Sheet(graph, layout, wish)
    yield from joined(_input(sheet), sheet.registers)
    left_out: list[int] = []
    for index, (op, shown) in enumerate(zip(graph.operators, _shown(graph, wish), strict=True)):
        if not shown:
            left_out.append(index)
            continue
        if left_out:
            yield from _left_out(sheet, left_out)
            left_out = []
        if op.stage != sheet.stage:
            sheet.enter(op.stage)
        sheet.block = _block(sheet, op)
        for node in FORMS[op.name](sheet, index, op):
            yield from joined(node, sheet.registers)
    yield from joined(_output(sheet), sheet.registers)


def _shown(graph: StepGraph, wish: Wish) -> list[bool]:
    """Of every operator, whether it is drawn; those between two layers that are not are not either."""
    layers = [op.layer for op in graph.operators]
    before, after = _nearest(layers), _nearest(layers[::-1])[::-1]
    return [
        wish.shows(at) if at >= 0 else wish.shows(left) or wish.shows(right)
        for at, left, right in zip(layers, before, after, strict=True)
    ]


def _nearest(layers: list[int]) -> list[int]:
    """The last layer up to each operator; -1 before the first."""
    found, last = [], -1
    for layer in layers:
        last = layer if layer >= 0 else last
        found.append(last)
    return found


def _block(sheet: Sheet, op: Operator) -> str:
    if op.layer < 0:
        return ""
    if op.name == "attention_norm":
        return "attention"
    if op.name == "ffn_norm":
        return "experts" if sheet.model.has_experts(op.layer) else "network"
    return sheet.block


def _input(sheet: Sheet) -> Node:
    at = np.arange(len(sheet.ranks))
    op = sheet.graph.operators[0]
    assert op.call is not None
    ids = sheet.tensor("ids", at, ("tokens", op.call.columns["tokens"], sheet.graph.tokens))
    return Node("input", "Input: token ids", END, -1, "input", 0, -1, "", sheet.ranks, gives=(ids,))


def _output(sheet: Sheet) -> Node:
    op = sheet.graph.operators[-1]
    assert op.call is not None
    made = op.call.columns["tokens"]
    taken = sheet.tensor(
        "made", np.arange(len(sheet.ranks)), ("tokens", made, float(made[:: sheet.tp].sum()))
    )
    return Node(
        "output", "Output: new tokens", END, -1, "output", sheet.stage, -1, "", sheet.ranks, takes=(taken,)
    )


def _left_out(sheet: Sheet, indices: list[int]) -> Iterator[Part]:
    """One node in place of layers that are not drawn, and of what lies between them."""
    operators, hidden = [sheet.graph.operators[index] for index in indices], sheet.model.hidden
    first, last = operators[0], operators[-1]
    if first.stage != sheet.stage:
        sheet.enter(first.stage)
    at = np.arange(len(sheet.ranks))
    # A layer begins with a norm that reads the stream once, and ends with a sum of two that is written.
    taken = sheet.hidden("stream", at, first.bytes / (2 * WIDTH * hidden))
    given = sheet.hidden("stream", at, last.bytes / (3 * WIDTH * hidden))
    given = Tensor(given.name, sheet.graph.ranks[last.stage], given.numbers, given.dims)
    layers = f"layer {first.layer}" if last.layer == first.layer else f"layers {first.layer} to {last.layer}"
    node = Node(
        f"l{first.layer}-{last.layer}", f"… {layers}: {len(operators):,} operators", REST, -1, "layers",
        first.stage, -1, "", sheet.graph.ranks[first.stage : last.stage + 1].ravel(), (taken,), (given,),
        sum(float(op.flop.sum()) for op in operators),
    )  # fmt: skip
    yield from joined(node, sheet.registers)
    if last.stage != sheet.stage:
        sheet.enter(last.stage)


# ---- what several places have --------------------------------------------------------------------


def embedding(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """A row of the table for every token, on every rank of the shard."""
    assert op.call is not None
    tokens = op.call.columns["tokens"]
    for suffix, at in sheet.lanes:
        takes = [sheet.tensor("ids", at, ("tokens", tokens, sheet.graph.tokens))]
        gives = [sheet.hidden("stream", at, op.bytes / (2 * WIDTH * sheet.model.hidden))]
        yield sheet.node(index, op, "Embedding", suffix, at, takes, gives)


def norm(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Reads the residual stream, which goes on beside it."""
    tokens = op.bytes / (2 * WIDTH * sheet.model.hidden)
    for suffix, at in sheet.lanes:
        yield sheet.node(
            index,
            op,
            "RMS norm",
            suffix,
            at,
            [sheet.hidden("stream", at, tokens)],
            [sheet.hidden("x", at, tokens)],
        )


def residual(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """The residual stream and what the block made of it, added."""
    tokens = op.bytes / (3 * WIDTH * sheet.model.hidden)
    for suffix, at in sheet.lanes:
        takes = [sheet.hidden("delta", at, tokens), sheet.hidden("stream", at, tokens)]
        yield sheet.node(index, op, "Residual sum", suffix, at, takes, [sheet.hidden("stream", at, tokens)])


def in_place(title: str, *names: str) -> Form:
    """What reads and writes the same tensors: of `names`, those that this model has."""

    def form(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
        for suffix, at in sheet.lanes:
            held = [name for name in names if sheet.registers.has(name, sheet.ranks[at])]
            there = sum(sheet.registers.numbers(name, sheet.ranks[at]).sum() for name in held)
            # What it says that it touches; were it other than what lies there, the check would see it.
            scale = float(op.bytes[at].sum()) / (2 * WIDTH) / there if there else 1.0
            takes = [sheet.same(name, at, scale) for name in held]
            yield sheet.node(index, op, title, suffix, at, takes, takes)

    return form


def rotary(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Queries and keys are turned; of latent attention the parts with position."""
    names = ("query_rope", "key_rope") if sheet.model.mla else ("query", "key")
    yield from in_place("Rotary positions", *names)(sheet, index, op)


def exchanged(title: str, name: str) -> Form:
    """An exchange of whole tokens, in place."""

    def form(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
        yield from sheet.swapped(index, op, title, name, name, WIDTH)

    return form


def column_product(title: str, taken: str, given: str, divided: bool) -> Form:
    """The first product of a network without experts."""

    def form(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
        assert op.call is not None
        c, tp = op.call.columns, sheet.tp if divided else 1
        said = f"{title} (column parallel)" if tp > 1 else title
        for suffix, at in sheet.lanes:
            tokens = ("tokens", c["m"], sheet.graph.tokens)
            takes = [sheet.tensor(taken, at, tokens, ("hidden", c["k"], sheet.model.hidden))]
            gives = [sheet.tensor(given, at, tokens, ("ffn", c["n"], float(c["n"].max()) * tp))]
            yield sheet.node(index, op, said, suffix, at, takes, gives)

    return form


def activation(name: str, divided: bool) -> Form:
    """Between the products of a network without experts; where it is gated, half as wide as what comes."""

    def form(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
        assert op.call is not None
        tokens, tp = op.call.columns["tokens"], sheet.tp if divided else 1
        numbers = np.divide(op.bytes / WIDTH, tokens, out=np.zeros(len(tokens)), where=tokens > 0)
        up = 2 if sheet.model.ffn_kind == "gated" else 1
        wide, narrow = numbers * up / (up + 1), numbers / (up + 1)
        first = ("tokens", tokens, sheet.graph.tokens)
        for suffix, at in sheet.lanes:
            takes = [sheet.tensor(name, at, first, ("ffn", wide, float(wide.max()) * tp))]
            gives = [sheet.tensor(name, at, first, ("ffn", narrow, float(narrow.max()) * tp))]
            yield sheet.node(index, op, experts.said_activation(sheet), suffix, at, takes, gives)

    return form


def row_product(title: str, taken: str, given: str, divided: bool) -> Form:
    """The second product of a network without experts."""

    def form(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
        assert op.call is not None
        c, tp = op.call.columns, sheet.tp if divided else 1
        said = f"{title} (row parallel)" if tp > 1 else title
        for suffix, at in sheet.lanes:
            tokens = ("tokens", c["m"], sheet.graph.tokens)
            takes = [sheet.tensor(taken, at, tokens, ("ffn", c["k"], float(c["k"].max()) * tp))]
            yield sheet.node(index, op, said, suffix, at, takes, [sheet.hidden(given, at, c["m"])])

    return form


# ---- between stages, and at the end --------------------------------------------------------------


def hand_over(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Every GPU sends what it holds, or its slice of it, to its peer of the next stage."""
    exchange = op.exchange
    assert exchange is not None
    here, there = exchange.groups.T
    tokens = exchange.size / (WIDTH * sheet.model.hidden)
    title = f"Hand-over: stage {op.stage} to {op.stage + 1}"
    for suffix, at in sheet.lanes:
        yield from experts.own_slice(sheet, op, "stream", tokens, suffix, at)
        taken = sheet.hidden("stream", at, tokens)
        given = sheet.hidden("stream", at, tokens)
        arrived = Tensor(given.name, there[at], given.numbers, given.dims)
        pairs = exchange.groups[at]
        yield sheet.node(
            index, op, title, suffix, at, [taken], [arrived], ranks=np.concatenate([here[at], there[at]]),
            sent=float(exchange.size[at].sum()), note=said_groups(pairs),
        )  # fmt: skip


def lm_head(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Scores of the vocabulary, for those tokens that a new one follows."""
    assert op.call is not None
    c = op.call.columns
    made = float(c["m"][:: sheet.tp].sum())
    for suffix, at in sheet.lanes:
        held = np.zeros(len(sheet.ranks))
        held[at] = sheet.registers.numbers("x", sheet.ranks[at]) / sheet.model.hidden
        last = sheet.hidden("x", at, c["m"], made)
        if not np.allclose(held[at], c["m"][at]):
            title = "Tokens that a new one follows"
            yield sheet.view(
                "last_tokens", title, -1, suffix, at, [sheet.hidden("x", at, held)], [last], ROUTING
            )
        gives = [sheet.tensor("logits", at, ("tokens", c["m"], made), ("vocab", c["n"], sheet.model.vocab))]
        said = "LM head (column parallel)" if sheet.tp > 1 else "LM head"
        yield sheet.node(index, op, said, suffix, at, [last], gives)


def sampling(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """The next token of each sequence."""
    assert op.call is not None
    tokens = op.call.columns["tokens"]
    made = float(tokens[:: sheet.tp].sum())
    vocab = np.divide(op.bytes / (2 * SCORE), tokens, out=np.zeros(len(tokens)), where=tokens > 0)
    for suffix, at in sheet.lanes:
        takes = [sheet.tensor("logits", at, ("tokens", tokens, made), ("vocab", vocab, sheet.model.vocab))]
        yield sheet.node(
            index, op, "Sampling", suffix, at, takes, [sheet.tensor("made", at, ("tokens", tokens, made))]
        )


#: Name of an operator → how it is drawn. Whoever lowers something else adds a line.
FORMS: dict[str, Form] = {
    "embedding": embedding,
    "stage_all_gather": exchanged("Whole tokens again: all-gather", "stream"),
    "attention_norm": norm,
    "qkv": attention.qkv,
    "qk_norm": in_place("Norm of queries and keys", "query", "key"),
    "query": attention.query,
    "latents": attention.latents,
    "latent_norm": in_place("Norm of latent vectors", "latent_q", "latent_kv"),
    "query_up": attention.query,
    "rotary": rotary,
    "kv_up": attention.kv_up,
    "query_absorb": attention.query_absorb,
    "attention": attention.heads,
    "value_up": attention.value_up,
    "attention_output": attention.output,
    "attention_all_reduce": exchanged("Attention: all-reduce", "delta"),
    "attention_residual": residual,
    "ffn_norm": norm,
    "ffn_up": column_product("Up projection", "x", "inner", True),
    "ffn_activation": activation("inner", True),
    "ffn_down": row_product("Down projection", "inner", "delta", True),
    "ffn_all_reduce": exchanged("Network: all-reduce", "delta"),
    "gate": experts.gate,
    "top_k": experts.top_k,
    "permute": experts.permute,
    "dispatch": experts.dispatch,
    "expert_all_gather": experts.among_sharers,
    "expert_gemm_1": experts.product,
    "expert_activation": experts.product,
    "expert_gemm_2": experts.product,
    "expert_reduce_scatter": experts.among_sharers,
    "combine": experts.combine,
    "unpermute": experts.unpermute,
    "shared_up": column_product("Shared experts: up", "x", "shared", False),
    "shared_activation": activation("shared", False),
    "shared_down": row_product("Shared experts: down", "shared", "shared", False),
    "shared_sum": experts.shared_sum,
    "ffn_all_gather": exchanged("Slices together: all-gather", "delta"),
    "ffn_residual": residual,
    "stage_transfer": hand_over,
    "final_norm": norm,
    "lm_head": lm_head,
    "sampling": sampling,
}
